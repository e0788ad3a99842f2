"""Connections over real sockets: answers that can be read, clients that are slow, gone or too many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from live_server import PATIENCE_S, LiveServer, echo, parse_answers, read_all, read_answer, respond
from process_table import wait_until
from slow_clients import KINDS, slow_client

from service.api.app import create_app
from service.connection.limits import ConnectionLimits
from service.inference.classifier import Classifier
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
GET = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
SHORT = ConnectionLimits(head_s=1, body_s=1, idle_s=1, write_s=1)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer() as running:
        yield running


async def early(scope: Any, receive: Any, send: Any) -> None:
    """Answer without reading the body."""
    del scope, receive
    await respond(send, b"{}", status=413)


def send_in_background(client: socket.socket, piece: bytes, count: int) -> threading.Thread:
    """Send `piece` so often, or until the server ends the connection."""

    def send() -> None:
        with contextlib.suppress(OSError):
            for _ in range(count):
                client.sendall(piece)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


STARTS = {
    "invalid": (b"POST / HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 99999999\r\n\r\n", 400),
    "a head without end": (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", 431),
    "many headers": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 200 + b"Content-Length: 99999999\r\n\r\n", 431),
    "no HTTP": (b"\x16\x03\x01", 400),
    "early answer": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n", 413),
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_client_that_is_still_sending_can_read_its_refusal(kind: str) -> None:
    start, status = STARTS[kind]
    with LiveServer(early) as server, server.connect() as client:
        client.sendall(start)
        # 16 MB, more than the buffers hold.
        sending = send_in_background(client, b"a" * 65536, 256)
        time.sleep(0.3)
        [answer] = parse_answers(read_all(client))
        assert answer.status == status
        assert answer.headers["connection"] == "close"
        client.close()
        sending.join(PATIENCE_S)
        assert not sending.is_alive()


def test_a_head_of_200_mb_is_refused_at_the_limit(server: LiveServer) -> None:
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 33_000)
        start_s = time.monotonic()
        sending = send_in_background(client, b"a" * 65536, 3200)
        answer = read_answer(client)
        # 50 ms on a machine that does nothing else.
        assert time.monotonic() - start_s < 5
        assert answer.status == 431
        client.close()
        sending.join(PATIENCE_S)


def test_a_client_that_sends_200_mb_of_headers_before_it_reads_is_told(server: LiveServer) -> None:
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")
        for _ in range(200):
            client.sendall(b"a" * 1_000_000)
        [answer] = parse_answers(read_all(client))
    assert "LIPCERT_MAX_HEAD_BYTES" in answer.problem


def test_a_client_that_has_closed_its_side_is_answered(server: LiveServer) -> None:
    [answer] = server.exchange(GET)
    assert answer.json["path"] == "/a"
    answers = server.exchange(GET * 5)
    assert [answer.status for answer in answers] == [200] * 5


def test_packets_do_not_matter(server: LiveServer) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    body = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    request = b"POST /a HTTP/1.1\r\nHost: a\r\n" + upgrade + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for pieces in ([request], [request[: -len(body)], body], [bytes([byte]) for byte in request]):
        [answer] = server.exchange(*pieces, pause=lambda: time.sleep(0.001))
        assert (answer.status, answer.json["path"], answer.json["body"]) == (200, "/a", body.decode())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 408),
        (b"GET / HTTP/1.1\r\n", 408),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab", 408),
        (GET, 200),
    ],
)
def test_silent_clients_are_let_go(sent: bytes, status: int) -> None:
    with LiveServer(limits=SHORT) as server, server.connect() as client:
        client.sendall(sent)
        [answer] = parse_answers(read_all(client))
        assert answer.status == status
        client.close()
        wait_until(lambda: server.open_connections == 0)


def test_a_client_that_does_not_read_is_cut_off_and_holds_one_answer_at_most() -> None:
    content = bytes(8 * 1024 * 1024)
    started: list[str] = []

    async def large(scope: Any, receive: Any, send: Any) -> None:
        del receive
        started.append(scope["path"])
        await respond(send, content)

    with LiveServer(large, SHORT) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(GET * 10)
        # The limit is a second, and more for 8 MB at 16 KiB a second. The second answer waits to be written.
        time.sleep(2)
        assert len(started) <= 2
        assert server.open_connections == 1
    slow = ConnectionLimits(write_s=1)
    with LiveServer(echo, slow) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        sending = send_in_background(client, b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 100_000)
        wait_until(lambda: server.open_connections == 0)
        sending.join(PATIENCE_S)
        assert not sending.is_alive()


def test_a_client_that_resets_reaches_the_application() -> None:
    events: list[str] = []

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        del scope, send
        events.append((await receive())["type"])
        events.append((await receive())["type"])

    with LiveServer(waiting) as server:
        client = server.connect()
        client.sendall(GET)
        wait_until(lambda: events == ["http.request"])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        wait_until(lambda: events == ["http.request", "http.disconnect"])


def test_a_server_that_stops_answers_requests_on_open_connections() -> None:
    with LiveServer() as server:
        clients = [server.connect() for _ in range(20)]
        for client in clients:
            client.sendall(GET)
            assert read_answer(client).status == 200
        server.stop()
        time.sleep(0.2)
        for client in clients:
            client.sendall(GET)
        for client in clients:
            [answer] = parse_answers(read_all(client))
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            client.close()


_FEW_FILES = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.path.insert(0, "tests")
from live_server import LiveServer
from service.connection.limits import ConnectionLimits
with LiveServer(limits=ConnectionLimits(connections=int(sys.argv[1]))) as server:
    print(server.port, flush=True)
    sys.stdin.readline()
    print(time.process_time(), flush=True)
"""


@pytest.mark.parametrize("connections", [30, 1000])
def test_a_server_out_of_open_files_neither_dies_nor_spins(connections: int) -> None:
    """With 30 connections the limit of connections comes first, with 1000 that of the files."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 400, "the test itself needs open files"
    process = subprocess.Popen(
        [sys.executable, "-c", _FEW_FILES, str(connections)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process, contextlib.ExitStack() as stack:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        for _ in range(200):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S))
        time.sleep(1)
        if connections == 1000:
            stack.close()

        def is_answered() -> bool:
            with contextlib.suppress(OSError, AssertionError), socket.create_connection(("127.0.0.1", port)) as client:
                client.settimeout(PATIENCE_S)
                client.sendall(GET)
                return read_answer(client).status == 200
            return False

        wait_until(is_answered)
        process.stdin.write("\n")
        process.stdin.flush()
        # Of some seconds, most of them imports.
        assert float(process.stdout.readline()) < 4
    assert process.returncode == 0


def test_a_normal_client_is_answered_beside_slow_ones() -> None:
    image = b"a" * 500
    request = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n" + image

    async def run(server: LiveServer) -> list[int]:
        ends: Counter[str] = Counter()
        tasks = [
            asyncio.create_task(slow_client(kind, "127.0.0.1", server.port, ends)) for kind in KINDS for _ in range(20)
        ]
        await asyncio.sleep(2)
        statuses = []
        for _ in range(100):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
            statuses.append(int(head[9:12]))
            writer.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return statuses

    # 160 slow clients, and no more places than that.
    with LiveServer(limits=ConnectionLimits(connections=100, head_s=1, idle_s=2)) as server:
        assert asyncio.run(run(server)) == [200] * 100


@pytest.fixture(scope="module")
def service(classifiers: Mapping[str, Classifier]) -> Iterator[LiveServer]:
    """The application itself."""
    with LiveServer(create_app(Settings(default_model="grey"), classifiers)) as running:
        yield running


def test_a_prediction_with_upgrade_is_the_prediction_without(service: LiveServer) -> None:
    infer = json.dumps(
        {"inputs": [{"name": "image", "shape": [1, 1, 4, 5], "datatype": "FP64", "data": [0] * 20}]}
    ).encode()
    start = b"POST /v2/models/grey/infer HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    framing = b"Content-Length: %d\r\n\r\n" % len(infer)
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    plain = service.ask(start + framing + infer)
    assert plain.status == 200
    assert service.ask(start + upgrade + framing + infer).body == plain.body


def test_head_and_options_of_the_service(service: LiveServer) -> None:
    [got] = service.exchange(b"GET /health/ready HTTP/1.1\r\nHost: a\r\n\r\n")
    with service.connect() as client:
        client.sendall(b"HEAD /health/ready HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        head = read_all(client)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.endswith(b"\r\n\r\n")
    assert b"\r\ncontent-length: %d\r\n" % len(got.body) in head
    options, star = service.exchange(
        b"OPTIONS /predict HTTP/1.1\r\nHost: a\r\n\r\nOPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    assert (options.status, options.headers["allow"]) == (204, "POST, OPTIONS")
    assert (star.status, star.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")


def test_settings_reach_the_connections(zoo: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LIPCERT_")}
    environment |= {
        "LIPCERT_PORT": "0",
        "LIPCERT_PROVIDER": "cpu",
        "LIPCERT_MODELS": str(zoo),
        "LIPCERT_DEFAULT_MODEL": "grey",
        "LIPCERT_HEAD_S": "1.5",
        "LIPCERT_MAX_HEAD_BYTES": "1024",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "service"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        started = next(line for line in process.stderr if "serving on" in line)
        (port,) = map(int, re.findall(r":(\d+)/docs", started))
        try:
            with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
                [slow] = parse_answers(read_all(client))
            with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
                client.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 2000)
                large = read_answer(client)
        finally:
            process.terminate()
            process.communicate()
    assert (slow.status, large.status) == (408, 431)
    assert "within 1.5 s" in slow.problem
    assert "1024 bytes" in large.problem
