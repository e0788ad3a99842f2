"""Deadlines, refusals and the end of a connection, with ticks instead of a clock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_connection import Held, Wire, scenario
from live_server import echo, respond

from service.connection.limits import ConnectionLimits
from service.connection.protocol import Connection, connection_class

HOST = b"Host: a\r\n"
GET = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"
LIMITS = ConnectionLimits(head_s=10, body_s=5, idle_s=75, write_s=30)


async def early(scope: Any, receive: Any, send: Any) -> None:
    """Answer without reading the body."""
    del scope, receive
    await respond(send, b"{}", status=413)


@scenario
async def test_a_silent_client_is_told_after_the_deadline_of_the_head() -> None:
    wire = Wire(LIMITS)
    await wire.wait(10)
    assert wire.answers == []
    await wire.wait(1)
    assert wire.statuses == [408]
    assert "LIPCERT_HEAD_S" in wire.answers[0].problem


@scenario
async def test_a_head_has_one_deadline_from_its_first_byte_however_it_drips() -> None:
    wire = Wire(LIMITS)
    await wire.wait(9)
    for byte in b"GET / HTTP/1.1\r\nHost":
        await wire.send(bytes([byte]))
        await wire.wait(0.5)
    assert wire.answers == []
    await wire.wait(2)
    assert wire.statuses == [408]


@scenario
async def test_a_second_head_has_the_deadline_of_a_head_and_not_of_an_idle_connection() -> None:
    wire = Wire(LIMITS)
    await wire.send(GET)
    await wire.wait(60)
    await wire.send(b"GET")
    await wire.wait(10)
    assert wire.statuses == [200]
    await wire.wait(1)
    assert wire.statuses == [200, 408]


@scenario
async def test_an_idle_connection_is_closed_after_its_time_without_a_word() -> None:
    wire = Wire(LIMITS)
    await wire.send(GET)
    await wire.wait(75)
    assert not wire.is_over
    await wire.send(GET)
    await wire.wait(75)
    assert not wire.is_over
    await wire.wait(1)
    assert wire.statuses == [200, 200]
    assert wire.transport.end == "closed"


@scenario
async def test_a_body_has_a_deadline_between_its_pieces() -> None:
    app = Held()
    wire = Wire(LIMITS, app)
    await wire.send(POST)
    for _ in range(8):
        await wire.wait(5)
        await wire.send(b"a")
    assert wire.answers == []
    await wire.wait(6)
    assert wire.statuses == [408]
    assert "LIPCERT_BODY_S" in wire.answers[0].problem
    assert app.disconnected


@scenario
async def test_an_answer_has_no_deadline_here() -> None:
    app = Held()
    wire = Wire(LIMITS, app)
    await wire.send(POST + b"a" * 10)
    await wire.wait(1000)
    assert not wire.is_over
    app.may_answer.set()
    await wire.settle()
    assert wire.statuses == [200]
    assert not app.disconnected


@scenario
async def test_a_body_that_the_application_does_not_read_yet_has_no_deadline() -> None:
    taken = asyncio.Event()

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await taken.wait()
        await echo(scope, receive, send)

    wire = Wire(LIMITS, late)
    await wire.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"a" * 99_999)
    assert wire.transport.is_paused
    await wire.wait(100)
    assert wire.answers == []
    taken.set()
    await wire.settle()
    assert not wire.transport.is_paused
    await wire.send(b"a")
    assert wire.statuses == [200]


@scenario
async def test_a_client_that_does_not_read_is_cut_off() -> None:
    wire = Wire(LIMITS)
    wire.transport.reads_answers = False
    await wire.send(GET)
    await wire.wait(30)
    assert wire.transport.end is None
    await wire.wait(1)
    assert wire.transport.end == "aborted"


@scenario
async def test_a_client_that_reads_slowly_has_time_for_a_large_answer() -> None:
    wire = Wire(LIMITS)
    await wire.send(GET)
    wire.transport.unread = 10 * 1024 * 1024
    for _ in range(600):
        await wire.wait(1)
        wire.transport.unread -= 16 * 1024
    assert wire.transport.end is None
    await wire.wait(100)
    assert wire.transport.end == "aborted"


@scenario
async def test_a_client_that_reads_goes_on() -> None:
    wire = Wire(LIMITS)
    await wire.send(GET)
    for _ in range(100):
        wire.transport.unread = 70_000
        wire.protocol.pause_writing()
        await wire.wait(20)
        wire.transport.unread = 10_000
        wire.protocol.resume_writing()
    assert wire.transport.end is None


@scenario
async def test_a_refusal_waits_for_the_answers_before_it() -> None:
    app = Held()
    wire = Wire(LIMITS, app)
    await wire.send(GET + GET + b"GARBAGE" + GET)
    assert app.seen == ["/next"]
    assert wire.answers == []
    app.may_answer.set()
    await wire.settle()
    assert wire.statuses[:2] == [200, 200]
    assert len(wire.statuses) == 3
    assert app.seen == ["/next", "/next"]
    assert not app.disconnected


@scenario
async def test_a_request_in_a_queue_whose_body_is_damaged_is_never_started() -> None:
    app = Held()
    wire = Wire(LIMITS, app)
    broken = b"POST /broken HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd"
    await wire.send(GET + broken)
    app.may_answer.set()
    await wire.settle()
    assert wire.statuses == [200, 400]
    assert app.seen == ["/next"]


@scenario
async def test_input_after_a_refusal_is_dropped_until_the_client_is_silent() -> None:
    wire = Wire(LIMITS)
    await wire.send(b"GET / HTTP/1.1\r\n\r\n")
    assert wire.transport.has_written_eof
    for _ in range(3):
        await wire.send(GET * 100)
        await wire.wait(2)
    assert wire.transport.end is None
    await wire.wait(1)
    assert wire.transport.end == "aborted"
    assert wire.statuses == [400]


@scenario
async def test_input_after_a_refusal_is_dropped_for_ten_seconds_at_most() -> None:
    wire = Wire(LIMITS)
    await wire.send(b"GET / HTTP/1.1\r\n\r\n")
    for _ in range(20):
        await wire.send(b"x")
        await wire.wait(0.5)
    assert wire.transport.end is None
    await wire.send(b"x")
    await wire.wait(0.5)
    assert wire.transport.end == "aborted"


@scenario
async def test_input_after_a_refusal_is_bounded() -> None:
    wire = Wire(LIMITS)
    await wire.send(b"GET / HTTP/1.1\r\n\r\n")
    piece = bytes(64 * 1024 * 1024)
    await wire.send(*[piece] * 4)
    assert wire.transport.end is None
    await wire.send(b"x")
    assert wire.transport.end == "aborted"


@scenario
async def test_a_client_that_was_refused_and_closes_is_closed() -> None:
    wire = Wire(LIMITS)
    await wire.send(b"GET / HTTP/1.1\r\n\r\n")
    await wire.eof()
    assert wire.transport.end == "closed"


@scenario
async def test_an_answer_before_the_end_of_the_body_ends_the_connection() -> None:
    wire = Wire(LIMITS, early)
    await wire.send(POST + b"abc")
    assert wire.statuses == [413]
    assert wire.answers[0].headers["connection"] == "close"
    assert wire.transport.has_written_eof
    # The rest of the body is no request, and another request is none.
    await wire.send(b"defghij" + GET)
    assert wire.statuses == [413]


@scenario
async def test_an_answer_that_does_not_read_a_complete_body_keeps_the_connection() -> None:
    wire = Wire(LIMITS, early)
    await wire.send(POST + b"a" * 10, GET)
    assert wire.statuses == [413, 413]
    assert "connection" not in wire.answers[0].headers
    assert not wire.is_over


@scenario
async def test_a_client_that_expects_100_is_told_to_go_on_or_refused() -> None:
    expecting = POST.replace(b"Host: a\r\n", b"Host: a\r\nExpect: 100-continue\r\n")
    wire = Wire(LIMITS)
    await wire.send(expecting)
    assert wire.transport.written == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.transport.written.clear()
    await wire.send(b"a" * 10)
    assert wire.statuses == [200]
    refused = Wire(LIMITS, early)
    await refused.send(expecting)
    assert refused.statuses == [413]
    assert refused.answers[0].headers["connection"] == "close"


@scenario
async def test_a_client_that_has_closed_its_side_is_answered() -> None:
    app = Held()
    wire = Wire(LIMITS, app)
    await wire.send(GET + GET)
    await wire.eof()
    await wire.wait(1)
    assert wire.transport.end is None
    app.may_answer.set()
    await wire.settle()
    assert wire.statuses == [200, 200]
    assert wire.transport.end == "closed"


@scenario
async def test_a_client_that_has_closed_its_side_for_long_has_left() -> None:
    app = Held()
    wire = Wire(LIMITS, app)
    await wire.send(GET)
    await wire.eof()
    await wire.wait(2)
    assert wire.transport.end == "aborted"
    assert app.disconnected
    assert wire.answers == []


@scenario
async def test_a_lost_connection_reaches_the_running_request_and_no_other() -> None:
    app = Held()
    wire = Wire(LIMITS, app)
    await wire.send(GET + b"GET /queued HTTP/1.1\r\nHost: a\r\n\r\n")
    wire.transport.abort()
    await wire.settle()
    assert app.disconnected
    assert app.seen == ["/next"]


@scenario
async def test_a_request_that_ends_in_the_middle_is_told_so() -> None:
    for start in (b"GET", POST, POST + b"abc"):
        wire = Wire(LIMITS)
        await wire.send(start)
        await wire.eof()
        assert wire.statuses == [400]
        assert wire.transport.end == "closed"
    wire = Wire(LIMITS)
    await wire.eof()
    assert wire.answers == []
    assert wire.transport.end == "closed"


@scenario
async def test_a_server_that_stops_answers_and_waits_a_moment_for_one_more_request() -> None:
    app = Held()
    busy, idle, silent = Wire(LIMITS, app), Wire(LIMITS), Wire(LIMITS)
    await busy.send(GET)
    await idle.send(GET)
    for wire in (busy, idle, silent):
        wire.protocol.shutdown()
    app.may_answer.set()
    await busy.settle()
    assert busy.answers[0].headers["connection"] == "close"
    assert busy.transport.end == "closed"
    await idle.send(GET)
    assert idle.statuses == [200, 200]
    assert idle.answers[1].headers["connection"] == "close"
    assert idle.transport.end == "closed"
    assert silent.transport.end is None
    await silent.wait(1)
    assert silent.transport.end == "closed"


@scenario
async def test_connections_that_come_after_the_stop_are_answered_once() -> None:
    cls = connection_class(LIMITS)
    cls.stops = True
    wire = Wire(connections=cls)
    await wire.send(GET)
    assert (wire.statuses, wire.answers[0].headers["connection"]) == ([200], "close")
    assert wire.transport.end == "closed"


@scenario
async def test_a_closed_connection_does_not_wait_for_ever_for_the_client_to_close() -> None:
    """As of TLS: `close` sends a notification first, and waits for that of the client."""
    wire = Wire(LIMITS)
    closing: list[bool] = []
    wire.transport.close = lambda: closing.append(True)  # type: ignore[method-assign]
    wire.transport.is_closing = lambda: bool(closing)  # type: ignore[method-assign]
    await wire.send(GET)
    await wire.wait(76)
    assert closing
    assert wire.transport.end == "aborted"


@scenario
async def test_a_request_whose_body_comes_after_the_stop_is_the_last() -> None:
    wire = Wire(LIMITS)
    await wire.send(POST)
    wire.protocol.shutdown()
    await wire.send(b"a" * 10)
    assert wire.answers[0].headers["connection"] == "close"
    assert wire.transport.end == "closed"


@scenario
async def test_a_request_can_be_refused_before_a_task_is_made() -> None:
    content = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
    seen: list[str] = []

    def refuse(scope: Any) -> bytes | None:
        seen.append(scope["path"])
        return content if scope["path"] == "/refused" else None

    app = Held()
    app.may_answer.set()
    wire = Wire(LIMITS, app, refuse)
    refused = POST.replace(b" / ", b" /refused ")
    await wire.send(GET + refused + b"a" * 10 + GET)
    assert wire.statuses == [200, 503]
    assert wire.answers[1].headers == {
        "date": "Mon, 30 Nov 2026 12:00:00 GMT",
        "content-length": "2",
        "connection": "close",
    }
    assert (seen, app.seen) == (["/next", "/refused"], ["/next"])
    assert wire.transport.has_written_eof


@scenario
async def test_a_fault_of_a_callback_is_logged_and_ends_the_connection() -> None:
    wire = Wire(LIMITS)
    wire.protocol.root_path = None  # type: ignore[assignment]
    await wire.send(GET)
    assert wire.statuses == [400]
    assert wire.is_over


def test_each_class_has_its_own_registry_and_limits() -> None:
    wires: list[Any] = []

    async def run() -> None:
        wires.extend([Wire(LIMITS), Wire()])
        assert wires[0].protocol.limits is LIMITS
        assert wires[0].protocol.registry is not wires[1].protocol.registry
        assert all(isinstance(wire.protocol, Connection) for wire in wires)

    asyncio.run(run())


@pytest.mark.parametrize("piece", [b"GET / HTTP/1.1\r\n\r\n", b"\x00", b"BREW / HTTP/1.1\r\n"])
def test_requests_that_are_refused_write_nothing_to_the_log(piece: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        wire = Wire()
        await wire.send(piece)
        assert wire.is_over

    asyncio.run(run())
    assert caplog.records == []
