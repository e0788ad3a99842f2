"""Rules of reductions: sums, means, norms and maxima over groups of axes. Notation as in `table`."""

from dataclasses import replace

import numpy as np

from service.certificate.facts import LocalError
from service.certificate.rounding import mul_up, sqrt_up
from service.certificate.rules.linear import LinearMap, linear_result, mean_norm
from service.certificate.rules.operands import (
    Array,
    Operands,
    data_operand,
    integer_operand,
)
from service.certificate.rules.piecewise import absolute, sorted_pair
from service.certificate.rules.table import Context, rule
from service.certificate.values import Value, View
from service.network.operators import Operator

REDUCE_ATTRIBUTES = ("keepdims", "noop_with_empty_axes")


def grouped_axes(node: Operator, inputs: Operands, view: View) -> tuple[View, tuple[int, ...], bool]:
    """Return the view with all reduced axes as one last axis, these axes, and whether they stay with length 1.

    Args:
        node: the reduction.
        inputs: its operands; the second one names the axes.
        view: the first operand.
    """
    axes = tuple(axis - 1 for axis in integer_operand(inputs[1], "the axes"))
    keep = node.integer("keepdims") == 1
    others = [axis for axis in range(len(view.shape)) if axis not in axes]
    moved = np.transpose(view.index, others + list(axes))
    return view.rearranged(moved.reshape([view.shape[axis] for axis in others] + [-1])), axes, keep


def with_axes(view: View, axes: tuple[int, ...], keep: bool) -> View:
    """Return a reduced view as ONNX shapes it.

    Args:
        view: the result without the reduced axes.
        axes: the reduced axes.
        keep: whether they stay with length 1.
    """
    return view.rearranged(np.expand_dims(view.index, axes)) if keep else view


@rule("ReduceSum", "ReduceMean", attributes=REDUCE_ATTRIBUTES)
def reduce_linear(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Sum over disjoint groups of n: norm sqrt(n) (Cauchy-Schwarz); the mean: 1 / sqrt(n).

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    grouped, axes, keep = grouped_axes(node, inputs, view)
    n = grouped.shape[-1]
    mean = node.kind == "ReduceMean"
    norm = mean_norm(n) if mean else sqrt_up(float(n))
    context.no_overflow(mul_up(float(n), context.domain.joint(grouped).largest))

    def apply(stack: Array) -> Array:
        return np.asarray(stack.mean(axis=-1) if mean else stack.sum(axis=-1))

    total = LinearMap(apply, norm=norm, spread=norm, row_norm=norm, terms=n + 1, tight=True, mean=mean)
    return [with_axes(linear_result(context, grouped, total), axes, keep)]


@rule("ReduceL1", attributes=REDUCE_ATTRIBUTES)
def reduce_l1(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Sum of absolute values of disjoint groups of n: sqrt(n) (Cauchy-Schwarz).

    Args: see `Rule`.
    """
    (positive,) = absolute(context, node, inputs[:1])
    return reduce_linear(context, replace(node, kind="ReduceSum"), [positive, *inputs[1:]])


@rule("ReduceL2", attributes=REDUCE_ATTRIBUTES)
def reduce_l2(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """L2 norm of disjoint groups: 1-Lipschitz (reverse triangle inequality in each group).

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    grouped, axes, keep = grouped_axes(node, inputs, view)
    n = grouped.shape[-1]
    facts = context.domain.joint(grouped)
    context.no_overflow(mul_up(float(n), facts.largest, facts.largest))
    center = np.sqrt(np.square(grouped.center).sum(axis=-1))
    # A relative gamma_{n+2} (squares, sum, root); squares that underflow shift the root by at most sqrt(n tiny).
    tiny = sqrt_up(mul_up(2.0 * (n + 1), context.precision.smallest_normal))
    rounding = LocalError(mul_up(context.gamma(n + 2), facts.computed_norm))
    underflow = LocalError.of_each(tiny, center.size)
    return [with_axes(context.source(center, facts.plus(rounding, underflow)), axes, keep)]


@rule("ReduceMax", "ReduceMin", attributes=REDUCE_ATTRIBUTES)
def reduce_max(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Largest (smallest) of disjoint groups: 1-Lipschitz, and exact; of pairs: half of the sorted pair.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    grouped, axes, keep = grouped_axes(node, inputs, view)
    largest = node.kind == "ReduceMax"
    if grouped.shape[-1] == 2:
        left, right = (grouped.rearranged(grouped.index[..., half]) for half in (0, 1))
        larger, smaller = sorted_pair(context, left, right)
        return [with_axes(larger if largest else smaller, axes, keep)]
    center = grouped.center.max(axis=-1) if largest else grouped.center.min(axis=-1)
    return [with_axes(context.source(center, context.domain.joint(grouped)), axes, keep)]
