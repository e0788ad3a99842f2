"""The mixed requests of the chaos run, as bytes, and an HTTP/1.1 client that sends them as they are."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from encoding import encode, npy
from PIL import Image

NPY = "application/x-npy"
JSON = "application/json"
_SECOND_MODEL = "mnist-0-8"


@dataclass(frozen=True)
class Exchange:
    """A request; `weight` is its relative frequency."""

    name: str
    head: bytes
    body: bytes
    weight: float
    has_rotating_key: bool = False

    @property
    def is_head(self) -> bool:
        """Whether the answer has no body."""
        return self.head.startswith(b"HEAD ")


@dataclass(frozen=True)
class Answer:
    """A response as it arrived."""

    status: int
    body: bytes
    closes: bool

    @property
    def kind(self) -> str:
        """Suffix of the problem type, `not ready`, `not live`, or the status."""
        try:
            members = json.loads(self.body)
            found = members.get("type") or members.get("status")
        except (ValueError, AttributeError):
            found = None
        return str(found).rpartition(":")[2] if isinstance(found, str) else str(self.status)


@dataclass(frozen=True)
class Keys:
    """API keys of the run: one that stays, one that is rotated, one that may read metrics alone."""

    steady: str
    rotating: str
    narrow: str


async def read_answer(reader: asyncio.StreamReader, is_head: bool) -> Answer:
    """Return the next response; raise `OSError`, `IncompleteReadError` or `ValueError` if there is no whole one."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 "):
        raise ValueError(head)
    length = 0
    if not is_head:
        start = head.index(b"\r\ncontent-length: ") + 18
        length = int(head[start : head.index(b"\r\n", start)])
    return Answer(int(head[9:12]), await reader.readexactly(length), b"\r\nconnection: close" in head)


def mixed(images: list[Path], keys: Keys) -> list[Exchange]:
    """Return the requests, valid and invalid ones, about image files of the size of the models."""
    return [*_valid(images, keys), *_others(images[0].read_bytes(), keys)]


def posted_back(exchange: Exchange, answer: Answer, keys: Keys) -> Exchange | None:
    """Return a request with the counterfactual of an answer as its image; null without a counterfactual."""
    if not exchange.name.startswith("counterfactual"):
        return None
    found = json.loads(answer.body)["counterfactual"]
    again = _post(f"again-{exchange.name}", "/predict", "image/png", base64.b64decode(found["image"]), keys.steady, 1.0)
    return again if found["reached"] else None


def _valid(images: list[Path], keys: Keys) -> Iterator[Exchange]:
    files = [image.read_bytes() for image in images]
    arrays = [np.array(Image.open(io.BytesIO(file))) for file in files]
    texts = [base64.b64encode(file).decode() for file in files]
    for n, (file, array, text) in enumerate(zip(files, arrays, texts, strict=True)):
        key = keys.steady
        yield _post(f"png-{n}", "/predict", "image/png", file, key, 6.0)
        yield _post(f"npy-{n}", "/predict", NPY, npy(array), key, 3.0)
        yield _post(f"json-{n}", "/predict", JSON, json.dumps({"image": text}).encode(), key, 3.0)
        yield _post(f"form-{n}", "/predict", "multipart/form-data; boundary=x", _form(file, n), key, 3.0)
        yield _post(f"second-{n}", f"/predict?model={_SECOND_MODEL}&epsilon=0.25", "image/png", file, key, 1.0)
        jpeg = encode(Image.fromarray(array).resize((40, 40)), "JPEG")
        yield _post(f"jpeg-{n}", "/predict?resize=true", "image/jpeg", jpeg, key, 1.0)
        yield _post(f"rotating-{n}", "/predict", "image/png", file, keys.rotating, 1.0, has_rotating_key=True)
        yield _post(f"records-{n}", "/predict", "image/png", file, key, 1.0, "Accept: application/x-npy\r\n")
        if n < 3:
            yield _post(f"counterfactual-{n}", "/predict?counterfactual=true", "image/png", file, key, 0.3)
            yield _post(f"best-{n}", "/predict?proof=best", "image/png", file, key, 0.3)
    infer = {
        "inputs": [
            {"name": "image", "datatype": "FP64", "shape": [1, 1, *arrays[0].shape], "data": _numbers(arrays[0])}
        ]
    }
    yield _post("infer", f"/v2/models/{_SECOND_MODEL}/infer", JSON, json.dumps(infer).encode(), keys.steady, 1.0)
    yield _post("batch-json", "/predict/batch", JSON, json.dumps({"images": texts[:4]}).encode(), keys.steady, 2.0)
    yield _post("batch-npy", "/predict/batch", NPY, npy(np.stack(arrays)), keys.steady, 2.0)


def _others(file: bytes, keys: Keys) -> Iterator[Exchange]:
    key = keys.steady
    yield _get("live", "/health/live", None, 1.0)
    yield _get("ready", "/health/ready", None, 1.0)
    yield _get("head-ready", "/health/ready", None, 1.0, method="HEAD")
    yield _get("models", "/models", key, 1.0)
    yield _get("v2-model", f"/v2/models/{_SECOND_MODEL}", key, 1.0)
    yield _get("narrow", "/models", keys.narrow, 1.0)
    yield _get("not-found", "/nothing", key, 1.0)
    yield _get("no-key", "/models", None, 0.05)
    yield _post("wrong-key", "/predict", "image/png", file, f"{key[:-4]}AAAA", 0.05)
    yield _post("truncated", "/predict", "image/png", file[:-40], key, 1.0)
    yield _post("empty", "/predict", "image/png", b"", key, 1.0)
    yield _post("not-json", "/predict", JSON, b'{"image": ', key, 1.0)
    yield _post("unknown-field", "/predict?colour=red", "image/png", file, key, 1.0)
    yield _post("unknown-model", "/predict?model=none", "image/png", file, key, 1.0)
    yield _post("wrong-type", "/predict", "text/plain", file, key, 1.0)
    yield _post("wrong-size", "/predict", NPY, npy(np.zeros((9, 9), np.uint8)), key, 1.0)
    head = b"GET /health/live HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"
    yield Exchange("two-hosts", head, b"", 1.0)


def _post(
    name: str,
    target: str,
    content_type: str,
    body: bytes,
    key: str,
    weight: float,
    more: str = "",
    *,
    has_rotating_key: bool = False,
) -> Exchange:
    head = (
        f"POST {target} HTTP/1.1\r\nHost: a\r\nX-Request-ID: 1\r\nX-API-Key: {key}\r\n"
        f"Content-Type: {content_type}\r\n{more}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return Exchange(name, head.encode(), body, weight, has_rotating_key)


def _get(name: str, target: str, key: str | None, weight: float, method: str = "GET") -> Exchange:
    of_key = "" if key is None else f"X-API-Key: {key}\r\n"
    return Exchange(
        name, f"{method} {target} HTTP/1.1\r\nHost: a\r\nX-Request-ID: 1\r\n{of_key}\r\n".encode(), b"", weight
    )


def _form(file: bytes, n: int) -> bytes:
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="%d.png"\r\nContent-Type: image/png\r\n\r\n'
    return part % n + file + b"\r\n--x--\r\n"


def _numbers(array: np.ndarray) -> list[float]:
    return (array / 255.0).ravel().tolist()
