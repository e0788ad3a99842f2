"""The comparison with the authors' library: files run by torch, radii by claim and by proof, the time to train."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from benchmarks.side_by_side.compare import Result, margins, rows_of_claims, rows_of_differences, spread, write
from benchmarks.side_by_side.contender import Contender
from benchmarks.side_by_side.in_torch import GraphInTorch, UnknownOperatorError
from benchmarks.side_by_side.ours import TRIAL_EPOCHS, alike, epochs_within
from service.classifier import Classifier

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "tests" / "samples_of_libraries"
ZOO = ROOT / "models" / "zoo"


def random_images(n: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).random((n, *shape))


def graph_of(*nodes: onnx.NodeProto, **constants: float) -> bytes:
    image = helper.make_tensor_value_info("image", TensorProto.DOUBLE, ["N", 1, 2, 2])
    logits = helper.make_tensor_value_info("logits", TensorProto.DOUBLE, None)
    numbers = [helper.make_tensor(name, TensorProto.DOUBLE, [], [value]) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "graph", [image], [logits], numbers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()


def result(name: str, **changes: object) -> Result:
    """Three images: radii 1, 2 and 3 proved, the last one wrong, all flipped at 2.5."""
    fields: dict[str, object] = {
        "name": name,
        "made": {},
        "parameters": 1,
        "lipschitz_bound": 1.0,
        "margin_bound": 2.0,
        "margin_N": np.array([2.0, 4.0, 6.0]),
        "right_N": np.array([True, True, False]),
        "radius_N": np.array([1.0, 2.0, 3.0]),
        "attacked_M": np.arange(3),
        "distance_M": np.array([2.5, 2.5, math.inf]),
    }
    return Result(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["fullsort", "groupsort2", "l2-pool", "l2-pool-of-all", "residual", "sll-dense", "unit-rows"]
)
def test_a_file_gives_in_torch_what_the_reference_gives(name: str) -> None:
    content = (SAMPLES / f"{name}.onnx").read_bytes()
    image_NCHW = random_images(3, (1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        computed_NK = GraphInTorch(content)(torch.from_numpy(image_NCHW)).numpy()
    (expected_NK,) = ReferenceEvaluator(onnx.load_from_string(content)).run(None, {"image": image_NCHW})
    np.testing.assert_allclose(computed_NK, expected_NK, rtol=0, atol=2e-6)


def test_everything_that_is_not_in_the_table_is_named() -> None:
    content = graph_of(
        helper.make_node("Erf", ["image"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"], axis=1),
        helper.make_node("Concat", ["c"], ["logits"], axis=1, beside=2),
    )
    with pytest.raises(UnknownOperatorError, match=r"Concat with beside; Erf$"):
        GraphInTorch(content)


@pytest.mark.parametrize("name", ["mnist-0-8", "mnist"])
def test_logits_radii_and_gradient_are_those_of_the_served_artefact(name: str) -> None:
    served = Classifier.load(ZOO / name, "cpu", 1)
    contender = Contender(ZOO / name / "model.onnx", served.labels)
    image_NCHW = random_images(60, served.input_shape)
    weights_NK = np.random.default_rng(4).standard_normal((60, len(served.labels)))
    logits_NK, radii = contender.classify(image_NCHW)
    expected_NK, expected = served.classify(image_NCHW)
    assert np.abs(logits_NK - expected_NK).max() <= 2 * served.certificate.logit_error
    np.testing.assert_array_equal(radii.class_id_N, expected.class_id_N)
    np.testing.assert_allclose(radii.radius_N, expected.radius_N, rtol=0, atol=1e-8)
    _, gradient_NCHW = contender.margin_gradient(image_NCHW, weights_NK)
    _, expected_NCHW = served.margin_gradient(image_NCHW, weights_NK)
    np.testing.assert_allclose(gradient_NCHW, expected_NCHW, rtol=0, atol=1e-12)


def test_the_gradient_of_a_root_is_finite_where_its_slope_is_not() -> None:
    content = graph_of(helper.make_node("Pow", ["image", "half"], ["logits"]), half=0.5)
    image = torch.tensor([[[[0.0, 1.0], [4.0, 0.0]]]], dtype=torch.float64, requires_grad=True)
    roots = GraphInTorch(content)(image)
    (gradient,) = torch.autograd.grad(roots.sum(), image)
    assert roots.flatten().tolist() == [0.0, 1.0, 2.0, 0.0]
    assert gradient.flatten().tolist() == [0.0, 0.5, 0.25, 0.0]


def test_the_margin_of_one_output_is_twice_its_absolute_value() -> None:
    assert margins(np.array([[0.5, -0.5], [-2.0, 2.0]])).tolist() == [1.0, 4.0]


def test_a_claim_beyond_the_proof_is_counted_and_the_attacks_refute_it() -> None:
    one = result("theirs")
    assert [one.certified(0.5), one.certified(1.5), one.certified(2.0)] == [2 / 3, 1 / 3, 0.0]
    # margin / 2 is the proof here; margin itself claims radii of 2, 4 and 6, and the second image flips at 2.5.
    assert (one.excess(2.0), one.refuted(2.0)) == (1.0, 0)
    assert (one.excess(1.0), one.refuted(1.0)) == (2.0, 1)
    assert one.claimed(1.0, 3.0) == 1 / 3
    assert one.robust(2.0) == 2 / 3
    assert one.tightness == pytest.approx(0.6)
    assert "|  | margin | 66.67 | 2.000000 | 1 of 3 |" in rows_of_claims([one], {"margin": 1.0}, (0.5,))


def test_each_radius_has_its_own_best_row() -> None:
    notebook, tuned = result("notebook"), result("tuned", radius_N=np.array([0.4, 4.0, 9.0]))
    accurate = result("accurate", right_N=np.full(3, True))
    text = rows_of_differences([notebook, tuned], [notebook, accurate], (0.5, 2.5))
    assert "| certified 0.5 | 66.67 | 33.33 (tuned) | 100.00 (accurate) | +33.33 | +66.67 |" in text
    assert "| certified 2.5 | 0.00 | 33.33 (tuned) | 33.33 (accurate) | +33.33 | +0.00 |" in text


def test_attacked_images_are_spread_over_the_whole_test_set() -> None:
    assert spread(4, 10).tolist() == [0, 2, 5, 7]
    assert spread(9, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("fixed", [0.0, 7.0])
@pytest.mark.parametrize("of_one", [0.5, 11.0])
def test_the_epochs_that_are_chosen_fit_and_one_in_ten_more_would_not(fixed: float, of_one: float) -> None:
    budget = 600.0
    epochs = epochs_within(budget, fixed + TRIAL_EPOCHS * of_one, fixed + 2 * TRIAL_EPOCHS * of_one)
    assert fixed + epochs * of_one <= budget < fixed + 1.1 * (epochs + 1) * of_one


def test_a_time_in_which_no_epoch_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="not one fits"):
        epochs_within(10.0, 12.0, 20.0)


def test_recipes_of_one_network_and_schedule_are_tried_once() -> None:
    assert alike("fashion-mnist") == alike("fashion-mnist-accurate") != alike("fashion-mnist-robust")


def test_writing_one_data_set_leaves_the_other_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "written.md"
    write({"mnist-0-8": "## Digits", "fashion-mnist": "## Garments"}, file)
    write({"mnist-0-8": "## Better digits"}, file)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# Side by side")
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Better digits", "## Garments"]
