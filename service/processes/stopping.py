"""The end of a listening socket: no connection that the system has accepted is lost.

A socket that is closed resets the connections in its backlog, whose clients may have sent a request already. So new
connections are kept out first, those in the backlog are taken, and then it is closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import select
import socket
import struct
import sys
import time
from collections.abc import Sequence

_log = logging.getLogger(__name__)

HANDSHAKE_S = 0.5
"""Seconds in which a client completes a handshake that has begun."""

_SO_ATTACH_FILTER = 26
# Classic BPF on the TCP header: drop segments with SYN (byte 13, bit 2), keep all others.
_NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_READ_S = 1.0


def keep_out(listener: socket.socket) -> None:
    """Let no new connection begin; those that have begun are still completed.

    A client that tries gets no answer while the socket is open, and is refused when it tries again. Without effect
    where the system has no such filter.
    """
    if sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _NO_SYN))
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(_NO_SYN), ctypes.addressof(program))
        )


def has_waiting(listeners: Sequence[socket.socket]) -> bool:
    """Return whether a connection is in a backlog."""
    poll = select.poll()
    for listener in listeners:
        poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def refuse_waiting(listeners: Sequence[socket.socket]) -> None:
    """Answer the connections in the backlogs with status 503, and close the sockets."""
    # Imported here: the server process alone loads the web framework, after its pool of verifiers has work.
    from service.api.problem import last_bytes, problem_of
    from service.inference.admission import stopping

    refusal = last_bytes(problem_of(stopping()))
    refused: list[socket.socket] = []
    for listener in listeners:
        listener.setblocking(False)
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                refused.append(connection)
                connection.settimeout(_READ_S)
                with contextlib.suppress(OSError):
                    connection.sendall(refusal)
                    connection.shutdown(socket.SHUT_WR)
        listener.close()
    until_s = time.monotonic() + _READ_S
    for connection in refused:
        # A socket with unread input resets its connection, and the client might lose the answer.
        with contextlib.suppress(OSError):
            while (left_s := until_s - time.monotonic()) > 0.0:
                connection.settimeout(left_s)
                if not connection.recv(65536):
                    break
        connection.close()
    if refused:
        _log.warning("%d connections that no process had taken got status 503", len(refused))
