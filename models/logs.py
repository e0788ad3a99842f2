"""Where the log of a training goes, the same in every process of it."""

from __future__ import annotations

import logging


def log_to_stderr(level: int = logging.INFO) -> None:
    """A line for each event, with the time of day; what was set up before stays."""
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
