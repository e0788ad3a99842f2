"""Multipart forms (RFC 7578): the file of field `image`, and options as text fields.

The body is parsed in memory, where it is already: a server on a read-only file system cannot spool. The parser is
`MultipartParser` of python_multipart. Its `FormParser` copies every file twice (1.3 times the time for a small image,
twice for 1 MB) and decodes `Content-Transfer-Encoding`, which RFC 7578 (section 4.7) deprecates.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import MalformedBodyError, UnknownOptionError

_MAX_PARTS = 32

# It warns about every form that it refuses; the answer says so.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


def parse_form(body: bytes, content_type: str, known: Sequence[str]) -> tuple[bytes, list[tuple[str, str]]]:
    """Return the file of field `image`, and the names and values of the text fields, in order.

    Args:
        body: the form.
        content_type: the header, which has the boundary.
        known: names of the text fields.

    Raises:
        MalformedBodyError: the body is not such a form, or does not have exactly one file `image`.
        UnknownOptionError: a field has another name.
    """
    images: list[bytes] = []
    fields: list[tuple[str, str]] = []
    for part in _parts(body, content_type):
        _, parameters = parse_options_header(part.disposition)
        try:
            name = parameters[b"name"].decode("utf-8")
            if name != "image":
                if name not in known:
                    raise UnknownOptionError([name], ["image", *known], "form")
                fields.append((name, part.data.decode("utf-8")))
                continue
        except (KeyError, UnicodeDecodeError):
            raise MalformedBodyError(
                "a part of the form has no name or is not UTF-8 text; send the file as field image and the options as "
                "text fields"
            ) from None
        if b"filename" not in parameters:
            raise MalformedBodyError(
                "the form field image is text, not a file; send it as a file (curl -F image=@digit.png)"
            )
        images.append(bytes(part.data))
    if len(images) != 1:
        count = f"{len(images)} file fields image" if images else "no file field image"
        raise MalformedBodyError(
            f"the form has {count}; send exactly one (curl -F image=@digit.png); several images go to /predict/batch"
        )
    return images[0], fields


@dataclass
class _Part:
    disposition: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    header_name: bytes = b""
    header_value: bytes = b""


def _parts(body: bytes, content_type: str) -> list[_Part]:
    parts: list[_Part] = []
    complete = False

    def begin() -> None:
        if len(parts) == _MAX_PARTS:
            raise MalformedBodyError(f"the form has more than {_MAX_PARTS} parts; send one image and its options")
        parts.append(_Part())

    def header_name(data: bytes, start: int, end: int) -> None:
        parts[-1].header_name += data[start:end]

    def header_value(data: bytes, start: int, end: int) -> None:
        parts[-1].header_value += data[start:end]

    def header_end() -> None:
        part = parts[-1]
        if part.header_name.lower() == b"content-disposition":
            part.disposition = part.header_value
        part.header_name = part.header_value = b""

    def content(data: bytes, start: int, end: int) -> None:
        parts[-1].data += data[start:end]

    def end() -> None:
        nonlocal complete
        complete = True

    _, parameters = parse_options_header(content_type)
    try:
        parser = MultipartParser(
            parameters[b"boundary"],
            {
                "on_part_begin": begin,
                "on_header_field": header_name,
                "on_header_value": header_value,
                "on_header_end": header_end,
                "on_part_data": content,
                "on_end": end,
            },
        )
        parser.write(body)
        parser.finalize()
    except (KeyError, FormParserError, ValueError):
        complete = False
    if not complete:
        raise MalformedBodyError(
            "the body is not multipart/form-data with the boundary of its Content-Type, or is truncated; let the "
            "client write both (curl -F image=@digit.png)"
        )
    return parts
