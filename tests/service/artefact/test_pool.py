"""Verification in other processes: the same findings as in this one, clear errors, and nothing is left behind."""

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

from service.artefact import pool as pools
from service.artefact.findings import Findings
from service.artefact.pool import VerifierPool
from service.artefact.verification import verify
from service.errors import ArtefactError


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for seed in range(3):
        builders.write(tmp_path / f"model-{seed}", builders.random_groupsort(seed, width=8 + 4 * seed))
    return sorted(tmp_path.iterdir())


def assert_equal(one: Findings, other: Findings) -> None:
    assert one.read_digest == other.read_digest
    assert one.fault == other.fault
    if one.verified is None or other.verified is None:
        assert one.verified is other.verified
        return
    np.testing.assert_array_equal(one.verified.logits_NK, other.verified.logits_NK)
    for name, value in vars(other.verified.certificate).items():
        np.testing.assert_array_equal(getattr(one.verified.certificate, name), value)


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_processes_find_the_same_as_this_process(folders: list[Path], cpus: int) -> None:
    with VerifierPool(cpus) as pool:
        pool.start(folders)
        for folder in folders:
            assert_equal(pool.findings(folder), verify(folder))
            pool.findings(folder).facts()


def test_where_no_process_can_start_this_one_does_the_work(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("no processes here")

    monkeypatch.setattr(pools.subprocess, "Popen", refuse)
    with VerifierPool(2) as pool:
        pool.start(folders)
        assert_equal(pool.findings(folders[0]), verify(folders[0]))


def test_a_fault_of_a_file_is_found_as_in_this_process(folders: list[Path]) -> None:
    (folders[1] / "model.onnx").write_bytes(b"garbage")
    with VerifierPool(2) as pool:
        pool.start(folders)
        found = pool.findings(folders[1])
        assert_equal(found, verify(folders[1]))
        with pytest.raises(ArtefactError) as caught:
            found.facts()
        assert caught.value.file == folders[1] / "model.onnx"
        pool.findings(folders[0]).facts()


def test_a_process_that_is_killed_is_an_error_that_says_so(folders: list[Path]) -> None:
    with VerifierPool(1) as pool:
        assert pool._process is not None
        pool._process.kill()
        pool.start(folders)
        with pytest.raises(ArtefactError, match=r"ended before it was done.*memory is too small") as caught:
            pool.findings(folders[0])
        assert caught.value.file == folders[0]


def test_a_model_that_ends_its_process_takes_no_other_along(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the system had killed it at the second of three models, because the memory is too small.
    deadly = (
        "import os, service.artefact.verification as module; verify = module.verify; module.verify = lambda folder, "
        f"limits: os._exit(9) if folder.name == {folders[1].name!r} else verify(folder, limits); from service"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(
        pools.subprocess,
        "Popen",
        lambda command, **options: popen([*command[:2], command[2].replace("from service", deadly, 1)], **options),
    )
    with VerifierPool(1) as pool:
        pool.start(folders)
        pool.findings(folders[0]).facts()
        with pytest.raises(ArtefactError, match="ended before it was done") as caught:
            pool.findings(folders[1])
        assert caught.value.file == folders[1]
        pool.findings(folders[2]).facts()


def test_no_process_is_left_when_the_work_is_done(folders: list[Path]) -> None:
    before = children_of(os.getpid())  # of other tests, such as a resource tracker
    with VerifierPool(3) as pool:
        pool.start(folders)
        for folder in folders:
            pool.findings(folder)
    assert children_of(os.getpid()) == before


def test_no_process_is_left_when_the_work_is_dropped(folders: list[Path], tmp_path: Path) -> None:
    large = tmp_path / "large"
    builders.write(large, builders.random_groupsort(0, shape=(1, 24, 24), width=400, depth=4))
    before = children_of(os.getpid())
    with VerifierPool(2) as pool:
        assert pool._process is not None
        first = pool._process.pid
        pool.start([large, large.parent / "model-0"])
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
from service.artefact.pool import VerifierPool
pool = VerifierPool(2)
if {stage == "at work"}:
    pool.start([Path({str(large)!r}), Path({str(folders[0])!r})])
print(pool._process.pid, flush=True)
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


def test_the_server_itself_loads_no_library_of_a_proof(tmp_path: Path) -> None:
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
