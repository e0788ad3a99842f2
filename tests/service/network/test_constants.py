"""Constants are evaluated as the specification says, by the reference implementation of ONNX."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from service.network.constants import EVALUATORS, evaluate
from service.network.nodes import Node
from service.network.operators import Refusal

Case = tuple[str, list[np.ndarray], dict[str, object]]


def evaluated(operator: str, arrays: list[np.ndarray], attributes: dict[str, object]) -> list[np.ndarray]:
    names = tuple(f"x{k}" for k in range(len(arrays)))
    return evaluate(Node(operator, operator, 18, names, ("y",), attributes), arrays)


def reference(operator: str, arrays: list[np.ndarray], attributes: dict[str, object]) -> list[np.ndarray]:
    names = [f"x{k}" for k in range(len(arrays))]
    run: Callable[..., list[np.ndarray]] = ReferenceEvaluator(
        helper.make_node(operator, names, ["y"], **attributes)
    ).run
    return run(None, dict(zip(names, arrays, strict=True)))


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
    *("Where", "Max", "Less"),
]


@given(cases())
def test_moves_and_choices_are_those_of_the_reference(case: Case) -> None:
    (found,), (expected,) = evaluated(*case), reference(*case)
    np.testing.assert_array_equal(found, expected)
    assert found.shape == np.asarray(expected).shape


INTEGERS = [ints(7, -7, 7, -7), ints(2, 2, -2, -2)]


@pytest.mark.parametrize(
    ("operator", "arrays", "attributes", "expected"),
    [
        ("Add", INTEGERS, {}, [9, -5, 5, -9]),
        ("Sub", INTEGERS, {}, [5, -9, 9, -5]),
        ("Mul", INTEGERS, {}, [14, -14, -14, 14]),
        # Towards zero, as every processor divides.
        ("Div", INTEGERS, {}, [3, -3, -3, 3]),
        ("Mod", INTEGERS, {}, [1, 1, -1, -1]),
        ("Mod", INTEGERS, {"fmod": 1}, [1, -1, 1, -1]),
        ("ReduceProd", [ints(-65536, 255)], {"keepdims": 0}, -65536 * 255),
        ("Slice", [ints(7, 8, 9), ints(-1), ints(-(2**63)), ints(0), ints(-1)], {}, [9, 8, 7]),
        ("Cast", [np.array([1.9, -1.9])], {"to": 7}, [1, -1]),
    ],
)
def test_integers_are_computed_exactly(
    operator: str, arrays: list[np.ndarray], attributes: dict[str, object], expected: object
) -> None:
    (found,) = evaluated(operator, arrays, attributes)
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("operator", "arrays", "attributes", "message"),
    [
        ("Add", [np.ones(1), np.ones(1)], {}, "rounds"),
        ("Div", [ints(-(2**63)), ints(-1)], {}, "outside of int64"),
        ("Div", [ints(1), ints(0)], {}, "divides by zero"),
        ("ReduceProd", [ints(65536, 65537)], {}, "24 bits"),
        ("Mul", [ints(2**40), ints(2**40)], {}, "outside of int64"),
        ("Neg", [ints(-(2**63))], {}, "no opposite"),
        ("Cast", [np.array([1e300])], {"to": 7}, "outside of the integers"),
        ("Cast", [np.array([1.0])], {"to": 10}, "several meanings"),
        ("ScatterND", [np.zeros(3), np.array([[1], [1]]), np.ones(2)], {}, "twice"),
        ("Squeeze", [np.ones((1, 1)), np.zeros(0, np.int64)], {}, "empty list"),
        ("Exp", [np.ones(1)], {}, "rounds"),
    ],
)
def test_what_rounds_or_has_no_one_result_is_refused(
    operator: str, arrays: list[np.ndarray], attributes: dict[str, object], message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        evaluated(operator, arrays, attributes)


def test_every_operator_that_the_cases_cover_has_an_evaluator() -> None:
    assert set(KINDS) <= set(EVALUATORS)
