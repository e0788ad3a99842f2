"""TODO: service/inference/jobs.py."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from service.inference.classifier import Classifier, Prediction, View
from service.inference.counterfactual import Counterfactual
from service.pixels.images import to_unit
from service.shapes import Float64, UInt8

Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)


@dataclass(frozen=True)
class Decoded:
    """A request that has been read: images of one shape for one model."""

    classifier: Classifier
    pixels_NCHW: UInt8[np.ndarray, "N C H W"] | Float64[np.ndarray, "N C H W"]
    """As they were sent: 0..255, or in [0, 1]."""
    resize: bool = False
    counterfactual: bool = False
    target: int | None = None
    """Class that the counterfactuals shall have."""


class Question(Protocol[Answer_co]):
    """A request; what its methods raise is the answer to this request alone."""

    def decode_at_once(self) -> Decoded | None:
        """Read the request on the event loop, if that takes no longer than handing it to a worker; None otherwise."""
        ...

    def decode(self) -> Decoded:
        """Read the request, on a worker thread."""
        ...

    def answer(
        self,
        classifier: Classifier,
        image_NCHW: Float64[np.ndarray, "N C H W"],
        predictions: Sequence[Prediction],
        found: Sequence[Counterfactual] | None,
    ) -> Answer_co:
        """Put into words, on a worker thread, what was computed about images (pixels in [0, 1]).

        `found` is None where no counterfactual was asked for.
        """
        ...


class Request(Generic[Answer]):
    """A question on its way."""

    __slots__ = (
        "arrived", "deadline", "deadline_s", "decoded", "found", "future", "images", "left", "loop", "n_bytes",
        "predictions", "question",
    )  # fmt: skip

    def __init__(
        self,
        question: Question[Answer],
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
        self.decoded: Decoded | None = None
        self.images: dict[int, np.ndarray] = {}
        """Pixels in [0, 1] of each part, by its start, as parts are computed; none while it waits for a search."""
        self.predictions: list[Prediction | None] = []
        self.found: list[Counterfactual | None] | None = None
        """One for each image, where counterfactuals are wanted."""
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
        """All predictions, once every part is done."""
        return [prediction for prediction in self.predictions if prediction is not None]

    def image_NCHW(self) -> np.ndarray:
        """All images, likewise."""
        if self.images:
            return _joined([self.images[start] for start in sorted(self.images)])
        assert self.decoded is not None
        return unit_images([self.decoded.pixels_NCHW])

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
    def image_NCHW(self) -> np.ndarray:
        return unit_images([self.pixels_NCHW])

    @property
    def classifier(self) -> Classifier:
        assert self.request.decoded is not None
        return self.request.decoded.classifier

    @property
    def target(self) -> int | None:
        assert self.request.decoded is not None
        return self.request.decoded.target

    def predictions(self) -> list[Prediction]:
        """Of these images, once they are done."""
        done = self.request.predictions[self.start : self.stop]
        return [prediction for prediction in done if prediction is not None]


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
