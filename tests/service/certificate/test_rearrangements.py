"""Expand, Tile and Where: exact, as long as what they repeat, and refusals."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto
from random_graphs import GraphBuilder

from service.certificate import Certificate, UnsupportedGraphError, certify

SHAPE = (1, 3, 1)
Build = Callable[[GraphBuilder, str], str]


def model(build: Build, m: int, batch: object = "N") -> bytes:
    b = GraphBuilder(np.random.default_rng(0))
    return b.model(SHAPE, b.one("Flatten", build(b, "image"), axis=1), m, batch=batch)


def certified(build: Build, m: int, batch: object = "N") -> Certificate:
    return certify(model(build, m, batch))


def run(build: Build, m: int, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(model(build, m), providers=["CPUExecutionProvider"]).run(
        None, {"image": images}
    )[0]


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
        (to_shape(1, 1, 2, 1), "do not fit"),
        (batch_as_width, "batch size"),
        (tiled(2, 1, 1, 1), "batch axis"),
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
    with pytest.raises(UnsupportedGraphError, match=expected):
        certified(build, 3)


def test_a_fixed_batch_may_be_named() -> None:
    assert certified(to_shape(4, 1, 3, 2), 6, batch=4).lipschitz_bound == pytest.approx(np.sqrt(2.0))
