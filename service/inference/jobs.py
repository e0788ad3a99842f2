"""TODO: service/inference/jobs.py."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from service.inference.classifier import Classifier, Prediction, View
from service.inference.outcome import Decoded, Options, Outcome
from service.pixels.images import to_unit

Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)


class Question(Protocol[Answer_co, Options]):
    """A request; what its methods raise is the answer to this request alone."""

    def decode_at_once(self) -> Decoded[Options] | None:
        """Read the request on the event loop, if that takes no longer than handing it to a worker; None otherwise."""
        ...

    def decode(self) -> Decoded[Options]:
        """Read the request, on a worker thread."""
        ...

    def answer(self, outcome: Outcome[Options]) -> Answer_co:
        """Put the outcome into words, on a worker thread."""
        ...


class Request(Generic[Answer]):
    """A question on its way."""

    __slots__ = (
        "arrived", "deadline", "deadline_s", "decoded", "future", "images", "left", "loop", "n_bytes",
        "predictions", "question",
    )  # fmt: skip

    def __init__(
        self,
        question: Question[Answer, Any],
        n_bytes: int,
        loop: asyncio.AbstractEventLoop,
        future: asyncio.Future[Answer],
        arrived: float,
        deadline: float,
        deadline_s: float,
    ) -> None:
        self.question = question
        self.n_bytes = n_bytes
        self.loop = loop
        self.future = future
        self.arrived = arrived
        self.deadline = deadline
        self.deadline_s = deadline_s
        self.decoded: Decoded[Any] | None = None
        self.images: dict[int, np.ndarray] = {}
        """Pixels in [0, 1] of each part, by its start, as parts are computed; none while it waits for a search."""
        self.predictions: list[Prediction | None] = []
        self.left = 0
        """Parts that are not computed yet."""

    def split(self, view: View, pieces: int) -> list[Part]:
        """The images in pieces of nearly one size, all of them still to do."""
        assert self.decoded is not None
        count = len(self.decoded.pixels_NCHW)
        bounds = [count * piece // pieces for piece in range(pieces + 1)]
        parts = [Part(self, view, start, stop) for start, stop in itertools.pairwise(bounds)]
        self.left = len(parts)
        return parts

    @property
    def pixels(self) -> int:
        """Of all images, not counting channels."""
        return 0 if self.decoded is None else self.decoded.pixels_NCHW[:, 0].size

    def predicted(self) -> list[Prediction]:
        """Return all predictions, once every part is done."""
        return [prediction for prediction in self.predictions if prediction is not None]

    def outcome(self) -> Outcome[Any]:
        """Return the results of all images, once every part is done."""
        assert self.decoded is not None
        if self.images:
            image_NCHW = _joined([self.images[start] for start in sorted(self.images)])
        else:
            image_NCHW = unit_images([self.decoded.pixels_NCHW])
        return Outcome(self.decoded.classifier, self.decoded.options, image_NCHW, self.predicted())

    def settle(self, outcome: Answer | Exception) -> None:
        """Give the answer, on the event loop, unless somebody did before or nobody waits any more."""
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


@dataclass(frozen=True)
class Batch:
    """What a worker has taken."""

    requests: list[Request[Any]]
    parts: list[Part]
    searches: list[Part]


@dataclass(frozen=True, eq=False)
class Part:
    """Images `start` to `stop` of a request."""

    request: Request[Any]
    view: View
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def pixels(self) -> int:
        """Not counting channels."""
        return self.pixels_NCHW[:, 0].size

    @property
    def pixels_NCHW(self) -> np.ndarray:
        assert self.request.decoded is not None
        return self.request.decoded.pixels_NCHW[self.start : self.stop]

    @property
    def classifier(self) -> Classifier:
        assert self.request.decoded is not None
        return self.request.decoded.classifier

    def outcome(self) -> Outcome[Any]:
        """Return the predictions of these images, once they are done."""
        assert self.request.decoded is not None
        predictions = self.request.predicted()[self.start : self.stop]
        return Outcome(self.classifier, self.request.decoded.options, unit_images([self.pixels_NCHW]), predictions)


def unit_images(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """All images as one array in [0, 1]; bytes are converted together."""
    if all(pixels_NCHW.dtype == np.uint8 for pixels_NCHW in pixels):
        if len(pixels) == 1:
            return to_unit(pixels[0])
        # numpy lets go of the interpreter's lock for each array of more than 500 values that it copies, and waits to
        # have it again; joining bytes does not.
        joined = b"".join([np.ascontiguousarray(pixels_NCHW).data for pixels_NCHW in pixels])
        return to_unit(np.frombuffer(joined, np.uint8).reshape(-1, *pixels[0].shape[1:]))
    return _joined([to_unit(one_NCHW) if one_NCHW.dtype == np.uint8 else one_NCHW for one_NCHW in pixels])


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def by_view(parts: list[Part]) -> list[tuple[View, list[Part]]]:
    groups: dict[int, list[Part]] = {}
    for part in parts:
        groups.setdefault(id(part.view), []).append(part)
    return [(group[0].view, group) for group in groups.values()]


def filled(parts: list[Part], most: int) -> Generator[list[Part]]:
    """Batches of at most `most` images, each with one part or more."""
    batch: list[Part] = []
    count = 0
    for part in parts:
        if batch and count + part.count > most:
            yield batch
            batch, count = [], 0
        batch.append(part)
        count += part.count
    if batch:
        yield batch
