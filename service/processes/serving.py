"""TODO: service/processes/serving.py."""

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

from service.artefact.proving import Provers
from service.errors import SettingsError
from service.runtime.cpus import usable_cpus

if TYPE_CHECKING:
    from service.settings import Settings

_log = logging.getLogger("service")

_DRAIN_S = 10
_GRACE_S = 5
_BACKLOG = 2048
_COLLECT_AFTER = 50_000


def serve_as(settings: Settings, provers: Provers) -> int:
    logging.getLogger().setLevel(settings.log_level.upper())
    logging.captureWarnings(True)
    from service.processes.prefork import bind, listen, serve_in_processes

    settings = _with_processes(settings)
    with contextlib.ExitStack() as stack:
        # Taken before the models are proved: a port in use is then reported at once.
        first = stack.enter_context(bind(settings.host, settings.port))
        if settings.processes > 1:
            _share_counters(stack)
        serve = _loaded(settings, provers)
        listeners = [stack.enter_context(listener) for listener in listen(first, settings.processes, _BACKLOG)]
        host, port = first.getsockname()[:2]
        _log.info("serving on http://%s:%d - the API is at /docs", f"[{host}]" if ":" in host else host, port)
        # What is there now stays: no collection of garbage has to look at it again.
        gc.freeze()
        gc.enable()
        # Requests leave hardly any garbage in cycles.
        gc.set_threshold(_COLLECT_AFTER)
        if settings.processes == 1:
            return serve(first)
        from prometheus_client.multiprocess import mark_process_dead

        serve_in_processes(listeners, serve, mark_process_dead, grace_s=_DRAIN_S + _GRACE_S)
    # Further signals do nothing. The interpreter would give that up before it ends, and one more would end the process.
    logging.shutdown()
    os._exit(0)


def _loaded(settings: Settings, provers: Provers) -> Callable[[socket.socket], int]:
    """Prove and load the models; what is returned serves on a socket, in this process or one that is forked from it."""
    from service.artefact.card import artefact_folders

    provers.start(artefact_folders(settings.models, settings.default_model), settings.provider)
    import uvicorn

    from service.api.app import create_app
    from service.inference.loading import load_classifiers
    from service.settings import threads_of

    with provers:
        classifiers = load_classifiers(settings, provers)
    # The application runs the default model for its examples.
    inherited = create_app(settings, classifiers) if threads_of(settings, usable_cpus()).run_before_fork else None

    def serve(listener: socket.socket) -> int:
        if settings.processes > 1:
            # What was not inherited: threads, and pages of its own.
            classifiers[settings.default_model].warm_up()
        config = uvicorn.Config(
            inherited or create_app(settings, classifiers),
            log_config=None,
            log_level=settings.log_level,
            # A line for each request costs more than reading it; /metrics counts them.
            access_log=settings.log_level == "debug",
            timeout_graceful_shutdown=_DRAIN_S,
            ws="none",
            # Nothing here asks who the client is or how it came.
            proxy_headers=False,
        )
        server = uvicorn.Server(config)
        server.run(sockets=[listener])
        return 0 if server.started else 1

    return serve


def _with_processes(settings: Settings) -> Settings:
    """With the number of processes that there will be; raises `SettingsError` for several where there can be one."""
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
        raise SettingsError(f"LIPCERT_PROCESSES={settings.processes} is not to be had: {obstacle}")
    return settings.model_copy(update={"processes": 1})


def _share_counters(stack: contextlib.ExitStack) -> None:
    """Count in files of a folder that is there as long as `stack`; before the library that counts is imported."""
    try:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lipcert-metrics-"))
    except OSError as error:
        raise SettingsError(
            f"LIPCERT_PROCESSES: several processes add up their metrics in a temporary folder, and none can be made "
            f"({error.strerror or error}); set TMPDIR to a folder that can be written, or LIPCERT_PROCESSES=1"
        ) from error
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
