"""Limits of one proof: time and memory, and the work that the reader and the certifier count."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Generator
from typing import NamedTuple

from service.network.operators import UnsupportedModelError


class ProofLimits(NamedTuple):
    """What a proof may take; 0 sets no limit of time or memory."""

    seconds: float = 0.0
    """Of the clock. A single matrix operation is not interrupted."""
    memory_bytes: int = 0
    """Of the whole process: its data, as the system counts them (`RLIMIT_DATA`)."""
    work: float = 0.0
    """Multiply-adds, counted before they are done; 0: as many as the file has weights for (`network.limits`)."""


NO_LIMITS = ProofLimits()


class _OutOfTimeError(Exception):
    """The time is over."""


@contextlib.contextmanager
def within(limits: ProofLimits) -> Generator[None]:
    """Hold the body to `limits`, in the main thread of a process; in another one time is not limited.

    Raises:
        UnsupportedModelError: the body took more.
    """
    with _memory(limits.memory_bytes), _time(limits.seconds):
        try:
            yield
        except _OutOfTimeError:
            reason = f"the proof takes more than {limits.seconds:g} seconds; allow more, or certify a smaller network"
            raise UnsupportedModelError([reason]) from None
        except MemoryError:
            most = f"{limits.memory_bytes:,} bytes" if limits.memory_bytes else "the memory of this machine"
            reason = f"the proof takes more than {most}; allow more, or certify a smaller network"
            raise UnsupportedModelError([reason]) from None


@contextlib.contextmanager
def _time(seconds: float) -> Generator[None]:
    if seconds <= 0.0 or threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _stop(*_: object) -> None:
    raise _OutOfTimeError


@contextlib.contextmanager
def _memory(memory_bytes: int) -> Generator[None]:
    if memory_bytes <= 0:
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))
