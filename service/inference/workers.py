"""TODO: service/inference/workers.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from service.certificate import Radii
from service.errors import BusyError, InputError
from service.inference.classifier import View
from service.inference.jobs import Part, Request

if TYPE_CHECKING:
    from service.inference.batching import Batcher

SMALL_BYTES = 64 * 1024
SMALL_PIXELS = 256 * 1024


class AbandonedError(Exception):
    """Nobody waits for the rest of a search."""


class MakingWay:
    """A view for a search that lets predictions pass before each of its gradients, and ends when nobody waits."""

    def __init__(self, batcher: Batcher, view: View, parts: Sequence[Part]) -> None:
        self._batcher = batcher
        self._view = view
        self._parts = parts

    def classify(self, image_NCHW: np.ndarray) -> tuple[np.ndarray, Radii]:
        return self._view.classify(image_NCHW)

    def margin_gradient(self, image_NCHW: np.ndarray, weights_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._batcher.predict_what_waits()
        if self._batcher.is_closed or all(part.request.future.done() for part in self._parts):
            raise AbandonedError
        return self._view.margin_gradient(image_NCHW, weights_NK)


class Done:
    """Outcomes that a worker hands to the event loop at once: waking it for each would cost more than an answer."""

    def __init__(self) -> None:
        self._computed: list[Request[Any]] = []
        self.pixels = 0
        """Of all images that are to be answered, every channel counted."""
        self._outcomes: list[tuple[Request[Any], Any]] = []

    def answer(self, request: Request[Any]) -> None:
        """This request is computed."""
        self._computed.append(request)
        assert request.decoded is not None
        self.pixels += request.decoded.pixels_NCHW.size

    def answer_all(self) -> None:
        """Put into words what is computed."""
        for request in self._computed:
            try:
                answer = request.question.answer(request.outcome())
            except Exception as error:
                self.fail(request, error)
            else:
                self._outcomes.append((request, answer))
        self._computed.clear()

    def fail(self, request: Request[Any], error: Exception) -> None:
        """This is the answer: of what the client did, or what there is no time for, without where it was found.

        The frames there hold the request, which holds the error.
        """
        expected = isinstance(error, InputError | BusyError)
        self._outcomes.append((request, error.with_traceback(None) if expected else error))

    def deliver(self) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Request[Any], Any]]] = {}
        for request, outcome in self._outcomes:
            by_loop.setdefault(request.loop, []).append((request, outcome))
        for loop, outcomes in by_loop.items():
            # The loop may be closed by now: then nobody waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, outcomes)


def _settle(outcomes: list[tuple[Request[Any], Any]]) -> None:
    for request, outcome in outcomes:
        request.settle(outcome)
