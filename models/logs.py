"""Set-up of the log, the same in every process of a training."""

from __future__ import annotations

import logging


def log_to_stderr(level: int = logging.INFO) -> None:
    """Log to standard error with the time of day; an earlier set-up of logging stays."""
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
