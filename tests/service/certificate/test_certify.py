"""The certifier: bounds that hold for random graphs, refusals that name everything, and the command."""

import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from random_graphs import GraphBuilder, exact_logits

from service.certificate import Certificate, UnsupportedModelError, certify, spectral_norm_bound
from service.certificate.rules import arithmetic, table


def run(model_bytes: bytes, image_NX: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model_bytes, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image_NX})[0]


def jacobian_norm(model_bytes: bytes, image: np.ndarray, step: float) -> float:
    """Norm of the Jacobian at `image` by central differences: exact on a linear piece, up to rounding."""
    size = image.size
    moved = np.concatenate([step * np.eye(size), -step * np.eye(size)]) + image.reshape(1, -1)
    logits = run(model_bytes, moved.reshape(2 * size, *image.shape).astype(image.dtype)).astype(np.float64)
    return float(np.linalg.norm((logits[:size] - logits[size:]).T / (2 * step), 2))


def lipschitz_violation(model_bytes: bytes, image: np.ndarray, certificate: Certificate) -> bool:
    step = 1e-6 if image.dtype == np.float64 else 1e-3
    slack = 2 * certificate.logit_error / step * np.sqrt(image.size * certificate.n_outputs)
    return jacobian_norm(model_bytes, image, step) > certificate.lipschitz_bound * (1 + 1e-9) + slack


def violations(model_bytes: bytes, shape: tuple[int, ...], dtype: type, seed: int) -> list[str]:
    """Bounds of the certificate that one random image refutes."""
    certificate = certify(model_bytes)
    pixels = np.random.default_rng(seed).integers(0, 256, shape)
    image = (pixels / 255).astype(dtype)
    computed = run(model_bytes, image[None])[0]
    exact = exact_logits(model_bytes, np.vectorize(lambda v: Fraction(int(v), 255), otypes=[object])(pixels))
    error = max(abs(Fraction(float(c)) - e) for c, e in zip(computed, exact, strict=True))
    found: list[str] = []
    if error > Fraction(certificate.logit_error):
        found.append(f"seed {seed}: error {float(error)} > {certificate.logit_error}")
    if lipschitz_violation(model_bytes, image, certificate):
        found.append(f"seed {seed}: Lipschitz bound {certificate.lipschitz_bound}")
    return found


def flat_model(build: Callable[[GraphBuilder, str], str], n: int, m: int, dtype: type = np.float64) -> bytes:
    b = GraphBuilder(np.random.default_rng(0), dtype)
    return b.model((n,), build(b, "image"), m)


def test_a_linear_classifier_has_its_closed_form_bounds() -> None:
    weight = np.random.default_rng(3).standard_normal((6, 4))
    certificate = certify(flat_model(lambda b, x: b.one("Gemm", x, b.constant(weight)), 6, 4))
    assert np.linalg.norm(weight, 2) <= certificate.lipschitz_bound <= np.linalg.norm(weight, 2) * (1 + 1e-9)
    for i in range(4):
        for j in range(4):
            true = np.linalg.norm(weight[:, i] - weight[:, j])
            assert true <= certificate.margin_bounds_KK[i, j] * (1 + 1e-15) <= true * (1 + 1e-12)
    assert 0 < certificate.logit_error < 1e-13


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("operator", ["Mul", "Div"])
def test_scaling_and_shifting_the_logits_keeps_the_pairwise_bounds(operator: str, offset: bool) -> None:
    # Rows that nearly agree: were the scaled rows rounded, their small difference would be lost.
    weight = np.ones((6, 2)) + 1e-15 * np.random.default_rng(3).integers(0, 4, (6, 2))

    def build(b: GraphBuilder, x: str) -> str:
        z = b.one("Gemm", x, b.constant(weight))
        z = b.one(operator, z, b.constant(np.array(0.3)))
        return b.one("Add", z, b.constant(np.array([1.0, 5.0]))) if offset else z

    certificate = certify(flat_model(build, 6, 2))
    difference = [Fraction(a) - Fraction(b) for a, b in weight]
    scale = Fraction(0.3) if operator == "Mul" else 1 / Fraction(0.3)
    assert Fraction(certificate.margin_bounds_KK[0, 1]) ** 2 >= sum(d * d for d in difference) * scale**2


def test_a_sorted_pair_costs_nothing_in_every_form_that_exporters_write() -> None:
    weight = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]

    def split_max(b: GraphBuilder, x: str) -> str:
        z = b.one("Gemm", x, b.constant(weight))
        left, right = b.add("Split", z, outputs=2, axis=1, num_outputs=2)
        return b.one("Concat", b.one("Max", left, right), b.one("Min", left, right), axis=1)

    def reduce_pairs(b: GraphBuilder, x: str) -> str:
        z = b.one("Gemm", x, b.constant(weight))
        pairs = b.one("Reshape", z, b.constant(np.array([0, 4, 2])))
        axes = b.constant(np.array([2]))
        halves = [b.one(name, pairs, axes) for name in ("ReduceMax", "ReduceMin")]
        return b.one("Reshape", b.one("Concat", *halves, axis=2), b.constant(np.array([0, 8])))

    def top_k(b: GraphBuilder, x: str) -> str:
        z = b.one("Gemm", x, b.constant(weight))
        return b.add("TopK", z, b.constant(np.array([8])), outputs=2, axis=1)[0]

    for build in (split_max, reduce_pairs, top_k):
        assert certify(flat_model(build, 8, 8)).lipschitz_bound < 1 + 1e-6


@pytest.mark.parametrize("keepdims", [0, 1])
def test_the_smaller_of_two_numbers_keeps_the_axes_that_onnx_gives_it(keepdims: int) -> None:
    def build(b: GraphBuilder, x: str) -> str:
        smaller = b.one("ReduceMin", x, b.constant(np.array([1])), keepdims=keepdims)
        return smaller if keepdims else b.one("Unsqueeze", smaller, b.constant(np.array([1])))

    certificate = certify(flat_model(build, 2, 1))
    assert certificate.n_outputs == 1
    assert certificate.lipschitz_bound == 1.0


def test_a_maximum_and_a_minimum_of_different_pairs_are_not_taken_for_a_sort() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        left, right = b.add("Split", x, outputs=2, axis=1, num_outputs=2)
        return b.one("Concat", b.one("Max", left, right), b.one("Max", left, right), axis=1)

    assert certify(flat_model(build, 8, 8)).lipschitz_bound >= np.sqrt(2.0)


def test_reflect_padding_and_repeated_gather_raise_the_norm() -> None:
    def reflect(b: GraphBuilder, x: str) -> str:
        return b.one("Pad", x, b.constant(np.array([0, 1, 0, 1])), mode="reflect")

    def repeat(b: GraphBuilder, x: str) -> str:
        return b.one("Gather", x, b.constant(np.array([0, 0, 0, 1])), axis=1)

    assert certify(flat_model(reflect, 4, 6)).lipschitz_bound >= np.sqrt(2.0)
    assert certify(flat_model(repeat, 4, 4)).lipschitz_bound >= np.sqrt(3.0)


def test_normalisation_multiplies_the_bound_by_one_over_the_smallest_deviation() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        centred = b.one("Sub", x, b.constant(np.array([0.5, 0.4, 0.3]).reshape(1, 3, 1, 1)))
        scaled = b.one("Div", centred, b.constant(np.array([0.2, 0.25, 0.5]).reshape(1, 3, 1, 1)))
        return b.one("Flatten", scaled, axis=1)

    b = GraphBuilder(np.random.default_rng(0))
    bound = certify(b.model((3, 2, 2), build(b, "image"), 12)).lipschitz_bound
    assert 5.0 <= bound < 5.0 * (1 + 1e-12)


def test_huge_biases_that_cancel_are_paid_for_in_the_error() -> None:
    for size in (1e6, 1e12):

        def build(b: GraphBuilder, x: str, size: float = size) -> str:
            up = b.one("Gemm", x, b.constant(np.eye(4)), b.constant(np.full(4, size)))
            return b.one("Gemm", up, b.constant(np.eye(4)), b.constant(np.full(4, -size)))

        certificate = certify(flat_model(build, 4, 4))
        pixels = np.array([1, 77, 130, 254])
        image = pixels / 255
        error = np.abs(run(flat_model(build, 4, 4), image[None])[0] - image).max()
        assert error <= certificate.logit_error
        assert certificate.logit_error >= size * 2.0**-53


def test_one_output_is_the_two_class_case() -> None:
    weight = np.array([[3.0], [4.0]])
    certificate = certify(flat_model(lambda b, x: b.one("Gemm", x, b.constant(weight)), 2, 1))
    assert certificate.n_outputs == 1
    assert 5.0 <= certificate.lipschitz_bound < 5.0 + 1e-9
    assert 10.0 <= certificate.margin_bounds_KK[0, 1] < 10.0 + 1e-9


def test_preprocessing_scales_the_bounds_and_adds_its_error() -> None:
    weight = np.random.default_rng(3).standard_normal((6, 4))
    certificate = certify(flat_model(lambda b, x: b.one("Gemm", x, b.constant(weight)), 6, 4))
    after = certificate.after_preprocessing(norm=0.5, error_l2=1e-10)
    assert after.lipschitz_bound == pytest.approx(certificate.lipschitz_bound / 2)
    np.testing.assert_allclose(after.margin_bounds_KK, certificate.margin_bounds_KK / 2, rtol=1e-12)
    assert after.logit_error >= certificate.logit_error + certificate.lipschitz_bound * 1e-10


def power_iteration(matrix: np.ndarray) -> float:
    vector = np.random.default_rng(0).standard_normal(matrix.shape[1])
    for _ in range(20):
        vector = matrix.T @ (matrix @ vector)
        vector /= np.linalg.norm(vector)
    return float(np.linalg.norm(matrix @ vector))


def near_isometry_model() -> bytes:
    matrix = np.diag(np.linspace(1.0, 0.98, 50))
    return flat_model(lambda b, x: b.one("Gemm", x, b.constant(matrix)), 50, 50)


def test_a_bound_from_power_iteration_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model_bytes, image = near_isometry_model(), np.full(50, 0.5)
    assert not lipschitz_violation(model_bytes, image, certify(model_bytes))
    monkeypatch.setattr(arithmetic, "spectral_norm_bound", power_iteration)
    assert lipschitz_violation(model_bytes, image, certify(model_bytes))
    assert spectral_norm_bound is not power_iteration


def test_dropping_the_rounding_of_sums_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((200, 3))
    model_bytes = flat_model(lambda b, x: b.one("Gemm", x, b.constant(weight), b.constant(np.full(3, 1e9))), 200, 3)
    pixels = rng.integers(0, 256, 200)
    exact = exact_logits(model_bytes, np.vectorize(lambda v: Fraction(int(v), 255), otypes=[object])(pixels))
    computed = run(model_bytes, (pixels / 255)[None])[0]
    error = max(abs(Fraction(c) - e) for c, e in zip(computed, exact, strict=True))
    assert error <= Fraction(certify(model_bytes).logit_error)
    monkeypatch.setattr(table.Context, "gamma", lambda self, n: 0.0)
    assert error > Fraction(certify(model_bytes).logit_error)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(model_bytes: bytes) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        certify(model_bytes)
    return str(caught.value)


def test_every_unsupported_node_is_named_not_only_the_first() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        b.nodes.append(helper.make_node("Sin", [x], ["s"], name="first"))
        b.nodes.append(helper.make_node("Cos", ["s"], ["e"], name="second"))
        b.nodes.append(helper.make_node("FusedThing", ["e"], ["f"], name="third", domain="com.example"))
        return "f"

    b = GraphBuilder(np.random.default_rng(0))
    model = onnx.load_model_from_string(b.model((4,), build(b, "image"), 4))
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    message = refusal(model.SerializeToString())
    for name in ("first", "second", "third"):
        assert name in message


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda b, x: b.one("Mul", x, x), "no Lipschitz constant"),
        (lambda b, x: b.one("Div", b.constant(np.ones(4)), x), "no Lipschitz constant"),
        (lambda b, x: b.one("MatMul", x, b.one("Transpose", x, perm=[1, 0])), "batch axis"),
        (lambda b, x: b.one("ReduceMax", x, b.constant(np.array([0])), keepdims=0), "batch axis"),
        (lambda b, x: b.one("Reshape", x, b.constant(np.array([4, -1]))), "batch axis"),
        (lambda b, x: b.one("Concat", x, x, axis=0), "batch axis"),
        (lambda b, x: b.one("Slice", x, *[b.constant(np.array([k])) for k in (0, 1, 0)]), "batch axis"),
        (lambda b, x: b.one("Div", x, b.constant(np.zeros(4))), "divides by zero"),
        (lambda b, x: b.one("Cast", x, to=TensorProto.FLOAT), "cast"),
        (lambda b, x: b.one("Pad", x, b.constant(np.array([0, 1, 0, -1])), b.constant(np.array(1.0))), "negative pads"),
        (lambda b, x: b.one("Add", x, b.one("Exp", b.constant(np.ones(4)))), "Exp"),
        (lambda b, x: b.one("Gemm", x, b.constant(np.full((4, 4), np.nan))), "NaN"),
        (lambda b, x: b.one("Gemm", x, b.constant(np.eye(4) * 1e308), b.constant(np.full(4, 1e308))), "overflow"),
        (lambda b, x: b.constant(np.ones((1, 4))), "does not depend on the image"),
        (lambda b, x: b.add("TopK", x, b.constant(np.array([2])), outputs=2)[1], "indices of a sort"),
    ],
)
def test_what_is_not_understood_is_refused(build: Callable[[GraphBuilder, str], str], expected: str) -> None:
    assert expected in refusal(flat_model(build, 4, 4))


@pytest.mark.parametrize(
    ("element", "expected"),
    [(TensorProto.FLOAT16, "float16"), (TensorProto.BFLOAT16, "bfloat16"), (TensorProto.UINT8, "uint8")],
)
def test_formats_without_error_analysis_are_refused(element: int, expected: str) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("image", element, ["N", 4])],
        [helper.make_tensor_value_info("logits", element, ["N", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert expected in refusal(model.SerializeToString())


def test_weights_outside_of_the_file_are_refused(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(flat_model(lambda b, x: b.one("Gemm", x, b.constant(np.eye(64))), 64, 64))
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    assert "outside the file" in refusal((tmp_path / "m.onnx").read_bytes())


def test_a_number_computed_from_the_batch_size_is_refused_but_shapes_from_it_are_read() -> None:
    def scaled_by_batch(b: GraphBuilder, x: str) -> str:
        batch = b.one("Gather", b.one("Shape", x), b.constant(np.array(0)))
        return b.one("Mul", x, b.one("Cast", batch, to=TensorProto.DOUBLE))

    def reshaped(b: GraphBuilder, x: str) -> str:
        batch = b.one("Gather", b.one("Shape", x), b.constant(np.array([0])), axis=0)
        return b.one("Reshape", x, b.one("Concat", batch, b.constant(np.array([4])), axis=0))

    assert "batch size" in refusal(flat_model(scaled_by_batch, 4, 4))
    assert certify(flat_model(reshaped, 4, 4)).lipschitz_bound == 1.0


def test_a_second_input_or_output_is_refused_once_and_not_for_every_node_behind_it() -> None:
    model = onnx.load_model_from_string(flat_model(lambda b, x: b.one("Cos", b.one("Add", x, "other")), 4, 4))
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.DOUBLE, ["N", 4]))
    model.graph.output.append(helper.make_tensor_value_info("image", TensorProto.DOUBLE, ["N", 4]))
    message = refusal(model.SerializeToString())
    assert message.count("\n") == 3
    assert "2 inputs" in message
    assert "2 outputs" in message
    assert "Cos" in message


def test_a_map_that_changes_with_the_batch_size_is_refused() -> None:
    def parity(b: GraphBuilder, x: str) -> str:
        batch = b.one("Gather", b.one("Shape", x), b.constant(np.array([0])), axis=0)
        return b.one("Mod", batch, b.constant(np.array([2])))

    def picked_by_parity(b: GraphBuilder, x: str) -> str:
        return b.one("Gather", x, parity(b, x), axis=1)

    def picked_by_batch(b: GraphBuilder, x: str) -> str:
        batch = b.one("Gather", b.one("Shape", x), b.constant(np.array([0])), axis=0)
        return b.one("Slice", x, b.constant(np.array([0])), batch, b.constant(np.array([1])))

    def looked_up_by_batch(b: GraphBuilder, x: str) -> str:
        batch = b.one("Gather", b.one("Shape", x), b.constant(np.array([0])), axis=0)
        return b.one("Gather", x, b.one("Gather", b.constant(np.zeros(9000, np.int64)), batch, axis=0), axis=1)

    for build in (picked_by_parity, picked_by_batch, looked_up_by_batch):
        assert "batch size" in refusal(flat_model(build, 4, 1))


def test_the_rest_of_a_shape_may_be_computed_with() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        shape = b.one("Shape", x)
        batch, size = (b.one("Gather", shape, b.constant(np.array([axis])), axis=0) for axis in (0, 1))
        half = b.one("Div", size, b.constant(np.array([2])))
        pairs = b.one("Concat", batch, half, b.constant(np.array([2])), axis=0)
        return b.one("Flatten", b.one("Reshape", x, pairs), axis=1)

    assert certify(flat_model(build, 4, 4)).lipschitz_bound == 1.0


def test_equal_elements_in_another_shape_are_another_pair() -> None:
    # Sorting (2, 3) and sorting the same elements as (3, 2) give tensors of different shapes.
    def build(b: GraphBuilder, x: str) -> str:
        left, right = b.add("Split", x, outputs=2, axis=1, num_outputs=2)
        wide, tall = (b.constant(np.array([0, *shape])) for shape in ((2, 3), (3, 2)))
        larger = b.one("Max", b.one("Reshape", left, wide), b.one("Reshape", right, wide))
        smaller = b.one("Min", b.one("Reshape", left, tall), b.one("Reshape", right, tall))
        sums = b.one("ReduceSum", smaller, b.constant(np.array([2])), keepdims=0)
        return b.one("Concat", b.one("Flatten", larger, axis=1), sums, axis=1)

    model_bytes = flat_model(build, 12, 9)
    assert violations(model_bytes, (12,), np.float64, 0) == []
    assert certify(model_bytes).n_outputs == 9


@pytest.mark.parametrize("operator", ["LeakyRelu", "BatchNormalization"])
def test_attributes_that_are_left_out_are_the_float32_numbers_of_the_standard(operator: str) -> None:
    # float32(0.01) and float32(1e-5) differ from 0.01 and 1e-5 by far more than float64 rounds.
    def build(b: GraphBuilder, x: str) -> str:
        if operator == "LeakyRelu":
            return b.one(operator, b.one("Sub", x, b.constant(np.full(4, 2.0))))
        parameters = [b.constant(np.full(4, value)) for value in (1.0, 0.0, 0.0, 1e-4)]
        return b.one(operator, x, *parameters)

    model_bytes = flat_model(build, 4, 4)
    certificate = certify(model_bytes)
    pixels = np.array([0.0, 1.0, 51.0, 255.0])
    computed = run(model_bytes, pixels[None] / 255)[0]
    alpha, epsilon = Fraction(float(np.float32(0.01))), Fraction(float(np.float32(1e-5)))
    for value, pixel in zip(computed, pixels, strict=True):
        x = Fraction(int(pixel), 255)
        if operator == "LeakyRelu":
            assert abs(Fraction(float(value)) - alpha * (x - 2)) <= Fraction(certificate.logit_error)
        else:
            # y = x / sqrt(v) without a root: y^2 v lies between the squares of x -+ error.
            v, error = Fraction(1e-4) + epsilon, Fraction(certificate.logit_error)
            y = Fraction(float(value))
            assert max(y - error, Fraction(0)) ** 2 * v <= x**2 <= (y + error) ** 2 * v


def test_gemm_with_its_factors_is_proved() -> None:
    weight, bias = np.random.default_rng(5).standard_normal((6, 3)), np.array([1.0, -2.0, 0.1])

    def build(b: GraphBuilder, x: str) -> str:
        return b.one("Gemm", x, b.constant(weight), b.constant(bias), alpha=-0.5, beta=0.75)

    certificate = certify(flat_model(build, 6, 3))
    true = 0.5 * np.linalg.norm(weight, 2)
    assert true <= certificate.lipschitz_bound * (1 + 1e-14) <= true * (1 + 1e-8)
    distance = 0.5 * np.linalg.norm(weight[:, 0] - weight[:, 1])
    assert distance <= certificate.margin_bounds_KK[0, 1] * (1 + 1e-14) <= distance * (1 + 1e-8)


def test_sums_means_and_maxima_of_several_tensors_are_proved() -> None:
    for operator, bound in (("Sum", 3.0), ("Mean", 1.0), ("Max", np.sqrt(3.0))):

        def build(b: GraphBuilder, x: str, operator: str = operator) -> str:
            # Squares of orthogonal matrices keep the three from being one linear map.
            parts = [b.one("Relu", b.one("Add", x, b.constant(np.full(4, shift)))) for shift in (0.0, 1.0, 2.0)]
            return b.one(operator, *parts)

        assert certify(flat_model(build, 4, 4)).lipschitz_bound == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("garbage", [b"", b"not a model", b"\x08\x07\x12\x00"])
def test_bytes_that_are_no_model_are_refused(garbage: bytes) -> None:
    assert refusal(garbage)


# --- the command ------------------------------------------------------------------------------------------------------


def command(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.certificate", str(path)], capture_output=True, text=True, check=False
    )


def test_the_command_prints_one_json_object(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(flat_model(lambda b, x: b.one("Gemm", x, b.constant(np.eye(3))), 3, 3))
    done = command(path)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["lipschitz_bound"] >= 1.0
    assert np.array(report["margin_bounds"]).shape == (3, 3)
    assert 0.0 < report["logit_error"] < 1e-12
    assert [node["node"] for node in report["nodes"]]


def test_the_command_exits_2_and_names_every_reason(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(flat_model(lambda b, x: b.one("Cos", b.one("Sin", x)), 3, 3))
    done = command(path)
    assert done.returncode == 2
    assert "Sin" in done.stderr
    assert "Cos" in done.stderr
    assert command(tmp_path / "missing.onnx").returncode == 2


# --- graphs that a runtime reads in another way -----------------------------------------------------------------------


def wide_model(build: Callable[[GraphBuilder, str], str], shape: tuple[int, ...], m: int, dtype: type) -> bytes:
    b = GraphBuilder(np.random.default_rng(0), dtype)
    return b.model(shape, build(b, "image"), m)


@pytest.mark.parametrize(("product", "addition"), [("MatMul", "Add"), ("Gemm", "Add"), ("Gemm", "Sum")])
def test_an_addition_that_the_runtime_joins_with_a_product_takes_part_in_every_rounding(
    product: str, addition: str
) -> None:
    # Blocks of the sum that add 0.9 each to 2^24, where the distance of floats is 2: each is rounded away.
    weight = np.full((8192, 1), 0.9 / 128, np.float32)

    def build(b: GraphBuilder, x: str) -> str:
        return b.one(addition, b.one(product, x, b.constant(weight)), b.constant(np.full(1, 2.0**24)))

    model_bytes = wide_model(build, (8192,), 1, np.float32)
    exact = 2**24 + 8192 * Fraction(float(weight[0, 0]))
    error = abs(Fraction(float(run(model_bytes, np.ones((1, 8192), np.float32))[0, 0])) - exact)
    assert error <= Fraction(certify(model_bytes).logit_error)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda b, x: b.one("ReduceMax", x, b.constant(np.array([1])), keepdims=2), "keepdims"),
        (lambda b, x: b.add("TopK", x, b.constant(np.array([2])), outputs=2, largest=2)[0], "largest"),
        (lambda b, x: b.one("Gemm", x, b.constant(np.eye(4)), transB=2), "transB"),
        (lambda b, x: b.one("Add", x, b.one("ReduceMax", b.constant(np.ones((2, 4))), keepdims=2)), "keepdims"),
    ],
)
def test_flags_are_0_or_1(build: Callable[[GraphBuilder, str], str], expected: str) -> None:
    # ONNX Runtime takes keepdims=2 for 0: the maxima would broadcast over the images of a batch.
    assert f"{expected} must be 0 or 1" in refusal(flat_model(build, 4, 4))


def test_no_length_in_a_graph_is_taken_for_the_batch_size() -> None:
    # Read as N x ..., the groups would be the images; with one image they are parts of it.
    def build(b: GraphBuilder, x: str) -> str:
        groups = b.one("Reshape", x, b.constant(np.array([7919, -1])))
        peaks = b.one("ReduceMax", groups, b.constant(np.array([1])))
        parts = b.one("Reshape", b.one("Sub", groups, peaks), b.constant(np.array([-1, 7919 * 4])))
        return b.one("ReduceMax", parts, b.constant(np.array([1])))

    assert "batch axis" in refusal(flat_model(build, 7919 * 4, 1))


@pytest.mark.parametrize("operator", ["AveragePool", "GlobalAveragePool"])
def test_a_mean_whose_sum_overflows_is_refused(operator: str) -> None:
    attributes = {"kernel_shape": [8, 8]} if operator == "AveragePool" else {}

    def build(b: GraphBuilder, x: str) -> str:
        huge = b.one("Add", x, b.constant(np.full((1, 8, 8), 4e37)))
        return b.one("Flatten", b.one(operator, huge, **attributes))

    model_bytes = wide_model(build, (1, 8, 8), 1, np.float32)
    assert not np.isfinite(run(model_bytes, np.full((1, 1, 8, 8), 0.5, np.float32))).all()
    assert "overflow" in refusal(model_bytes)


@pytest.mark.parametrize(
    ("scale", "variance", "mean", "expected"),
    [
        # The factor 1e-350, times 1e600, is a slope of 1e250.
        (1e-200, 1e300, 0.0, "factor underflows"),
        (1.0, 1e-310, 0.0, "may underflow"),
        (1e-300, 1e-300, 1e200, "overflow"),
    ],
)
def test_a_normalisation_at_the_ends_of_the_number_range_is_refused(
    scale: float, variance: float, mean: float, expected: str
) -> None:
    def build(b: GraphBuilder, x: str) -> str:
        numbers = (scale, 0.0, mean, variance)
        y = b.one("BatchNormalization", x, *[b.constant(np.full(4, n)) for n in numbers], epsilon=0.0)
        return b.one("Mul", b.one("Mul", y, b.constant(np.array(1e300))), b.constant(np.array(1e300)))

    assert expected in refusal(flat_model(build, 4, 4))


@pytest.mark.parametrize(
    ("scale", "mean", "variance"),
    [(1e30, 0.0, 1e-20), (1.0, 1e30, 1e-20), (1e20, 1e20, 1.0), (-1e30, 0.0, 1e-20)],
    ids=["scale over deviation", "mean over deviation", "mean times scale", "negative"],
)
def test_a_factor_that_overflows_in_the_format_is_refused(scale: float, mean: float, variance: float) -> None:
    def build(b: GraphBuilder, x: str) -> str:
        numbers = (scale, 0.0, mean, variance)
        # The factor meets zeros: it takes no part in any result, and still makes a NaN of it.
        nothing = b.one("Mul", x, b.constant(np.zeros(4)))
        return b.one("BatchNormalization", nothing, *[b.constant(np.full(4, n)) for n in numbers], epsilon=0.0)

    assert "overflow cannot be excluded" in refusal(flat_model(build, 4, 4, np.float32))


def test_constants_that_runtimes_fold_in_two_ways_are_refused() -> None:
    def backwards(start: int, end: int) -> Callable[[GraphBuilder, str], str]:
        def build(b: GraphBuilder, x: str) -> str:
            limits = [b.constant(np.array([n])) for n in (start, end, 0, -1)]
            part = b.one("Slice", b.constant(np.array([7.0, 8.0, 9.0])), *limits)
            together = b.one("Concat", b.constant(np.array([3.0])), part, axis=0)
            return b.one("Add", x, b.one("ReduceMax", together))

        return build

    def product(b: GraphBuilder, x: str) -> str:
        number = b.one("ReduceProd", b.constant(np.array([65536, 65537], np.int32)), keepdims=0)
        return b.one("Add", x, b.one("Cast", number, to=TensorProto.DOUBLE))

    assert "two ways" in refusal(flat_model(backwards(-100, -200), 4, 4))
    assert "two ways" in refusal(flat_model(backwards(2, 2**63 - 1), 4, 4))
    assert "24 bits" in refusal(flat_model(product, 4, 4))

    def cast(b: GraphBuilder, x: str) -> str:
        number = b.one("Cast", b.constant(np.array(1e20)), to=TensorProto.INT32)
        return b.one("Add", x, b.one("Cast", number, to=TensorProto.DOUBLE))

    assert "outside of the integers" in refusal(flat_model(cast, 4, 4))
    model_bytes = flat_model(backwards(-1, -(2**63)), 4, 4)
    assert run(model_bytes, np.zeros((1, 4)))[0, 0] == 9.0
    assert certify(model_bytes).lipschitz_bound == 1.0


def test_a_model_that_can_be_read_in_two_ways_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(b: GraphBuilder, x: str) -> str:
        value = helper.make_tensor("value", TensorProto.DOUBLE, [1], [0.0])
        return b.one("Add", x, b.one("ConstantOfShape", b.constant(np.array([4])), value=value))

    plain = flat_model(build, 4, 4)
    assert certify(plain).lipschitz_bound == 1.0

    two_opsets = onnx.load_model_from_string(plain)
    two_opsets.opset_import.insert(0, helper.make_opsetid("", 11))
    assert "several opsets" in refusal(two_opsets.SerializeToString())

    # ONNX Runtime takes 0 for it, other readers the number in the file.
    outside = onnx.load_model_from_string(plain)
    tensor = next(a.t for n in outside.graph.node if n.op_type == "ConstantOfShape" for a in n.attribute)
    tensor.ClearField("double_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="number.bin")
    (tmp_path / "number.bin").write_bytes(np.array([5.0]).tobytes())
    monkeypatch.chdir(tmp_path)
    assert "outside the file" in refusal(outside.SerializeToString())

    segment = onnx.load_model_from_string(plain)
    segment.graph.initializer[0].segment.end = 1
    assert "weight" in refusal(segment.SerializeToString())

    reference = onnx.load_model_from_string(flat_model(lambda b, x: b.one("Softmax", x, axis=1), 4, 4))
    reference.graph.node[0].attribute[0].ref_attr_name = "axis"
    assert "refers to an attribute" in refusal(reference.SerializeToString())


@pytest.mark.parametrize("spread", [{"kernel_shape": [3], "dilations": [2]}, {"kernel_shape": [1], "strides": [4]}])
@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool", "LpPool"])
def test_automatic_padding_of_windows_with_gaps_is_refused(operator: str, spread: dict[str, list[int]]) -> None:
    # ONNX Runtime pads for the window without its gaps, or cuts off pixels before the first window.
    def build(b: GraphBuilder, x: str) -> str:
        b.opset = 19
        pooled = b.one(operator, x, auto_pad="SAME_UPPER", **spread)
        return b.one("Flatten", b.one("GlobalMaxPool", pooled))

    assert "two ways" in refusal(wide_model(build, (1, 7), 1, np.float32))


def test_a_chain_that_is_too_deep_is_refused() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        for _ in range(700):
            x = b.one("Add", x, b.constant(np.zeros(4)))
        return b.one("MatMul", x, b.constant(np.eye(4)))

    assert "too many linear steps" in refusal(flat_model(build, 4, 4))


@pytest.mark.parametrize(("classes", "tabled"), [(256, True), (257, False)])
def test_margin_bounds_are_tabled_for_some_hundred_classes_only(classes: int, tabled: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((4, classes))
    certificate = certify(flat_model(lambda b, x: b.one("Gemm", x, b.constant(weight)), 4, classes))
    assert (certificate.margin_table() == certificate.margin_bounds_KK.tolist()) is tabled
    assert tabled or certificate.margin_table() is None
