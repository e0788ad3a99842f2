"""Dynamic batching: requests that wait at the same time share a forward pass.

::

    coroutine of a request          worker threads                                event loop
    ---------------------           ---------------------------------------      -----------------
    admit, read the body  ──► queue ──► decode each ─► one pass per view ─┬─► answer each ──► all at once
                                            counterfactual wanted ────────┘
                                            queue of searches ─► one search per view ─► answer each

An image of a few thousand pixels is decoded on the event loop: that takes less time than reading its HTTP request, and
several times as long on a worker, because decoders let go of the GIL and wait for it again.

A free worker takes whatever is queued and never waits for more (unless `max_delay_s` says so): while it computes, the
next batch gathers by itself. A forward pass runs without the GIL, so workers overlap.

A search for counterfactuals takes many passes. It waits in a second queue, and lets predictions pass before each of its
passes, so that a prediction never waits for a whole search.

An error of one request is the answer to that request: each is decoded and answered alone, and if a shared pass fails,
its images run again alone. A batch changes no answer beyond `logit_error`: the certificate holds for any order of
summation.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from service.inference.admission import Admission, Limits, Place
from service.inference.jobs import Answer, Question, Request
from service.inference.queues import Queues
from service.inference.workers import Workers
from service.metrics import Metrics


class Batcher:
    """Answers questions on worker threads, which start with the first one: admission, queues and workers in one."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        """Start nothing.

        Args:
            limits: see `Limits`.
            metrics: counts batches and waiting requests.

        Raises:
            ValueError: `workers` or `forward_batch` below 1.
        """
        if limits.workers < 1 or limits.forward_batch < 1:
            raise ValueError(f"a batcher needs 1 worker and batches of 1 image or more, got {limits}")
        self._queues = Queues(limits, metrics)
        self._workers = Workers(limits, self._queues, metrics)
        self._admission = Admission(limits, self._queues.purge)
        self.place = self._admission.place
        self.refusal, self.expect = self._admission.refusal, self._admission.expect
        self.wake = self._queues.wake
        self.beats = self._workers.beats
        self.max_delay_s = limits.max_delay_s
        self._is_started = False
        self._decode_s = metrics.stage_s["decode"]

    def ask(self, question: Question[Answer, Any], n_bytes: int, place: Place) -> asyncio.Future[Answer]:
        """Return the answer to a question, to be awaited within the place of its request.

        Args:
            question: the work to do.
            n_bytes: bytes to decode.
            place: of the request.

        Raises:
            OverloadedError: there is no room for the bytes.
            Exception: raised by the question's methods, or by the computation.
        """
        place.begin(n_bytes)
        loop = place.loop
        started_s = time.monotonic()
        decoded = question.decode_at_once()
        place.queued_s = time.monotonic()
        if decoded is not None:
            self._decode_s.append(place.queued_s - started_s)
        request = Request(question, place, n_bytes, loop, future := loop.create_future(), loop.time(), decoded)
        if decoded is not None:
            request.end_in_time(decoded)
        self._queues.put(request)
        if not self._is_started:
            self._is_started = True
            self._workers.start()
        return future

    def close(self, timeout_s: float | None = None) -> bool:
        """Let the workers finish the batches in progress, and end them; requests that wait get `BusyError`.

        `timeout_s` limits the wait for the workers. Return whether all have ended.
        """
        self._queues.close()
        has_ended = self._workers.join(timeout_s)
        self._admission.close()
        return has_ended

    @property
    def is_waiting(self) -> bool:
        """Whether images wait to be predicted."""
        return self._queues.has_predictions

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._queues.is_closed
