"""Evaluation: its figures are the ones that can be computed by hand, and its checks can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from builders import Graphs, card_for, linear, load, random_groupsort

pytest.importorskip("foolbox")
pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

from models import attacks, evaluation  # noqa: E402
from models.__main__ import app  # noqa: E402
from models.attacks import ServedModel, exact_distance, judge, run_attacks  # noqa: E402
from models.data import DataSet, LabelledImages  # noqa: E402
from models.evaluation import EvaluationError, Measured, count_nearer_than_radius, evaluate, summarise  # noqa: E402
from models.recipes import DataOptions  # noqa: E402
from service.artefact import read_card, write_artefact  # noqa: E402

EPSILONS = [0.1, 0.3]


def digits(n: int) -> LabelledImages:
    random = np.random.default_rng(0)
    return LabelledImages(
        torch.from_numpy(random.integers(0, 256, (n, 1, 4, 4)).astype(np.uint8)), torch.from_numpy(np.arange(n) % 3)
    )


def write_digit_classifier(folder: Path, graphs: Graphs) -> None:
    labels = ["0", "1", "2"]
    data = {"name": "MNIST", "options": {"dataset": "mnist", "classes": labels}}
    card = card_for(graphs).model_copy(update={"labels": labels, "data": data, "recipe": {"epsilons": EPSILONS}})
    write_artefact(folder, card, graphs.model, graphs.transport)


@pytest.fixture
def artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def load(options: DataOptions, directory: Path, *, test_only: bool) -> DataSet:
        assert options.classes is not None
        return DataSet(digits(1), digits(12), options.classes, {"name": "MNIST"})

    monkeypatch.setattr(evaluation, "load_dataset", load)
    monkeypatch.setattr(attacks, "ATTACKS", {"DeepFool": {"steps": 5}, "PGD": attacks._PGD | {"steps": 3}})
    write_digit_classifier(tmp_path / "small", random_groupsort(0))
    return tmp_path / "small"


def test_served_model_has_the_gradient_of_the_graph() -> None:
    classifier = load(random_groupsort(0))
    image = torch.rand(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ServedModel(classifier), (image,), eps=1e-6, atol=1e-6)


def test_served_model_of_one_output_has_two_logits() -> None:
    classifier = load(random_groupsort(0, n_outputs=1))
    image = torch.rand(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert ServedModel(classifier)(image).shape == (3, 2)
    assert torch.autograd.gradcheck(ServedModel(classifier), (image,), eps=1e-6, atol=1e-6)


def test_evaluation_writes_report_and_card(artefact: Path) -> None:
    text = evaluate(artefact, Path("unused"), n_attack=4, provider="cpu")
    card = read_card(artefact)
    assert card.evaluation is not None
    assert card.accuracy == card.evaluation["accuracy"]
    assert [entry.epsilon for entry in card.certified_accuracy] == EPSILONS
    assert {entry.n for entry in card.certified_accuracy} == {12}
    assert [entry["name"] for entry in card.attacks] == ["DeepFool", "PGD"]
    assert all(entry["successes"] == 0 for entry in card.attacks)
    assert card.evaluation["counterfactuals"]["nearer_than_radius"] == 0
    assert card.evaluation["counterfactuals"]["other_class_when_posted_back"] == 0
    report = artefact / "report"
    assert json.loads((report / "evaluation.json").read_text())["n"] == 12
    assert (report / "evaluation.md").read_text() == text
    for plot in ("certified_accuracy.png", "counterfactuals.png"):
        assert (report / plot).read_bytes().startswith(b"\x89PNG")


def test_limited_evaluation_leaves_the_card_alone(artefact: Path, tmp_path: Path) -> None:
    before = read_card(artefact)
    evaluate(artefact, Path("unused"), attacks=False, limit=5, provider="cpu", out=tmp_path / "report")
    assert read_card(artefact) == before
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["n"] == 5


def test_evaluation_without_attacks_keeps_those_of_the_card(artefact: Path) -> None:
    evaluate(artefact, Path("unused"), n_attack=4, provider="cpu")
    attacked = read_card(artefact).attacks
    evaluate(artefact, Path("unused"), attacks=False, provider="cpu")
    assert read_card(artefact).attacks == attacked


def test_artefact_whose_card_names_no_images_is_refused(artefact: Path, tmp_path: Path) -> None:
    graphs = random_groupsort(0)
    write_artefact(tmp_path / "cats", card_for(graphs, "cats"), graphs.model, graphs.transport)
    with pytest.raises(EvaluationError, match=r"does not say which images.*models train"):
        evaluate(tmp_path / "cats", Path("unused"), provider="cpu")


def test_artefact_of_another_image_size_is_refused(artefact: Path, tmp_path: Path) -> None:
    write_digit_classifier(tmp_path / "large", random_groupsort(0, shape=(1, 6, 6)))
    with pytest.raises(EvaluationError, match=r"\(1, 6, 6\).*\(1, 4, 4\)"):
        evaluate(tmp_path / "large", Path("unused"), provider="cpu")


def test_provider_that_cannot_be_had_is_an_error_of_the_evaluation(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine._missing_for_cuda", lambda: "there is no driver; install it.")
    with pytest.raises(EvaluationError, match="no driver"):
        evaluate(artefact, Path("unused"), provider="cuda")


def test_command_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "nothing"), "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "card.json" in result.output


def _measured() -> Measured:
    classifier = load(random_groupsort(0))
    image = np.random.default_rng(0).integers(0, 256, (6, 1, 4, 4)) / 255
    predictions = classifier.predict(image)
    counterfactuals = classifier.counterfactual(image, predictions, None)
    back = np.array([answer.class_id for answer in counterfactuals])
    return Measured(image, np.array([p.class_id for p in predictions]), predictions, counterfactuals, back)


def test_figures_are_those_of_the_answers() -> None:
    measured = _measured()
    figures = summarise(measured, [0.0, 1e9])
    assert figures["n"] == 6
    assert figures["accuracy"] == 1.0
    assert [entry["value"] for entry in figures["certified_accuracy"]] == [1.0, 0.0]
    radii = [prediction.radius for prediction in measured.predictions]
    distances = [answer.distance for answer in measured.counterfactuals]
    assert figures["median_radius"] == np.median(radii)
    assert figures["counterfactuals"]["median_radius_over_distance"] == np.median(np.divide(radii, distances))


def test_counterfactual_nearer_than_the_radius_is_counted() -> None:
    measured = _measured()
    assert count_nearer_than_radius(measured) == 0
    first = measured.counterfactuals[0]
    for lie in (
        replace(first, distance=0.0),
        replace(first, pixels_CHW=np.rint(measured.image_NCHW[0] * 255).astype(np.uint8)),
    ):
        forged = replace(measured, counterfactuals=[lie, *measured.counterfactuals[1:]])
        assert count_nearer_than_radius(forged) == 1


def test_attack_that_succeeds_is_counted() -> None:
    """With a radius that is too large the attacks succeed: the count of zero means something."""
    classifier = load(linear(np.stack([np.ones(4), -np.ones(4)]) / 2, np.zeros(2), (1, 2, 2)))
    image = np.full((1, 1, 2, 2), 0.5)
    class_id, radius = np.array([0]), np.array([1.0])
    found = np.full((1, 1, 2, 2), 0.5)
    found[0, 0] = [[0.9, 0.9], [0.9, 0.9]]
    assert judge(classifier.classify, image, found, class_id, radius) == (0, [])
    wrong = partial(judge, classifier.classify, image, class_id_N=np.array([1]))
    assert wrong(found, radius_N=radius)[0] == 1
    # Found outside the ball, pulled back inside it.
    assert wrong(found, radius_N=np.array([0.1]))[0] == 1


def test_every_attack_runs_and_none_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "_CARLINI_WAGNER", attacks._CARLINI_WAGNER | {"steps": 5, "binary_search_steps": 2})
    monkeypatch.setitem(attacks.ATTACKS, "Carlini-Wagner", attacks._CARLINI_WAGNER | {"steps": 5})
    classifier = load(random_groupsort(2, n_outputs=4))
    image = np.random.default_rng(0).integers(0, 256, (6, 1, 4, 4)) / 255
    results = run_attacks(classifier, image, progress=False)
    assert [result.name for result in results] == ["DeepFool", "PGD", "Carlini-Wagner"]
    assert all(result.successes == 0 for result in results)
    assert all(result.n == 6 for result in results)


def test_descent_uses_the_whole_ball_and_no_more() -> None:
    classifier = load(linear(np.stack([np.ones(16), -np.ones(16)]) / 4, np.zeros(2), (1, 4, 4)))
    image = np.full((2, 1, 4, 4), 0.6)
    radius = np.array([0.2, 0.4])
    found = attacks._attack(
        "PGD",
        attacks._PGD,
        attacks.PyTorchModel(ServedModel(classifier).eval(), bounds=(0, 1), device="cpu"),
        image,
        np.array([0, 0]),
        radius,
    )
    for n in range(2):
        assert 0.99 * radius[n] < exact_distance(image[n], found[n]) <= attacks.INSIDE * radius[n] * (1 + 1e-9)


def test_distance_is_exact_for_numbers_that_cancel() -> None:
    image = np.array([1e8, 1.0, 1e-8])
    assert exact_distance(np.add(image, [3.0, 4.0, 0.0]), image) == pytest.approx(5.0, rel=1e-15)
