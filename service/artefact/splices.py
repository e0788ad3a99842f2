"""A graph as pieces of a file, from which the server puts together the verified bytes.

The graphs that run are written by the process that proves the model. Their weights are those of `model.onnx`, or the
same numbers in float64, so that a few ranges of that file and a few thousand bytes between them are the whole graph.
The server joins them when the graph is first run; it holds no second copy of the weights until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from service.network.operators import Constant

_SHORTEST = 1024
"""Bytes of an array that is looked for in the file."""
_PREFIX = 64
"""Bytes that are looked for before an array is compared."""
_ATTEMPTS = 16
"""Places that are compared."""


@dataclass(frozen=True)
class Range:
    """Consecutive bytes of the file."""

    start: int
    length: int
    widened: bool
    """Whether they are float32 numbers, little-endian, that the graph holds as float64."""


@dataclass(frozen=True)
class Ranges:
    """The arrays of a file, and of the same numbers in float64, by their content."""

    of: dict[Constant, Range]
    _places: dict[int, tuple[np.ndarray, bytes | Range]] = field(
        default_factory=dict[int, "tuple[np.ndarray, bytes | Range]"]
    )
    """By the identity of an array, which is held for it: several graphs have the same ones."""

    @classmethod
    def in_file(cls, file: bytes, held: Sequence[np.ndarray]) -> Ranges:
        """Return where arrays stand in a file.

        Args:
            file: its bytes.
            held: arrays that it holds, in their order.
        """
        found: dict[Constant, Range] = {}
        end = 0
        for array in held:
            if array.nbytes < _SHORTEST:
                continue
            part = array.tobytes()
            start = _start(file, part, end)
            if start < 0:
                continue
            end = start + len(part)
            found.setdefault(Constant(array), Range(start, len(part), widened=False))
            if array.dtype == np.float32:
                found.setdefault(Constant(array.astype(np.float64)), Range(start, len(part), widened=True))
        return cls(found)

    def place(self, array: np.ndarray) -> bytes | Range:
        """Return where the content of an array stands, or the content; an array must not change after that."""
        known = self._places.get(id(array))
        if known is None:
            found = self.of.get(Constant(array)) if array.nbytes >= _SHORTEST else None
            known = self._places[id(array)] = array, array.tobytes() if found is None else found
        return known[1]


def _start(file: bytes, part: bytes, first: int) -> int:
    """Return where `part` stands behind `first`, or -1; a search for all of it would prepare tables of its size.

    Not found is a piece that is no range. So a file of zeros, with which everything begins, is not compared with itself
    at each of its places.
    """
    for _ in range(_ATTEMPTS):
        first = file.find(part[:_PREFIX], first)
        if first < 0 or file.startswith(part, first):
            return first
        first += 1
    return -1


@dataclass(frozen=True)
class Splice:
    """A graph as literal bytes and ranges of a file."""

    pieces: tuple[bytes | Range, ...]

    @classmethod
    def of(cls, pieces: Sequence[bytes | np.ndarray], ranges: Ranges) -> Splice:
        """Return the graph of some pieces, with ranges of a file in place of arrays that stand there."""
        return cls(tuple(piece if isinstance(piece, bytes) else ranges.place(piece) for piece in pieces))

    def join(self, file: bytes) -> bytes:
        """Return the graph; the file must be the one that the ranges are of (`files.read_verified`)."""
        return b"".join(_content(piece, file) for piece in self.pieces)


def _content(piece: bytes | Range, file: bytes) -> bytes | memoryview:
    if isinstance(piece, bytes):
        return piece
    content = memoryview(file)[piece.start : piece.start + piece.length]
    return np.frombuffer(content, "<f4").astype("<f8").tobytes() if piece.widened else content
