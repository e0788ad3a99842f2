"""Fields of a protobuf message, counted before any object is made of it.

A field of two bytes becomes an object of a hundred: a message of 16 MB without a limit would take a gigabyte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from service.errors import MalformedBodyError

Nested: TypeAlias = "Mapping[int, Nested]"
"""Numbers of the fields that are messages, and of the fields inside of these."""

_MOST_FIELDS = 1024
_LENGTH, _FIXED = 2, {1: 8, 5: 4}
_PARAMETERS: Nested = {2: {}}
INFER: Nested = {4: _PARAMETERS, 5: {4: _PARAMETERS, 5: {}}, 6: {2: _PARAMETERS}}
"""Of ModelInferRequest."""


def check_fields(content: bytes, nested: Nested) -> None:
    """Raise `MalformedBodyError` for a message that has more fields than a request needs, or no encoding.

    Args:
        content: the message, in the encoding of protobuf.
        nested: its fields that are messages.
    """
    waiting = [(0, len(content), nested)]
    left = _MOST_FIELDS
    while waiting:
        at, end, inside = waiting.pop()
        while at < end:
            left -= 1
            if left < 0:
                raise MalformedBodyError(
                    f"the message has more than {_MOST_FIELDS} fields; send one tensor with all images, its numbers "
                    "packed or as raw_input_contents"
                )
            tag, at = _varint(content, at)
            kind = tag & 7
            if kind == 0:
                _, at = _varint(content, at)
            elif kind in _FIXED:
                at += _FIXED[kind]
            elif kind == _LENGTH:
                length, at = _varint(content, at)
                if tag >> 3 in inside:
                    waiting.append((at, at + length, inside[tag >> 3]))
                at += length
            else:
                raise no_message()
        if at > end:
            raise no_message()


def no_message() -> MalformedBodyError:
    """Return the answer to bytes that are not the message of their method."""
    return MalformedBodyError("the bytes are not a message of this method; make them with stubs of its .proto file")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Return an integer and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            break
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise no_message()
