"""The protocol of one connection, over uvicorn's protocol for httptools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.predict import ABANDON
from service.connection.limits import ConnectionLimits

Refuse = Callable[[Any], bytes | None]
"""Return a complete response that refuses the request with this ASGI scope, or None to hand it to the application.

The response is constant bytes with `Connection: close`; the connection adds `Date`.
"""


def never(scope: Any) -> None:
    """Refuse no request."""
    del scope


class Connection(HttpToolsProtocol):
    """One connection of a client."""

    limits = ConnectionLimits()
    refuse: Refuse = staticmethod(never)

    def connection_lost(self, exc: Exception | None) -> None:
        """Abandon the request in progress: nobody reads its answer."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            abandon = cycle.scope.get(ABANDON)
            if abandon is not None:
                abandon()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        answer = self.refuse(cycle.scope)
        if answer is None:
            super()._start_asgi_task(cycle, app)
        else:
            cycle.response_complete = True
            self.transport.write(answer)
            self.transport.close()


def connection_class(limits: ConnectionLimits, refuse: Refuse = never) -> type[Connection]:
    """Return the protocol class of the connections of one server.

    Args:
        limits: see `ConnectionLimits`.
        refuse: called with the ASGI scope of each request before a task is made for it.
    """
    return type("ServerConnection", (Connection,), {"limits": limits, "refuse": staticmethod(refuse)})
