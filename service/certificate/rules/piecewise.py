"""Rules of piecewise linear activations, maxima and sorts: 1-Lipschitz and exact, mostly. Notation as in `table`."""

import math
from dataclasses import replace

import numpy as np

from service.certificate.facts import LocalError
from service.certificate.rules.linear import scaling_step
from service.certificate.rules.operands import (
    Operands,
    broadcast_constant,
    data_operand,
    float_operand,
    integer_operand,
    optional_operand,
)
from service.certificate.rules.table import Context, rule
from service.certificate.values import Part, Slopes, Unknown, Value, View, identity_of
from service.network.operators import Operator, Refusal


def sorted_pair(context: Context, left: View, right: View) -> tuple[View, View]:
    """Return `max(a, b)` and `min(a, b)`, elementwise: 1-Lipschitz as one map, and exact.

    Both are views of one source, in whatever order a graph computes them, so that their concatenation costs as much as
    the pair, not sqrt(2) of it.

    Args:
        context: of this analysis.
        left: a.
        right: b, of the same shape.
    """
    key = frozenset({identity_of(left), identity_of(right)})
    if key not in context.sorted_pairs:
        center = np.stack([np.maximum(left.center, right.center), np.minimum(left.center, right.center)])
        context.sorted_pairs[key] = context.source(center, context.domain.joint(left, right)).source
    source = context.sorted_pairs[key]
    larger, smaller = np.split(np.arange(source.center.size), 2)
    return View(source, larger.reshape(left.shape)), View(source, smaller.reshape(left.shape))


@rule("Max", "Min")
def max_min(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Sorting a pair never expands (rearrangement inequality); max and min are its two halves. Exact.

    Args: see `Rule`.

    Raises:
        Refusal: the tensors have different shapes.
    """
    if len(inputs) != 2:
        return [_largest_of_many(context, node, inputs)]
    left, right = inputs[0], inputs[1]
    largest = node.kind == "Max"
    if isinstance(left, View) and isinstance(right, View):
        if left.shape != right.shape:
            raise Refusal(f"tensors of shapes {left.shape} and {right.shape}; the rule covers equal shapes")
        if identity_of(left) == identity_of(right):
            return [left]
        larger, smaller = sorted_pair(context, left, right)
        return [larger if largest else smaller]
    view = data_operand(left if isinstance(left, View) else right)
    constant = float_operand(right if isinstance(left, View) else left, "the other operand")
    constant, view = broadcast_constant(constant, view)
    clipped = np.maximum(view.center, constant) if largest else np.minimum(view.center, constant)
    return [context.source(clipped, context.domain.joint(view))]


def _largest_of_many(context: Context, node: Operator, inputs: Operands) -> View:
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
    center = np.max(stack, axis=0) if node.kind == "Max" else np.min(stack, axis=0)
    return context.source(center, context.domain.joint(*views))


@rule("TopK", attributes=("axis", "largest", "sorted"))
def top_k(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Sorting never expands (rearrangement inequality), nor does keeping the first k of the result. Exact.

    Args: see `Rule`.

    Raises:
        Refusal: the order is left open.
    """
    view = data_operand(inputs[0])
    (k,) = integer_operand(inputs[1], "k")
    axis = node.integer("axis") - 1
    if not node.integer("sorted"):
        raise Refusal("sorted=0 leaves the order open")
    ordered = np.sort(view.center, axis=axis)
    if node.integer("largest"):
        ordered = np.flip(ordered, axis=axis)
    first = np.take(ordered, np.arange(k), axis=axis)
    values = context.source(first, context.domain.joint(view))
    return [values, Unknown("the indices of a sort jump and have no Lipschitz constant")]


@rule("Relu")
def relu(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Positive part: 1-Lipschitz, and exact; together with the negative part of the same tensor, too.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    of, negative = view, False
    step = view.source.step
    if step is not None and step.negates and (view.index >= 0).all():
        of, negative = step.operands[0].rearranged(step.operands[0].index.ravel()[view.index]), True
    slopes, part = Slopes(view, 0.0, 1.0), Part(identity_of(of), negative)
    return [context.source(np.maximum(view.center, 0.0), context.domain.joint(view), slopes=slopes, part=part)]


@rule("Abs")
def absolute(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Elementwise of slope at most 1: 1-Lipschitz, and exact.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    return [context.source(np.abs(view.center), context.domain.joint(view))]


@rule("Neg")
def negate(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Change of sign: an isometry, and exact.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    step = replace(scaling_step(view, -1.0), negates=True)
    return [context.source(-view.center, context.domain.joint(view), step=step)]


@rule("Clip")
def clip(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Projection on an interval: 1-Lipschitz, and exact.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    low_value, high_value = optional_operand(inputs, 1), optional_operand(inputs, 2)
    low = float(float_operand(low_value, "the lower limit").reshape(())) if low_value is not None else -math.inf
    high = float(float_operand(high_value, "the upper limit").reshape(())) if high_value is not None else math.inf
    return [context.source(np.minimum(np.maximum(view.center, low), high), context.domain.joint(view))]


@rule("LeakyRelu", attributes=("alpha",))
def leaky_relu(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Elementwise of slopes 1 and alpha: max(1, |alpha|)-Lipschitz; one rounding of the negative side.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    alpha = node.number("alpha")
    factor = max(1.0, abs(alpha))
    scaled = context.domain.joint(view).scaled(factor)
    context.no_overflow(scaled.largest)
    rounding = LocalError(context.one_rounding(scaled, view.index.size).l2)
    center = np.where(view.center >= 0.0, view.center, alpha * view.center)
    return [context.source(center, scaled.plus(rounding), slopes=Slopes(view, min(alpha, 1.0), factor))]


@rule("PRelu")
def prelu(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Elementwise of slopes 1 and c, c constant: max(1, |c|)-Lipschitz; one rounding of the negative side.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    below, _ = broadcast_constant(float_operand(inputs[1], "the slope"), view)
    factor = max(1.0, float(np.max(np.abs(below), initial=0.0)))
    scaled = context.domain.joint(view).scaled(factor)
    context.no_overflow(scaled.largest)
    rounding = context.one_rounding(scaled, view.index.size)
    center = np.where(view.center >= 0.0, view.center, below * view.center)
    slopes = Slopes(view, min(1.0, float(np.min(below, initial=1.0))), factor)
    return [context.source(center, scaled.plus(rounding), slopes=slopes)]
