"""`python -m service`: serve the models of `LIPCERT_MODELS` over HTTP; settings in `service.settings`.

`python -m service audit ANSWER.json IMAGE --model ARTEFACT`: whether an answer that was kept still holds, see
docs/audit.md.

Exit status: 0 stopped on request, or the answer holds; 1 a model, the provider or the port is not to be had, or the
answer does not hold or cannot be checked; 2 a setting or the command is not valid.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from service.runtime.cpus import usable_cpus
from service.errors import LipcertError, SettingsError
from service.artefact.proving import Provers

if TYPE_CHECKING:
    from service.settings import Settings

_log = logging.getLogger("service")

_DRAIN_S = 10
_GRACE_S = 5
_BACKLOG = 2048
_COLLECT_AFTER = 50_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of `python -m service`; without one, serve. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    parser.set_defaults(run=_serve)
    commands = parser.add_subparsers(title="commands")
    commands.add_parser("serve", help="serve over HTTP (what happens without a command)").set_defaults(run=_serve)
    audit = commands.add_parser(
        "audit",
        help="check an answer that was kept",
        description="Derive class and certified radius of one answer of POST /predict anew, in ball arithmetic and "
        "without the server's code. Prints `holds: ...` (exit 0), or `does not hold: ...` for each check that "
        "failed (exit 1).",
    )
    audit.add_argument("answer", type=Path, metavar="ANSWER.json", help="the answer, as it was received")
    audit.add_argument("image", type=Path, metavar="IMAGE", help="the image file that was sent, or the npy array")
    audit.add_argument("--model", type=Path, required=True, metavar="ARTEFACT", help="the folder of the model")
    audit.set_defaults(run=_audit)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        return chosen.run(chosen)
    except SettingsError as error:
        _log.error("%s", error)
        return 2
    except LipcertError as error:
        _log.error("%s", error)
        return 1


def _audit(chosen: argparse.Namespace) -> int:
    # Imported here: serving does not load the audit's arithmetic, nor the audit the runtime that it checks.
    from service.audit import audit

    verdict = audit(chosen.answer, chosen.image, chosen.model)
    sys.stdout.write("".join(f"{line}\n" for line in verdict.lines))
    return 0 if verdict.holds else 1


def _serve(_: argparse.Namespace) -> int:
    stopped = False

    def stop(signal_number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        del signal_number, frame
        stopped = True
        raise SystemExit(0)

    # uvicorn raises the signal again once it has drained the connections: this ends the process with status 0. Before
    # it runs, the same handler ends the loading.
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop_signal, stop)
    # Nothing that is loaded now becomes garbage: looking for it would take a sixth of the time.
    gc.disable()
    try:
        # First of all, so that they load what they need while this process does: hence the imports below it.
        with Provers(usable_cpus()) as provers:
            from service.settings import read_settings

            return _serve_as(read_settings(), provers)
    except Exception:
        # An extension module that is just being imported makes an ImportError of what the handler raised.
        if stopped:
            return 0
        raise
    finally:
        gc.enable()


def _serve_as(settings: Settings, provers: Provers) -> int:
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

    from service.api.app import create_app, load_classifiers
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
    from service.runtime.engine import missing_for_cuda
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


if __name__ == "__main__":
    sys.exit(main())
