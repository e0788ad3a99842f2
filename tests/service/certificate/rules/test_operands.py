"""Operands that no theorem covers are refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from service.certificate.rules.operands import broadcast_shape, data_operand, float_operand, integer_operand
from service.certificate.values import Squares, stand_in
from service.network.operators import Constant, Refusal

TENSOR, NUMBERS, POSITIONS = stand_in((2,)), Constant(np.ones(2)), Constant(np.ones(2, np.int64))
SQUARE = Squares((), np.zeros(2), 1.0, 1, 0.0)


def test_each_kind_of_operand_is_read_as_what_it_is() -> None:
    assert data_operand(TENSOR) is TENSOR
    np.testing.assert_array_equal(float_operand(NUMBERS, "it"), np.ones(2))
    assert integer_operand(POSITIONS, "they") == [1, 1]


@pytest.mark.parametrize(
    ("operand", "reason"),
    [(NUMBERS, "it must depend on the image"), (None, "it must depend"), (SQUARE, "it is a square")],
)
def test_data_that_is_no_tensor_is_refused(operand: object, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        data_operand(operand, "it")  # type: ignore[arg-type]


@pytest.mark.parametrize(("operand", "reason"), [(TENSOR, "must be a constant"), (POSITIONS, "floating-point numbers")])
def test_numbers_that_are_none_are_refused(operand: object, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        float_operand(operand, "it")  # type: ignore[arg-type]


@pytest.mark.parametrize("operand", [TENSOR, NUMBERS, None])
def test_positions_that_are_none_are_refused(operand: object) -> None:
    with pytest.raises(Refusal, match="they must be constant integers"):
        integer_operand(operand, "they")  # type: ignore[arg-type]


def test_shapes_that_do_not_broadcast_are_refused() -> None:
    with pytest.raises(Refusal, match=r"\(2,\) and \(3,\) do not broadcast"):
        broadcast_shape((2,), (3,))
