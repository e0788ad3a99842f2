"""The table of rules, and how rules read their operands.

Tensors leave the batch axis out. A rule takes the attributes that it registers and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from flint import arb

from service.audit.balls import NotAuditableError
from service.audit.constants import PerBatch
from service.audit.graph import Node
from service.audit.network import Network, Tensor


class Signs:
    """The signs of sums of squares, which jump: they may only be multiplied with the same sums."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids


Value = Tensor | Signs | np.ndarray | PerBatch
Operands = Sequence[Value | None]
Rule = Callable[[Network, Node, Operands], Tensor | Signs]
AnyRule = TypeVar("AnyRule", bound=Rule)
RULES: dict[str, tuple[Rule, frozenset[str]]] = {}
"""Rule of each operator, with the attributes that it reads."""


def rule(*operators: str, attributes: Sequence[str] = ()) -> Callable[[AnyRule], AnyRule]:
    """Return a decorator that registers the rule of some operators, with the attributes that it reads."""

    def register(function: AnyRule) -> AnyRule:
        for operator in operators:
            RULES[operator] = (function, frozenset(attributes))
        return function

    return register


def tensor(operands: Operands, position: int = 0) -> Tensor:
    """Return an operand that depends on the image.

    Raises:
        NotAuditableError: it does not.
    """
    value = operands[position] if position < len(operands) else None
    if isinstance(value, Signs):
        raise NotAuditableError(
            "a sign jumps; it may only be multiplied with the sum of squares that it is the sign of"
        )
    if not isinstance(value, Tensor):
        raise NotAuditableError(f"operand {position} must depend on the image")
    return value


def floats(operands: Operands, position: int) -> np.ndarray:
    """Return a floating-point constant in float64, without a rounding.

    Raises:
        NotAuditableError: the operand is no such constant.
    """
    value = operands[position] if position < len(operands) else None
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise NotAuditableError(f"operand {position} must be a floating-point constant")
    return value.astype(np.float64)


def is_given(operands: Operands, position: int) -> bool:
    """Return whether an optional operand is there."""
    return position < len(operands) and operands[position] is not None


def image_axis(axis: int, value: Tensor) -> int:
    """Return an ONNX axis, which counts the batch, as an axis of the image's own tensor.

    Raises:
        NotAuditableError: it is out of range, or the batch axis.
    """
    rank = len(value.shape) + 1
    if not -rank <= axis < rank or axis % rank == 0:
        raise NotAuditableError(f"axis {axis} of {rank}: outside, or along the batch")
    return axis % rank - 1


def balls(values: np.ndarray) -> list[arb]:
    """Return floats as exact balls, flat."""
    return [arb(float(value)) for value in values.ravel().tolist()]


def broadcast(value: Tensor, constant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the identities of a tensor and a constant, broadcast to each other's shape.

    Raises:
        NotAuditableError: the constant differs from image to image.
    """
    shape = np.broadcast_shapes(constant.shape, (1, *value.shape))
    if len(shape) != len(value.shape) + 1 or shape[0] != 1:
        raise NotAuditableError("a constant with its own batch axis")
    return np.broadcast_to(value.ids, shape[1:]), np.broadcast_to(constant, shape)[0]
