"""Targets of the fuzzers: each takes bytes of any content, and raises only where the product has a defect.

A target returns normally for accepted input and for input that is refused as documented. `python tests/fuzz/run.py`
(`make fuzz`) searches for inputs that raise; `test_corpus.py` repeats every input of the corpus.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import builders
from tiff_files import tiff

from service.api.app import create_app
from service.artefact.card import read_card
from service.artefact.files import CARD_FILE
from service.audit import audit
from service.certificate import certify
from service.errors import ArtefactError, InputError, KeptError
from service.inference.classifier import Classifier
from service.network.operators import UnsupportedModelError
from service.network.reader import read_draft
from service.pixels.images import decode_image, encode_png
from service.settings import Settings

SHAPE = (1, 4, 5)
_LIMITS = {"max_body_bytes": 65_536, "max_pixels": 4096, "max_batch": 8}
_LARGEST_PROBLEM = 4096
# Multiply-adds of a proof: a search for defects tries many small models.
_WORK = 2.0**24
_BOUNDARY = "frontier"


class DefectError(Exception):
    """The product did what it must not do; the message states it."""


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lipcert-fuzz-"))
    atexit.register(shutil.rmtree, folder)
    random = np.random.default_rng(7)
    for name, shape in (("grey", SHAPE), ("colour", (3, 4, 5))):
        weights = random.normal(size=(3, int(np.prod(shape)))), random.normal(size=3)
        builders.write(folder / "zoo" / name, builders.linear(*weights, shape), name)
    return folder


@functools.cache
def _application() -> tuple[asyncio.Runner, Any]:
    runner = asyncio.Runner()
    atexit.register(runner.close)
    zoo = _folder() / "zoo"
    settings = Settings(models=zoo, default_model="grey", workers=1, **_LIMITS)  # type: ignore[arg-type]
    classifiers = {folder.name: Classifier.load(folder, "cpu", 1) for folder in zoo.iterdir()}
    return runner, create_app(settings, classifiers)


def _post(path: str, media_type: str, body: bytes, query: bytes = b"") -> tuple[int, bytes]:
    """Return status and body of the response of the application to one request."""
    runner, app = _application()
    status, parts = 0, []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query,
        "headers": [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())],
    }
    runner.run(app(scope, receive, send))
    return status, b"".join(parts)


def _check(path: str, media_type: str, body: bytes, query: bytes = b"") -> None:
    status, answer = _post(path, media_type, body, query)
    if status >= 500:
        raise DefectError(f"status {status}: {answer[:500]!r}")
    if status != 200 and len(answer) > _LARGEST_PROBLEM:
        raise DefectError(f"a problem document of {len(answer)} bytes")
    json.loads(answer)


def predict_json(data: bytes) -> None:
    """Post a JSON body to `/predict`."""
    _check("/predict", "application/json", data)


def predict_batch(data: bytes) -> None:
    """Post a JSON body to `/predict/batch`."""
    _check("/predict/batch", "application/json", data)


def infer(data: bytes) -> None:
    """Post a JSON body to the Open Inference Protocol."""
    _check("/v2/models/grey/infer", "application/json", data)


def form(data: bytes) -> None:
    """Post a form to `/predict`."""
    _check("/predict", f"multipart/form-data; boundary={_BOUNDARY}", data)


def query(data: bytes) -> None:
    """Post a valid image with options in the query."""
    _check("/predict", "image/png", encode_png(np.zeros(SHAPE, np.uint8)), data)


def npy(data: bytes) -> None:
    """Post arrays to both routes."""
    for path in ("/predict", "/predict/batch"):
        _check(path, "application/x-npy", data, b"")


def image(data: bytes) -> None:
    """Decode an image file, over a background; pixels that are accepted are those of a file that is made of them."""
    try:
        pixels_CHW = decode_image(data, _LIMITS["max_pixels"], background="#408040")
    except InputError:
        return
    if pixels_CHW.dtype not in (np.uint8, np.float64) or pixels_CHW.shape[0] not in (1, 3):
        raise DefectError(f"{pixels_CHW.dtype} of shape {pixels_CHW.shape}")
    if pixels_CHW.dtype == np.uint8:
        written = encode_png(pixels_CHW)
    else:
        levels_CHW = np.rint(pixels_CHW * 65535.0).astype(np.uint16)
        if not np.array_equal(levels_CHW / 65535.0, pixels_CHW):
            raise DefectError("a pixel is no 16-bit value")
        written = tiff(np.moveaxis(levels_CHW, 0, -1))
    again_CHW = decode_image(written, _LIMITS["max_pixels"])
    if not np.array_equal(again_CHW, pixels_CHW):
        raise DefectError("pixels change when they are written and read")
    _check("/predict", "image/png", data, b"resize=true&background=408040")


def tiff_image(data: bytes) -> None:
    """Decode these bytes as the strip of a TIFF file with a valid directory, of a size in the first bytes."""
    coding, rows, columns, *strip = data.ljust(4, b"\0")
    height, width = 1 + rows % 20, 1 + columns % 20
    compression, predictor = ((5, 1), (8, 1), (32773, 1), (5, 2))[coding % 4]
    values = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 8, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in {**values, 317: predictor}.items())
    directory = struct.pack("<H", 1 + len(values)) + entries + bytes(4)
    image(b"II*\0" + struct.pack("<I", 8 + len(strip)) + bytes(strip) + directory)


def network(data: bytes) -> None:
    """Read an ONNX file, and certify what can be read."""
    try:
        draft = read_draft(data, _WORK)
        certificate = certify(draft)
    except UnsupportedModelError:
        return
    if not (certificate.margin_bounds_KK >= 0.0).all():
        raise DefectError("a bound is negative or no number")


def card(data: bytes) -> None:
    """Read a card."""
    folder = _folder() / "card"
    folder.mkdir(exist_ok=True)
    (folder / CARD_FILE).write_bytes(data)
    try:
        read_card(folder)
    except ArtefactError as error:
        if "\0" in str(error):
            raise DefectError("a message has control characters") from error


def archived_answer(data: bytes) -> None:
    """Audit an archived answer."""
    folder = _folder()
    (folder / "answer.json").write_bytes(data)
    (folder / "image.png").write_bytes(encode_png(np.zeros(SHAPE, np.uint8)))
    try:
        audit(folder / "answer.json", folder / "image.png", folder / "zoo" / "grey")
    except KeptError:
        return


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__.replace("_", "-"): target
    for target in (
        predict_json,
        predict_batch,
        infer,
        form,
        query,
        npy,
        image,
        tiff_image,
        network,
        card,
        archived_answer,
    )
}
"""By name, which is also the name of the corpus."""
