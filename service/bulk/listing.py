"""From the words of a command to parts: the work orders of a run, one JSON line each, streamed to a file.

A part covers consecutive inputs: whole image files and ranges of containers. Listing the same words again gives the
same lines unless a source has changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

from service.bulk.containers import Kind, Reading, count_inputs, kind_of
from service.bulk.locations import files_of, is_url, opened, stamp
from service.sheets.sources import SourceError


class Piece(NamedTuple):
    """Consecutive inputs of one file."""

    kind: Kind | Literal["fault"]
    """`fault`: a container that cannot be read, one input that is an error."""
    name: str
    """Path or URL."""
    stamp: str | None
    """Text that changes with the file; null where it is unknown."""
    start: int = 0
    """Number of the first input."""
    stop: int = 1
    """Behind the last one."""
    reason: str | None = None
    """Why it is a fault."""


@dataclass(frozen=True)
class Part:
    """One work order, and one file of the results."""

    number: int
    first: int
    """Number of its first input among all inputs of the run."""
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """Inputs."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    def line(self) -> str:
        """Return the part as one line of JSON."""
        return json.dumps([self.number, self.first, self.pieces]) + "\n"

    @classmethod
    def of(cls, line: str) -> Part:
        """Return the part of a line."""
        number, first, pieces = json.loads(line)
        return cls(number, first, tuple(Piece(*piece) for piece in pieces))


def write_listing(file: IO[bytes], words: Iterable[str], reading: Reading, part_rows: int) -> int:
    """Write the parts of all sources, one on each line; return the number of inputs.

    Args:
        file: is written.
        words: sources of the command.
        reading: how containers are read.
        part_rows: inputs of a part.

    Raises:
        SourceError: a source cannot be listed.
    """
    rows = 0
    for part in _parts(_pieces(words, reading), part_rows):
        file.write(part.line().encode("ascii"))
        rows = part.first + part.rows
    return rows


def _parts(pieces: Iterable[Piece], part_rows: int) -> Iterator[Part]:
    number = first = taken = 0
    gathered: list[Piece] = []
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + part_rows - taken)
            gathered.append(piece._replace(start=start, stop=stop))
            taken += stop - start
            start = stop
            if taken == part_rows:
                yield Part(number, first, tuple(gathered))
                number, first, taken, gathered = number + 1, first + taken, 0, []
    if gathered:
        yield Part(number, first, tuple(gathered))


def _pieces(words: Iterable[str], reading: Reading) -> Iterator[Piece]:
    for word in words:
        if word.lower().endswith(".txt"):
            yield from _pieces(_lines(word), reading)
            continue
        for name, known in files_of(word):
            kind = kind_of(name)
            yield Piece("file", name, known) if kind == "file" else _container(kind, name, known, reading)


def _container(kind: Kind, name: str, known: str | None, reading: Reading) -> Piece:
    known = known or stamp(name)
    try:
        count = count_inputs(kind, name, reading)
    except SourceError:
        raise
    except Exception as error:
        # Of numpy, pyarrow, tarfile, zipfile or a library of fsspec: they have no common type.
        return Piece("fault", name, known, reason=f"it cannot be read ({error or type(error).__name__})")
    return Piece("file", name, known) if count is None else Piece(kind, name, known, 0, count)


def _lines(name: str) -> Iterator[str]:
    """Yield the sources that a text file lists; paths are relative to its folder.

    Raises:
        SourceError: it cannot be read, or a line names another list.
    """
    try:
        with opened(name) as file:
            for number, line in enumerate(file, 1):
                word = line.decode("utf-8").strip()
                if word.lower().endswith(".txt"):
                    raise SourceError(f"{name}, line {number}: a list in a list is not read; name it in the command")
                if word:
                    yield word if is_url(word) or is_url(name) else str(Path(name).parent / word)
    except (OSError, ValueError) as error:
        raise SourceError(f"the list {name} cannot be read: {error}") from error
