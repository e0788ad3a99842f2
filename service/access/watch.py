"""Files that may change while the server runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

LOOK_EVERY_S = 1.0


class Watch:
    """Looks at files when somebody asks, at most once a second: no thread, and one comparison otherwise."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Look at the files for the first time; they are read afterwards, so no change is missed."""
        self._files = files
        self._states = [_state_of(file) for file in files]
        self._next_look_s = time.monotonic() + LOOK_EVERY_S

    def has_changed(self) -> bool:
        """Return whether a file has changed, or has appeared or vanished, since the last True."""
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return False
        self._next_look_s = now_s + LOOK_EVERY_S
        before, self._states = self._states, [_state_of(file) for file in self._files]
        return self._states != before


def _state_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
