"""The table of pullbacks, and the operators that they append to a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from service.network.operators import Attribute, Constant, Network, Operand, Operator, Precision, Shape, Tensor


class Builder:
    """Appends operators to those of a network."""

    def __init__(self, network: Network) -> None:
        self.precision: Precision = network.precision
        self.operators = list(network.operators)
        tensors = [*network.inputs, *(tensor for operator in network.operators for tensor in operator.results)]
        self._next = max(tensor.number for tensor in tensors) + 1

    def tensor(self, shape: Sequence[int]) -> Tensor:
        """Return a new tensor."""
        self._next += 1
        return Tensor(self._next - 1, tuple(shape))

    def results(
        self, kind: str, operands: Sequence[Operand], shapes: Sequence[Sequence[int]], **attributes: Attribute
    ) -> list[Tensor]:
        """Append an operator and return its results.

        Args:
            kind: of the operator.
            operands: tensors and constants.
            shapes: of the results, without the batch axis.
            attributes: all that the operator has.
        """
        made = tuple(self.tensor(shape) for shape in shapes)
        self.operators.append(Operator(kind, tuple(operands), tuple(sorted(attributes.items())), made))
        return list(made)

    def one(self, kind: str, operands: Sequence[Operand], shape: Sequence[int], **attributes: Attribute) -> Tensor:
        """Append an operator with a single result, and return it.

        Args:
            kind: of the operator.
            operands: tensors and constants.
            shape: of the result.
            attributes: all that the operator has.
        """
        return self.results(kind, operands, [shape], **attributes)[0]

    def number(self, value: float | np.ndarray) -> Constant:
        """Return a constant of the network's precision."""
        return Constant(np.asarray(value, self.precision))

    def indices(self, *numbers: int) -> Constant:
        """Return a constant of integers."""
        return Constant(np.array(numbers, np.int64))

    def add(self, left: Tensor | None, right: Tensor | None) -> Tensor | None:
        """Return the sum; null stands for zero."""
        if left is None or right is None:
            return left if right is None else right
        return self.one("Add", [left, right], left.shape)

    def times(self, x: Tensor, y: Tensor | Constant) -> Tensor:
        """Return the elementwise product, of the shape of `x`."""
        return self.one("Mul", [x, y], x.shape)

    def where(self, mask: Operand, yes: Operand, no: Operand, shape: Shape) -> Tensor:
        """Return elements of two operands by a mask.

        Args:
            mask: of booleans.
            yes: taken where it is true.
            no: taken elsewhere.
            shape: of the result.
        """
        return self.one("Where", [mask, yes, no], shape)

    def compare(self, kind: str, left: Tensor, right: Tensor | Constant) -> Tensor:
        """Return a mask of the shape of `left`.

        Args:
            kind: of the comparison.
            left: its first operand.
            right: its second operand.
        """
        return self.one(kind, [left, right], left.shape)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a tensor in another shape of as many elements."""
        if tuple(shape) == x.shape:
            return x
        return self.one("Reshape", [x, self.indices(0, *shape)], shape, allowzero=0)

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Return a tensor with its own axes, the batch axis not counted, in another order."""
        if list(axes) == list(range(len(axes))):
            return x
        return self.one("Transpose", [x], [x.shape[axis] for axis in axes], perm=(0, *(axis + 1 for axis in axes)))

    def reduced(self, kind: str, x: Tensor, axes: Sequence[int], keep: bool = True) -> Tensor:
        """Return a reduction.

        Args:
            kind: of the reduction.
            x: its operand.
            axes: of the image's shape.
            keep: whether they stay with length 1.
        """
        shape = [1 if axis in axes else n for axis, n in enumerate(x.shape) if keep or axis not in axes]
        stated = self.indices(*(axis + 1 for axis in sorted(axes)))
        return self.one(kind, [x, stated], shape, keepdims=int(keep), noop_with_empty_axes=0)

    def expanded(self, x: Tensor, shape: Shape) -> Tensor:
        """Return a tensor broadcast to a shape of the same rank."""
        return x if x.shape == shape else self.one("Expand", [x, self.indices(1, *shape)], shape)

    def summed_to(self, x: Tensor, shape: Shape) -> Tensor:
        """Return the adjoint of broadcasting: the sum over axes along which a tensor of `shape` was repeated."""
        axes = [axis for axis, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if n != m]
        return self.reduced("ReduceSum", x, axes) if axes else x

    def zeros_like(self, x: Tensor) -> Tensor:
        """Return zeros of the shape of a tensor, for each image."""
        return self.times(x, self.number(0.0))

    def scattered(self, g: Tensor, axis: int, positions: np.ndarray, length: int) -> Tensor:
        """Return the adjoint of picking along an axis: each element the sum of the `g` at which it was picked.

        Args:
            g: of the shape of the picked tensor.
            axis: along which was picked.
            positions: picked, one-dimensional; -1 where a constant stands.
            length: of the axis that was picked from.
        """
        n = g.shape[axis]
        picked_at = np.flatnonzero(positions >= 0)
        sources = positions[picked_at]
        order = np.argsort(sources, kind="stable")
        counts = np.bincount(sources, minlength=length)
        most = max(1, int(counts.max(initial=0)))
        table = np.full((length, most), n, np.int64)
        # The k-th use of each source goes to column k.
        rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        table[sources[order], rank] = picked_at[order]
        if (table == n).any():
            pads = [0] * (2 * (len(g.shape) + 1))
            pads[len(g.shape) + 1 + axis + 1] = 1
            shape = [size + (1 if index == axis else 0) for index, size in enumerate(g.shape)]
            g = self.one("Pad", [g, self.indices(*pads), self.number(0.0)], shape, mode="constant")
        before, after = g.shape[:axis], g.shape[axis + 1 :]
        if most == 1:
            return self.one("Gather", [g, Constant(table[:, 0])], (*before, length, *after), axis=axis + 1)
        picked = self.one("Gather", [g, Constant(table)], (*before, length, most, *after), axis=axis + 1)
        return self.reduced("ReduceSum", picked, [axis + 1], keep=False)


Cotangents = Sequence[Tensor | None]
"""Gradients with respect to the results of an operator, or to its operands; null for zero."""
Pullback = Callable[[Builder, Operator, Cotangents], Cotangents]
PULLBACKS: dict[str, Pullback] = {}


def pulls_back(*kinds: str) -> Callable[[Pullback], Pullback]:
    """Register the pullback of operators."""

    def register(function: Pullback) -> Pullback:
        PULLBACKS.update(dict.fromkeys(kinds, function))
        return function

    return register


def tensor_of(operator: Operator, position: int = 0) -> Tensor:
    """Return an operand that is a tensor.

    Raises:
        TypeError: it is no tensor.
    """
    operand = operator.operands[position]
    if not isinstance(operand, Tensor):
        raise TypeError(f"{operator.label or operator.kind}: operand {position} is no tensor")
    return operand


def constant_of(operator: Operator, position: int) -> np.ndarray:
    """Return the array of an operand that is a constant.

    Raises:
        TypeError: it is no constant.
    """
    operand = operator.operands[position]
    if not isinstance(operand, Constant):
        raise TypeError(f"{operator.label or operator.kind}: operand {position} is no constant")
    return operand.array


def size_of(shape: Shape) -> int:
    """Return the number of elements of one image's tensor."""
    return math.prod(shape)
