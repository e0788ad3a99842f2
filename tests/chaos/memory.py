"""Memory of a server after 10,000 and after 1,000,000 mixed requests, each answer of which is checked.

`python tests/chaos/memory.py [--requests 1000000] [--clients 16]` (`make memory`): prints the anonymous memory of all
its processes, those that decode bodies too, after 1,000 requests, 10,000 and each further 100,000. Exit status 1: an
answer was wrong or lost, or the memory grew by more than `MOST_GROWTH`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys
import time
from pathlib import Path

from chaos import Server, expectations, served
from clients import Clients
from judging import Judge
from process_table import children_of

FIRST = 10_000
"""Requests after which caches and pools are full."""
MOST_GROWTH = 0.05
_STEP = 100_000
_SAMPLES, _PAUSE_S = 5, 0.2
# Pages of files do not count: their share depends on the other processes of the machine.
_PSS = re.compile(r"^Pss_Anon:\s+(\d+) kB$", re.MULTILINE)


def memory_mib(pid: int) -> float:
    """Return the anonymous memory of a process and all that it has started: memory that they share counts once."""
    total_kib = 0
    found = [pid]
    while found:
        one = found.pop()
        # It may have ended.
        with contextlib.suppress(OSError):
            pss = _PSS.search((Path("/proc") / str(one) / "smaps_rollup").read_text())
            total_kib += int(pss[1]) if pss else 0
        found += children_of(one)
    return total_kib / 1024


async def settled_mib(pid: int) -> float:
    """Return the least of a few samples, between requests as well as in them."""
    samples = []
    for _ in range(_SAMPLES):
        samples.append(memory_mib(pid))
        await asyncio.sleep(_PAUSE_S)
    return min(samples)


async def measure(server: Server, requests: int, n_clients: int) -> tuple[dict[int, float], Judge]:
    """Return the memory in MiB by number of requests, as far as `requests`, and what became of them.

    Args:
        server: of `served`.
        requests: to send.
        n_clients: at the same time.
    """
    exchanges, expected = await expectations(server)
    judge = Judge(expected)
    clients = Clients(server.target.port, exchanges, judge, 1, n_clients)
    clients.start(n_clients)
    found: dict[int, float] = {}
    start_s = time.monotonic()
    for mark in (FIRST // 10, FIRST, *range(_STEP, requests + 1, _STEP)):
        while judge.counts["sent"] < mark and server.process.poll() is None:
            await asyncio.sleep(0.05)
        found[mark] = await settled_mib(server.process.pid)
        rate = judge.counts["sent"] / (time.monotonic() - start_s)
        print(f"{mark:>9} requests: {found[mark]:.1f} MiB, {rate:.0f} requests a second", flush=True)
    await clients.end()
    return found, judge


async def _main(requests: int, n_clients: int) -> int:
    async with served() as server:
        found, judge = await measure(server, requests, n_clients)
    for name in ("sent", "right", "refused", "cut off by the client", "lost", "wrong"):
        print(f"{name}: {judge.counts[name]}")
    growth = found[max(found)] / found[FIRST] - 1.0
    print(f"growth from {FIRST} requests on: {growth:+.1%}")
    return int(growth > MOST_GROWTH or not judge.is_well)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000, help="at least 10000")
    parser.add_argument("--clients", type=int, default=16)
    chosen = parser.parse_args()
    return asyncio.run(_main(chosen.requests, chosen.clients))


if __name__ == "__main__":
    sys.exit(main())
