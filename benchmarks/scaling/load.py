"""One thread that sends requests over many connections and never sleeps, for a processor of its own.

`open_loop` sends at given times whatever the server does, and counts from those times, so that a stalled server cannot
make the client ask less (G. Tene's "coordinated omission"); `closed_loop` sends the next request with the answer.
Timers of event loops are too coarse for this: they round to milliseconds.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

import numpy as np

_STATUS = b"HTTP/1.1 200 "
_OPEN, _SETTLE_S = 512, 0.5


class _Connections:
    """Non-blocking connections; each has one request in progress at most."""

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self._port, self._requests = port, requests
        self._epoll = select.epoll()
        self._idle: list[socket.socket] = []
        self._busy: dict[int, tuple[socket.socket, float, bytearray]] = {}
        self._sent = 0

    def open(self) -> None:
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._epoll.register(connection, select.EPOLLIN)
        self._idle.append(connection)

    @property
    def busy(self) -> int:
        return len(self._busy)

    def send(self, since: float) -> None:
        """Send the next request, which counts from `since`."""
        if not self._idle:
            self.open()
        connection = self._idle.pop()
        connection.sendall(self._requests[self._sent % len(self._requests)])
        self._sent += 1
        self._busy[connection.fileno()] = connection, since, bytearray()

    def answers(self) -> list[float]:
        """Return since when the requests counted that are answered by now."""
        found: list[float] = []
        for number, _ in self._epoll.poll(0):
            connection, since, answer = self._busy[number]
            answer += connection.recv(1 << 16)
            head, end, body = answer.partition(b"\r\n\r\n")
            if end and len(body) >= int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]):
                assert answer.startswith(_STATUS), bytes(head)
                del self._busy[number]
                self._idle.append(connection)
                found.append(since)
        return found

    def close(self) -> None:
        for connection in [*self._idle, *(one for one, _, _ in self._busy.values())]:
            connection.close()
        self._epoll.close()


def open_loop(port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0) -> np.ndarray:
    """Return the seconds of each request, from the time it was due to its answer.

    Args:
        port: of the server on this machine.
        requests: bytes of complete requests, which take turns.
        rate: requests per second, a Poisson process.
        seconds: duration.
        seed: of the times.
    """
    random = np.random.default_rng(seed)
    due = np.cumsum(random.exponential(1.0 / rate, int(rate * seconds))).tolist()
    connections, taken, number = _Connections(port, requests), [], 0
    # A connection that is opened under load waits for the server, and the client with it.
    for _ in range(_OPEN):
        connections.open()
    time.sleep(_SETTLE_S)
    started = time.perf_counter()
    while number < len(due) or connections.busy:
        now = time.perf_counter() - started
        while number < len(due) and due[number] <= now:
            connections.send(due[number])
            number += 1
        answered = connections.answers()
        if answered:
            now = time.perf_counter() - started
            taken += [now - since for since in answered]
    connections.close()
    return np.array(taken)


def closed_loop(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> np.ndarray:
    """Return the seconds of each request of clients that send the next one with the answer."""
    connections, taken = _Connections(port, requests), []
    started = time.perf_counter()
    for _ in range(clients):
        connections.send(started)
    now = started
    while connections.busy:
        answered = connections.answers()
        if answered:
            now = time.perf_counter()
            taken += [now - since for since in answered]
            if now - started < seconds:
                for _ in answered:
                    connections.send(now)
    connections.close()
    return np.array(taken)
