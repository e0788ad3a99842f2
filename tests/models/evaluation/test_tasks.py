"""Parts of an evaluation give the same results in this process and in others; a process that dies costs its part."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Graphs, card_for, load, random_groupsort
from commands import run_command

pytest.importorskip("foolbox")
pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from models.__main__ import main  # noqa: E402
from models.data.labelled import DataSet, LabelledImages  # noqa: E402
from models.evaluation import attacks, cluster  # noqa: E402
from models.evaluation import measure as evaluation  # noqa: E402
from models.evaluation.attacks import AttackResult, CertificateRefutedError, run_attacks  # noqa: E402
from models.evaluation.budget import attack_within  # noqa: E402
from models.evaluation.images import EvaluationError  # noqa: E402
from models.evaluation.measure import evaluate  # noqa: E402
from models.evaluation.partial import Arrays, PartialResults  # noqa: E402
from models.evaluation.tasks import InProcess, Task, measured  # noqa: E402
from service.artefact.card import read_card, write_artefact  # noqa: E402
from service.inference.classifier import Classifier  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
IMAGES = np.random.default_rng(0).integers(0, 256, (23, 1, 4, 4)) / 255


def squared(_: Any, number: int) -> Arrays:
    return {"square": np.array([number**2])}


def dying(_: Any, number: int, marker: str) -> Arrays:
    """End the first process that measures this part."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return squared(None, number)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def refuting(_: Any) -> Arrays:
    raise CertificateRefutedError("PGD", np.zeros((1, 2, 2)), np.ones((1, 2, 2)), 0, 1, 9.0)


class Ahead:
    """A runner that notes the tasks it was given before their arrays are wanted."""

    width = 2

    def __init__(self) -> None:
        self.submitted: list[int] = []

    def submit(self, task: Task) -> Callable[[], Arrays]:
        self.submitted.append(task.arguments[0])
        return lambda: task.measure(None, *task.arguments)


def squares(n: int) -> list[Task]:
    return [Task({"number": number}, squared, (number,)) for number in range(n)]


def test_arrays_are_in_order_and_stored_ones_are_not_measured(tmp_path: Path) -> None:
    cache, runner = PartialResults(tmp_path), Ahead()
    list(measured(squares(9)[2:4], runner, cache))
    found = measured(squares(9), runner, cache)
    assert next(found)["square"] == [0]
    assert runner.submitted == [2, 3, 0, 1, 4]
    assert [part["square"][0] for part in found] == [1, 4, 9, 16, 25, 36, 49, 64]
    assert sorted(runner.submitted) == list(range(9))
    min(tmp_path.glob("*.npz")).write_bytes(b"damaged")
    assert [part["square"][0] for part in measured(squares(9), runner, cache)][8] == 64
    assert len(runner.submitted) == 10


def test_groups_are_attacked_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "ATTACKS", {"PGD": attacks.ATTACKS["PGD"] | {"steps": 3}})
    classifier, best_N = load(random_groupsort(0)), np.linspace(0.2, 0.1, 23)
    groups = [np.array([3, 1]), np.array([0, 2, 4, 5])]
    (together,) = run_attacks(classifier, IMAGES[:6], best_N[:6] * 0, progress=False, groups=groups)
    for group in groups:
        (alone,) = run_attacks(classifier, IMAGES[group], best_N[group] * 0, progress=False)
        assert together.distance_N[group].tolist() == alone.distance_N.tolist()


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, [[1]]), (4.0, [[1], [1, 2]]), (99.0, [[1], [1, 2, 4], [8, 7]])])
def test_groups_start_together_on_several_processes_if_their_time_is_left(
    monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: list[list[int]]
) -> None:
    """An image takes 1 s for each group; the groups of a round take the time of the largest."""
    now, found = 0.0, list[list[int]]()

    def attacked(_: Any, image_NCHW: np.ndarray, best_N: np.ndarray, **given: Any) -> list[AttackResult]:
        nonlocal now
        found.append([len(group) for group in given["groups"]])
        assert np.concatenate(given["groups"]).tolist() == list(range(len(best_N)))
        now += max(found[-1])
        return [AttackResult("A", "none", {}, best_N, best_N, best_N)]

    monkeypatch.setattr(attacks, "run_attacks", attacked)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    classifier = load(random_groupsort(0))
    result = attack_within(classifier, IMAGES, np.arange(23.0), seconds, runner=InProcess(classifier, width=3))
    assert found == rounds
    assert result.results[0].distance_N.tolist() == result.index_M.tolist() == sorted(result.index_M.tolist())


def test_refutation_reaches_the_driver_with_both_images() -> None:
    with pytest.raises(CertificateRefutedError) as raised:
        refuting(None)
    copied = pickle.loads(pickle.dumps(raised.value))
    assert str(copied) == str(raised.value)
    assert copied.found_CHW.tolist() == np.ones((1, 2, 2)).tolist()


def test_without_ray_the_message_names_the_extra(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cluster.importlib, "import_module", missing)
    result = run_command(main, ["evaluate", str(artefact), "--data", str(artefact), "--no-attacks", "--ray", "local"])
    assert result.exit_code == 1
    assert "needs ray, which is not installed: `pip install 'lipcert[cpu,train,evaluate,ray]'`" in result.output


@pytest.fixture
def artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    images = LabelledImages(torch.from_numpy((IMAGES * 255).astype(np.uint8)), torch.arange(23) % 3)
    monkeypatch.setattr(
        evaluation,
        "load_dataset",
        lambda options, *_, **__: DataSet(images, images, options.classes, {"name": "MNIST"}),
    )
    monkeypatch.setattr(evaluation, "BATCH", 5)
    monkeypatch.setattr(attacks, "BATCH", 3)
    monkeypatch.setattr(attacks, "ATTACKS", {name: attacks.ATTACKS[name] for name in ("DeepFool", "PGD")})
    write_digit_classifier(tmp_path / "small", random_groupsort(0))
    return tmp_path / "small"


def write_digit_classifier(folder: Path, graphs: Graphs) -> None:
    labels = ["0", "1", "2"]
    data = {"name": "MNIST", "options": {"dataset": "mnist", "classes": labels}}
    card = card_for(graphs).model_copy(update={"labels": labels, "data": data, "recipe": {"epsilons": [0.1, 0.3]}})
    write_artefact(folder, card, graphs.model)


def results(artefact: Path) -> dict[str, Any]:
    card = read_card(artefact)
    assert card.evaluation is not None
    passing = ("environment", "code_version")
    return {"attacks": card.attacks, **{k: v for k, v in card.evaluation.items() if k not in passing}}


def test_evaluation_on_ray_is_that_of_one_process_and_parts_of_dead_workers_are_measured_again(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    # The workers import the functions of this file.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [ROOT, ROOT / "tests", Path(__file__).parent])))
    evaluate(artefact, Path("unused"), n_attack=12, provider="cpu")
    alone = results(artefact)
    evaluate(artefact, Path("unused"), n_attack=12, provider="cpu", ray="local")
    assert results(artefact) == alone
    classifier = Classifier.load(artefact, "cpu", 1)
    assert cluster.served(classifier, artefact, 1).provider == "cpu"
    with cluster.on_ray("local", cluster.served(classifier, artefact, 1)) as runner:
        tasks = [Task({"number": n}, dying, (n, str(tmp_path / f"died-{n}"))) for n in range(3)]
        assert [part["square"][0] for part in measured(tasks, runner, None)] == [0, 1, 4]
        with pytest.raises(CertificateRefutedError, match="PGD found an image of class 1"):
            list(measured([Task({}, refuting, ())], runner, None))
        write_digit_classifier(artefact, random_groupsort(1))
        other = cluster.served(Classifier.load(artefact, "cpu", 1), tmp_path / "nowhere", 1)
        with pytest.raises(EvaluationError, match=r"nowhere.*card\.json"):
            list(measured(squares(1), cluster.RayRunner(pytest.importorskip("ray"), other), None))
