"""The body of a request: bytes to options and to an image that is still encoded.

Options have one place in each form of request: the object of a JSON body, the fields of a form, the query of
a raw body. The same name twice, a name that is not known, and options in the query of a JSON or form body are
refused: a misspelt `epsilon` must not be lost in silence.
"""

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
    """The headers by their lower-case names, the first of each; looked up many times, so decoded once."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(request.scope["headers"])}


def media_type_of(headers: Mapping[str, str], accepted: Sequence[str]) -> str:
    """Media type of the body, lower case and without parameters.

    Raises:
        MediaTypeError: there is none, or it is not one of `accepted`; any `image/...` will do where one does,
            because the bytes decide what they are.
    """
    header = headers.get("content-type", "")
    media_type = header.partition(";")[0].strip().lower()
    if media_type in accepted or (media_type.startswith("image/") and IMAGES[0] in accepted):
        return media_type
    raise MediaTypeError(header, accepted)


def declared_length(headers: Mapping[str, str], default: int) -> int:
    """Bytes of the body as its header states them; `default` where it does not."""
    declared = headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else default


async def read_body(request: Request, headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The whole body, never holding more than `max_bytes` of it.

    Args:
        request: nothing of it is read yet.
        headers: see `headers_of`.
        max_bytes: longest body.

    Raises:
        BodyTooLargeError: declared or real length above the limit.
        EmptyBodyError: no bytes.
        ClientDisconnect: the client has gone.
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
            # Closing while the client still writes would reset the connection before it has read the answer;
            # so some more is read, and thrown away.
            too_large = True
            chunks.clear()
        else:
            chunks.append(chunk)
    if too_large:
        raise BodyTooLargeError(max_bytes)
    if length == 0:
        raise EmptyBodyError("the body is empty; send an image, see /docs for the forms it can have")
    return b"".join(chunks)
