"""One part of a run, from its inputs to its files: the same function in a process and in a task of Ray."""

from __future__ import annotations

import functools
import gc
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
from service.bulk.containers import Item, Reading, Rows, read_inputs
from service.bulk.listing import Part, Piece
from service.bulk.locations import UnreachableError, content_of, is_url, stamp
from service.bulk.tables import Answers, Origin, Record, answer_schema, answer_table, answers, write_part
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
    """The model, options and folders of a run, the same for all its parts."""

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
    certifier = Certifier(job)
    # The collector would otherwise visit every loaded object again, which takes as long as some images.
    gc.freeze()
    return certifier


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
        self._name, self._next = "", 0
        self._inputs: Iterator[Item | Rows] = iter(())
        self._rest: Rows | None = None

    def certify(self, part: Part) -> Record:
        """Certify the inputs of a part and write its files; raises as `certify_part`."""
        batches = _Batches(self._source)
        number = part.first
        for name, item in self._items(part):
            if isinstance(item, Rows):
                origins = [
                    Origin(number + n, name, f"{item.prefix}{item.first + n}", None)
                    for n in range(len(item.pixels_NCHW))
                ]
            else:
                origins = [Origin(number, name, item.item or None, item.key)]
            number += len(origins)
            try:
                batches.add(origins, self._decoded(item))
            except RefusedError as error:
                for origin in origins:
                    batches.refuse(origin, error)
        batches.flush()
        table = answer_table(batches.answers, self._source.classifier, self._schema)
        return write_part(self._job.out, (self._job.run, part.number), table, batches.failures)

    def _decoded(self, item: Item | Rows) -> np.ndarray:
        content = item.pixels_NCHW if isinstance(item, Rows) else item.content
        if isinstance(content, Exception):
            raise RefusedError(str(content)) from content
        if isinstance(content, bytes):
            return self._source.decode(content)[np.newaxis]
        pixels_NCHW = content if isinstance(item, Rows) else content[np.newaxis]
        most = self._source.most_pixels
        if pixels_NCHW[0, 0].size > most:
            error = ImageTooLargeError(f"it has {pixels_NCHW[0, 0].size} pixels", most)
            raise RefusedError(str(error)) from error
        return pixels_NCHW

    def _items(self, part: Part) -> Iterator[tuple[str, Item | Rows]]:
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

    def _inputs_of(self, piece: Piece) -> Iterator[Item | Rows]:
        """Yield the inputs of a range of a container, errors where it can no longer be read."""
        position, tries = piece.start, _TRIES if is_url(piece.name) else 1
        reason: Exception = SourceError("the file holds fewer inputs than when it was listed")
        while position < piece.stop and tries:
            try:
                self._open(piece, position)
                while position < piece.stop and (item := self._take(piece.stop - position)):
                    position = self._next
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

    def _open(self, piece: Piece, position: int) -> None:
        """Open a container at a position; most often it is open, and its next part follows."""
        if self._name != piece.name or self._next > position:
            self._close()
            _check_unchanged(piece)
            assert piece.kind not in ("file", "fault")
            self._inputs = read_inputs(piece.kind, piece.name, position, self._job.reading)
            self._name, self._next = piece.name, position
        while self._next < position and self._take(position - self._next):
            pass

    def _take(self, most: int) -> Item | Rows | None:
        """Return the next inputs of the open container, `most` at most; null at its end."""
        item, self._rest = self._rest or next(self._inputs, None), None
        if isinstance(item, Rows):
            item, self._rest = item.split(most)
            self._next += len(item.pixels_NCHW)
        elif item:
            self._next += 1
        return item

    def _close(self) -> None:
        if isinstance(self._inputs, Generator):
            self._inputs.close()
        self._name, self._inputs, self._rest = "", iter(()), None


class _Batches:
    """Decoded images of a part that wait for others of their shape, and the results."""

    def __init__(self, source: InProcess) -> None:
        self.answers: list[Answers] = []
        self.failures: list[tuple[Origin, str]] = []
        self._source = source
        self._waiting: dict[tuple[int, ...], tuple[list[Origin], list[np.ndarray]]] = {}
        self._pixels = 0

    def add(self, origins: list[Origin], pixels_NCHW: np.ndarray) -> None:
        """Take images; compute batches that are complete."""
        shape, pixels = pixels_NCHW.shape[1:], pixels_NCHW[0, 0].size
        most = min(self._source.most_images, max(1, self._source.most_pixels // pixels))
        while origins:
            waiting, arrays = self._waiting.setdefault(shape, ([], []))
            room = most - len(waiting)
            taken = origins[:room]
            waiting += taken
            arrays.append(pixels_NCHW[:room])
            self._pixels += pixels * len(taken)
            origins, pixels_NCHW = origins[room:], pixels_NCHW[room:]
            if len(waiting) == most:
                self._pixels -= pixels * most
                self._compute(*self._waiting.pop(shape))
        if self._pixels > _WAITING * self._source.most_pixels:
            self.flush()

    def flush(self) -> None:
        """Compute all batches."""
        for origins, arrays in self._waiting.values():
            self._compute(origins, arrays)
        self._waiting.clear()
        self._pixels = 0

    def refuse(self, origin: Origin, error: RefusedError) -> None:
        """Note an input without an answer; raise `SourceError` for an error that is not about the input."""
        if not isinstance(error.__cause__, InputError | UnusableFileError | SourceError | OSError | ValueError):
            raise SourceError(str(error)) from error
        self.failures.append((origin, str(error)))

    def _compute(self, origins: list[Origin], arrays: list[np.ndarray]) -> None:
        try:
            outcome = self._source.compute(arrays)
        except RefusedError as error:
            if len(origins) == 1:
                self.refuse(origins[0], error)
                return
            # One of them is refused, and answers must not depend on the batch.
            images = (array_NCHW[n : n + 1] for array_NCHW in arrays for n in range(len(array_NCHW)))
            for origin, image_1CHW in zip(origins, images, strict=True):
                self._compute([origin], [image_1CHW])
            return
        self.answers.append(answers(outcome, origins))


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
