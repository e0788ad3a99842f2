"""Bodies that child processes decode: the same result as in this process, and no trust in a child."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from typing import Any

import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from costly_bodies import exif, form, infer
from encoding import encode, npy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from thorough import often

from service.api import decoding
from service.api.body import Head
from service.api.decoding import Decoders, Order, decode, decode_in_child
from service.children import Limits
from service.errors import LipcertError, NotAnImageError, TooCostlyError, quotations

SHAPES = {"grey": (1, HEIGHT, WIDTH), "colour": (3, HEIGHT, WIDTH)}
JSON, FORM, NPY = "application/json", "multipart/form-data; boundary=X", "application/x-npy"
GREY = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
COLOUR = np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
LARGE = np.random.default_rng(3).integers(0, 256, (90, 120, 3), np.uint8)


def order(kind: Any, media_type: str = JSON, query: tuple[tuple[str, str], ...] = (), **changes: Any) -> Order:
    head = Head(media_type.partition(";")[0], media_type, None, False, math.inf, False)
    return Order(kind, head, query, "grey", SHAPES, {"broken": "weights are missing."}, 100_000, 8)._replace(**changes)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def in_child(what: Order, content: bytes) -> decoding.Request:
    async def ask() -> decoding.Request:
        async with Decoders().decoded(what, content) as body:
            return body

    return asyncio.run(ask())


RESIZE = (("resize", "true"), ("epsilon", "0.1"))
BODIES: dict[str, tuple[Order, bytes]] = {
    "PNG": (order("predict", "image/png", RESIZE), encode(LARGE)),
    "palette PNG": (order("predict", "image/png"), encode(Image.fromarray(COLOUR).quantize(5))),
    "JPEG": (order("predict", "image/jpeg", RESIZE), encode(LARGE, "JPEG")),
    "progressive JPEG": (order("predict", "image/jpeg", RESIZE), encode(LARGE, "JPEG", progressive=True)),
    "WebP": (order("predict", "image/webp", RESIZE), encode(LARGE, "WEBP")),
    "lossless WebP": (order("predict", "image/webp", RESIZE), encode(LARGE, "WEBP", lossless=True)),
    "BMP": (order("predict", "image/bmp"), encode(GREY, "BMP")),
    "GIF": (order("predict", "image/gif"), encode(GREY, "GIF")),
    "JSON": (
        order("predict"),
        json.dumps(
            {"image": text(encode(LARGE, "JPEG")), "resize": True, "epsilon": 0.1 + 0.2, "model": "colour"}
        ).encode(),
    ),
    "form": (order("predict", FORM), form(encode(GREY, "BMP"))),
    "npy": (order("predict", NPY), npy(GREY / 255.0)),
    "batch": (order("batch"), json.dumps({"images": [text(encode(GREY, "GIF"))] * 3, "max_error": 0.25}).encode()),
    "npy batch": (order("batch", NPY), npy(np.stack([GREY, GREY]))),
    "numbers": (order("infer"), infer(json.dumps((GREY / 255.0).ravel().tolist()), (1, 1, HEIGHT, WIDTH))),
    "nested numbers": (
        order("infer"),
        infer(
            json.dumps([[GREY.tolist()]] * 2), (2, 1, HEIGHT, WIDTH), "UINT8", ',"id":"é","outputs":[{"name":"radius"}]'
        ),
    ),
    "half floats": (order("infer"), infer("[" + "0.1," * 19 + "1]", (1, 1, HEIGHT, WIDTH), "FP16")),
}
REFUSED: dict[str, tuple[Order, bytes]] = {
    "damaged": (order("predict", "image/jpeg", RESIZE), encode(LARGE, "JPEG")[:-9]),
    "size": (order("predict", "image/jpeg"), encode(LARGE, "JPEG")),
    "pixels": (order("predict", "image/jpeg", max_pixels=100), encode(LARGE, "JPEG")),
    "model": (order("predict"), b'{"image": "", "model": "none"}'),
    "broken model": (order("predict"), b'{"image": "", "model": "broken"}'),
    "second of a batch": (order("batch"), json.dumps({"images": [text(encode(GREY, "GIF")), "!"]}).encode()),
    "option": (order("predict"), b'{"image": "", "epsilon": -1}'),
    "unknown": (order("predict", "image/gif", (("rezise", "1"),)), encode(GREY, "GIF")),
    "ragged": (order("infer"), infer("[[0],[0,1]]", (1, 1, HEIGHT, WIDTH))),
    "not JSON": (order("infer"), b"["),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_child_decodes_a_body_to_the_bit_as_this_process_does(kind: str) -> None:
    expected, found = decode(*BODIES[kind]), in_child(*BODIES[kind])
    assert found.model == expected.model
    assert found.pixels_NCHW.dtype == expected.pixels_NCHW.dtype
    assert np.array_equal(found.pixels_NCHW, expected.pixels_NCHW)
    without = {"image", "images", "inputs"}
    assert found.options.model_dump() == expected.options.model_dump(exclude=without)


@pytest.mark.parametrize("kind", REFUSED)
def test_the_error_of_a_child_is_that_of_this_process(kind: str) -> None:
    with pytest.raises(LipcertError) as expected:
        decode(*REFUSED[kind])
    with pytest.raises(LipcertError) as found:
        in_child(*REFUSED[kind])
    assert type(found.value) is type(expected.value)
    assert str(found.value) == str(expected.value)


@settings(max_examples=often(15, 60), suppress_health_check=[HealthCheck.too_slow])
@given(st.floats(0, 1e300), st.floats(0, 1, exclude_min=True, exclude_max=True), st.text(max_size=20))
def test_options_arrive_as_they_were_sent(epsilon: float, coverage: float, target: str) -> None:
    options = {"epsilon": epsilon, "coverage": coverage, "target": target, "counterfactual": True}
    content = json.dumps({"image": text(encode(GREY, "GIF")), **options}).encode()
    head, body = decode_in_child(order("predict"), content)
    found = decoding._request(order("predict"), json.loads(head), memoryview(bytes(body)))
    assert found.options.model_dump(include=set(options)) == options


def test_limits_are_those_of_one_body(monkeypatch: pytest.MonkeyPatch) -> None:
    what, content = BODIES["JPEG"]
    monkeypatch.setattr(decoding, "_limits", lambda *_: Limits(0.001, 2**28))
    slow = encode(np.random.default_rng(1).integers(0, 256, (1200, 1200, 3), np.uint8), "JPEG")
    with pytest.raises(TooCostlyError, match="plain PNG"):
        in_child(order("predict", "image/jpeg", RESIZE, max_pixels=2**21), slow)
    monkeypatch.setattr(decoding, "_limits", lambda *_: Limits(5.0, 2**21))
    with pytest.raises(TooCostlyError, match="memory"):
        in_child(order("predict", "image/png", RESIZE), encode(LARGE, exif=exif(60_000, 700_000) + bytes(700_000)))
    monkeypatch.undo()
    assert in_child(what, content).pixels_NCHW.shape == (1, 3, 90, 120)


@pytest.mark.parametrize(
    "head",
    [
        {"traceback": "ValueError: a defect"},
        {"error": "Exception", "detail": ""},
        {"error": "LipcertError", "detail": ""},
        {"model": "grey", "options": {}, "shape": [1, 1, 4, 6], "is_uint8": True},
        {"model": "grey", "options": {}, "shape": [20], "is_uint8": True},
        {"model": "grey", "options": {}, "shape": [1, 2, 2, 5], "is_uint8": True},
    ],
)
def test_a_child_is_not_believed(head: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="a child process"):
        decoding._request(order("predict"), head, memoryview(bytes(20)))


def test_a_defect_in_a_child_is_one_of_the_server(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a child process failed on a body: secret")

    monkeypatch.setattr(decoding, "_request", fail)
    response = client.post("/predict", content=encode(GREY, "GIF"), headers={"Content-Type": "image/gif"})
    assert response.status_code == 500
    assert "secret" not in response.text


def test_few_decoded_pixels_wait_at_the_same_time() -> None:
    """Each body has 100 pixels of 100 permitted: four wait for their answer before another is decoded."""
    content = encode(np.zeros((10, 10), np.uint8), "GIF")
    what = order("predict", "image/gif", (("resize", "true"),), max_pixels=100)
    decoders = Decoders()

    async def many() -> int:
        inside = most = 0

        async def one(number: int) -> None:
            nonlocal inside, most
            async with decoders.decoded(what, content) as body:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0.02)
                inside -= 1
                assert body.pixels_NCHW.shape == (1, 1, 10, 10)
                if number % 5 == 0:
                    raise NotAnImageError("in between")

        waiting = [asyncio.ensure_future(one(number)) for number in range(40)]
        await asyncio.sleep(0.01)
        waiting[-1].cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert sum(isinstance(result, NotAnImageError) for result in results) == 8
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 1
        return most

    most = asyncio.run(many())
    assert 2 <= most <= 4
    assert decoders._pixels == 0


LONG = "\U0001f600" * 50_000


def test_no_problem_document_is_long(client: Client) -> None:
    image = {"Content-Type": "image/png"}
    for response in (
        client.get("/" + "x" * 20_000),
        client.post("/models/" + "x" * 20_000),
        client.get("/models/" + "é" * 5_000),
        client.get("/v2/models/" + "é" * 5_000),
        client.post("/predict", content=b"x", headers={"Content-Type": "text/" + "x" * 20_000}),
        client.post("/predict?" + "n" * 8_000, content=b"x", headers=image),
        client.post("/predict?" + "n" * 50_000, content=b"x", headers=image),
        client.post("/predict?" + "&".join(f"n{n}" for n in range(500)), content=b"x", headers=image),
        client.post("/predict?model=" + "%00" * 2_000, content=encode(GREY), headers=image),
        client.post(
            "/predict",
            content=json.dumps({"image": "", LONG[:1000]: 1}).encode()[:19_000],
            headers={"Content-Type": JSON},
        ),
        client.post("/predict", json={"image": text(encode(GREY)), "model": LONG[:1500]}),
        client.post("/predict", json={"image": text(encode(GREY)), "counterfactual": True, "target": LONG[:1500]}),
        client.post("/predict", json={"image": "", **{f"{n}" * 100: 1 for n in range(100)}}),
        client.post("/v2/models/grey/infer", json={"inputs": [{"x" * 9000: 1}]}),
        client.post("/v2/models/grey/infer?" + "é" * 1000, json={}),
    ):
        assert 400 <= response.status_code < 500, response.text[:200]
        assert len(response.content) <= 4096, response.text[:200]
        assert response.json()["detail"]


def test_texts_of_clients_are_shortened_and_lists_of_names_end() -> None:
    assert quotations.quoted("a'b") == '"a\'b"'
    assert quotations.quoted("x" * 101) == repr("x" * 100 + "...")
    assert quotations.shortened("x" * 100) == "x" * 100
    assert quotations.listed(["a", "b"]) == "a, b"
    names = [f"label {n}" for n in range(1000)]
    assert quotations.listed(names).startswith("label 0, label 1, ")
    assert quotations.listed(names).endswith(" more")
    assert len(quotations.listed(names)) < 1100
