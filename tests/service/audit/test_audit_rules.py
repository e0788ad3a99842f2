"""Rules for functions that bend: bounds never below what exact arithmetic does, and sharp where exporters need it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from audit_cases import derived
from audit_checks import contradictions
from flint import arb, ctx
from graph_builder import GraphBuilder
from thorough import often

from service.audit.balls import NotAuditableError
from service.audit.expressions import (
    ARGUMENT,
    Elementary,
    Expression,
    clip,
    compose,
    erf,
    largest_slope,
    largest_value,
    number,
    scaled,
    sigmoid,
    softplus,
    tanh,
)
from service.audit.operators import RULES
from service.certificate import certify
from service.network.reader import read
from service.network.writer import write

BENT = (
    *("activation", "gated", "along_axis", "parts", "roots", "strange_squares", "gradient_step", "centre", "dense"),
    *("gradient_step_of_convolutions", "log_probabilities", "residual", "branches", "square_dense", "move", "number"),
)
"""Steps of random graphs with operators that bend, and some between them."""


@pytest.mark.parametrize("first", range(0, often(40, 400), 20))
def test_no_random_graph_contradicts_its_derivation(first: int) -> None:
    found = {seed: contradictions(seed, BENT) for seed in range(first, first + 20)}
    assert not {seed: lines for seed, lines in found.items() if lines}
    assert sum(lines is not None for lines in found.values()) > 8


@pytest.mark.parametrize("step", ["activation", "gated", "along_axis", "parts", "roots", "gradient_step", "pairs"])
def test_no_single_step_contradicts_its_derivation(step: str) -> None:
    found = [contradictions(seed, (step,), 1) for seed in range(5000, 5000 + often(12, 60))]
    assert not any(found)
    assert sum(lines is not None for lines in found) > len(found) // 3


# --- functions of one number ------------------------------------------------------------------------------------------


def outer(function: Elementary, inner: Expression | None = ARGUMENT) -> Expression | None:
    return compose("outer", inner, outer=function)


def product(left: Expression | None, right: Expression | None) -> Expression | None:
    return compose("product", left, right)


def gelu() -> Expression | None:
    whole = compose("sum", number(arb(1)), outer(erf, scaled(1 / arb(2).sqrt(), ARGUMENT)))
    return product(scaled(arb("0.5"), ARGUMENT), whole)


FUNCTIONS: dict[str, tuple[Callable[[], Expression | None], Callable[[float], float], float]] = {
    "SiLU": (lambda: product(ARGUMENT, outer(sigmoid)), lambda x: x / (1 + math.exp(-x)), 1.0998394),
    "GELU": (gelu, lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2, 1.1289042),
    "Mish": (
        lambda: product(ARGUMENT, outer(tanh, outer(softplus))),
        lambda x: x * math.tanh(math.log1p(math.exp(x))),
        1.0884981,
    ),
    "HardSwish": (
        lambda: product(
            ARGUMENT,
            outer(clip(arb(0), arb(1)), compose("sum", scaled(arb(1) / 6, ARGUMENT), number(arb("0.5")))),
        ),
        lambda x: x * min(max(x / 6 + 0.5, 0.0), 1.0),
        1.5,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_largest_slope_of_a_function_is_sharp(name: str) -> None:
    ctx.prec = 192
    build, _, supremum = FUNCTIONS[name]
    expression = build()
    assert expression is not None
    assert supremum <= float(largest_slope(expression, arb(-9), arb(9))) <= supremum * (1 + 1e-5)
    assert ctx.prec == 192


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", range(6))
def test_no_secant_and_no_value_on_an_interval_is_above_its_bound(name: str, seed: int) -> None:
    build, function, _ = FUNCTIONS[name]
    expression = build()
    assert expression is not None
    random = np.random.default_rng(seed)
    low, high = np.sort(random.normal(size=2) * 4.0)
    points = np.linspace(low, high, 400)
    values = np.array([function(x) for x in points])
    slope, value = (float(bound(expression, arb(low), arb(high))) for bound in (largest_slope, largest_value))
    secants = np.abs(np.diff(values) / np.diff(points))
    assert secants.max() <= slope * (1 + 1e-9)
    assert slope <= secants.max() * 1.02 + 1e-4
    assert np.abs(values).max() <= value * (1 + 1e-12)
    assert value <= np.abs(values).max() * 1.001 + 1e-9


def test_a_function_of_many_parts_is_not_followed() -> None:
    f: Expression | None = ARGUMENT
    for _ in range(100):
        f = product(f, ARGUMENT)
    assert f is None


# --- sharpness --------------------------------------------------------------------------------------------------------


def model_of(build: Callable[[GraphBuilder, str], str], dtype: type, outputs: int) -> bytes:
    """Two dense layers with an activation between them, as they would be served."""
    random = np.random.default_rng(3)
    b = GraphBuilder(random, dtype)
    x = b.one("Gemm", "image", b.constant(random.normal(size=(6, 8))), b.constant(random.normal(size=8)))
    x = b.one("Gemm", build(b, x), b.constant(random.normal(size=(outputs, 4))), b.constant(random.normal(size=4)))
    return write(read(b.model((6,), x, 4)))


def scalar(b: GraphBuilder, value: float) -> str:
    return b.constant(np.array(value))


def written_gelu(b: GraphBuilder, x: str) -> str:
    inner = b.one("Erf", b.one("Div", x, scalar(b, math.sqrt(2.0))))
    return b.one("Mul", b.one("Mul", x, b.one("Add", inner, scalar(b, 1.0))), scalar(b, 0.5))


def written_huber(b: GraphBuilder, x: str) -> str:
    root = b.one("Sqrt", b.one("Add", b.one("Pow", x, scalar(b, 2.0)), scalar(b, 1.0)))
    return b.one("Sub", root, scalar(b, 1.0))


ACTIVATIONS: dict[str, Callable[[GraphBuilder, str], str]] = {
    **{
        name: lambda b, x, name=name: b.one(name, x)
        for name in (
            *("Celu", "Elu", "Erf", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus"),
            *("Softsign", "Tanh", "Mish"),
        )
    },
    "Softmax": lambda b, x: b.one("Softmax", x, axis=1),
    "SiLU": lambda b, x: b.one("Mul", x, b.one("Sigmoid", x)),
    "GELU": written_gelu,
    "Huber": written_huber,
    "parts": lambda b, x: b.one("Concat", b.one("Relu", x), b.one("Relu", b.one("Neg", x)), axis=1),
    "gate": lambda b, x: b.one("Mul", *b.add("Split", x, b.constant(np.array([4, 4])), outputs=2, axis=1)),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_bounds_of_an_activation_are_no_wider_than_those_of_the_server(name: str, dtype: type) -> None:
    model = model_of(ACTIVATIONS[name], dtype, {"parts": 16, "gate": 4}.get(name, 8))
    certificate, derivation = certify(model), derived(model, np.arange(6) * 40)
    assert float(derivation.logit_error) <= certificate.logit_error
    ours = np.array([[float(bound) for bound in row] for row in derivation.margin_bounds])
    assert (ours <= certificate.margin_bounds_KK * (1 + 1e-12)).all()


def residual(b: GraphBuilder, x: str, branch: Callable[[str], str]) -> str:
    """Return `x + W branch(V x)` of eight numbers."""
    inner = branch(b.one("Gemm", x, b.constant(b.rng.normal(size=(8, 8)) / 3)))
    return b.one("Add", x, b.one("Gemm", inner, b.constant(b.rng.normal(size=(8, 8)) / 3)))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("end", ["Gemm", "Relu", "LogSoftmax"])
def test_linear_maps_behind_a_residual_are_bounded_branch_by_branch(end: str, dtype: type) -> None:
    b = GraphBuilder(np.random.default_rng(3), dtype)
    x = residual(b, residual(b, "image", lambda y: b.one("Relu", y)), lambda y: b.one("Mul", y, b.one("Sigmoid", y)))
    x = b.one("Gemm", x, b.constant(b.rng.normal(size=(8, 8)) / 3))
    x = x if end == "Gemm" else b.one(end, x)
    model = write(read(b.model((8,), b.one("Gemm", x, b.constant(b.rng.normal(size=(8, 4)))), 4)))
    certificate, derivation = certify(model), derived(model, np.arange(8) * 30)
    assert float(derivation.logit_error) <= certificate.logit_error
    ours = np.array([[float(bound) for bound in row] for row in derivation.margin_bounds])
    assert (ours <= certificate.margin_bounds_KK * (1 + 1e-12)).all()


def test_a_log_softmax_at_the_end_costs_the_margins_nothing() -> None:
    plain = derived(model_of(lambda b, x: x, np.float64, 8), np.arange(6) * 40)
    b = GraphBuilder(np.random.default_rng(3))
    x = b.one("Gemm", "image", b.constant(b.rng.normal(size=(6, 8))), b.constant(b.rng.normal(size=8)))
    x = b.one("Gemm", x, b.constant(b.rng.normal(size=(8, 4))), b.constant(b.rng.normal(size=4)))
    normalised = derived(b.model((6,), b.one("LogSoftmax", x, axis=1), 4), np.arange(6) * 40)
    for ours, others in zip(normalised.margin_bounds, plain.margin_bounds, strict=True):
        assert [float(bound) for bound in ours] == pytest.approx([float(bound) for bound in others], rel=1e-12)
    assert abs(sum((one.exp() for one in normalised.logits[0]), arb(0)) - 1) < arb(1e-40)


# --- what is refused --------------------------------------------------------------------------------------------------


def square(b: GraphBuilder, x: str = "image") -> str:
    return b.one("Mul", x, x)


REFUSED_ROOTS: dict[str, Callable[[GraphBuilder], str]] = {
    "of a difference of squares": lambda b: b.one("Sqrt", b.one("Sub", square(b), square(b, b.one("Relu", "image")))),
    "less a constant": lambda b: b.one("Sqrt", b.one("Sub", square(b), scalar(b, 1e-9))),
    "of squares times a negative number": lambda b: b.one("Sqrt", b.one("Mul", square(b), scalar(b, -1.0))),
    "of a product of two tensors": lambda b: b.one("Sqrt", b.one("Mul", "image", b.one("Relu", "image"))),
    "of a fourth power": lambda b: b.one("Pow", b.one("Mul", square(b), square(b)), scalar(b, 0.5)),
    "of a root": lambda b: b.one("Sqrt", b.one("Sqrt", square(b))),
    "of a number that is not negative": lambda b: b.one("Sqrt", b.one("Relu", "image")),
    "of signs": lambda b: b.one("Sqrt", b.one("Sign", square(b))),
    "with the sign of another sum": lambda b: b.one("Mul", b.one("Sign", square(b)), b.one("Relu", "image")),
    "normalised squares": lambda b: b.one(
        "Sqrt", b.one("BatchNormalization", square(b), *(b.constant(np.full(3, v)) for v in (1.0, 1.0, 0.5, 1.0)))
    ),
}


@pytest.mark.parametrize("name", REFUSED_ROOTS)
def test_what_only_looks_like_a_root_of_squares_is_refused(name: str) -> None:
    b = GraphBuilder(np.random.default_rng(0))
    x = REFUSED_ROOTS[name](b)
    with pytest.raises(NotAuditableError, match=r"no Lipschitz constant|jumps"):
        derived(b.model((3,), x, 3), np.array([1, 2, 3]))


@pytest.mark.parametrize(
    ("operator", "attributes", "reason"),
    [("Celu", {"alpha": -1.0}, "alpha must be positive"), ("Softplus", {}, "exp.x. may overflow: x may exceed 700")],
)
def test_an_activation_outside_of_its_theorem_is_refused(operator: str, attributes: Any, reason: str) -> None:
    b = GraphBuilder(np.random.default_rng(0))
    x = b.one(operator, b.one("Mul", "image", scalar(b, 1e4)), **attributes)
    with pytest.raises(NotAuditableError, match=reason):
        derived(b.model((3,), x, 3), np.array([1, 2, 3]))


def test_every_smooth_activation_has_a_rule() -> None:
    assert {"Celu", "Elu", "Erf", "LogSoftmax", "Selu", "Softmax", "Softplus", "Softsign", "Tanh"} <= RULES.keys()
