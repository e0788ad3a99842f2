"""Products of two tensors: sharp constants of activations that are written out, against balls; and general products."""

import math
from collections.abc import Callable

import flint
import numpy as np
import onnx
import pytest
from flint import arb
from graph_builder import GraphBuilder
from graph_checks import run
from onnx.reference import ReferenceEvaluator
from random_graphs import Graph

from service.certificate import Certificate, UnsupportedModelError, certify
from service.certificate.formulas import IDENTITY, Formula, compose, constant, slope_bound, value_bound
from service.network.reader import read
from service.network.writer import write

flint.ctx.prec = 200
Build = Callable[[GraphBuilder, str], str]
SCALE = 12.0
ROOT = math.sqrt(2.0)


def number(b: GraphBuilder, value: float) -> str:
    return b.constant(np.array(value))


def written_silu(b: GraphBuilder, x: str) -> str:
    return b.one("Mul", x, b.one("Sigmoid", x))


def written_gelu(b: GraphBuilder, x: str) -> str:
    inner = b.one("Erf", b.one("Div", x, number(b, ROOT)))
    return b.one("Mul", b.one("Mul", x, b.one("Add", inner, number(b, 1.0))), number(b, 0.5))


def written_tanh_gelu(b: GraphBuilder, x: str) -> str:
    cube = b.one("Mul", number(b, 0.044715), b.one("Pow", x, number(b, 3.0)))
    inner = b.one("Tanh", b.one("Mul", number(b, math.sqrt(2.0 / math.pi)), b.one("Add", x, cube)))
    return b.one("Mul", number(b, 0.5), b.one("Mul", x, b.one("Add", number(b, 1.0), inner)))


def written_mish(b: GraphBuilder, x: str) -> str:
    return b.one("Mul", x, b.one("Tanh", b.one("Softplus", x)))


def written_hard_swish(b: GraphBuilder, x: str) -> str:
    sixth = b.one("Clip", b.one("Add", x, number(b, 3.0)), number(b, 0.0), number(b, 6.0))
    return b.one("Div", b.one("Mul", x, sixth), number(b, 6.0))


def sigmoid(x: arb) -> arb:
    return 1 / (1 + (-x).exp())


def gelu(x: arb) -> arb:
    return x / 2 * (1 + (x / arb(2).sqrt()).erf())


def tanh_gelu(x: arb) -> arb:
    return x / 2 * (1 + ((2 / arb.pi()).sqrt() * (x + arb("0.044715") * x**3)).tanh())


def mish(x: arb) -> arb:
    return x * (1 + x.exp()).log().tanh()


def hard_swish(x: arb) -> arb:
    return arb(0) if x < -3 else x if x > 3 else x * (x + 3) / 6


# As written out; by the operator, where there is one; its exact value; its largest slope, and where.
ACTIVATIONS: dict[str, tuple[Build, Build | None, Callable[[arb], arb], float, float]] = {
    "silu": (written_silu, lambda b, x: b.one("Swish", x), lambda x: x * sigmoid(x), 1.0998393, 2.3994),
    "gelu": (written_gelu, lambda b, x: b.one("Gelu", x), gelu, 1.1289042, ROOT),
    "tanh": (written_tanh_gelu, lambda b, x: b.one("Gelu", x, approximate="tanh"), tanh_gelu, 1.1289941, 1.4213),
    "mish": (written_mish, lambda b, x: b.one("Mish", x), mish, 1.0884981, 1.4907),
    "hard": (written_hard_swish, None, hard_swish, 1.5, 3.0 - 1e-8),
}


def spread(build: Build, dtype: type = np.float64, opset: int = 24, n: int = 3) -> bytes:
    """The activation of `12 x - 6`."""
    b = GraphBuilder(np.random.default_rng(0), dtype, opset=opset)
    x = b.one("Sub", b.one("Mul", "image", number(b, SCALE)), number(b, SCALE / 2.0))
    return b.model((n,), build(b, x), n)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_activations_written_out_have_their_sharp_constants(name: str, dtype: type) -> None:
    written, whole, exact, slope, where = ACTIVATIONS[name]
    step = arb(2) ** -60
    reached = float(((exact(arb(where) + step) - exact(arb(where) - step)) / (2 * step)).lower())
    assert reached == pytest.approx(slope, abs=1e-5)
    for build in (written, whole):
        if build is not None:
            bound = certify(spread(build, dtype)).lipschitz_bound / SCALE
            assert reached <= bound <= reached * 1.0002


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_computed_activations_are_within_the_proved_error(name: str) -> None:
    written, whole, exact, *_ = ACTIVATIONS[name]
    pixels = np.arange(256.0).reshape(-1, 1) / 255.0
    for build in (written, whole):
        if build is None:
            continue
        content = write(read(spread(build, np.float32, n=1)))
        graph = Graph(content, (1,), np.float32, ())
        (computed,) = run(graph, ["logits"], pixels)
        error = certify(content).logit_error
        for value, pixel in zip(computed[:, 0], range(256), strict=True):
            z = SCALE * (arb(pixel) / 255) - arb(SCALE / 2.0)
            assert abs(arb(float(value)) - exact(z)) <= error


@pytest.mark.parametrize("name", ["silu", "gelu", "tanh", "mish"])
def test_composite_activations_are_read_as_their_definition(name: str) -> None:
    _, whole, *_ = ACTIVATIONS[name]
    assert whole is not None
    content = spread(whole)
    kinds = {operator.kind for operator in read(content).operators}
    assert kinds <= {"Mul", "Sub", "Add", "Erf", "Tanh", "Sigmoid", "Softplus"}
    image = np.random.default_rng(0).random((5, 3))
    values = [
        ReferenceEvaluator(onnx.load_from_string(one)).run(None, {"image": image})[0]
        for one in (content, write(read(content)))
    ]
    np.testing.assert_allclose(*values, rtol=1e-6, atol=1e-6)


def certified(build: Build, shape: tuple[int, ...], n: int) -> Certificate:
    b = GraphBuilder(np.random.default_rng(0), np.float64)
    return certify(b.model(shape, build(b, "image"), n))


def test_a_gate_of_channels_counts_by_the_largest_factors() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        gate = b.one("Sigmoid", b.one("GlobalAveragePool", x))
        return b.one("Flatten", b.one("Mul", x, gate), axis=1)

    bound = certified(build, (2, 3, 3), 18).lipschitz_bound
    # |gate| <= 1 and |x| is at most 1/2 + sqrt(18) / 2; a mean of nine over nine elements is 1-Lipschitz.
    assert 1.0 <= bound <= 1.0 + 0.25 * (0.5 + math.sqrt(18.0) / 2.0) + 1e-9


def test_a_product_of_unrelated_tensors_is_bounded_by_both() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        return b.one("Mul", x, b.one("Gather", x, b.constant(np.array([1, 0])), axis=1))

    # x_0 x_1 twice, at (1, 1) of slope sqrt(2) sqrt(2).
    assert certified(build, (2,), 2).lipschitz_bound >= 2.0


def test_a_quotient_of_tensors_and_a_product_that_may_overflow_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="quotient"):
        certified(lambda b, x: b.one("Div", x, b.one("Sigmoid", x)), (2,), 2)

    def huge(b: GraphBuilder, x: str) -> str:
        return written_silu(b, b.one("Mul", b.one("Mul", x, number(b, 1e160)), b.one("Mul", x, number(b, 1e160))))

    with pytest.raises(UnsupportedModelError, match="overflow"):
        certified(huge, (2,), 2)


# --- formulas ---------------------------------------------------------------------------------------------------------


def of(kind: str, *operands: Formula, numbers: tuple[float, ...] = ()) -> Formula:
    formula = compose(kind, *operands, numbers=numbers)
    assert formula is not None
    return formula


X = IDENTITY
EXACT: dict[str, tuple[Formula, Callable[[arb], arb], Callable[[arb], arb]]] = {
    "Sigmoid": (of("Sigmoid", X), sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    "Tanh": (of("Tanh", X), lambda x: x.tanh(), lambda x: 1 / x.cosh() ** 2),
    "Erf": (of("Erf", X), lambda x: x.erf(), lambda x: 2 / arb.pi().sqrt() * (-x * x).exp()),
    "Softplus": (of("Softplus", X), lambda x: x.exp().log1p(), sigmoid),
    "third": (of("Div", X, numbers=(-3.0,)), lambda x: x / -3, lambda x: arb(-1) / 3),
    "square": (of("product", X, X), lambda x: x * x, lambda x: 2 * x),
    "shifted": (
        of("sum", of("Mul", X, numbers=(0.1,)), constant(1.0)),
        lambda x: arb(0.1) * x + 1,
        lambda x: arb(0.1),
    ),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("width", [0.0, 1e-9, 0.3, 4.0])
def test_bounds_of_formulas_are_never_below_exact_values(name: str, width: float) -> None:
    formula, value, slope = EXACT[name]
    for middle in (-700.0, -26.0, -6.0, -0.1, 0.0, 1e-9, 2.0, 19.0, 400.0):
        low, high = middle - width, middle + width
        slopes, values = slope_bound(formula, low, high), value_bound(formula, low, high)
        for point in np.linspace(low, high, 7):
            assert abs(slope(arb(float(point)))).lower() <= slopes
            assert abs(value(arb(float(point)))).lower() <= values


def test_a_function_of_too_many_parts_is_no_formula() -> None:
    formula: Formula | None = X
    for _ in range(6):
        formula = None if formula is None else compose("product", formula, formula)
    assert formula is None
    assert slope_bound(of("product", X, X), -math.inf, 1.0) == math.inf
