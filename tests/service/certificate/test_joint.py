"""Bounds of linear steps taken as one map, against the matrix of the whole graph, in the forms that exporters write."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from random_graphs import GraphBuilder

from service.certificate import Certificate, certify, matrices

Build = Callable[[GraphBuilder, str], str]


def model(build: Build, shape: tuple[int, ...], n_outputs: int) -> bytes:
    b = GraphBuilder(np.random.default_rng(0))
    return b.model(shape, b.one("Flatten", build(b, "image"), axis=1), n_outputs)


def outputs(model_bytes: bytes, image_NX: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(onnx.load_model_from_string(model_bytes)).run(None, {"image": image_NX})[0]


def matrix_of(model_bytes: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The linear part of an affine graph, K x D, exactly up to float64 rounding."""
    size = int(np.prod(shape))
    images = np.concatenate([np.zeros((1, size)), np.eye(size)]).reshape(-1, *shape)
    values = outputs(model_bytes, images)
    return (values[1:] - values[0]).T


def proved(build: Build, shape: tuple[int, ...], slack: float = 1e-6) -> Certificate:
    """The certificate of an affine graph, checked against its matrix from both sides."""
    b = GraphBuilder(np.random.default_rng(0))
    build(b, "image")
    values = ReferenceEvaluator(onnx.load_model_from_string(_probe(build, shape))).run(
        None, {"image": np.zeros((1, *shape))}
    )[0]
    model_bytes = model(build, shape, values.size)
    certificate = certify(model_bytes)
    matrix = matrix_of(model_bytes, shape)
    true = float(np.linalg.norm(matrix, 2))
    assert true <= certificate.lipschitz_bound * (1 + 1e-11)
    assert certificate.lipschitz_bound <= true * (1 + slack) + 1e-9
    for i in range(len(matrix)):
        distances = np.linalg.norm(matrix - matrix[i], axis=1)
        assert (distances <= certificate.margin_bounds_KK[i] * (1 + 1e-11) + 1e-13).all()
    return certificate


def _probe(build: Build, shape: tuple[int, ...]) -> bytes:
    """The graph with an output of unknown size, to learn it."""
    b = GraphBuilder(np.random.default_rng(0))
    output = b.one("Flatten", build(b, "image"), axis=1)
    return b.model(shape, output, "K")


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# --- matrices ---------------------------------------------------------------------------------------------------------


def test_a_residual_of_a_matrix_is_bounded_as_one_map() -> None:
    weight = -0.9 * np.eye(6) + 0.01 * rng().standard_normal((6, 6))
    proved(lambda b, x: b.one("Add", x, b.one("MatMul", x, b.constant(weight))), (6,))
    proved(lambda b, x: b.one("Sub", b.one("MatMul", x, b.constant(weight)), x), (6,))


def test_two_branches_of_one_tensor_are_bounded_as_one_map() -> None:
    weights = rng().standard_normal((2, 6, 4))

    def branches(b: GraphBuilder, x: str) -> list[str]:
        return [b.one("Gemm", x, b.constant(weight), b.constant(np.ones(4))) for weight in weights]

    proved(lambda b, x: b.one("Sub", *branches(b, x)), (6,))
    proved(lambda b, x: b.one("Concat", *branches(b, x), axis=1), (6,))


def test_patches_gathered_before_a_matrix_are_bounded_as_one_map() -> None:
    positions = np.lib.stride_tricks.sliding_window_view(np.arange(8), 3)
    weight = rng().standard_normal((3, 2))

    def build(b: GraphBuilder, x: str) -> str:
        return b.one("MatMul", b.one("Gather", x, b.constant(positions), axis=1), b.constant(weight))

    proved(build, (8,))


def test_matrices_without_an_activation_between_them_are_bounded_as_one_map() -> None:
    first, second = rng().standard_normal((2, 6, 6))

    def build(b: GraphBuilder, x: str) -> str:
        z = b.one(
            "Div", b.one("Sub", b.one("Gemm", x, b.constant(first)), b.constant(np.ones(6))), b.constant(first[0])
        )
        return b.one("Gemm", z, b.constant(second[:, :3]))

    proved(build, (6,))


def test_branches_of_several_nonlinear_tensors_add_up() -> None:
    first, second = rng().standard_normal((2, 5, 5))

    def build(b: GraphBuilder, x: str) -> str:
        left = b.one("MatMul", b.one("Relu", x), b.constant(first))
        right = b.one("MatMul", b.one("Abs", x), b.constant(second))
        return b.one("Add", b.one("Add", left, right), b.one("Neg", left))

    # W1 relu(x) cancels; W2 |x| is left.
    bound = certify(model(build, (5,), 5)).lipschitz_bound
    assert np.linalg.norm(second, 2) <= bound <= np.linalg.norm(second, 2) * (1 + 1e-9)


def test_a_matrix_that_is_too_large_is_left_to_the_product_of_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "_LARGEST_MATRIX", 30)
    weight = -0.9 * np.eye(6)
    build: Build = lambda b, x: b.one("Add", x, b.one("MatMul", x, b.constant(weight)))  # noqa: E731
    assert certify(model(build, (6,), 6)).lipschitz_bound == pytest.approx(1.9, rel=1e-6)


# --- convolutions -----------------------------------------------------------------------------------------------------


def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for images whose matrices would be too large."""
    monkeypatch.setattr(matrices, "_LARGEST_MATRIX", 1)


def conv(b: GraphBuilder, x: str, kernel: np.ndarray, pad: int | None = None, **attributes: object) -> str:
    low = kernel.shape[-1] // 2 if pad is None else pad
    return b.one("Conv", x, b.constant(kernel), kernel_shape=kernel.shape[2:], pads=[low] * 4, **attributes)


def normalised(b: GraphBuilder, x: str, channels: int) -> str:
    parameters = [rng().uniform(0.2, 3.0, channels) for _ in range(4)]
    return b.one("BatchNormalization", x, *(b.constant(values) for values in parameters), epsilon=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_residual_of_a_convolution_is_bounded_as_one_convolution(
    monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    kernels_only(monkeypatch)
    kernel = 0.05 * rng().standard_normal((4, 4 // groups, 3, 3))
    kernel[np.arange(4), np.arange(4) % (4 // groups), 1, 1] -= 0.9
    proved(lambda b, x: b.one("Add", x, conv(b, x, kernel, group=groups)), (4, 6, 5), slack=0.2)


def test_a_normalisation_before_or_behind_a_convolution_joins_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_only(monkeypatch)
    kernel = rng().standard_normal((4, 3, 3, 3))
    proved(lambda b, x: normalised(b, conv(b, x, kernel), 4), (3, 6, 6), slack=0.1)
    proved(lambda b, x: conv(b, normalised(b, x, 3), kernel, strides=[2, 2]), (3, 6, 6), slack=0.1)


def test_a_pool_or_a_convolution_that_stays_inside_joins_the_convolution_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels_only(monkeypatch)
    kernel, second = rng().standard_normal((4, 3, 3, 3)), rng().standard_normal((2, 4, 2, 2))
    proved(
        lambda b, x: b.one("AveragePool", conv(b, x, kernel), kernel_shape=[2, 2], strides=[2, 2]),
        (3, 8, 8),
        slack=0.1,
    )
    proved(lambda b, x: conv(b, conv(b, x, kernel, strides=[2, 1]), second, pad=0), (3, 8, 8), slack=0.15)


@pytest.mark.parametrize("outer_pads", [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_padding_between_two_convolutions_keeps_their_product(
    monkeypatch: pytest.MonkeyPatch, outer_pads: list[int]
) -> None:
    kernels_only(monkeypatch)
    first, second = rng().standard_normal((2, 2, 3, 3)), rng().standard_normal((2, 2, 1, 1))

    def build(b: GraphBuilder, x: str) -> str:
        # The results of a full convolution reach beyond the padding of the next one.
        inner = conv(b, x, first, pad=2)
        return b.one("Conv", inner, b.constant(second), kernel_shape=[1, 1], pads=outer_pads)

    proved(build, (2, 4, 4), slack=0.3)


@pytest.mark.parametrize(("stride", "size"), [(1, 6), (2, 6), (3, 6)])
@pytest.mark.parametrize("form", ["pad", "concat"])
def test_circular_padding_costs_nothing(stride: int, size: int, form: str) -> None:
    kernel = rng().standard_normal((3, 2, 3, 3))

    def build(b: GraphBuilder, x: str) -> str:
        if form == "pad":
            pads = b.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
            x = b.one("Pad", x, pads, mode="wrap")
        else:
            for axis in (2, 3):
                ends = [b.constant(np.array([v])) for v in (-1, np.iinfo(np.int64).max, 0, 1)]
                last = b.one("Slice", x, ends[0], ends[1], b.constant(np.array([axis])))
                first = b.one("Slice", x, ends[2], ends[3], b.constant(np.array([axis])))
                x = b.one("Concat", last, x, first, axis=axis)
        return conv(b, x, kernel, pad=0, strides=[stride, stride])

    proved(build, (2, size, size), slack=1e-3)


def test_circular_padding_that_the_stride_does_not_divide_is_still_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_only(monkeypatch)
    kernel = rng().standard_normal((3, 2, 3, 3))

    def build(b: GraphBuilder, x: str) -> str:
        padded = b.one("Pad", x, b.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])), mode="wrap")
        return conv(b, padded, kernel, pad=0, strides=[2, 2])

    proved(build, (2, 5, 5), slack=1.0)


def test_an_element_in_m_patches_counts_sqrt_m() -> None:
    # One output channel: each patch is seen in one direction only, so that the bound is attained by symmetry.
    kernel = np.full((1, 1, 3, 3), 1.0 / 9.0)

    def build(b: GraphBuilder, x: str) -> str:
        padded = b.one("Pad", x, b.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])), mode="reflect")
        return conv(b, padded, kernel, pad=0)

    proved(build, (1, 5, 5), slack=0.35)


def test_overlapping_means_are_bounded_as_a_convolution() -> None:
    proved(lambda b, x: b.one("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2]), (2, 9, 9), slack=0.01)
    proved(lambda b, x: b.one("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4), (1, 6, 6), slack=0.01)


# --- centring ---------------------------------------------------------------------------------------------------------


def centred(b: GraphBuilder, x: str) -> str:
    return b.one("Sub", x, b.one("ReduceMean", x, b.constant(np.array([-2, -1])), keepdims=1))


@pytest.mark.parametrize("joint", [True, False])
def test_centring_is_a_projection(monkeypatch: pytest.MonkeyPatch, joint: bool) -> None:
    if not joint:
        kernels_only(monkeypatch)
    proved(centred, (3, 4, 5))
    proved(lambda b, x: b.one("Sub", x, b.one("GlobalAveragePool", x)), (3, 4, 5))


def test_what_only_looks_like_centring_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_only(monkeypatch)
    axes = np.array([-2, -1])

    def other_tensor(b: GraphBuilder, x: str) -> str:
        return b.one("Sub", x, b.one("ReduceMean", b.one("Neg", x), b.constant(axes), keepdims=1))

    def other_channel(b: GraphBuilder, x: str) -> str:
        turned = b.one("Gather", x, b.constant(np.array([1, 2, 0])), axis=1)
        return b.one("Sub", x, b.one("ReduceMean", turned, b.constant(axes), keepdims=1))

    def added(b: GraphBuilder, x: str) -> str:
        return b.one("Add", x, b.one("ReduceMean", x, b.constant(axes), keepdims=1))

    def summed(b: GraphBuilder, x: str) -> str:
        return b.one("Sub", x, b.one("ReduceSum", x, b.constant(axes), keepdims=1))

    for build in (other_tensor, other_channel, added, summed):
        certificate = proved(build, (3, 4, 4), slack=1.0)
        assert certificate.lipschitz_bound > 1.4


# --- positive and negative parts --------------------------------------------------------------------------------------


def test_positive_and_negative_part_together_never_expand() -> None:
    def parts(b: GraphBuilder, x: str) -> str:
        return b.one("Concat", b.one("Relu", x), b.one("Relu", b.one("Neg", x)), axis=1)

    assert certify(model(parts, (4,), 8)).lipschitz_bound == 1.0


def test_the_same_part_twice_counts_twice() -> None:
    def twice(b: GraphBuilder, x: str) -> str:
        return b.one("Concat", b.one("Relu", x), b.one("Relu", x), axis=1)

    def negative_twice(b: GraphBuilder, x: str) -> str:
        return b.one("Concat", *(b.one("Relu", b.one("Neg", x)) for _ in range(2)), axis=1)

    def of_moved(b: GraphBuilder, x: str) -> str:
        moved = b.one("Gather", x, b.constant(np.array([1, 0, 2, 3])), axis=1)
        return b.one("Concat", b.one("Relu", x), b.one("Relu", b.one("Neg", moved)), axis=1)

    for build in (twice, negative_twice, of_moved):
        assert certify(model(build, (4,), 8)).lipschitz_bound >= np.sqrt(2.0)


# --- steps of gradient descent ----------------------------------------------------------------------------------------


def gradient_step(weight_HN: np.ndarray, scale_H: np.ndarray, sign: float = -1.0, activation: str = "Relu") -> Build:
    """`x + sign W^T scale a(W x + b)` written with Gemm."""

    def build(b: GraphBuilder, x: str) -> str:
        hidden = b.one("Gemm", x, b.constant(weight_HN), b.constant(np.linspace(-1, 1, len(weight_HN))), transB=1)
        active = b.one("Mul", b.constant(scale_H), b.one(activation, hidden))
        back = b.one("Gemm", active, b.constant(np.ascontiguousarray(weight_HN.T)), transB=1)
        return b.one("Sub" if sign < 0 else "Add", x, back)

    return build


def secant_slope(model_bytes: bytes, n: int) -> float:
    """A lower bound of the Lipschitz constant: the largest of many difference quotients."""
    draw = np.random.default_rng(3)
    base = draw.uniform(0.0, 1.0, (400, n))
    step = draw.standard_normal((400, n)) * 1e-3
    moved = outputs(model_bytes, base + step) - outputs(model_bytes, base)
    return float(np.max(np.linalg.norm(moved, axis=1) / np.linalg.norm(step, axis=1)))


def test_a_step_of_gradient_descent_never_expands_up_to_step_size_2() -> None:
    weight = np.linalg.qr(rng().standard_normal((6, 6)))[0] * np.linspace(0.2, 1.0, 6)[:, None]
    for step_size, expected in ((0.5, 1.0), (2.0, 1.0), (3.0, 2.0)):
        build = gradient_step(weight, np.full(6, step_size))
        model_bytes = model(build, (6,), 6)
        bound = certify(model_bytes).lipschitz_bound
        assert bound == pytest.approx(expected, rel=1e-6)
        assert secant_slope(model_bytes, 6) <= bound * (1 + 1e-9)


def test_what_only_looks_like_a_step_of_gradient_descent_pays_the_full_price() -> None:
    weight = np.linalg.qr(rng().standard_normal((6, 6)))[0]
    ones = np.ones(6)
    uphill = gradient_step(weight, ones, sign=1.0)
    negative = gradient_step(weight, -ones)
    mixed = gradient_step(weight, np.array([1.0, 1.0, 1.0, 1.0, 1.0, -1.0]))
    for build in (uphill, negative, mixed):
        model_bytes = model(build, (6,), 6)
        assert certify(model_bytes).lipschitz_bound >= 2.0 - 1e-9
        assert secant_slope(model_bytes, 6) <= certify(model_bytes).lipschitz_bound


def test_an_adjoint_that_is_a_little_off_costs_a_little() -> None:
    weight = np.linalg.qr(rng().standard_normal((6, 6)))[0]
    other = weight + 1e-3 * rng().standard_normal((6, 6))

    def build(b: GraphBuilder, x: str) -> str:
        active = b.one("Relu", b.one("Gemm", x, b.constant(weight), transB=1))
        return b.one("Sub", x, b.one("Gemm", active, b.constant(other)))

    bound = certify(model(build, (6,), 6)).lipschitz_bound
    assert 1.0 + 1e-4 < bound < 1.02


@pytest.mark.parametrize("stride", [1, 2])
def test_a_step_of_gradient_descent_of_a_convolution_never_expands(
    monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    kernels_only(monkeypatch)
    kernel = rng().standard_normal((6, 3, 3, 3))
    size = 6 if stride == 1 else 7

    def build(scale: float, kernel_back: np.ndarray) -> Build:
        def written(b: GraphBuilder, x: str) -> str:
            hidden = conv(b, x, scale * kernel, strides=[stride] * 2)
            active = b.one("Relu", b.one("Add", hidden, b.constant(np.linspace(-1, 1, 6).reshape(1, 6, 1, 1))))
            pads = {"pads": [1] * 4, "strides": [stride] * 2, "kernel_shape": [3, 3]}
            back = b.one("ConvTranspose", active, b.constant(scale * kernel_back), **pads)
            return b.one("Sub", x, b.one("Mul", back, b.constant(np.array(2.0))))

        return written

    shape, n = (3, size, size), 3 * size * size
    assert certify(model(build(0.02, kernel), shape, n)).lipschitz_bound <= 1.0 + 1e-9
    turned = certify(model(build(0.02, kernel[:, :, ::-1]), shape, n)).lipschitz_bound
    assert turned > 1.01
    large = certify(model(build(1.0, kernel), shape, n)).lipschitz_bound
    hidden = matrix_of(
        model(lambda b, x: conv(b, x, kernel, strides=[stride] * 2), shape, 6 * (-(-size // stride)) ** 2), shape
    )
    true = 2.0 * np.linalg.norm(hidden, 2) ** 2 - 1.0
    assert true <= large * (1 + 1e-9) <= true * 1.2


# --- reports --------------------------------------------------------------------------------------------------------


def test_the_report_names_the_theorem_that_gave_the_bound() -> None:
    weight = -0.9 * np.eye(6)
    gradient = gradient_step(np.linalg.qr(rng().standard_normal((6, 6)))[0], np.ones(6))
    cases: list[tuple[Build, tuple[int, ...], str, str]] = [
        (lambda b, x: b.one("Add", x, b.one("MatMul", x, b.constant(weight))), (6,), "Add", "multiplied out"),
        (lambda b, x: b.one("MatMul", x, b.constant(weight)), (6,), "MatMul", "Matrix product"),
        (gradient, (6,), "Sub", "slopes of a"),
        (centred, (3, 4, 5), "Sub", "projection"),
    ]
    for build, shape, operator, words in cases:
        nodes = certify(model(build, shape, 6 if len(shape) == 1 else 60)).nodes
        (theorem,) = [node.theorem for node in nodes if node.node.startswith(operator)][-1:]
        assert words in theorem
