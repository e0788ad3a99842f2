"""Workers: threads that take, decode, compute and answer."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from service.inference.admission import Limits
from service.inference.deliveries import Deliveries
from service.inference.heartbeats import Beats
from service.inference.jobs import Batch, Chunk, Request
from service.inference.outcome import Decoded
from service.inference.passes import Passes
from service.inference.queues import Queues
from service.metrics import Metrics

_SMALL_BYTES = 64 * 1024

_log = logging.getLogger(__name__)


class Workers:
    """Threads that work until the queues are closed."""

    def __init__(self, limits: Limits, queues: Queues, metrics: Metrics) -> None:
        """Start no thread.

        Args:
            limits: number of threads, and largest batches.
            queues: where work comes from.
            metrics: counts batches.
        """
        self._limits = limits
        self._queues = queues
        self._metrics = metrics
        self.beats: Beats = {}
        """The steps of the threads."""
        self._passes = Passes(limits, queues, metrics, self._compute_predictions, self.beats)
        self._threads: list[threading.Thread] = []
        self._python = threading.Lock()
        """Held by the worker that decodes or answers."""

    def start(self) -> None:
        """Start the threads."""
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{number}", daemon=True)
            for number in range(self._limits.workers)
        ]
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of the threads, once the queues are closed; return whether all have ended.

        `timeout_s` limits the wait: a thread can be stuck for good, for example in a driver.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if until_s is None else max(0.0, until_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        thread = threading.get_ident()
        while self._queues.wait():
            self._compute_next(searches=True)
            # Not in a `finally`: a worker that ends here leaves its last step behind, and counts as stuck.
            self.beats.pop(thread, None)

    def _compute_predictions(self) -> None:
        """Compute one batch of predictions if there is one: the worker is in the middle of a search."""
        if self._queues.has_predictions:
            self._compute_next(searches=False)

    def _compute_next(self, searches: bool) -> None:
        """Take, decode, compute and answer one batch, if there is one; a search only if wanted."""
        deliveries = Deliveries()
        self.beats[threading.get_ident()] = time.monotonic(), "a batch", 0.0
        # One worker at a time takes, decodes and answers: threads that all run Python only take the GIL from each
        # other. The second worker finds a fuller batch.
        with self._python:
            batch = self._queues.take(searches)
            if batch is None:
                return
            self._note_taken(batch)
            is_small = batch.n_bytes <= _SMALL_BYTES
            chunks = self._decode(batch, deliveries) if is_small else []
        if not is_small:
            # Decoders of large files mostly run without the GIL.
            with self._queues.occupied():
                chunks = self._decode(batch, deliveries)
        try:
            if chunks:
                self._passes.predict(chunks, deliveries)
            if batch.searches:
                self._passes.search(batch.searches, deliveries)
        except Exception as error:  # a defect of this package: the worker goes on, and nobody waits in vain
            _log.exception("a worker failed on a batch")
            for request in {*batch.requests, *(chunk.request for chunk in [*chunks, *batch.searches])}:
                deliveries.fail(request, error)
        self.beats[threading.get_ident()] = time.monotonic(), "answering", 0.0
        deliveries.send(self._python, self._metrics)

    def _note_taken(self, batch: Batch) -> None:
        now_s, queue_s = time.monotonic(), self._metrics.stage_s["queue"]
        for request in batch.requests:
            # Once: a request can go back to the queue.
            if not request.place.taken_s:
                request.place.taken_s = now_s
                queue_s.append(now_s - request.place.queued_s)

    def _decoded(self, request: Request[Any]) -> Decoded[Any]:
        started_s = time.monotonic()
        decoded = request.question.decode()
        self._metrics.stage_s["decode"].append(time.monotonic() - started_s)
        request.end_in_time(decoded)
        return decoded

    def _decode(self, batch: Batch, deliveries: Deliveries) -> list[Chunk]:
        """Return the chunks to predict; requests beyond the limit of pixels go back to the queue."""
        chunks, pixels = batch.chunks, batch.pixels
        for number, request in enumerate(batch.requests):
            if pixels >= self._limits.max_pixels:
                self._queues.put_back(batch.requests[number:])
                del batch.requests[number:]
                break
            self.beats[threading.get_ident()] = time.monotonic(), "decoding", 0.0
            if request.future.done():  # its deadline has passed, or its client is gone
                continue
            try:
                decoded = request.decoded or self._decoded(request)
                decoded.check_path(self._limits.max_pixels)
                first, *others = self._passes.split(request, decoded, decoded.view())
            except Exception as error:
                deliveries.fail(request, error)
                continue
            pixels += decoded.pixels_NCHW[:, 0].size
            chunks.append(first)
            if others:
                # Left to whichever worker is free.
                self._queues.put_chunks(others)
        return chunks
