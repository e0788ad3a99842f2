"""The table of lowerings: how a node of a file, in any version of its operator, becomes operators of the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from service.network.limits import (
    COPIES_OF_WEIGHTS,
    LARGEST_CONSTANT,
    MOST_OPERATORS,
    WORK_OF_NUMBER,
    Work,
    limit_tensor,
)
from service.network.nodes import Node
from service.network.operators import (
    Attribute,
    Constant,
    Operand,
    Operator,
    Precision,
    Refusal,
    Shape,
    Tensor,
)

PROBE_BATCH = 2**61 - 1
"""Stands for the batch size wherever a constant holds it: a prime above every length."""


@dataclass(frozen=True, eq=False)
class Folded:
    """A constant, while the file is read."""

    array: np.ndarray
    on_batch: bool = False
    """Integers among which the batch size stands, as `PROBE_BATCH`: only picked from, never computed with."""


@dataclass(frozen=True)
class Unknown:
    """The result of a refused node."""

    reason: str = ""
    """Empty if the refusal is on record."""


Known = Tensor | Folded | Unknown
Inputs = Sequence[Known | None]


@dataclass
class Reading:
    """A network in the making."""

    precision: Precision
    batch: int
    """The batch size that the file fixes; `PROBE_BATCH` where it is free."""
    operators: list[Operator] = field(default_factory=list[Operator])
    tensors: int = 0
    constants_left: int = LARGEST_CONSTANT
    """Elements that constants which the file computes may still have."""
    work: Work = field(default_factory=lambda: Work(math.inf))

    def count(self, node: Node, operands: Sequence[np.ndarray | None], results: Sequence[np.ndarray]) -> None:
        """Count constants that the file computes, other than views: repetitions and parts of others.

        Args:
            node: which computes them; a Constant holds its own.
            operands: of the node.
            results: of the node.

        Raises:
            Refusal: they are too large together.
        """
        if node.kind == "Constant":
            self.constants_left += COPIES_OF_WEIGHTS * results[0].size
            return
        views = [one for one in operands if one is not None]
        self.constants_left -= sum(
            # A repeated number takes the place of one.
            math.prod(n for n, stride in zip(array.shape, array.strides, strict=True) if stride)
            for array in results
            if not any(np.may_share_memory(array, one) for one in views)
        )
        if self.constants_left < 0:
            raise Refusal("too large to analyse: all constants that the file computes, together")

    def tensor(self, shape: Sequence[int]) -> Tensor:
        """Return a new tensor; raise Refusal if it is empty or too large."""
        if any(size < 1 for size in shape):
            raise Refusal("nothing is left of the tensor")
        limit_tensor(shape)
        self.tensors += 1
        return Tensor(self.tensors - 1, tuple(int(size) for size in shape))

    def emit(
        self, node: Node, operands: Sequence[Operand], *shapes: Sequence[int], **attributes: Attribute
    ) -> list[Tensor]:
        """Append an operator and return its results.

        Args:
            node: which the operator is read from, and whose kind it has.
            operands: tensors and constants.
            shapes: of the results, without the batch axis.
            attributes: all that the operator has.

        Raises:
            Refusal: a result is too large, or the network is.
            UnsupportedModelError: the tensors so far are more than the work on this model allows.
        """
        if len(self.operators) >= MOST_OPERATORS:
            raise Refusal(f"more than {MOST_OPERATORS} operators")
        for shape in shapes:
            limit_tensor(shape)
        # A constant operand may be one number, repeated until here.
        arrays = [operand.array.size for operand in operands if isinstance(operand, Constant)]
        self.work.spend(WORK_OF_NUMBER * (sum(map(math.prod, shapes)) + sum(arrays)), node.label)
        trimmed = list(operands)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        results = tuple(self.tensor(shape) for shape in shapes)
        self.operators.append(
            Operator(node.kind, tuple(trimmed), tuple(sorted(attributes.items())), results, node.label)
        )
        return list(results)

    def number(self, value: Known | None, name: str) -> Constant:
        """Return a constant operand of the network's precision; raise Refusal if it is not one."""
        array = constant_array(value, name)
        if array.dtype.kind != "f":
            raise Refusal(f"{name} must hold floating-point numbers")
        if array.dtype != np.dtype(self.precision):
            raise Refusal(f"{name} is {array.dtype.name} in a graph of {self.precision}")
        return Constant(array)


Lowering = Callable[[Reading, Node, Inputs], Sequence[Known]]


@dataclass(frozen=True)
class Entry:
    """A lowering, the versions of the operator that it reads, and the attributes."""

    apply: Lowering
    versions: frozenset[int]
    attributes: frozenset[str]


LOWERINGS: dict[str, Entry] = {}


def lowers(*kinds: str, versions: Sequence[int], attributes: Sequence[str] = ()) -> Callable[[Lowering], Lowering]:
    """Register the lowering of operators.

    Args:
        kinds: names of operators.
        versions: opsets that introduced a form which the lowering reads; other forms are refused.
        attributes: that the lowering reads; others are refused.
    """

    def register(function: Lowering) -> Lowering:
        entry = Entry(function, frozenset(versions), frozenset(attributes))
        LOWERINGS.update(dict.fromkeys(kinds, entry))
        return function

    return register


def tensor_operand(value: Known | None, name: str = "its input") -> Tensor:
    """Return an operand that depends on the image; raise Refusal if it does not."""
    if not isinstance(value, Tensor):
        raise Refusal(f"{name} must depend on the image")
    return value


def constant_array(value: Known | None, name: str, batch_allowed: bool = False) -> np.ndarray:
    """Return the array of a constant operand.

    Args:
        value: the operand.
        name: of the operand, in messages.
        batch_allowed: whether it may hold the batch size.

    Raises:
        Refusal: it depends on the image, or on the batch size.
    """
    if not isinstance(value, Folded):
        raise Refusal(f"{name} must be a constant")
    if value.on_batch and not batch_allowed:
        raise Refusal(f"{name} depends on the batch size")
    return value.array


def constant_arrays(inputs: Inputs) -> list[np.ndarray | None]:
    """Return the arrays of constant operands, null for others; raise Refusal if one holds the batch size."""
    return [constant_array(value, "an operand") if isinstance(value, Folded) else None for value in inputs]


def operand(inputs: Inputs, position: int) -> Known | None:
    """Return an operand, null if it is absent."""
    return inputs[position] if position < len(inputs) else None


def image_axis(axis: int, shape: Shape) -> int:
    """Return an ONNX axis, which counts the batch, as one of the image's; raise Refusal for the batch axis."""
    rank = len(shape) + 1
    if not -rank <= axis < rank:
        raise Refusal(f"axis {axis} is outside of the {rank} axes")
    axis %= rank
    if axis == 0:
        raise Refusal("it works along the batch axis and would mix images")
    return axis - 1


def without_batch(array: np.ndarray, rank: int) -> np.ndarray:
    """Return a constant that broadcasts against `N x rank axes` without axes of length 1 before the image's own.

    Args:
        array: the constant.
        rank: of the image's shape.

    Raises:
        Refusal: it has a batch axis, or more axes than the tensor.
    """
    while array.ndim > rank and array.shape[0] == 1 and array.ndim <= rank + 1:
        array = array[0]
    if array.ndim == rank + 1:
        raise Refusal("a constant has its own batch axis")
    if array.ndim > rank:
        raise Refusal("a constant has more axes than the image's tensor")
    return array


def broadcast(*shapes: Shape) -> Shape:
    """Return the shape to which shapes broadcast; raise Refusal if they do not."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise Refusal(f"shapes {' and '.join(map(str, shapes))} do not broadcast") from error
