"""The audit of `novelty`: a true decision holds, each forged one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_cases import Archived, Json, archive
from client import Client
from encoding import encode
from guards import write_guarded

from service.api.app import create_app
from service.audit import Conclusion, Verdict, audit
from service.errors import KeptError
from service.settings import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_guarded(folder)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path, runner: Any) -> Client:
    return Client(create_app(Settings(models=folder, default_model="guarded", provider="cpu")), runner)


def archived(client: Client, folder: Path, seed: int) -> Archived:
    image = encode(np.random.default_rng(seed).integers(0, 256, (4, 5), dtype=np.uint8))
    return archive(client, image, folder / "guarded", novelty=True)


def check(found: Archived, at: Path, answer: Json, guard: Path | None) -> Verdict:
    (at / "answer.json").write_text(json.dumps(answer))
    (at / "image").write_bytes(found.image)
    return audit(at / "answer.json", at / "image", found.artefact, guard)


@pytest.mark.parametrize("seed", range(6))
def test_a_true_decision_holds(client: Client, folder: Path, tmp_path: Path, seed: int) -> None:
    found = archived(client, folder, seed)
    verdict = check(found, tmp_path, found.answer, folder / "guard")
    assert verdict.conclusion is Conclusion.HOLDS, verdict.lines
    assert "not audited" not in verdict.lines[0]


def test_without_its_model_the_decision_is_named_as_not_audited(client: Client, folder: Path, tmp_path: Path) -> None:
    found = archived(client, folder, 0)
    verdict = check(found, tmp_path, found.answer, None)
    assert verdict.conclusion is Conclusion.HOLDS, verdict.lines
    assert verdict.lines[0].endswith("; not audited: novelty (--novelty-model)")


FORGED: dict[str, tuple[str, Any, Conclusion]] = {
    "novel": ("novel", lambda found: not found["novel"], Conclusion.DOES_NOT_HOLD),
    "certified": ("certified", lambda found: not found["certified"], Conclusion.DOES_NOT_HOLD),
    "score": ("score", lambda found: 1.01 * found["score"], Conclusion.DOES_NOT_HOLD),
    "null": ("score", lambda _: None, Conclusion.DOES_NOT_HOLD),
    "radius": ("radius", lambda found: 1.01 * found["radius"], Conclusion.UNDECIDED),
    "model": ("model", lambda _: "guarded", Conclusion.DOES_NOT_HOLD),
    "digest": ("digest", lambda _: "sha256:" + 64 * "0", Conclusion.UNDECIDED),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_decision_is_named(client: Client, folder: Path, tmp_path: Path, kind: str) -> None:
    member, forge, conclusion = FORGED[kind]
    found = archived(client, folder, 1)
    assert found.answer["novelty"]["certified"]
    answer = found.changed(**{f"novelty__{member}": forge(found.answer["novelty"])})
    verdict = check(found, tmp_path, answer, folder / "guard")
    assert verdict.conclusion is conclusion, verdict.lines
    assert f"novelty.{member}" in "".join(verdict.lines)


def test_a_model_that_is_no_guard_is_named(client: Client, folder: Path, tmp_path: Path) -> None:
    found = archived(client, folder, 0)
    assert "expected known, novel" in "".join(check(found, tmp_path, found.answer, folder / "guarded").lines)


def test_a_guard_for_an_answer_without_novelty_is_refused(client: Client, folder: Path, tmp_path: Path) -> None:
    found = archived(client, folder, 0)
    with pytest.raises(KeptError, match="leave --novelty-model out"):
        check(found, tmp_path, found.changed(novelty=None), folder / "guard")


def test_answers_of_versions_without_novelty_hold(client: Client, folder: Path, tmp_path: Path) -> None:
    found = archived(client, folder, 0)
    answer = {name: value for name, value in found.answer.items() if name != "novelty"}
    assert check(found, tmp_path, answer, None).conclusion is Conclusion.HOLDS
