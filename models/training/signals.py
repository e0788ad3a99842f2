"""SIGINT and SIGTERM as requests to stop after the current step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def on_stop_signals(handle: Callable[[int, Any], None]) -> Generator[None]:
    """Call `handle(number, previous handler)` on SIGINT and SIGTERM; restore the previous handlers at the end."""
    previous: dict[int, Any] = {}

    def call(number: int, _frame: object) -> None:
        handle(number, previous[number])

    try:
        for number in STOP_SIGNALS:
            # A shell lets its background jobs ignore Ctrl-C, which is meant for the one in the foreground.
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, call)
    except ValueError:  # not the main thread, which alone can handle signals
        previous.clear()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred_stop_signals() -> Generator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag, so that no step is cut in half; a second acts at once.

    Yields:
        Whether a signal came.
    """
    received: list[int] = []

    def remember(number: int, previous: Any) -> None:
        received.append(number)
        signal.signal(number, previous)

    with on_stop_signals(remember):
        yield lambda: bool(received)
