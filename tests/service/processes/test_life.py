"""A running server loses no request when it stops, and a process that is stuck or hangs is ended and replaced.

`make thorough` repeats the stops under load twenty times; `make test` makes one of each kind.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from encoding import npy
from process_table import is_running, wait_until
from server_process import ServerProcess
from thorough import often

from service.processes.server import STUCK_STATUS

ROOT = Path(__file__).resolve().parents[3]
STOPS = often(1, 20)
_CLIENTS = 12

# A black image stops its worker for as long as the file `stuck` is there, GET /models the event loop. The limits of
# hanging are shortened; the watchdog of a process comes before its parent, if its thread runs.
_SERVER = """
import pathlib, sys, time
import service.api.routes as routes
import service.inference.classifier as classifier
import service.processes.prefork as prefork
import service.processes.server as server
folder = pathlib.Path({folder!r})
predict, describe = classifier.View.predict, routes.describe
def stuck(self, image_NCHW):
    while not image_NCHW.any() and (folder / "stuck").exists():
        (folder / "reached").touch()
        time.sleep(0.01)
    return predict(self, image_NCHW)
def hang(*arguments):
    while (folder / "hang").exists():
        time.sleep(0.01)
    return describe(*arguments)
classifier.View.predict, routes.describe = stuck, hang
server._HANG_S, prefork._HANG_S = {hang_s}, {hang_s} + 1.0
from service.__main__ import main
sys.exit(main([]))
"""


def request(body: bytes, *headers: str, path: str = "/predict") -> bytes:
    fields = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/x-npy", f"Content-Length: {len(body)}"]
    return "\r\n".join([*fields, *headers, "", ""]).encode() + body


_IMAGE = npy(np.full((1, 4, 5), 0.5))
_STUCK_IMAGE = npy(np.zeros((1, 4, 5)))


class Server(ServerProcess):
    """A server that can be stopped in a worker and in the event loop."""

    def __init__(self, zoo: Path, folder: Path, hang_s: float = 600.0, **settings: object) -> None:
        self.folder = folder
        self.n_processes = int(str(settings.get("processes", 1)))
        super().__init__(
            [sys.executable, "-c", _SERVER.format(folder=str(folder), hang_s=hang_s)],
            {"models": zoo, "drain_s": 0.3} | settings,
            PYTHONPATH=str(ROOT),
        )
        self.wait_started(self.n_processes)
        found = re.search(r"serving on http://127.0.0.1:(\d+)", self.log)
        assert found is not None, self.log
        self.address = "127.0.0.1", int(found[1])

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, 60)

    def get(self, path: str) -> tuple[int, dict[str, object]]:
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def send(self, body: bytes, *headers: str) -> socket.socket:
        connection = self.connect()
        connection.sendall(request(body, *headers))
        return connection

    def block(self, what: str) -> Path:
        flag = self.folder / what
        flag.touch()
        return flag

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


Start = Callable[..., Server]


@pytest.fixture
def start(zoo: Path, tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def start(**settings: object) -> Server:
            server = Server(zoo, tmp_path, **settings)  # type: ignore[arg-type]
            stack.callback(server.close)
            return server

        yield start


def read(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


class Load:
    """Clients that ask all the time and count what they get: some with a connection for each request, some that keep
    theirs until the server closes it."""

    def __init__(self, server: Server) -> None:
        self.seen: collections.Counter[str] = collections.Counter()
        self._address = server.address
        self._is_over = False
        self._threads = [threading.Thread(target=self._run, args=(number % 2 == 0,)) for number in range(_CLIENTS)]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.seen["answered"] > 5 * _CLIENTS)

    def _run(self, keeps: bool) -> None:
        while not self._is_over:
            try:
                # The kernel may take a second try, which it makes after a second.
                connection = socket.create_connection(self._address, 20)
            except OSError:
                self.seen["not accepted"] += 1
                time.sleep(0.02)
                continue
            with connection:
                while self._ask(connection, keeps) and not self._is_over:
                    pass

    def _ask(self, connection: socket.socket, keeps: bool) -> bool:
        """Return whether the connection can be used again."""
        try:
            connection.sendall(request(_IMAGE) if keeps else request(_IMAGE, "Connection: close"))
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.seen[f"LOST {error!r}"] += 1
            return False
        self.seen["answered" if answer.status == 200 else f"refused with {answer.status}"] += 1
        return keeps and not answer.will_close

    def stop(self) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join()

    @property
    def lost(self) -> list[str]:
        return [what for what in self.seen if what.startswith("LOST")]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("repeat", range(STOPS))
def test_a_stop_under_load_loses_no_request(start: Start, processes: int, repeat: int) -> None:
    server = start(processes=processes)
    load = Load(server)
    assert server.stop() == 0
    load.stop()
    assert load.lost == [], load.seen
    assert "Traceback" not in server.log


def test_a_rolling_restart_of_the_processes_under_load_loses_no_request(start: Start) -> None:
    server = start(processes=2)
    load = Load(server)
    for repeat in range(2 * STOPS):
        victim = server.children[repeat % 2]
        os.kill(victim, signal.SIGTERM)
        wait_until(lambda pid=victim: not is_running(pid))
        server.wait_started(3 + repeat)
    load.stop()
    assert load.lost == [], load.seen
    assert not any(what.startswith("refused") for what in load.seen), load.seen
    assert server.stop() == 0
    assert "Traceback" not in server.log


def test_a_server_that_stops_is_not_ready_and_goes_on_until_the_drain_is_over(start: Start) -> None:
    server = start(drain_s=2)
    with contextlib.closing(http.client.HTTPConnection(*server.address, timeout=60)) as kept:
        kept.request("GET", "/health/live")
        kept.getresponse().read()
        server.process.terminate()
        wait_until(lambda: "Shutting down" in server.log)
        status, answer = server.get("/health/ready")
        assert (status, answer["reasons"]) == (503, ["the server is stopping"])
        assert server.get("/health/live")[0] == 200
        # A second signal changes nothing.
        server.process.terminate()
        kept.request("POST", "/predict", _IMAGE, {"Content-Type": "application/x-npy"})
        response = kept.getresponse()
        assert (response.status, response.getheader("Connection")) == (200, "close")
        assert json.loads(response.read())["model"] == "grey"
    assert server.process.wait(60) == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_ends_in_time_with_status_0_and_a_503_for_who_waits_for_a_stuck_worker(
    start: Start, processes: int
) -> None:
    server = start(processes=processes, grace_s=1)
    server.block("stuck")
    waiting = server.send(_STUCK_IMAGE)
    wait_until((server.folder / "reached").exists)
    started_s = time.monotonic()
    server.process.terminate()
    answer = read(waiting)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"this server is stopping" in answer
    assert server.process.wait(60) == 0
    # Drain 0.3, sockets 1, grace 1, last answers 1, and the rest for a busy machine.
    assert time.monotonic() - started_s < 15


def test_a_stuck_worker_ends_the_process_with_a_status_of_its_own(start: Start) -> None:
    server = start(stuck_s=2, workers=2)
    server.block("stuck")
    stuck = server.send(_STUCK_IMAGE)
    wait_until(lambda: server.get("/health/ready")[0] == 503)
    status, answer = server.get("/health/live")
    assert (status, answer) == (200, {"status": "live"})
    with server.send(_IMAGE, "Connection: close") as other:
        assert other.recv(100).startswith(b"HTTP/1.1 200 ")
    assert read(stuck).startswith(b"HTTP/1.1 503 ")
    assert server.process.wait(60) == STUCK_STATUS
    assert "a worker has been stuck for 2 s in a forward pass" in server.log


def test_of_several_processes_one_with_a_stuck_worker_is_replaced(start: Start) -> None:
    server = start(processes=2, stuck_s=1)
    flag = server.block("stuck")
    stuck = server.send(_STUCK_IMAGE)
    wait_until(lambda: f"ended with exit status {STUCK_STATUS}" in server.log)
    assert read(stuck).startswith(b"HTTP/1.1 503 ")
    flag.unlink()
    server.wait_started(3)
    assert server.stop() == 0


def test_a_process_whose_event_loop_hangs_ends(start: Start) -> None:
    server = start(hang_s=2)
    server.block("hang")
    with server.connect() as connection:
        connection.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert server.process.wait(60) == STUCK_STATUS
    assert f"the event loop hangs; the process ends with status {STUCK_STATUS}" in server.log
    # Where it hangs.
    assert "in hang" in server.log


@pytest.mark.parametrize("how", ["hang", "SIGSTOP"])
def test_a_process_that_hangs_or_is_stopped_is_replaced(start: Start, how: str) -> None:
    server = start(hang_s=2, processes=2)
    before = server.children
    with server.connect() as connection:
        if how == "hang":
            flag = server.block("hang")
            connection.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: f"ended with exit status {STUCK_STATUS}" in server.log)
            flag.unlink()
        else:
            os.kill(before[0], signal.SIGSTOP)
            wait_until(lambda: f"server process {before[0]} ended with SIGKILL" in server.log)
            assert f"server process {before[0]} hangs and is killed" in server.log
    server.wait_started(3)
    assert len(set(server.children) - set(before)) == 1
    assert server.get("/health/ready")[0] == 200
    assert server.stop() == 0


def test_a_pause_of_all_processes_kills_none(start: Start) -> None:
    server = start(hang_s=2, processes=2)
    before = server.children
    os.killpg(server.process.pid, signal.SIGSTOP)
    time.sleep(6)
    os.killpg(server.process.pid, signal.SIGCONT)
    time.sleep(1)
    assert server.children == before
    assert server.stop() == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_sighup_ends_no_process(start: Start, processes: int) -> None:
    server = start(processes=processes)
    before = server.children
    os.killpg(server.process.pid, signal.SIGHUP)
    assert server.get("/health/ready")[0] == 200
    # A process beside them reads the folder of models again.
    assert set(before) <= set(server.children)
    assert server.stop() == 0
    assert "ended with" not in server.log


def test_a_server_without_descriptors_for_more_connections_goes_on(start: Start) -> None:
    server = start()
    limit = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) + 8
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    connections = [server.connect() for _ in range(30)]
    try:
        with contextlib.suppress(OSError):
            connections[0].sendall(request(_IMAGE))
            assert connections[0].recv(100).startswith(b"HTTP/1.1 200 ")
    finally:
        for connection in connections:
            connection.close()

    def is_ready() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return server.get("/health/ready")[0] == 200
        return False

    wait_until(is_ready)
    assert server.stop() == 0
