"""The uvicorn server of one process: how it starts, watches itself, and ends without losing a request.

::

    SIGTERM ─► not ready, answers close their connections ─► new connections are kept out, the backlog is taken
                                (drain_s)                                      (HANDSHAKE_S)
            ─► the listener closes, open requests are answered ─► the rest gets 503 ─► status 0
                                    (grace_s)                           (1 s)
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI

from service.api.decoding import end_children
from service.api.predict import Service
from service.connection.handshake import Handshake
from service.connection.protocol import Connection
from service.processes.stopping import HANDSHAKE_S, has_waiting, keep_out
from service.processes.watchdog import Watchdog

_log = logging.getLogger(__name__)

DEVICE_LOST_STATUS = 70
"""Exit status after the loss of a GPU: EX_SOFTWARE of sysexits.h, the status of nothing else here."""
STUCK_STATUS = 75
"""Exit status after a worker or the event loop got stuck: EX_TEMPFAIL of sysexits.h."""
LAST_S = 1.0
"""Seconds for the answers with status 503 at the end."""
_NOTICE_S = 2.0
"""Seconds from the loss of the GPU to the end: a load balancer that probes every second sees the 503."""
_STUCK_GRACE_S = 2.0
"""Seconds in which the other workers of a process with a stuck one answer."""
_HANG_S = 8.0
"""Seconds without a turn of the event loop after which the process ends."""
_TURN_S = 0.02


@dataclass(frozen=True)
class Ending:
    """How a server ends, and who is told that it lives."""

    drain_s: float = 0.0
    """See `Settings.drain_s`."""
    grace_s: float = 6.0
    """See `Settings.grace_s`."""
    is_alone: bool = True
    """Whether no other process holds the listener."""
    beat: Callable[[], None] = lambda: None
    """Called several times a second."""


class Rpc(Protocol):
    """A server of another protocol for the same application: see `service.rpc.server`."""

    @property
    def in_progress(self) -> int:
        """Calls that are not answered yet."""
        ...

    async def start(self, app: Any, service: Service) -> None:
        """Serve."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Accept no call, and end those that are not answered in time."""
        ...


class Server(uvicorn.Server):
    """uvicorn that answers connections in the backlog before it ends, and ends when it cannot go on."""

    def __init__(
        self,
        app: FastAPI,
        log_level: str,
        is_lost: Callable[[], bool],
        ending: Ending | None = None,
        *,
        connections: type[Connection] | None = None,
        tls: ssl.SSLContext | None = None,
        trusted_proxies: Sequence[str] = (),
        follow: Callable[[], None] = lambda: None,
        rpc: Rpc | None = None,
    ) -> None:
        """Configure uvicorn.

        Args:
            app: of `create_app`.
            log_level: least severe message that is logged.
            is_lost: called ten times a second; returns whether the device has failed for good.
            ending: default: of one process, without a drain.
            connections: class of the connections, see `connection_class`; default: with its default limits.
            tls: serves HTTPS.
            trusted_proxies: addresses and networks whose X-Forwarded-For names the client.
            follow: called ten times a second, on the event loop; changes the models.
            rpc: starts and ends with this server.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=(connections or Connection)
                if tls is None
                else functools.partial(Handshake, connections or Connection, tls),  # type: ignore[arg-type]
                log_config=None,
                log_level=log_level,
                # A line for each request costs more than reading it; /metrics counts them.
                access_log=log_level == "debug",
                ws="none",
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=list(trusted_proxies),
                server_header=False,
                headers=[("X-Content-Type-Options", "nosniff")],
            )
        )
        self._service: Service | None = getattr(getattr(app, "state", None), "service", None)
        self._is_lost = is_lost
        self._follow = follow
        self._rpc = rpc
        self._ending = ending or Ending()
        self._watchdog = Watchdog(_HANG_S, STUCK_STATUS)
        self._end_at_s: float | None = None
        self._status = 0
        self._is_jammed = False
        """Whether a worker did not end."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, and watch the event loop."""
        await super().startup(sockets)
        if self._rpc is not None and self._service is not None:
            await self._rpc.start(self.config.loaded_app, self._service)
        self._watchdog.start()

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server has to end; uvicorn calls this ten times a second."""
        self._beat()
        self._follow()
        if self._service is not None:
            metrics, state = self._service.metrics, self.server_state
            metrics.flush()
            metrics.connections.set(len(state.connections))
            metrics.in_progress.set(self._in_progress)
        if self._end_at_s is None and self._is_lost():
            _log.error("a GPU was lost: /health/ready is 503, and the server ends with status %d", DEVICE_LOST_STATUS)
            # A worker may wait for the device forever, and the application for that worker.
            self._end_with(DEVICE_LOST_STATUS, _NOTICE_S, self._ending.grace_s)
        elif self._end_at_s is None and self._service is not None:
            health = self._service.health
            health.check()
            if faults := health.fatal_faults():
                _log.error("%s: the server ends with status %d", "; ".join(faults), STUCK_STATUS)
                self._end_with(STUCK_STATUS, 0.0, _STUCK_GRACE_S)
        return await super().on_tick(counter) or (self._end_at_s is not None and time.monotonic() >= self._end_at_s)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer connections in the backlog and open requests, and end; see the module."""
        is_asked = self._end_at_s is None
        # Ctrl-C is not announced to a load balancer.
        drain_s = self._ending.drain_s if is_asked and signal.SIGTERM in self._captured_signals else 0.0
        grace_s = _STUCK_GRACE_S if self._status == STUCK_STATUS else self._ending.grace_s
        self._watchdog.end()
        last = _end_process_in(drain_s + 2 * HANDSHAKE_S + grace_s + LAST_S, 0) if is_asked else None
        logging.getLogger("uvicorn.error").info("Shutting down")
        if self._service is not None:
            self._service.health.is_stopping = True
        # The protocol closes a connection after an answer with this header, also one that is being computed.
        self.server_state.default_headers.append((b"connection", b"close"))
        await self._turn(drain_s)
        until_s = time.monotonic() + HANDSHAKE_S + grace_s
        # Without a drain of its own: a client of HTTP/2 is told to open another connection.
        rpc_ends = None if self._rpc is None else asyncio.ensure_future(self._rpc.stop(HANDSHAKE_S + grace_s + LAST_S))
        await self._close_listeners(sockets or [])
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._wait_for_answers(until_s)
        if rpc_ends is not None and not self.force_exit:
            await asyncio.wait([rpc_ends], timeout=LAST_S / 2)
        if not self.force_exit:
            await self.lifespan.shutdown()
        if last is not None:
            last.cancel()

    def serve_on(self, listener: socket.socket) -> int:
        """Serve until a signal and return the exit status; the process itself ends here if it cannot go on."""
        try:
            self.run(sockets=[listener])
        finally:
            end_children()
            if self._end_at_s is not None or self._is_jammed:
                # ONNX Runtime aborts the process (status 134) when a session is destroyed whose device is lost, and
                # waits for a run that does not end.
                logging.shutdown()
                os._exit(self._status)
        return 0 if self.started else 1

    @property
    def _in_progress(self) -> int:
        """Requests that are not answered yet."""
        return len(self.server_state.tasks) + (0 if self._rpc is None else self._rpc.in_progress)

    def _beat(self) -> None:
        self._watchdog.beat()
        self._ending.beat()

    def _end_with(self, status: int, notice_s: float, grace_s: float) -> None:
        self._status = status
        self._end_at_s = time.monotonic() + notice_s
        _end_process_in(notice_s + 2 * HANDSHAKE_S + grace_s + 2 * LAST_S, status)

    async def _turn(self, seconds: float) -> None:
        """Let the event loop run for some seconds, at least for one turn."""
        until_s = time.monotonic() + seconds
        while True:
            self._beat()
            await asyncio.sleep(_TURN_S)
            if self.force_exit or time.monotonic() >= until_s:
                return

    async def _close_listeners(self, listeners: list[socket.socket]) -> None:
        until_s = time.monotonic() + 2 * HANDSHAKE_S
        # Otherwise later connections wait for another process.
        if self._ending.is_alone:
            for listener in listeners:
                keep_out(listener)
        await self._turn(HANDSHAKE_S)
        while listeners and has_waiting(listeners) and not self.force_exit and time.monotonic() < until_s:
            await self._turn(0.0)
        for server in self.servers:
            server.close()
        for listener in listeners:
            listener.close()
        # A connection that was accepted last has still to send its request.
        await self._turn(HANDSHAKE_S / 2)

    async def _wait_for_answers(self, until_s: float) -> None:
        state = self.server_state
        while (state.connections or self._in_progress) and not self.force_exit and time.monotonic() < until_s:
            await self._turn(0.0)
        if self._service is not None:
            if left := self._in_progress:
                _log.error("%d requests were not answered before the end and get status 503", left)
            # The workers hand their last answers over, and requests that still wait get their 503.
            self._is_jammed = not self._service.batcher.close(0.0 if self.force_exit else LAST_S / 2)
        until_s = time.monotonic() + LAST_S / 2
        while self._in_progress and not self.force_exit and time.monotonic() < until_s:
            await self._turn(0.0)
        for task in state.tasks:
            task.cancel()


def _end_process_in(seconds: float, status: int) -> threading.Timer:
    last = threading.Timer(seconds, os._exit, (status,))
    last.daemon = True
    last.start()
    return last
