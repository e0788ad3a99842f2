"""Slow and silent clients of eight kinds, and the latency of a normal client beside them.

`python tests/service/connection/slow_clients.py HOST PORT IMAGE [CLIENTS_OF_EACH_KIND] [SECONDS]` prints the latency of
a normal client of `POST /predict` alone, beside the clients of each kind, and beside all. A client that the server
refuses or closes comes back.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

PAUSE_S = 3.0
"""Between two drips: below the deadlines between bytes."""
Kind = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]

_HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
LARGE = b"GET /static/swagger-ui/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


async def _drip(writer: asyncio.StreamWriter, start: bytes, drip: bytes) -> None:
    writer.write(start)
    while True:
        await writer.drain()
        await asyncio.sleep(PAUSE_S)
        writer.write(drip)


async def slow_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send a head byte by byte."""
    del reader
    await _drip(writer, b"GET / HTTP/1.1\r\nX: ", b"a")


async def slow_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send a body byte by byte."""
    del reader
    await _drip(writer, _HEAD + b"Content-Length: 100000\r\n\r\n", b"a")


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send nothing."""
    del writer
    await reader.read()


async def unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ask for large answers and read none."""
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await _drip(writer, LARGE, LARGE)


async def idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Keep a connection after one answer."""
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.read()


async def half_open(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close the sending side in the middle of nothing."""
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
    await asyncio.sleep(PAUSE_S)
    writer.write_eof()
    await reader.read()


async def trickled_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send chunks of one byte."""
    del reader
    await _drip(writer, _CHUNKED, b"1\r\na\r\n")


async def endless_trailers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send trailers."""
    del reader
    await _drip(writer, _CHUNKED + b"1\r\na\r\n0\r\n", b"X: a\r\n")


KINDS: tuple[Kind, ...] = (
    slow_headers,
    slow_body,
    silent,
    unread,
    idle,
    half_open,
    trickled_chunks,
    endless_trailers,
)


async def slow_client(kind: Kind, host: str, port: int, ends: Counter[str]) -> None:
    """Connect again whenever the server ends the connection."""
    while True:
        writer = None
        try:
            reader, writer = await asyncio.open_connection(host, port)
            await kind(reader, writer)
        except OSError:
            await asyncio.sleep(0.2)
        finally:
            ends[kind.__name__] += 1
            if writer is not None:
                writer.transport.abort()


def normal_client(host: str, port: int, image: bytes, seconds: float) -> tuple[list[float], Counter[str]]:
    """Return latencies in ms, and how many answers had each status; a new connection every tenth request."""
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    client = http.client.HTTPConnection(host, port, timeout=60)
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        start_s = time.perf_counter()
        try:
            client.request("POST", "/predict", image, {"Content-Type": "image/png"})
            answer = client.getresponse()
            answer.read()
            statuses[str(answer.status)] += 1
        except (OSError, http.client.HTTPException) as error:
            statuses[type(error).__name__] += 1
            client.close()
        latencies.append((time.perf_counter() - start_s) * 1000)
        if len(latencies) % 10 == 0:
            client.close()
        time.sleep(0.005)
    return sorted(latencies), statuses


async def beside(kinds: Sequence[Kind], host: str, port: int, image: str, each: int, seconds: float) -> dict[str, Any]:
    """Return latencies of a normal client, a process of its own, beside `each` clients of every kind.

    Args:
        kinds: of slow clients.
        host: of the server.
        port: of the server.
        image: path of a PNG.
        each: number of clients of a kind.
        seconds: of the normal client, after as many of the others alone.
    """
    ends: Counter[str] = Counter()
    tasks = []
    for number in range(each):
        tasks += [asyncio.create_task(slow_client(kind, host, port, ends)) for kind in kinds]
        if number % 10 == 9:
            await asyncio.sleep(0.05)
    await asyncio.sleep(seconds)
    arguments = [__file__, host, str(port), image, "0", str(seconds)]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return json.loads(output) | {"ended": dict(ends)}


def _figures(latencies: list[float], statuses: Counter[str]) -> dict[str, Any]:
    return {
        "requests": len(latencies),
        "p50_ms": round(latencies[len(latencies) // 2], 2),
        "p99_ms": round(latencies[int(len(latencies) * 0.99)], 2),
        "most_ms": round(latencies[-1], 2),
        "statuses": dict(statuses),
    }


def main(host: str, port: str, image: str, each: str = "500", seconds: str = "10") -> None:
    """Print the figures; with 0 clients of each kind, those of a normal client alone."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if each == "0":
        content = Path(image).read_bytes()
        normal_client(host, int(port), content, 0.5)
        figures = _figures(*normal_client(host, int(port), content, float(seconds)))
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    for kinds in ((), *((kind,) for kind in KINDS), KINDS):
        figures = asyncio.run(beside(kinds, host, int(port), image, int(each), float(seconds)))
        name = "all kinds" if len(kinds) > 1 else kinds[0].__name__ if kinds else "alone"
        sys.stdout.write(f"{name:17} {json.dumps(figures)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
