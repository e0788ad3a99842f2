"""The gRPC server of one process, on the event loop of its HTTP server.

Several processes listen on one port (`SO_REUSEPORT`), as for HTTP; the first socket of the port, which accepts no
connection, holds it for those that start later.
"""

from __future__ import annotations

import os
from typing import Any

# The library would write lines about requests to standard error, past the limits of the log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from starlette.types import ASGIApp

from service.access.certificate import Certificate
from service.api.predict import Service
from service.rpc.calls import Calls, Context, Pace
from service.rpc.messages import METHODS, SERVICE, Method
from service.runtime.cpus import usable_cpus
from service.settings import Settings, threads_of

_MOST_STREAMS = 256
"""Calls of one connection in progress; further ones wait in the client."""
_PING_S = 60
_PONG_S = 20
"""Seconds without a sign of the client after which a ping is sent, and after which the connection is closed."""
_LEAST_READING = 8


class RpcServer:
    """The server of one process; it is made and used on the event loop, after the fork."""

    def __init__(self, host: str, port: int, settings: Settings, certificate: Certificate | None) -> None:
        """Start nothing.

        Args:
            host: address of an interface.
            port: TCP port.
            settings: those of the server.
            certificate: serves TLS.
        """
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._settings = settings
        self._certificate = certificate
        self._server: grpc.aio.Server | None = None
        self._calls: Calls | None = None

    async def start(self, app: ASGIApp, service: Service) -> None:
        """Serve.

        Args:
            app: with the middleware of the server of HTTP.
            service: of the application.
        """
        settings = self._settings
        processes = threads_of(settings, usable_cpus()).processes
        most = -(-settings.max_requests // processes)
        reading = max(_LEAST_READING, settings.max_waiting_bytes // processes // settings.max_body_bytes)
        self._calls = Calls(app, service, Pace(settings.body_s, settings.write_s, reading, settings.client_share))
        self._server = grpc.aio.server(options=_options(settings), maximum_concurrent_rpcs=most + _MOST_STREAMS)
        handlers = {name: _handler(self._calls, method) for name, method in METHODS.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if self._certificate is None:
            self._server.add_insecure_port(self._address)
        else:
            self._server.add_secure_port(self._address, _credentials(self._certificate))
        await self._server.start()

    @property
    def in_progress(self) -> int:
        """Calls that are not answered yet."""
        return 0 if self._calls is None else self._calls.in_progress

    async def stop(self, grace_s: float) -> None:
        """Accept no call, and end those that are not answered in time."""
        if self._server is not None:
            await self._server.stop(grace_s)


def _handler(calls: Calls, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def answer(_: object, context: Context) -> None:
        await calls.answer(method, context)

    # One message each way looks like a stream of one: the call itself then says when it reads and writes.
    return grpc.stream_stream_rpc_method_handler(answer)


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", settings.max_head_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_head_bytes),
        ("grpc.max_concurrent_streams", _MOST_STREAMS),
        ("grpc.server_handshake_timeout_ms", int(1000 * settings.head_s)),
        ("grpc.max_connection_idle_ms", int(1000 * settings.idle_s)),
        ("grpc.keepalive_time_ms", 1000 * _PING_S),
        ("grpc.keepalive_timeout_ms", 1000 * _PONG_S),
    ]


def _credentials(certificate: Certificate) -> grpc.ServerCredentials:
    """Return credentials that follow the files of a certificate."""
    current = certificate.pem()

    def fetch() -> Any:
        """Return the files for a handshake, or null if they are those of the last one."""
        nonlocal current
        before, current = current, certificate.pem()
        return None if current == before else _configuration(*current)

    return grpc.dynamic_ssl_server_credentials(_configuration(*current), fetch)


def _configuration(chain: bytes, key: bytes) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(key, chain)])
