"""Tensors that do not depend on the image: constants, and integers that depend on the batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from service.audit.balls import NotAuditableError
from service.audit.graph import FLOATS, Node
from service.audit.moves import MOVES, Arrays, first_operand

_PICKS = frozenset({"Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
"""Moves that may act on a shape which holds the batch size: every entry of the result is one of the first operand's."""


@dataclass(frozen=True)
class PerBatch:
    """Integers that depend on the batch size: one array for each size in `Graph.batches`.

    They come from shapes and are only ever picked from, so that an entry is the batch size or the same for all sizes.
    """

    arrays: tuple[np.ndarray, ...]


Constant = np.ndarray | PerBatch


def per_batch(arrays: Sequence[np.ndarray]) -> Constant:
    """Return integers found with each batch size; a constant where all agree."""
    agree = all(np.array_equal(arrays[0], other) for other in arrays[1:])
    return arrays[0] if agree else PerBatch(tuple(arrays))


def of_batch(value: object, which: int) -> np.ndarray | None:
    """Return a constant as it is in one of the probed batches; absent for anything else."""
    return value.arrays[which] if isinstance(value, PerBatch) else value if isinstance(value, np.ndarray) else None


def shape_of(node: Node, shape: Sequence[int]) -> np.ndarray:
    """Return the result of the operator Shape for a tensor of this shape."""
    rank = len(shape)
    return np.array(shape[node.integer("start", 0) : node.integer("end", rank)], dtype=np.int64)


def picked(node: Node, inputs: Sequence[object], n_batches: int) -> list[Constant]:
    """Return integers picked from shapes that hold the batch size.

    Args:
        node: a node without an operand that depends on the image.
        inputs: its operands.
        n_batches: number of probed batches.

    Raises:
        NotAuditableError: the node does anything else with the batch size.
    """
    others = [] if node.operator == "Concat" else inputs[1:]
    if node.operator not in _PICKS or any(isinstance(value, PerBatch) for value in others):
        raise NotAuditableError("it computes with the size of the batch")
    function, attributes = MOVES[node.operator]
    if node.attributes.keys() - attributes:
        raise NotAuditableError("no rule for its attributes")
    found = [function(node, [of_batch(value, n) for value in inputs]) for n in range(n_batches)]
    return [per_batch([np.asarray(array) for array in arrays]) for arrays in zip(*found, strict=True)]


def fold(node: Node, inputs: Arrays) -> np.ndarray:
    """Return the value of a node whose operands are constants, where it is exact.

    Raises:
        NotAuditableError: the node has no such rule, or its result is rounded.
    """
    if node.operator == "Constant":
        if set(node.attributes) != {"value"} or not isinstance(node.attributes["value"], np.ndarray):
            raise NotAuditableError("a constant that is no tensor")
        array = node.attributes["value"]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NotAuditableError("a constant that is NaN or infinite")
        return array
    if node.operator == "Neg":
        return -first_operand(inputs)
    if node.operator == "Cast":
        return _cast(node, first_operand(inputs))
    if node.operator in _INTEGERS and len(inputs) == 2:
        left, right = (array for array in inputs)
        if left is not None and right is not None and left.dtype.kind == right.dtype.kind == "i":
            return _arithmetic(node.operator, left, right)
    raise NotAuditableError("arithmetic on constants has no rule here")


_INTEGERS: dict[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b,
    "Div": lambda a, b: a // b,
    "Mul": lambda a, b: a * b,
    "Sub": lambda a, b: a - b,
}


def _arithmetic(operator: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sizes computed from sizes."""
    one, other = np.broadcast_arrays(left, right)
    if operator == "Div" and ((one < 0) | (other < 1)).any():
        raise NotAuditableError("a quotient of integers that are not sizes")
    found = [_INTEGERS[operator](a, b) for a, b in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)]
    if any(abs(number) >= 2**62 for number in found):
        raise NotAuditableError("integers too large for sizes")
    return np.array(found, dtype=np.int64).reshape(one.shape)


def _cast(node: Node, array: np.ndarray) -> np.ndarray:
    if node.integer("to", 0) == int(onnx.TensorProto.INT64) and array.dtype.kind == "i":
        return array.astype(np.int64)
    target = FLOATS.get(node.integer("to", 0))
    if target is None or array.dtype.kind != "f":
        raise NotAuditableError("a cast to another type than float64 or float32")
    with np.errstate(over="ignore"):
        cast = array.astype(target)
    if not np.array_equal(cast.astype(np.float64), array.astype(np.float64)):
        raise NotAuditableError("a cast that rounds a constant")
    return cast
