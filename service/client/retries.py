"""Whether and when a call is tried again: bounded pauses that double, with jitter, and never before `Retry-After`."""

from __future__ import annotations

import email.utils
import random
import time
from dataclasses import dataclass

FIRST_PAUSE_S = 0.5


@dataclass(frozen=True)
class Retries:
    """Tries after the first, and the longest pause before one."""

    most: int
    longest_s: float

    def pause_s(self, failures: int, retry_after_s: float | None) -> float | None:
        """Return the seconds before the next try; null where the call has failed.

        A server that asks for a longer pause than `longest_s` is not asked earlier: the call has failed.

        Args:
            failures: tries that have failed, at least 1.
            retry_after_s: pause that the server asks for, in seconds.
        """
        if failures > self.most or (retry_after_s is not None and retry_after_s > self.longest_s):
            return None
        backoff = min(self.longest_s, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 16))
        # Clients that were refused together must not come back together.
        jitter = random.uniform(0.5, 1.0) * backoff
        return jitter if retry_after_s is None else retry_after_s + jitter


def retry_after_s(header: str | None) -> float | None:
    """Return the seconds of a header `Retry-After` (RFC 9110 section 10.2.3), a number or a date; null if invalid."""
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:18])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
