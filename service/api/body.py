"""Reading of request bodies: headers, media types, and bytes up to the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.requests import ClientDisconnect, Request

from service.errors import (
    BodyTooLargeError,
    EmptyBodyError,
    MediaTypeError,
)

JSON = "application/json"
FORM = "multipart/form-data"
NPY = "application/x-npy"
IMAGES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif")
PREDICT_TYPES = (JSON, FORM, *IMAGES, NPY)
BATCH_TYPES = (JSON, NPY)
_DISCARD_BYTES = 64 * 1024 * 1024


def headers_of(request: Request) -> dict[str, str]:
    """Return the first value of each header by its lower-case name, decoded once for several look-ups."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(request.scope["headers"])}


def media_type_of(headers: Mapping[str, str], accepted: Sequence[str]) -> str:
    """Return the media type of the body, in lower case and without parameters.

    Raises:
        MediaTypeError: it is missing or not in `accepted`. Every `image/...` is accepted where one is, because the
            bytes determine the format.
    """
    header = headers.get("content-type", "")
    media_type = header.partition(";")[0].strip().lower()
    if media_type in accepted or (media_type.startswith("image/") and IMAGES[0] in accepted):
        return media_type
    raise MediaTypeError(header, accepted)


def declared_length(headers: Mapping[str, str], default: int) -> int:
    """Return the length of the body in bytes as the header declares it; `default` without a declaration."""
    declared = headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else default


async def read_body(request: Request, headers: Mapping[str, str], max_bytes: int) -> bytes:
    """Return the complete body; never more than `max_bytes` of it are in memory.

    Args:
        request: its body is still unread.
        headers: see `headers_of`.
        max_bytes: limit of the length.

    Raises:
        BodyTooLargeError: the declared or the real length is above the limit.
        EmptyBodyError: the body is empty.
        ClientDisconnect: the client has closed the connection.
    """
    declared = declared_length(headers, default=0)
    too_large = declared > max_bytes
    if too_large and ("expect" in headers or declared > max_bytes + _DISCARD_BYTES):
        raise BodyTooLargeError(max_bytes)
    chunks: list[bytes] = []
    length = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        length += len(chunk)
        if length > max_bytes + _DISCARD_BYTES:
            break
        if too_large or length > max_bytes:
            # Closing while the client still writes would reset the connection before the client has read the answer, so
            # some more is read and discarded.
            too_large = True
            chunks.clear()
        else:
            chunks.append(chunk)
    if too_large:
        raise BodyTooLargeError(max_bytes)
    if length == 0:
        raise EmptyBodyError("the body is empty; send an image in one of the forms listed in /docs")
    return b"".join(chunks)
