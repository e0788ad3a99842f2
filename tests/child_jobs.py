"""Jobs that child processes of tests do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

KEPT: list[bytes] = []


def work(order: tuple[str, int], content: bytes) -> tuple[bytes, bytes]:
    """Do what the order names; answer with the process id, and the content."""
    name, amount = order
    match name:
        case "burn":
            end = time.process_time() + amount
            while time.process_time() < end:
                pass
        case "allocate":
            content = bytes(bytearray(amount))[:1]
        case "keep":
            KEPT.append(b"1" * amount)
            content = b"kept"
        case "signal":
            os.kill(os.getpid(), amount)
        case "descriptors":
            content = "\n".join(str(path.resolve()) for path in Path("/proc/self/fd").iterdir()).encode()
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise ValueError("a defect")
        case _:
            pass
    return str(os.getpid()).encode(), content
