"""Answers on their way from a worker to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.errors import BusyError, InputError
from service.inference.classifier import Prediction
from service.inference.jobs import Chunk, Request
from service.inference.outcome import Outcome
from service.metrics import Metrics
from service.pixels.images import unit_images

_SMALL_PIXELS = 256 * 1024
# Guards `Request.left`, which several workers count down.
_counting = threading.Lock()


_Settled = tuple[Request[Any], Any, Exception | None]


@dataclass(eq=False, slots=True)
class Deliveries:
    """Answers of one batch, delivered together: waking the event loop for each would cost more than an answer."""

    computed: list[Request[Any]] = field(default_factory=list)
    """Requests whose results are complete."""
    _settled: list[_Settled] = field(default_factory=list)

    def store(self, chunks: Sequence[Chunk], predictions: Sequence[Prediction]) -> list[Chunk]:
        """Hand the predictions of some chunks to their requests; return the chunks that were the last of theirs."""
        last: list[Chunk] = []
        offset = 0
        for chunk in chunks:
            request = chunk.request
            request.predictions[chunk.start : chunk.start + chunk.count] = predictions[offset : offset + chunk.count]
            offset += chunk.count
            with _counting:
                request.left -= 1
                if request.left == 0:
                    last.append(chunk)
        return last

    def fail(self, request: Request[Any], error: Exception) -> None:
        """Answer a request with an error.

        The frames of its traceback hold the request, which holds the error; an expected error is delivered without.
        """
        expected = isinstance(error, InputError | BusyError)
        self._settled.append((request, None, error.with_traceback(None) if expected else error))

    def send(self, python: threading.Lock, metrics: Metrics) -> None:
        """Encode the answers of computed requests and hand all to the event loop.

        Args:
            python: held while answers are encoded, unless they are large: hashing and encoding large images mostly run
                without the GIL.
            metrics: told how long encoding takes.
        """
        computed_s = time.monotonic()
        size = 0
        for request in self.computed:
            assert request.decoded is not None
            size += request.decoded.pixels_NCHW.size * (request.decoded.options.path or 1)
        with python if size <= _SMALL_PIXELS else contextlib.nullcontext():
            for request in self.computed:
                request.place.computed_s = computed_s
                try:
                    answer = request.question.answer(_outcome(request))
                except Exception as error:
                    self.fail(request, error)
                else:
                    self._settled.append((request, answer, None))
        if self.computed:
            metrics.stage_s["encode"].append(time.monotonic() - computed_s)
        by_loop: dict[asyncio.AbstractEventLoop, list[_Settled]] = {}
        for settled in self._settled:
            by_loop.setdefault(settled[0].loop, []).append(settled)
        for loop, together in by_loop.items():
            # On a closed loop nobody waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, together)


def _outcome(request: Request[Any]) -> Outcome[Any]:
    decoded = request.decoded
    assert decoded is not None
    # In the order of the chunks; the images are dropped while a request waits for a search.
    images = list(map(request.images.__getitem__, sorted(request.images))) or [decoded.pixels_NCHW]
    image_NCHW = images[0] if request.images and len(images) == 1 else unit_images(images)
    predictions = [prediction for prediction in request.predictions if prediction is not None]
    return Outcome(decoded.classifier, decoded.options, image_NCHW, predictions)


def _settle(together: list[_Settled]) -> None:
    for request, answer, error in together:
        if request.future.done():
            continue
        if error is None:
            request.future.set_result(answer)
        else:
            request.future.set_exception(error)
