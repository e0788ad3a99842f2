"""Log lines of the server: bounded in length and number, whatever clients send."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType

FORMAT = "%(levelname)s %(name)s: %(message)s"
_MOST_CHARACTERS = 4000
_MOST_A_MINUTE = 30
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)}


def limit_logs() -> None:
    """Limit the lines of every handler of the root logger."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(BoundedFormatter(FORMAT))
        handler.addFilter(RateFilter())


class BoundedFormatter(logging.Formatter):
    """Formatter that escapes control characters, indents further lines, and cuts what is long."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record; no text in it begins another line or drives a terminal."""
        record.message = _bounded(record.message).replace("\n", "\n    ")
        return super().formatMessage(record)

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        """Return a traceback, of a long one its end."""
        return _bounded(super().formatException(ei)[-_MOST_CHARACTERS:])


class RateFilter(logging.Filter):
    """Filter of warnings and errors: at most 30 a minute from each line of code pass; the next one counts the rest."""

    def __init__(self, most: int = _MOST_A_MINUTE, clock: Callable[[], float] = time.monotonic) -> None:
        """Pass everything that comes.

        Args:
            most: records in a minute.
            clock: seconds.
        """
        super().__init__()
        self._most = most
        self._clock = clock
        self._minutes: dict[tuple[str, str, int], tuple[int, int]] = {}
        """Minute and number of records, by logger and line of code."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record passes."""
        if record.levelno < logging.WARNING:
            return True
        line = (record.name, record.pathname, record.lineno)
        now = int(self._clock() // 60)
        minute, count = self._minutes.get(line, (now, 0))
        if minute != now:
            if count > self._most:
                record.msg = f"{record.getMessage()} (and {count - self._most} like this one in the minute before)"
                record.args = ()
            count = 0
        self._minutes[line] = (now, count + 1)
        return count < self._most


def _bounded(text: str) -> str:
    cut = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    return cut.translate(_ESCAPED)
