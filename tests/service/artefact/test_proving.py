"""Proofs in processes of their own: the same findings as in this one, clear errors, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import builders
import numpy as np
import pytest
from process_table import children_of, is_running, wait_until

from service.artefact import proving
from service.artefact import verification as prover
from service.artefact.graphs import Findings
from service.artefact.proving import Provers
from service.errors import ArtefactError


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for seed in range(3):
        builders.write(tmp_path / f"model-{seed}", builders.random_groupsort(seed, width=8 + 4 * seed))
    return sorted(tmp_path.iterdir())


def assert_equal(one: Findings, other: Findings) -> None:
    assert one.digests == other.digests
    assert one.fault == other.fault
    assert one.run == other.run
    if one.certificate is None or other.certificate is None:
        assert one.certificate is other.certificate
        return
    for name, value in vars(other.certificate).items():
        np.testing.assert_array_equal(getattr(one.certificate, name), value)


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_processes_find_out_what_this_process_would(folders: list[Path], cpus: int) -> None:
    with Provers(cpus) as provers:
        provers.start(folders, "cpu")
        for folder in folders:
            assert_equal(provers.findings(folder), prover.find_out(folder, "cpu"))
            assert provers.findings(folder).run


def test_where_there_can_be_no_processes_this_one_does_the_work(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("no processes here")

    monkeypatch.setattr(proving.subprocess, "Popen", refuse)
    with Provers(2) as provers:
        provers.start(folders, "cpu")
        assert_equal(provers.findings(folders[0]), prover.find_out(folders[0], "cpu"))


@pytest.mark.parametrize("file", ["model.onnx", "transport.onnx"])
def test_what_is_wrong_with_a_file_is_said_as_this_process_would(folders: list[Path], file: str) -> None:
    (folders[1] / file).write_bytes(b"garbage")
    with Provers(2) as provers:
        provers.start(folders, "cpu")
        found = provers.findings(folders[1])
        assert_equal(found, prover.find_out(folders[1], "cpu"))
        with pytest.raises(ArtefactError) as caught:
            found.proof()
        assert caught.value.file == folders[1] / file
        provers.findings(folders[0]).proof()


def test_a_graph_of_another_network_is_found(folders: list[Path]) -> None:
    (folders[0] / "transport.onnx").write_bytes(builders.random_groupsort(7).transport)
    with Provers(1) as provers:
        provers.start(folders, "cpu")
        with pytest.raises(ArtefactError, match="another network"):
            provers.findings(folders[0]).proof()


def test_a_process_that_is_killed_is_an_error_that_says_so(folders: list[Path]) -> None:
    with Provers(1) as provers:
        assert provers._process is not None
        provers._process.kill()
        provers.start(folders, "cpu")
        with pytest.raises(ArtefactError, match=r"ended before it was done.*memory is too small") as caught:
            provers.findings(folders[0])
        assert caught.value.file == folders[0]


def test_no_process_is_left_when_the_work_is_done(folders: list[Path]) -> None:
    before = children_of(os.getpid())  # those of other tests, such as a resource tracker
    with Provers(3) as provers:
        provers.start(folders, "cpu")
        for folder in folders:
            provers.findings(folder)
    assert children_of(os.getpid()) == before


def test_no_process_is_left_when_the_work_is_dropped(folders: list[Path], tmp_path: Path) -> None:
    large = tmp_path / "large"
    builders.write(large, builders.random_groupsort(0, shape=(1, 24, 24), width=400, depth=4))
    before = children_of(os.getpid())
    with Provers(2) as provers:
        assert provers._process is not None
        first = provers._process.pid
        provers.start([large, large.parent / "model-0"], "cpu")
        wait_until(lambda: children_of(first) != [])
        started = [first, *children_of(first)]
    assert not any(is_running(pid) for pid in started)
    assert children_of(os.getpid()) == before


@pytest.mark.parametrize("stage", ["before the work", "at work"])
def test_processes_end_with_a_server_that_is_killed(folders: list[Path], tmp_path: Path, stage: str) -> None:
    large = tmp_path / "large"
    builders.write(large, builders.random_groupsort(0, shape=(1, 24, 24), width=400, depth=4))
    code = f"""
import sys, time
from pathlib import Path
from service.artefact.proving import Provers
provers = Provers(2)
if {stage == "at work"}:
    provers.start([Path({str(large)!r}), Path({str(folders[0])!r})], "cpu")
print(provers._process.pid, flush=True)
time.sleep(60)
"""
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with server:
        assert server.stdout is not None
        first = int(server.stdout.readline())
        if stage == "at work":
            wait_until(lambda: children_of(first) != [])
        started = [first, *children_of(first)]
        server.send_signal(signal.SIGKILL)
        server.wait()
    wait_until(lambda: not any(is_running(pid) for pid in started))


def test_the_server_itself_loads_nothing_that_proves(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    builders.write(zoo / "test", builders.random_groupsort(0))
    code = f"""
import sys
from pathlib import Path
from service.api.app import load_classifiers
from service.settings import Settings
(classifier,) = load_classifiers(Settings(models=Path({str(zoo)!r}), default_model="test", provider="cpu")).values()
classifier.predict(__import__("numpy").zeros((1, 1, 4, 4)))
loaded = {{"onnx", "service.artefact.verification", "service.certificate.analysis"}} & set(sys.modules)
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
