"""Limits and deadlines of connections."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from service.settings import Settings

_MOST_CONNECTIONS = 16_384
_OTHER_FILES = 256
"""Open files of a process beside its connections: models, libraries, pipes, and connections that are being refused."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits and deadlines of each connection, and the number of connections of a process."""

    head_bytes: int = 32 * 1024
    """Request line and headers; also the framing of a chunked body without content between."""
    headers: int = 100
    target_bytes: int = 8 * 1024
    pipelined: int = 16
    """Requests of a connection that wait for the answer to an earlier one."""
    head_s: float = 10.0
    """From the first byte of a request, or from the start of the connection, to the end of the headers."""
    body_s: float = 10.0
    """Between two pieces of a body."""
    idle_s: float = 75.0
    """From an answer to the next request."""
    write_s: float = 30.0
    """In which a client has to read an answer."""
    connections: int = _MOST_CONNECTIONS
    """Of a process."""
    connections_per_address: int = 0
    """0: as many as of the process."""


def limits_of(settings: Settings) -> ConnectionLimits:
    """Return the limits of the settings; without a number of connections, as many as the process may open files for."""
    return ConnectionLimits(
        head_bytes=settings.max_head_bytes,
        headers=settings.max_headers,
        target_bytes=settings.max_target_bytes,
        pipelined=settings.max_pipelined,
        head_s=settings.head_s,
        body_s=settings.body_s,
        idle_s=settings.idle_s,
        write_s=settings.write_s,
        connections=settings.max_connections or _as_files_allow(),
        connections_per_address=settings.max_connections_per_address,
    )


def _as_files_allow() -> int:
    """Return how many connections the process has open files for, after raising that limit as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + _OTHER_FILES
    # RLIM_INFINITY is -1.
    if 0 <= soft < wanted:
        soft = wanted if hard < 0 else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _MOST_CONNECTIONS if soft < 0 else max(1, min(_MOST_CONNECTIONS, soft - _OTHER_FILES))
