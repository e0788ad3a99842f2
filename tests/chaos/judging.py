"""Verdicts about answers: right, refused with a documented problem that has a cause, lost, or wrong.

An answer is right if it has the status and the bytes that the server gave before the first disturbance. Each
disturbance states which problems it may cause, and when; the same problem at another time is a wrong answer.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from exchanges import Answer, Exchange

ALWAYS = frozenset({"overloaded", "busy", "too-many-connections"})
"""Problems of load."""
KEY_SLACK_S = 2.5
"""The server looks at the file of keys every second."""
_SAMPLES = 10
"""Of each verdict."""


@dataclass
class Cause:
    """Seconds on the monotonic clock in which a disturbance may show as one of some problems."""

    kinds: frozenset[str]
    start_s: float
    end_s: float = float("inf")


@dataclass
class Judge:
    """Compares answers with the expected ones, and counts."""

    expected: Mapping[str, Answer]
    causes: list[Cause] = field(default_factory=list)
    revoked: list[Cause] = field(default_factory=list)
    """When the rotating key surely is not valid."""
    killed: list[tuple[float, frozenset[int]]] = field(default_factory=list)
    """Times of kills, with the ports of the clients whose connections ended with the process."""
    active: list[str] = field(default_factory=list)
    """Names of the disturbances in progress."""
    counts: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)
    """Of wrong and lost answers."""

    @contextlib.contextmanager
    def cause(self, *kinds: str, slack_s: float) -> Iterator[Cause]:
        """Allow problems as long as the context lasts, and some seconds more."""
        found = Cause(frozenset(kinds), time.monotonic())
        self.causes.append(found)
        try:
            yield found
        finally:
            found.end_s = time.monotonic() + slack_s

    def answered(self, exchange: Exchange, answer: Answer, start_s: float, end_s: float) -> None:
        """Count an answer.

        Args:
            exchange: the request.
            answer: its response.
            start_s: when the client began to send, on the monotonic clock.
            end_s: when it had read the answer.
        """
        expected = self.expected[exchange.name]
        if (answer.status, answer.body) == (expected.status, expected.body):
            is_revoked = exchange.has_rotating_key and any(
                time_of.start_s <= start_s and end_s <= time_of.end_s for time_of in self.revoked
            )
            self._note("wrong" if is_revoked else "right", exchange, "a revoked key was served")
        elif self._is_refusal(exchange, answer, start_s, end_s):
            self.counts["refused"] += 1
            self.refused[_kind_of(exchange, answer)] += 1
        else:
            self._note("wrong", exchange, f"{answer.status} {answer.body[:300]!r}")

    def lost(self, exchange: Exchange, port: int, opened_s: float, reason: str) -> None:
        """Count a request without a whole answer.

        Args:
            exchange: the request.
            port: of the client.
            opened_s: when its connection was opened.
            reason: for the report.
        """
        is_killed = any(port in ports and opened_s <= killed_s for killed_s, ports in self.killed)
        self._note("lost with the process" if is_killed else "lost", exchange, reason)

    @property
    def is_well(self) -> bool:
        """Whether no answer was wrong, or lost without a cause."""
        return not (self.counts["wrong"] or self.counts["lost"])

    def _is_refusal(self, exchange: Exchange, answer: Answer, start_s: float, end_s: float) -> bool:
        kind = _kind_of(exchange, answer)
        if answer.status >= 500 and answer.status != 503:
            return False
        if kind in ALWAYS or (kind == "rate-limit" and exchange.name in ("no-key", "wrong-key")):
            return True
        if kind in ("unauthorized", "rate-limit") and not exchange.has_rotating_key:
            return False
        return any(kind in cause.kinds and cause.start_s <= end_s and start_s <= cause.end_s for cause in self.causes)

    def _note(self, verdict: str, exchange: Exchange, text: str) -> None:
        self.counts[verdict] += 1
        if verdict in ("wrong", "lost") and self.counts[verdict] <= _SAMPLES:
            self.samples.append(f"{verdict}: {exchange.name}: {text} (during {', '.join(self.active)})")


def _kind_of(exchange: Exchange, answer: Answer) -> str:
    return "not ready" if exchange.is_head and answer.status == 503 else answer.kind
