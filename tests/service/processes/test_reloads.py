"""SIGHUP serves what is in the folder of models; no request is lost, and an answer names the model that computed it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from encoding import npy
from process_table import children_of, is_running, wait_until
from server_process import ServerProcess

from service.access.keys import new_key
from service.artefact.files import digest

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (1, 4, 5)
_IMAGE_HW = np.random.default_rng(3).random(SHAPE[1:])
_IMAGE = npy(_IMAGE_HW)

# The proof of a model whose folder has a file `slow` takes as long as that file is there.
_SERVER = """
import sys, time
import service.artefact.verification as verification
verify = verification.verify
def slowly(folder, *arguments):
    while (folder / "slow").exists():
        time.sleep(0.02)
    return verify(folder, *arguments)
verification.verify = slowly
"""


class Server(ServerProcess):
    def __init__(self, models: Path, folder: Path, processes: int, **settings: object) -> None:
        # Verifiers and the process that reads the folder again are other interpreters.
        (folder / "patch").mkdir()
        (folder / "patch" / "sitecustomize.py").write_text(
            "import sys\nif 'service.artefact' in ' '.join(sys.orig_argv):\n"
            + "".join(f"    {line}\n" for line in _SERVER.strip().splitlines())
        )
        self.models = models
        super().__init__(
            [sys.executable, "-m", "service"],
            {"models": models, "processes": processes, "drain_s": 0.2} | settings,
            PYTHONPATH=f"{folder / 'patch'}{os.pathsep}{ROOT}",
        )
        self.wait_started(processes)
        found = re.search(r"serving on http://127.0.0.1:(\d+)", self.log)
        assert found is not None, self.log
        self.port = int(found[1])
        # Each takes the handler of SIGHUP before it starts up.
        self.processes = processes
        self.seen = ""

    @property
    def new_log(self) -> str:
        """The log since the test began."""
        return self.log[len(self.seen) :]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, {"Content-Type": "application/x-npy"} | headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")

    def hang_up(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def all_see(self, path: str, sees: Callable[[int, Any], bool]) -> bool:
        """Return whether the answer to each of several connections, status and document, is such; the first decides."""
        return all(sees(*self.ask("GET", path)) for _ in range(5 * self.processes))

    def list_only(self, *names: str) -> bool:
        """Return whether these are the names that all processes list."""
        return self.all_see("/models", lambda _, found: {model["name"] for model in found["models"]} == set(names))

    def serve(self, name: str, digest: str) -> bool:
        """Return whether this is the version in all processes."""
        return self.all_see(f"/models/{name}", lambda _, found: found.get("digest") == digest)

    def digest(self, name: str) -> str:
        return self.ask("GET", f"/models/{name}")[1]["digest"]


def write(folder: Path, seed: int, name: str) -> str:
    """Write an artefact beside its place, move it there, and return its digest."""
    folder.parent.mkdir(exist_ok=True)
    new = folder.parent / f".{folder.name}-new"
    random = np.random.default_rng(seed)
    builders.write(new, builders.linear(random.normal(size=(3, 20)), random.normal(size=3), SHAPE), name)
    if folder.exists():
        folder.rename(folder.parent / f".{folder.name}-old-{seed}")
    new.rename(folder)
    return digest((folder / "model.onnx").read_bytes())


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for seed, name in enumerate(("grey", "other")):
        write(folder / name, seed, name)
    return folder


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(processes: int = 1, **settings: object) -> Server:
            server = Server(models, tmp_path, processes, **settings)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for the tests that leave it with `grey` and `other`; it ends as it should."""
    folder = tmp_path_factory.mktemp("serving")
    for seed, name in enumerate(("grey", "other")):
        write(folder / "models" / name, seed, name)
    server = Server(folder / "models", folder, request.param)
    try:
        yield server
        server.process.terminate()
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log
    finally:
        server.close()


@pytest.fixture
def server(serving: Server) -> Server:
    """`serving`, and a log that begins with this test."""
    serving.seen = serving.log
    return serving


@contextlib.contextmanager
def load_on(server: Server, other: str = "other") -> Generator[Counter[tuple[int, str, str]]]:
    """Ask from two threads; give the answers by status, digest and logits."""
    answers: Counter[tuple[int, str, str]] = Counter()
    is_over = threading.Event()

    def ask(path: str) -> None:
        connection = server.connect()
        while not is_over.is_set():
            connection.request("POST", path, _IMAGE, {"Content-Type": "application/x-npy"})
            answer = connection.getresponse()
            found = json.loads(answer.read())
            answers[answer.status, found.get("digest", found.get("detail")), str(found.get("logits"))] += 1
            # The machine is needed for the proofs, too.
            time.sleep(0.02)
        connection.close()

    threads = [threading.Thread(target=ask, args=(path,)) for path in ("/predict", f"/predict?model={other}")]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_new_changed_and_removed_models_follow_the_folder_while_every_request_is_answered(server: Server) -> None:
    models = server.models
    digests = {server.digest("grey")}
    others = {server.digest("other")}
    with load_on(server) as answers:
        for seed in (10, 11):
            newest = write(models / "grey", seed, "grey")
            digests.add(newest)
            if seed == 11:
                write(models / "added", 50, "added")
            server.hang_up()
            wait_until(lambda newest=newest: server.serve("grey", newest))
        wait_until(lambda: server.list_only("grey", "other", "added"))
        shutil.rmtree(models / "added")
        server.hang_up()
        wait_until(lambda: server.list_only("grey", "other"))
    assert {status for status, *_ in answers} == {200}, answers
    # Each version has its logits, and no other.
    assert {found for _, found, _ in answers} == digests | others
    assert len(answers) == len(digests | others)
    assert server.ask("GET", "/models/added")[0] == 404


def test_the_old_version_stays_where_the_new_one_has_no_proof_and_the_reason_can_be_read(server: Server) -> None:
    models = server.models
    old = server.digest("grey")
    with load_on(server) as answers:
        # In place, as a careless operator writes; both graphs are loaded.
        (models / "grey" / "model.onnx").write_bytes(b"garbage")
        server.hang_up()
        wait_until(lambda: "the new version is not served" in server.new_log)
        wait_until(lambda: server.all_see("/models/grey", lambda _, found: found["rejected"] is not None))
        # Longer than the server looks at its files.
        time.sleep(2.5)
        found = server.ask("GET", "/models/grey")[1]
        assert found["digest"] == old
        assert found["rejected"].startswith("the graph has no proved Lipschitz bound")
        assert server.ask("GET", "/health/ready")[0] == 200
        text = metrics(server)
        assert 'lipcert_model_rejected{model="grey"} 1.0' in text
        assert 'lipcert_model_rejected{model="other"} 0.0' in text
        newest = write(models / "grey", 30, "grey")
        server.hang_up()
        wait_until(lambda: server.serve("grey", newest))
    assert {status for status, *_ in answers} == {200}, answers
    assert server.ask("GET", "/models/grey")[1]["rejected"] is None


def metrics(server: Server) -> str:
    with contextlib.closing(server.connect()) as connection:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


def test_the_default_model_stays_though_its_folder_is_gone(server: Server) -> None:
    folder = server.models / "grey"
    folder.rename(server.models / ".gone")
    server.hang_up()
    wait_until(lambda: "its folder is gone" in server.new_log)
    wait_until(lambda: server.all_see("/models/grey", lambda _, found: found["rejected"] is not None))
    assert server.ask("POST", "/predict", _IMAGE)[0] == 200
    (server.models / ".gone").rename(folder)
    server.hang_up()
    wait_until(lambda: server.all_see("/models/grey", lambda _, found: found["rejected"] is None))


def test_without_keys_nobody_loads_or_unloads(server: Server) -> None:
    status, problem = server.ask("POST", "/v2/repository/models/other/unload")
    assert status == 403
    assert problem["type"] == "urn:problem-type:lipcert:forbidden"


def test_a_proof_that_takes_long_delays_no_answer_and_hangups_meanwhile_are_one_more_reload(server: Server) -> None:
    models = server.models
    old = server.digest("grey")
    with load_on(server) as answers:
        middle = write(models / "grey", 20, "grey")
        (models / "grey" / "slow").touch()
        server.hang_up()
        wait_until(lambda: len(re.findall(r"reading \S+ again", server.new_log)) == 1)
        for _ in range(5):
            server.hang_up()
        time.sleep(2.5)
        assert server.serve("grey", old)
        if server.processes > 1:
            # Its replacement goes on with the old version, whose file has another name.
            pid = server.children[0]
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: "Application startup complete" in server.new_log)
        (models / "grey" / "slow").unlink()
        wait_until(lambda: server.serve("grey", middle))
        wait_until(lambda: len(re.findall(r"reading \S+ again", server.new_log)) == 2)
    assert {status for status, *_ in answers} == {200}, answers
    assert {found for _, found, _ in answers} >= {old, middle}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_during_a_reload_leaves_no_process(
    start: Callable[..., Server], models: Path, processes: int, end: signal.Signals
) -> None:
    server = start(processes)
    write(models / "grey", 20, "grey")
    (models / "grey" / "slow").touch()
    server.hang_up()
    wait_until(lambda: "reading" in server.log)
    wait_until(lambda: len(descendants(server.process.pid)) >= processes * (processes > 1) + 2)
    pids = descendants(server.process.pid)
    server.process.send_signal(end)
    assert server.process.wait(30) == (0 if end == signal.SIGTERM else -end)
    wait_until(lambda: not any(map(is_running, pids)))


def descendants(pid: int) -> list[int]:
    found = children_of(pid)
    return [*found, *(below for child in found for below in descendants(child))]


@pytest.mark.parametrize("processes", [1, 2])
def test_models_are_loaded_and_unloaded_by_who_has_the_scope(
    start: Callable[..., Server], models: Path, processes: int
) -> None:
    keys = {scope: new_key(scope, [scope]) for scope in ("predict", "admin")}
    server = start(processes, api_keys=";".join(line for _, line in keys.values()))
    admin, predict = (f"Bearer {keys[scope][0]}" for scope in ("admin", "predict"))

    def control(name: str, action: str, key: str = admin) -> tuple[int, Any]:
        return server.ask("POST", f"/v2/repository/models/{name}/{action}", Authorization=key)

    def answers(name: str, status: int) -> bool:
        return all(server.ask("GET", f"/models/{name}", Authorization=predict)[0] == status for _ in range(5))

    assert control("other", "unload", predict)[0] == 403
    assert control("other", "unload") == (200, {"name": "other", "state": "UNAVAILABLE"})
    wait_until(lambda: answers("other", 404))
    # Who unloaded it did not mean until the next rotation of a log.
    server.hang_up()
    wait_until(lambda: "reading" in server.log)
    time.sleep(1.5)
    assert answers("other", 404)
    assert control("other", "load") == (200, {"name": "other", "state": "READY"})
    wait_until(lambda: answers("other", 200))
    write(models / "fresh", 70, "fresh")
    assert control("fresh", "load")[0] == 200
    wait_until(lambda: answers("fresh", 200))
    assert control("grey", "unload")[0] == 409
    for name in ("absent", "..", ".", "%2e%2e", "a%2Fb", "x" * 300, "x" * 5000, "%00", ".hidden"):
        assert control(name, "load")[0] == 404, name
    (models / "fresh" / "model.onnx").write_bytes(b"garbage")
    status, problem = control("fresh", "load")
    assert status == 409
    assert "the graph has no proved Lipschitz bound" in problem["detail"]
    assert answers("fresh", 200)
    assert "Traceback" not in server.log


@pytest.mark.parametrize("processes", [1, 2])
def test_a_new_version_takes_the_name_and_the_old_one_goes_on(
    start: Callable[..., Server], models: Path, processes: int
) -> None:
    shutil.rmtree(models / "grey")
    old = write(models / "grey" / "1", 0, "grey")
    server = start(processes, default_model="stable", aliases="stable=grey")
    assert server.list_only("grey:1", "other")
    with load_on(server, "grey:1") as answers:
        new = write(models / "grey" / "2", 1, "grey")
        server.hang_up()
        wait_until(lambda: server.serve("grey", new))
        assert server.serve("stable", new)
        assert server.serve("grey:1", old)
        # With a fault it is no version, and the name stays where it is.
        write(models / "grey" / "3", 2, "stranger")
        server.hang_up()
        wait_until(lambda: server.all_see("/models/grey:3", lambda status, _: status == 503))
        assert server.serve("grey", new)
        shutil.rmtree(models / "grey" / "3")
        # Back to the old version.
        shutil.rmtree(models / "grey" / "2")
        server.hang_up()
        wait_until(lambda: server.list_only("grey:1", "other"))
        # The last version of the default model stays.
        shutil.rmtree(models / "grey")
        server.hang_up()
        wait_until(lambda: server.all_see("/models/stable", lambda _, found: found["rejected"] is not None))
        assert server.serve("stable", old)
    assert {status for status, *_ in answers} == {200}, answers
    assert {found for _, found, _ in answers} == {old, new}
    assert "Traceback" not in server.log


def test_versions_are_loaded_and_unloaded_one_by_one_or_all_at_once(start: Callable[..., Server], models: Path) -> None:
    for version in (1, 2):
        write(models / "digits" / str(version), version, "digits")
    admin, line = new_key("admin", ["admin", "predict"])
    server = start(api_keys=line, aliases="best=digits:2")

    def control(name: str, action: str) -> int:
        return server.ask("POST", f"/v2/repository/models/{name}/{action}", Authorization=f"Bearer {admin}")[0]

    def served() -> list[str]:
        listed = server.ask("GET", "/models", Authorization=f"Bearer {admin}")[1]["models"]
        return [model["name"] for model in listed if model["name"].startswith("digits")]

    assert control("best", "unload") == 200
    assert served() == ["digits:1"]
    assert control("digits", "load") == 200
    assert served() == ["digits:1", "digits:2"]
    write(models / "digits" / "3", 3, "digits")
    assert control("digits:3", "load") == 200
    assert control("digits:4", "load") == 404
    assert control("digits", "unload") == 200
    assert served() == []
    assert server.ask("GET", "/models/best", Authorization=f"Bearer {admin}")[0] == 404
    assert control("digits:1", "load") == 200
    assert served() == ["digits:1"]
    assert "LIPCERT_ALIASES: best stands for digits:2, which is not served" in server.log
    assert "Traceback" not in server.log
