"""The derivation: exact logits, and bounds that no image exceeds, against exact oracles of the tests alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from audit_cases import Json, computed, derived, rational, rational_pixels, server_agrees
from exact_graphs import BALLS, Program
from flint import arb, fmpq
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented
from random_graphs import Graph, GraphBuilder, seeded_graph
from thorough import often

from service.audit.balls import NotAuditableError
from service.certificate import UnsupportedModelError


def test_networks_of_the_trainer_with_convolutions_and_normalisation_hold(tmp_path: Path) -> None:
    import torch

    from models.export import emit_graph
    from models.nets.layers.base import Chain
    from models.nets.layers.pooling import L2Pool2d, ScaledAvgPool2d
    from models.nets.layers.reshaping import Normalize
    from models.nets.layers.sorting import FullSort
    from models.nets.networks import LipschitzNetwork, convolutional_network, dense_network
    from models.recipes import Stage

    torch.manual_seed(0)
    conv = convolutional_network((2, 8, 8), [Stage(channels=8, blocks=2)], "none", (12,), 3)
    detector = convolutional_network((1, 6, 8), [Stage(channels=8)], "max", (8,), 1)
    norms = convolutional_network((1, 6, 8), [Stage(channels=8)], "l2", (8,), 3)
    pooled = dense_network((2, 2, 2), (8,), 3)
    body = Chain([Normalize([0.4, 0.5], [0.2, 0.3]), L2Pool2d(2), ScaledAvgPool2d(2), pooled.body])
    sort = dense_network((1, 4, 4), (12,), 1, activation="fullsort")
    assert any(isinstance(layer, FullSort) for layer in sort.body.modules())
    for network in (conv, detector, norms, LipschitzNetwork((2, 8, 8), body, pooled.head), sort):
        assert server_agrees(emit_graph(network), network.input_shape, 5)


def test_networks_in_float32_in_blocks_hold() -> None:
    import torch

    from models.export import emit_graph
    from models.nets.networks import convolutional_network, dense_network
    from models.precision import in_float32
    from models.recipes import Stage

    torch.manual_seed(0)
    stage = often(Stage(channels=4), Stage(channels=8, blocks=2))
    side, widths = often(4, 8), often((12, 10), (24, 20))
    convolutional = convolutional_network((1, side, side), [stage], "none", (12,), 3)
    for network in (dense_network((1, side, side), widths, 3), convolutional):
        for block in (1, 5):
            assert server_agrees(in_float32(emit_graph(network), block), network.input_shape, 5, np.float32)


@pytest.mark.parametrize("of", ["tree", "chain"])
def test_no_adversary_of_the_rounding_of_blocks_exceeds_the_error(of: str) -> None:
    # Blocks of one column of ones, and an image of ones: every operation is rounded upwards.
    u, b = Fraction(1, 2**24), GraphBuilder(np.random.default_rng(0), np.float32)
    terms, values = b.add("Split", "image", outputs=8, num_outputs=8, axis=1), [1 + u] * 8
    terms = [b.one("MatMul", term, b.constant(np.ones((1, 1)))) for term in terms]
    while len(terms) > 1:
        place = len(terms) if of == "tree" else 0
        terms.insert(place, b.one("Add", terms.pop(0), terms.pop(0)))
        values.insert(place, (values.pop(0) + values.pop(0)) * (1 + u))
    error = derived(b.model((8,), terms[0], 1), np.full(8, 255)).logit_error
    # Without the rounding of the pixels, 2^-24 each.
    assert rational(error.mid()) - 8 * u * (1 + u) >= values[0] - 8


def exact_logits(model: bytes, image: np.ndarray) -> list[arb]:
    """By code of the tests alone; one output f as (f, -f)."""
    logits = list(Program.parse(model).evaluate(image[None], BALLS)["logits"][0])
    return [logits[0], -logits[0]] if len(logits) == 1 else logits


READ = (
    *("dense", "dense", "with_constant", "conv", "same_conv", "periodic_conv", "conv_transpose", "pool", "pointwise"),
    *("batch_normalization", "im2col", "sort", "reduce", "move", "move", "residual", "square_dense", "branches"),
    *("block_products", "block_products"),
)
"""Steps of random graphs; some have an operator that the audit does not read, and are refused."""


def graphs_that_are_read(seeds: range) -> Iterator[tuple[int, Graph]]:
    for seed in seeds:
        graph = seeded_graph(seed, READ)
        try:
            derived(graph.model, np.zeros(graph.shape, dtype=np.int64))
            computed(graph.model, np.zeros(graph.shape), graph.dtype)
        except (NotAuditableError, NotImplemented):
            # ONNX Runtime has no convolutions in float64.
            continue
        yield seed, graph


def test_the_radius_of_the_certifier_holds_on_random_graphs() -> None:
    # Here and there the certifier knows a construction that the audit does not: its bound is smaller then.
    agree: list[bool] = []
    for seed, graph in graphs_that_are_read(range(*often((40, 80), (0, 200)))):
        with suppress(UnsupportedModelError):
            agree.append(server_agrees(graph.model, graph.shape, seed, graph.dtype))
    assert len(agree) > often(12, 60)
    assert sum(agree) >= 0.95 * len(agree)


def test_bounds_are_never_below_what_exact_logits_do() -> None:
    random = np.random.default_rng(0)
    looked_at = 0
    for seed, graph in graphs_that_are_read(range(1000, 1000 + often(32, 160))):
        looked_at += 1
        pixels = random.integers(1, 255, graph.shape)
        derivation, at = derived(graph.model, pixels), rational_pixels(pixels)
        exact = exact_logits(graph.model, at)
        stated = computed(graph.model, pixels, graph.dtype)[0].tolist()
        for ball, value, logit in zip(derivation.logits[0], exact, stated, strict=True):
            assert ball.overlaps(value), seed
            assert ball.rad() < 1e-30 * (1 + abs(value).upper()), seed
            assert not abs(arb(logit) - value) > derivation.logit_error, seed
        if len(exact) == 1:
            continue
        # The steepest step of one margin: along its gradient, by differences; the pieces are linear.
        i, j = (int(k) for k in random.permutation(len(exact))[:2])

        def margin(image: np.ndarray, model: bytes = graph.model, i: int = i, j: int = j) -> arb:
            logits = exact_logits(model, image)
            return logits[i] - logits[j]

        here, step = margin(at), np.zeros(at.size, dtype=object)
        for d in range(at.size):
            moved = at.copy()
            moved.reshape(-1)[d] += Fraction(1, 10**9)
            step[d] = rational(((margin(moved) - here) * 10**3).mid())
        change = margin(at + step.reshape(at.shape)) - here
        length = sum(step**2)
        bound = derivation.margin_bounds[i][j]
        assert not change * change > bound * bound * arb(fmpq(length.numerator, length.denominator)), seed
    assert looked_at > often(12, 60)


def test_a_huge_bias_that_a_later_layer_cancels_is_paid_for(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    hidden, head = random.normal(size=(8, 4)), random.normal(size=(3, 8))
    shift = random.normal(size=8) * 1e9
    graphs = builders.dense(
        [(hidden, shift)],
        (head, -head @ np.concatenate([np.maximum(*np.split(shift, 2)), np.minimum(*np.split(shift, 2))])),
        (1, 2, 2),
    )
    assert derived(graphs.model, np.full((1, 2, 2), 100)).logit_error > 1e-6
    assert server_agrees(graphs.model, (1, 2, 2), 1)


def test_a_linear_classifier_has_its_closed_form_radius(
    zoo: Path, linear_weights: Mapping[str, Any], grey_HW: np.ndarray
) -> None:
    weight_KD, bias_K, shape = linear_weights["grey"]
    derivation = derived((zoo / "grey" / "model.onnx").read_bytes(), grey_HW.reshape(shape))
    exact = np.vectorize(Fraction, otypes=[object])
    weight_KD, x_D = exact(weight_KD), rational_pixels(grey_HW).ravel()
    logits_K = weight_KD @ x_D + exact(bias_K)
    for i in range(3):
        assert abs(rational(derivation.logits[0][i].mid()) - logits_K[i]) < Fraction(1, 2**150)
        for j in range(3):
            squared = ((weight_KD[i] - weight_KD[j]) ** 2).sum()
            bound = rational(derivation.margin_bounds[i][j]) ** 2
            assert squared <= bound <= squared * (1 + Fraction(1, 2**49))


def test_consecutive_linear_operators_are_one_matrix() -> None:
    # W and its inverse: as two maps 1e6, as one map 1.
    def build(b: GraphBuilder, x: str) -> str:
        for weight in (np.diag([1024.0, 1.0, 2.0**-10]), np.diag([2.0**-10, 1.0, 1024.0])):
            x = b.one("Gemm", x, b.constant(weight))
        left = b.one("Gemm", x, b.constant(-np.eye(3) / 2))
        return b.one("Add", x, left)

    b = GraphBuilder(np.random.default_rng(0))
    derivation = derived(b.model((3,), build(b, "image"), 3), np.array([10, 20, 30]))
    expected = np.sqrt(2) / 2
    assert expected * (1 - 1e-15) < float(derivation.margin_bounds[0][1]) < expected * (1 + 1e-15)


@pytest.mark.parametrize("operator", ["Concat", "Sub", "Max"])
def test_tensors_behind_different_nonlinearities_are_not_taken_for_one(operator: str) -> None:
    # relu(y) - y falls with slope 1 where y < 0; taken for a function of one tensor, its terms would cancel.
    b = GraphBuilder(np.random.default_rng(0))
    y = b.one("Sub", "image", b.constant(np.array(0.5)))
    parts = b.one("Relu", y), y
    if operator == "Concat":
        f = b.one("Gemm", b.one("Concat", *parts, axis=1), b.constant(np.array([[1.0], [-1.0]])))
    elif operator == "Sub":
        f = b.one("Sub", *parts)
    else:
        f = b.one("Neg", b.one("Min", b.one("Sub", y, parts[0]), b.one("Sub", parts[0], y)))
    derivation = derived(b.model((1,), f, 1), np.array([51]))
    assert rational(derivation.logits[0][0].mid()) == pytest.approx(0.3, abs=1e-50)
    assert 2 <= float(derivation.margin_bounds[0][1]) <= 6


def test_a_default_attribute_is_the_float32_that_kernels_compute_with() -> None:
    b = GraphBuilder(np.random.default_rng(0))
    model = b.model((1,), b.one("LeakyRelu", b.one("Neg", "image")), 1)
    pixels = np.array([255])
    ((exact, _),), (stated, _) = derived(model, pixels).logits, computed(model, pixels, np.float64)[0]
    assert rational(exact.mid()) == Fraction(float(stated)) == -Fraction(float(np.float32(0.01)))


def test_a_pair_that_is_sorted_twice_costs_what_it_costs_once() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        def half(start: int) -> str:
            return b.one("Slice", x, *(b.constant(np.array([v])) for v in (start, start + 2, 1)))

        return b.one("Concat", b.one("Max", half(0), half(2)), b.one("Min", half(2), half(0)), axis=1)

    b = GraphBuilder(np.random.default_rng(0))
    halves = build(b, "image")
    model = b.model((4,), b.one("Gemm", halves, b.constant(np.eye(4)[:, :1])), 1)
    assert 1.999999 < float(derived(model, np.array([1, 2, 3, 4])).margin_bounds[0][1]) < 2.000001


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs", "reason"),
    [
        ("Sin", {}, [], "no rule for this operator"),
        ("Transpose", {"perm": [1, 0]}, [], "it mixes the images of a batch"),
        ("Reshape", {}, [np.array([1, -1])], "it mixes the images of a batch"),
        ("Reshape", {}, [np.array([2, -1])], "its operands do not fit"),
        ("ReduceMax", {}, [np.array([0])], "axis 0 of 2: outside, or along the batch"),
        ("TopK", {"sorted": 0}, [np.array([2])], "k must be a constant, and the result sorted"),
        ("Concat", {"axis": 1}, [np.ones((1, 3))], "it mixes constants and numbers that depend on the image"),
        ("Gemm", {"alpha": 0.5}, [np.eye(3)], "alpha or beta other than 1"),
        ("Gemm", {}, [np.eye(4)], "a weight (4, 4) does not fit 3 numbers"),
        ("Div", {}, [np.zeros(3)], "it divides by zero"),
        ("Mul", {}, [np.full(3, 1e308)], "overflow cannot be excluded"),
    ],
)
def test_a_node_without_a_rule_is_named_and_refused(
    operator: str, attributes: Json, inputs: list[Any], reason: str
) -> None:
    b = GraphBuilder(np.random.default_rng(0))
    x = b.one(operator, "image", *(b.constant(value) for value in inputs), **attributes)
    b.nodes[-1].name = "culprit"
    if operator == "TopK":
        b.nodes[-1].output.append("order")
    with pytest.raises(NotAuditableError) as caught:
        derived(b.model((3,), x, 3), np.array([1, 2, 3]))
    assert str(caught.value).startswith(f"{operator} 'culprit': ")
    assert reason in str(caught.value)


def batch_size(b: GraphBuilder, x: str) -> str:
    return b.one("Gather", b.one("Shape", x), b.constant(np.array([0])), axis=0)


def test_shapes_that_exporters_compute_are_read() -> None:
    b = GraphBuilder(np.random.default_rng(0))
    channels = b.one("Gather", b.one("Shape", "image"), b.constant(np.array([1])), axis=0)
    half = b.one("Div", channels, b.constant(np.array([2])))
    shape = b.one("Concat", batch_size(b, "image"), half, b.constant(np.array([2])), axis=0)
    pairs = b.one("Reshape", "image", shape)
    largest = b.one("ReduceMax", pairs, b.constant(np.array([2])), keepdims=0)
    (exact,) = derived(b.model((4,), largest, 2), np.array([51, 102, 204, 153])).logits
    assert [rational(ball.mid()) for ball in exact] == pytest.approx([0.4, 0.8], abs=1e-50)


@pytest.mark.parametrize("operator", ["Slice", "Mul", "Gather", "ReduceMax"])
def test_a_graph_that_computes_with_the_batch_size_is_refused(operator: str) -> None:
    # With batches of two or more, Slice alone would leave the three numbers as they are.
    b = GraphBuilder(np.random.default_rng(0))
    size = batch_size(b, "image")
    if operator == "Slice":
        size = b.one("Concat", size, b.constant(np.array([3])), axis=0)
        start, axes = b.constant(np.array([0, 0])), b.constant(np.array([1, 2]))
        x = b.one("Slice", "image", start, size, axes)
    elif operator == "Mul":
        x = b.one("Reshape", "image", b.one("Concat", b.one("Mul", size, size), b.constant(np.array([-1])), axis=0))
    elif operator == "Gather":
        x = b.one("Gather", "image", size, axis=1)
    else:
        x = b.one("ReduceMax", "image", size, keepdims=1)
    model = b.model((2, 3), b.one("Flatten", x, axis=1), 6)
    with pytest.raises(
        NotAuditableError, match=f"^{operator} .*(computes with the size of the batch|constant integers)"
    ):
        derived(model, np.array([[1, 2, 3], [4, 5, 6]]))
