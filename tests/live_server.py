"""A uvicorn server in a thread, with the connections of the service around any application, and raw clients of it."""

from __future__ import annotations

import functools
import json
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import uvicorn

from service.connection.handshake import Handshake
from service.connection.limits import ConnectionLimits
from service.connection.protocol import Refuse, connection_class, never

PATIENCE_S = 30.0
"""Longest wait of a client: far more than a busy machine needs."""


async def echo(scope: Any, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    """Answer with what arrived, as JSON."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        if not message["more_body"]:
            break
    seen = {
        "method": scope["method"],
        "path": scope["path"],
        "query": scope["query_string"].decode("latin-1"),
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
        "body": body.decode("latin-1"),
    }
    await respond(send, json.dumps(seen).encode())


async def respond(send: Callable[..., Any], content: bytes, status: int = 200) -> None:
    """Send a complete response."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})


@dataclass
class Answer:
    """A response, parsed."""

    status: int
    headers: dict[str, str]
    body: bytes
    raw: bytes = field(repr=False)

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def problem(self) -> str:
        """The detail of a problem document that is what RFC 9457 and HTTP ask for."""
        assert self.headers["content-type"] == "application/problem+json"
        assert self.headers["connection"] == "close"
        assert {"date", "content-length"} <= set(self.headers)
        members = self.json
        assert members["status"] == self.status
        assert len(self.raw) < 1024
        return members["detail"]


def parse_answers(data: bytes) -> list[Answer]:
    """Return the responses in what a connection sent until its end; each has Content-Length or no body."""
    answers = []
    while data:
        head, separator, rest = data.partition(b"\r\n\r\n")
        assert separator, data
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers.get("content-length", 0))
        assert len(rest) >= length, data
        answers.append(Answer(int(first.split()[1]), headers, rest[:length], head + separator + rest[:length]))
        data = rest[length:]
    return answers


class LiveServer:
    """A server on a port of its own; a context manager."""

    def __init__(
        self,
        app: Any = echo,
        limits: ConnectionLimits | None = None,
        refuse: Refuse = never,
        tls: ssl.SSLContext | None = None,
        loop: Literal["auto", "asyncio", "uvloop"] = "auto",
    ) -> None:
        self.connections = connection_class(limits or ConnectionLimits(), refuse)
        served: Any = self.connections if tls is None else functools.partial(Handshake, self.connections, tls)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=served,
                loop=loop,
                ws="none",
                lifespan="off",
                log_config=None,
                proxy_headers=False,
                timeout_graceful_shutdown=PATIENCE_S,  # type: ignore[arg-type]
            )
        )
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})

    def __enter__(self) -> LiveServer:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            threading.Event().wait(0.01)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        """Begin to end."""
        self._server.should_exit = True

    @property
    def open_connections(self) -> int:
        """How many there are."""
        return len(self.connections.registry)

    def connect(self) -> socket.socket:
        """Return a new connection."""
        client = socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def exchange(self, *pieces: bytes, pause: Callable[[], None] = lambda: None) -> list[Answer]:
        """Send the pieces, one packet each where `pause` lets the server read, close that side, and read to the end."""
        with self.connect() as client:
            for piece in pieces:
                client.sendall(piece)
                pause()
            client.shutdown(socket.SHUT_WR)
            return parse_answers(read_all(client))

    def ask(self, request: bytes) -> Answer:
        """Send a request on a new connection and return its answer, without closing that side."""
        with self.connect() as client:
            client.sendall(request)
            return read_answer(client)


def read_all(client: socket.socket) -> bytes:
    """Return what arrives until the server closes; a reset fails."""
    received = b""
    while piece := client.recv(65536):
        received += piece
    return received


def read_answer(client: socket.socket) -> Answer:
    """Return the next response."""
    received = b""
    while True:
        head, separator, rest = received.partition(b"\r\n\r\n")
        if separator:
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            if len(rest) >= length:
                return parse_answers(received)[0]
        piece = client.recv(65536)
        assert piece, f"closed after {received!r}"
        received += piece
