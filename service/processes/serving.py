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
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from service.artefact.pool import VerifierPool
from service.errors import SettingsError
from service.runtime.cpus import usable_cpus

if TYPE_CHECKING:
    from service.settings import Settings

_log = logging.getLogger("service")

_GRACE_S = 5
"""Seconds for the end of a process beyond those for its open requests."""
_BACKLOG = 2048
_COLLECT_AFTER = 50_000
"""Allocations between two garbage collections: requests leave hardly any garbage in cycles."""


def run_server(settings: Settings, pool: VerifierPool) -> int:
    """Serve until a signal and return the exit status.

    Raises:
        LipcertError: a setting, the port, a model or the provider keeps the server from starting.
    """
    logging.getLogger().setLevel(settings.log_level.upper())
    logging.captureWarnings(True)
    from service.processes.prefork import bind, listen, serve_in_processes

    settings = _with_processes(settings)
    with contextlib.ExitStack() as stack:
        # Taken before the models are verified: a port in use is then reported at once.
        first = stack.enter_context(bind(settings.host, settings.port))
        if settings.processes > 1:
            _share_counters(stack)
        serve = _loaded(settings, pool)
        listeners = [stack.enter_context(listener) for listener in listen(first, settings.processes, _BACKLOG)]
        host, port = first.getsockname()[:2]
        _log.info("serving on http://%s:%d - the API is at /docs", f"[{host}]" if ":" in host else host, port)
        # All objects of the start stay: no collection has to look at them again.
        gc.freeze()
        gc.enable()
        gc.set_threshold(_COLLECT_AFTER)
        if settings.processes == 1:
            return serve(first)
        from prometheus_client.multiprocess import mark_process_dead

        from service.processes.server import DRAIN_S

        serve_in_processes(listeners, serve, mark_process_dead, grace_s=DRAIN_S + _GRACE_S)
    # Signals do nothing here. The interpreter would restore them before it ends, and one more would end the process
    # with another status.
    logging.shutdown()
    os._exit(0)


def _loaded(settings: Settings, pool: VerifierPool) -> Callable[[socket.socket], int]:
    """Load the models; return a function that serves on a socket, in this process or in one forked from it."""
    from service.artefact.card import artefact_folders

    folders = artefact_folders(settings.models, settings.default_model)
    pool.start(folders, (settings.proof_seconds, settings.proof_bytes, settings.proof_work))
    from service.api.app import create_app
    from service.connection.limits import limits_of
    from service.connection.protocol import connection_class
    from service.inference.loading import load_classifiers
    from service.processes.server import Server
    from service.settings import threads_of

    with pool:
        classifiers = load_classifiers(settings, pool)
    # The application runs the default model for its examples.
    inherited = create_app(settings, classifiers) if threads_of(settings, usable_cpus()).run_before_fork else None

    def is_lost() -> bool:
        return any(classifier.is_lost for classifier in classifiers.values())

    def serve(listener: socket.socket) -> int:
        if settings.processes > 1:
            # Not inherited: threads, and pages that are written to.
            classifiers[settings.default_model].warm_up()
        app = inherited or create_app(settings, classifiers)
        connections = connection_class(limits_of(settings), app.state.refuse)
        return Server(app, settings.log_level, is_lost, connections).serve_on(listener)

    return serve


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


def _share_counters(stack: contextlib.ExitStack) -> None:
    """Count in files of a folder that exists as long as `stack`; called before `prometheus_client` is imported."""
    try:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lipcert-metrics-"))
    except OSError as error:
        raise SettingsError(
            f"LIPCERT_PROCESSES: several processes add up their metrics in a temporary folder, and it cannot be made "
            f"({error.strerror or error}); set TMPDIR to a folder that can be written, or LIPCERT_PROCESSES=1"
        ) from error
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
