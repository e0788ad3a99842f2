"""Serving, from settings to exit status: port, verification, models, processes.

::

    pool of verifiers starts (service.__main__)  ──►  verifies the artefacts of its folders
    settings, port                                        │
    web framework, ONNX Runtime are imported              │ findings
    classifiers  ◄────────────────────────────────────────┘
    application; processes are forked; uvicorn

Whatever is large is imported inside functions, after the pool has its work: the imports then run beside the proofs.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from service import __version__
from service.artefact.pool import VerifierPool
from service.errors import ArtefactChangedError, SettingsError
from service.logs import use_format
from service.runtime.cpus import usable_cpus

if TYPE_CHECKING:
    from service.access.certificate import Certificate
    from service.access.keys import KeyRing
    from service.inference.catalogue import Catalogue, Order, State
    from service.processes.following import Follower
    from service.rpc.server import RpcServer
    from service.settings import Settings

_log = logging.getLogger("service")

_BACKLOG = 2048
_COUNTER_BYTES = {"counter": 1 << 18, "histogram": 1 << 20, "gauge_livemax": 1 << 16, "gauge_livesum": 1 << 16}
"""Files of `prometheus_client` for each process, and more than their labels need."""
_COLLECT_AFTER = 50_000
"""Allocations between two garbage collections: requests leave hardly any garbage in cycles."""


def run_server(settings: Settings, pool: VerifierPool) -> int:
    """Serve until a signal and return the exit status.

    Raises:
        LipcertError: a setting, the port, a model or the provider keeps the server from starting.
    """
    logging.getLogger().setLevel(settings.log_level.upper())
    logging.captureWarnings(True)
    use_format(settings.log_format)
    from service.processes.prefork import bind, hold, listen, serve_in_processes
    from service.processes.stopping import refuse_waiting

    _check_rpc(settings)
    settings = _with_processes(settings)
    certificate = _certificate_of(settings)
    with contextlib.ExitStack() as stack:
        # Taken before the models are verified: a port in use is then reported at once.
        first = stack.enter_context(bind(settings.host, settings.port))
        rpc_address = None
        if settings.grpc_port is not None:
            rpc_address = stack.enter_context(hold(settings.host, settings.grpc_port)).getsockname()[:2]
        if settings.processes > 1:
            _share_counters(stack, settings.processes)
        serve, chores = _loaded(settings, pool, certificate, rpc_address)
        stack.callback(chores.close)
        listeners = [stack.enter_context(listener) for listener in listen(first, settings.processes, _BACKLOG)]
        host, port = first.getsockname()[:2]
        scheme = "http" if certificate is None else "https"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        _log.info("serving on %s - the playground is at %s/, the API at %s/docs", url, url, url)
        if rpc_address is not None:
            _log.info("serving gRPC on %s port %d", *rpc_address)
        warn_if_open(settings, host)
        # All objects of the start stay: no collection has to look at them again.
        gc.freeze()
        gc.enable()
        gc.set_threshold(_COLLECT_AFTER)
        if settings.processes == 1:
            try:
                return serve(first)
            finally:
                # Stopped before the event loop ran.
                if first.fileno() != -1:
                    refuse_waiting([first])
        from service.processes.server import LAST_S

        # Beside the open requests: the end of the listeners, the last answers, and the end of the process.
        grace_s = settings.grace_s + 2 * LAST_S
        serve_in_processes(listeners, serve, grace_s, settings.drain_s, chores.look, chores.hang_up, chores.descriptors)
    # Signals do nothing here. The interpreter would restore them before it ends, and one more would end the process
    # with another status.
    logging.shutdown()
    os._exit(0)


def _loaded(
    settings: Settings, pool: VerifierPool, certificate: Certificate | None, rpc_address: tuple[str, int] | None
) -> tuple[Callable[[socket.socket], int], Chores]:
    """Load the models; return a function that serves on a socket, in this process or in one forked from it, and the
    chores of this process.

    Args:
        settings: those of the server.
        pool: of verifiers.
        certificate: serves TLS.
        rpc_address: serves gRPC there.
    """
    from service.artefact.folders import artefact_folders
    from service.settings import default_of

    folders = artefact_folders(settings.models, default_of(settings))
    pool.start(folders, (settings.proof_seconds, settings.proof_bytes, settings.proof_work))
    from service.api.access import access_of
    from service.api.app import create_app
    from service.connection.limits import limits_of
    from service.connection.protocol import connection_class
    from service.inference.catalogue import Catalogue
    from service.inference.loading import load_classifiers
    from service.processes.following import Follower
    from service.processes.prefork import beat, own_number
    from service.processes.server import Ending, Server
    from service.settings import list_of, threads_of
    from service.tracing import tracer_of

    with pool:
        access = access_of(settings)
        if settings.processes > 1:
            from prometheus_client import values

            # A replacement goes on counting in the files of its predecessor.
            values.ValueClass = values.MultiProcessValue(own_number)  # type: ignore[assignment]
        classifiers = load_classifiers(settings, pool, folders)
    catalogue = Catalogue(classifiers, settings)
    chores = Chores(catalogue, settings, None if access is None else access.keys)
    # The application runs the default model for its examples.
    inherited = (
        create_app(settings, classifiers, access=access, catalogue=catalogue)
        if threads_of(settings, usable_cpus()).run_before_fork
        else None
    )

    def is_lost() -> bool:
        return any(classifier.is_lost for classifier in catalogue.models.values())

    def serve(listener: socket.socket) -> int:
        if settings.processes > 1:
            # Not inherited: threads, and pages that are written to. Requests are told of files that have changed since.
            with contextlib.suppress(ArtefactChangedError):
                catalogue.models[settings.default_model].warm_up()
        app = inherited or create_app(settings, catalogue.models, access=access, catalogue=catalogue)
        follower = Follower(catalogue, chores.read, chores.send, app.state.service.note_models)
        app.state.service.repository.ask = follower.ask
        app.state.service.traces.tracer = tracer = tracer_of(__version__)
        # A process may have started with other models than its application.
        app.state.service.note_models()
        # A predecessor may have ended with some.
        app.state.service.metrics.waiting.set(0)
        server = Server(
            app,
            settings.log_level,
            is_lost,
            Ending(settings.drain_s, settings.grace_s, settings.processes == 1, beat),
            connections=connection_class(limits_of(settings), app.state.refuse, app.state.refused),
            tls=None if certificate is None else certificate.context(),
            trusted_proxies=list_of(settings.trusted_proxies),
            follow=chores.followed_by(follower),
            rpc=None if rpc_address is None else _rpc_server(rpc_address, settings, certificate),
        )
        try:
            return server.serve_on(listener)
        finally:
            if tracer is not None:
                tracer.close()

    return serve, chores


def _check_rpc(settings: Settings) -> None:
    """Raise `SettingsError` for gRPC without its library, or on the port of HTTP."""
    if settings.grpc_port is None:
        return
    if importlib.util.find_spec("grpc") is None:
        raise SettingsError(
            "LIPCERT_GRPC_PORT needs grpcio, which is not installed: `pip install 'lipcert[grpc]'`, or unset it"
        )
    if 0 != settings.grpc_port == settings.port:
        raise SettingsError(f"LIPCERT_GRPC_PORT and LIPCERT_PORT are both {settings.port}; set another one")


def _rpc_server(address: tuple[str, int], settings: Settings, certificate: Certificate | None) -> RpcServer:
    # After the fork: gRPC starts threads.
    from service.rpc.server import RpcServer

    return RpcServer(*address, settings, certificate)


class Chores:
    """Chores of the leading process besides serving: it reads keys and models again, so that a fork inherits them.

    Several processes have a parent, which leads them; a server of one process leads itself.
    """

    def __init__(self, catalogue: Catalogue, settings: Settings, keys: KeyRing | None) -> None:
        """Start nothing."""
        from service.processes.reloads import Board, Leader, Orders

        self._keys = keys
        self._catalogue = catalogue
        self._state: State | None = None
        self._board = Board() if settings.processes > 1 else None
        self._orders = Orders() if settings.processes > 1 else None
        self._follower: Follower | None = None
        self._leader = Leader(
            catalogue, settings, self._publish, lambda: self._follower is None or not self._follower.is_busy
        )

    def followed_by(self, follower: Follower) -> Callable[[], None]:
        """Return the function that a serving process calls several times a second; one that serves alone also leads."""
        if self._board is not None:
            return follower.look
        self._follower = follower
        signal.signal(signal.SIGHUP, lambda *_: self.hang_up())

        def lead_and_follow() -> None:
            follower.look()
            self._leader.step()

        return lead_and_follow

    def look(self) -> None:
        """Read keys again, and go on with orders; starts no thread."""
        if self._keys is not None:
            self._keys.refresh()
        if self._orders is not None:
            for order in self._orders.received():
                self._leader.ask(order)
        self._leader.step()

    def descriptors(self) -> list[int]:
        """Return the file descriptors that become readable when there is something to look at."""
        return [*self._leader.descriptors, *([] if self._orders is None else [self._orders.descriptor])]

    def hang_up(self) -> None:
        """Read the folder of models again."""
        from service.inference.catalogue import Order

        self._leader.ask(Order("reload"))

    def send(self, order: Order) -> bool:
        """Hand an order to the leader, from any process; return whether there is room for it."""
        if self._orders is not None:
            return self._orders.send(order)
        self._leader.ask(order)
        return True

    def read(self) -> State | None:
        """Return the state if it is a new one for this process."""
        if self._board is not None:
            return self._board.read()
        state, self._state = self._state, None
        return state

    def close(self) -> None:
        """End the running order."""
        self._leader.close()

    def _publish(self, state: State) -> None:
        if self._board is None:
            self._state = state
            return
        # A fork inherits both, or neither.
        if state.is_reading:
            self._catalogue.retain()
        else:
            self._catalogue.follow(state, warms=False)
        self._board.write(state)


def _certificate_of(settings: Settings) -> Certificate | None:
    """Return the certificate of the settings; raises `SettingsError` for one without a key or that cannot be used."""
    if settings.tls_certificate is None and settings.tls_key is None:
        return None
    from service.access.certificate import Certificate

    if settings.tls_certificate is None or settings.tls_key is None:
        raise SettingsError("LIPCERT_TLS_CERTIFICATE and LIPCERT_TLS_KEY belong together; set both, or unset both")
    return Certificate(settings.tls_certificate, settings.tls_key)


def warn_if_open(settings: Settings, address: str) -> None:
    """Warn where everybody beyond this machine is served without a key."""
    has_keys = settings.api_keys_file is not None or settings.api_keys
    if (
        not has_keys
        and not settings.allow_anonymous
        and not ipaddress.ip_address(address.partition("%")[0]).is_loopback
    ):
        _log.warning(
            "ANYBODY who reaches %s is served: there is no API key; set LIPCERT_API_KEYS_FILE (`lipcert keys new NAME` "
            "makes a key), LIPCERT_HOST=127.0.0.1, or LIPCERT_ALLOW_ANONYMOUS=1 if this is intended",
            address,
        )


def _with_processes(settings: Settings) -> Settings:
    """Return the settings with the number of processes; raises `SettingsError` for several where one is possible."""
    if settings.processes == 1:
        return settings
    from service.runtime.provider import missing_for_cuda
    from service.settings import threads_of

    obstacle = None
    if sys.platform != "linux":
        obstacle = "only Linux shares a port among processes; set LIPCERT_PROCESSES=1"
    elif settings.provider != "cpu" and missing_for_cuda() is None:
        obstacle = "one process has the GPU; set LIPCERT_PROCESSES=1, or LIPCERT_PROVIDER=cpu"
    if obstacle is None:
        return settings.model_copy(update={"processes": threads_of(settings, usable_cpus()).processes})
    if settings.processes > 1:
        raise SettingsError(f"LIPCERT_PROCESSES={settings.processes} is not available: {obstacle}")
    return settings.model_copy(update={"processes": 1})


def _share_counters(stack: contextlib.ExitStack, processes: int) -> None:
    """Count in files of a folder that exists as long as `stack`; called before `prometheus_client` is imported."""
    try:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lipcert-metrics-")))
        for number in range(-1, processes):
            for kind, size in _COUNTER_BYTES.items():
                with (folder / f"{kind}_{number}.db").open("wb") as file:
                    # Not sparse: writing to a mapped page for which the disk has no block ends a process (SIGBUS).
                    os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise SettingsError(
            f"LIPCERT_PROCESSES: several processes add up their metrics in a temporary folder, and it cannot be made "
            f"({error.strerror or error}); set TMPDIR to a folder that can be written, or LIPCERT_PROCESSES=1"
        ) from error
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
