"""Answers of networks of other libraries: true ones hold, forged ones never do."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import nextafter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_cases import Archived, Json, archive, served
from encoding import encode
from thorough import often

from service.artefact.conversion import Wish, convert
from service.audit import Conclusion

SAMPLES = Path(__file__).resolve().parents[2] / "samples_of_libraries"
REFUSED = {"householder-orthogonium", "householder-torchlip", "weights-computed", "weights-in-another-file"}
"""Samples that no import accepts."""
ACCEPTED = sorted({file.stem for file in SAMPLES.glob("*.onnx")} - REFUSED)
BENT = ["l2-norm-residual", "l2-pool", "l2-pool-older", "positive-and-negative", "sll-convolution", "soft-huber"]
"""Samples with a rule of their own, and a radius above 0."""


def answered(folder: Path, runner: Any, name: str, seed: int = 0) -> Archived:
    """Return an answer of a sample, imported into a folder of models."""
    convert(SAMPLES / f"{name}.onnx", Wish(name, None, None), folder / name)
    shape = json.loads((folder / name / "card.json").read_text())["input"]
    pixels = np.random.default_rng(seed).integers(0, 256, (shape["height"], shape["width"]), dtype=np.uint8)
    return archive(served(folder / name, runner), encode(pixels), folder / name, epsilon=0.01, counterfactual=True)


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_answer_of_a_network_of_another_library_holds(runner: Any, tmp_path: Path, name: str) -> None:
    verdict = answered(tmp_path, runner, name).check(tmp_path)
    assert verdict.conclusion is Conclusion.HOLDS, verdict.lines


def with_terms(**changes: Callable[[float], float]) -> Callable[[Json], None]:
    """Change terms of the radius, and the radius as they say."""

    def forge(answer: Json) -> None:
        terms = answer["certificate"]
        for member, change in changes.items():
            terms[member] = change(terms[member])
        i, j = answer["class_id"], terms["runner_up"]["class_id"]
        margin = answer["logits"][i] - answer["logits"][j] - 4 * terms["logit_error"]
        terms["radius"] = nextafter(nextafter(margin / terms["lipschitz_bound"], 0.0), 0.0)
        terms["radius_255"] = nextafter(terms["radius"] * 255, 0.0)

    return forge


def of_logits(change: Callable[[list[float]], object]) -> Callable[[Json], object]:
    return lambda answer: change(answer["logits"])


FORGERIES: dict[str, Callable[[Json], object]] = {
    "flatter": with_terms(lipschitz_bound=lambda bound: bound * 0.999),
    "much flatter": with_terms(lipschitz_bound=lambda bound: bound / 2),
    "exact": with_terms(logit_error=lambda _: 0.0),
    "more exact": with_terms(logit_error=lambda error: error / 10),
    "larger radius": lambda answer: answer["certificate"].update(radius=answer["certificate"]["radius"] * 1.01),
    "another logit": of_logits(lambda logits: logits.__setitem__(0, logits[0] + 0.01)),
    "scaled logits": of_logits(lambda logits: logits.__setitem__(slice(None), [2 * one for one in logits])),
    "reversed logits": of_logits(lambda logits: logits.reverse()),
    "another digest": lambda answer: answer.update(digest="sha256:" + "0" * 64),
}


@pytest.mark.parametrize("name", often(["l2-pool", "positive-and-negative", "soft-huber"], BENT))
def test_no_forged_answer_of_such_a_network_holds(runner: Any, tmp_path: Path, name: str) -> None:
    archived = answered(tmp_path, runner, name)
    assert archived.answer["certificate"]["radius"] > 0.0
    for forge in FORGERIES.values():
        answer = archived.changed()
        forge(answer)
        assert archived.check(tmp_path, answer).conclusion is not Conclusion.HOLDS
    for other in range(1, 4):
        image = answered(tmp_path / str(other), runner, name, other).image
        assert archived.check(tmp_path, image=image).conclusion is not Conclusion.HOLDS
