"""`lipcert ray up`: a cluster of Ray on this machine that serves until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import logging
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from types import FrameType
from typing import Any, NoReturn

from service.errors import ClusterError
from service.processes.prefork import bind
from service.processes.serving import warn_if_open
from service.runtime.cpus import usable_cpus
from service.settings import PREFIX, Settings, read_settings

_log = logging.getLogger("service")

_READY_S = 60.0
"""In which the proxy answers once the replicas are ready."""
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""The least that Ray takes: requests do not pass through the store."""
DEFAULTS = {
    # A replica answers HTTP itself, behind HAProxy: without, one Python process has to pass on every request.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # A replica is otherwise kept for 30 seconds for balancers that do not see its end.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    # A busy machine takes longer than 5 seconds to start a process.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
    # uvicorn in a replica otherwise believes X-Forwarded-For of HAProxy, which passes on the header of any client.
    "FORWARDED_ALLOW_IPS": "",
    # Replicas otherwise run at a lower priority.
    "RAY_worker_niceness": "0",
}


def up(chosen: argparse.Namespace) -> int:
    """Run `lipcert ray up` and return the exit status.

    Args:
        chosen: the arguments of `service.cluster.arguments`.

    Raises:
        LipcertError: Ray, a setting, the port or a model keeps it from serving.
    """
    if importlib.util.find_spec("ray") is None:
        raise ClusterError("ray up needs Ray, which is not installed: `pip install 'lipcert[cpu,ray]'`")
    if chosen.models is not None:
        os.environ[f"{PREFIX}MODELS"] = str(chosen.models.absolute())
    if chosen.port is not None:
        os.environ[f"{PREFIX}PORT"] = str(chosen.port)
    # All requests come from the address of HAProxy.
    os.environ.setdefault(f"{PREFIX}CLIENT_SHARE", "1")
    settings = read_settings()
    # A port in use is reported before Ray starts.
    with bind(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
    warn_if_open(settings, host)
    with contextlib.suppress(KeyboardInterrupt), _served(settings, port, chosen.replicas) as url:
        _log.info("serving on %s with %d replicas - the playground is at %s/", url, chosen.replicas, url)
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()
        while True:
            signal.pause()
    return 0


@contextlib.contextmanager
def _served(settings: Settings, port: int, replicas: int) -> Generator[str]:
    """Start Ray, deploy, and yield the URL once it answers; end all of it afterwards."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # The variables count when the modules are imported.
    ray: Any = importlib.import_module("ray")
    serve: Any = importlib.import_module("ray.serve")
    from service.cluster.ray import app

    variables = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    try:
        with _interruptible():
            ray.init(
                "local",
                num_cpus=max(replicas, usable_cpus()),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {**variables, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
            )
        with _interruptible():
            try:
                serve.start(
                    http_options={"host": settings.host, "port": port}, logging_config={"enable_access_log": False}
                )
                serve.run(app({"replicas": replicas}), name="lipcert", logging_config={"enable_access_log": False})
            except (RuntimeError, ray.exceptions.RayError) as error:
                raise ClusterError(f"Ray Serve does not start: {error}") from error
            url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{port}"
            _wait_until_ready(url)
            yield url
    finally:
        # Without Ray, this would start it.
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()


@contextlib.contextmanager
def _interruptible() -> Generator[None]:
    """Turn SIGTERM and SIGINT into `KeyboardInterrupt`; Ray sets handlers of its own when it starts."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        raise KeyboardInterrupt

    before: Mapping[signal.Signals, Any] = {
        number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_until_ready(url: str) -> None:
    until_s = time.monotonic() + _READY_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5.0):
                return
        except (OSError, urllib.error.HTTPError) as error:
            if time.monotonic() > until_s:
                raise ClusterError(f"{url}/health/ready does not answer: {error}") from error
            time.sleep(0.1)
