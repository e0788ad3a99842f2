"""Expand, Tile, Where, Pad and Concat: exact, as long as the elements that they repeat, and refusals."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import onnxruntime
import pytest
from exact_graphs import FLOATS, Program
from onnx import TensorProto
from random_graphs import GraphBuilder, exact_logits

from service.certificate import Certificate, UnsupportedModelError, certify

SHAPE = (1, 3, 1)
Build = Callable[[GraphBuilder, str], str]


def model(build: Build, m: int, batch: object = "N") -> bytes:
    b = GraphBuilder(np.random.default_rng(0))
    return b.model(SHAPE, b.one("Flatten", build(b, "image"), axis=1), m, batch=batch)


def certified(build: Build, m: int, batch: object = "N") -> Certificate:
    return certify(model(build, m, batch))


def run(build: Build, m: int, images: np.ndarray) -> np.ndarray:
    """One image after the other: ONNX stacks no constant beside several of them."""
    session = onnxruntime.InferenceSession(model(build, m), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])


def linear_part(build: Build, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The map as a matrix and an offset; small whole numbers, so that the runtime gives them exactly."""
    size = int(np.prod(SHAPE))
    units = np.concatenate([np.zeros((1, size)), np.eye(size)]).reshape(size + 1, *SHAPE)
    images = run(build, m, units)
    return (images[1:] - images[0]).T, images[0]


def true_norm(build: Build, m: int) -> float:
    return float(np.linalg.norm(linear_part(build, m)[0], 2))


def to_shape(*shape: int) -> Build:
    return lambda b, x: b.one("Expand", x, b.constant(np.array(shape)))


def tiled(*repeats: int) -> Build:
    return lambda b, x: b.one("Tile", x, b.constant(np.array(repeats)))


def chosen(mask: object, other: Callable[[GraphBuilder, str], str], first: bool = True) -> Build:
    def build(b: GraphBuilder, x: str) -> str:
        branches = [x, other(b, x)] if first else [other(b, x), x]
        return b.one("Where", b.constant(np.array(mask, dtype=bool)), *branches)

    return build


def numbers(value: object) -> Build:
    return lambda b, x: b.constant(np.array(value, dtype=np.float64))


def padded(*pads: int, value: float | None = None, mode: str = "constant") -> Build:
    def build(b: GraphBuilder, x: str) -> str:
        operands = [x, b.constant(np.array(pads))]
        if value is not None:
            operands.append(b.constant(np.array(value)))
        return b.one("Pad", *operands, mode=mode)

    return build


def stacked(*constants: object, axis: int, before: bool = False) -> Build:
    def build(b: GraphBuilder, x: str) -> str:
        beside = [b.constant(np.array(constant, dtype=np.float64)) for constant in constants]
        return b.one("Concat", *([*beside, x] if before else [x, *beside]), axis=axis)

    return build


def doubled(b: GraphBuilder, x: str) -> str:
    return b.one("Mul", x, b.constant(np.array(2.0)))


MASK = [[[1], [0], [1]]]
EXACT = [
    (to_shape(1, 1, 3, 4), 12),
    (to_shape(2, 3, 4), 24),
    (to_shape(1), 3),
    (tiled(1, 2, 1, 3), 18),
    (tiled(1, 1, 1, 1), 3),
    (chosen(MASK, numbers(0.0)), 3),
    (chosen(MASK, numbers([[[5.0], [-2.0], [1.0]]])), 3),
    (chosen(MASK, numbers([[[[5.0], [-2.0], [1.0]]]]), first=False), 3),
    (chosen([True, False, True, True], numbers(0.0)), 12),
    (chosen(MASK, lambda b, x: b.one("Transpose", x, perm=[0, 1, 3, 2])), 9),
    (chosen(MASK, doubled), 3),
    (chosen(MASK, lambda b, x: b.one("Pad", x, b.constant(np.array([0, 0, 0, 0, 0, 0, 0, 2])))), 9),
    (padded(0, 0, 1, 1, 0, 0, 1, 1, value=0.5), 15),
    (padded(0, 1, 0, 0, 0, 0, 2, 0, value=-3.0), 10),
    (padded(0, 0, 0, 0, 0, 0, 1, 0, value=0.0), 4),
    (lambda b, x: padded(0, 0, 0, 1, 0, 0, 0, 0, value=2.0)(b, padded(0, 0, 0, 1, 0, 0, 0, 0)(b, x)), 9),
    (lambda b, x: padded(0, 0, 1, 0, 0, 0, 0, 0, value=2.0)(b, doubled(b, x)), 4),
    (lambda b, x: padded(0, 0, 1, 0, 0, 0, 0, 0, value=2.0)(b, tiled(1, 1, 1, 2)(b, x)), 8),
    (stacked([[[[5.0], [1.0], [-2.0]], [[0.0], [3.0], [0.5]]]], axis=1), 9),
    (stacked([[[[5.0], [-2.0]]]], [[[[0.25]]]], axis=2, before=True), 6),
    (stacked([[[[0.0], [0.0], [0.0]]]], axis=3), 6),
    (lambda b, x: stacked([[[[0.5]]]], axis=-2)(b, b.one("Concat", x, doubled(b, x), axis=2)), 7),
]


@pytest.mark.parametrize(("build", "m"), EXACT)
def test_bounds_hold_and_nothing_is_computed(build: Build, m: int) -> None:
    certificate = certified(build, m)
    matrix, offset = linear_part(build, m)
    true = np.linalg.norm(matrix, 2)
    # Two branches that are computed apart add in squares.
    assert true * (1 - 1e-14) <= certificate.lipschitz_bound <= true * np.sqrt(2.0) * (1 + 1e-12)
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE)
    computed = run(build, m, (pixels / 255)[None])[0]
    for row, constant, result in zip(matrix, offset, computed, strict=True):
        products = (Fraction(w) * Fraction(int(p), 255) for w, p in zip(row, pixels.ravel(), strict=True))
        exact = sum(products, Fraction(constant))
        assert abs(Fraction(result) - exact) <= Fraction(certificate.logit_error)
    # Doubling is charged with a rounding; otherwise no result is off by more than its pixel.
    assert certificate.logit_error <= 2.0**-50


@pytest.mark.parametrize(("build", "m"), [*EXACT[:5], EXACT[5], EXACT[8], EXACT[9]])
def test_rearrangements_of_one_tensor_cost_exactly_what_they_repeat(build: Build, m: int) -> None:
    assert certified(build, m).lipschitz_bound == pytest.approx(true_norm(build, m), rel=1e-12)


FRAMES = [
    (padded(0, 0, 1, 1, 0, 0, 1, 1, value=1e6), 15),
    (padded(0, 0, 2, 0, 0, 0, 0, 0, value=1 / 3), 5),
    (stacked([[[[1e6], [-1e6]]]], axis=2), 5),
    (stacked([[[[0.1]]]], [[[[0.0]]]], axis=2, before=True), 5),
]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("frame", "n"), FRAMES)
def test_constants_beside_a_tensor_are_paid_for_in_the_error_and_not_in_the_bound(
    frame: Build, n: int, dtype: type
) -> None:
    # Products with huge constants round by far more than products with pixels.
    weight = np.random.default_rng(3).standard_normal((4, n)).astype(np.float32)
    b = GraphBuilder(np.random.default_rng(0), dtype)
    flat = b.one("Flatten", frame(b, "image"), axis=1)
    model_bytes = b.model(SHAPE, b.one("Gemm", flat, b.constant(weight), transB=1), 4, batch=1)
    certificate = certify(model_bytes)
    offset, *images = (run_model(model_bytes, image[None]) for image in units(dtype))
    true = np.linalg.norm(np.array(images, dtype=np.float64) - offset, 2)
    slack = 4.0 * certificate.logit_error
    assert true - slack <= certificate.lipschitz_bound <= true * (1.0 + 1e-6) + slack
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, SHAPE)
        computed = run_model(model_bytes, (pixels / 255).astype(dtype)[None])
        exact = exact_logits(model_bytes, np.vectorize(lambda p: Fraction(int(p), 255), otypes=[object])(pixels))
        for one, other in zip(computed, exact, strict=True):
            assert abs(Fraction(float(one)) - other) <= Fraction(certificate.logit_error)


def units(dtype: type) -> np.ndarray:
    """The black image, and images of one white pixel."""
    size = int(np.prod(SHAPE))
    return np.concatenate([np.zeros((1, size)), np.eye(size)]).reshape(-1, *SHAPE).astype(dtype)


def run_model(model_bytes: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model_bytes, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images})[0][0]


def test_a_step_behind_a_frame_sees_the_tensor_and_not_the_frame() -> None:
    # The weights of the frame are large, those of the pixels small.
    weight = np.array([[100.0], [1.0], [2.0], [2.0], [100.0]])

    def behind(frame: Build) -> Build:
        return lambda b, x: b.one("MatMul", b.one("Flatten", frame(b, x), axis=1), b.constant(weight))

    for frame in (padded(0, 0, 1, 0, 0, 0, 1, 0, value=0.5), both_ends):
        certificate = certify(GraphBuilder.model(*built(behind(frame)), 1, batch=1))
        assert 3.0 <= certificate.lipschitz_bound <= 3.0 * (1.0 + 1e-9)


def both_ends(b: GraphBuilder, x: str) -> str:
    end = b.constant(np.full((1, 1, 1, 1), 0.5))
    return b.one("Concat", end, x, end, axis=2)


def built(build: Build) -> tuple[GraphBuilder, tuple[int, ...], str]:
    b = GraphBuilder(np.random.default_rng(0))
    return b, SHAPE, build(b, "image")


def test_a_convolution_behind_a_frame_is_bounded_as_behind_zeros() -> None:
    kernel = np.random.default_rng(1).standard_normal((2, 1, 2, 2))

    def behind(value: float) -> Build:
        frame = padded(0, 0, 1, 1, 0, 0, 1, 1, value=value)
        return lambda b, x: b.one("Conv", frame(b, x), b.constant(kernel))

    of_zeros, of_halves = (certified(behind(value), 16) for value in (0.0, 0.5))
    assert of_halves.lipschitz_bound <= of_zeros.lipschitz_bound * (1.0 + 1e-9)
    # ONNX Runtime has no convolution in float64.
    values = Program.parse(model(behind(0.5), 16)).evaluate(units(np.float64), FLOATS)["logits"]
    assert np.linalg.norm(values[1:] - values[0], 2) <= of_halves.lipschitz_bound * (1.0 + 1e-12)


def test_a_constant_that_is_the_same_for_every_image_of_a_fixed_batch_may_be_stacked() -> None:
    same = stacked(np.full((4, 1, 1, 1), 0.5), axis=2)
    assert certified(same, 4, batch=4).lipschitz_bound == 1.0


def test_choosing_between_a_tensor_and_itself_is_the_identity() -> None:
    assert certified(chosen(MASK, lambda b, x: x), 3).lipschitz_bound == 1.0


def test_what_a_mask_leaves_out_costs_nothing() -> None:
    def steep(b: GraphBuilder, x: str) -> str:
        return b.one("Mul", x, b.constant(np.array([[[1.0], [3.0], [100.0]]])))

    # Only the part that is taken of the steep branch: it counts with the bound of its tensor.
    assert certified(chosen([[[1], [1], [1]]], steep), 3).lipschitz_bound == 1.0


def test_a_shape_may_be_put_together_from_the_batch_size() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        batch = b.one("Gather", b.one("Shape", x), b.constant(np.array([0])), axis=0)
        return b.one("Expand", x, b.one("Concat", batch, b.constant(np.array([1, 3, 2])), axis=0))

    assert certified(build, 6).lipschitz_bound == pytest.approx(np.sqrt(2.0))


def batch_as_width(b: GraphBuilder, x: str) -> str:
    batch = b.one("Gather", b.one("Shape", x), b.constant(np.array([0])), axis=0)
    return b.one("Expand", x, b.one("Concat", b.constant(np.array([1, 1, 3])), batch, axis=0))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (to_shape(2, 1, 3, 1), "batch axis"),
        (to_shape(7919, 1, 3, 1), "batch axis"),
        (to_shape(1, 1, 1, 3, 1), "before the batch"),
        (to_shape(1, 1, 2, 1), "do not broadcast"),
        (batch_as_width, "batch size"),
        (tiled(2, 1, 1, 1), "batch axis"),
        (stacked([[[[1.0]]], [[[2.0]]]], axis=2), "batch axis"),
        (stacked([[[1.0]]], axis=1), "3 axes beside tensors of 4"),
        (stacked([[[[1.0]]]], axis=0), "batch axis"),
        (stacked([[[[1.0, 2.0]]]], axis=2), "do not fit"),
        (padded(1, 0, 0, 0, 0, 0, 0, 0, value=0.5), "batch axis"),
        (padded(0, 0, 1, 0, 0, 0, -1, 0, value=0.5), "negative pads"),
        (lambda b, x: b.one("Pad", x, b.constant(np.zeros(8, np.int64)), x), "constant"),
        (lambda b, x: b.one("Pad", x, b.constant(np.ones(4, np.int64)), "", b.constant(np.array([2, -2]))), "twice"),
        (tiled(1, 0, 1, 1), "do not fit"),
        (tiled(1, 2), "do not fit"),
        (chosen([MASK, MASK], numbers(0.0)), "batch axis"),
        (chosen(MASK, numbers(np.zeros((2, 1, 3, 1)))), "batch axis"),
        (chosen(MASK, lambda b, x: b.one("Flatten", x, axis=1)), "different ranks"),
        (lambda b, x: b.one("Where", b.one("Cast", x, to=TensorProto.BOOL), x, x), "cast"),
        (lambda b, x: b.one("Where", x, b.constant(np.zeros(3)), b.constant(np.ones(3))), "jumps"),
    ],
)
def test_what_has_no_proof_is_refused(build: Build, expected: str) -> None:
    with pytest.raises(UnsupportedModelError, match=expected):
        certified(build, 3)


def test_a_fixed_batch_may_be_named() -> None:
    assert certified(to_shape(4, 1, 3, 2), 6, batch=4).lipschitz_bound == pytest.approx(np.sqrt(2.0))
