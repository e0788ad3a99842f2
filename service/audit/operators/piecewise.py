"""Piecewise linear functions: sorts, maxima, minima, rectifiers."""

from __future__ import annotations

import itertools

import numpy as np
from flint import arb

from service.audit.balls import NotAuditableError, larger, largest_magnitude, upper
from service.audit.expressions import Elementary, clip, compose
from service.audit.functions import extended
from service.audit.graph import Node
from service.audit.network import Network, Tensor
from service.audit.nonexpansive import each, each_group, largest_of, rectified, smallest_of, sorted_pairs, varied
from service.audit.operators.table import Operands, balls, broadcast, floats, image_axis, is_given, rule, tensor
from service.audit.origins import Rising


class _Ordered:
    """Sort key of exact numbers."""

    def __init__(self, value: arb) -> None:
        self.value = value

    def __lt__(self, other: _Ordered) -> bool:
        return bool(self.value < other.value)


@rule("TopK", attributes=("axis", "largest", "sorted"))
def _top_k(network: Network, node: Node, operands: Operands) -> Tensor:
    x = tensor(operands)
    operand = operands[1]
    if not isinstance(operand, np.ndarray) or operand.size != 1 or not node.integer("sorted", 1):
        raise NotAuditableError("k must be a constant, and the result sorted")
    axis, k = image_axis(node.integer("axis", -1), x), int(operand.ravel()[0])
    moved = np.moveaxis(x.ids, axis, -1)
    if not 1 <= k <= moved.shape[-1]:
        raise NotAuditableError(f"k = {k} of {moved.shape[-1]}")
    descending = bool(node.integer("largest", 1))

    def ordered(values: list[arb]) -> list[arb]:
        # The i-th of the true numbers lies between the i-th of the lower and the i-th of the upper ends.
        lows = sorted((value.lower() for value in values), key=_Ordered, reverse=descending)
        highs = sorted((value.upper() for value in values), key=_Ordered, reverse=descending)
        return [low.union(high) for low, high in zip(lows, highs, strict=True)][:k]

    made = each_group(network, moved.reshape(-1, moved.shape[-1]), ordered)
    return Tensor(np.moveaxis(made.reshape(*moved.shape[:-1], k), -1, axis))


@rule("Max", "Min")
def _max(network: Network, node: Node, operands: Operands) -> Tensor:
    largest = node.operator == "Max"
    if len(operands) == 1:
        return tensor(operands)
    if len(operands) > 2:
        terms = [tensor(operands, k) for k in range(len(operands))]
        if len({term.shape for term in terms}) > 1:
            raise NotAuditableError("more than two operands of different shapes")
        groups = np.stack([term.flat for term in terms], axis=1)
        chosen = each_group(network, groups, largest_of if largest else smallest_of)
        return Tensor(chosen.reshape(terms[0].shape))
    left, right = operands
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.shape != right.shape:
            raise NotAuditableError("operands of different shape")
        return Tensor(sorted_pairs(network, left.flat, right.flat, largest).reshape(left.shape))
    first = isinstance(left, Tensor)
    ids, constant = broadcast(tensor(operands, int(not first)), floats(operands, int(first)))
    limits = itertools.cycle(balls(constant))
    # Groups of one number each, with the constant that belongs to it.
    limited = (lambda v: [v[0].max(next(limits))]) if largest else (lambda v: [v[0].min(next(limits))])
    made = each_group(network, ids.reshape(-1, 1), limited)
    network.origins.rising[int(made[0])] = Rising(ids.ravel(), arb(1), arb(0))
    return Tensor(made.reshape(ids.shape))


@rule("Relu")
def _relu(network: Network, node: Node, operands: Operands) -> Tensor:
    x = tensor(operands)
    if network.origins.are_squares(x.ids):
        return x
    return _followed(network, x, rectified(network, x.ids), clip(arb(0), None))


@rule("Abs")
def _abs(network: Network, node: Node, operands: Operands) -> Tensor:
    x = tensor(operands)
    # Sums of squares are not negative, computed or exact.
    return x if network.origins.are_squares(x.ids) else Tensor(each(network, x.ids, abs))


@rule("LeakyRelu", attributes=("alpha",))
def _leaky_relu(network: Network, node: Node, operands: Operands) -> Tensor:
    alpha = arb(node.number("alpha", 0.01))
    slope = upper(abs(alpha).max(arb(1)))

    def leaky(value: arb) -> arb:
        return value.max(arb(0)) + alpha * value.min(arb(0))

    return Tensor(each(network, tensor(operands).ids, leaky, slope, 1, rises=bool(alpha >= 0)))


@rule("PRelu")
def _prelu(network: Network, node: Node, operands: Operands) -> Tensor:
    ids, constant = broadcast(tensor(operands), floats(operands, 1))
    slopes = balls(constant)
    factor = larger(arb(1), largest_magnitude(slopes))

    def bent(values: list[arb]) -> list[arb]:
        return [value.max(arb(0)) + slope * value.min(arb(0)) for value, slope in zip(values, slopes, strict=True)]

    return Tensor(varied(network, ids.ravel(), bent, factor, 1, rises=bool((constant >= 0.0).all())).reshape(ids.shape))


@rule("Where")
def _where(network: Network, node: Node, operands: Operands) -> Tensor:
    mask, left, right = operands[0], tensor(operands, 1), tensor(operands, 2)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise NotAuditableError("a mask that is no constant jumps")
    # The mask counts the batch axis.
    picked = np.where(mask, left.ids[None], right.ids[None])
    if len(picked) != 1 or picked.ndim != len(left.shape) + 1 or len(left.shape) != len(right.shape):
        raise NotAuditableError("operands of different rank, or a mask with its own batch axis")
    return Tensor(picked[0])


@rule("Clip")
def _clip(network: Network, node: Node, operands: Operands) -> Tensor:
    low, high = (
        arb(float(floats(operands, position).reshape(()))) if is_given(operands, position) else None
        for position in (1, 2)
    )

    x, projection = tensor(operands), clip(low, high)
    made = each(network, x.ids, lambda value: projection(value)[0], rises=True)
    # Where the limits cross, it is a constant.
    return (
        Tensor(made) if low is not None and high is not None and low > high else _followed(network, x, made, projection)
    )


def _followed(network: Network, x: Tensor, made: np.ndarray, function: Elementary) -> Tensor:
    """Return results of a function with slopes of at most 1, which does not round."""
    extended(network, made.ravel(), x.flat, lambda f: compose("outer", f, outer=function), arb(1), (arb(0), arb(0)))
    return Tensor(made)


@rule("Cast", attributes=("to", "saturate", "round_mode"))
def _cast(network: Network, node: Node, operands: Operands) -> Tensor:
    wanted = {"float64": 11, "float32": 1}[network.format.name]
    if node.integer("to", 0) != wanted:
        raise NotAuditableError("a cast of data to another format than the graph's")
    return tensor(operands)
