"""`lipcert ray up` in a process of its own, and a client of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from server_process import without_settings

ROOT = Path(__file__).resolve().parents[1]
STOP_S = 120.0
"""Most time to stop on a busy machine."""


class RayServer:
    """A Ray of this machine with one replica or more; a context manager that stops it as Ctrl-C does."""

    def __init__(self, settings: Mapping[str, object], replicas: int = 1) -> None:
        """Start it, and wait until it is ready.

        Args:
            settings: by field of `service.settings.Settings`.
            replicas: number of replicas.
        """
        variables = {f"LIPCERT_{name.upper()}": str(value) for name, value in settings.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "ray", "up", "--replicas", str(replicas), "--port", "0"],
            cwd=ROOT,
            env=without_settings() | variables,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        assert self.process.stdout is not None
        self.url = next((line.strip() for line in self.process.stdout if line.startswith("http")), "")
        assert self.url, f"ended with status {self.process.wait()}"

    def stop(self) -> int:
        """Return the exit status."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(STOP_S)

    def __enter__(self) -> RayServer:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.stop()


class RemoteClient:
    """Requests as those of `client.Client`, to a URL; there is no application here to change."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """As `httpx.request`."""
        return self._http.request(method, path, **arguments)

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        """GET."""
        return self.request("GET", path, **arguments)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        """POST."""
        return self.request("POST", path, **arguments)
