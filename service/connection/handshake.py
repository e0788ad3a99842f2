"""Connections of TLS, also before their handshake is over: they take places, and have the time of a head.

The servers of asyncio and uvloop show a protocol its connection only after the handshake. Clients that never begin one
would be in nobody's count, and would take the open files of the process.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.utils import get_remote_addr

from service.connection.protocol import Connection


class Handshake(SSLProtocol):
    """TLS of one connection; a member of the registry until `Connection` is one."""

    def __init__(self, connections: type[Connection], tls: ssl.SSLContext, **options: Any) -> None:
        """Wait for a connection.

        Args:
            connections: class of the connection.
            tls: context of the server.
            options: for the connection, from uvicorn.
        """
        self.registry = connections.registry
        self._wire: asyncio.Transport | None = None
        self.address: str | None = None
        self.silent_ticks = 0
        super().__init__(  # type: ignore[call-arg]
            asyncio.get_running_loop(),
            _Opening(self, functools.partial(connections, **options)),
            tls,
            None,  # type: ignore[arg-type]
            server_side=True,
            ssl_handshake_timeout=connections.limits.head_s,  # type: ignore[arg-type]
        )

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place among the connections of the process, and begin the handshake."""
        self._wire = transport
        client = get_remote_addr(transport)
        self.address = client[0] if client else None
        place = self.registry.enter(self, asyncio.get_running_loop())
        super().connection_made(transport)
        if place is False:
            # An answer that the client can read would take a handshake.
            self.give_way()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Leave the place."""
        self.registry.leave(self)
        super().connection_lost(exc)
        # Garbage is rarely collected: the frames of a failed handshake hold its error, and this object and its 256 KiB.
        self._wire = None
        if exc is not None:
            exc.__traceback__ = None

    def tick(self) -> None:
        """Count the silence; the handshake has a deadline."""
        self.silent_ticks += 1

    def give_way(self) -> None:
        """Close at once."""
        if self._wire is not None:
            self._wire.abort()


class _Opening(asyncio.Protocol):
    """Makes the connection, and place for it, when the handshake is over."""

    def __init__(self, handshake: Handshake, make: Callable[[], Connection]) -> None:
        self._handshake = handshake
        self._make = make

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        connection = self._make()
        self._handshake.registry.leave(self._handshake)
        transport.set_protocol(connection)
        connection.connection_made(transport)
