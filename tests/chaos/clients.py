"""Clients that send mixed requests: over new and kept connections, whole, slowly, or cut off in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import time
from collections.abc import Sequence

from exchanges import Answer, Exchange, read_answer
from judging import Judge

PATIENCE_S = 60.0
"""Longest wait for an answer: twice the deadline of the server."""
_KEPT = 0.98
"""Probability that a client keeps its connection after an answer."""
_CUTS = ("head", "body", "unread", "reset")


class Clients:
    """Any number of clients of one server, until `end`."""

    def __init__(self, port: int, exchanges: Sequence[Exchange], judge: Judge, seed: int, usual: int) -> None:
        self.usual = usual
        """Clients that are there all the time."""
        self._port = port
        self._exchanges = exchanges
        self._weights = [exchange.weight for exchange in exchanges]
        self._judge = judge
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ends = False
        self.is_stopping = False
        """Whether the server was told to stop: it need not take connections any more."""

    def start(self, count: int, pause_s: float = 0.0) -> list[asyncio.Task[None]]:
        """Start clients that pause after each answer; return their tasks. One that is cancelled cuts its connection."""
        tasks = [asyncio.create_task(self._run(pause_s)) for _ in range(count)]
        self._tasks.update(tasks)
        return tasks

    async def end(self) -> None:
        """Let each client finish its request, and wait for all of them; raise `TimeoutError` if one does not."""
        self._ends = True
        async with asyncio.timeout(2 * PATIENCE_S):
            await asyncio.gather(*self._tasks)

    async def _run(self, pause_s: float) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self._go_on(pause_s)

    async def _go_on(self, pause_s: float) -> None:
        while not self._ends:
            # Before: the server may have accepted the connection long before this client hears of it.
            opened_s = time.monotonic()
            try:
                reader, writer = await asyncio.wait_for(
                    asyncio.open_connection("127.0.0.1", self._port), 5.0 if self.is_stopping else PATIENCE_S
                )
            except (OSError, TimeoutError) as error:
                if self.is_stopping:
                    return
                self._judge.counts["lost"] += 1
                self._judge.samples.append(f"no connection: {error!r}")
                continue
            try:
                await self._use(reader, writer, opened_s, pause_s)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _use(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, opened_s: float, pause_s: float
    ) -> None:
        port = writer.get_extra_info("sockname")[1]
        while not self._ends:
            (exchange,) = self._random.choices(self._exchanges, self._weights)
            way = self._random.random()
            if way < 0.01:
                self._judge.counts["cut off by the client"] += 1
                await self._cut(exchange, reader, writer)
                return
            start_s = time.monotonic()
            self._judge.counts["sent"] += 1
            try:
                async with asyncio.timeout(PATIENCE_S):
                    # The server may have answered and closed before it has read everything.
                    with contextlib.suppress(ConnectionError):
                        await self._send(exchange, writer, is_slow=way < 0.02)
                    answer = await read_answer(reader, exchange.is_head)
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                self._judge.lost(exchange, port, opened_s, f"{error!r} after {time.monotonic() - start_s:.2f} s")
                return
            self._judge.answered(exchange, answer, start_s, time.monotonic())
            # As a client does that was refused.
            await asyncio.sleep(0.05 if answer.status in (429, 503) else pause_s)
            if answer.closes or self._random.random() > _KEPT:
                return

    async def _send(self, exchange: Exchange, writer: asyncio.StreamWriter, is_slow: bool) -> None:
        if not is_slow:
            writer.write(exchange.head + exchange.body)
            await writer.drain()
            return
        whole = exchange.head + exchange.body
        step = max(1, len(whole) // 5)
        for start in range(0, len(whole), step):
            writer.write(whole[start : start + step])
            await writer.drain()
            await asyncio.sleep(self._random.random() * 0.2)

    async def _cut(self, exchange: Exchange, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Leave in the middle of the head, the body or the answer, or reset the connection."""
        way = self._random.choice(_CUTS)
        whole = exchange.head + exchange.body
        sent = {"head": len(exchange.head) // 2, "body": len(exchange.head) + len(exchange.body) // 2}
        writer.write(whole[: sent.get(way, len(whole))])
        if way == "reset":
            off = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, off)
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            await writer.drain()
            if way == "unread":
                await asyncio.wait_for(reader.readexactly(40), PATIENCE_S)


async def ask(port: int, exchange: Exchange) -> Answer:
    """Return the answer to one request on a new connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(exchange.head + exchange.body)
        return await asyncio.wait_for(read_answer(reader, exchange.is_head), PATIENCE_S)
    finally:
        writer.close()


async def stall(port: int, exchange: Exchange) -> str:
    """Send half a body and nothing more; return the kind of the answer, or how the connection ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(exchange.head + exchange.body[: len(exchange.body) // 2])
        return (await asyncio.wait_for(read_answer(reader, is_head=False), PATIENCE_S)).kind
    except (OSError, EOFError, TimeoutError) as error:
        return type(error).__name__
    finally:
        writer.close()
