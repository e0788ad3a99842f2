"""One part of a run, from its inputs to its files: the same function in a process and in a task of Ray."""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.api.schema import Options
from service.bulk.containers import Item, Reading, read_inputs
from service.bulk.listing import Part, Piece
from service.bulk.locations import UnreachableError, content_of, is_url, stamp
from service.bulk.tables import Origin, Record, answer_schema, answers, write_part
from service.errors import ImageTooLargeError, InputError, LipcertError
from service.inference.outcome import Decoded
from service.sheets.files import UnusableFileError
from service.sheets.in_process import InProcess
from service.sheets.sources import RefusedError, SourceError

_TRIES = 3
"""Of a file behind a URL; the second and the third wait."""
_PAUSE_S = 0.5
_FETCHED = 16
"""Files behind URLs that are read at the same time."""
_WAITING = 4
"""Decoded images that wait for others of their shape, in units of `LIPCERT_MAX_PIXELS`."""


@dataclass(frozen=True)
class Job:
    """What all parts of a run share."""

    run: str
    """Digest of the manifest."""
    model: Path
    digests: tuple[str, str]
    """Of the model and of its card."""
    options: Options
    reading: Reading
    out: Path
    """Folder of the results."""


def certify_part(job: Job, line: str) -> Record:
    """Certify the inputs of a part and write its files; the model is loaded once in a process.

    Args:
        job: of the run.
        line: of the part, see `Part.of`.

    Raises:
        SourceError: the model or a source has changed, or there is no library for a URL.
        OSError: a file cannot be written.
    """
    return _certifier(job).certify(Part.of(line))


@functools.lru_cache(maxsize=1)
def _certifier(job: Job) -> Certifier:
    return Certifier(job)


class Certifier:
    """The model in this process, and the container that it reads."""

    def __init__(self, job: Job) -> None:
        """Verify and load the model as the server does; raises `SourceError` where it is not that of the run."""
        self._job = job
        self._source = InProcess(job.model, job.options, threads=1)
        classifier = self._source.classifier
        if (classifier.digest, classifier.card_digest) != job.digests:
            raise SourceError(f"{job.model} has changed since the run began: put it back, or choose another --out")
        try:
            Decoded(classifier, np.zeros((1, *classifier.input_shape)), job.options).view()
        except LipcertError as error:
            raise SourceError(str(error)) from error
        self._schema = answer_schema(job.options)
        self._name, self._next, self._inputs = "", 0, iter(())

    def certify(self, part: Part) -> Record:
        """Certify the inputs of a part and write its files; raises as `certify_part`."""
        batches = _Batches(self._source, self._schema)
        for number, (name, item) in enumerate(self._items(part), part.first):
            origin = Origin(number, name, item.item or None, item.key)
            content = item.content
            try:
                if isinstance(content, Exception):
                    raise RefusedError(str(content)) from content
                batches.add(origin, self._decoded(content))
            except RefusedError as error:
                batches.refuse(origin, error)
        batches.flush()
        return write_part(self._job.out, (self._job.run, part.number), batches.tables, batches.failures, self._schema)

    def _decoded(self, content: bytes | np.ndarray) -> np.ndarray:
        if isinstance(content, bytes):
            return self._source.decode(content)
        most = self._source.most_pixels
        if content[0].size > most:
            error = ImageTooLargeError(f"it has {content[0].size} pixels", most)
            raise RefusedError(str(error)) from error
        return content

    def _items(self, part: Part) -> Iterator[tuple[str, Item]]:
        for is_remote, pieces in itertools.groupby(part.pieces, lambda one: one.kind == "file" and is_url(one.name)):
            if is_remote:
                yield from _fetched(list(pieces), self._read)
                continue
            for piece in pieces:
                if piece.kind == "file":
                    yield piece.name, self._read(piece)
                elif piece.kind == "fault":
                    yield piece.name, Item("", None, SourceError(piece.reason or ""))
                else:
                    for item in self._inputs_of(piece):
                        yield piece.name, item

    def _read(self, piece: Piece) -> Item:
        content = _content(piece.name, self._source.most_bytes)
        if not is_url(piece.name):
            _check_unchanged(piece)
        return Item("", None, content)

    def _inputs_of(self, piece: Piece) -> Iterator[Item]:
        """Yield one item for each input of a range of a container, errors where it can no longer be read."""
        position, tries = piece.start, _TRIES if is_url(piece.name) else 1
        reason: Exception = SourceError("the file holds fewer inputs than when it was listed")
        while position < piece.stop and tries:
            try:
                inputs = self._opened(piece, position)
                for item in itertools.islice(inputs, piece.stop - position):
                    position += 1
                    self._next = position
                    yield item
                tries = 0
            except SourceError:
                raise
            except Exception as error:
                self._close()
                _check_unchanged(piece)
                tries, reason = tries - 1, error
                if tries:
                    time.sleep(_PAUSE_S)
        for number in range(position, piece.stop):
            yield Item(str(number), None, SourceError(f"it cannot be read ({reason or type(reason).__name__})"))

    def _opened(self, piece: Piece, position: int) -> Iterator[Item]:
        """Return the inputs of a container from a position on; most often it is open, and its next part follows."""
        if self._name != piece.name or self._next > position:
            self._close()
            _check_unchanged(piece)
            assert piece.kind not in ("file", "fault")
            self._inputs = read_inputs(piece.kind, piece.name, position, self._job.reading)
            self._name, self._next = piece.name, position
        return itertools.islice(self._inputs, position - self._next, None)

    def _close(self) -> None:
        if isinstance(self._inputs, Generator):
            self._inputs.close()
        self._name, self._inputs = "", iter(())


class _Batches:
    """Decoded images of a part that wait for others of their shape, and the results."""

    def __init__(self, source: InProcess, schema: Any) -> None:
        self.tables: list[Any] = []
        self.failures: list[tuple[Origin, str]] = []
        self._source, self._schema = source, schema
        self._waiting: dict[tuple[int, ...], list[tuple[Origin, np.ndarray]]] = {}
        self._pixels = 0

    def add(self, origin: Origin, pixels_CHW: np.ndarray) -> None:
        """Take an image; compute a batch that is complete."""
        pixels = pixels_CHW[0].size
        batch = self._waiting.setdefault(pixels_CHW.shape, [])
        batch.append((origin, pixels_CHW))
        self._pixels += pixels
        if len(batch) >= min(self._source.most_images, max(1, self._source.most_pixels // pixels)):
            self._pixels -= pixels * len(batch)
            self._compute(self._waiting.pop(pixels_CHW.shape))
        elif self._pixels > _WAITING * self._source.most_pixels:
            self.flush()

    def flush(self) -> None:
        """Compute all batches."""
        for batch in self._waiting.values():
            self._compute(batch)
        self._waiting.clear()
        self._pixels = 0

    def refuse(self, origin: Origin, error: RefusedError) -> None:
        """Note an input without an answer; raise `SourceError` for an error that is not about the input."""
        if not isinstance(error.__cause__, InputError | UnusableFileError | SourceError | OSError | ValueError):
            raise SourceError(str(error)) from error
        self.failures.append((origin, str(error)))

    def _compute(self, batch: list[tuple[Origin, np.ndarray]]) -> None:
        origins = [origin for origin, _ in batch]
        try:
            outcome = self._source.compute([pixels_CHW for _, pixels_CHW in batch])
        except RefusedError as error:
            if len(batch) == 1:
                self.refuse(origins[0], error)
                return
            # One of them is refused, and answers must not depend on the batch.
            for one in batch:
                self._compute([one])
            return
        self.tables.append(answers(outcome, origins, self._schema))


def _content(name: str, most_bytes: int) -> bytes | Exception:
    """Return the bytes of a file, or the error of the last try to read it."""
    for further in reversed(range(_TRIES if is_url(name) else 1)):
        try:
            return content_of(name, most_bytes)
        except UnusableFileError as error:
            if not (further and isinstance(error, UnreachableError)):
                return error
            time.sleep(_PAUSE_S)
    raise AssertionError


def _check_unchanged(piece: Piece) -> None:
    """Raise `SourceError` if the file is not the one that was listed."""
    if stamp(piece.name) != piece.stamp:
        raise SourceError(
            f"{piece.name} has changed since it was listed; put it back, or certify the new files with another --out"
        )


def _fetched(pieces: list[Piece], read: Any) -> Iterator[tuple[str, Item]]:
    """Yield the items of files behind URLs in order; some files ahead are read at the same time."""
    pending: deque[tuple[Piece, Future[Item]]] = deque()
    with ThreadPoolExecutor(_FETCHED) as pool:
        for piece in pieces:
            pending.append((piece, pool.submit(read, piece)))
            if len(pending) >= _FETCHED:
                done, future = pending.popleft()
                yield done.name, future.result()
        for done, future in pending:
            yield done.name, future.result()
