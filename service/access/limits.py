"""Limits of requests per client: token buckets in memory of a fixed size."""

from __future__ import annotations

import functools
import ipaddress
import mmap
import time

_WAYS = 4
_SLOT_BYTES = 16
_ROUNDING_S = 1e-6
"""More than the rounding of a time since the start of the machine."""


class Buckets:
    """Token buckets of many clients, shared with the processes that are forked later.

    A bucket is one number, the time at which it is full again (the generic cell rate algorithm, ITU-T I.371). The
    memory is a table of sets of four buckets, and the hash of a client names its set. A client without a bucket takes
    the one in its set that is full soonest: when there are more clients than buckets, limits become looser, never
    tighter.
    Processes write without a lock, so two requests of one client at the same instant can count as one.
    """

    def __init__(self, per_s: float, burst: int, slots: int = 65_536) -> None:
        """Make full buckets.

        Args:
            per_s: tokens that a bucket gains in a second.
            burst: tokens of a full bucket.
            slots: number of buckets, a multiple of four.
        """
        memory = memoryview(mmap.mmap(-1, slots * _SLOT_BYTES))
        self._clients = memory[: slots * 8].cast("q")
        self._full_at_s = memory[slots * 8 :].cast("d")
        self._sets = slots // _WAYS
        self._period_s = 1.0 / per_s
        self._span_s = (burst - 1) * self._period_s + _ROUNDING_S

    def take(self, client: str) -> float:
        """Take a token of a client; return 0, or the seconds until there is one."""
        now_s = time.monotonic()
        name = hash(client)
        first = name % self._sets * _WAYS
        full_at_s = self._full_at_s
        for slot in range(first, first + _WAYS):
            if self._clients[slot] == name:
                break
        else:
            slot = min(range(first, first + _WAYS), key=full_at_s.__getitem__)
            self._clients[slot] = name
            full_at_s[slot] = 0.0
        start_s = max(full_at_s[slot], now_s)
        wait_s = start_s - now_s - self._span_s
        if wait_s > 0.0:
            return wait_s
        full_at_s[slot] = start_s + self._period_s
        return 0.0


def client_of(address: str) -> str:
    """Return the client that has an address: an IPv6 client has a whole network of 64 bits."""
    # A proxy can pass on any text as an address; the longest one has 45 characters, and a zone.
    return _network_of(address[:64]) if ":" in address else address


@functools.lru_cache(4096)
def _network_of(address: str) -> str:
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
