"""A server as a tree of processes: started, waited for, measured through /proc, and stopped to the last one.

Some servers start daemons that leave the tree. All of them inherit one environment variable, by which they are found.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_MARK = "SERVING_BENCH_SERVER"
_STOP_S = 20.0
_POLL_S = 0.01
_LOG_TAIL = 2000


class ServerError(Exception):
    """The server did not start or did not answer; the message has the end of its log."""


@dataclass(frozen=True)
class Usage:
    """Of all processes of a server."""

    cpu_s: float
    """Processor time since the start, user and system, ended children included."""
    rss_mb: float
    """Sum of the resident sets, in 10^6 bytes: what several processes share counts for each."""
    pss_mb: float
    """Sum of the proportional sets: what is shared counts once."""
    processes: int


class Server:
    """A server under measurement; a context manager that stops it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], port: int, log: Path, cwd: Path) -> None:
        self.port = port
        self.ready_s = float("nan")
        """From the start of the process to the first 200 of its readiness path."""
        self._mark = uuid.uuid4().hex
        self._seen: dict[int, str] = {}
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = log.open("wb")
        # A LIPCERT_ setting of the shell must not reach a server, nor a proxy its clients.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith("LIPCERT_") and not name.lower().endswith("_proxy")
        }
        # Of its own, and removed with it: some leave megabytes behind.
        self._temporary = tempfile.mkdtemp(prefix="bench-")
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env={**inherited, **environment, "TMPDIR": self._temporary, _MARK: self._mark},
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self, path: str, deadline_s: float) -> None:
        """Poll `path` until it is answered with 200; sets `ready_s`.

        Raises:
            ServerError: the process ended, or it is not ready in time.
        """
        while True:
            if _status(self.port, path) == http.HTTPStatus.OK:
                self.ready_s = time.monotonic() - self._started
                return
            if self._process.poll() is not None:
                raise ServerError(
                    f"ended with status {self._process.returncode} before it was ready:\n{self.log_tail()}"
                )
            if time.monotonic() - self._started > deadline_s:
                raise ServerError(f"not ready within {deadline_s:g} s:\n{self.log_tail()}")
            time.sleep(_POLL_S)

    def usage(self) -> Usage:
        """What all its processes have used until now, and hold."""
        pids = self._pids()
        memory = [_memory_mb(pid) for pid in pids]
        return Usage(
            cpu_s=sum(_cpu_s(pid) for pid in pids),
            rss_mb=sum(rss for rss, _ in memory),
            pss_mb=sum(pss for _, pss in memory),
            processes=len(pids),
        )

    def log_tail(self) -> str:
        """The end of what it printed."""
        self._file.flush()
        return self._log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:].strip()

    def stop(self) -> None:
        """Ask it to end, and end what is left of it after a while."""
        self._pids()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        end = time.monotonic() + _STOP_S
        while (left := self._pids()) and time.monotonic() < end:
            # Daemons of a server that is gone are asked as well.
            if self._process.poll() is not None:
                _signal_all(left, signal.SIGTERM)
            time.sleep(0.1)
        while left := self._pids():
            _signal_all(left, signal.SIGKILL)
            time.sleep(0.1)
        self._process.wait()
        self._file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _pids(self) -> list[int]:
        """Living processes that carry the mark, their descendants, and all that once were among these.

        A process that renames itself loses the mark, and an orphan its parent; a start time tells a process from a
        later one of the same number.
        """
        mark = f"{_MARK}={self._mark}".encode()
        children: dict[int, list[int]] = {}
        started: dict[int, str] = {}
        waiting: list[int] = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            pid = int(folder.name)
            try:
                # After the name in parentheses, which may hold blanks: state, parent; the start time is field 22.
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] == "Z":
                    continue
                started[pid] = fields[19]
                children.setdefault(int(fields[1]), []).append(pid)
                if self._seen.get(pid) == fields[19] or mark in (folder / "environ").read_bytes().split(b"\0"):
                    waiting.append(pid)
            except OSError:
                # Ended in the meantime, or of another user.
                continue
        found: set[int] = set()
        while waiting:
            pid = waiting.pop()
            if pid not in found:
                found.add(pid)
                waiting += children.get(pid, [])
        self._seen |= {pid: started[pid] for pid in found if pid in started}
        return sorted(found)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _status(port: int, path: str) -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _signal_all(pids: Sequence[int], which: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, which)
        except ProcessLookupError:
            continue


def _cpu_s(pid: int) -> float:
    try:
        stat = (Path("/proc") / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    # After the name in parentheses, which may hold blanks: utime, stime, cutime, cstime are fields 14 to 17.
    fields = stat.rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def _memory_mb(pid: int) -> tuple[float, float]:
    try:
        text = (Path("/proc") / str(pid) / "smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0.0, 0.0
    kilobytes = {
        name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in text.splitlines()[1:])
    }
    return kilobytes.get("Rss", 0) * 1024 / 1e6, kilobytes.get("Pss", 0) * 1024 / 1e6
