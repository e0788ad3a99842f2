"""TODO: service/inference/admission.py."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

# No clock of an event loop is coarser.
CLOCK_S = 0.001


@dataclass(frozen=True)
class Limits:
    """How much a `Batcher` takes at once, and for how long."""

    workers: int = 1
    """Threads that decode, compute and answer."""
    forward_batch: int = 32
    """Most images that share one pass."""
    max_delay_s: float = 0.0
    """How long a request waits for others while the batch is not full; 0 takes what is there."""
    max_requests: int = 1024
    """Requests that are read, wait or are computed at the same time; more are refused."""
    max_bytes: int = 256 * 1024 * 1024
    """The same for the bytes of their bodies."""
    max_pixels: int = 2 * 1024 * 1024
    """Requests whose images have more pixels together than this do not share a pass or a search: memory goes with
    pixels, and a file of a few thousand bytes can have millions."""


@dataclass(eq=False)
class Reader:
    """A body on its way."""

    task: asyncio.Task[Any]
    loop: asyncio.AbstractEventLoop
    deadline: float
    deadline_s: float
    error: Exception | None = None
    """Why the task was cancelled, if it was from here."""

    def settle(self, error: Exception) -> None:
        """Wait no longer."""
        if self.error is None:
            self.error = error
            self.task.cancel()
