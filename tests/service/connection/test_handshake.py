"""TLS: requests arrive whole whatever the packets, and handshakes that nobody ends take no place for long."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import certificates
import pytest
from garbage import count, uncollected
from live_server import PATIENCE_S, LiveServer, parse_answers, read_all
from process_table import wait_until

from service.access.certificate import Certificate
from service.connection.handshake import Handshake
from service.connection.limits import ConnectionLimits
from service.connection.protocol import Connection

CLIENT = ssl.create_default_context(cadata=certificates.FIRST)
GET = b"GET /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
LOOPS: tuple[Literal["asyncio", "uvloop"], ...] = ("asyncio", "uvloop")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    folder: Path = tmp_path_factory.mktemp("tls")
    (folder / "certificate").write_text(certificates.FIRST)
    (folder / "key").write_text(certificates.FIRST_KEY)
    return Certificate(folder / "certificate", folder / "key").context()


@pytest.fixture(scope="module", params=LOOPS)
def server(tls: ssl.SSLContext, request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    with LiveServer(tls=tls, loop=request.param) as running:
        yield running


def exchange(server: LiveServer, sent: bytes, packet: int) -> bytes:
    """Send bytes with the end of the handshake, in packets of a size; return what comes until the end."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = CLIENT.wrap_bio(to_client, to_server, server_hostname="localhost")
    received = b""
    with server.connect() as wire:

        def flush() -> None:
            data = to_server.read()
            for at in range(0, len(data), packet):
                wire.sendall(data[at : at + packet])

        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                flush()
                to_client.write(wire.recv(65536))
        # In one packet with the last message of the handshake, if packets are large.
        client.write(sent)
        flush()
        while True:
            try:
                piece = client.read(65536)
                if not piece:
                    return received
                received += piece
            except ssl.SSLWantReadError:
                data = wire.recv(65536)
                if not data:
                    return received
                to_client.write(data)


@pytest.mark.parametrize("packet", [1, 7, 100, 1_000_000])
def test_a_request_that_comes_with_the_handshake_is_answered(server: LiveServer, packet: int) -> None:
    body = bytes(range(256)) * (1 if packet < 100 else 1000)
    post = b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for _ in range(5):
        first, second = parse_answers(exchange(server, post + GET, packet))
        assert first.json["body"].encode("latin-1") == body
        assert second.json["path"] == "/a"
    wait_until(lambda: server.open_connections == 0)


@pytest.mark.parametrize("loop", LOOPS)
def test_clients_without_a_handshake_give_way_and_have_a_deadline(
    tls: ssl.SSLContext, loop: Literal["asyncio", "uvloop"]
) -> None:
    limits = ConnectionLimits(connections=20, head_s=3.0)
    with LiveServer(limits=limits, tls=tls, loop=loop) as server:
        silent: list[socket.socket] = []
        for number in range(60):
            silent.append(server.connect())
            if number % 2:
                silent[-1].sendall(b"\x16\x03\x01")
        # Longer than a tick: a client that has just come gives no way.
        time.sleep(1.5)
        assert b'"path": "/a"' in exchange(server, GET, 100)
        # Some gave way, none stays.
        wait_until(lambda: server.open_connections == 0)
        for client in silent:
            client.settimeout(PATIENCE_S)
            with client:
                assert ended(client)


def ended(client: socket.socket) -> bool:
    try:
        # At most an alert of TLS.
        return len(read_all(client)) < 100
    except ConnectionError:
        return True


def test_what_is_no_tls_and_clients_that_leave_free_their_places(server: LiveServer) -> None:
    for sent in (GET, b"", b"\x16\x03\x01\x02\x00\x01", b"\x00" * 100):
        with server.connect() as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert ended(client)
    wait_until(lambda: server.open_connections == 0)


def test_connections_leave_no_garbage(server: LiveServer) -> None:
    untrusting = ssl.create_default_context()
    reset = struct.pack("ii", 1, 0)
    with uncollected():
        before = count(Handshake, Connection, ssl.SSLObject)
        for _ in range(3):
            # No TLS, a client that leaves, one that refuses the certificate, and an answer.
            for sent in (GET, b"", b"\x16\x03\x01"):
                with server.connect() as client:
                    client.sendall(sent)
                    client.shutdown(socket.SHUT_WR)
                    assert ended(client)
            with server.connect() as wire, pytest.raises(ssl.SSLCertVerificationError):
                untrusting.wrap_socket(wire, server_hostname="localhost")
            assert b'"path": "/a"' in exchange(server, GET, 100)
            # A connection that is reset in the middle of a request.
            with CLIENT.wrap_socket(server.connect(), server_hostname="localhost") as client:
                client.sendall(b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1")
                wait_until(lambda: server.open_connections == 1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        wait_until(lambda: server.open_connections == 0)
        wait_until(lambda: count(Handshake, Connection, ssl.SSLObject) <= before)
