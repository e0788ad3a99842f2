"""The end of a listening socket loses no connection that the system has accepted."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from service.processes.prefork import bind, listen
from service.processes.stopping import has_waiting, keep_out, refuse_waiting


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with bind("127.0.0.1", 0) as listener:
        listen(listener, 1, 50)
        yield listener


def connect(listener: socket.socket, timeout_s: float = 30.0) -> socket.socket:
    return socket.create_connection(listener.getsockname(), timeout_s)


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
def test_new_connections_are_kept_out_and_those_in_the_backlog_stay(listener: socket.socket) -> None:
    with connect(listener) as early:
        keep_out(listener)
        early.sendall(b"sent before")
        with pytest.raises(TimeoutError):
            connect(listener, 0.3)
        early.sendall(b" and after")
        assert has_waiting([listener])
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(30)
            assert accepted.recv(21, socket.MSG_WAITALL) == b"sent before and after"
            accepted.sendall(b"answer")
        assert early.recv(100) == b"answer"
    assert not has_waiting([listener])


def test_what_is_left_in_the_backlog_reads_a_503_whether_it_has_sent_a_request_or_not(listener: socket.socket) -> None:
    request = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000)
    clients = [connect(listener) for _ in range(3)]
    answers: list[bytes] = []

    def ask(client: socket.socket, content: bytes) -> None:
        with client:
            client.sendall(content)
            answers.append(b"".join(iter(lambda: client.recv(65536), b"")))

    threads = [
        threading.Thread(target=ask, args=(client, content))
        for client, content in zip(clients, (request, request[:20], b""), strict=True)
    ]
    for thread in threads:
        thread.start()
    refuse_waiting([listener])
    for thread in threads:
        thread.join()
    assert len(answers) == 3
    for answer in answers:
        head, body = answer.split(b"\r\n\r\n", 1)
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"connection: close" in head
        assert b"retry-after" in head
        assert f"content-length: {len(body)}".encode() in head
        assert b"this server is stopping" in body


def test_without_anything_in_the_backlog_nothing_is_waited_for(
    listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_waiting([listener])
    assert listener.fileno() == -1
    assert caplog.text == ""
