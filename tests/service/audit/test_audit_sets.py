"""The audit of certified sets and decisions: true ones hold, each forged one is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from audit_cases import Archived, Json, archive, served
from client import HEIGHT, WIDTH, Client
from encoding import encode

from service.artefact.card import AcceptanceThreshold, Calibration, ConformalQuantile, read_card, write_card
from service.audit import Conclusion

SHAPE = (1, HEIGHT, WIDTH)
OPTIONS: Json = {"coverage": 0.9, "epsilon": 0.05, "max_error": 0.1}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "calibrated"
    builders.write(folder, builders.random_groupsort(2, SHAPE, 4), "calibrated")
    card = read_card(folder)
    block = Calibration(
        model=card.graphs["model.onnx"],
        n=99,
        source="drawn",
        confidence=0.95,
        quantiles=[ConformalQuantile(coverage=0.5, quantile=0.4), ConformalQuantile(coverage=0.9, quantile=-0.1)],
        thresholds=[AcceptanceThreshold(radius=0.05, accepted=50, errors=0, error_bound=0.1)],
    )
    write_card(folder, card.model_copy(update={"calibration": block}))
    return folder


@pytest.fixture(scope="module")
def client(artefact: Path, runner: Any) -> Client:
    return served(artefact, runner)


def image(seed: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    return encode(np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8))


@pytest.fixture(scope="module")
def archived(client: Client, artefact: Path) -> Archived:
    """An answer with two classes in its set, which is accepted."""
    for seed in range(50):
        found = archive(client, image(seed), artefact, **OPTIONS)
        if len(found.answer["set"]) == 2 and found.answer["decision"] == "accept":
            return found
    raise AssertionError("no such image")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", [OPTIONS, {"coverage": 0.3}, {"max_error": 0.5}])
def test_a_true_answer_holds(client: Client, artefact: Path, tmp_path: Path, seed: int, options: Json) -> None:
    verdict = archive(client, image(seed), artefact, **options).check(tmp_path)
    assert verdict.conclusion is Conclusion.HOLDS, verdict.lines
    assert "not audited" not in verdict.lines[0]


def test_of_a_resized_image_sets_and_decisions_are_named_as_not_audited(
    client: Client, artefact: Path, tmp_path: Path
) -> None:
    verdict = archive(client, image(0, 8, 8), artefact, resize=True, **OPTIONS).check(tmp_path)
    assert verdict.conclusion is Conclusion.HOLDS, verdict.lines
    assert verdict.lines[0].endswith("; not audited: set, decision")


def other_class(answer: Json) -> int:
    return next(entry["class_id"] for entry in answer["set"] if entry["class_id"] != answer["class_id"])


def without(answer: Json, class_id: int) -> list[Json]:
    return [entry for entry in answer["set"] if entry["class_id"] != class_id]


def everything(_: Json) -> list[Json]:
    return [{"class_id": k, "label": f"class {k}"} for k in range(4)]


FORGED: dict[str, tuple[Callable[[Json], Json], str]] = {
    "a class left out": (lambda a: {"set": without(a, other_class(a))}, "is missing, its exact score is"),
    "the predicted class left out": (lambda a: {"set": without(a, a["class_id"])}, "set: the predicted class"),
    "all classes": (lambda a: {"set": everything(a)}, "does not belong to it, its exact score is"),
    "another order": (lambda a: {"set": a["set"][::-1]}, "do not rise"),
    "a class twice": (lambda a: {"set": [a["set"][0], *a["set"]]}, "do not rise"),
    "a class of no label": (
        lambda a: {"set": [*a["set"], {"class_id": 9, "label": "x"}]},
        "set: class 9, the card has",
    ),
    "another label": (lambda a: {"set": [{**a["set"][0], "label": "x"}, a["set"][1]]}, "set: label 'x', class"),
    "a larger coverage": (lambda _: {"coverage": 0.95}, "coverage: 0.95, which the calibration of the card does not"),
    "a smaller coverage": (lambda _: {"coverage": 0.4}, "does not belong to it"),
    "a larger epsilon": (
        lambda a: {"certificate": {**a["certificate"], "epsilon": 5.0, "robust_at_epsilon": False}},
        "is missing, its exact score is",
    ),
    "a coverage that is no share": (lambda _: {"coverage": -5.0}, "coverage: -5.0 is not between 0 and 1"),
    "no coverage": (lambda _: {"coverage": None}, "set: given with coverage null"),
    "no set": (lambda _: {"set": None}, "set: null with coverage 0.9"),
    "the other decision": (lambda _: {"decision": "abstain"}, "decision: abstain, and the radius"),
    "another word": (lambda _: {"decision": "maybe"}, "decision: 'maybe', expected accept or abstain"),
    "no decision": (lambda _: {"decision": None}, "decision: null with max_error 0.1"),
    "a smaller error": (lambda _: {"max_error": 0.01}, "max_error: 0.01, which the calibration of the card does not"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_set_or_decision_does_not_hold(archived: Archived, tmp_path: Path, name: str) -> None:
    forge, expected = FORGED[name]
    verdict = archived.check(tmp_path, {**archived.answer, **forge(archived.answer)})
    assert verdict.conclusion is Conclusion.DOES_NOT_HOLD, verdict.lines
    assert any(expected in reason for reason in verdict.failed), verdict.failed


def test_an_answer_that_should_abstain_is_not_accepted(client: Client, artefact: Path, tmp_path: Path) -> None:
    for seed in range(50):
        found = archive(client, image(seed), artefact, max_error=0.1)
        if found.answer["decision"] == "abstain":
            verdict = found.check(tmp_path, found.changed(decision="accept"))
            assert any("decision: accept, and the radius" in reason for reason in verdict.failed)
            return
    raise AssertionError("no such image")


def test_a_set_of_an_artefact_without_calibration_does_not_hold(archived: Archived, tmp_path: Path) -> None:
    builders.write(tmp_path / "calibrated", builders.random_groupsort(2, SHAPE, 4), "calibrated")
    verdict = archived.check(tmp_path, artefact=tmp_path / "calibrated")
    assert any("coverage: 0.9, which the calibration of the card does not have" in one for one in verdict.failed)


def test_an_answer_of_a_version_without_sets_holds(archived: Archived, tmp_path: Path) -> None:
    older = {name: value for name, value in archived.answer.items() if name not in ("coverage", "set", "max_error")}
    del older["decision"]
    assert archived.check(tmp_path, older).conclusion is Conclusion.HOLDS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": f"sha256:{'0' * 64}"}, "calibration: it is about sha256:000"),
        ({"quantiles": [{"coverage": 0.9, "quantile": -0.1}, {"coverage": 0.5, "quantile": 0.4}]}, "do not rise"),
        ({"n": 8}, "calibration: 8 images are too few"),
    ],
)
def test_a_calibration_that_the_server_refuses_decides_nothing(
    archived: Archived, tmp_path: Path, change: Json, reason: str
) -> None:
    copied = tmp_path / "calibrated"
    shutil.copytree(archived.artefact, copied)
    card = json.loads((copied / "card.json").read_text())
    card["calibration"].update(change)
    (copied / "card.json").write_text(json.dumps(card))
    verdict = archived.check(tmp_path, artefact=copied)
    assert verdict.conclusion is not Conclusion.HOLDS
    assert any(reason in line for line in verdict.lines)
