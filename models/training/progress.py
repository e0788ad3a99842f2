"""TODO: models/training/progress.py."""

from __future__ import annotations

REPORT_EVERY = 10
"""Steps from one figure of the bar, and one point of the curves, to the next."""


def in_words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
