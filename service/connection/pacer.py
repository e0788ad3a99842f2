"""Delays of refusals, so that clients that retry at once do not keep the server from answering others."""

from __future__ import annotations

# Between two refusals: a tenth of a processor at 50 microseconds each.
_GAP_S = 0.0005
# Longest delay: a refused client waits for much less than for an answer of a server that refuses nobody.
_MOST_S = 0.03


class Pacer:
    """Spreads refusals: the more there are, the longer each of them waits, up to a limit.

    A client that retries as soon as it is refused then retries thirty times a second, and not a thousand times. Clients
    that were refused together do not come back together.
    """

    def __init__(self) -> None:
        """Delay nothing yet."""
        self._next_s = 0.0

    def delay_s(self, now_s: float) -> float:
        """Return the seconds for which the next refusal waits, on the clock `now_s`."""
        delay_s = min(max(self._next_s - now_s, 0.0), _MOST_S)
        self._next_s = now_s + delay_s + _GAP_S
        return delay_s
