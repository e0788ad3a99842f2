"""Which bytes are a request: RFC 9110 and 9112 on a connection, whatever the packets."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from fake_connection import Wire, cut
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import often

from service.connection.limits import ConnectionLimits

HOST = b"Host: a\r\n"
GET = b"GET /second?x=1 HTTP/1.1\r\n" + HOST + b"\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"

UPGRADES = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    b"CONNECTION: UPGRADE\r\nUPGRADE: H2C\r\n",
    b"Upgrade: h2c, websocket\r\nconnection: keep-alive, upgrade\r\n",
    b"Upgrade: a/1\r\nUpgrade: b\r\nConnection: Upgrade\r\n",
    b"Upgrade:\r\nConnection: Upgrade\r\n",
    b"Connection: Upgrade\r\n",
    b"Upgrade: h2c\r\n",
]
BODIES = [
    (b"", b""),
    (b"Content-Length: 0\r\n", b""),
    (b"Content-Length: 43\r\n", b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n12345678"),
    (CHUNKED, b"4;a=b\r\nGET \r\n1f\r\n/smuggled HTTP/1.1\r\nHost: a\r\n\r\n\r\n0\r\nX-Trailer: 1\r\n\r\n"),
]


def exchange(*pieces: bytes, limits: ConnectionLimits | None = None) -> list[Any]:
    """Status and, of the echo, all that arrived; the client closes its side at the end."""

    async def run() -> list[Any]:
        wire = Wire(limits)
        await wire.send(*pieces)
        await wire.eof()
        assert wire.is_over
        for answer in wire.answers:
            if answer.status >= 400:
                assert answer.problem
        return [(answer.status, answer.json if answer.body else None) for answer in wire.answers]

    return asyncio.run(run())


def without_upgrade(answers: list[Any]) -> list[Any]:
    """The answers, without headers that concern an upgrade."""
    hidden = {"upgrade", "connection", "http2-settings", "sec-websocket-version"}
    for _, seen in answers:
        seen["headers"] = [header for header in seen["headers"] if header[0] not in hidden]
    return answers


@pytest.mark.parametrize("upgrade", UPGRADES, ids=range(len(UPGRADES)))
@pytest.mark.parametrize(("framing", "body"), BODIES, ids=["none", "empty", "length", "chunked"])
@settings(max_examples=often(10, 25))
@given(places=st.lists(st.integers(0, 400), max_size=6))
def test_a_request_with_upgrade_is_answered_as_without_it_whatever_the_packets(
    upgrade: bytes, framing: bytes, body: bytes, places: list[int]
) -> None:
    plain = b"POST /first HTTP/1.1\r\n" + HOST + framing + b"\r\n" + body + GET
    offered = b"POST /first HTTP/1.1\r\n" + HOST + upgrade + framing + b"\r\n" + body + GET
    expected = exchange(plain)
    assert [(status, seen["path"]) for status, seen in expected] == [(200, "/first"), (200, "/second")]
    assert without_upgrade(exchange(*cut(offered, places))) == expected


@pytest.mark.parametrize("upgrade", UPGRADES, ids=range(len(UPGRADES)))
@pytest.mark.parametrize(("framing", "body"), BODIES, ids=["none", "empty", "length", "chunked"])
def test_a_request_with_upgrade_may_arrive_byte_by_byte(upgrade: bytes, framing: bytes, body: bytes) -> None:
    offered = b"POST /first HTTP/1.1\r\n" + HOST + upgrade + framing + b"\r\n" + body + GET
    assert exchange(*cut(offered, range(len(offered)))) == exchange(offered)


def test_upgrade_does_not_keep_a_connection_that_the_client_wants_closed() -> None:
    first = b"POST / HTTP/1.1\r\n" + HOST + b"Connection: close, Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nab"
    [(status, seen)] = exchange(first + GET)
    assert (status, seen["body"]) == (200, "ab")


def test_connect_is_not_implemented_and_nothing_behind_it_is_a_request() -> None:
    [(status, _)] = exchange(b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\n" + GET)
    assert status == 501


INVALID = {
    b"GET /\r\n": 400,  # HTTP/0.9
    b"GET /\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\n\r\n": 400,  # no Host
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n": 400,
    b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: user@a\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: \xe4\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n": 400,
    b"GET / HTTP/1.1\nHost: a\n\n": 400,  # bare LF
    b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n": 400,  # bare CR
    b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x01b\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n": 400,  # obs-fold
    b"GET / HTTP/1.1\r\n X: a\r\nHost: a\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\nX : a\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\n: a\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n": 400,
    b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b"GET a HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b"GET * HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b"GET http:// HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b"GET http://a:99999/ HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b"GET / HTTP/1.2\r\nHost: a\r\n\r\n": 400,
    b"GET / http/1.1\r\nHost: a\r\n\r\n": 400,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": 400,  # TLS
    b"\x00": 400,
    b"GET / HTTP/2.0\r\nHost: a\r\n\r\n": 505,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04": 505,
    b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n": 501,
    b"get / HTTP/1.1\r\nHost: a\r\n\r\n": 501,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n" + CHUNKED + b"\r\n0\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\n" + CHUNKED + b"Content-Length: 3\r\n\r\n0\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\na": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n": 400,
    b"POST / HTTP/1.0\r\nHost: a\r\n" + CHUNKED + b"\r\n0\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n": 501,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n": 501,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\n" + CHUNKED + b"\r\n3\r\nabcd\r\n0\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\n" + CHUNKED + b"\r\n3\nabc\r\n0\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\n" + CHUNKED + b"\r\nx\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\n" + CHUNKED + b"\r\nfffffffffffffffff\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\n" + CHUNKED + b"\r\n0\r\nX : 1\r\n\r\n": 400,
}


@pytest.mark.parametrize(("request_", "status"), INVALID.items(), ids=range(len(INVALID)))
def test_what_is_no_request_is_refused_once_whatever_the_packets(request_: bytes, status: int) -> None:
    for pieces in ([request_ + GET], [request_, GET], cut(request_ + GET, range(1000))):
        assert [found for found, _ in exchange(*pieces)] == [status], pieces
    # Answers that are due come first. In one packet with another request, bytes that are no method look like one.
    [first, *others] = [found for found, _ in exchange(GET + request_ + GET)]
    assert first == 200
    assert others in ([status], [501 if not request_[:1].isalpha() else status])
    assert [found for found, _ in exchange(GET, GET, request_, GET)] == [200, 200, status]


def test_empty_lines_before_a_request_are_ignored() -> None:
    for pieces in ([b"\r\n", GET], [b"\r\n\r\n" + GET], [b"\r", b"\n", GET]):
        assert [status for status, _ in exchange(*pieces, *pieces)] == [200, 200]


def test_a_request_line_without_version_is_refused_at_its_end() -> None:
    async def run() -> None:
        wire = Wire()
        await wire.send(b"GET /", b"\r", b"\n")
        assert "no version" in wire.answers[0].problem

    asyncio.run(run())


def test_http_1_0_needs_no_host_and_ends_with_its_answer() -> None:
    [(status, seen)] = exchange(b"GET /a HTTP/1.0\r\n\r\n" + GET)
    assert (status, seen["path"]) == (200, "/a")


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"http://host.example/predict?a=%20b", "/predict", "a=%20b"),
        (b"HTTP://host.example:8000/", "/", ""),
        (b"http://host.example", "/", ""),
        (b"http://[::1]:8000/a%2fb", "/a/b", ""),
        (b"/a%20b?c=d?e", "/a b", "c=d?e"),
        (b"//a//b", "//a//b", ""),
        (b"/a?b#c", "/a", "b"),
        (b"/?", "/", ""),
    ],
)
def test_targets_are_read_as_rfc_9112_says(target: bytes, path: str, query: str) -> None:
    [(status, seen)] = exchange(b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (status, seen["path"], seen["query"]) == (200, path, query)


def test_options_of_the_server_needs_no_path() -> None:
    async def run() -> None:
        wire = Wire()
        await wire.send(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n" + GET)
        first, second = wire.answers
        assert (first.status, first.headers["allow"], first.body) == (204, "GET, HEAD, OPTIONS, POST", b"")
        assert second.status == 200

    asyncio.run(run())


@pytest.mark.parametrize("host", [b"", b"a", b"a.example:80", b"[::1]:8000", b"192.0.2.1", b"a_b", b"a:"])
def test_hosts_that_are_valid_are_accepted(host: bytes) -> None:
    assert exchange(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")[0][0] == 200


def test_a_refusal_of_head_has_no_body() -> None:
    async def run() -> None:
        wire = Wire()
        await wire.send(b"HEAD / HTTP/1.1\r\n\r\n")
        assert wire.transport.written.startswith(b"HTTP/1.1 400 Bad Request\r\ndate: ")
        assert wire.transport.written.endswith(b"\r\n\r\n")
        assert wire.is_over

    asyncio.run(run())


def test_trailers_are_not_headers() -> None:
    body = b"3\r\nabc\r\n0\r\nHost: evil\r\nX-Api-Key: stolen\r\n\r\n"
    [(status, seen), _] = exchange(b"POST / HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n" + body + GET)
    assert (status, seen["body"]) == (200, "abc")
    assert seen["headers"] == [["host", "a"], ["transfer-encoding", "chunked"]]


def head_of(size: int) -> bytes:
    """Return a head of exactly `size` bytes."""
    start = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
    return start + b"a" * (size - len(start) - 4) + b"\r\n\r\n"


@given(places=st.lists(st.integers(0, 3000), max_size=5))
def test_the_limit_of_a_head_is_exact_whatever_the_packets(places: list[int]) -> None:
    limits = ConnectionLimits(head_bytes=2000)
    assert exchange(*cut(head_of(2000), places), limits=limits)[0][0] == 200
    assert exchange(*cut(head_of(2001), places), limits=limits)[0][0] == 431


@pytest.mark.parametrize("start", [b"", b"GET ", b"GET /", b"GET / HTTP/1.1\r\nX", b"GET / HTTP/1.1\r\nX: ", b"\r\n"])
def test_a_head_is_refused_at_its_limit_and_not_at_its_end(start: bytes) -> None:
    async def run() -> None:
        wire = Wire(ConnectionLimits(head_bytes=10_000))
        filling = b"\r\n" * 500 if start in (b"", b"\r\n") else b"a" * 1000
        await wire.send(start, *[filling] * 9)
        assert wire.answers == []
        await wire.send(filling + filling)
        assert wire.statuses == [431]
        assert "LIPCERT_MAX_HEAD_BYTES" in wire.answers[0].problem
        assert wire.transport.has_written_eof

    asyncio.run(run())


def test_a_body_in_the_packet_of_its_head_is_not_counted_to_the_head() -> None:
    limits = ConnectionLimits(head_bytes=1024)
    request = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 100000\r\n\r\n" + b"b" * 100_000
    [(status, seen), _] = exchange(request + GET, limits=limits)
    assert (status, len(seen["body"])) == (200, 100_000)


def test_headers_and_target_have_limits_of_their_own() -> None:
    limits = ConnectionLimits(headers=10, target_bytes=100)
    many = b"".join(b"X-%d: 1\r\n" % number for number in range(9))
    assert exchange(b"GET / HTTP/1.1\r\n" + HOST + many + b"\r\n", limits=limits)[0][0] == 200
    assert exchange(b"GET / HTTP/1.1\r\n" + HOST + many + b"X: 1\r\n\r\n", limits=limits)[0][0] == 431
    assert exchange(b"GET /" + b"a" * 99 + b" HTTP/1.1\r\n" + HOST + b"\r\n", limits=limits)[0][0] == 200
    assert exchange(b"GET /" + b"a" * 100 + b" HTTP/1.1\r\n" + HOST + b"\r\n", limits=limits)[0][0] == 414


ENDLESS = {
    "one trailer": (b"0\r\nX: ", b"a" * 500),
    "trailers": (b"0\r\n", b"X: a\r\n" * 80),
    "one extension": (b"3;", b"a" * 500),
    "chunks with extensions": (b"", (b"1;" + b"a" * 240 + b"\r\nb\r\n") * 2),
    "size with zeros": (b"", b"0" * 500),
    "chunks of a byte": (b"", b"1\r\nb\r\n" * 80),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_the_framing_of_a_body_is_bounded(kind: str) -> None:
    start, filling = ENDLESS[kind]

    async def run() -> None:
        wire = Wire(ConnectionLimits(head_bytes=4096))
        await wire.send(b"POST / HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n" + start)
        for _ in range(30):
            await wire.send(filling)
        assert wire.statuses in ([431], [400])
        assert wire.answers[0].problem
        assert wire.is_over

    asyncio.run(run())


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_chunks_of_any_usual_size_are_a_body(size: int) -> None:
    count = 30_000 // size if size > 1 else 5_000
    body = b"".join(b"%x\r\n%s\r\n" % (size, b"b" * size) for _ in range(count)) + b"0\r\n\r\n"
    pieces = cut(b"POST / HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n" + body, range(0, len(body), 5000))
    [(status, seen)] = exchange(*pieces)
    assert (status, len(seen["body"])) == (200, size * count)


def test_pipelined_requests_are_answered_in_order_and_bounded() -> None:
    limits = ConnectionLimits(pipelined=4)
    requests = [b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(50)]

    async def run() -> None:
        wire = Wire(limits)
        await wire.send(b"".join(requests))
        answers = wire.answers
        assert [answer.json["path"] for answer in answers] == ["/0", "/1", "/2", "/3", "/4"]
        assert [answer.headers.get("connection") for answer in answers] == [None, None, None, None, "close"]
        assert wire.is_over
        # One after the other there is no limit.
        patient = Wire(limits)
        await patient.send(*requests)
        assert [answer.json["path"] for answer in patient.answers] == [f"/{number}" for number in range(50)]
        assert not patient.is_over

    asyncio.run(run())


MESSAGES = [
    GET,
    b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nabcde",
    b"POST /b HTTP/1.1\r\nHost: a\r\n" + CHUNKED + b"\r\n3;x=y\r\nabc\r\n0\r\nT: u\r\n\r\n",
    b"POST /c HTTP/1.1\r\nHost: a\r\n" + UPGRADES[0] + b"Content-Length: 3\r\n\r\nabc",
    b"GET /d HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"HEAD /e HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
]


@settings(max_examples=often(75, 300))
@given(
    messages=st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=3),
    changes=st.lists(
        st.tuples(st.integers(0, 500), st.sampled_from([*b"\r\n\x00 :,;aZ0/\xff"]), st.booleans()), max_size=3
    ),
    places=st.lists(st.integers(0, 600), max_size=5),
)
def test_damaged_requests_get_the_same_statuses_whatever_the_packets(
    messages: list[bytes], changes: list[tuple[int, int, bool]], places: list[int]
) -> None:
    data = bytearray(b"".join(messages))
    for place, byte, replaces in changes:
        at = place % len(data)
        data[at : at + replaces] = bytes([byte])

    async def statuses(*pieces: bytes) -> list[int]:
        wire = Wire()
        await wire.send(*pieces)
        await wire.eof()
        assert wire.is_over
        assert b" 500 " not in wire.transport.written
        # The first of a packet decides whether a method is unknown (501) or the request is not valid (400).
        found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", wire.transport.written)]
        return [400 if status == 501 else status for status in found]

    async def run() -> None:
        assert await statuses(bytes(data)) == await statuses(*cut(bytes(data), places))

    asyncio.run(run())
