"""Processes of this machine, as a test looks at them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for process in Path("/proc").iterdir():
        try:
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if process.name.isdigit() and int(fields[1]) == pid:
            found.append(int(process.name))
    return found


def is_running(pid: int) -> bool:
    """A process that nobody has waited for yet does not run any more."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    pause = 0.005
    while not condition():
        assert time.monotonic() < end
        # Looking at a server takes the CPU from it.
        pause = min(1.5 * pause, 0.05)
        time.sleep(pause)
