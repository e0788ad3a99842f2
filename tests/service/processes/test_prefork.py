"""Several server processes act as one server, and all of them end with it, even if it is killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from encoding import npy
from process_table import children_of, is_running, wait_until
from server_process import ServerProcess

from service.api.app import limits_of
from service.errors import PortError, SettingsError
from service.inference.classifier import Classifier
from service.processes import serving
from service.processes.prefork import Watch, bind, listen
from service.runtime import provider
from service.runtime.cpus import usable_cpus
from service.settings import Settings, Threads

_HEADERS = {"Content-Type": "application/x-npy"}


class Server(ServerProcess):
    """`python -m service`."""

    def __init__(self, zoo: Path, folder: Path, **settings: object) -> None:
        self.temporary = Path(tempfile.mkdtemp(dir=folder))
        # Threads of the BLAS library would hide those that must not exist before the fork.
        environment = {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        super().__init__([sys.executable, "-m", "service"], {"models": zoo, "processes": 2} | settings, **environment)

    def count(self, text: str) -> int:
        return self.log.count(text)

    def wait_ready(self, processes: int = 2) -> None:
        self.wait_started(processes)

    @property
    def url(self) -> str:
        found = re.search(r"serving on (http://\S+)", self.log)
        assert found is not None, self.log
        return found[1]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Process that accepted a new connection, and its answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, body, _HEADERS)
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status == 200, content
            inode = accepted(self.port, connection.sock.getsockname()[1])
            (holder,) = (pid for pid in self.children if f"socket:[{inode}]" in links(pid).values())
            return holder, content

    def ask_all(self, path: str, body: bytes | None = None) -> list[tuple[int, bytes]]:
        """Ask until every process has answered."""
        missing = set(self.children)
        answers: list[tuple[int, bytes]] = []
        while missing:
            answers.append(self.ask(path, body))
            missing.discard(answers[-1][0])
        return answers

    @property
    def predicted(self) -> float:
        """Predictions of model `grey` in /metrics."""
        found = re.search(rb'lipcert_predictions_total{model="grey"} (\S+)', self.ask("/metrics")[1])
        return 0.0 if found is None else float(found[1])

    def assert_ended_well(self, *expected: str) -> None:
        status = self.process.wait(30)
        # Every writer has ended.
        self._reader.join(30)
        assert not self._reader.is_alive()
        assert status == 0, self.log
        for trouble in {"Traceback", "Exception", "ended with", "is killed"} - set(expected):
            assert trouble not in self.log
        assert list(self.temporary.iterdir()) == []


class Servers(contextlib.ExitStack):
    """Starts servers, and kills those that still run."""

    def __init__(self, zoo: Path, folder: Path) -> None:
        super().__init__()
        self._zoo = zoo
        self._folder = folder

    def __call__(self, **settings: object) -> Server:
        server = Server(self._zoo, self._folder, **settings)
        self.callback(server.close)
        return server


@pytest.fixture
def servers(zoo: Path, tmp_path: Path) -> Iterator[Servers]:
    with Servers(zoo, tmp_path) as servers:
        yield servers


@pytest.fixture(scope="module")
def shared(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Server for tests that only send requests."""
    with Servers(zoo, tmp_path_factory.mktemp("shared")) as servers:
        server = servers()
        server.wait_ready()
        yield server
        server.process.terminate()
        server.assert_ended_well()


def accepted(port: int, client_port: int) -> str:
    """Inode of the server's end of a connection."""
    for fields in map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:]):
        if [int(fields[place].rsplit(":", 1)[1], 16) for place in (1, 2)] == [port, client_port]:
            return fields[9]
    raise LookupError(f"no connection from {client_port} to {port}")


def links(pid: int) -> dict[int, str]:
    """Targets of the descriptors of a process."""
    found: dict[int, str] = {}
    for descriptor in (Path("/proc") / str(pid) / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(descriptor.name)] = str(descriptor.readlink())
    return found


def pipes_of(pid: int, mode: int) -> set[str]:
    """Pipes that a process reads (os.O_RDONLY) or writes (os.O_WRONLY)."""
    found: set[str] = set()
    for descriptor, link in links(pid).items():
        with contextlib.suppress(FileNotFoundError):
            information = (Path("/proc") / str(pid) / "fdinfo" / str(descriptor)).read_text()
            flags = int(information.split("flags:")[1].split()[0], 8)
            if link.startswith("pipe:") and flags & os.O_ACCMODE == mode:
                found.add(link)
    return found


def listening(pid: int) -> set[str]:
    """Sockets of a process that listen."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return {f"socket:[{fields[9]}]" for fields in lines if fields[3] == "0A"} & set(links(pid).values())


def threads(pid: int) -> int:
    return len(list((Path("/proc") / str(pid) / "task").iterdir()))


def image(channels: int = 1) -> np.ndarray:
    return np.random.default_rng(3).random((channels, 4, 5))


def test_all_processes_answer_as_one_process_does(shared: Server, classifiers: Mapping[str, Classifier]) -> None:
    expected = classifiers["grey"].predict(image()[np.newaxis])[0]
    answers = shared.ask_all("/predict", npy(image()))
    assert len({pid for pid, _ in answers}) == 2
    for _, content in answers:
        answer = json.loads(content)
        assert answer["digest"] == classifiers["grey"].digest
        assert answer["class_id"] == expected.class_id
        assert answer["certificate"]["radius"] == expected.radius


def test_metrics_of_every_process_are_the_sum_of_all(shared: Server) -> None:
    before = shared.predicted
    asked = len(shared.ask_all("/predict", npy(image())))
    for _, content in shared.ask_all("/metrics"):
        assert f'lipcert_predictions_total{{model="grey"}} {before + asked}'.encode() in content
        assert b"\nlipcert_waiting 0.0" in content
        assert re.findall(rb'\nlipcert_model_info{.*model="grey".*} (\S+)', content) == [b"1.0"]


def test_each_process_holds_its_own_socket_and_not_the_life_of_the_others(shared: Server) -> None:
    one, other = shared.children
    assert len(listening(one)) == len(listening(other)) == 1
    assert listening(one) | listening(other) == listening(shared.process.pid)
    read = pipes_of(one, os.O_RDONLY) & pipes_of(other, os.O_RDONLY) & pipes_of(shared.process.pid, os.O_RDONLY)
    # What children write as well are their orders to load and unload models.
    lifelines = read - (pipes_of(one, os.O_WRONLY) | pipes_of(other, os.O_WRONLY))
    assert len(lifelines) == 1
    assert lifelines < pipes_of(shared.process.pid, os.O_WRONLY)


# With two threads in an inference a process loads the default model itself, with one it inherits the loaded model.
@pytest.mark.parametrize("threads", [1, 2])
def test_the_replacement_of_a_process_refuses_an_artefact_that_has_changed(
    zoo: Path, tmp_path: Path, threads: int
) -> None:
    models = Path(shutil.copytree(zoo, tmp_path / "models"))
    with Servers(models, tmp_path) as servers:
        server = servers(threads=threads)
        server.wait_ready()
        path = models / "grey" / "model.onnx"
        content = path.read_bytes()
        path.write_bytes(b"another model")
        wait_until(lambda: server.count("model grey: ") == 2)
        os.kill(server.children[0], signal.SIGKILL)
        server.wait_ready(processes=3)
        wait_until(lambda: server.count("model grey: ") == 3)
        for _ in range(10):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            with contextlib.closing(connection):
                connection.request("POST", "/predict", npy(image()), _HEADERS)
                answer = connection.getresponse()
                assert answer.status == 503
                assert json.loads(answer.read())["type"] == "urn:problem-type:lipcert:artefact-changed"
        assert server.count("model grey: ") == 3
        path.write_bytes(content)
        wait_until(lambda: server.count("are again those that were verified") == 2)
        assert len({pid for pid, _ in server.ask_all("/predict", npy(image()))}) == 2
        server.process.terminate()
        server.assert_ended_well("ended with")


@pytest.mark.parametrize("processes", [1, 2])
def test_another_server_does_not_share_the_port(shared: Server, servers: Servers, processes: int) -> None:
    another = servers(port=shared.port, processes=processes)
    assert another.process.wait(30) == 1
    another.close()
    expected = rf"ERROR service: port {shared.port} of 127.0.0.1 is not available \(.*in use\); .* LIPCERT_PORT.*\n"
    assert re.fullmatch(expected, another.log)


@pytest.mark.parametrize("processes", [1, 2])
def test_of_two_servers_that_start_at_the_same_time_one_gets_the_port(processes: int) -> None:
    with bind("127.0.0.1", 0) as one, bind("127.0.0.1", one.getsockname()[1]) as other:
        listeners = listen(one, 2, 5)
        with pytest.raises(PortError, match="in use"):
            listen(other, processes, 5)
        for listener in listeners:
            listener.close()


# Repeated Ctrl-C cuts the shutdown short, as it should.
@pytest.mark.parametrize(
    ("stop", "to"),
    [
        (signal.SIGTERM, "parent"),
        (signal.SIGINT, "parent"),
        (signal.SIGINT, "group"),
        (signal.SIGTERM, "group, again and again"),
    ],
)
def test_a_signal_ends_all_processes_with_status_0_and_leaves_nothing(
    servers: Servers, stop: signal.Signals, to: str
) -> None:
    server = servers()
    server.wait_ready()
    children = server.children
    assert len(children) == 2
    server.ask_all("/predict", npy(image()))
    assert len(list(server.temporary.iterdir())) == 1
    if to == "parent":
        server.process.send_signal(stop)
    else:
        os.killpg(server.process.pid, stop)
    while to == "group, again and again" and server.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, stop)
    server.assert_ended_well()
    assert not any(is_running(pid) for pid in children)


def test_counters_have_their_blocks_of_the_disk_from_the_start(servers: Servers) -> None:
    # A full disk would otherwise end every process that counts something for the first time.
    server = servers()
    server.wait_ready()
    (folder,) = server.temporary.iterdir()
    files = {file: file.stat() for file in folder.iterdir()}
    assert all(status.st_blocks * 512 >= status.st_size > 0 for status in files.values())
    server.ask_all("/predict", npy(image()))
    os.kill(server.children[0], signal.SIGKILL)
    server.wait_ready(3)
    server.ask_all("/predict", npy(image()))
    assert {file: file.stat().st_size for file in folder.iterdir()} == {
        file: status.st_size for file, status in files.items()
    }
    server.process.terminate()
    server.assert_ended_well("ended with")


def test_a_signal_while_the_processes_start_ends_them_all(servers: Servers) -> None:
    server = servers()
    wait_until(lambda: "serving on" in server.log)
    os.killpg(server.process.pid, signal.SIGINT)
    server.assert_ended_well()


def test_a_process_that_ends_is_replaced_and_no_connection_is_lost(servers: Servers) -> None:
    server = servers()
    server.wait_ready()
    descriptors = len(links(server.process.pid))
    asked = 0
    stops = {int(signal.SIGKILL): "SIGKILL", int(signal.SIGRTMIN) + 1: "signal", int(signal.SIGTERM): "exit status 0"}
    for replaced, (stop, how) in enumerate(stops.items(), 1):
        victim = server.children[0]
        os.kill(victim, stop)
        wait_until(lambda pid=victim: not is_running(pid))
        # Some of these connections wait for the replacement; their clients see only the delay.
        for _ in range(10):
            asked += 1
            assert server.ask("/predict", npy(image()))[0] != victim
        server.wait_ready(2 + replaced)
        assert f"ERROR service.processes.prefork: server process {victim} ended with {how}" in server.log
        asked += len(server.ask_all("/predict", npy(image())))
        assert len(children_of(server.process.pid)) == 2  # and no zombie
    assert server.log.count("ended with") == len(stops)
    assert server.predicted == asked
    assert len(links(server.process.pid)) == descriptors
    server.process.terminate()
    server.assert_ended_well("ended with")


def test_the_processes_end_with_a_parent_that_is_killed(servers: Servers) -> None:
    server = servers()
    server.wait_ready()
    children = server.children
    assert len(children) == 2
    server.process.kill()
    wait_until(lambda: not any(is_running(pid) for pid in children))


def test_threads_of_the_runtime_start_in_each_process_and_not_before(servers: Servers) -> None:
    server = servers(threads=2)
    server.wait_ready()
    assert threads(server.process.pid) == 1
    # One thread serves, one waits for the end of the parent; those of the runtime start before the first request.
    assert all(threads(pid) > 2 for pid in server.children)
    for path, channels in [("/predict", 1), ("/predict?counterfactual=true", 1), ("/predict?model=colour", 3)]:
        server.ask_all(path, npy(image(channels)))
    server.process.terminate()
    server.assert_ended_well()


def test_the_parent_has_one_thread(shared: Server) -> None:
    assert threads(shared.process.pid) == 1


def test_a_request_that_is_being_read_is_answered_before_the_end(servers: Servers) -> None:
    server = servers()
    server.wait_ready()
    body = npy(image())
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\nConnection: close\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        server.process.terminate()
        wait_until(lambda: server.log.count("Shutting down") == 2)
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["model"] == "grey"
    server.assert_ended_well()


_BOUNDARY = """
import logging, os, sys, time
from service.processes import prefork
logging.basicConfig(stream=sys.stderr)
prefork._SHORT_S = 0.2
fork, forks = os.fork, []
def counted():
    forks.append(1)
    if len(forks) == {refused}:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
os.fork = counted
def serve(listener):
    os.write(2, b"started at %f s\\n" % time.monotonic())
    return 3
prefork.serve_in_processes(prefork.listen(prefork.bind("127.0.0.1", 0), 1, 5), serve, 10.0)
"""


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_processes_that_keep_ending_or_cannot_start_are_started_with_pauses_until_a_signal(
    refused: int,
) -> None:
    code = _BOUNDARY.format(refused=refused)
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            started_s: list[float] = []
            log: list[str] = []
            while len(started_s) < 4:
                log.append(process.stderr.readline())
                assert log[-1] != "", "".join(log)
                if log[-1].startswith("started at"):
                    started_s.append(float(log[-1].split()[2]))
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert sum("ended with exit status 3" in line for line in log) == 3
    assert sum("no server process can be started (Resource" in line for line in log) == (refused > 0)
    assert started_s[3] - started_s[0] > 2 * 0.2


def test_a_process_hangs_only_in_seconds_in_which_its_parent_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("service.processes.prefork.time.monotonic", lambda: now_s)
    beats = mmap.mmap(-1, 2)
    watch = Watch(beats)
    watch.add(0)
    watch.add(1)

    def look(seconds: int, *beating: int) -> list[int]:
        nonlocal now_s
        hung: list[int] = []
        for _ in range(seconds):
            now_s += 1.0
            for number in beating:
                beats[number] = beats[number] % 255 + 1
            hung += watch.hung([0, 1])
        return hung

    # Process 1 starts for longer than a process that beats may hang.
    assert look(100, 0) == []
    assert look(1, 0, 1) == []
    now_s += 3600.0
    assert look(9, 0) == []
    assert look(3, 0) == [1]
    watch.add(1)
    assert look(290, 0) == []
    assert look(20, 0) == [1]


def test_0_takes_a_process_for_each_cpu() -> None:
    assert serving._with_processes(Settings(processes=0, provider="cpu")).processes == usable_cpus()


@pytest.mark.parametrize("obstacle", ["a GPU", "another system"])
def test_where_only_one_process_is_possible_several_are_refused_and_0_is_1(
    monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    if obstacle == "a GPU":
        monkeypatch.setattr(provider, "missing_for_cuda", lambda: None)
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SettingsError, match=r"LIPCERT_PROCESSES=2 is not available: .*; set LIPCERT_PROCESSES=1"):
        serving._with_processes(Settings(processes=2))
    assert serving._with_processes(Settings(processes=1)).processes == 1
    assert serving._with_processes(Settings(processes=0)).processes == 1


def test_beside_a_gpu_several_processes_can_serve_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "missing_for_cuda", lambda: None)
    assert serving._with_processes(Settings(processes=2, provider="cpu")).processes == 2


def test_an_error_says_how_to_get_a_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(SettingsError, match=r"LIPCERT_PROCESSES: .*\(No such file.*\); set TMPDIR"),
    ):
        serving._share_counters(stack, 2)
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ


@pytest.mark.parametrize(("processes", "share"), [(1, 3), (2, 2), (3, 1), (8, 1)])
def test_limits_of_requests_and_bytes_are_shared_among_the_processes(
    classifiers: Mapping[str, Classifier], processes: int, share: int
) -> None:
    settings = Settings(max_requests=3, max_waiting_bytes=3)
    limits = limits_of(settings, Threads(processes, 1, 1), classifiers)
    assert (limits.max_requests, limits.max_bytes) == (share, share)
