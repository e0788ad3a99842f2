"""Admission: how many requests and bytes are in progress, and until when each of them may take."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from service.errors import BusyError, DeadlineError, OverloadedError


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
    """Most requests in progress, from their first byte to their answer; more are refused."""
    max_bytes: int = 256 * 1024 * 1024
    """The same for the bytes of their bodies."""
    max_pixels: int = 2 * 1024 * 1024
    """Most pixels of images that share a forward pass or a search: memory is proportional to pixels, and a file of a
    few thousand bytes can have millions."""


class Admission:
    """Places for requests in progress. It belongs to the event loop, apart from `close`."""

    def __init__(self, limits: Limits, abandoned: Callable[[], None] = lambda: None) -> None:
        """Start with every place free.

        `abandoned` is called whenever a request has been cancelled inside its place.
        """
        self._limits = limits
        self.abandoned = abandoned
        self._requests = 0
        self._bytes = 0
        self._places: set[Place] = set()
        self.is_closed = False

    def place(self, n_bytes: int, deadline_s: float) -> Place:
        """Return a place to enter for one request; see `Place`.

        Args:
            n_bytes: declared or largest possible length of its body.
            deadline_s: seconds from entering the place until the request is abandoned.
        """
        return Place(self, n_bytes, deadline_s)

    def enter(self, place: Place) -> None:
        """Take a place.

        Raises:
            BusyError: the server is stopping.
            OverloadedError: every place, or every byte, is taken.
        """
        if self.is_closed:
            raise stopping()
        # One request is always admitted: the limit of a single body is enforced where the body is read.
        full = self._requests > 0 and self._bytes + place.n_bytes > self._limits.max_bytes
        if full or self._requests >= self._limits.max_requests:
            raise OverloadedError(self._requests)
        self._requests += 1
        self._bytes += place.n_bytes
        self._places.add(place)

    def leave(self, place: Place) -> None:
        """Free a place."""
        self._requests -= 1
        self._bytes -= place.n_bytes
        self._places.discard(place)

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
            place.stop()


@dataclass(eq=False, slots=True)
class Place:
    """The place and the deadline of one request: a context around reading and answering it, inside its task.

    At the deadline, or when the server stops, the coroutine inside is cancelled, and the context raises the reason:
    `DeadlineError`, or `BusyError`. `asyncio.timeout` does the same for another 4 microseconds, 3 % of a small request.
    """

    admission: Admission
    n_bytes: int
    deadline_s: float
    loop: asyncio.AbstractEventLoop = field(init=False)
    _task: asyncio.Task[Any] = field(init=False)
    _timer: asyncio.TimerHandle = field(init=False)
    _is_stopped: bool = False

    def __enter__(self) -> None:
        self.admission.enter(self)
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self.loop = asyncio.get_running_loop()
        self._timer = self.loop.call_later(self.deadline_s, self.stop)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is asyncio.CancelledError:
            self.admission.abandoned()
        self.admission.leave(self)
        self._timer.cancel()
        # Another cancellation, from outside, goes on.
        is_over = self._is_stopped and self._task.uncancel() == 0 and kind is asyncio.CancelledError
        # Garbage is rarely collected: the task holds its error, which holds this frame.
        del self._task
        if is_over:
            raise (stopping() if self.admission.is_closed else DeadlineError(self.deadline_s)) from None

    def stop(self) -> None:
        """End the request now."""
        if not self._is_stopped:
            self._is_stopped = True
            self._task.cancel()


def stopping() -> BusyError:
    """Return the answer of a server that is stopping."""
    return BusyError("this server is stopping; send the request again, to the one that takes its place")
