"""Admission: which requests are in progress, how long a further one would wait, and when each of them is given up."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from service.errors import BusyError, DeadlineError, OverloadedError, TooSlowError
from service.inference.load import Load

FULL = "LIPCERT_MAX_REQUESTS or LIPCERT_MAX_WAITING_BYTES"
SHARE = "LIPCERT_CLIENT_SHARE, where many clients have one address"
WAIT = "LIPCERT_MAX_WAIT_MS"
_GRACE_S = 5.0
"""Seconds before the rate of a body counts: connections start slowly."""
_CHECK_S = 1.0
# Refused clients that are asked to come back in one second.
_RETRIES_PER_S = 100.0
_LONGEST_RETRY_S = 4.0


@dataclass(frozen=True)
class Limits:
    """Limits of a `Batcher`."""

    workers: int = 1
    """Threads that decode, compute and answer."""
    forward_batch: int = 32
    """Most images in one forward pass."""
    max_delay_s: float = 0.0
    """Longest wait of a request for others while the batch is not full; 0 computes whatever is queued."""
    max_requests: int = 1024
    """Most requests in progress, from their headers to their answer; more are refused."""
    max_bytes: int = 256 * 1024 * 1024
    """The same for the bytes of their bodies that have arrived."""
    max_wait_s: float = math.inf
    """Longest expected wait of a request that is admitted."""
    burst: int = sys.maxsize
    """Requests in progress that are an overload, see `Load`."""
    client_share: float = 1.0
    """Share of `max_requests` and `max_bytes` that one address can hold."""
    min_rate: float = 0.0
    """Slowest body, in bytes per second since the headers."""
    max_pixels: int = 2 * 1024 * 1024
    """Most pixels of images that share a forward pass or a search: memory is proportional to pixels, and a file of a
    few thousand bytes can have millions."""


@dataclass(eq=False, slots=True)
class Client:
    """Requests of one address in progress, and the bytes of their bodies."""

    requests: int = 0
    n_bytes: int = 0


class Admission:
    """Places for requests in progress. It belongs to the event loop, apart from `close` and as `Place` says."""

    def __init__(self, limits: Limits, abandoned: Callable[[], None] = lambda: None) -> None:
        """Start with every place free.

        `abandoned` is called whenever a request has been cancelled inside its place.
        """
        self.limits = limits
        self.abandoned = abandoned
        self.predictions = Load(limits.burst, limits.max_wait_s)
        self.searches = Load(limits.burst, limits.max_wait_s)
        self.lock = threading.Lock()
        """Guards both."""
        self._requests = 0
        self._bytes = 0
        self._coming = 0
        self._refused = 0.0
        self._refused_s = 0.0
        self._clients: dict[str, Client] = {}
        self._most_requests = max(1, math.ceil(limits.max_requests * limits.client_share))
        self._most_bytes = limits.max_bytes * limits.client_share
        self._places: set[Place] = set()
        self.is_closed = False

    def place(self, deadline_s: float, client: str = "") -> Place:
        """Return a place to enter for one request; see `Place`.

        Args:
            deadline_s: seconds from entering the place until the request is abandoned.
            client: its address; unknown ones are not limited.
        """
        return Place(self, client, deadline_s)

    def refusal(self, client: str) -> tuple[str, int] | None:
        """Return why a further request from this address is refused; null to admit it.

        The reason is the settings that the operator can raise, and Retry-After in seconds: the expected wait, and a
        second more for every `_RETRIES_PER_S` clients that were refused before.
        """
        limits = self.limits
        requests = self._requests + self._coming
        # One request is always admitted: the limit of a single body is enforced where the body is read.
        if requests >= limits.max_requests or (self._requests and self._bytes >= limits.max_bytes):
            cause = FULL
        elif client and (holder := self._clients.get(client)) and holder.requests >= self._most_requests:
            cause = SHARE
        elif self.predictions.refuses(self._coming):
            cause = WAIT
        else:
            return None
        now_s = time.monotonic()
        self._refused = max(0.0, self._refused - (now_s - self._refused_s) * _RETRIES_PER_S) + 1.0
        self._refused_s = now_s
        turn_s = min(self._refused / _RETRIES_PER_S, _LONGEST_RETRY_S)
        return cause, retry_after_s(self.predictions.wait_s(self._coming) + turn_s)

    def expect(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count a request that was admitted before its task runs, for this iteration of the event loop."""
        self._coming += 1
        if self._coming == 1:
            # The tasks of one iteration all enter their places before the next one.
            loop.call_soon(self._have_come)

    def _have_come(self) -> None:
        self._coming = 0

    def enter(self, place: Place) -> None:
        """Take a place.

        Raises:
            BusyError: the server is stopping.
            OverloadedError: every place is taken, or the request would wait too long.
        """
        if self.is_closed:
            raise stopping()
        refusal = self.refusal(place.client)
        if refusal is not None:
            raise OverloadedError(*refusal)
        self._requests += 1
        self._places.add(place)
        holder = self._clients.get(place.client)
        if holder is None:
            holder = self._clients[place.client] = Client()
        holder.requests += 1
        place.holder = holder

    def hold(self, place: Place, n_bytes: int) -> None:
        """Set the bytes that a place holds.

        Raises:
            OverloadedError: there is no room for them.
        """
        holder = place.holder
        grown = n_bytes - place.n_bytes
        cause = None
        if grown > 0:
            # One request is always admitted, see `refusal`.
            if self._bytes + grown > self.limits.max_bytes and self._requests > 1:
                cause = FULL
            elif holder.n_bytes + grown > self._most_bytes and holder.requests > 1 and place.client:
                cause = SHARE
        if cause is not None:
            raise OverloadedError(cause, retry_after_s(self.predictions.wait_s()))
        place.n_bytes = n_bytes
        self._bytes += grown
        holder.n_bytes += grown

    def leave(self, place: Place) -> None:
        """Free a place."""
        self._requests -= 1
        self._bytes -= place.n_bytes
        self._places.discard(place)
        holder = place.holder
        holder.requests -= 1
        holder.n_bytes -= place.n_bytes
        if holder.requests == 0:
            del self._clients[place.client]

    def close(self) -> None:
        """Admit no further request, and end those in progress with `BusyError`; called from any thread."""
        self.is_closed = True
        for place in list(self._places):
            # A closed loop has no request in progress.
            with contextlib.suppress(RuntimeError):
                # A turn of the loop after the answers that workers have handed to it: their requests wake up first.
                place.loop.call_soon_threadsafe(place.loop.call_soon, self._stop, place)

    def _stop(self, place: Place) -> None:
        if place in self._places:
            place.stop(stopping)


@dataclass(eq=False, slots=True)
class Place:
    """The place and the deadline of one request: a context around reading and answering it, inside its task.

    At the deadline, or when the server stops, the coroutine inside is cancelled, and the context raises the reason:
    `DeadlineError`, or `BusyError`. `asyncio.timeout` does the same for another 4 microseconds, 3 % of a small request.
    """

    admission: Admission
    client: str
    deadline_s: float
    n_bytes: int = 0
    """Bytes of the body that are in memory."""
    holder: Client = field(init=False)
    loop: asyncio.AbstractEventLoop = field(init=False)
    _received: int = 0
    _load: Load | None = None
    """Which work is in progress; null while the body is read."""
    work_s: float = 0.0
    """Estimate of its work."""
    queued_s: float = 0.0
    """Clock `time.monotonic`; 0 before that."""
    taken_s: float = 0.0
    """The same, when a worker took it."""
    computed_s: float = 0.0
    """The same, when its results were complete."""
    _is_first: bool = False
    _began_s: float = 0.0
    _number: int = 0
    _entered_s: float = 0.0
    _has_left: bool = False
    _task: asyncio.Task[Any] = field(init=False)
    _timer: asyncio.TimerHandle = field(init=False)
    _reason: Callable[[], Exception] | None = None

    def __enter__(self) -> Place:
        self.admission.enter(self)
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self.loop = asyncio.get_running_loop()
        self._entered_s = time.monotonic()
        self._timer = self.loop.call_later(min(self.deadline_s, _GRACE_S), self._check)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is asyncio.CancelledError:
            self.admission.abandoned()
        with self.admission.lock:
            self._end(is_answered=kind is None)
            self._has_left = True
        self.admission.leave(self)
        self._timer.cancel()
        # Another cancellation, from outside, goes on.
        is_over = self._reason is not None and self._task.uncancel() == 0 and kind is asyncio.CancelledError
        # Garbage is rarely collected: the task holds its error, which holds this frame, and the timer this place.
        del self._task, self._timer
        if is_over and self._reason is not None:
            raise self._reason() from None

    def receive(self, n_bytes: int, kept: int) -> None:
        """Note how much of the body has arrived, and how much of it is in memory.

        Raises:
            OverloadedError: there is no room for it.
        """
        self._received = n_bytes
        self.admission.hold(self, kept)

    def begin(self, n_bytes: int) -> None:
        """Let the work begin, once: the body is complete.

        Raises:
            OverloadedError: there is no room for it.
        """
        self.admission.hold(self, n_bytes)
        if self._load is None:
            with self.admission.lock:
                self._begin(self.admission.predictions, self.admission.predictions.typical_s)

    def weigh(self, work_s: float) -> None:
        """Correct the work of a request whose images are known; called from any thread."""
        with self.admission.lock:
            if self._load is not None:
                self._load.work_s += work_s - self.work_s
                self.work_s = work_s

    def search(self, work_s: float) -> None:
        """Let the search begin, after the predictions; called from any thread.

        Raises:
            OverloadedError: it would wait too long.
        """
        searches = self.admission.searches
        with self.admission.lock:
            if self._has_left:
                return
            if searches.refuses():
                raise OverloadedError(WAIT, retry_after_s(searches.wait_s()))
            self._end(is_answered=True)
            self._begin(searches, work_s)

    def stop(self, reason: Callable[[], Exception]) -> None:
        """End the request now; the context raises the error that `reason` returns."""
        if self._reason is None and not self._has_left:
            self._reason = reason
            self._task.cancel()

    def _check(self) -> None:
        elapsed_s = time.monotonic() - self._entered_s
        rate = self.admission.limits.min_rate
        if elapsed_s >= self.deadline_s:
            self.stop(functools.partial(DeadlineError, self.deadline_s))
        elif self._load is None and self._received < rate * elapsed_s:
            cure = "send it faster (the operator can lower LIPCERT_MIN_RATE)"
            self.stop(lambda: TooSlowError(f"the body arrives at less than {rate:g} bytes per second; {cure}"))
        else:
            left_s = self.deadline_s - elapsed_s
            self._timer = self.loop.call_later(min(left_s, _CHECK_S) if self._load is None else left_s, self._check)

    def _begin(self, load: Load, work_s: float) -> None:
        self._began_s = time.monotonic()
        self._load, self.work_s, self._is_first = load, work_s, load.requests == 0
        load.begin(work_s, self._began_s)
        self._number = load.begun

    def _end(self, is_answered: bool) -> None:
        load, self._load = self._load, None
        if load is not None:
            load.end(self.work_s)
            if is_answered:
                now_s = time.monotonic()
                is_alone = self._is_first and load.begun == self._number
                load.learn(self.work_s, now_s, now_s - self._began_s if is_alone else 0.0, self.computed_s or now_s)


def retry_after_s(wait_s: float) -> int:
    """Return the header Retry-After for a wait: whole seconds, from 1 to an hour."""
    return max(1, min(3600, math.ceil(wait_s)))


def stopping() -> BusyError:
    """Return the answer of a server that is stopping."""
    return BusyError("this server is stopping; send the request again, to the one that takes its place")
