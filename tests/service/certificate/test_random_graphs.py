"""The certifier against random graphs of all of its operators, and against graphs that once broke it.

Lipschitz bounds of the logits, of each margin and of every tensor inside are compared with Jacobians and secants,
rounding errors with exact arithmetic; see `graph_checks`. `make random-graphs` does the same for many more graphs.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from exact_graphs import BALLS, FLOATS, RATIONALS, Program, exact_logits
from graph_checks import Bounds, error_findings, lipschitz_findings, run, runnable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from random_graphs import ARITHMETIC, FREQUENT, JOINT, REARRANGED, STEPS, Graph, GraphBuilder, graphs, seeded_graph
from thorough import often

from service.certificate import UnsupportedModelError, certify
from service.certificate.rules.table import RULES

NEVER_CERTIFIED = {
    "Sqrt": "refused, but for sums of squares",
    "Sign": "refused, but as a factor of the sum of squares that it is the sign of: it jumps",
    "ThresholdedRelu": "always refused: it jumps",
}
many = settings(max_examples=often(15, 60), suppress_health_check=list(HealthCheck))
fewer = settings(max_examples=often(10, 25), suppress_health_check=list(HealthCheck))


def contradictions(graph: Graph) -> list[str]:
    """Findings against a certificate; empty where the graph is refused."""
    bounds = Bounds.of(graph.model)
    return [] if bounds is None else lipschitz_findings(graph, bounds)


def rounding_contradictions(graph: Graph) -> list[str]:
    graph = runnable(graph)
    bounds = Bounds.of(graph.model)
    return [] if bounds is None else error_findings(graph, bounds)


@many
@given(graphs())
def test_no_graph_is_steeper_than_its_lipschitz_bounds(graph: Graph) -> None:
    assert contradictions(graph) == []


@many
@given(graphs(JOINT, most=4))
def test_no_graph_of_linear_steps_taken_together_is_steeper_than_its_bounds(graph: Graph) -> None:
    assert contradictions(graph) == []


@many
@given(graphs(REARRANGED, most=4))
def test_no_graph_of_rearranged_elements_is_steeper_than_its_bounds(graph: Graph) -> None:
    assert contradictions(graph) == []


@pytest.mark.parametrize("step", STEPS)
@settings(max_examples=often(1, 4), suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_single_step_breaks_its_bounds(step: str, data: st.DataObject) -> None:
    graph = data.draw(graphs((step,), most=2))
    assert contradictions(graph) == []
    assert rounding_contradictions(graph) == []


@fewer
@given(graphs())
def test_no_computed_tensor_is_further_from_the_exact_one_than_its_error_bound(graph: Graph) -> None:
    assert rounding_contradictions(graph) == []


@fewer
@given(graphs(ARITHMETIC, most=4))
def test_no_arithmetic_rounds_more_than_its_error_bound(graph: Graph) -> None:
    assert rounding_contradictions(graph) == []


# --- the generator and the exact evaluation ---------------------------------------------------------------------------


def test_every_operator_with_a_rule_is_generated_and_certified() -> None:
    made: set[str] = set()
    for step in STEPS:
        for seed in range(150 if step in ("move", "pointwise", "activation") else 30):
            graph = seeded_graph(seed, (step,), most=1)
            if set(graph.operators) - made and Bounds.of(graph.model) is not None:
                made.update(graph.operators)
    assert set(RULES) - made <= set(NEVER_CERTIFIED)
    assert set(STEPS) <= set(FREQUENT)


@pytest.mark.parametrize("seed", range(often(10, 40)))
def test_the_exact_evaluations_agree_with_each_other_and_with_the_runtime(seed: int) -> None:
    graph = runnable(seeded_graph(seed))
    program = Program.parse(graph.model)
    image = np.random.default_rng(seed).integers(0, 5, (2, *graph.shape)) / 4
    approximate = program.evaluate(image, FLOATS)["logits"]
    balls = program.evaluate(image, BALLS)["logits"]
    bounds = Bounds.of(graph.model)
    if bounds is not None:
        # The search is in float64, where a graph with huge weights is not well conditioned.
        off = max(bounds.logit_error, 1e-9 * float(np.abs(approximate).max()))
        (computed,) = run(graph, ["logits"], image)
        for a, b, c in zip(approximate.ravel(), balls.ravel(), computed.ravel(), strict=True):
            assert abs(float(b) - a) <= off
            assert abs(float(b) - c) <= off
    if program.exact_numbers is RATIONALS:
        exact = exact_logits(graph.model, image[0])
        assert all(b.contains(BALLS.number(e)) for b, e in zip(balls[0], exact, strict=True))


# --- graphs that once got a bound, or an error, that was too small ----------------------------------------------------

Build = Callable[[GraphBuilder, str], str]


def made(build: Build, shape: Sequence[int], n_outputs: int, dtype: type = np.float64) -> Graph:
    b = GraphBuilder(np.random.default_rng(0), dtype)
    return Graph(b.model(tuple(shape), build(b, "image"), n_outputs), tuple(shape), dtype, ())


def test_a_branch_of_weight_zero_beside_another_leaves_its_bound() -> None:
    # 0 times "no bound is known" was 0; residuals whose last normalisation starts at 0 are common.
    def build(b: GraphBuilder, x: str) -> str:
        return b.one("Add", b.one("Mul", x, b.constant(np.zeros(3))), b.one("Relu", x))

    graph = made(build, (3,), 3)
    assert contradictions(graph) == []
    assert certify(graph.model).lipschitz_bound >= 1.0


def test_an_identity_that_pads_behind_the_image_is_no_identity_between_convolutions() -> None:
    # The difference is the last pixel; without the zeros behind it, it would be 0.
    def build(b: GraphBuilder, x: str) -> str:
        kernel = b.constant(np.ones((1, 1, 2)))
        padded = b.one("Conv", b.one("Conv", x, kernel), b.constant(np.ones((1, 1, 1))), pads=[0, 1])
        return b.one("Flatten", b.one("Sub", b.one("Conv", x, kernel, pads=[0, 1]), padded), axis=1)

    assert contradictions(made(build, (1, 4), 4)) == []


def test_a_factor_that_underflows_counts_times_the_largest_element() -> None:
    # Normalised by a subnormal factor: far fewer digits than the unit roundoff promises.
    def build(b: GraphBuilder, x: str) -> str:
        huge = b.one("Mul", x, b.constant(np.full((1, 1, 1), 3e37)))
        parameters = [b.constant(np.array([value])) for value in (1e-40, 0.0, 0.0, 3.0)]
        return b.one("Flatten", b.one("BatchNormalization", huge, *parameters, epsilon=1e-5), axis=1)

    assert rounding_contradictions(made(build, (1, 1, 1), 1, np.float32)) == []


@pytest.mark.parametrize(("alpha", "size"), [(1e-30, 1e38), (1e38, 1e-38)])
def test_a_sum_that_is_scaled_afterwards_must_not_overflow_before(alpha: float, size: float) -> None:
    def build(b: GraphBuilder, x: str) -> str:
        return b.one("Gemm", x, b.constant(np.full((16, 2), size)), alpha=alpha)

    assert rounding_contradictions(made(build, (16,), 2, np.float32)) == []


def square(b: GraphBuilder, x: str) -> str:
    return b.one("Mul", x, x)


def through_float16(b: GraphBuilder, array: np.ndarray) -> str:
    return b.one("Cast", b.one("Cast", b.constant(array), to=TensorProto.FLOAT16), to=TensorProto.DOUBLE)


def scattered(b: GraphBuilder, array: np.ndarray) -> str:
    places, ones = b.constant(np.array([0, 1])), b.constant(np.ones(2))
    return b.one("ScatterElements", b.constant(array), places, ones, axis=0, reduction="add")


def sign_of_transposed(b: GraphBuilder, x: str) -> str:
    squares = square(b, b.one("Reshape", x, b.constant(np.array([0, 2, 2]))))
    turned = b.one("Transpose", b.one("Sign", squares), perm=[0, 2, 1])
    return b.one("Flatten", b.one("Sqrt", b.one("Mul", turned, squares)), axis=1)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda b, x: b.one("Sqrt", b.one("Add", b.one("Sign", square(b, x)), b.constant(np.array(1.0)))), "jumps"),
        (lambda b, x: b.one("Sqrt", b.one("Div", b.one("Sign", square(b, x)), b.constant(np.array(2.0)))), "jumps"),
        (
            lambda b, x: b.one("Sqrt", b.one("ReduceSum", b.one("Sign", square(b, x)), b.constant(np.array([1])))),
            "jumps",
        ),
        (sign_of_transposed, "jumps"),
        (lambda b, x: b.one("LeakyRelu", x, alpha=math.nan), "finite number"),
        (lambda b, x: b.one("Sqrt", b.one("Mul", square(b, x), b.constant(np.ones((2, 4))))), "own batch axis"),
        (lambda b, x: b.one("Sqrt", b.one("Add", square(b, x), b.constant(np.ones((1, 1, 1))))), "more axes"),
        (lambda b, x: b.one("Sqrt", b.one("Pow", x, b.constant(np.full((1, 1, 1), 2.0)))), "one number"),
        (lambda b, x: b.one("Pow", x, b.constant(np.ones((1, 1, 1)))), "one number"),
        # ONNX Runtime rounds to float32 on the way to float16, so that its weight is another one.
        (lambda b, x: b.one("Mul", x, through_float16(b, np.full(4, 1 + 2**-11 + 2**-40))), "several meanings"),
        (lambda b, x: b.one("Mul", x, scattered(b, np.full(4, 1e16))), "rounds"),
    ],
)
def test_what_jumps_or_mixes_images_is_refused(build: Build, expected: str) -> None:
    with pytest.raises(UnsupportedModelError, match=expected):
        certify(made(build, (4,), 4).model)
