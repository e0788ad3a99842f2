"""The verdict about an archived answer: true answers hold, and the audit says which checks it leaves open."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import tomllib
from math import inf, nextafter
from pathlib import Path
from typing import Any

import builders
import grimp
import numpy as np
import onnx
import pytest
from audit_cases import Archived, append_operators, archive, served
from client import Client
from encoding import encode, npy

from service.__main__ import main
from service.audit import Conclusion, Verdict
from service.audit.images import read_image
from service.audit.operators.refused import refusal
from service.errors import KeptError

ROOT = Path(__file__).resolve().parents[3]


def proved_radius(verdict: Verdict) -> float:
    found = re.search(r"audit: ([\d.e+-]+);", verdict.lines[0])
    assert found is not None, verdict.lines
    return float(found.group(1))


def assert_holds(verdict: Verdict) -> None:
    assert verdict.conclusion is Conclusion.HOLDS, verdict.lines
    (line,) = verdict.lines
    assert line.startswith("holds: class ")


@pytest.fixture
def archived(client: Client, zoo: Path, grey_HW: np.ndarray) -> Archived:
    """An answer of the grey model with every member that it can have."""
    archived = archive(client, encode(grey_HW), zoo / "grey", epsilon=0.01, counterfactual=True)
    assert archived.answer["certificate"]["robust_at_epsilon"] is True
    return archived


# --- true answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "uint8 npy", "float32 npy"])
@pytest.mark.parametrize("name", ["grey", "binary", "colour"])
def test_a_true_answer_holds(
    client: Client, zoo: Path, grey_HW: np.ndarray, colour_HWC: np.ndarray, tmp_path: Path, name: str, form: str
) -> None:
    pixels = colour_HWC if name == "colour" else grey_HW
    image = {"png": encode(pixels), "uint8 npy": npy(pixels), "float32 npy": npy((pixels / 255).astype(np.float32))}[
        form
    ]
    archived = archive(client, image, zoo / name, counterfactual=True)
    answer = archived.answer
    assert answer["certificate"]["certified"]
    verdict = archived.check(tmp_path)
    assert_holds(verdict)
    assert verdict.lines[0].startswith(f'holds: class {answer["class_id"]} ("{answer["label"]}"), radius ')
    found = answer["counterfactual"]
    assert verdict.lines[0].endswith(
        f'; counterfactual class {found["class_id"]} ("{found["label"]}") at distance {found["distance"]!r} confirmed'
    )


@pytest.mark.parametrize("size", [(4, 9), (13, 5), (2, 3), (40, 31)])
def test_a_resized_image_holds(client: Client, zoo: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    image = encode(np.random.default_rng(3).integers(0, 256, size, dtype=np.uint8))
    archived = archive(client, image, zoo / "grey", resize=True, counterfactual=True)
    assert archived.answer["image"]["resized"]
    assert_holds(archived.check(tmp_path))


@pytest.mark.parametrize(
    ("name", "shape"), [("grey", (4, 5, 3)), ("grey", (7, 9, 3)), ("colour", (4, 5)), ("colour", (9, 4))]
)
def test_a_converted_image_holds(client: Client, zoo: Path, tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    image = encode(np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8))
    archived = archive(client, image, zoo / name, resize=True, counterfactual=True)
    assert archived.answer["image"]["conversion"] == ("rgb_to_grey" if name == "grey" else "grey_to_rgb")
    assert_holds(archived.check(tmp_path))


def test_the_only_answer_of_a_batch_holds_and_of_two_one_is_asked_for(
    client: Client, zoo: Path, grey_HW: np.ndarray, tmp_path: Path
) -> None:
    image = encode(grey_HW)
    text = base64.b64encode(image).decode()
    answers = [client.post("/predict/batch", json={"images": [text] * n, "model": "grey"}).json() for n in (1, 2)]
    batches = [Archived(answer, image, zoo / "grey") for answer in answers]
    assert_holds(batches[0].check(tmp_path))
    with pytest.raises(KeptError, match="2 predictions, and one is audited at a time"):
        batches[1].check(tmp_path)
    assert_holds(batches[1].check(tmp_path, answers[1]["predictions"][1]))


@pytest.mark.parametrize("name", ["grey", "binary", "colour"])
def test_the_largest_radius_that_the_audit_confirms_is_the_proved_one(
    client: Client, zoo: Path, grey_HW: np.ndarray, colour_HWC: np.ndarray, tmp_path: Path, name: str
) -> None:
    archived = archive(client, encode(colour_HWC if name == "colour" else grey_HW), zoo / name)
    proved = proved_radius(archived.check(tmp_path))
    assert proved >= archived.answer["certificate"]["radius"]
    assert archived.check(tmp_path, archived.changed(certificate__radius=proved)).undecided == ()
    larger = nextafter(proved, inf)
    assert archived.check(tmp_path, archived.changed(certificate__radius=larger)).undecided == (
        f"radius: the answer states {larger!r}, the audit proves {proved!r}",
    )


def test_members_that_the_audit_does_not_know_are_named(archived: Archived, tmp_path: Path) -> None:
    verdict = archived.check(tmp_path, archived.changed(saliency="x", certificate__method="y"))
    assert_holds(verdict)
    assert verdict.lines[0].endswith("; not audited: saliency, certificate.method")


def test_a_class_that_no_image_changes_has_every_radius(runner: Any, tmp_path: Path) -> None:
    folder = tmp_path / "fixed"
    builders.write(folder, builders.linear(np.ones((2, 4)), np.array([0.5, 0.0]), (1, 2, 2)), "fixed")
    archived = archive(served(folder, runner), encode(np.full((2, 2), 51, dtype=np.uint8)), folder)
    assert archived.answer["certificate"]["radius"] > 1e300
    assert_holds(archived.check(tmp_path))


# --- undecided --------------------------------------------------------------------------------------------------------


def undecided(verdict: Verdict) -> list[str]:
    """The reasons of a verdict that must be undecided."""
    assert verdict.conclusion is Conclusion.UNDECIDED, verdict.lines
    assert verdict.lines == tuple(f"undecided: {reason}" for reason in verdict.undecided)
    return list(verdict.undecided)


def test_an_answer_that_does_not_name_its_image_is_undecided_and_checked_against_the_file(
    archived: Archived, tmp_path: Path
) -> None:
    answer = archived.changed(image=None, counterfactual=None)
    (reason,) = undecided(archived.check(tmp_path, answer))
    assert reason.startswith("image: the answer does not name its image")
    # Before answers named their image, a picture with R = G = B was grey to a grey model.
    grey = read_image(tmp_path / "image", None, 1)
    pixels = np.array(grey.numerators, dtype=np.uint8).reshape(4, 5, 1)
    assert len(undecided(archived.check(tmp_path, answer, encode(np.repeat(pixels, 3, axis=2))))) == 1
    coloured = np.concatenate([pixels, pixels, pixels // 2], axis=2)
    assert undecided(archived.check(tmp_path, answer, encode(coloured)))[1] == (
        "class, logits and radius: the image has 3 channels, the model takes 1, and the answer records no conversion"
    )
    answer["label"] = "seven"
    assert archived.check(tmp_path, answer).conclusion is Conclusion.DOES_NOT_HOLD


def test_an_answer_of_another_artefact_is_undecided(archived: Archived, zoo: Path, tmp_path: Path) -> None:
    (reason,) = undecided(archived.check(tmp_path, artefact=zoo / "colour"))
    assert reason.startswith(f"digest: the answer is of {archived.answer['digest']}, model.onnx has sha256:")
    # Nothing is read against the card of another artefact; a contradiction within the answer remains one.
    verdict = archived.check(tmp_path, archived.changed(certificate__certified=False), artefact=zoo / "colour")
    assert verdict.conclusion is Conclusion.DOES_NOT_HOLD
    assert [line.partition(":")[0] for line in verdict.lines] == ["does not hold", "does not hold", "undecided"]


def test_a_changed_artefact_leaves_the_answer_undecided(archived: Archived, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(archived.artefact, tmp_path / "artefact"))
    model = onnx.load(folder / "model.onnx")
    model.doc_string = "changed"
    onnx.save(model, folder / "model.onnx")
    (reason,) = undecided(archived.check(tmp_path, artefact=folder))
    assert reason.startswith("digest: the answer is of")


def test_every_operator_without_a_rule_is_named(archived: Archived, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(archived.artefact, tmp_path / "artefact"))
    digests = append_operators(folder, "Sin", "Neg", "ThresholdedRelu")
    answer = archived.changed(**digests, counterfactual=None)
    assert undecided(archived.check(tmp_path, answer, artefact=folder)) == [
        f"class, logits and radius: {operator} '{operator.lower()}': {refusal(operator)}"
        for operator in ("Sin", "ThresholdedRelu")
    ]
    # A check that fails outweighs those that are not decided, and all are reported.
    answer["label"] = "seven"
    verdict = archived.check(tmp_path, answer, artefact=folder)
    assert verdict.conclusion is Conclusion.DOES_NOT_HOLD
    assert [line.partition(":")[0] for line in verdict.lines] == ["does not hold", "undecided", "undecided"]


def test_a_tie_leaves_the_class_undecided(runner: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tie"
    weight_KD = np.array([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 2.0], [-1.0, -1.0, 0.0, 0.0]])
    builders.write(folder, builders.linear(weight_KD, np.zeros(3), (1, 2, 2)), "tie")
    archived = archive(served(folder, runner), encode(np.full((2, 2), 51, dtype=np.uint8)), folder)
    assert archived.answer["certificate"]["radius"] == 0.0
    (reason,) = undecided(archived.check(tmp_path))
    assert reason.startswith("class_id: 0, the exact logit of class 1 is not smaller (difference ")
    forged = archived.changed(class_id=2, label="class 2", certificate__runner_up={"class_id": 0, "label": "class 0"})
    reasons = archived.check(tmp_path, forged).failed
    assert any("class_id: 2, the exact network gives class 0 a logit larger by" in reason for reason in reasons)


def test_the_class_of_a_margin_within_rounding_is_undecided_unless_it_is_the_exact_one(
    runner: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "near"
    weight_KD = np.array([[1.0, 1.0, 1.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    builders.write(folder, builders.linear(weight_KD, np.array([0.0, 2.0**-53]), (1, 2, 2)), "near")
    archived = archive(served(folder, runner), encode(np.full((2, 2), 51, dtype=np.uint8)), folder)
    assert archived.answer["certificate"]["radius"] == 0.0
    # Exact logits: 3/5, and 3/5 + 2**-53 of class 1. The runtime may find either.
    for class_id in (0, 1):
        answer = archived.changed(class_id=class_id, label=f"class {class_id}", logits=[0.6, 0.6])
        answer["logits"][class_id] = nextafter(0.6, 1.0)
        answer["certificate"]["runner_up"] = {"class_id": 1 - class_id, "label": f"class {1 - class_id}"}
        verdict = archived.check(tmp_path, answer)
        if class_id == 1:
            assert_holds(verdict)
        else:
            (reason,) = undecided(verdict)
            assert reason.startswith("class_id: 0, the exact logit of class 1 is not smaller (difference 1.11")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_exit_status_tells_the_three_verdicts(
    archived: Archived, zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(artefact: Path = archived.artefact, **members: Any) -> int:
        (tmp_path / "answer.json").write_text(json.dumps(archived.changed(**members)))
        (tmp_path / "image.png").write_bytes(archived.image)
        return main(["audit", str(tmp_path / "answer.json"), str(tmp_path / "image.png"), "--model", str(artefact)])

    assert run() == 0
    assert capsys.readouterr().out.startswith("holds: class ")
    assert run(label="seven", certificate__radius=1e9) == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["does not hold", " label"] in [line.split(":")[:2] for line in lines]
    assert ["undecided", " radius"] in [line.split(":")[:2] for line in lines]
    assert run(zoo / "colour") == 3
    assert capsys.readouterr().out.startswith("undecided: digest: ")


def test_a_wrong_command_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["audit", "answer.json", "image.png"])
    assert caught.value.code == 2
    assert "--model" in capsys.readouterr().err


# --- nothing is shared ------------------------------------------------------------------------------------------------


def test_the_audit_shares_no_numeric_code_with_the_server() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (contract,) = (contract for contract in contracts if contract["id"] == "audit-on-its-own")
    assert contract["type"] == "forbidden"
    assert contract["source_modules"] == ["service.audit"]
    pixels = {"pixels.arrays", "pixels.distances", "pixels.preprocessing"}
    numeric = {"artefact", "certificate", "inference", "network", "runtime", *pixels}
    assert {*(f"service.{module}" for module in numeric), "onnxruntime"} <= set(contract["forbidden_modules"])
    assert "allow_indirect_imports" not in contract
    assert "ignore_imports" not in contract
    graph = grimp.build_graph("service", include_external_packages=True, cache_dir=None)
    own = {"service.audit", *graph.find_descendants("service.audit")}
    reached = {imported for module in own for imported in graph.find_modules_directly_imported_by(module)} - own
    of_ours = {module for module in reached if module.startswith("service")}
    assert of_ours == {"service.errors", "service.pixels.images"}
    assert reached - of_ours - sys.stdlib_module_names <= {"flint", "google", "numpy", "onnx", "pydantic"}


def test_serving_does_not_load_the_audit_nor_the_audit_the_runtime() -> None:
    for module, absent in (
        ("service.api.app, service.__main__", "flint"),
        ("service.__main__, service.audit", "onnxruntime"),
    ):
        code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120).returncode == 0
