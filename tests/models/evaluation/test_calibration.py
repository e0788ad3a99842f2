"""Calibration of an artefact: the block by hand, the rest of the card byte for byte, parts that share no image."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from builders import card_for, random_groupsort
from commands import run_command

pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from models.__main__ import main  # noqa: E402
from models.data.labelled import DataSet, LabelledImages  # noqa: E402
from models.evaluation import calibration as calibrating  # noqa: E402
from models.evaluation import measure as evaluation  # noqa: E402
from models.evaluation.calibration import calibrate, score  # noqa: E402
from models.evaluation.measure import EvaluationError  # noqa: E402
from models.recipes import DataOptions  # noqa: E402
from models.training.batches import calibration_split  # noqa: E402
from service.artefact.card import read_card, write_artefact  # noqa: E402
from service.certificate.sets import share_bound  # noqa: E402
from service.inference.classifier import Classifier  # noqa: E402
from service.inference.sets import sets_of  # noqa: E402


def digits(n: int, seed: int) -> LabelledImages:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (n, 1, 4, 4)).astype(np.uint8)
    return LabelledImages(torch.from_numpy(pixels), torch.from_numpy(random.integers(0, 3, n)))


TRAIN, TEST = digits(90, 0), digits(120, 1)


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(options: DataOptions, directory: Path, *, test_only: bool) -> DataSet:
        assert options.classes is not None
        return DataSet(TRAIN.at(slice(0, 1)) if test_only else TRAIN, TEST, options.classes, {"name": "MNIST"})

    monkeypatch.setattr(evaluation, "load_dataset", load)


def artefact(folder: Path, **recipe: object) -> Path:
    labels = ["0", "1", "2"]
    block = {"name": "MNIST", "options": {"dataset": "mnist", "classes": labels}}
    graphs = random_groupsort(0)
    changes = {"labels": labels, "data": block, "recipe": {"epsilons": [0.1], **recipe}, "seed": 5}
    write_artefact(folder, card_for(graphs).model_copy(update=changes), graphs.model)
    return folder


def test_the_block_is_what_every_second_test_image_gives(tmp_path: Path) -> None:
    text = calibrate(artefact(tmp_path / "small"), tmp_path)
    block = read_card(tmp_path / "small").calibration
    assert block is not None
    classifier = Classifier.load(tmp_path / "small", "cpu", 1)
    part = TEST.at(slice(0, None, 2))
    logits_NK, radii = classifier.classify(part.pixels(torch.float64).numpy())
    label_N, certificate = part.labels_N.numpy(), classifier.certificate
    score_N = [
        min(
            (logits_NK[n, y] - logits_NK[n, j] - 4 * certificate.logit_error) / certificate.margin_bounds_KK[y, j]
            for j in range(3)
            if j != y
        )
        for n, y in enumerate(label_N)
    ]
    assert (block.n, block.model, block.confidence) == (60, classifier.digest, 0.95)
    assert "every second image of the MNIST test set" in block.source
    assert [entry.coverage for entry in block.quantiles][-1] == 0.98
    for entry in block.quantiles:
        assert entry.quantile == pytest.approx(sorted(score_N)[int(61 * (1 - Fraction(str(entry.coverage)))) - 1])
    wrong_N = radii.class_id_N != label_N
    for threshold in block.thresholds:
        accepted_N = radii.radius_N >= threshold.radius
        assert (threshold.accepted, threshold.errors) == (accepted_N.sum(), wrong_N[accepted_N].sum())
        bound = share_bound(threshold.errors, threshold.accepted, 0.05 / len(calibrating.SHARES))
        assert threshold.error_bound == pytest.approx(bound)
    assert block.thresholds[-1].radius == 0.0
    assert block.thresholds[-1].accepted == 60
    assert "measured on 60 other test images" in text


def test_all_else_in_the_card_stays_as_it_is_written(tmp_path: Path) -> None:
    path = artefact(tmp_path / "small") / "card.json"
    older = json.loads(path.read_text())
    # Cards of earlier versions have fewer members.
    del older["origin"], older["calibration"]
    before = json.dumps(older, indent=2)
    path.write_text(before + "\n")
    for _ in range(2):
        calibrate(tmp_path / "small", tmp_path)
        after = path.read_text()
        start, end = after.index('  "calibration": {'), after.index('  "accuracy"')
        assert after[:start] + after[end:] == before + "\n"


def test_images_that_were_held_out_of_the_training_calibrate_in_place_of_test_images(tmp_path: Path) -> None:
    text = calibrate(artefact(tmp_path / "small", calibration_images=30), tmp_path)
    block = read_card(tmp_path / "small").calibration
    assert block is not None
    held_out, rest = calibration_split(TRAIN, 30, 5)
    assert (len(held_out), len(rest)) == (30, 60)
    classifier = Classifier.load(tmp_path / "small", "cpu", 1)
    by_hand = calibrating.calibration_of(
        classifier.certificate, score(classifier, held_out), classifier.digest, block.source
    )
    assert block == by_hand
    assert "30 images of the MNIST training set" in block.source
    assert "measured on 120 other test images" in text


def test_the_parts_of_a_training_set_share_no_image_and_depend_on_the_seed() -> None:
    held_out, rest = calibration_split(TRAIN, 30, 5)
    known = {images.numpy().tobytes() for images in held_out.images_NCHW}
    assert known.isdisjoint(images.numpy().tobytes() for images in rest.images_NCHW)
    assert len(known) == 30
    again, other = calibration_split(TRAIN, 30, 5)[0], calibration_split(TRAIN, 30, 6)[0]
    assert torch.equal(again.images_NCHW, held_out.images_NCHW)
    assert not torch.equal(other.images_NCHW, held_out.images_NCHW)


def test_a_calibrated_artefact_answers_with_sets(tmp_path: Path) -> None:
    code = run_command(main, ["calibrate", str(artefact(tmp_path / "small")), "--data", str(tmp_path)])
    assert code.exit_code == 0, code.output
    classifier = Classifier.load(tmp_path / "small", "cpu", 1)
    logits_NK, _ = classifier.classify(TEST.pixels(torch.float64).numpy())

    class Asked:
        coverage, max_error, epsilon = 0.9, None, 0.0

    member_NK = sets_of(classifier, Asked(), logits_NK, (1, 4, 4))
    assert member_NK is not None
    calibrated_N = np.arange(0, 120, 2)
    # By the definition of the quantile, of the calibration images themselves.
    assert member_NK[calibrated_N, TEST.labels_N.numpy()[calibrated_N]].mean() >= 0.9


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="10 calibration images are too few"):
        calibrate(artefact(tmp_path / "small", calibration_images=10), tmp_path)
    assert run_command(main, ["calibrate", str(tmp_path / "small"), "--data", str(tmp_path)]).exit_code == 1
