"""Evaluation: its figures are the ones that can be computed by hand, and its checks can fail."""

from __future__ import annotations

import json
from dataclasses import replace
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
from models.evaluation import attacks  # noqa: E402
from models.evaluation import measure as evaluation  # noqa: E402
from models.evaluation.attacks import AttackResult, CertificateRefutedError  # noqa: E402
from models.evaluation.measure import EvaluationError, EvaluationInterrupted, evaluate  # noqa: E402
from models.evaluation.partial import sources  # noqa: E402
from models.evaluation.summary import (  # noqa: E402
    Measured,
    ReferenceProofs,
    count_nearer_than_radius,
    inside_largest_radius,
    summarise,
    summarise_attacks,
)
from models.recipes import DataOptions  # noqa: E402
from service.artefact.card import read_card, write_artefact  # noqa: E402
from service.inference.classifier import with_references  # noqa: E402

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
    write_artefact(folder, card, graphs.model)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artefact whose evaluation draws its figures."""

    def load(options: DataOptions, directory: Path, *, test_only: bool) -> DataSet:
        assert options.classes is not None
        return DataSet(digits(1), digits(12), options.classes, {"name": "MNIST"})

    monkeypatch.setattr(evaluation, "load_dataset", load)
    monkeypatch.setattr(attacks, "ATTACKS", {"DeepFool": {"steps": 5}, "PGD": attacks.ATTACKS["PGD"] | {"steps": 3}})
    write_digit_classifier(tmp_path / "small", random_groupsort(0))
    return tmp_path / "small"


@pytest.fixture
def artefact(drawn: Path, without_drawing: None) -> Path:
    """An artefact whose evaluation draws nothing."""
    return drawn


def test_evaluation_writes_report_and_card(drawn: Path) -> None:
    text = evaluate(drawn, Path("unused"), n_attack=4, provider="cpu")
    card = read_card(drawn)
    assert card.evaluation is not None
    assert card.accuracy == card.evaluation["accuracy"]
    assert [entry.epsilon for entry in card.certified_accuracy] == EPSILONS
    assert {entry.n for entry in card.certified_accuracy} == {12}
    assert all(entry.with_references >= entry.value for entry in card.certified_accuracy)  # type: ignore[operator]
    assert card.evaluation["with_references"]["median_radius"] >= card.evaluation["median_radius"]
    assert [entry["name"] for entry in card.attacks] == ["DeepFool", "PGD", "union"]
    assert all(entry["n"] == 4 for entry in card.attacks)
    assert 0 < card.evaluation["tightness"]["median"] <= 1
    assert set(card.evaluation["tightness"]["quantiles"]) == {"0.05", "0.25", "0.5", "0.75", "0.95"}
    assert all(entry["successes"] == 0 for entry in card.attacks)
    assert card.evaluation["counterfactuals"]["nearer_than_radius"] == 0
    assert card.evaluation["counterfactuals"]["nearer_than_radius_with_references"] == 0
    assert card.evaluation["counterfactuals"]["other_class_when_posted_back"] == 0
    report = drawn / "report"
    assert json.loads((report / "evaluation.json").read_text())["n"] == 12
    assert (report / "evaluation.md").read_text() == text
    assert not (report / ".partial").exists()
    for plot in ("certified_accuracy", "radii", "tightness", "counterfactuals", "saliency"):
        plot = f"{plot}.png"
        assert f"({plot})" in text
        assert (report / plot).read_bytes().startswith(b"\x89PNG")


def test_limited_evaluation_leaves_the_card_alone(artefact: Path, tmp_path: Path) -> None:
    before = read_card(artefact)
    evaluate(artefact, Path("unused"), attacks=False, limit=5, provider="cpu", out=tmp_path / "report")
    assert read_card(artefact) == before
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["n"] == 5


def test_evaluation_without_attacks_keeps_those_of_the_card(artefact: Path) -> None:
    evaluate(artefact, Path("unused"), n_attack=4, provider="cpu")
    before = read_card(artefact)
    assert before.evaluation is not None
    evaluate(artefact, Path("unused"), attacks=False, provider="cpu")
    after = read_card(artefact)
    assert after.evaluation is not None
    assert after.attacks == before.attacks
    assert after.evaluation["tightness"] == before.evaluation["tightness"]
    report = artefact / "report"
    assert json.loads((report / "evaluation.json").read_text())["attacks"] == before.attacks
    assert "| union | all of the above |" in (report / "evaluation.md").read_text()
    assert "(tightness.png)" in (report / "evaluation.md").read_text()


def test_card_of_an_evaluation_with_one_radius_is_read_and_its_attacks_are_reported(artefact: Path) -> None:
    evaluate(artefact, Path("unused"), n_attack=4, provider="cpu")
    before = read_card(artefact)
    assert before.evaluation is not None
    card = json.loads((artefact / "card.json").read_text())
    for entry in card["certified_accuracy"]:
        del entry["with_references"]
    for attack in card["attacks"]:
        del attack["with_references"]
    for share in card["evaluation"]["robust_accuracy"]:
        del share["certified_with_references"]
    del card["evaluation"]["with_references"], card["evaluation"]["tightness"]["with_references"]
    (artefact / "card.json").write_text(json.dumps(card))
    assert {entry.with_references for entry in read_card(artefact).certified_accuracy} == {None}
    text = evaluate(artefact, Path("unused"), attacks=False, provider="cpu")
    after = read_card(artefact)
    assert after.evaluation is not None
    assert after.evaluation["robust_accuracy"] == before.evaluation["robust_accuracy"]
    assert after.attacks == card["attacks"]
    assert all(entry.with_references is not None for entry in after.certified_accuracy)
    assert "of the fast radius; they were run before there was a larger one" in text


def test_interrupted_evaluation_goes_on_where_it_stopped(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, ran = attacks.AttackedBatch.attack, list[str]()

    def interrupted(target: attacks.AttackedBatch, parameters: object, seed: int) -> object:
        if target.attack_name == "PGD":
            raise KeyboardInterrupt
        return attack(target, parameters, seed)  # type: ignore[arg-type]

    def counted(target: attacks.AttackedBatch, parameters: object, seed: int) -> object:
        ran.append(target.attack_name)
        return attack(target, parameters, seed)  # type: ignore[arg-type]

    monkeypatch.setattr(attacks.AttackedBatch, "attack", interrupted)
    before = read_card(artefact)
    with pytest.raises(EvaluationInterrupted, match=r"3 parts are stored in .*same command again"):
        evaluate(artefact, Path("unused"), n_attack=4, provider="cpu")
    assert read_card(artefact) == before
    monkeypatch.setattr(attacks.AttackedBatch, "attack", counted)
    monkeypatch.setattr(evaluation, "search_counterfactuals", lambda *_: pytest.fail("the counterfactuals were kept"))
    monkeypatch.setattr(evaluation, "prove_with_references", lambda *_: pytest.fail("the radii were kept"))
    evaluate(artefact, Path("unused"), n_attack=4, provider="cpu")
    assert ran == ["PGD"]


def test_results_are_the_same_after_an_interruption(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> dict[str, object]:
        evaluation = read_card(artefact).evaluation
        assert evaluation is not None
        return {key: value for key, value in evaluation.items() if key not in ("environment", "code_version")}

    evaluate(artefact, Path("unused"), n_attack=4, provider="cpu")
    at_once = results()
    with monkeypatch.context() as patch:
        patch.setattr(attacks, "union", lambda results: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(EvaluationInterrupted):
            evaluate(artefact, Path("unused"), n_attack=4, provider="cpu")
    evaluate(artefact, Path("unused"), n_attack=4, provider="cpu")
    assert results() == at_once


def test_partial_results_of_another_artefact_are_measured_again(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(attacks, "run_attacks", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(EvaluationInterrupted):
            evaluate(artefact, Path("unused"), provider="cpu")
    measured, measure = list[int](), evaluation.search_counterfactuals
    monkeypatch.setattr(evaluation, "search_counterfactuals", lambda *a: measured.append(1) or measure(*a))
    write_digit_classifier(artefact, random_groupsort(1))
    evaluate(artefact, Path("unused"), attacks=False, provider="cpu")
    assert measured == [1]


def test_refuted_certificate_is_an_error_with_both_images(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, found = np.zeros((1, 4, 4)), np.ones((1, 4, 4))

    def refute(*_: object, **__: object) -> None:
        raise CertificateRefutedError("PGD", image, found, 0, 1, 9.0)

    monkeypatch.setattr(attacks, "run_attacks", refute)
    with pytest.raises(EvaluationError, match=r"REFUTED: PGD found.*class 1 at distance 4\.0"):
        evaluate(artefact, Path("unused"), provider="cpu")
    with np.load(artefact / "report" / "refuted.npz") as evidence:
        assert np.array_equal(evidence["image"], image)
        assert np.array_equal(evidence["found"], found)
    assert not (artefact / "report" / "evaluation.md").exists()


@pytest.mark.parametrize(("option", "value"), [("n_attack", 13), ("limit", 13)])
def test_more_images_than_there_are_is_an_error(artefact: Path, option: str, value: int) -> None:
    with pytest.raises(EvaluationError, match=f"--{option.replace('_', '-')} 13 asks for more than the 12 images"):
        evaluate(artefact, Path("unused"), provider="cpu", **{option: value})  # type: ignore[arg-type]


def test_attacked_images_are_spread_over_a_set_that_is_sorted_by_class() -> None:
    assert evaluation.evenly_spaced(4, 12, "--n-attack").tolist() == [0, 3, 6, 9]
    assert evaluation.evenly_spaced(12, 12, "--n-attack").tolist() == list(range(12))


def test_missing_library_is_an_error_that_says_how_to_install_it(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = attacks.util.find_spec
    monkeypatch.setattr(attacks.util, "find_spec", lambda name: None if name == "art" else find(name))
    with pytest.raises(EvaluationError, match=r"adversarial-robustness-toolbox.*\[evaluate\].*--no-attacks"):
        evaluate(artefact, Path("unused"), provider="cpu")
    evaluate(artefact, Path("unused"), attacks=False, provider="cpu")


def test_folder_that_cannot_be_written_is_an_error_of_the_evaluation(artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match=r"cannot be written.*--out"):
        evaluate(artefact, Path("unused"), attacks=False, provider="cpu", out=tmp_path / "file")


def test_command_ends_with_130_when_it_is_interrupted(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "search_counterfactuals", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = run_command(main, ["evaluate", str(artefact), "--provider", "cpu"])
    assert result.exit_code == 130
    assert "same command again" in result.output


def test_artefact_whose_card_names_no_images_is_refused(artefact: Path, tmp_path: Path) -> None:
    graphs = random_groupsort(0)
    write_artefact(tmp_path / "cats", card_for(graphs, "cats"), graphs.model)
    with pytest.raises(EvaluationError, match=r"does not say which images.*models train"):
        evaluate(tmp_path / "cats", Path("unused"), provider="cpu")


def test_artefact_of_another_image_size_is_refused(artefact: Path, tmp_path: Path) -> None:
    write_digit_classifier(tmp_path / "large", random_groupsort(0, shape=(1, 6, 6)))
    with pytest.raises(EvaluationError, match=r"\(1, 6, 6\).*\(1, 4, 4\)"):
        evaluate(tmp_path / "large", Path("unused"), provider="cpu")


def test_provider_that_cannot_be_had_is_an_error_of_the_evaluation(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.runtime.provider.missing_for_cuda", lambda: "there is no driver; install it.")
    with pytest.raises(EvaluationError, match="no driver"):
        evaluate(artefact, Path("unused"), provider="cuda")


def test_command_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    result = run_command(main, ["evaluate", str(tmp_path / "nothing"), "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "card.json" in result.output


def _measured() -> Measured:
    classifier = load(random_groupsort(0))
    image = np.random.default_rng(0).integers(0, 256, (6, 1, 4, 4)) / 255
    predictions = classifier.predict(image)
    counterfactuals = classifier.counterfactual(image, predictions, [None] * len(image))
    back = np.array([answer.class_id for answer in counterfactuals])
    found = evaluation.prove_with_references(classifier, image, EPSILONS)
    at = dict(zip(EPSILONS, found["radius_at_epsilon"], strict=True))
    proved = ReferenceProofs(found["radius"], found["steps"], at)
    return Measured(image, np.array([p.class_id for p in predictions]), predictions, counterfactuals, back, proved)


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


def test_certified_accuracy_with_reference_images_is_that_of_answers_with_this_epsilon() -> None:
    measured = _measured()
    at = {0.1: np.array([0.2, 0.2, 0.0, 0.1, 0.3, 0.3])}
    proved = replace(measured.proved, radius_N=np.full(6, 0.4), radius_at_epsilon=at)
    wrong = np.where(np.arange(6) == 5, measured.label_N + 1, measured.label_N)
    figures = summarise(replace(measured, label_N=wrong, proved=proved), [0.1, 0.3, 0.4])
    shares = [entry["with_references"] for entry in figures["certified_accuracy"]]
    assert shares == [pytest.approx(3 / 6), pytest.approx(5 / 6), 0.0]
    assert figures["with_references"]["median_radius"] == 0.4


def test_radii_with_reference_images_are_those_of_the_answers() -> None:
    classifier, measured = load(random_groupsort(0)), _measured()
    view, n = classifier.view((1, 4, 4)), len(measured.predictions)
    for epsilon, largest, radius_N in (
        (None, True, measured.proved.radius_N),
        (0.3, False, measured.proved.radius_at_epsilon[0.3]),
    ):
        answers = with_references(view, measured.image_NCHW, measured.predictions, [epsilon] * n, [largest] * n)
        assert radius_N.tolist() == [answer.radius for answer in answers]
    assert (measured.proved.radius_N >= measured.radius_N).all()
    assert measured.proved.steps_N.sum() > 0


def test_counterfactual_of_another_class_inside_the_larger_radius_refutes_it() -> None:
    measured = _measured()
    assert inside_largest_radius(measured).tolist() == []
    far = np.array([answer.distance for answer in measured.counterfactuals]) * (np.arange(6) == 2) * 1.01
    forged = replace(measured, proved=replace(measured.proved, radius_N=far))
    assert inside_largest_radius(forged).tolist() == [2]
    same_class = replace(measured.counterfactuals[2], class_id=measured.predictions[2].class_id)
    unreached = replace(
        forged, counterfactuals=[*measured.counterfactuals[:2], same_class, *measured.counterfactuals[3:]]
    )
    assert inside_largest_radius(unreached).tolist() == []


def test_evaluation_with_a_refuting_counterfactual_writes_no_report(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove = evaluation.prove_with_references

    def larger(*arguments: Any) -> dict[str, np.ndarray]:
        found = prove(*arguments)
        return {**found, "radius": found["radius"] + 9.0}

    monkeypatch.setattr(evaluation, "prove_with_references", larger)
    with pytest.raises(EvaluationError, match="REFUTED: the search for counterfactuals found"):
        evaluate(artefact, Path("unused"), attacks=False, provider="cpu")
    assert (artefact / "report" / "refuted.npz").exists()
    assert not (artefact / "report" / "evaluation.md").exists()


def test_robust_accuracy_lies_above_certified_accuracy_and_tightness_is_the_quotient() -> None:
    measured = _measured()
    radius = np.array([prediction.radius for prediction in measured.predictions])
    chosen = np.array([0, 2, 4, 5])
    distance = np.array([2.0, 4.0, np.inf, 1.0]) * radius[chosen]
    best = measured.proved.radius_N[chosen]
    nearest = AttackResult("union", "", {}, distance, radius[chosen], best)
    between = float(1.5 * radius[chosen[0]])
    figures = summarise_attacks(measured, chosen, nearest, [0.0, between, 1e9])
    assert [entry["certified"] for entry in figures["robust_accuracy"]] == [
        1.0,
        np.mean(radius[chosen] > between),
        0.0,
    ]
    assert [entry["under_attack"] for entry in figures["robust_accuracy"]] == [1.0, np.mean(distance > between), 0.25]
    assert figures["tightness"]["n"] == 3
    assert figures["tightness"]["median"] == pytest.approx(0.5)
    assert figures["tightness"]["with_references"]["median"] == np.median((best / distance)[np.isfinite(distance)])
    assert [entry["certified_with_references"] for entry in figures["robust_accuracy"]] == [
        1.0,
        np.mean(best > between),
        0.0,
    ]


def test_wrong_answer_is_robust_at_no_epsilon() -> None:
    measured = _measured()
    wrong = replace(measured, label_N=(measured.label_N + 1) % 3)
    radius = np.array([prediction.radius for prediction in measured.predictions])
    nearest = AttackResult("union", "", {}, np.full(6, np.inf), radius, radius)
    (entry,) = summarise_attacks(wrong, np.arange(6), nearest, [0.0])["robust_accuracy"]
    assert entry == {
        "epsilon": 0.0,
        "certified": 0.0,
        "certified_with_references": 0.0,
        "under_attack": 0.0,
        "n": 6,
    }


def test_partial_results_depend_on_the_sources_of_the_service_and_of_the_evaluation() -> None:
    names = {"/".join(path.parts[-3:]) for path in sources()}
    assert {
        "service/certificate/radius.py",
        "service/inference/classifier.py",
        "models/evaluation/libraries.py",
    } <= names
