"""A graph as pieces of a file: what the server needs to put together the bytes that were verified.

The graphs that run are written by the process that proves the model. Their weights are those of `model.onnx`, or the
same numbers in float64, so that a few ranges of that file and a few thousand bytes between them are the whole graph.
The server joins them when the graph is first run; it holds no second copy of the weights until then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHORTEST = 1024
"""Bytes of an array that is looked for in the file."""
_PREFIX = 64
"""Bytes that are looked for before an array is compared."""
_ATTEMPTS = 16
"""Places that are compared before all of an array is looked for."""


@dataclass(frozen=True)
class Range:
    """Consecutive bytes of the file."""

    start: int
    length: int
    widened: bool
    """Whether they are float32 numbers, little-endian, that the graph holds as float64."""


@dataclass(frozen=True)
class Splice:
    """A graph as literal bytes and ranges of a file."""

    pieces: tuple[bytes | Range, ...]
    digest: bytes
    """SHA-256 of the graph."""

    @classmethod
    def of(cls, graph: bytes, stored: Sequence[np.ndarray], file: bytes) -> Splice:
        """Take a graph apart.

        Args:
            graph: its bytes.
            stored: arrays that it holds.
            file: in which they may stand, too.
        """
        pieces: list[bytes | Range] = []
        done = 0
        for start, length, found in sorted(_places(graph, stored, file)):
            if start >= done:
                pieces += [graph[done:start], found]
                done = start + length
        return cls((*pieces, graph[done:]), hashlib.sha256(graph).digest())

    def join(self, file: bytes) -> bytes:
        """Return the graph.

        Raises:
            ValueError: the file is not the one that the graph was taken apart with.
        """
        graph = b"".join(piece if isinstance(piece, bytes) else _content(piece, file) for piece in self.pieces)
        if hashlib.sha256(graph).digest() != self.digest:
            raise ValueError("the graph is not made of this file")
        return graph


def _content(piece: Range, file: bytes) -> bytes | memoryview:
    content = memoryview(file)[piece.start : piece.start + piece.length]
    if not piece.widened:
        return content
    return np.frombuffer(content, "<f4").astype("<f8").tobytes()


def _places(graph: bytes, stored: Sequence[np.ndarray], file: bytes) -> list[tuple[int, int, Range]]:
    """Return position and length in the graph, and the range of the file, of each array that stands in both."""
    places: list[tuple[int, int, Range]] = []
    for array in stored:
        content = array.tobytes()
        if len(content) < _SHORTEST:
            continue
        start, found = _find(graph, content), _find(file, content)
        if start >= 0 and found >= 0:
            places.append((start, len(content), Range(found, len(content), widened=False)))
        elif start >= 0 and array.dtype == np.float64:
            with np.errstate(over="ignore"):
                narrow = array.astype("<f4")
            found = _find(file, narrow.tobytes()) if np.array_equal(narrow, array) else -1
            if found >= 0:
                places.append((start, len(content), Range(found, narrow.nbytes, widened=True)))
    return places


def _find(content: bytes, part: bytes) -> int:
    """Return where `part` stands in `content`, or -1.

    A search for all of it prepares tables: worth it only where its first bytes are frequent, zeros for example.
    """
    position = content.find(part[:_PREFIX])
    for _ in range(_ATTEMPTS):
        if position < 0 or content[position : position + len(part)] == part:
            return position
        position = content.find(part[:_PREFIX], position + 1)
    return content.find(part, position) if position >= 0 else -1
