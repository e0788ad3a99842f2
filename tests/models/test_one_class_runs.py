"""From a folder of images to a novelty model that is served and evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from PIL import Image

pytest.importorskip("foolbox")
pytest.importorskip("torch")

from models.__main__ import main
from service.artefact.card import read_card
from service.inference.classifier import Classifier

CHANGES = ["network.widths=[16,16]", "schedule.epochs=8", "schedule.batch_size=16", "epsilons=[0.05,0.5]", "name=bars"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark images with a bar whose place is the class, of 10 x 8 pixels."""
    folder, random = tmp_path_factory.mktemp("data") / "bars", np.random.default_rng(0)
    for k, label in enumerate(("low", "middle", "high")):
        (folder / label).mkdir(parents=True)
        for n in range(40):
            pixels = random.integers(0, 40, (10, 8)).astype(np.uint8)
            pixels[3 * k : 3 * k + 3] += 200
            Image.fromarray(pixels).save(folder / label / f"{n}.png")
    return folder


def run(*arguments: str) -> str:
    result = run_command(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def artefact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    changes = [part for change in [*CHANGES, 'classes=["low","middle"]'] for part in ("--set", change)]
    run(
        *("train", "image-folder-novelty", "--data", str(folder), "--out", str(out), "--threads", "1"),
        *("--device", "cpu", *changes),
    )
    return out / "bars"


def test_the_artefact_is_a_certified_model_with_two_labels(artefact: Path) -> None:
    classifier = Classifier.load(artefact, "cpu", 1)
    assert classifier.labels == ("known", "novel")
    assert classifier.certificate.n_outputs == 1
    card = read_card(artefact)
    assert card.data["counts"]["train"] == {"known": 64}
    assert card.data["counts"]["test"] == {"known": 16, "novel": 8}
    assert card.data["options"]["classes"] == ["low", "middle"]
    assert card.recipe["negatives"]["steps"] >= 0
    noise = np.random.default_rng(1).random((50, 1, 10, 8))
    assert np.mean([prediction.class_id == 1 for prediction in classifier.predict(noise)]) > 0.8


def test_the_page_of_the_training_has_the_novelty(artefact: Path) -> None:
    page = (artefact / "report.html").read_text()
    assert "<h2>Novelty</h2>" in page
    assert "other classes" in page
    assert "uniform noise" in page


@pytest.mark.usefixtures("without_drawing")
def test_an_evaluation_writes_the_novelty_to_card_and_report(artefact: Path, folder: Path) -> None:
    text = run(
        *("evaluate", str(artefact), "--data", str(folder), "--no-attacks", "--novel", str(folder / "high")),
        *("--provider", "cpu"),
    )
    assert "## Novelty" in text
    evaluation = read_card(artefact).evaluation
    assert evaluation is not None
    by_name = {one["name"]: one for one in evaluation["novelty"]["against"]}
    assert set(by_name) == {"other classes", "high", "uniform noise"}
    assert by_name["other classes"]["n"] == 8
    assert by_name["high"]["n"] == 40
    for one in by_name.values():
        assert [entry["epsilon"] for entry in one["certified_auroc"]] == [0.05, 0.5]
        assert one["certified_auroc"][1]["value"] <= one["certified_auroc"][0]["value"] <= one["auroc"]


def test_the_novelty_alone_is_measured_and_the_rest_of_the_card_stays(artefact: Path, folder: Path) -> None:
    before = read_card(artefact)
    text = run(*("evaluate", str(artefact), "--data", str(folder), "--novelty-only", "--provider", "cpu"))
    assert "| other classes | 8 |" in text
    after = read_card(artefact)
    assert after.evaluation is not None
    assert [one["name"] for one in after.evaluation["novelty"]["against"]] == ["other classes", "uniform noise"]
    assert after.model_copy(update={"evaluation": None}) == before.model_copy(update={"evaluation": None})
    found = run_command(main, ["evaluate", str(artefact), "--data", str(folder / "missing"), "--novelty-only"])
    assert found.exit_code == 1


def test_novel_images_are_for_novelty_models_alone(tmp_path: Path, folder: Path) -> None:
    import builders

    builders.write(tmp_path / "plain", builders.random_groupsort(1), "plain")
    found = run_command(
        main, ["evaluate", str(tmp_path / "plain"), "--data", str(folder), "--no-attacks", "--novel", str(folder)]
    )
    assert found.exit_code == 1
    assert "--novel is about novelty models" in found.output
