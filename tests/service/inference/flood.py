"""A flood of requests to a running server: latency of accepted ones, useful answers, and the time to a 503.

`python tests/service/inference/flood.py http://127.0.0.1:8000 [--model NAME] [--seconds S] [--clients N ...]` measures

* one client: latency without load;
* 16 and 64 clients that take turns: the capacity is the larger rate;
* each N (160 and 640), of two kinds: clients that retry at once after a 503, and clients that obey `Retry-After`.

A client keeps its connection until the server closes it. The time of an answer includes a new connection.
Run server and clients on different CPUs (`taskset`); the figures are only as quiet as the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop

ROOT = Path(__file__).resolve().parents[3]
_DIGIT = ROOT / "service" / "static" / "samples" / "mnist-7.png"


@dataclass
class Seen:
    """Answers to the clients of one phase."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Time of each answer by status; status 0 is a connection that was lost."""
    elapsed_s: float = 0.0

    def note(self, status: int, seconds: float) -> None:
        """Note one answer."""
        self.seconds.setdefault(status, []).append(seconds)

    def rate(self, status: int) -> float:
        """Return answers per second."""
        return len(self.seconds.get(status, ())) / self.elapsed_s

    def quantile_s(self, status: int, share: float) -> float:
        """Return a quantile of the time of answers; infinite without one."""
        ordered = sorted(self.seconds.get(status, ()))
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")


class Client(asyncio.Protocol):
    """One client, which sends the same request until it is told to stop."""

    def __init__(self, address: tuple[str, int], request: bytes, seen: Seen, obeys: bool, until_s: float) -> None:
        self._address, self._request, self._seen, self._obeys, self._until_s = address, request, seen, obeys, until_s
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._answer = bytearray()
        self._asked_s = 0.0
        self.done: asyncio.Future[None] = self._loop.create_future()

    def connect(self) -> None:
        """Begin a request over a new connection."""
        self._asked_s = time.perf_counter()
        if self._asked_s >= self._until_s:
            self._stop()
        else:
            self._connecting = self._loop.create_task(self._open())

    async def _open(self) -> None:
        try:
            await self._loop.create_connection(lambda: self, *self._address)
        except OSError:
            self._lose()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if not end:
            return
        lines = bytes(head).lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines[1:])
        if len(body) < int(headers[b"content-length"]):
            return
        now_s = time.perf_counter()
        self._seen.note(int(lines[0].split()[1]), now_s - self._asked_s)
        self._answer.clear()
        if headers.get(b"connection") == b"close":
            transport, self._transport = self._transport, None
            transport.close()
            if self._obeys:
                self._loop.call_later(int(headers.get(b"retry-after", 0)), self.connect)
            else:
                self._loop.call_soon(self.connect)
        elif now_s >= self._until_s:
            self._stop()
        else:
            self._asked_s = now_s
            self._transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None and not self.done.done():
            self._transport = None
            self._lose()

    def _lose(self) -> None:
        self._answer.clear()
        self._seen.note(0, time.perf_counter() - self._asked_s)
        self._loop.call_later(0.01, self.connect)

    def _stop(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        if self._transport is not None:
            self._transport.close()


async def flood(
    address: tuple[str, int], request: bytes, clients: int, seconds: float, obeys: bool = False, grace_s: float = 5.0
) -> Seen:
    """Return what `clients` clients see.

    Args:
        address: host and port.
        request: complete bytes of a request.
        clients: each has one request in progress.
        seconds: duration.
        obeys: whether they wait after a 503 as `Retry-After` says.
        grace_s: for the last answers.
    """
    seen = Seen()
    started_s = time.perf_counter()
    crowd = [Client(address, request, seen, obeys, started_s + seconds) for _ in range(clients)]
    for client in crowd:
        client.connect()
    await asyncio.wait([client.done for client in crowd], timeout=seconds + grace_s)
    seen.elapsed_s = seconds
    return seen


def post(content: bytes, media_type: str, target: str = "/predict") -> bytes:
    """Return the bytes of a request."""
    lines = (f"POST {target} HTTP/1.1", "Host: test", f"Content-Type: {media_type}", f"Content-Length: {len(content)}")
    head = "\r\n".join([*lines, "", ""])
    return head.encode() + content


def _line(name: str, seen: Seen) -> str:
    others = {status: len(times) for status, times in seen.seconds.items() if status not in (200, 503)}
    return (
        f"{name:24} 200: {seen.rate(200):6.0f}/s p50 {1e3 * seen.quantile_s(200, 0.5):6.1f} p99 "
        f"{1e3 * seen.quantile_s(200, 0.99):6.1f} ms   503: {seen.rate(503):6.0f}/s p50 "
        f"{1e3 * seen.quantile_s(503, 0.5):5.1f} p99 {1e3 * seen.quantile_s(503, 0.99):5.1f} ms   {others or ''}"
    )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("--model", default="mnist")
    parser.add_argument("--image", type=Path, default=_DIGIT)
    parser.add_argument("--query", default="")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clients", type=int, nargs="*", default=[160, 640])
    options = parser.parse_args()
    url = urlsplit(options.server)
    address = (url.hostname or "127.0.0.1", url.port or 8000)
    request = post(options.image.read_bytes(), "image/png", f"/predict?model={options.model}{options.query}")

    async def measure(clients: int, obeys: bool = False) -> Seen:
        return await flood(address, request, clients, options.seconds, obeys)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        alone = runner.run(measure(1))
        print(_line("1 client", alone))
        capacity = 0.0
        for clients in (16, 64):
            seen = runner.run(measure(clients))
            print(_line(f"{clients} clients", seen))
            capacity = max(capacity, seen.rate(200))
        for clients in options.clients:
            for obeys in (True, False):
                seen = runner.run(measure(clients, obeys))
                print(_line(f"{clients} clients, {'obey' if obeys else 'retry'}", seen))
                ratio = seen.quantile_s(200, 0.99) / alone.quantile_s(200, 0.99)
                print(f"{'':24} {ratio:.1f} x p99 alone, {seen.rate(200) / capacity:.0%} of the capacity")


if __name__ == "__main__":
    main()
