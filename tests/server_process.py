"""A server of a test, in processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence

from process_table import children_of, is_running, wait_until


def without_settings() -> dict[str, str]:
    """Return the environment of this process without the settings of a server."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("LIPCERT_")}


class ServerProcess:
    """A server in a new process group, as a terminal starts it, without settings of this process; its log is read."""

    def __init__(self, command: Sequence[str], settings: Mapping[str, object], **environment: str) -> None:
        chosen = {"port": 0, "provider": "cpu", "default_model": "grey"} | settings
        variables = {f"LIPCERT_{name.upper()}": str(value) for name, value in chosen.items()}
        self.process = subprocess.Popen(
            command,
            env={**without_settings(), **environment, **variables},
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self._lines.extend(iter(self.process.stderr.readline, ""))

    @property
    def log(self) -> str:
        return "".join(self._lines)

    @property
    def children(self) -> list[int]:
        return [pid for pid in children_of(self.process.pid) if is_running(pid)]

    def wait_started(self, count: int) -> None:
        """Wait until that many processes have started."""
        started = "Application startup complete"
        wait_until(lambda: self.log.count(started) >= count or self.process.poll() is not None)
        assert self.process.poll() is None, self.log

    def close(self) -> None:
        """Kill the process group; a second call does nothing."""
        assert self.process.stderr is not None
        if self.process.stderr.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()
