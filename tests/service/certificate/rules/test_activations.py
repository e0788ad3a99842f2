"""Rules of transcendental activations: bounds and errors against ball arithmetic of 200 bits, and refusals.

A case is one operator, its attributes, and its exact value on a list of balls (`flint.arb`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import flint
import numpy as np
import onnx
import onnxruntime
import pytest
from flint import arb
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from random_graphs import GraphBuilder
from thorough import often

from service.certificate import Certificate, UnsupportedModelError, certify
from service.certificate.rules import activations as smooth_module

flint.ctx.prec = 200
Balls = list[arb]


@dataclass(frozen=True)
class Case:
    operator: str
    exact: Callable[[Balls], Balls]
    steepest: float = 0.0
    """Where one of its slopes is (nearly) its largest."""
    attributes: dict[str, float] = field(default_factory=dict)
    float64_kernel: bool = False
    """Whether ONNX Runtime computes it in float64 on the CPU."""

    def __str__(self) -> str:
        return " ".join([self.operator, *(f"{name}={value}" for name, value in self.attributes.items())])


def each(function: Callable[[arb], arb]) -> Callable[[Balls], Balls]:
    return lambda x: [function(value) for value in x]


def single(value: float) -> arb:
    """A float attribute as ONNX stores it."""
    return arb(float(np.float32(value)))


def elu(x: arb, alpha: arb) -> arb:
    return x if x >= 0 else alpha * x.expm1()


def clip01(x: arb) -> arb:
    return arb(0) if x <= 0 else arb(1) if x >= 1 else x


def log_sum_exp(x: Balls) -> arb:
    return sum((value.exp() for value in x), arb(0)).log()


def softmax(x: Balls) -> Balls:
    return [(value - log_sum_exp(x)).exp() for value in x]


def log_softmax(x: Balls) -> Balls:
    return [value - log_sum_exp(x) for value in x]


SELU_ALPHA, SELU_GAMMA = single(1.67326319217681884765625), single(1.05070102214813232421875)
CASES = [
    Case("Elu", each(lambda x: elu(x, arb(1))), 0.5),
    Case("Elu", each(lambda x: elu(x, arb(2.5))), -1e-9, {"alpha": 2.5}),
    Case("Elu", each(lambda x: elu(x, single(-0.3))), 0.5, {"alpha": -0.3}),
    Case("Selu", each(lambda x: SELU_GAMMA * elu(x, SELU_ALPHA)), -1e-9),
    Case("Selu", each(lambda x: arb(0.5) * elu(x, arb(3))), -1e-9, {"alpha": 3.0, "gamma": 0.5}),
    Case("Celu", each(lambda x: elu(x, arb(1))), 0.5),
    Case("Celu", each(lambda x: single(30.5) * elu(x / single(30.5), arb(1))), 0.5, {"alpha": 30.5}),
    Case("Celu", each(lambda x: single(0.1) * elu(x / single(0.1), arb(1))), 0.5, {"alpha": 0.1}),
    Case("Softplus", each(lambda x: x.exp().log1p()), 30.0),
    Case("Softsign", each(lambda x: x / (1 + abs(x)))),
    Case("Sigmoid", each(lambda x: 1 / (1 + (-x).exp())), float64_kernel=True),
    Case("Tanh", each(lambda x: x.tanh()), float64_kernel=True),
    Case("Erf", each(lambda x: x.erf())),
    Case("HardSigmoid", each(lambda x: clip01(single(0.2) * x + arb(0.5)))),
    Case("HardSigmoid", each(lambda x: clip01(arb(2) * x + arb(-7))), 3.75, {"alpha": 2.0, "beta": -7.0}),
    Case("HardSwish", each(lambda x: x * clip01(x / 6 + arb(0.5))), 3.0 - 1e-8),
    Case("Softmax", softmax, float64_kernel=True),
    Case("LogSoftmax", log_softmax, float64_kernel=True),
]


@dataclass(frozen=True)
class Network:
    """`x -> A f(B x + c)`, or without the last layer."""

    case: Case
    b_MN: np.ndarray
    c_M: np.ndarray
    a_KM: np.ndarray | None
    dtype: type

    def model(self) -> bytes:
        b = GraphBuilder(np.random.default_rng(0), self.dtype)
        hidden = b.one("Gemm", "image", b.constant(self.b_MN), b.constant(self.c_M), transB=1)
        x = b.one(self.case.operator, hidden, **self.case.attributes)
        size = len(self.c_M)
        if self.a_KM is not None:
            x, size = b.one("Gemm", x, b.constant(self.a_KM), transB=1), len(self.a_KM)
        return b.model((self.b_MN.shape[1],), x, size)

    def _stored(self, array: np.ndarray) -> list:
        return array.astype(self.dtype).astype(np.float64).tolist()

    def exact(self, image: Balls) -> Balls:
        def affine(rows: list, offset: list, x: Balls) -> Balls:
            products = (sum((arb(w) * v for w, v in zip(row, x, strict=True)), arb(0)) for row in rows)
            return [p + arb(o) for p, o in zip(products, offset, strict=True)]

        y = self.case.exact(affine(self._stored(self.b_MN), self._stored(self.c_M), image))
        return y if self.a_KM is None else affine(self._stored(self.a_KM), [0.0] * len(self.a_KM), y)


def random_network(case: Case, dtype: type, seed: int) -> Network:
    rng = np.random.default_rng(seed)
    k, m, n = (int(size) for size in rng.integers(1, 6, 3))
    scale = rng.choice([1e-3, 1.0, 10.0])
    last = rng.standard_normal((k, m)) if rng.integers(2) else None
    return Network(case, scale * rng.standard_normal((m, n)), scale * rng.standard_normal(m), last, dtype)


def run(network: Network, pixels_N: np.ndarray) -> np.ndarray:
    image = (pixels_N / 255).astype(network.dtype)[None]
    if network.dtype is np.float32 or network.case.float64_kernel:
        session = onnxruntime.InferenceSession(network.model(), providers=["CPUExecutionProvider"])
        return session.run(None, {"image": image})[0][0]
    # Another runtime: numpy's formulas, naive ones among them.
    return ReferenceEvaluator(onnx.load_model_from_string(network.model())).run(None, {"image": image})[0][0]


def worst_error(network: Network, pixels_N: np.ndarray) -> arb:
    exact = network.exact([arb(int(p)) / 255 for p in pixels_N])
    return max((abs(arb(float(c)) - e) for c, e in zip(run(network, pixels_N), exact, strict=True)), key=float)


def square_distance(x: Balls, y: Balls) -> arb:
    return sum(((a - b) ** 2 for a, b in zip(x, y, strict=True)), arb(0))


def quotient(network: Network, start_N: np.ndarray, direction_N: np.ndarray, step: float) -> float:
    """`||F(x + step d) - F(x)|| / ||step d||`: never above the Lipschitz constant."""
    start = [arb(float(v)) for v in start_N]
    moved = [s + arb(float(step * d)) for s, d in zip(start, direction_N, strict=True)]
    ratio = square_distance(network.exact(moved), network.exact(start)) / square_distance(moved, start)
    # Where the ball is too wide to tell it from zero, zero is a lower bound. Two roundings to float64.
    return float(np.sqrt(max(0.0, float(ratio.lower())))) * (1 - 2.0**-50)


# onnx's reference evaluator computes erf in float32 and ONNX Runtime has no float64 kernel: nothing to compare with.
RUNNABLE = [(c, t) for c in CASES for t in (np.float64, np.float32) if c.operator != "Erf" or t is np.float32]


@pytest.mark.parametrize(("case", "dtype"), RUNNABLE, ids=str)
@settings(max_examples=often(4, 12))
@given(seed=st.integers(0, 2**32 - 1))
def test_no_smooth_network_violates_its_bounds(case: Case, dtype: type, seed: int) -> None:
    network = random_network(case, dtype, seed)
    certificate = certify(network.model())
    rng = np.random.default_rng(seed)
    n = network.b_MN.shape[1]
    assert worst_error(network, rng.integers(0, 256, n)) <= arb(certificate.logit_error)
    for step in (1e-6, 0.3):
        start, direction = rng.uniform(0.2, 0.8, n), rng.standard_normal(n)
        direction /= np.linalg.norm(direction)
        assert quotient(network, start, direction, step) <= certificate.lipschitz_bound


def steepest_network(case: Case) -> tuple[Network, np.ndarray]:
    """One layer whose centre of the box is where the activation is steepest, and the direction that it is steep in."""
    if case.operator == "Softmax":
        return Network(case, np.eye(2), np.zeros(2), None, np.float64), np.array([1.0, -1.0])
    if case.operator == "LogSoftmax":
        # p at a corner: all mass on the first.
        return Network(case, np.eye(5), np.array([40.0, 0, 0, 0, 0]), None, np.float64), np.array([-4.0, 1, 1, 1, 1])
    return Network(case, np.eye(1), np.array([case.steepest - 0.5]), None, np.float64), np.ones(1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_slope_of_each_activation_is_reached_and_not_exceeded(case: Case) -> None:
    network, direction = steepest_network(case)
    n = len(direction)
    bound = certify(network.model()).lipschitz_bound
    reached = max(quotient(network, np.full(n, 0.5), direction, sign * 1e-10) for sign in (1.0, -1.0))
    if case.operator == "Elu" and case.attributes.get("alpha", 1.0) < 0:
        reached = max(reached, 1.0)
    assert bound * (1 - 1e-6) <= reached <= bound


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.operator in ("Sigmoid", "Softplus", "HardSigmoid")][:3], ids=str
)
def test_forgetting_the_inaccuracy_of_the_runtime_would_be_caught(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    b = GraphBuilder(np.random.default_rng(0), np.float32)
    model_bytes = b.model((256,), b.one(case.operator, "image", **case.attributes), 256)
    pixels = np.arange(256)
    session = onnxruntime.InferenceSession(model_bytes, providers=["CPUExecutionProvider"])
    computed = session.run(None, {"image": (pixels / 255).astype(np.float32)[None]})[0][0]
    exact = case.exact([arb(int(p)) / 255 for p in pixels])
    worst = max(float(abs(arb(float(c)) - e)) for c, e in zip(computed, exact, strict=True))
    assert worst <= certify(model_bytes).logit_error
    monkeypatch.setattr(smooth_module, "FUNCTION_ERROR", 0.0)
    assert worst > certify(model_bytes).logit_error


# --- LogSoftmax keeps differences -------------------------------------------------------------------------------------


def certified(build: Callable[[GraphBuilder, str], str], n: int, m: int, dtype: type = np.float64) -> Certificate:
    b = GraphBuilder(np.random.default_rng(0), dtype)
    return certify(b.model((n,), build(b, "image"), m))


def test_log_softmax_keeps_the_pairwise_bounds_of_the_logits() -> None:
    weight = np.random.default_rng(3).standard_normal((6, 4))
    plain = certified(lambda b, x: b.one("Gemm", x, b.constant(weight)), 6, 4)
    shifted = certified(lambda b, x: b.one("LogSoftmax", b.one("Gemm", x, b.constant(weight))), 6, 4)
    assert (shifted.margin_bounds_KK >= plain.margin_bounds_KK * (1 - 1e-15)).all()
    np.testing.assert_allclose(shifted.margin_bounds_KK, plain.margin_bounds_KK, rtol=1e-12)
    assert shifted.logit_error > plain.logit_error


def test_log_softmax_of_what_is_no_affine_layer_keeps_its_differences_too() -> None:
    shifted = certified(lambda b, x: b.one("LogSoftmax", b.one("Relu", x)), 6, 6)
    assert 2.0 <= shifted.margin_bounds_KK[0, 1] ** 2 < 2.0 * (1 + 1e-12)


def test_signs_after_log_softmax_leave_no_difference_that_cancels() -> None:
    # f_0 + f_1 = x_0 + x_1 - 2 log sum exp x, steeper than x_0 + x_1 where the third logit has all the mass.
    weight = np.array([[4.0, 4.0, 0.0], [0.0, 0.0, 4.0]])

    def build(b: GraphBuilder, x: str) -> str:
        z = b.one("Gemm", x, b.constant(weight), b.constant(np.array([0.0, 0.0, 30.0])))
        return b.one("Mul", b.one("LogSoftmax", z), b.constant(np.array([1.0, -1.0, 1.0])))

    # The gradient of f_0 + f_1 is then (8, -8).
    assert certified(build, 2, 3).margin_bounds_KK[0, 1] >= 8 * np.sqrt(2.0)


# --- PRelu: exact but for one rounding --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_prelu_is_bounded_by_its_largest_slope(dtype: type) -> None:
    slopes = np.array([0.25, -3.0, 0.7]).reshape(3, 1, 1)
    offset = np.array([-0.5, -0.9, 0.0]).reshape(3, 1, 1)
    b = GraphBuilder(np.random.default_rng(0), dtype)
    x = b.one("PRelu", b.one("Add", "image", b.constant(offset)), b.constant(slopes))
    model_bytes = b.model((3, 2, 2), b.one("Flatten", x, axis=1), 12)
    certificate = certify(model_bytes)
    assert 3.0 <= certificate.lipschitz_bound < 3.0 + 1e-12
    session = onnxruntime.InferenceSession(model_bytes, providers=["CPUExecutionProvider"])
    for seed in range(30):
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 2, 2))
        computed = session.run(None, {"image": (pixels / 255).astype(dtype)[None]})[0][0]
        for c, p, channel in zip(computed, pixels.ravel(), np.repeat(range(3), 4), strict=True):
            z = arb(int(p)) / 255 + arb(float(dtype(offset.ravel()[channel])))
            exact = z if z >= 0 else z * arb(float(dtype(slopes.ravel()[channel])))
            assert abs(arb(float(c)) - exact) <= arb(certificate.logit_error)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda b, x: b.one("ThresholdedRelu", x, alpha=0.5), "jumps"),
        (lambda b, x: b.one("Exp", x), "no proved rule"),
        (lambda b, x: b.one("Log", x), "no proved rule"),
        (lambda b, x: b.one("Celu", x, alpha=-1.0), "alpha must be positive"),
        (lambda b, x: b.one("Elu", x, alpha=float("nan")), "finite number"),
        (lambda b, x: b.one("Selu", x, gamma=float("inf")), "finite number"),
        (lambda b, x: b.one("Softmax", x, axis=0), "batch axis"),
        (lambda b, x: b.one("LogSoftmax", x, axis=0), "batch axis"),
        (lambda b, x: b.one("PRelu", x, x), "must be a constant"),
        (lambda b, x: b.one("PRelu", b.one("Gather", x, b.constant(np.array([0])), axis=1), b.constant(np.ones(4))),
         "broadcasts"),
        (lambda b, x: b.one("Softplus", b.one("Mul", x, b.constant(np.array(1e307)))), "overflow"),
        # ONNX Runtime computes log(1 + exp(x)) as it stands in float64: infinite at 710.
        (lambda b, x: b.one("Softplus", b.one("Mul", x, b.constant(np.array(800.0)))), "overflow"),
    ],
)  # fmt: skip
def test_what_has_no_bound_is_refused(build: Callable[[GraphBuilder, str], str], expected: str) -> None:
    with pytest.raises(UnsupportedModelError, match=expected):
        certified(build, 4, 4)


def test_a_sum_of_too_many_exponentials_is_refused() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        return b.one("Gather", b.one("Softmax", b.one("Pad", x, b.constant(np.array([0, 0, 0, 200_000])))), first(b))

    def first(b: GraphBuilder) -> str:
        return b.constant(np.array([0]))

    with pytest.raises(UnsupportedModelError, match="too long for float32"):
        certified(build, 4, 1, np.float32)
