"""Connections of TLS, also before their handshake is over: they take places, and have the time of a head.

The servers of asyncio and uvloop show a protocol its connection only after the handshake. Clients that never begin one
would be in nobody's count, and would take the open files of the process.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol
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
        self.connection = connection = connections(**options)
        self._wire: asyncio.Transport | None = None
        self.address: str | None = None
        self.silent_ticks = 0
        super().__init__(  # type: ignore[call-arg]
            connection.loop,
            _Opening(self),
            tls,
            None,  # type: ignore[arg-type]
            server_side=True,
            ssl_handshake_timeout=connection.limits.head_s,  # type: ignore[arg-type]
        )

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place among the connections of the process, and begin the handshake."""
        self._wire = transport
        client = get_remote_addr(transport)
        self.address = client[0] if client else None
        place = self.connection.registry.enter(self, self.connection.loop)
        super().connection_made(transport)
        if place is False:
            # An answer that the client can read would take a handshake.
            self.give_way()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Leave the place."""
        self.connection.registry.leave(self)
        super().connection_lost(exc)

    def tick(self) -> None:
        """Count the silence; the handshake has a deadline."""
        self.silent_ticks += 1

    def give_way(self) -> None:
        """Close at once."""
        if self._wire is not None:
            self._wire.abort()


class _Opening(asyncio.Protocol):
    """Makes place for the connection when the handshake is over."""

    def __init__(self, handshake: Handshake) -> None:
        self._handshake = handshake

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        connection = self._handshake.connection
        connection.registry.leave(self._handshake)
        transport.set_protocol(connection)
        connection.connection_made(transport)
