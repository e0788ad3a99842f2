"""TODO: service/certificate/rules/reductions.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from service.certificate.graph import Node
from service.certificate.rounding import add_up, div_up, mul_up, sqrt_up
from service.certificate.rules.operands import (
    Array,
    Operands,
    Refusal,
    data_operand,
    flag_attribute,
    image_axis,
    integer_operand,
    optional_operand,
)
from service.certificate.rules.piecewise import absolute, half_of, sorted_pair
from service.certificate.rules.table import (
    Context,
    linear_result,
    rule,
)
from service.certificate.values import (
    Value,
    View,
)


def _reduced_axes(node: Node, inputs: Operands, view: View) -> tuple[tuple[int, ...], bool]:
    """Axes (of the image's own shape) and whether they are kept."""
    axes_value = optional_operand(inputs, 1)
    attribute = node.attributes.get("axes")
    if axes_value is not None:
        axes = integer_operand(axes_value, "the axes")
    elif isinstance(attribute, (list, tuple)):
        axes = [int(axis) for axis in attribute]  # type: ignore[reportUnknownVariableType]
    else:
        axes = []
    if not axes:
        raise Refusal("it names no axes, so that it would reduce the batch too")
    resolved = tuple(sorted({image_axis(axis, view) for axis in axes}))
    return resolved, flag_attribute(node, "keepdims", 1)


def grouped_axes(node: Node, inputs: Operands, view: View) -> tuple[View, tuple[int, ...], bool]:
    """The view with the axes that the node reduces moved to the end and made one; these axes; whether to keep them."""
    axes, keep = _reduced_axes(node, inputs, view)
    kept = [axis for axis in range(len(view.shape)) if axis not in axes]
    moved = np.transpose(view.index, kept + list(axes))
    return view.rearranged(moved.reshape([view.shape[axis] for axis in kept] + [-1])), axes, keep


def with_axes(view: View, axes: tuple[int, ...], keep: bool) -> View:
    return view.rearranged(np.expand_dims(view.index, axes)) if keep else view


_REDUCE_ATTRIBUTES = ("axes", "keepdims", "noop_with_empty_axes")


@rule("ReduceSum", "ReduceMean", attributes=_REDUCE_ATTRIBUTES)
def reduce_linear(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Sum over disjoint groups of n: norm sqrt(n) (Cauchy-Schwarz); the mean: 1 / sqrt(n)."""
    view = data_operand(inputs[0])
    grouped, axes, keep = grouped_axes(node, inputs, view)
    n = grouped.shape[-1]
    facts = context.domain.joint(grouped)
    mean = node.operator == "ReduceMean"
    root = sqrt_up(float(n))
    # 1 / sqrt(n) rounded up: 1 over a lower bound of the root.
    norm = (div_up(root, float(n)) if n > 1 else 1.0) if mean else root
    context.no_overflow(mul_up(float(n), facts.largest))

    def apply(stack: Array) -> Array:
        return np.asarray(stack.mean(axis=-1) if mean else stack.sum(axis=-1))

    result = linear_result(
        context, grouped, apply, None, norm=norm, spread=norm, row_norm=norm, terms=n + 1, tight=True, mean=mean
    )
    return [with_axes(result, axes, keep)]


# --- nonlinear operators that never expand ----------------------------------------------------------------------------


@rule("ReduceL1", attributes=_REDUCE_ATTRIBUTES)
def reduce_l1(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Sum of absolute values of disjoint groups of n: sqrt(n) (Cauchy-Schwarz)."""
    (positive,) = absolute(context, node, inputs[:1])
    return reduce_linear(context, replace(node, operator="ReduceSum"), [positive, *inputs[1:]])


@rule("ReduceL2", attributes=_REDUCE_ATTRIBUTES)
def reduce_l2(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """L2 norm of disjoint groups: 1-Lipschitz (reverse triangle inequality in each group)."""
    view = data_operand(inputs[0])
    grouped, axes, keep = grouped_axes(node, inputs, view)
    n = grouped.shape[-1]
    facts = context.domain.joint(grouped)
    context.no_overflow(mul_up(float(n), facts.largest, facts.largest))
    center = np.sqrt(np.square(grouped.center).sum(axis=-1))
    # A relative gamma_{n+2} (squares, sum, root); squares that underflow shift the root by at most sqrt(n tiny).
    tiny = sqrt_up(mul_up(2.0 * (n + 1), context.precision.smallest_normal))
    rounding = mul_up(context.gamma(n + 2), add_up(facts.norm, facts.error))
    error = add_up(facts.error, rounding, mul_up(tiny, sqrt_up(float(center.size))))
    return [with_axes(context.source(center, facts.lipschitz, error), axes, keep)]


@rule("ReduceMax", "ReduceMin", attributes=_REDUCE_ATTRIBUTES)
def reduce_max(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Largest (smallest) of disjoint groups: 1-Lipschitz, and exact; of pairs: half of the sorted pair."""
    view = data_operand(inputs[0])
    grouped, axes, keep = grouped_axes(node, inputs, view)
    largest = node.operator == "ReduceMax"
    if grouped.shape[-1] == 2:
        left, right = (grouped.rearranged(grouped.index[..., half]) for half in (0, 1))
        return [with_axes(half_of(sorted_pair(context, left, right), 0 if largest else 1), axes, keep)]
    facts = context.domain.joint(grouped)
    center = grouped.center.max(axis=-1) if largest else grouped.center.min(axis=-1)
    return [with_axes(context.source(center, facts.lipschitz, facts.error, view.source.error_max), axes, keep)]
