"""Heartbeats: the step of each worker, and how long it has been silent."""

from __future__ import annotations

import time
from collections.abc import Callable

Beats = dict[int, tuple[float, str, float]]
"""By thread, while it is busy: time of its last step on the monotonic clock, name of the step, and its expected
seconds. A worker writes one entry for each step, without a lock."""

LOAD_S = 15.0
"""Expected seconds of a step that loads a graph."""
_PATIENCE = 4.0
"""Times the expected seconds that a step may take."""
_MOST_OBSERVED_S = 1.0


class Pulse:
    """Silence of the workers, in observed seconds: a pause of the whole process (SIGSTOP, a frozen container) is not
    the fault of a worker."""

    def __init__(self, beats: Beats, clock: Callable[[], float] = time.monotonic) -> None:
        """Observe nothing yet.

        Args:
            beats: written by the workers.
            clock: in seconds.
        """
        self._beats = beats
        self._clock = clock
        self._observed_s = clock()
        self._silent: dict[int, tuple[float, float]] = {}
        """By thread: time of its last step, and seconds of silence."""

    def observe(self) -> float:
        """Note the last step of each worker, several times a second; return the seconds since the last call."""
        now_s = self._clock()
        elapsed_s, self._observed_s = min(now_s - self._observed_s, _MOST_OBSERVED_S), now_s
        silent: dict[int, tuple[float, float]] = {}
        for thread, (since_s, _, _) in list(self._beats.items()):
            before_s, silence_s = self._silent.get(thread, (since_s, 0.0))
            silent[thread] = since_s, silence_s + elapsed_s if before_s == since_s else 0.0
        self._silent = silent
        return elapsed_s

    def silent(self, limit_s: float) -> list[str]:
        """Return the steps of workers that were silent for longer than a limit and than the step may take."""
        stuck: list[str] = []
        for thread, (since_s, doing, expected_s) in list(self._beats.items()):
            seen_s, silence_s = self._silent.get(thread, (since_s, 0.0))
            if seen_s == since_s and silence_s > limit_s + _PATIENCE * expected_s:
                stuck.append(doing)
        return stuck
