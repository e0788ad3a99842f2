"""Log lines of the server: bounded in length and number, whatever clients send; as text, or as a JSON object a line."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Literal

FORMAT = "%(levelname)s %(name)s: %(message)s"
VARIABLE = "LIPCERT_LOG_FORMAT"
"""See `Settings.log_format`; read before the settings, so that their errors have the format, too."""
_MOST_CHARACTERS = 4000
_MOST_A_MINUTE = 30
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)}

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Identifier of the request that the running code is about."""


def start_logs() -> None:
    """Write the log of this process to standard error, in the format of the environment, with its limits."""
    logging.basicConfig(format=FORMAT, level=logging.INFO, stream=sys.stderr)
    limit_logs()


def limit_logs() -> None:
    """Limit the lines of every handler of the root logger."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(RateFilter())
    use_format("json" if os.environ.get(VARIABLE) == "json" else "text")


def use_format(name: Literal["text", "json"]) -> None:
    """Write lines in this format, in this process and in those that it starts."""
    os.environ[VARIABLE] = name
    for handler in logging.getLogger().handlers:
        handler.setFormatter(BoundedFormatter(FORMAT) if name == "text" else JsonFormatter())


def line_of(level: str, logger: str, message: str) -> str:
    """Return a line in the format of this process, for code that must not wait for the lock of the log.

    Args:
        level: its name.
        logger: its name.
        message: text.
    """
    if os.environ.get(VARIABLE) == "json":
        return _json({"time": _time(time.time()), "level": level, "logger": logger, "message": message})
    return f"{level} {logger}: {message}"


class BoundedFormatter(logging.Formatter):
    """Formatter that escapes control characters, indents further lines, and cuts long ones."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record; no text in it begins another line or drives a terminal."""
        record.message = _bounded(record.message).replace("\n", "\n    ")
        number = request_id.get()
        return super().formatMessage(record) + (f" (request {number})" if number else "")

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        """Return a traceback, of a long one its end."""
        return _bounded(super().formatException(ei)[-_MOST_CHARACTERS:])


class JsonFormatter(BoundedFormatter):
    """Formatter of one JSON object a line: time (RFC 3339, UTC), level, logger, message, process; where there are,
    request_id and exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        members: dict[str, str | int] = {
            "time": _time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": _cut(record.getMessage()),
            "process": record.process or 0,
        }
        if number := request_id.get():
            members["request_id"] = number
        if record.exc_info:
            members["exception"] = self.formatException(record.exc_info)
        return _json(members)


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


def _json(members: dict[str, str | int]) -> str:
    # Imported here: the process that proves models starts with this module.
    import json

    return json.dumps(members)


def _time(seconds: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def _bounded(text: str) -> str:
    return _cut(text).translate(_ESCAPED)
