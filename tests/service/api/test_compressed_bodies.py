"""Compressed bodies: the same answers, the limits of the decompressed bytes, and damaged or hostile streams."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import tracemalloc
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
from client import HEIGHT, LIMITS, WIDTH, Client, predict_scope
from encoding import encode, npy
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from service.api import compression
from service.api.app import create_app
from service.api.compression import CODINGS, Decompressor, compressed
from service.errors import MalformedBodyError, TooCostlyError
from service.inference.classifier import Classifier
from service.settings import Settings

MIB = 2**20
PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
IMAGE = npy(np.full((1, HEIGHT, WIDTH), 7, np.uint8))
TENSOR = {"name": "image", "shape": [1, 1, HEIGHT, WIDTH], "datatype": "FP64", "data": [0.5] * HEIGHT * WIDTH}
BODIES = {
    "/predict": ("application/x-npy", IMAGE),
    "/predict/batch": ("application/x-npy", npy(np.full((2, 1, HEIGHT, WIDTH), 7, np.uint8))),
    "/v2/models/grey/infer": ("application/json", json.dumps({"inputs": [TENSOR]}).encode()),
    "/v2/repository/index": ("application/json", b'{"ready": true}'),
    "/v1/models/grey:predict": ("application/json", b'{"instances": [%s]}' % json.dumps([[0.5] * 5] * 4).encode()),
}


def headers(coding: str, media_type: str = "application/x-npy", **more: str) -> dict[str, str]:
    return {"Content-Type": media_type, "Content-Encoding": coding, **more}


@pytest.mark.parametrize("coding", ["gzip", "deflate", "GZIP", "x-gzip", "identity"])
@pytest.mark.parametrize("path", BODIES)
def test_a_compressed_body_has_the_answer_of_the_plain_one(client: Client, path: str, coding: str) -> None:
    media_type, content = BODIES[path]
    plain = client.post(path, content=content, headers={"Content-Type": media_type})
    assert plain.status_code == 200
    packed = PACK.get(coding.lower().removeprefix("x-"), bytes)(content)
    response = client.post(path, content=packed, headers=headers(coding, media_type))
    assert (response.status_code, response.content) == (200, plain.content)


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, deflate", "gzip,gzip", "compress", "é" * 500])
@pytest.mark.parametrize("path", BODIES)
def test_another_coding_is_refused_with_those_that_are_read(client: Client, path: str, coding: str) -> None:
    media_type = BODIES[path][0].encode()
    fields = [(b"content-type", media_type), (b"content-encoding", coding.encode())]
    response = client.post(path, content=IMAGE, headers=fields)
    assert response.status_code == 415
    assert response.headers["accept-encoding"] == "gzip, deflate"
    assert len(response.content) <= 4096


def bomb(coding: str, size: int) -> bytes:
    packer = zlib.compressobj(9, wbits={"gzip": 31, "deflate": 15}[coding])
    return b"".join(packer.compress(bytes(MIB)) for _ in range(size // MIB)) + packer.flush()


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("path", BODIES)
def test_a_bomb_is_refused_at_the_limit_of_the_decompressed_bytes(client: Client, path: str, coding: str) -> None:
    content = bomb(coding, 16 * MIB)
    assert len(content) < LIMITS["max_body_bytes"]
    tracemalloc.start()
    response = client.post(path, content=content, headers=headers(coding, BODIES[path][0]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert response.status_code == 413
    assert peak < 2 * MIB


def test_a_body_of_exactly_the_limit_is_read(client: Client) -> None:
    limit = LIMITS["max_body_bytes"]
    for size, status in ((limit, 422), (limit + 1, 413)):
        response = client.post("/predict", content=gzip.compress(bytes(size)), headers=headers("gzip"))
        assert response.status_code == status


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "plain": lambda _: IMAGE,
    "truncated": lambda packed: packed[:-3],
    "only a header": lambda packed: packed[:2],
    "bytes after the end": lambda packed: packed + b"x",
    "two members": lambda packed: packed + packed,
    "another checksum": lambda packed: packed[:-8] + bytes(8),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_stream_is_a_problem(client: Client, kind: str, coding: str) -> None:
    response = client.post("/predict", content=DAMAGED[kind](PACK[coding](IMAGE)), headers=headers(coding))
    assert response.status_code == 400
    assert f"Content-Encoding {coding}" in response.json()["detail"]


def test_the_processor_time_of_a_stream_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_CPU_S", 0.01)
    # Blocks of ten bits that hold nothing.
    empty = b"\x02\x08\x20\x80\x00" * 13_000
    decompressor = Decompressor("deflate", MIB)
    assert b"".join(decompressor.pieces(b"\x78\x9c" + empty)) == b""
    with pytest.raises(TooCostlyError):
        list(decompressor.pieces(empty * 200))


def test_bytes_that_no_encoder_shortens_are_read() -> None:
    content = random.Random(1).randbytes(3 * MIB)
    for coding in CODINGS:
        decompressor = Decompressor(coding, 4 * MIB)
        packed = zlib.compressobj(1, memLevel=1, wbits={"gzip": 31, "deflate": 15}[coding])
        stream = packed.compress(content) + packed.flush()
        assert b"".join([*decompressor.pieces(stream), decompressor.finish()]) == content


@given(st.binary(max_size=2000), st.sampled_from(CODINGS), st.integers(1, 64))
def test_the_division_into_chunks_changes_nothing(content: bytes, coding: str, size: int) -> None:
    packed = compressed(content, coding)
    decompressor = Decompressor(coding, 4 * MIB)
    found = [
        piece for start in range(0, len(packed), size) for piece in decompressor.pieces(packed[start : start + size])
    ]
    assert b"".join([*found, decompressor.finish()]) == content


@given(st.binary(max_size=300), st.sampled_from(CODINGS))
def test_any_bytes_are_read_or_refused(content: bytes, coding: str) -> None:
    decompressor = Decompressor(coding, 4 * MIB)
    with suppress(MalformedBodyError):
        list(decompressor.pieces(content))
        decompressor.finish()


async def exchange(app: FastAPI, messages: list[Any], fields: Mapping[str, str]) -> int:
    """The status of the answer to a request whose body comes in `messages`; null never comes."""
    status = 0

    async def receive() -> Any:
        message = messages.pop(0)
        if message is None:
            await asyncio.Event().wait()
        return message

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    await app(predict_scope(fields), receive, send)
    return status


def test_waiting_bytes_are_those_in_memory(classifiers: Mapping[str, Classifier]) -> None:
    app = create_app(
        Settings(default_model="grey", max_body_bytes=MIB, max_waiting_bytes=MIB, client_share=1.0), classifiers
    )
    fields = headers("gzip")

    def half(size: int) -> dict[str, Any]:
        packer = zlib.compressobj(9, wbits=31)
        body = packer.compress(bytes(size)) + packer.flush(zlib.Z_SYNC_FLUSH)
        return {"type": "http.request", "body": body, "more_body": True}

    async def test() -> None:
        waiting = asyncio.create_task(exchange(app, [half(600_000), None], fields))
        while not app.state.service.batcher._admission._bytes:
            await asyncio.sleep(0.01)
        assert app.state.service.batcher._admission._bytes == 600_000
        # A few hundred bytes, and as many in memory as have no room.
        assert await exchange(app, [half(600_000)], fields) == 503
        assert await exchange(app, [{"type": "http.request", "body": gzip.compress(IMAGE)}], fields) == 200
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert app.state.service.batcher._admission._bytes == 0

    asyncio.run(test())


def test_others_are_served_while_a_body_is_decompressed(classifiers: Mapping[str, Classifier]) -> None:
    app = create_app(Settings(default_model="grey"), classifiers)

    async def test() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            large = asyncio.create_task(http.post("/predict", content=bomb("gzip", 15 * MIB), headers=headers("gzip")))
            await asyncio.sleep(0)
            assert (await http.get("/health/live")).status_code == 200
            assert not large.done()
            assert (await large).status_code == 422

    asyncio.run(test())


@pytest.mark.parametrize("coding", CODINGS)
def test_an_answer_of_the_protocol_is_compressed_on_demand(client: Client, coding: str) -> None:
    tensor = {**TENSOR, "shape": [4, 1, HEIGHT, WIDTH], "data": [0.5] * 4 * HEIGHT * WIDTH}
    asked = {"inputs": [tensor], "parameters": {"counterfactual": True}}
    plain = client.post("/v2/models/grey/infer", json=asked)
    # What httpx sends by itself is no demand.
    assert "content-encoding" not in plain.headers
    response = client.post("/v2/models/grey/infer", json=asked, headers={"Accept-Encoding": coding})
    assert response.headers["content-encoding"] == coding
    assert response.content == plain.content
    assert int(response.headers["content-length"]) < len(plain.content)


def test_a_short_answer_is_not_compressed(client: Client) -> None:
    asked = {"inputs": [TENSOR], "outputs": [{"name": "radius"}]}
    response = client.post("/v2/models/grey/infer", json=asked, headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in response.headers


def test_bytes_without_a_type_are_an_image_file_or_an_array_by_their_signature(client: Client) -> None:
    octets = {"Content-Type": "application/octet-stream"}
    png = encode(np.full((HEIGHT, WIDTH), 7, np.uint8))
    expected = client.post("/predict", content=png, headers={"Content-Type": "image/png"})
    assert expected.status_code == 200
    for content in (png, encode(np.full((HEIGHT, WIDTH), 7, np.uint8), "BMP"), IMAGE):
        response = client.post("/predict?epsilon=0.5", content=content, headers=octets)
        assert response.json()["certificate"]["epsilon"] == 0.5
        assert response.json()["logits"] == expected.json()["logits"]
    batch = npy(np.full((2, 1, HEIGHT, WIDTH), 7, np.uint8))
    assert client.post("/predict/batch", content=batch, headers=octets).status_code == 200
    for content in (b"\x93NUMPX", b"{}", b"\x93NUMPY", bytes(100)):
        assert client.post("/predict", content=content, headers=octets).status_code == 422
        assert client.post("/predict/batch", content=content, headers=octets).status_code == 422
