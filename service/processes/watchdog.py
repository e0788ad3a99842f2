"""Watchdog: ends a process whose event loop hangs, and which therefore answers nothing, not even its health."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

from service.logs import line_of

_LOOK_EVERY_S = 1.0


class Watchdog(threading.Thread):
    """A thread that ends the process when nobody has called `beat` for some seconds.

    Seconds are counted one by one, so that a pause of the whole process (SIGSTOP, a frozen container) is no hang.
    """

    def __init__(self, limit_s: float, status: int) -> None:
        """Start nothing.

        Args:
            limit_s: seconds of silence.
            status: exit status of the process.
        """
        super().__init__(name="watchdog", daemon=True)
        self._limit_s = limit_s
        self._status = status
        self._beats = 0
        self._is_over = threading.Event()

    def beat(self) -> None:
        """Note that the event loop runs."""
        self._beats += 1

    def end(self) -> None:
        """Watch no longer."""
        self._is_over.set()

    def run(self) -> None:
        """Watch until `end`."""
        silent_s, before = 0.0, self._beats
        while not self._is_over.wait(_LOOK_EVERY_S):
            silent_s, before = 0.0 if self._beats != before else silent_s + _LOOK_EVERY_S, self._beats
            if silent_s >= self._limit_s:
                # Not the log: the event loop may hang with its lock.
                text = line_of("ERROR", __name__, f"the event loop hangs; the process ends with status {self._status}")
                os.write(sys.stderr.fileno(), f"{text}\n".encode())
                faulthandler.dump_traceback(all_threads=True)
                os._exit(self._status)
