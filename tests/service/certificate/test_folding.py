"""Folding of constants: the bound of a result's size against the reference implementation of ONNX."""

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from service.certificate.folding import EXACT_FOLDS, INTEGER_FOLDS, result_elements
from service.certificate.graph import Node

Case = tuple[str, list[np.ndarray], dict[str, object]]


def node(operator: str, arrays: list[np.ndarray], attributes: dict[str, object], outputs: int = 1) -> Node:
    names = [f"x{k}" for k in range(len(arrays))]
    proto = helper.make_node(operator, names, [f"y{k}" for k in range(outputs)], **attributes)
    return Node(operator, operator, tuple(names), tuple(proto.output), attributes, proto)


def results(made: Node, arrays: list[np.ndarray]) -> list[np.ndarray]:
    run: Callable[..., list[np.ndarray]] = ReferenceEvaluator(made.proto).run
    return run(None, dict(zip(made.inputs, arrays, strict=True)))


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A node of constants that may be larger than its operands."""
    small = st.integers(0, 4)
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    data = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    axis = draw(st.integers(-data.ndim, data.ndim - 1))
    kind = draw(st.sampled_from(KINDS))
    if kind == "ConstantOfShape":
        return kind, [ints(*draw(st.lists(small, max_size=3)))], {}
    if kind == "Expand":
        wide = [draw(st.sampled_from([1, n])) for n in shape]
        return kind, [data, ints(*draw(st.lists(st.integers(1, 3), max_size=2)), *wide)], {}
    if kind == "Tile":
        return kind, [data, ints(*(draw(small) for _ in shape))], {}
    if kind == "Pad":
        if draw(st.booleans()):
            return kind, [data, ints(draw(small), draw(small)), np.array(0.5), ints(axis)], {}
        return kind, [data, ints(*(draw(small) for _ in (*shape, *shape)))], {}
    if kind == "Range":
        delta = draw(st.integers(1, 3)) * draw(st.sampled_from([1, -1]))
        return kind, [np.array(draw(st.integers(-9, 9))) for _ in range(2)] + [np.array(delta)], {}
    if kind == "Concat":
        return kind, [data] * draw(st.integers(1, 3)), {"axis": axis}
    if kind in ("Gather", "GatherElements"):
        places = np.zeros(draw(st.lists(st.integers(1, 3), max_size=2)) if kind == "Gather" else shape, np.int64)
        return kind, [data, places], {"axis": axis}
    if kind == "GatherND":
        named = draw(st.integers(1, data.ndim))
        return kind, [data, np.zeros((draw(st.integers(1, 5)), named), np.int64)], {}
    if kind == "NonZero":
        return kind, [data + 1.0], {}
    other = np.ones([draw(st.sampled_from([1, n])) for n in draw(st.lists(small.filter(bool), max_size=1)) + shape])
    if kind == "Where":
        return kind, [other > 0.0, data, data + 1.0], {}
    return kind, [data, other], {}


KINDS = [
    *("ConstantOfShape", "Expand", "Tile", "Pad", "Range", "Concat", "Gather", "GatherElements", "GatherND", "NonZero"),
    *("Where", "Max", "Less", "Add"),
]


@given(cases())
def test_no_result_is_larger_than_its_bound(case: Case) -> None:
    operator, arrays, attributes = case
    made = node(operator, arrays, attributes)
    (result,) = results(made, arrays)
    assert np.asarray(result).size <= result_elements(made, arrays)


@pytest.mark.parametrize(
    ("operator", "arrays", "attributes", "exact"),
    [
        ("Gather", [np.zeros((3, 5)), np.zeros((2, 2), np.int64)], {"axis": 1}, 12),
        ("GatherND", [np.zeros((3, 5, 7)), np.zeros((2, 1), np.int64)], {}, 70),
        ("GatherND", [np.zeros((2, 3, 5)), np.zeros((2, 1), np.int64)], {"batch_dims": 1}, 10),
        ("Range", [np.array(0), np.array(7), np.array(2)], {}, 4),
        ("Range", [np.array(7), np.array(0), np.array(-2)], {}, 4),
        ("Range", [np.array(7), np.array(0), np.array(2)], {}, 0),
        ("Pad", [np.zeros((3, 5)), ints(1, 1), np.array(0.0), ints(-1)], {}, 21),
    ],
)
def test_the_bound_of_a_size_is_the_size(
    operator: str, arrays: list[np.ndarray], attributes: dict[str, object], exact: int
) -> None:
    made = node(operator, arrays, attributes)
    assert result_elements(made, arrays) == exact == np.asarray(results(made, arrays)[0]).size


def test_every_other_operator_only_picks_from_its_operands() -> None:
    # One that is added to the folds is added here, or to the sizes that are bounded.
    picking = {
        *("Cast", "Constant", "Flatten", "Identity", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split"),
        *("Squeeze", "Transpose", "Trilu", "Unsqueeze", "Not", "Abs", "Clip", "Neg", "ReduceMax", "ReduceMin", "Relu"),
        *("Sign", "ReduceProd"),
    }
    broadcast = {
        *("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Or", "Where"),
        *("Add", "Div", "Mod", "Mul", "Sub"),
    }
    assert set(KINDS) | broadcast | picking == EXACT_FOLDS | INTEGER_FOLDS
    assert onnx.defs.onnx_opset_version() >= 24
