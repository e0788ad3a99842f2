"""A server that answers each connection with the next bytes of a script, whatever it is asked."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

Script = bytes | Callable[[socket.socket], None]


def response(status: str, body: bytes = b"", *headers: str, media_type: str = "application/json") -> bytes:
    """Return a response with its length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {media_type}", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def problem(status: str, kind: str, *headers: str) -> bytes:
    """Return a problem document of the service."""
    members = {"type": f"urn:problem-type:lipcert:{kind}", "title": "T", "status": int(status[:3]), "detail": "D"}
    return response(status, json.dumps(members).encode(), *headers, media_type="application/problem+json")


class ScriptedServer:
    """One thread; a context manager. The last piece of the script is repeated."""

    def __init__(self, *script: Script) -> None:
        self._script: Sequence[Script] = script
        self.requests: list[bytes] = []
        """What arrived on each connection."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        # Closing alone does not wake a thread in `accept`.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.settimeout(30)
                answer = self._script[min(len(self.requests), len(self._script) - 1)]
                self.requests.append(_read(client))
                if callable(answer):
                    answer(client)
                else:
                    client.sendall(answer)


def _read(client: socket.socket) -> bytes:
    """Return a request with its body."""
    received = b""
    while True:
        head, separator, body = received.partition(b"\r\n\r\n")
        lines = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if separator and len(body) >= (int(lines[0][15:]) if lines else 0):
            return received
        piece = client.recv(65536)
        if not piece:
            return received
        received += piece
