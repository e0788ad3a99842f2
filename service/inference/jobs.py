"""Requests in progress, and the chunks of images in which workers compute them."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from service.errors import DeadlineError
from service.inference.admission import Place
from service.inference.classifier import Prediction, View
from service.inference.outcome import Decoded, Options, Outcome

Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)


class Question(Protocol[Answer_co, Options]):
    """A request as a worker sees it; an error that a method raises is the answer to this request alone."""

    def decode_at_once(self) -> Decoded[Options] | None:
        """Decode the request on the event loop if that is cheaper than handing it to a worker; otherwise null."""
        ...

    def decode(self) -> Decoded[Options]:
        """Decode the request, on a worker thread."""
        ...

    def answer(self, outcome: Outcome[Options]) -> Answer_co:
        """Encode the answer, on a worker thread."""
        ...


@dataclass(eq=False, slots=True)
class Request(Generic[Answer]):
    """A question in progress."""

    question: Question[Answer, Any]
    place: Place
    n_bytes: int
    """Bytes to decode."""
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Answer]
    """The answer. It is done before that if the client is gone or the deadline has passed."""
    arrived: float
    """Clock of the loop, in seconds."""
    decoded: Decoded[Any] | None = None
    images: dict[int, np.ndarray] = field(default_factory=dict)
    """Pixels in [0, 1] of each computed chunk by its start; empty while the request waits for a search."""
    predictions: list[Prediction | None] = field(default_factory=list)
    """One for each image, as chunks are computed."""
    left: int = 0
    """Chunks still to compute."""

    def end_in_time(self, decoded: Decoded[Any]) -> None:
        """End the request when its caller no longer waits; called from any thread."""
        if decoded.wait_s < self.place.deadline_s:
            reason = functools.partial(DeadlineError, decoded.wait_s)
            at_s = self.arrived + decoded.wait_s
            self.loop.call_soon_threadsafe(self.loop.call_at, at_s, self.place.stop, reason)


@dataclass(eq=False, slots=True)
class Chunk:
    """Consecutive images of one request that are computed together."""

    request: Request[Any]
    decoded: Decoded[Any]
    """The whole request."""
    view: View
    start: int
    """Index of the first image in the request."""
    pixels_NCHW: np.ndarray
    """The images as sent: uint8, or float64 in [0, 1]."""
    count: int
    """N."""
    pixels: int
    """N H W."""

    @property
    def future(self) -> asyncio.Future[Any]:
        """The answer to the request."""
        return self.request.future


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Work for one worker: requests to decode and chunks to predict, or chunks to search."""

    requests: list[Request[Any]]
    chunks: list[Chunk]
    searches: list[Chunk]
    n_bytes: int = 0
    """Bytes of the requests that are not decoded."""
    pixels: int = 0
    """Pixels of `chunks`."""
