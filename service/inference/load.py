"""Work in progress, and the expected wait of a further request."""

from __future__ import annotations

import math
import time

# Weight of one answer in the moving averages, and busy seconds that the speed of the server is measured over.
_GAIN = 1 / 32
_MEMORY_S = 0.5
# Longest time of an answer that counts, in units of the average: it may have waited for a model that was loaded.
_MOST_GROWTH = 4.0
# Wait that is admitted in an overload, in units of the time of a request alone.
_WAIT_ALONE = 2.5
# Seconds after the last refusal that end an overload: refused clients come back until then.
_CALM_S = 5.0
# Duration after which a burst may wait all the same: a few dozen clients that take turns look the same. It doubles if
# that is an overload again.
_OVERLOAD_S = 15.0
_LONGEST_OVERLOAD_S = 60.0


class Load:
    """Work in progress of one kind, predictions or searches, and how long a further request would wait for it.

    Work is time as a cost model predicts it (`Pace`). The work ahead of a request takes that long, times the slowness:
    busy seconds for each second of work that was done lately, which knows the batches, the workers and the machine.

    A request that would wait for more than `max_wait_s` is refused. `burst` requests are an overload: until it ends, a
    request is refused that would wait for more than `_WAIT_ALONE` times the time of a request alone, mean and
    three deviations, so that accepted ones take at most about three times as long. If that limit held always, a few
    dozen clients that take turns would be refused. A request that finds nothing ahead never is.
    """

    def __init__(self, burst: int, max_wait_s: float) -> None:
        """Start without work."""
        self._burst = burst
        self._max_wait_s = max_wait_s
        self.begun = 0
        """Requests since the start."""
        self.requests = 0
        self.work_s = 0.0
        self.typical_s = 0.001
        """Mean work of a request."""
        self._busy_s, self._done_s = 2.0 * _MEMORY_S, _MEMORY_S
        self._batch: tuple[float, float, float] = (0.0, 0.0, 0.0)
        """Identity, busy seconds and work of the batch that is being answered."""
        self._usual = 2.0
        """Slowness before the overload: refusals slow answers down, and to refuse more for that would be no cure."""
        self._last_s = 0.0
        self._alone = 2.0
        """Mean time of a request alone, in units of its work."""
        self._deviation = 0.5
        self._overloaded_until_s = -math.inf
        self._ends_s = -math.inf
        self._duration_s = _OVERLOAD_S

    def wait_s(self, coming: int = 0) -> float:
        """Return the expected wait of a further request, after `coming` typical ones, in seconds."""
        return (self.work_s + coming * self.typical_s) * self._busy_s / self._done_s

    def refuses(self, coming: int = 0) -> bool:
        """Return whether a further request, after `coming` typical ones, would wait too long."""
        ahead = self.requests + coming
        if ahead == 0:
            return False
        wait_s = self.wait_s(coming)
        if ahead < self._burst and self._ends_s == -math.inf:
            return wait_s > self._max_wait_s
        now_s = time.monotonic()
        if ahead >= self._burst and now_s >= self._overloaded_until_s:
            is_again = now_s < self._overloaded_until_s + _OVERLOAD_S
            self._duration_s = min(2.0 * self._duration_s, _LONGEST_OVERLOAD_S) if is_again else _OVERLOAD_S
            self._ends_s = now_s + self._duration_s
            self._overloaded_until_s = now_s + _CALM_S
            self._usual = self._busy_s / self._done_s
        if now_s < self._overloaded_until_s:
            alone_s = (self._alone + 3.0 * self._deviation) * self.typical_s
            slowness = min(self._usual, self._busy_s / self._done_s)
            if (self.work_s + coming * self.typical_s) * slowness > _WAIT_ALONE * alone_s:
                self._overloaded_until_s = min(now_s + _CALM_S, self._ends_s)
                return True
        return wait_s > self._max_wait_s

    def begin(self, work_s: float, now_s: float) -> None:
        """Add the work of a request."""
        if self.requests == 0:
            self._last_s = now_s
        self.begun += 1
        self.requests += 1
        self.work_s += work_s

    def end(self, work_s: float) -> None:
        """Remove the work of a request."""
        self.requests -= 1
        self.work_s = self.work_s - work_s if self.requests else 0.0

    def learn(self, work_s: float, now_s: float, alone_s: float, batch: float) -> None:
        """Learn from an answer.

        Args:
            work_s: work of the request.
            now_s: `time.monotonic()`.
            alone_s: from its beginning to its answer, if there was no other in that time; otherwise 0.
            batch: a number that the requests computed together share.
        """
        passed_s, self._last_s = now_s - self._last_s, now_s
        before, batch_s, batch_work_s = self._batch
        if batch != before:
            self._learn_speed(batch_s, batch_work_s)
            batch_s = batch_work_s = 0.0
        self._batch = batch, batch_s + passed_s, batch_work_s + work_s
        self.typical_s += (work_s - self.typical_s) * _GAIN
        # Refusals slow a request down as well.
        if alone_s and now_s >= self._overloaded_until_s:
            error = min(alone_s / work_s, _MOST_GROWTH * self._alone) - self._alone
            self._alone += error * _GAIN
            self._deviation += (abs(error) - self._deviation) * _GAIN

    def _learn_speed(self, batch_s: float, work_s: float) -> None:
        """Learn from a batch: the first of its answers has all the time, and each of them a part of the work."""
        kept = max(0.0, 1.0 - batch_s / _MEMORY_S)
        # At most a multiple of the expected time, as above: a model may have been loaded, or the machine have paused.
        most_s = _MOST_GROWTH * work_s * self._busy_s / self._done_s
        self._busy_s = self._busy_s * kept + min(batch_s, most_s)
        self._done_s = self._done_s * kept + work_s
