"""Files with more than 8 bits or with transparency, from every form of request to the answer and its audit."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_cases import archive
from client import Client
from encoding import encode, npy
from PIL import Image
from tiff_files import tiff

from service.audit import Conclusion
from service.errors import KeptError
from service.pixels.images import image_digest

RANDOM = np.random.default_rng(23)
DEEP = RANDOM.integers(0, 65536, (4, 5, 1)).astype(np.uint16)
UNITS = np.moveaxis(DEEP, -1, 0) / 65535.0
CLEAR = RANDOM.integers(0, 256, (4, 5, 2), np.uint8)
FLAT = np.rint((CLEAR[..., 1] * CLEAR[..., 0].astype(float) + (255 - CLEAR[..., 1].astype(float)) * 64) / 255)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ask(client: Client, form: str, data: bytes, **options: Any) -> dict[str, Any]:
    """The answer about one image file, sent in one of the forms."""
    if form == "json":
        sent = {"json": {"image": text(data), **options}}
    elif form == "form":
        sent = {"files": {"image": data}, "data": options}
    elif form == "body":
        sent = {"content": data, "headers": {"Content-Type": "image/tiff"}, "params": options}
    else:
        response = client.post("/predict/batch", json={"images": [text(data)], **options})
        return response.raise_for_status().json()["predictions"][0] if response.status_code == 200 else response.json()
    return client.post("/predict", **sent).json()


@pytest.mark.parametrize("form", ["json", "form", "body", "batch"])
def test_16_bits_are_answered_as_the_same_values_of_an_array(client: Client, form: str) -> None:
    array = client.post("/predict", content=npy(UNITS), headers={"Content-Type": "application/x-npy"}).json()
    assert array["image"]["digest"] == image_digest(UNITS)
    for data in (tiff(DEEP), tiff(DEEP, ">", 5), encode(DEEP[..., 0])):
        assert ask(client, form, data) == array


@pytest.mark.parametrize("form", ["json", "form", "body", "batch"])
@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_a_transparent_file_is_answered_as_its_composite(client: Client, form: str, image_format: str) -> None:
    data = tiff(CLEAR) if image_format == "TIFF" else encode(Image.fromarray(CLEAR))
    assert "background=#rrggbb" in ask(client, form, data)["detail"]
    assert "background is not valid; expected a colour #rrggbb" in ask(client, form, data, background="white")["detail"]
    flat = ask(client, form, encode(FLAT.astype(np.uint8)))
    assert "background" not in flat["image"]
    for background in ("#404040", "404040"):
        found = ask(client, form, data, background=background)
        assert found["image"].pop("background") == background
        assert found == flat


def test_instances_of_kserve_take_the_background(client: Client) -> None:
    body = {"instances": [{"b64": text(tiff(CLEAR))}], "parameters": {"background": "#404040"}}
    found = client.post("/v1/models/grey:predict", json=body).raise_for_status().json()
    flat = {"instances": [{"b64": text(encode(FLAT.astype(np.uint8)))}]}
    expected = client.post("/v1/models/grey:predict", json=flat).raise_for_status().json()
    assert found["predictions"][0].get("radius") == expected["predictions"][0].get("radius")


def test_a_batch_of_8_and_16_bits_has_the_pixels_of_each(client: Client) -> None:
    grey = encode(FLAT.astype(np.uint8))
    files = [encode(DEEP[..., 0]), grey, tiff(DEEP)]
    found = client.post("/predict/batch", json={"images": [text(file) for file in files]}).raise_for_status().json()
    assert found["predictions"] == [ask(client, "json", file) for file in files]


def test_references_of_16_bits_are_arrays(client: Client) -> None:
    answer = ask(client, "json", tiff(DEEP), proof="best", epsilon=9.0)
    for reference in answer["certificate"]["references"]:
        assert reference["media_type"] == "application/x-npy"
        pixels = np.load(io.BytesIO(base64.b64decode(reference["image"])))
        assert image_digest(pixels) == reference["digest"]


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (tiff(DEEP), {}),
        (tiff(CLEAR), {"background": "#404040"}),
        (encode(Image.fromarray(CLEAR)), {"background": "0F0f0F"}),
    ],
)
def test_the_audit_reads_the_file_as_the_answer_says(
    client: Client, zoo: Path, tmp_path: Path, data: bytes, options: dict[str, str]
) -> None:
    kept = archive(client, data, zoo / "grey", counterfactual=True, **options)
    verdict = kept.check(tmp_path)
    assert verdict.conclusion is Conclusion.HOLDS, verdict
    if options:
        with pytest.raises(KeptError, match="background"):
            kept.check(tmp_path, kept.changed(image__background=None))
        assert kept.check(tmp_path, kept.changed(image__background="#414141")).conclusion is not Conclusion.HOLDS
