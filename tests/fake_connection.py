"""A connection of the service on a transport in memory: bytes in, bytes out, and ticks instead of a clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from itertools import pairwise
from typing import Any

import uvicorn
from live_server import Answer, echo, parse_answers, respond
from uvicorn.server import ServerState

from service.connection.limits import ConnectionLimits
from service.connection.protocol import Connection, Refuse, connection_class, never
from service.connection.registry import TICK_S


class FakeTransport(asyncio.Transport):
    """Keeps what is written; a client that reads nothing leaves it in the buffer."""

    def __init__(self, address: str = "192.0.2.1") -> None:
        super().__init__({"peername": (address, 50000), "sockname": ("192.0.2.2", 80)})
        self.written = bytearray()
        self.unread = 0
        self.reads_answers = True
        self.is_paused = False
        self.has_written_eof = False
        self.end: str | None = None
        self.protocol: Connection | None = None

    def write(self, data: Any) -> None:
        assert self.end is None
        assert not self.has_written_eof
        self.written += data
        if not self.reads_answers:
            self.unread += len(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_written_eof = True

    def get_write_buffer_size(self) -> int:
        return self.unread

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def is_closing(self) -> bool:
        return self.end is not None

    def close(self) -> None:
        self._end("closed")

    def abort(self) -> None:
        self._end("aborted")

    def _end(self, how: str) -> None:
        if self.end is None:
            self.end = how
            assert self.protocol is not None
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


class Wire:
    """One connection; to be used inside a running event loop."""

    def __init__(
        self,
        limits: ConnectionLimits | None = None,
        app: Any = echo,
        refuse: Refuse = never,
        connections: type[Connection] | None = None,
        address: str = "192.0.2.1",
        has_clock: bool = False,
    ) -> None:
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, proxy_headers=False)
        config.load()
        state = ServerState()
        state.default_headers = [(b"date", b"Mon, 30 Nov 2026 12:00:00 GMT")]
        make = connections or connection_class(limits or ConnectionLimits(), refuse)
        self.protocol = make(config, state, {}, asyncio.get_running_loop())
        self.transport = FakeTransport(address)
        self.transport.protocol = self.protocol
        self.protocol.connection_made(self.transport)
        if not has_clock and (timer := self.protocol.registry._timer) is not None:
            timer.cancel()

    async def send(self, *pieces: bytes) -> None:
        """Receive the pieces, each when everything that the last one caused is done."""
        for piece in pieces:
            if self.transport.end is None:
                self.protocol.data_received(piece)
            await self.settle()

    async def settle(self) -> None:
        """Let all tasks run that can."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def eof(self) -> None:
        """The client closes its side."""
        if self.transport.end is None and not self.protocol.eof_received():
            self.transport.close()
        await self.settle()

    async def wait(self, seconds: float) -> None:
        """Let time pass, as the registry notes it."""
        for _ in range(round(seconds / TICK_S)):
            if self.transport.end is None:
                self.protocol.tick()
            await self.settle()

    @property
    def answers(self) -> list[Answer]:
        """All complete responses so far."""
        return parse_answers(bytes(self.transport.written))

    @property
    def statuses(self) -> list[int]:
        """Their statuses."""
        return [answer.status for answer in self.answers]

    @property
    def is_over(self) -> bool:
        """Whether the server has closed the connection, or its side of it."""
        return self.transport.end is not None or self.transport.has_written_eof


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Return `data` cut at these places."""
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:stop] for start, stop in pairwise(edges) if start < stop]


def scenario(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an asynchronous test in an event loop of its own."""

    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


class Held:
    """An application that reads a request at once, and answers when told."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.disconnected = False
        self.seen: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope["path"])
        while (message := await receive()).get("more_body"):
            pass
        self.disconnected |= message["type"] == "http.disconnect"
        answer = asyncio.ensure_future(self.may_answer.wait())
        left = asyncio.ensure_future(receive())
        await asyncio.wait([answer, left], return_when="FIRST_COMPLETED")
        self.disconnected |= left.done()
        answer.cancel()
        left.cancel()
        await respond(send, b'{"held": true}')
