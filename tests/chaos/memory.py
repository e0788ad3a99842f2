"""Memory of a server after 10,000 and after 1,000,000 mixed requests, each answer of which is checked.

`python tests/chaos/memory.py [--requests 1000000] [--clients 16]` (`make memory`): prints the proportional set of all
its processes at each power of ten. Exit status 1: an answer was wrong or lost, or the memory grew by more than
`MOST_GROWTH`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import time
from pathlib import Path

from chaos import Server, expectations, served
from clients import Clients
from judging import Judge

FIRST = 10_000
"""Requests after which caches and pools are full."""
MOST_GROWTH = 0.05
_SAMPLES, _PAUSE_S = 5, 0.2
_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.MULTILINE)


def memory_mib(group: int) -> float:
    """Return the proportional set of all processes of a group: memory that they share counts once."""
    total_kib = 0
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getpgid(int(folder.name)) == group:
                found = _PSS.search((folder / "smaps_rollup").read_text())
                total_kib += int(found[1]) if found else 0
        except OSError:
            continue  # It has ended.
    return total_kib / 1024


async def settled_mib(group: int) -> float:
    """Return the least of a few samples, between requests as well as in them."""
    samples = []
    for _ in range(_SAMPLES):
        samples.append(memory_mib(group))
        await asyncio.sleep(_PAUSE_S)
    return min(samples)


async def measure(server: Server, requests: int, n_clients: int) -> tuple[dict[int, float], Judge]:
    """Return the memory in MiB after each power of ten up to `requests`, from 1,000 on, and what became of them.

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
    mark = FIRST // 10
    start_s = time.monotonic()
    while mark <= requests:
        while judge.counts["sent"] < mark and server.process.poll() is None:
            await asyncio.sleep(0.05)
        found[mark] = await settled_mib(server.process.pid)
        rate = judge.counts["sent"] / (time.monotonic() - start_s)
        print(f"{mark:>9} requests: {found[mark]:.1f} MiB, {rate:.0f} requests a second", flush=True)
        mark *= 10
    await clients.end()
    return found, judge


async def _main(requests: int, n_clients: int) -> int:
    async with served() as server:
        found, judge = await measure(server, requests, n_clients)
    for name in ("sent", "right", "refused", "cut off by the client", "lost", "wrong"):
        print(f"{name}: {judge.counts[name]}")
    growth = found[max(found)] / found.get(FIRST, found[max(found)]) - 1.0
    print(f"growth from {FIRST} requests on: {growth:+.1%}")
    return int(growth > MOST_GROWTH or not judge.is_well)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000, help="a power of ten, at least 1000")
    parser.add_argument("--clients", type=int, default=16)
    chosen = parser.parse_args()
    return asyncio.run(_main(chosen.requests, chosen.clients))


if __name__ == "__main__":
    sys.exit(main())
