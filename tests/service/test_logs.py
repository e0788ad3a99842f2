from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from service.logs import FORMAT, BoundedFormatter, RateFilter, limit_logs


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def logged() -> Iterator[tuple[logging.Logger, io.StringIO, Clock]]:
    clock, stream = Clock(), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(BoundedFormatter(FORMAT))
    handler.addFilter(RateFilter(3, clock))
    logger = logging.Logger("some")
    logger.addHandler(handler)
    yield logger, stream, clock
    handler.close()


def test_a_line_has_no_control_characters_and_no_text_begins_another(
    logged: tuple[logging.Logger, io.StringIO, Clock],
) -> None:
    logger, stream, _ = logged
    logger.error("GET %s", "/x\r\nERROR service: forged\x1b[31m\x9b\0é")
    assert stream.getvalue() == "ERROR some: GET /x\\x0d\n    ERROR service: forged\\x1b[31m\\x9b\\x00é\n"


def test_a_long_message_and_a_long_traceback_are_cut(logged: tuple[logging.Logger, io.StringIO, Clock]) -> None:
    logger, stream, _ = logged

    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        raise ValueError("\x07" + "v" * 100)

    try:
        deep(200)
    except ValueError:
        logger.exception("m" * 100_000)
    text = stream.getvalue()
    assert len(text) < 10_000
    assert text.endswith("ValueError: \\x07" + "v" * 100 + "\n")


def test_warnings_of_one_line_of_code_are_limited_and_counted(
    logged: tuple[logging.Logger, io.StringIO, Clock],
) -> None:
    logger, stream, clock = logged
    for minute in range(3):
        clock.now = 60.0 * minute
        for number in range(10):
            logger.warning("bad request %d", 10 * minute + number)
        logger.info("not limited")
        logger.warning("another line of code")
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if "bad" in line] == [
        "WARNING some: bad request 0",
        "WARNING some: bad request 1",
        "WARNING some: bad request 2",
        "WARNING some: bad request 10 (and 7 like this one in the minute before)",
        "WARNING some: bad request 11",
        "WARNING some: bad request 12",
        "WARNING some: bad request 20 (and 7 like this one in the minute before)",
        "WARNING some: bad request 21",
        "WARNING some: bad request 22",
    ]
    assert len(lines) == 9 + 3 + 3


def test_information_is_not_limited(logged: tuple[logging.Logger, io.StringIO, Clock]) -> None:
    logger, stream, _ = logged
    for _ in range(50):
        logger.info("answered")
    assert len(stream.getvalue().splitlines()) == 50


def test_every_handler_of_the_root_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    limit_logs()
    for _ in range(100):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert 0 < len(handler.stream.getvalue().splitlines()) <= 61
