"""The uvicorn server of one process, which also ends when the GPU is lost."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from service.connection.protocol import Connection

_log = logging.getLogger(__name__)

DRAIN_S = 10
"""Seconds in which open requests are answered after a signal."""
DEVICE_LOST_STATUS = 70
"""Exit status after the loss of a GPU: EX_SOFTWARE of sysexits.h, the status of nothing else here."""
_NOTICE_S = 2.0
"""Seconds from the loss of the GPU to the end: a load balancer that probes every second sees the 503."""
_GRACE_S = 5.0


class Server(uvicorn.Server):
    """uvicorn that ends as after a signal when the device of a model is lost."""

    def __init__(
        self,
        app: FastAPI,
        log_level: str,
        is_lost: Callable[[], bool],
        connections: type[Connection] | None = None,
    ) -> None:
        """Configure uvicorn.

        Args:
            app: the application.
            log_level: least severe message that is logged.
            is_lost: called ten times a second; returns whether the device has failed for good.
            connections: class of the connections, see `connection_class`; default: with its default limits.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=connections or Connection,
                log_config=None,
                log_level=log_level,
                # A line for each request costs more than reading it; /metrics counts them.
                access_log=log_level == "debug",
                timeout_graceful_shutdown=DRAIN_S,
                ws="none",
                # Nothing here needs the client's address or protocol.
                proxy_headers=False,
            )
        )
        self._is_lost = is_lost
        self._end_at_s: float | None = None

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server has to end; uvicorn calls this ten times a second."""
        if self._end_at_s is None and self._is_lost():
            _log.error("a GPU was lost: /health/ready is 503, and the server ends with status %d", DEVICE_LOST_STATUS)
            self._end_at_s = time.monotonic() + _NOTICE_S
            # A worker may wait for the device forever, and the application for that worker.
            last = threading.Timer(_NOTICE_S + DRAIN_S + _GRACE_S, os._exit, (DEVICE_LOST_STATUS,))
            last.daemon = True
            last.start()
        return await super().on_tick(counter) or (self._end_at_s is not None and time.monotonic() >= self._end_at_s)

    def serve_on(self, listener: socket.socket) -> int:
        """Serve until a signal and return the exit status; the process itself ends here if the device was lost."""
        self.run(sockets=[listener])
        if self._end_at_s is not None:
            # ONNX Runtime aborts the process (status 134) when a session is destroyed whose device is lost.
            logging.shutdown()
            os._exit(DEVICE_LOST_STATUS)
        return 0 if self.started else 1
