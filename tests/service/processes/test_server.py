"""A server whose GPU is lost says so, ends with its own status, and can be started again."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from encoding import npy
from server_process import ServerProcess

from service.processes.server import DEVICE_LOST_STATUS, Server

ROOT = Path(__file__).resolve().parents[3]

# The GPU fails for good when the file is there.
_SERVER = """
import os, sys
import pytest
from fake_gpu import FakeGpu, failed_call
failure = failed_call(719, "unspecified launch failure")
lost = lambda size: failure if os.path.exists({flag!r}) else None
FakeGpu(run_failure=lost).install(pytest.MonkeyPatch())
from service.__main__ import main
sys.exit(main([]))
"""


class GpuServer(ServerProcess):
    """`python -m service` on a GPU that can be lost."""

    def __init__(self, zoo: Path, folder: Path) -> None:
        self.flag = folder / "lost"
        super().__init__(
            [sys.executable, "-c", _SERVER.format(flag=str(self.flag))],
            {"provider": "cuda", "models": zoo},
            PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        )
        self.wait_started(1)
        found = re.search(r"serving on http://127.0.0.1:(\d+)", self.log)
        assert found is not None, self.log
        self.port = int(found[1])

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, dict[str, object], str | None]:
        """Status, JSON and Retry-After of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with closing(connection):
            connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/x-npy"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.getheader("Retry-After")


@pytest.fixture
def server(zoo: Path, tmp_path: Path) -> Iterator[GpuServer]:
    server = GpuServer(zoo, tmp_path)
    yield server
    server.close()


def test_a_lost_gpu_makes_the_server_unready_and_ends_it_with_a_status_of_its_own(server: GpuServer) -> None:
    body = npy(np.zeros((1, 4, 5)))
    assert server.ask("/predict", body)[0] == 200
    assert server.ask("/health/ready")[0] == 200
    server.flag.touch()
    started_s = time.monotonic()
    status, problem, retry_after = server.ask("/predict", body)
    assert (status, retry_after) == (503, "1")
    assert problem["type"] == "urn:problem-type:lipcert:device-lost"
    assert server.ask("/health/ready")[0] == 503
    assert time.monotonic() - started_s < 1.0 + 1.0  # a second, and one for a busy machine
    assert server.ask("/health/live")[0] == 200
    assert server.process.wait(30) == DEVICE_LOST_STATUS
    server._reader.join()
    assert "the GPU is lost: CUDA failure 719: unspecified launch failure" in server.log
    assert f"ends with status {DEVICE_LOST_STATUS}" in server.log
    assert "Traceback" not in server.log


def test_a_server_on_a_gpu_stops_on_a_signal_with_status_0(server: GpuServer) -> None:
    server.process.terminate()
    assert server.process.wait(30) == 0


def test_the_status_of_a_lost_gpu_is_the_status_of_nothing_else() -> None:
    # 0 stopped, 1 an error at start, 2 a setting, 3 undecided; above 128 a signal.
    assert 3 < DEVICE_LOST_STATUS < 128


def test_a_worker_that_waits_for_the_device_does_not_keep_the_process_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[tuple[float, tuple[int, ...]]] = []

    class Timer:
        daemon = False

        def __init__(self, seconds: float, function: object, arguments: tuple[int, ...]) -> None:
            assert function is os._exit
            timers.append((seconds, arguments))

        def start(self) -> None:
            assert self.daemon

    monkeypatch.setattr("service.processes.server.threading.Timer", Timer)
    lost = False
    server = Server(None, "info", lambda: lost)  # type: ignore[arg-type]

    async def ticks() -> list[bool]:
        return [await server.on_tick(number) for number in range(2)]

    assert asyncio.run(ticks()) == [False, False]
    assert timers == []
    lost = True
    assert asyncio.run(ticks()) == [False, False]
    ((seconds, arguments),) = timers
    assert arguments == (DEVICE_LOST_STATUS,)
    assert seconds > 10
    monkeypatch.setattr("service.processes.server.time.monotonic", lambda: float("inf"))
    assert asyncio.run(ticks()) == [True, True]
