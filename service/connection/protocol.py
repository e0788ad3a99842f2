"""The protocol of one connection: uvicorn's for httptools, with limits, deadlines and constant refusals.

Deadlines are counted in ticks of the registry, so that a request reads no clock. A refusal is written after the answers
that are due. Further input is then dropped for a while: a socket that is closed with unread input resets
the connection, and the client may lose the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.api.predict import ABANDON
from service.connection.limits import ConnectionLimits
from service.connection.pacer import Pacer
from service.connection.reading import Phase, RequestReader
from service.connection.refusals import Refusals, syntax
from service.connection.registry import TICK_S, Registry

Refuse = Callable[[Any], bytes | None]
"""Return a complete response that refuses the request with this ASGI scope, or null to hand it to the application.

The response is constant bytes with `Connection: close`; the connection adds `Date`.
"""

_LINGER_S = 2.0
"""Silence of a client that was refused, after which the connection is closed."""
_LINGER_MOST_S = 10.0
_LINGER_BYTES = 256 * 1024 * 1024
_MOST_LINGERING = 128
"""Connections beyond the limit that are closed so that the client surely reads why."""
_LEFT_S = 1.0
"""Time to answer a client that has closed its side: it still reads, or it has left."""
_STOP_S = 1.0
"""Time in which an idle connection takes a last request after the server was told to stop."""
_READ_PER_S = 16 * 1024
"""Slowest reading of a large answer, in bytes per second."""


def never(scope: Any) -> None:
    """Refuse no request."""
    del scope


class _Outlet:
    """The transport as responses see it: `close` waits until the client has read the answer."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


class Connection(RequestReader):
    """One connection of a client."""

    registry = Registry(RequestReader.limits)
    pacer = Pacer()
    refuse: Refuse = staticmethod(never)
    refused: Callable[[bytes], None] = staticmethod(never)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.address: str | None = None
        self._running: RequestResponseCycle | None = None
        self._refusal: bytes | None = None
        self._is_spare = False
        self._is_half_closed = False
        self._lingers = False
        self._linger_ticks = 0
        self._dropped_bytes = 0
        self._unread_ticks = 0
        self._unread_limit_s = 0.0

    @property
    def is_answering(self) -> bool:
        """Whether a request waits for its answer."""
        return bool(self.cycle) and not self.cycle.response_complete

    @property
    def silent_ticks(self) -> int:
        """Ticks since the client sent something that the server waits for; 0 while it works for the client."""
        return self.ticks if self._lingers or self.phase is not Phase.IDLE or not self.is_answering else 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place among the connections of the process."""
        super().connection_made(transport)
        self.outlet = _Outlet(transport, self._close_gently)
        self.address = self.client[0] if self.client else None
        place = self.registry.enter(self, self.loop)
        self._is_spare = place is None
        if place is False:
            self.end(self.refusals.connections)
            if len(self.registry) > self.limits.connections + _MOST_LINGERING:
                transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the running request that nobody reads its answer, and forget those that wait."""
        self.registry.leave(self)
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._abandon(self._running)
        super().connection_lost(exc)
        # Garbage is rarely collected: the cycle of the last request refers to this connection.
        self.outlet = self._running = None
        self.cycle = None  # type: ignore[assignment]

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether to keep the connection of a client that sends nothing more."""
        self._is_half_closed = True
        self.ticks = 0
        if self.phase is not Phase.IDLE and not self.drops_input:
            self.refuse_input(syntax("the connection was closed before its end"))
        return self.is_answering and not self._lingers

    def shutdown(self) -> None:
        """Answer open requests, and one that comes within `_STOP_S`, and close."""
        self.stops = True
        self.ticks = 0
        if self.cycle:
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        answer = self.refuse(cycle.scope)
        if answer is not None:
            self.loop.call_later(self.pacer.delay_s(self.loop.time()), self._refuse, cycle, answer)
        elif self._is_spare and "/health/" not in cycle.scope["path"]:
            cycle.response_complete = True
            self.end(self.refusals.connections)
        else:
            super()._start_asgi_task(cycle, app)

    def _refuse(self, cycle: RequestResponseCycle, answer: bytes) -> None:
        """Write the answer to a request that the application does not see, and close."""
        cycle.response_complete = True
        if self.phase is Phase.IDLE and not self.drops_input and not self.pipeline:
            # Nothing is unread: the client gets the answer without lingering.
            self._write(answer)
            self.transport.close()
        else:
            self.end(answer)

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for it."""
        self.server_state.total_requests += 1
        if self._lingers or self.transport.is_closing():
            return
        self.ticks = 0
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self.end(self._refusal)
        elif self._is_half_closed:
            self.transport.close()

    def refuse_input(self, answer: bytes) -> None:
        """Write a last answer after those that are due, and close."""
        self.drops_input = True
        newest = self.cycle
        if self.phase is Phase.BODY and not newest.response_complete:
            # The request will not have its body.
            if self.pipeline and self.pipeline[0][0] is newest:
                self.pipeline.popleft()
            else:
                self._abandon(newest)
                if newest.response_started:
                    self._close_gently()
                else:
                    self.end(answer)
                return
        if self._running is not None and not self._running.response_complete:
            self._refusal = answer
        else:
            self.end(answer)

    def end(self, answer: bytes) -> None:
        """Write a last answer and close."""
        self._write(answer)
        self.drops_input = True
        self._close_gently()

    def _write(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.refused(answer)
            if self.phase is not Phase.IDLE and self.scope.get("method") == "HEAD":
                answer = answer[: answer.index(b"\r\n\r\n") + 4]
            status, _, rest = answer.partition(b"\r\n")
            date = [b"%s: %s\r\n" % header for header in self.server_state.default_headers]
            self.transport.write(b"".join([status, b"\r\n", *date, rest]))

    def drop(self, size: int) -> None:
        """Close if the client goes on sending for long."""
        self.ticks = 0
        self._dropped_bytes += size
        if self._dropped_bytes > _LINGER_BYTES:
            self.transport.abort()

    def _close_gently(self) -> None:
        """Close; if more input may come, only after the client has closed its side or is silent."""
        transport = self.transport
        if self._lingers or transport.is_closing():
            return
        self.ticks = 0
        self._lingers = True
        if (self.phase is Phase.IDLE and not self.drops_input) or self._is_half_closed:
            transport.close()
            return
        self.drops_input = True
        self.flow.resume_reading()
        if transport.can_write_eof():
            transport.write_eof()

    @staticmethod
    def _abandon(cycle: RequestResponseCycle) -> None:
        cycle.disconnected = True
        cycle.message_event.set()
        if (abandon := cycle.scope.get(ABANDON)) is not None:
            abandon()

    def give_way(self) -> None:
        """Close at once, for a new connection."""
        self.transport.abort()

    def tick(self) -> None:
        """Enforce the deadlines; called every `TICK_S`."""
        self.ticks += 1
        waited_s = self.ticks * TICK_S
        limits = self.limits
        if unread := self.transport.get_write_buffer_size():
            self._await_reader(unread)
        elif self._lingers or self.transport.is_closing():
            # Of TLS, a client that does not close its side keeps a connection that is closed.
            self._linger_ticks += 1
            if waited_s > _LINGER_S or self._linger_ticks * TICK_S > _LINGER_MOST_S:
                self.transport.abort()
        elif self.phase is Phase.BODY:
            if self.flow.read_paused or self.cycle.waiting_for_100_continue:
                self.ticks = 0
            elif waited_s > limits.body_s:
                self.refuse_input(self.refusals.slow_body)
        elif self.is_answering:
            if self._is_half_closed and waited_s > _LEFT_S:
                self.transport.abort()
        elif self.stops and self.phase is Phase.IDLE:
            if waited_s >= _STOP_S:
                self.transport.close()
        elif self.phase is Phase.HEAD or not self.cycle:
            if waited_s > limits.head_s:
                self.refuse_input(self.refusals.slow_head)
        elif waited_s > limits.idle_s:
            self.transport.close()
        if not unread:
            self._unread_ticks = 0

    def _await_reader(self, unread: int) -> None:
        """Abort if the client has not read its answer in time."""
        if self._unread_ticks == 0:
            self._unread_limit_s = self.limits.write_s + unread / _READ_PER_S
        self._unread_ticks += 1
        if self._unread_ticks * TICK_S > self._unread_limit_s:
            self.transport.abort()

    def resume_writing(self) -> None:
        """Note that the client has read most of the output."""
        super().resume_writing()
        self._unread_ticks = 0


def connection_class(
    limits: ConnectionLimits, refuse: Refuse = never, refused: Callable[[bytes], None] = never
) -> type[Connection]:
    """Return the protocol class of the connections of one process.

    Args:
        limits: see `ConnectionLimits`.
        refuse: called with the ASGI scope of each request before a task is made for it.
        refused: called with each complete response that the application does not see.
    """
    members = {
        "limits": limits,
        "refusals": Refusals(limits),
        "registry": Registry(limits),
        "pacer": Pacer(),
        "refuse": staticmethod(refuse),
        "refused": staticmethod(refused),
    }
    return type("ServedConnection", (Connection,), members)
