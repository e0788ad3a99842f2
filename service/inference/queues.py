"""Queues: which requests wait, and which of them a worker takes next.

Requests and chunks to predict are taken in order of arrival. Searches for counterfactuals have a second queue, because
one takes many forward passes: predictions overtake them, but never forever.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import Any, TypeVar

from service.inference.admission import Limits
from service.inference.jobs import Batch, Chunk, Request
from service.metrics import Metrics

# Bytes of requests decoded by one worker before it computes: a large file must not delay many small ones.
_DECODED_BYTES = 1024 * 1024
# A search takes half a forward batch: each of its images costs several passes, and predictions wait for one of them.
SEARCH_SHARE = 2
# Prediction batches served before a queued search.
_MOST_IN_A_ROW = 4
# Limit of the images that wait for a search, in units of `max_pixels`.
_WAITING_BATCHES = 16

Entry = TypeVar("Entry", Request[Any], Chunk)


class Queues:
    """Waiting requests and chunks; all methods may be called from any thread.

    `pays` is the number of images for which one more worker is worth waking, see `Pace.share`.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        """Start empty."""
        self.pays = 1
        self.is_closed = False
        self._limits = limits
        self._metrics = metrics
        self._arrived: list[Request[Any]] = []
        """Requests of this iteration of the event loop."""
        # The condition guards everything below, and wakes workers.
        self._condition = threading.Condition()
        self._requests: deque[Request[Any]] = deque()
        self._chunks: deque[Chunk] = deque()
        """Chunks of decoded requests that wait for a forward pass."""
        self._searches: deque[Chunk] = deque()
        self.idle = 0
        """Workers that wait for work."""
        self._occupied = 0
        """Workers busy with something longer than a forward pass."""
        self._in_a_row = 0
        """Prediction batches since the last search."""

    @property
    def has_predictions(self) -> bool:
        """Whether something waits to be predicted."""
        return bool(self._requests or self._chunks)

    def put(self, request: Request[Any]) -> None:
        """Append a request, on its event loop; those that arrive together go to the workers after the last of them."""
        self._arrived.append(request)
        if len(self._arrived) == 1:
            request.loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        with self._condition:
            self._requests.extend(self._arrived)
            self._note()
            if self._is_worth_a_worker():
                self._condition.notify()
        self._arrived.clear()

    def put_back(self, requests: Sequence[Request[Any]]) -> None:
        """Return requests to the head of the queue."""
        with self._condition:
            self._requests.extendleft(_awaited(requests)[::-1])
            self._note()

    def put_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Append chunks to predict, and wake a worker for each."""
        with self._condition:
            self._chunks.extend(_awaited(chunks))
            self._note()
            self._condition.notify(len(chunks))

    def put_searches(self, chunks: Sequence[Chunk]) -> None:
        """Append chunks to search."""
        with self._condition:
            self._searches.extend(_awaited(chunks))
            self._note()
            if self.idle:
                self._condition.notify(len(chunks))

    def purge(self) -> None:
        """Drop abandoned requests: their places are free for others, so their bytes must not stay."""
        with self._condition:
            self._requests = deque(_awaited(self._requests))
            self._chunks = deque(_awaited(self._chunks))
            self._searches = deque(_awaited(self._searches))
            self._note()

    def wake(self) -> None:
        """Wake an idle worker for waiting requests, also where another worker would soon come for them."""
        with self._condition:
            self._condition.notify()

    def close(self) -> None:
        """Wake every worker; `wait` returns false from now on."""
        with self._condition:
            self.is_closed = True
            self._condition.notify_all()

    def wait(self) -> bool:
        """Wait until there is work, and return true; return false once the queues are closed."""
        with self._condition:
            while not self.is_closed:
                delay_s = self._delay_s() if self._limits.max_delay_s else 0.0
                if self._searches or self._chunks or (self._requests and delay_s <= 0.0):
                    return True
                self.idle += 1
                self._condition.wait(delay_s if self._requests else None)
                self.idle -= 1
            return False

    def take(self, searches: bool) -> Batch | None:
        """Return the next work of one worker: predictions, or else searches if they are permitted; null without either.

        Searches have their turn beside an endless stream of predictions, which overtake them at every step anyway.
        """
        with self._condition:
            waiting = self._requests or self._chunks
            if waiting and self._limits.max_delay_s:
                waiting = self._delay_s() <= 0.0
            is_full = False
            if self._searches:
                # Images that wait for a search are decoded: more of them have to wait encoded.
                pixels = sum(chunk.pixels for chunk in self._searches)
                is_full = pixels >= _WAITING_BATCHES * self._limits.max_pixels
                if searches and (not waiting or is_full or self._in_a_row >= _MOST_IN_A_ROW):
                    self._in_a_row = 0
                    return Batch([], [], self._take_searches())
            if waiting and not is_full:
                self._in_a_row += searches
                return self._take_predictions()
            return None

    @contextlib.contextmanager
    def occupied(self) -> Generator[None]:
        """Mark this worker as busy for longer than a forward pass, so that others are woken in its place."""
        with self._condition:
            self._occupied += 1
            if self._waiting() and self._is_worth_a_worker():
                self._condition.notify()
        try:
            yield
        finally:
            with self._condition:
                self._occupied -= 1

    def _take_predictions(self) -> Batch:
        limits = self._limits
        # With a batching delay, a full batch is not split among idle workers.
        sharing = 1 + self.idle if limits.max_delay_s <= 0.0 else 1
        room = min(limits.forward_batch, max(self.pays, -(-self._waiting() // sharing)))
        chunks: list[Chunk] = []
        pixels = 0
        while self._chunks and (not chunks or (self._chunks[0].count <= room and pixels < limits.max_pixels)):
            chunk = self._chunks.popleft()
            chunks.append(chunk)
            room -= chunk.count
            pixels += chunk.pixels
        requests: list[Request[Any]] = []
        n_bytes = to_decode = 0
        while self._requests and room > 0 and (not requests or n_bytes + self._requests[0].n_bytes <= _DECODED_BYTES):
            request = self._requests.popleft()
            requests.append(request)
            n_bytes += request.n_bytes
            to_decode += 0 if request.decoded else request.n_bytes
            room -= 1
        self._note()
        if (self._requests or self._chunks) and self._is_worth_a_worker():
            self._condition.notify()
        return Batch(requests, chunks, [], to_decode, pixels)

    def _take_searches(self) -> list[Chunk]:
        """Return searches of one view, in order; those of other views stay in their places."""
        view = self._searches[0].view
        images = sum(chunk.count for chunk in self._searches)
        room = min(max(1, self._limits.forward_batch // SEARCH_SHARE), max(1, -(-images // (1 + self.idle))))
        taken: list[Chunk] = []
        others: list[Chunk] = []
        pixels = 0
        while self._searches and room > 0:
            chunk = self._searches.popleft()
            too_many = chunk.count > room or pixels + chunk.pixels > self._limits.max_pixels
            if chunk.view is not view or (taken and too_many):
                others.append(chunk)
                continue
            taken.append(chunk)
            room -= chunk.count
            pixels += chunk.pixels
        self._searches.extendleft(reversed(others))
        self._note()
        if self._searches and self.idle:
            self._condition.notify()
        return taken

    def _delay_s(self) -> float:
        """Return how much longer the first request may wait for others, in seconds."""
        limits = self._limits
        if self._chunks or not self._requests or len(self._requests) >= limits.forward_batch:
            return 0.0
        first = self._requests[0]
        return first.arrived + limits.max_delay_s - first.loop.time()

    def _waiting(self) -> int:
        """Return the images to predict; a request that is not decoded counts as one."""
        images = len(self._requests)
        for chunk in self._chunks:
            images += chunk.count
        return images

    def _is_worth_a_worker(self) -> bool:
        """Return whether to wake a worker: always if no other worker comes for the waiting work soon."""
        if self.idle == 0:
            return False
        return self.idle + self._occupied >= self._limits.workers or self._waiting() >= self.pays

    def _note(self) -> None:
        """Export the length of the queues, which has changed."""
        self._metrics.waiting.set(len(self._requests) + len(self._chunks) + len(self._searches))


def _awaited(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries that are not abandoned."""
    return [entry for entry in entries if not entry.future.done()]
