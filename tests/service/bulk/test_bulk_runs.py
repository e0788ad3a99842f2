"""A run ends at any instant and goes on: no row is missing, doubled or different."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from bulk_runs import ask, certify, check_row, npy, rows_of
from client import HEIGHT, WIDTH
from process_table import children_of, is_running, wait_until

from service.bulk import work
from service.inference.classifier import Classifier

ROOT = Path(__file__).resolve().parents[3]
PART = 20
COUNT, BROKEN = 600, 177
"""Images of a run, and the one that is none."""


@pytest.fixture
def digits(tmp_path: Path) -> np.ndarray:
    """Images in `digits.npy`, one of them broken."""
    images = np.random.default_rng(12).random((COUNT, 1, HEIGHT, WIDTH))
    images[BROKEN] = np.nan
    np.save(tmp_path / "digits.npy", images)
    return images


def command(tmp_path: Path, zoo: Path, *words: object) -> list[str]:
    named = ("--model", zoo / "grey", "--out", tmp_path / "out", "--part-rows", PART)
    return ["certify-images", *map(str, (tmp_path / "digits.npy", *named, *words))]


Start = Callable[[list[str]], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts commands; those that still run at the end of the test are killed."""
    started: list[subprocess.Popen[str]] = []

    def run(words: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lipcert", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A shell ignores the signal for what it runs in the background, and so for all that it starts.
        heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        started.append(subprocess.Popen(command, text=True, env=environment, preexec_fn=heard, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def complete(out: Path) -> int:
    return len(list(out.glob("answers/part-*.parquet")))


def workers_of(pid: int) -> list[int]:
    """Processes that certify; others track resources or prove the model."""
    found = []
    for child in children_of(pid):
        # One that has ended meanwhile has none.
        with contextlib.suppress(FileNotFoundError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def check_rows(out: Path, images: np.ndarray, classifiers: Mapping[str, Classifier]) -> None:
    """Every input has one row, with the answer of the model about it alone."""
    answers, errors = rows_of(out), rows_of(out, "errors")
    assert sorted(row["row"] for row in answers + errors) == list(range(len(images)))
    assert [row["row"] for row in errors] == [BROKEN]
    for row in answers:
        (prediction,) = classifiers["grey"].predict(images[row["row"]][np.newaxis])
        assert (row["radius"], row["class_id"]) == (prediction.radius, prediction.class_id)
        assert row["logits"] == prediction.logits_K.tolist()


def test_killed_driver_and_killed_worker_lose_nothing(
    start: Start, digits: np.ndarray, zoo: Path, tmp_path: Path, classifiers: Mapping[str, Classifier]
) -> None:
    # So many parts that each kill meets the run in its middle.
    out, words, parts = tmp_path / "out", command(tmp_path, zoo, "--processes", 2, "--part-rows", 2), COUNT // 2
    driver = start(words)
    wait_until(lambda: complete(out) >= 5)
    driver.send_signal(signal.SIGSTOP)
    workers = workers_of(driver.pid)
    driver.kill()
    driver.communicate()
    wait_until(lambda: not any(map(is_running, workers)))
    before = complete(out)
    assert workers
    assert 5 <= before < parts - 5
    driver = start(words)
    wait_until(lambda: complete(out) >= before + 5 or driver.poll() is not None)
    driver.send_signal(signal.SIGSTOP)
    os.kill(workers_of(driver.pid)[0], signal.SIGKILL)
    driver.send_signal(signal.SIGCONT)
    _, said = driver.communicate(timeout=300)
    assert driver.returncode == 1, said
    assert "inputs are done already" in said
    check_rows(out, digits, classifiers)
    assert complete(out) == parts


def test_interrupted_run_says_how_it_goes_on(start: Start, digits: np.ndarray, zoo: Path, tmp_path: Path) -> None:
    driver = start(command(tmp_path, zoo, "--processes", 1, "--part-rows", 2))
    wait_until(lambda: complete(tmp_path / "out") >= 2)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert said.splitlines()[-1] == "interrupted; the same command goes on where it ended"


@pytest.mark.usefixtures("here")
def test_second_driver_is_refused(digits: np.ndarray, zoo: Path, tmp_path: Path) -> None:
    from service.bulk.results import locked

    with locked(tmp_path / "out"):
        result = certify(*command(tmp_path, zoo)[1:])
    assert result.exit_code == 2
    assert "another run writes" in result.output


@pytest.mark.usefixtures("here")
def test_other_options_model_or_sources_are_refused_with_what_to_do(
    digits: np.ndarray, zoo: Path, tmp_path: Path, classifiers: Mapping[str, Classifier]
) -> None:
    out, words = tmp_path / "out", command(tmp_path, zoo)[1:]
    assert certify(*words).exit_code == 1
    whole = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    for changed, named in (
        ([*words, "--epsilon", "0.5"], "another options: {}, not {'epsilon': 0.5}"),
        ([*words, "--part-rows", "30"], "another part_rows: 20, not 30"),
        ([*words, "--model", str(zoo / "binary")], "another model: 'grey', not 'binary'"),
        ([words[0], *words], "another sources"),
    ):
        result = certify(*changed)
        assert result.exit_code == 2
        assert named in result.output
        assert "give the command that began it, or choose another --out" in result.output
    status = (tmp_path / "digits.npy").stat()
    np.save(tmp_path / "digits.npy", digits)
    result = certify(*words)
    assert result.exit_code == 2
    assert f"the sources have changed: {tmp_path / 'digits.npy'} is not what it was" in result.output
    os.utime(tmp_path / "digits.npy", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert certify(*words).exit_code == 1
    assert {path: path.read_bytes() for path in out.rglob("*.parquet")} == whole


@pytest.mark.usefixtures("here")
def test_removed_or_damaged_parts_are_made_again(
    digits: np.ndarray, zoo: Path, tmp_path: Path, classifiers: Mapping[str, Classifier]
) -> None:
    out, words = tmp_path / "out", command(tmp_path, zoo)[1:]
    assert certify(*words).exit_code == 1
    (out / "answers" / "part-000003.parquet").unlink()
    (out / "answers" / "part-000004.parquet").write_bytes(b"PAR1 torn")
    next((out / "errors").iterdir()).unlink()
    (out / "errors" / "part-000003.parquet").write_bytes(b"of an attempt that ended before its answers")
    (out / "answers" / ".part-000005.parquet.abc").write_bytes(b"of a killed process")
    assert certify(*words).exit_code == 1
    assert sorted(path.name for path in (out / "errors").iterdir()) == [f"part-{BROKEN // PART:06}.parquet"]
    assert not list(out.rglob(".part*"))
    check_rows(out, digits, classifiers)
    shutil.copy(out / "answers" / "part-000006.parquet", out / "answers" / "part-000200.parquet")
    assert "is a copy of part 6; remove it" in certify(*words).output


@pytest.mark.usefixtures("here")
def test_a_run_without_a_complete_part_can_be_given_otherwise(digits: np.ndarray, zoo: Path, tmp_path: Path) -> None:
    result = certify(*command(tmp_path, zoo)[1:], "--coverage", "0.9")
    assert result.exit_code == 2
    assert "grey is not calibrated" in result.output
    assert certify(*command(tmp_path, zoo)[1:]).exit_code == 1


@pytest.mark.usefixtures("here")
def test_source_that_changes_while_it_is_read_ends_the_run(
    digits: np.ndarray, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = iter(["1:1"])
    monkeypatch.setattr(work, "stamp", lambda name: next(stamps))
    result = certify(*command(tmp_path, zoo)[1:])
    assert result.exit_code == 2
    assert "digits.npy has changed since it was listed; put it back" in result.output
    assert complete(tmp_path / "out") == 0


@pytest.mark.usefixtures("here")
def test_foreign_folders_and_files_are_left_alone(digits: np.ndarray, zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    result = certify(*command(tmp_path, zoo)[1:])
    assert result.exit_code == 2
    assert "holds 'thesis.txt', which is not of such a run" in result.output
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("here")
def test_results_inside_a_source_are_refused(digits: np.ndarray, zoo: Path, tmp_path: Path) -> None:
    result = certify(tmp_path, *command(tmp_path, zoo)[1:])
    assert result.exit_code == 2
    assert f"{tmp_path / 'out'} lies in {tmp_path}, and its files would be inputs" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("here")
def test_the_summary_counts_the_rows(digits: np.ndarray, zoo: Path, tmp_path: Path) -> None:
    result = certify(*command(tmp_path, zoo, "--epsilon", "0.1")[1:])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = rows_of(tmp_path / "out")
    assert result.output.splitlines()[-1].startswith(f"{COUNT} inputs: ")
    assert (summary["answered"], summary["errors"]) == (COUNT - 1, 1)
    assert summary["certified"] == sum(row["certified"] for row in rows)
    assert summary["robust_at_epsilon"] == sum(row["robust_at_epsilon"] for row in rows)
    for point in summary["certified_share"]:
        expected = sum(row["certified"] and row["radius"] >= point["epsilon"] for row in rows)
        assert point["certified"] == expected
    assert sum(bin_["answers"] for bin_ in summary["radii"]) == summary["certified"]
    assert "robust at epsilon 0.1" in (tmp_path / "out" / "summary.txt").read_text()


@pytest.mark.usefixtures("here")
def test_no_input_is_an_empty_data_set(zoo: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "none.npz", np.zeros(0))
    (tmp_path / "list.txt").write_text("\n", encoding="utf-8")
    result = certify(tmp_path / "list.txt", "--model", zoo / "grey", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == "0 inputs: 0 certified, 0 abstained, 0 not answered"


def test_a_part_that_ends_every_process_ends_the_run(start: Start, digits: np.ndarray, tmp_path: Path) -> None:
    # The process is killed while it loads the model.
    builders.write(tmp_path / "grey", builders.linear(np.eye(2, 20), np.zeros(2), (1, HEIGHT, WIDTH)), "grey")
    driver = start(command(tmp_path, tmp_path, "--processes", 1))
    killed = set[int]()

    def kill() -> bool:
        for worker in workers_of(driver.pid) if driver.poll() is None else []:
            if worker not in killed:
                killed.add(worker)
                os.kill(worker, signal.SIGKILL)
        return driver.poll() is not None

    wait_until(kill)
    _, said = driver.communicate()
    assert driver.returncode == 2
    assert "part 0 ended 3 processes, and the last one was killed by signal 9" in said


@pytest.mark.parametrize("library", ["pyarrow", "ray"])
def test_a_missing_library_is_a_sentence(
    library: str, digits: np.ndarray, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == library else find(name, *a))
    result = certify(*command(tmp_path, zoo)[1:], "--ray", "local")
    assert result.exit_code == 2
    extra = {"pyarrow": "bulk", "ray": "ray"}[library]
    assert f"needs {library}, which is not installed: `pip install 'lipcert[{extra}]'`" in result.output


def test_ray_writes_the_same_rows(
    digits: np.ndarray, zoo: Path, tmp_path: Path, classifiers: Mapping[str, Classifier]
) -> None:
    pytest.importorskip("ray")
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "lipcert", *command(tmp_path, zoo, "--ray", "local")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 1, result.stderr
    check_rows(tmp_path / "out", digits, classifiers)


def test_rows_are_answers_of_the_server(digits: np.ndarray, url: str, zoo: Path, tmp_path: Path) -> None:
    words = command(tmp_path, zoo, "--processes", 2, "--counterfactual", "--part-rows", COUNT // 2)[1:]
    assert certify(*words).exit_code == 1
    rows = rows_of(tmp_path / "out")
    for row in rows[::30] + rows_of(tmp_path / "out", "errors"):
        check_row(row, ask(url, npy(digits[row["row"]]), {"counterfactual": True}))
