"""Reading of requests: the headers that matter here, and the bytes of the body up to the limit."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import ClientDisconnect, Request

from service.api.compression import CODINGS, Decompressor
from service.errors import BodyTooLargeError, ContentCodingError, EmptyBodyError, MediaTypeError
from service.inference.admission import Place

JSON = "application/json"
FORM = "multipart/form-data"
NPY = "application/x-npy"
IMAGES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "image/tiff")
OCTETS = "application/octet-stream"
PREDICT_TYPES = (JSON, FORM, *IMAGES, NPY, OCTETS)
BATCH_TYPES = (JSON, NPY, OCTETS)
PROTOCOL_TYPES = (JSON, OCTETS, "application/x-www-form-urlencoded")
"""Of the Open Inference Protocol and KServe V1: their clients send JSON under any of them, or without a type."""
JSON_LENGTH = "Inference-Header-Content-Length"
"""Header of the binary tensor data extension: bytes of JSON before the tensors."""
_JSON_LENGTH = JSON_LENGTH.lower().encode()
_ANSWER_CODINGS = {coding.encode(): coding for coding in CODINGS}
_NPY_SIGNATURE = b"\x93NUMPY"
_DISCARD_BYTES = 64 * 1024 * 1024
_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,9})", re.IGNORECASE)


class Head(NamedTuple):
    """The headers of a request, as far as they matter here."""

    media_type: str
    """Media type of the body, in lower case and without parameters."""
    content_type: str
    """The whole header, which has the boundary of a form."""
    length: int | None
    """Declared length of the body in bytes."""
    expects: bool
    """Whether the client waits for permission to send the body (header `Expect`)."""
    wait_s: float
    """Seconds that the client will wait, by `Prefer: wait=SECONDS` (RFC 7240 section 4.3); default: infinite."""
    prefers_npy: bool
    """Whether the answer is an npy array, see `prefers_npy`."""
    coding: str = ""
    """Content coding of the body, in lower case; empty without one."""
    answer_coding: str = ""
    """Content coding that the client asks for: the only one in its `Accept-Encoding`, one of `CODINGS`, or empty.
    Libraries list all codings they can read in every request; that is no wish."""
    json_length: str | None = None
    """Header `JSON_LENGTH`, as sent."""


def read_head(request: Request, accepted: Sequence[str]) -> Head:
    """Return the headers of a request whose body has one of the `accepted` media types.

    Raises:
        MediaTypeError: the media type is missing or not accepted. Every `image/...` is accepted where one is, because
            the bytes determine the format.
        ContentCodingError: the body has another coding than `CODINGS`.
    """
    # The first value of each header.
    headers: dict[bytes, bytes] = dict(reversed(request.scope["headers"]))
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    # Clients of the protocols leave the header out; RFC 9110 (section 8.3) lets a server infer it.
    media_type = content_type.partition(";")[0].strip().lower() or (JSON if accepted is PROTOCOL_TYPES else "")
    if media_type not in accepted and not (media_type.startswith("image/") and IMAGES[0] in accepted):
        raise MediaTypeError(content_type, accepted)
    length = headers.get(b"content-length", b"").decode("latin-1")
    prefer, accept = headers.get(b"prefer"), headers.get(b"accept", b"").decode("latin-1")
    wait = None if prefer is None else _WAIT.search(prefer.decode("latin-1"))
    coding, json_length = headers.get(b"content-encoding"), headers.get(_JSON_LENGTH)
    return Head(
        media_type,
        content_type,
        int(length) if length.isdecimal() and len(length) < 20 else None,
        b"expect" in headers,
        float("inf") if wait is None else float(wait[1]),
        NPY in accept.lower() and prefers_npy(accept),
        "" if coding is None else _coding(coding.decode("latin-1")),
        _ANSWER_CODINGS.get(headers.get(b"accept-encoding", b""), ""),
        None if json_length is None else json_length.decode("latin-1"),
    )


def _coding(header: str) -> str:
    coding = header.strip().lower().removeprefix("x-")
    if coding not in ("", "identity", *CODINGS):
        raise ContentCodingError(coding, CODINGS)
    return "" if coding == "identity" else coding


def sniffed(head: Head, body: bytes) -> Head:
    """Return the head with the media type of bytes without one (`application/octet-stream`): npy, or an image file.

    The decoder of image files goes by their signature, whatever their type, and knows no npy file.
    """
    if head.media_type != OCTETS:
        return head
    return head._replace(media_type=NPY if body.startswith(_NPY_SIGNATURE) else IMAGES[0])


def prefers_npy(accept: str) -> bool:
    """Return whether a header `Accept` (RFC 9110 section 12.5.1) names `application/x-npy` and ranks JSON no higher."""
    weights: dict[str, float] = {}
    for choice in accept.lower().split(","):
        media_range, *parameters = (part.strip() for part in choice.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            weights[media_range] = float(weight)
        except ValueError:
            weights[media_range] = 0.0
    weight_npy = weights.get(NPY, 0.0)
    # The most specific range that matches JSON gives its weight.
    ranges = ("application/json", "application/*", "*/*")
    return weight_npy > 0.0 and weight_npy >= next((weights[name] for name in ranges if name in weights), 0.0)


async def read_body(request: Request, head: Head, max_bytes: int, place: Place) -> bytes:
    """Return the complete body without its content coding; never more than `max_bytes` of it are in memory.

    Args:
        request: its body is still unread.
        head: see `read_head`.
        max_bytes: limit of the length, as sent and decompressed.
        place: holds the bytes that have arrived; `Batcher.ask` adds a body that comes in one piece.

    Raises:
        OverloadedError: there is no room for the next bytes.
        BodyTooLargeError: the declared or the real length is above the limit.
        EmptyBodyError: the body is empty.
        MalformedBodyError, TooCostlyError: see `Decompressor`.
        ClientDisconnect: the client has closed the connection.
    """
    declared = head.length or 0
    too_large = declared > max_bytes
    if too_large and (head.expects or declared > max_bytes + _DISCARD_BYTES):
        raise BodyTooLargeError(max_bytes)
    decompressor = Decompressor(head.coding, max_bytes) if head.coding else None
    chunks: list[bytes] = []
    # As sent, and in memory.
    length = held = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        length += len(chunk)
        too_large = too_large or length > max_bytes
        if length > max_bytes + _DISCARD_BYTES:
            break
        if too_large:
            pass
        elif decompressor is None:
            chunks.append(chunk)
            held = length
        else:
            for piece in decompressor.pieces(chunk):
                chunks.append(piece)
                held += len(piece)
                too_large = held > max_bytes
                if too_large:
                    break
                # Others are served between two pieces.
                place.receive(length, held)
                await asyncio.sleep(0)
        if too_large:
            # Closing while the client still writes would reset the connection before the client has read the answer, so
            # some more is read and discarded.
            chunks.clear()
            held = 0
        if more:
            place.receive(length, held)
    if decompressor is not None and not too_large:
        chunks.append(decompressor.finish())
        held += len(chunks[-1])
        too_large = held > max_bytes
    if too_large:
        raise BodyTooLargeError(max_bytes)
    if held == 0:
        raise EmptyBodyError("the body is empty; send an image in one of the forms listed in /docs")
    return b"".join(chunks)
