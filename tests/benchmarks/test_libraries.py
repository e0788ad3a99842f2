"""Models that other libraries exported: bounds against what these libraries claim and against what is measured.

The files of `samples_of_libraries` were written by `benchmarks/libraries/export.py --samples`, `claims.json` with them.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from benchmarks.libraries.certify import Result, Row
from service.certificate import Certificate, UnsupportedModelError, certify

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tests" / "samples_of_libraries"
CLAIMS: dict[str, dict[str, Any]] = json.loads((SAMPLES / "claims.json").read_text(encoding="utf-8"))["networks"]
WITHIN = 1.02
REFUSED = {
    "householder-torchlip": {"LessOrEqual": "no proved rule", "Greater": "no proved rule"},
    # What compares the refused values is not named: with constants it would have passed.
    "householder-orthogonium": {"Sin": "no proved rule", "Cos": "no proved rule"},
    "weights-computed": {"Sigmoid": "arithmetic on constants rounds"},
}
EXTERNAL = "weights-in-another-file"
CERTIFIED = sorted(CLAIMS.keys() - REFUSED.keys() - {EXTERNAL})
TRUE = [name for name in CERTIFIED if CLAIMS[name]["claim"] is not None and CLAIMS[name]["holds"]]
FALSE = [name for name in CERTIFIED if not CLAIMS[name]["holds"]]
UNCLAIMED = [name for name in CERTIFIED if CLAIMS[name]["claim"] is None]


def model_bytes(name: str) -> bytes:
    return (SAMPLES / f"{name}.onnx").read_bytes()


@cache
def certificate(name: str) -> Certificate:
    return certify(model_bytes(name))


def in_float64(content: bytes) -> onnx.ModelProto:
    """The same function of the same weights, evaluated in float64: float32 constants are float64 numbers too."""
    model = onnx.load_from_string(content)

    def widen(tensor: TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                widen(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return model


def steepest_slope(content: bytes, shape: tuple[int, ...], n_images: int = 3, step: float = 1e-5) -> float:
    """Largest `||f(x + h v) - f(x - h v)|| / (2 h)` found, v the first singular vector of the Jacobian at x.

    Two values of f and their distance: below the Lipschitz constant wherever x is, up to rounding in float64, which
    is below 1e-9 here.
    """
    evaluator = ReferenceEvaluator(in_float64(content))
    size = int(np.prod(shape))

    def logits(batch_ND: np.ndarray) -> np.ndarray:
        (result,) = evaluator.run(None, {"image": batch_ND.reshape(-1, *shape)})
        return result

    random = np.random.default_rng(5)
    steepest = 0.0
    for image_D in random.uniform(size=(n_images, size)):
        moved = step * np.eye(size)
        jacobian_KD = (logits(image_D + moved) - logits(image_D - moved)).T / (2 * step)
        direction_D = np.linalg.svd(jacobian_KD)[2][0]
        there, back = logits(image_D + step * np.stack([direction_D, -direction_D]))
        steepest = max(steepest, float(np.linalg.norm(there - back)) / (2 * step))
    return steepest


@pytest.mark.parametrize("name", CERTIFIED)
def test_the_bound_is_above_every_measured_slope(name: str) -> None:
    proved = certificate(name)
    assert CLAIMS[name]["lipschitz_estimate"] <= proved.lipschitz_bound * (1 + 1e-12)
    slope = steepest_slope(model_bytes(name), proved.input_shape)
    assert 0 < slope <= proved.lipschitz_bound * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("name", TRUE)
def test_a_true_claim_is_proved_from_the_bytes(name: str) -> None:
    proved = certificate(name)
    assert proved.lipschitz_bound <= WITHIN * CLAIMS[name]["claim"]
    assert proved.margin_bounds_KK.max() <= WITHIN * CLAIMS[name]["claim_margin"]


@pytest.mark.parametrize("name", FALSE)
def test_a_false_claim_is_contradicted_by_the_bound_and_by_measurement(name: str) -> None:
    claim = CLAIMS[name]["claim"]
    proved = certificate(name)
    slope = steepest_slope(model_bytes(name), proved.input_shape, n_images=1)
    assert slope > 1.1 * claim
    # Linear networks: the slope is the norm.
    assert slope * (1 - 1e-9) <= proved.lipschitz_bound <= 1.001 * slope


@pytest.mark.parametrize("name", UNCLAIMED)
def test_a_plain_residual_network_is_certified_loosely(name: str) -> None:
    proved = certificate(name)
    assert CLAIMS[name]["lipschitz_estimate"] < proved.lipschitz_bound < 1e4
    assert 0 < proved.logit_error < 1e-1


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_proof_is_refused_with_every_operator_and_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        certify(model_bytes(name))
    found = {reason.split(" ")[0]: reason for reason in refusal.value.reasons}
    assert found.keys() == REFUSED[name].keys()
    for operator, why in REFUSED[name].items():
        assert re.match(rf"{operator} '[^']+': {why}", found[operator])
    nodes = onnx.load_from_string(model_bytes(name)).graph.node
    blamed = [node for node in nodes if node.op_type in found]
    assert len(refusal.value.reasons) == len(blamed)


def test_weights_in_another_file_are_refused_one_by_one_with_the_cure() -> None:
    content = model_bytes(EXTERNAL)
    with pytest.raises(UnsupportedModelError) as refusal:
        certify(content)
    tensors = onnx.load_from_string(content).graph.initializer
    outside = [tensor.name for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
    assert len(refusal.value.reasons) == len(outside) > 0
    for name, reason in zip(outside, refusal.value.reasons, strict=True):
        assert f"'{name}'" in reason
        assert "onnx.save(onnx.load(FILE), FILE)" in reason
    # The cure works.
    whole = onnx.load(SAMPLES / f"{EXTERNAL}.onnx").SerializeToString()
    assert certify(whole).lipschitz_bound <= WITHIN * CLAIMS[EXTERNAL]["claim"]


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_sample_still_has_the_pattern_that_it_is_there_for(name: str) -> None:
    operators = {node.op_type for node in onnx.load_from_string(model_bytes(name)).graph.node}
    assert set(CLAIMS[name].get("operators", [])) <= operators
    files = [entry.get("file") for entry in CLAIMS[name]["files"].values()]
    assert files == [f"{name}.onnx"]


def test_samples_are_small_and_name_no_file_of_the_machine_that_wrote_them() -> None:
    files = [path for path in SAMPLES.iterdir() if ".onnx" in path.name]
    assert sum(path.stat().st_size for path in files) <= 600_000
    for path in files:
        assert path.stat().st_size <= 60_000
        assert not re.search(rb"/(home|root|tmp|usr|work)/|site-packages", path.read_bytes())


@pytest.mark.parametrize(
    ("estimate", "bound", "holds", "below", "loose"),
    [
        (0.9, 1.0, True, False, False),
        (1.1, 1.0, True, True, False),
        (0.9, 1.03, True, False, True),
        (0.9, 1.3, False, False, False),
        (1.4, 1.3, False, True, False),
    ],
)
def test_the_comparison_tells_no_bound_and_loose_bounds_from_good_ones(
    estimate: float, bound: float, holds: bool, below: bool, loose: bool
) -> None:
    claims = {"claim": 1.0, "claim_margin": 2.0, "holds": holds, "lipschitz_estimate": estimate}
    row = Row("x", claims, (Result("dynamo18", bound, bound),))
    assert bool(row.below_measured) is below
    assert bool(row.loose) is loose


def test_libraries_are_pinned_to_the_versions_of_the_samples() -> None:
    versions = json.loads((SAMPLES / "claims.json").read_text(encoding="utf-8"))["versions"]
    requirements = (ROOT / "benchmarks" / "libraries" / "requirements.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", requirements, re.MULTILINE))
    assert versions == {name: pins[name] for name in versions}
