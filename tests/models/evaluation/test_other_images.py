"""An artefact is measured on other images of its classes; its card and the report on the card's images stay."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from builders import card_for, random_groupsort
from commands import run_command
from PIL import Image

pytest.importorskip("foolbox")
pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from models.__main__ import main  # noqa: E402
from models.data.folders import load_folder  # noqa: E402
from models.data.labelled import DataError  # noqa: E402
from models.evaluation import attacks, budget  # noqa: E402
from models.evaluation.images import EvaluationError  # noqa: E402
from models.evaluation.measure import evaluate  # noqa: E402
from models.recipes import DataOptions  # noqa: E402
from service.artefact.card import read_card, write_artefact  # noqa: E402

LABELS = ("cat", "dog", "emu")


def write(folder: Path, counts: dict[str, int], side: int = 4, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for label, count in counts.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            Image.fromarray(random.integers(0, 256, (side, side)).astype(np.uint8)).save(folder / label / f"{n}.png")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "pets" / "train", dict.fromkeys(LABELS, 5), seed=1)
    write(tmp_path / "pets" / "test", dict.fromkeys(LABELS, 4), seed=2)
    return tmp_path / "pets"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write(tmp_path / "clinic", {"cat": 9, "dog": 6}, side=7, seed=3)


@pytest.fixture
def artefact(tmp_path: Path, data: Path, without_drawing: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(attacks, "ATTACKS", {"DeepFool": {"steps": 5}, "PGD": attacks.ATTACKS["PGD"] | {"steps": 3}})
    graphs = random_groupsort(0)
    options = DataOptions(dataset="image-folder", classes=LABELS, image_size=4, channels=1)
    found = load_folder(data, options)
    block = {"dataset": "image-folder", **found.card, "n_test": 12}
    changes = {"labels": list(LABELS), "data": block, "recipe": {"epsilons": [0.1]}}
    write_artefact(tmp_path / "models" / "pets", card_for(graphs).model_copy(update=changes), graphs.model)
    return tmp_path / "models" / "pets"


def test_all_other_images_are_measured_and_the_card_stays(artefact: Path, data: Path, other: Path) -> None:
    evaluate(artefact, data, attacks=False, provider="cpu")
    before = {path: path.read_bytes() for path in artefact.rglob("*") if path.is_file()}
    text = evaluate(artefact, other, n_attack=5, provider="cpu")
    assert {path: path.read_bytes() for path in before} == before
    folder = artefact / "report-clinic"
    assert (folder / "evaluation.md").read_text() == text
    assert "on other images: clinic" in text.splitlines()[0]
    assert "These are other images than those of the card" in text
    assert "No image of emu" in text
    report = json.loads((folder / "evaluation.json").read_text())
    assert (report["n"], report["images"]["of_the_card"]) == (15, False)
    assert sum(map(sum, report["confusion"]["counts"])) == 15
    assert {row["card_n"] for row in report["against_the_card"]} == {12}
    assert all("file" in mistake for mistake in report["mistakes"]["worst"])
    assert [entry["n"] for entry in report["attacks"]] == [5, 5, 5]
    assert report["same_images"]["n"] == 5
    assert "| counterfactual search | lipcert |" in text
    page = (folder / "report.html").read_text()
    assert "Other images" in page
    assert "Against the card" in page


def test_images_of_the_card_get_the_same_figures_and_its_page(artefact: Path, data: Path) -> None:
    text = evaluate(artefact, data, attacks=False, provider="cpu")
    report = json.loads((artefact / "report" / "evaluation.json").read_text())
    assert report["images"]["of_the_card"]
    assert read_card(artefact).accuracy == report["accuracy"]
    assert [one["n"] for one in report["classes"]] == [4, 4, 4]
    assert "other images" not in text
    assert "Report on" in (artefact / "report.html").read_text()
    again = evaluate(artefact, data, attacks=False, provider="cpu")
    assert "as in the card" in again
    assert "differs from the card" not in again


def test_test_folder_of_the_card_given_by_itself_is_recognised(artefact: Path, data: Path) -> None:
    text = evaluate(artefact, data / "test", attacks=False, provider="cpu")
    assert "These are the test images of the card" in text
    assert (artefact / "report-test" / "evaluation.json").exists()


def test_report_on_the_images_of_the_card_is_not_overwritten_by_others(artefact: Path, other: Path) -> None:
    with pytest.raises(EvaluationError, match=r"is the folder of the report on the images of the card.*--out"):
        evaluate(artefact, other, attacks=False, provider="cpu", out=artefact / "report")


def test_unknown_class_is_named(artefact: Path, other: Path) -> None:
    write(other, {"horse": 1})
    with pytest.raises(EvaluationError, match="no class of this model: horse; its classes are cat, dog, emu"):
        evaluate(artefact, other, attacks=False, provider="cpu")


def test_model_of_a_published_set_or_without_data_is_measured_on_a_folder_of_its_classes(
    artefact: Path, other: Path, tmp_path: Path
) -> None:
    graphs = random_groupsort(0)
    for number, block in enumerate(({"name": "MNIST", "options": {"dataset": "mnist", "classes": list(LABELS)}}, {})):
        folder = tmp_path / f"model-{number}"
        card = card_for(graphs).model_copy(update={"labels": list(LABELS), "data": block})
        write_artefact(folder, card, graphs.model)
        text = evaluate(folder, other, attacks=False, provider="cpu")
        assert "other images: clinic" in text
        assert "not in the card" in text
        with pytest.raises((EvaluationError, DataError)):
            evaluate(folder, write(tmp_path / "no" / "classes", {"x": 1}).parent, attacks=False, provider="cpu")


def test_attacks_within_a_budget_say_how_many_images_were_attacked(
    artefact: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    text = evaluate(artefact, other, attack_seconds=0.01, provider="cpu")
    report = json.loads((artefact / "report-clinic" / "evaluation.json").read_text())
    used = report["attack_budget"]
    assert (used["asked"], used["attacked"]) == (15, 1)
    assert {entry["n"] for entry in report["attacks"]} == {report["same_images"]["n"]} == {1}
    assert {entry["n"] for entry in report["robust_accuracy"]} == {1}
    assert "Attacked: 1 of 15 images" in text
    assert "within --attack-seconds 0.01" in caplog.text


def test_images_of_attacks_within_a_budget_are_found_again_in_the_card(
    artefact: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "GROUPS", (5, 7))
    evaluate(artefact, data, attack_seconds=0.01, provider="cpu")
    before = read_card(artefact).evaluation
    assert before is not None
    evaluate(artefact, data, attacks=False, provider="cpu")
    after = read_card(artefact).evaluation
    assert after is not None
    for key in ("robust_accuracy", "attack_budget", "same_images"):
        assert after[key] == before[key]


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf", "soon"])
def test_budget_that_is_no_time_is_refused(artefact: Path, seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(main, ["evaluate", str(artefact), "--attack-seconds", seconds])
    assert ended.value.code == 2
