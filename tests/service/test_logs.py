from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from service.logs import FORMAT, BoundedFormatter, JsonFormatter, RateFilter, limit_logs, request_id


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


@pytest.fixture
def objects() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("some")
    logger.addHandler(handler)
    yield logger, stream
    handler.close()


def test_a_json_line_is_one_object_whatever_is_in_the_message(objects: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = objects
    token = request_id.set('a"b')
    try:
        raise ValueError("\n{}" * 10_000)
    except ValueError:
        logger.exception("GET %s", '/x\r\n{"level": "forged"}\x1b[31m\u2028' + "y" * 100_000)
    finally:
        request_id.reset(token)
    logger.info("done")
    text = stream.getvalue()
    assert text.isascii()
    failure, done = map(json.loads, text.splitlines())
    assert failure["level"] == "ERROR"
    assert failure["logger"] == "some"
    assert failure["message"].startswith('GET /x\r\n{"level": "forged"}\x1b[31m')
    assert failure["request_id"] == 'a"b'
    assert "ValueError" in failure["exception"] or len(failure["exception"]) <= 4003
    assert len(text) < 40_000
    assert set(done) == {"time", "level", "logger", "message", "process"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", done["time"])


def test_a_text_line_about_a_request_names_it(logged: tuple[logging.Logger, io.StringIO, Clock]) -> None:
    logger, stream, _ = logged
    token = request_id.set("abc")
    logger.error("failed")
    request_id.reset(token)
    assert stream.getvalue() == "ERROR some: failed (request abc)\n"
