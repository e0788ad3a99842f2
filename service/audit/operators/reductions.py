"""Sums, means, extrema and L2 norms along axes."""

from __future__ import annotations

import math

import numpy as np
from flint import arb

from service.audit.affine import linear
from service.audit.balls import NotAuditableError, root, upper
from service.audit.graph import Node
from service.audit.maps import Shared, ball_weights, exact_weights
from service.audit.network import Facts, Network, Tensor
from service.audit.nonexpansive import each, each_group, largest_of, smallest_of, sorted_pairs
from service.audit.operators.table import Operands, image_axis, is_given, rule, tensor


def reduced(node: Node, operands: Operands, x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the groups that are reduced, one a row, and the shape of the result.

    Args:
        node: its axes and `keepdims`.
        operands: the second one has the axes in later opsets.
        x: the tensor.

    Raises:
        NotAuditableError: no axes, or axes that are no constants.
    """
    if is_given(operands, 1):
        operand = operands[1]
        if not isinstance(operand, np.ndarray) or operand.dtype.kind not in "iu":
            raise NotAuditableError("the axes must be constant integers")
        axes = [int(axis) for axis in operand.ravel()]
    else:
        named = node.attributes.get("axes", [])
        axes = [int(axis) for axis in named] if isinstance(named, list) else []
    if not axes:
        raise NotAuditableError("it names no axes, so that it would reduce the batch too")
    gone = sorted({image_axis(axis, x) for axis in axes})
    stay = [axis for axis in range(len(x.shape)) if axis not in gone]
    groups = np.transpose(x.ids, stay + gone).reshape(math.prod(x.shape[axis] for axis in stay), -1)
    keep = node.integer("keepdims", 1)
    shape = [1 if axis in gone else size for axis, size in enumerate(x.shape) if keep or axis not in gone]
    return groups, tuple(shape)


REDUCE_ATTRIBUTES = ("axes", "keepdims", "noop_with_empty_axes")


def sums(network: Network, groups: np.ndarray, mean: bool) -> np.ndarray:
    """Append the sum of each group; return the identities.

    Args:
        network: the layers so far.
        groups: one a row.
        mean: whether the mean is wanted.
    """
    n = groups.shape[1]
    shares = ball_weights([arb(1) / n] * n, 1) if mean else exact_weights(np.ones((1, n)))
    operator = Shared(shares, np.arange(groups.size).reshape(groups.shape), groups.size)
    return linear(network, groups.ravel(), operator, n + 1)


@rule("ReduceSum", "ReduceMean", attributes=REDUCE_ATTRIBUTES)
def _reduce_sum(network: Network, node: Node, operands: Operands) -> Tensor:
    groups, shape = reduced(node, operands, tensor(operands))
    return Tensor(sums(network, groups, node.operator == "ReduceMean").reshape(shape))


@rule("ReduceL1", attributes=REDUCE_ATTRIBUTES)
def _reduce_l1(network: Network, node: Node, operands: Operands) -> Tensor:
    groups, shape = reduced(node, operands, tensor(operands))
    return Tensor(sums(network, each(network, groups, abs), mean=False).reshape(shape))


@rule("ReduceMax", "ReduceMin", attributes=REDUCE_ATTRIBUTES)
def _reduce_max(network: Network, node: Node, operands: Operands) -> Tensor:
    groups, shape = reduced(node, operands, tensor(operands))
    largest = node.operator == "ReduceMax"
    if groups.shape[1] == 2:
        return Tensor(sorted_pairs(network, groups[:, 0], groups[:, 1], largest).reshape(shape))
    return Tensor(each_group(network, groups, largest_of if largest else smallest_of).reshape(shape))


@rule("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(network: Network, node: Node, operands: Operands) -> Tensor:
    x = tensor(operands)
    groups = x.ids.reshape(x.shape[0], -1)
    average = node.operator == "GlobalAveragePool"
    made = sums(network, groups, mean=True) if average else each_group(network, groups, largest_of)
    return Tensor(made.reshape(x.shape[0], *[1] * (len(x.shape) - 1)))


def _euclidean(values: list[arb]) -> list[arb]:
    total = sum((value * value for value in values), arb(0))
    low, high = total.lower(), total.upper()
    return [(low.sqrt() if low > 0 else arb(0)).union(high.sqrt())]


@rule("ReduceL2", attributes=REDUCE_ATTRIBUTES)
def _reduce_l2(network: Network, node: Node, operands: Operands) -> Tensor:
    groups, shape = reduced(node, operands, tensor(operands))
    n = groups.shape[1]
    facts = network.facts(groups)
    network.require_no_overflow(upper(arb(n) * facts.largest * facts.largest))

    def rounding(bounds: Facts) -> arb:
        # n squares, their sum and the root; squares that underflow shift the root by at most sqrt(n tiny).
        lost = network.format.gamma(n + 2) * bounds.computed
        return upper(lost + root(arb(2 * (n + 1)) * network.format.tiny) * root(arb(len(groups))))

    return Tensor(each_group(network, groups, _euclidean, rounding).reshape(shape))
