"""Roots of sums of squares as exporters write them out: bounds against difference quotients, errors against balls."""

from collections.abc import Callable

import flint
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from random_graphs import GraphBuilder

from service.certificate import UnsupportedModelError, certify

Build = Callable[[GraphBuilder, str], str]


def model(build: Build, shape: tuple[int, ...], n_outputs: object, dtype: type = np.float64) -> bytes:
    b = GraphBuilder(np.random.default_rng(0), dtype)
    return b.model(shape, b.one("Flatten", build(b, "image"), axis=1), n_outputs)


def refusal(build: Build, shape: tuple[int, ...] = (4,)) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        certify(model(build, shape, 4))
    return str(caught.value)


def largest_slope(model_bytes: bytes, shape: tuple[int, ...]) -> float:
    """A lower bound of the Lipschitz constant: difference quotients over steps of all sizes, some towards zero."""
    draw = np.random.default_rng(1)
    base = draw.uniform(0.0, 1.0, (300, *shape))
    base[:50] = 0.0
    step = draw.standard_normal(base.shape) * 10.0 ** draw.uniform(-6, 0, (300, *[1] * len(shape)))
    run = ReferenceEvaluator(onnx.load_model_from_string(model_bytes)).run
    moved = run(None, {"image": base + step})[0] - run(None, {"image": base})[0]
    lengths = np.linalg.norm(step.reshape(300, -1), axis=1)
    return float(np.max(np.linalg.norm(moved, axis=1) / lengths))


def number(b: GraphBuilder, value: float) -> str:
    return b.constant(np.array(value))


def l2_pool(size: int, stride: int, root: str = "Pow", square: str = "Pow", **attributes: object) -> Build:
    """As torch writes `lp_pool2d` out."""

    def build(b: GraphBuilder, x: str) -> str:
        z = b.one("Pow", x, number(b, 2.0)) if square == "Pow" else b.one("Mul", x, x)
        z = b.one("AveragePool", z, kernel_shape=[size] * 2, strides=[stride] * 2, **attributes)
        z = b.one("Mul", b.one("Sign", z), b.one("Relu", b.one("Abs", z)))
        z = b.one("Mul", z, number(b, float(size * size)))
        return b.one("Pow", z, number(b, 0.5)) if root == "Pow" else b.one("Sqrt", z)

    return build


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("root", ["Pow", "Sqrt"])
def test_l2_pooling_written_out_never_expands(square: str, root: str) -> None:
    model_bytes = model(l2_pool(2, 2, root, square), (3, 4, 4), 12)
    assert 1.0 <= certify(model_bytes).lipschitz_bound <= 1.0 + 1e-9
    assert largest_slope(model_bytes, (3, 4, 4)) > 0.5


def test_a_pixel_in_m_windows_counts_sqrt_m() -> None:
    model_bytes = model(l2_pool(2, 1), (1, 4, 4), 9)
    assert 2.0 <= certify(model_bytes).lipschitz_bound <= 2.0 + 1e-9
    whole = model(lambda b, x: b.one("LpPool", x, kernel_shape=[2, 2], strides=[1, 1], p=2), (1, 4, 4), 9)
    assert 2.0 <= certify(whole).lipschitz_bound <= 2.0 + 1e-9
    padded = model(l2_pool(3, 2, pads=[1, 1, 1, 1], count_include_pad=1), (2, 5, 5), 18)
    assert largest_slope(padded, (2, 5, 5)) <= certify(padded).lipschitz_bound


def test_weighted_squares_of_two_branches_are_one_norm() -> None:
    weight = np.linalg.qr(np.random.default_rng(2).standard_normal((4, 4)))[0]

    def build(b: GraphBuilder, x: str) -> str:
        branch = b.one("Abs", b.one("MatMul", x, b.constant(weight)))
        squares = [b.one("Mul", b.one("Pow", z, number(b, 2.0)), number(b, 0.5)) for z in (x, branch)]
        return b.one("Sqrt", b.one("Add", b.one("Add", *squares), number(b, 1e-6)))

    model_bytes = model(build, (4,), 4)
    assert largest_slope(model_bytes, (4,)) <= certify(model_bytes).lipschitz_bound <= 1.0 + 1e-9


@pytest.mark.parametrize("operator", ["ReduceSum", "ReduceMean", "ReduceSumSquare", "GlobalAveragePool"])
def test_norms_over_axes_are_bounded_by_their_weights(operator: str) -> None:
    def build(b: GraphBuilder, x: str) -> str:
        axes = b.constant(np.array([2, 3]))
        if operator == "ReduceSumSquare":
            return b.one("Sqrt", b.one(operator, x, axes, keepdims=0))
        squares = b.one("Mul", x, x)
        sums = b.one(operator, squares) if operator == "GlobalAveragePool" else b.one(operator, squares, axes)
        return b.one("Sqrt", b.one("Flatten", sums, axis=1))

    expected = 1.0 if operator in ("ReduceSum", "ReduceSumSquare") else 0.25
    model_bytes = model(build, (3, 4, 4), 3)
    assert certify(model_bytes).lipschitz_bound == pytest.approx(expected, rel=1e-9)
    assert largest_slope(model_bytes, (3, 4, 4)) <= expected * (1 + 1e-12)


def test_an_element_that_is_picked_twice_counts_twice() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        twice = b.one("Gather", x, b.constant(np.array([0, 0, 1])), axis=1)
        return b.one("Sqrt", b.one("ReduceSum", b.one("Mul", twice, twice), b.constant(np.array([1]))))

    assert 2.0**0.5 <= certify(model(build, (2,), 1)).lipschitz_bound <= 2.0**0.5 * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_error_of_a_root_covers_what_the_runtime_computes(dtype: type) -> None:
    def build(b: GraphBuilder, x: str) -> str:
        squares = b.one("Mul", b.one("Pow", x, number(b, 2.0)), number(b, 0.3))
        sums = b.one("Add", b.one("ReduceSum", squares, b.constant(np.array([1]))), number(b, 1e-3))
        return b.one("Sqrt", sums)

    model_bytes = model(build, (9,), 1, dtype)
    error = certify(model_bytes).logit_error
    session = onnxruntime.InferenceSession(model_bytes, providers=["CPUExecutionProvider"])
    flint.ctx.prec = 200
    scale, offset = (flint.arb(float(dtype(value))) for value in (0.3, 1e-3))
    for pixels in np.random.default_rng(4).integers(0, 256, (40, 9)):
        computed = float(session.run(None, {"image": (pixels / 255).astype(dtype)[None]})[0][0, 0])
        exact = (sum(scale * flint.arb(flint.fmpq(int(v), 255)) ** 2 for v in pixels) + offset).sqrt()
        assert abs(flint.arb(computed) - exact) <= flint.arb(error)


def test_a_square_without_a_root_is_refused() -> None:
    assert "square" in refusal(lambda b, x: b.one("Pow", x, number(b, 2.0)))
    assert "square" in refusal(lambda b, x: b.one("Relu", b.one("Mul", x, x)))
    assert "square" in refusal(lambda b, x: b.one("Gemm", b.one("Mul", x, x), b.constant(np.eye(4))))
    assert "power of 4" in refusal(lambda b, x: b.one("Pow", x, number(b, 4.0)))
    assert "no sum of squares" in refusal(lambda b, x: b.one("Sqrt", x))


def test_what_only_looks_like_a_root_of_squares_is_refused() -> None:
    def squares(b: GraphBuilder, x: str) -> str:
        return b.one("Mul", x, x)

    def other_sign(b: GraphBuilder, x: str) -> str:
        return b.one("Sqrt", b.one("Mul", b.one("Sign", squares(b, x)), squares(b, b.one("Neg", x))))

    for build, word in (
        (lambda b, x: b.one("Sqrt", b.one("Add", squares(b, x), number(b, -0.1))), "not negative"),
        (lambda b, x: b.one("Sqrt", b.one("Mul", squares(b, x), number(b, -1.0))), "not positive"),
        (lambda b, x: b.one("Sqrt", b.one("Add", squares(b, x), x)), "no square"),
        (lambda b, x: b.one("Pow", squares(b, x), number(b, 0.25)), "1/2"),
        (lambda b, x: b.one("Sqrt", b.one("Sub", squares(b, x), squares(b, b.one("Abs", x)))), "square"),
        (lambda b, x: b.one("Sign", squares(b, x)), "square"),
        (other_sign, "something else"),
    ):
        assert word in refusal(build)


def test_weights_that_underflow_are_refused() -> None:
    # sqrt(1e-600 x^2) times 1e300 has the slope 1.
    def build(b: GraphBuilder, x: str) -> str:
        square = b.one("Mul", x, x)
        for _ in range(2):
            square = b.one("Mul", square, number(b, 1e-300))
        return b.one("Mul", b.one("Sqrt", square), number(b, 1e300))

    assert "underflow" in refusal(build)
