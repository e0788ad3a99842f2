"""TODO: service/certificate/rules/piecewise.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from service.certificate.graph import Node
from service.certificate.rounding import add_up
from service.certificate.rules.operands import (
    Operands,
    Refusal,
    broadcast_constant,
    data_operand,
    flag_attribute,
    float_attribute,
    float_operand,
    image_axis,
    int_attribute,
    integer_operand,
    optional_operand,
)
from service.certificate.rules.table import (
    Context,
    rounding_of,
    rule,
    scaling_step,
)
from service.certificate.values import (
    Part,
    Slopes,
    Source,
    Unknown,
    Value,
    View,
    identity_of,
)


def sorted_pair(context: Context, left: View, right: View) -> Source:
    """`(a, b) -> (max(a, b), min(a, b))`, elementwise: 1-Lipschitz as one map, and exact.

    Both of its halves, however the graph computes them, are views of this one source, so that their concatenation
    costs what the pair costs, not sqrt(2) of it.
    """
    key = frozenset({identity_of(left), identity_of(right)})
    if key not in context.sorted_pairs:
        facts = context.domain.joint(left, right)
        center = np.stack([np.maximum(left.center, right.center), np.minimum(left.center, right.center)])
        error_max = max(left.source.error_max, right.source.error_max)
        context.sorted_pairs[key] = context.source(center, facts.lipschitz, facts.error, error_max).source
    return context.sorted_pairs[key]


def half_of(source: Source, which: int) -> View:
    size = source.center[0].size
    return View(source, np.arange(which * size, (which + 1) * size).reshape(source.center.shape[1:]))


@rule("Max", "Min")
def max_min(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Sorting a pair never expands (rearrangement inequality); max and min are its two halves. Exact."""
    if len(inputs) != 2:
        return [_largest_of_many(context, node, inputs)]
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        if left.shape != right.shape:
            raise Refusal(f"tensors of shapes {left.shape} and {right.shape}; the rule covers equal shapes")
        if identity_of(left) == identity_of(right):
            return [left]
        return [half_of(sorted_pair(context, left, right), 0 if node.operator == "Max" else 1)]
    view = data_operand(left if isinstance(left, View) else right)
    constant = float_operand(right if isinstance(left, View) else left, "the other operand")
    constant, view = broadcast_constant(constant, view)
    clip = np.maximum if node.operator == "Max" else np.minimum
    facts = context.domain.joint(view)
    return [context.source(clip(view.center, constant), facts.lipschitz, facts.error, view.source.error_max)]


def _largest_of_many(context: Context, node: Node, inputs: Operands) -> View:
    """`|max_i a_i - max_i b_i| <= max_i |a_i - b_i|`, elementwise; constants among the operands do not move. Exact."""
    views = [value for value in inputs if isinstance(value, View)]
    if any(view.shape != views[0].shape for view in views):
        raise Refusal("tensors of different shapes; the rule covers equal ones")
    stack = [view.center for view in views]
    for value in inputs:
        if not isinstance(value, View):
            constant, spread = broadcast_constant(float_operand(value, "every other operand"), views[0])
            if spread.shape != views[0].shape:
                raise Refusal("a constant larger than the tensors")
            stack.append(constant)
    center = np.max(stack, axis=0) if node.operator == "Max" else np.min(stack, axis=0)
    facts = context.domain.joint(*views)
    return context.source(center, facts.lipschitz, facts.error, max(view.source.error_max for view in views))


@rule("TopK", attributes=("axis", "largest", "sorted"))
def top_k(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Sorting never expands (rearrangement inequality), nor does keeping the first k of the result. Exact."""
    view = data_operand(inputs[0])
    (k,) = integer_operand(inputs[1], "k")
    axis = image_axis(int_attribute(node, "axis", -1), view)
    if not flag_attribute(node, "sorted", 1):
        raise Refusal("sorted=0 leaves the order open")
    facts = context.domain.joint(view)
    ordered = np.sort(view.center, axis=axis)
    if flag_attribute(node, "largest", 1):
        ordered = np.flip(ordered, axis=axis)
    kept = np.take(ordered, np.arange(k), axis=axis)
    values = context.source(kept, facts.lipschitz, facts.error, view.source.error_max)
    return [values, Unknown("the indices of a sort jump and have no Lipschitz constant")]


@rule("Relu")
def relu(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Positive part: 1-Lipschitz, and exact; together with the negative part of the same tensor, too."""
    view = data_operand(inputs[0])
    facts = context.domain.joint(view)
    of, negative = view, False
    step = view.source.step
    if step is not None and step.negates and (view.index >= 0).all():
        of, negative = step.operands[0].rearranged(step.operands[0].index.ravel()[view.index]), True
    return [
        context.source(
            np.maximum(view.center, 0.0),
            facts.lipschitz,
            facts.error,
            view.source.error_max,
            slopes=Slopes(view, 0.0, 1.0),
            part=Part(identity_of(of), negative),
        )
    ]


@rule("Abs")
def absolute(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Elementwise of slope at most 1: 1-Lipschitz, and exact."""
    view = data_operand(inputs[0])
    facts = context.domain.joint(view)
    return [context.source(np.abs(view.center), facts.lipschitz, facts.error, view.source.error_max)]


@rule("LeakyRelu", attributes=("alpha",))
def leaky_relu(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Elementwise of slopes 1 and alpha: max(1, |alpha|)-Lipschitz; one rounding of the negative side."""
    view = data_operand(inputs[0])
    alpha = float_attribute(node, "alpha", 0.01)
    factor = max(1.0, abs(alpha))
    facts = context.domain.joint(view)
    scaled = facts.scaled(factor)
    context.no_overflow(scaled.largest)
    rounding, _ = rounding_of(context, scaled, view.index.size)
    center = np.where(view.center >= 0.0, view.center, alpha * view.center)
    slopes = Slopes(view, min(alpha, 1.0), factor)
    return [context.source(center, scaled.lipschitz, add_up(scaled.error, rounding), slopes=slopes)]


@rule("Neg")
def negate(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Change of sign: an isometry, and exact."""
    view = data_operand(inputs[0])
    facts = context.domain.joint(view)
    step = replace(scaling_step(view, -1.0), negates=True)
    return [context.source(-view.center, facts.lipschitz, facts.error, view.source.error_max, step=step)]


@rule("Clip")
def clip(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Projection on an interval: 1-Lipschitz, and exact."""
    view = data_operand(inputs[0])
    low_value, high_value = optional_operand(inputs, 1), optional_operand(inputs, 2)
    low = float(float_operand(low_value, "the lower limit").reshape(())) if low_value is not None else -math.inf
    high = float(float_operand(high_value, "the upper limit").reshape(())) if high_value is not None else math.inf
    facts = context.domain.joint(view)
    center = np.minimum(np.maximum(view.center, low), high)
    return [context.source(center, facts.lipschitz, facts.error, view.source.error_max)]
