"""All open connections of a process: how many there may be, which one gives way, and the clock of their deadlines."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Protocol

from service.connection.limits import ConnectionLimits

TICK_S = 0.5
"""Seconds between two looks at a connection; deadlines are late by at most as much."""
SPARE = 16
"""Connections beyond the limit, which get answers about health alone."""
_SLICES = 8
"""Parts of the connections, looked at one after the other: 16,000 at once would delay others by some 10 ms."""
_GIVE_WAY = 64
"""Connections closed at once when the limit is reached, so that not every new one looks for them."""

_log = logging.getLogger(__name__)


class Member(Protocol):
    """A connection as the registry sees it."""

    @property
    def address(self) -> str | None:
        """Address of the client."""
        ...

    @property
    def silent_ticks(self) -> int:
        """Ticks since the client sent something that the server waits for; 0 while the server has work of it."""
        ...

    def tick(self) -> None:
        """Note that `TICK_S` has passed."""
        ...

    def give_way(self) -> None:
        """Close at once."""
        ...


class Registry:
    """The open connections of a process."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._slices: list[dict[Member, None]] = [{} for _ in range(_SLICES)]
        self._slice_of: dict[Member, int] = {}
        self._of_address: Counter[str] = Counter()
        self._next = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._slice_of)

    def enter(self, member: Member, loop: asyncio.AbstractEventLoop) -> bool | None:
        """Take a new connection in.

        Returns:
            whether there is a place for it, after silent connections have given way; None if it is one of the `SPARE`.
        """
        place: bool | None = True
        if len(self) >= self._limits.connections and not self._make_place():
            place = None if len(self) < self._limits.connections + SPARE else False
        if self._limits.connections_per_address and member.address is not None:
            self._of_address[member.address] += 1
            if self._of_address[member.address] > self._limits.connections_per_address:
                place = False
        part = len(self) % _SLICES
        self._slices[part][member] = None
        self._slice_of[member] = part
        if self._timer is None:
            self._timer = loop.call_later(TICK_S / _SLICES, self._tick, loop)
        return place

    def leave(self, member: Member) -> None:
        """Forget a connection that is closed."""
        part = self._slice_of.pop(member, None)
        if part is None:
            return
        del self._slices[part][member]
        if self._limits.connections_per_address and member.address is not None:
            self._of_address[member.address] -= 1
            if self._of_address[member.address] <= 0:
                del self._of_address[member.address]

    def _make_place(self) -> bool:
        silent = [(ticks, id(member), member) for member in self._slice_of if (ticks := member.silent_ticks)]
        silent.sort(reverse=True)
        for _, _, member in silent[: min(_GIVE_WAY, 1 + len(silent) // 8)]:
            self.leave(member)
            member.give_way()
        return bool(silent)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(TICK_S / _SLICES, self._tick, loop) if self._slice_of else None
        for member in list(self._slices[self._next]):
            try:
                member.tick()
            except Exception:
                _log.exception("a connection fails, and is closed")
                member.give_way()
        self._next = (self._next + 1) % _SLICES
