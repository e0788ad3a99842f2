"""One rule per ONNX operator: what it does to the Lipschitz bound and to the rounding error.

Every rule states its theorem. An operator, attribute, mode or operand without a proved rule is refused. Throughout,
`x` is the exact input of the operator, `x^` the computed one with `||x^ - x||_2 <= e`, `u` the unit roundoff of the
graph's format, `gamma_n = n u / (1 - n u)`. A sum of products of n terms, biases included, is off by at most
`gamma_n sum |w| |x^|` in any order, with or without fused multiply-add (Higham 2002, section 3.1). Underflow,
flush-to-zero included, adds at most the smallest normal number for each operation; overflow is excluded.
"""

import math
from dataclasses import replace

import numpy as np

from service.certificate.graph import Node
from service.certificate.joint import identity_convolution
from service.certificate.norms import absolute_norm_bound, row_norms_up, spectral_norm_bound
from service.certificate.rules.table import (
    Array,
    Context,
    Operands,
    Refusal,
    broadcast_constant,
    constant_shape,
    data_operand,
    diagonal_step,
    flag_attribute,
    float_attribute,
    float_operand,
    image_axis,
    int_attribute,
    integer_operand,
    joined_rounding,
    linear_result,
    optional_operand,
    rounding_of,
    rule,
    scaling_step,
)
from service.certificate.rounding import add_up, div_up, mul_up, norm_up, sqrt_up
from service.certificate.values import (
    Affine,
    Constant,
    Facts,
    LinearStep,
    Part,
    Slopes,
    Source,
    Unknown,
    Value,
    View,
    identity_of,
)

# --- linear operators -------------------------------------------------------------------------------------------------


def _dense(
    context: Context, view: View, weight_NM: Array, bias_M: Array | None, scale: float = 1.0, roundings: int = 0
) -> View:
    """`y = scale x W + b` along the last axis of `x`; the positions of the other axes are disjoint: `|scale| ||W||_2`.

    Args:
        context: of this analysis.
        view: x.
        weight_NM: W.
        bias_M: b.
        scale: of the products.
        roundings: of a product or of the bias, beside those of the sum.
    """
    n, m = weight_NM.shape
    if view.shape[-1:] != (n,):
        raise Refusal(f"the weight has {n} rows but the tensor ends with {view.shape[-1:]}")
    if m == 0 or n == 0:
        raise Refusal("the weight is empty")
    size, facts = abs(scale), context.domain.joint(view)
    row_norm = float(np.max(row_norms_up(weight_NM.T)))
    # A runtime may scale the sum, which must not overflow either, or underflow and then be scaled up.
    context.no_overflow(mul_up(row_norm, add_up(facts.norm, facts.error)))
    row_norm = mul_up(size, max(row_norm, 1.0) if size > 1.0 else row_norm)
    return linear_result(
        context,
        view,
        lambda stack: scale * (stack @ weight_NM),
        bias_M,
        norm=mul_up(size, spectral_norm_bound(weight_NM)),
        spread=mul_up(size, absolute_norm_bound(weight_NM)),
        row_norm=row_norm,
        terms=n + roundings,
        tight=True,
        product=True,
        # The size of the scale moves into the bound: scaled rows would be rounded.
        affine=Affine(weight_NM.T, mul_up(size, facts.lipschitz)) if len(view.shape) == 1 else None,
    )


@rule("Gemm", attributes=("alpha", "beta", "transA", "transB"))
def gemm(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Dense layer: ||W x - W x'|| <= ||W||_2 ||x - x'||, with a proved bound of the spectral norm."""
    view = data_operand(inputs[0], "the first operand")
    if flag_attribute(node, "transA", 0):
        raise Refusal("transA=1 would contract the batch axis")
    weight = float_operand(inputs[1], "the weight")
    if len(view.shape) != 1 or weight.ndim != 2:
        raise Refusal("Gemm needs a flat tensor N x n and a weight matrix")
    if flag_attribute(node, "transB", 0):
        weight = weight.T
    alpha, beta = float_attribute(node, "alpha", 1.0), float_attribute(node, "beta", 1.0)
    bias: Array | None = None
    bias_value = optional_operand(inputs, 2)
    if bias_value is not None:
        given = float_operand(bias_value, "the bias")
        if given.ndim == 2 and given.shape[0] == 1:
            given = given[0]
        if given.shape not in ((), (1,), (weight.shape[1],)):
            raise Refusal(f"a bias of shape {given.shape} does not fit {weight.shape[1]} outputs")
        bias = beta * np.broadcast_to(given, (weight.shape[1],))
    # A scaled sum or scaled weights, and a scaled bias.
    roundings = 0 if alpha == beta == 1.0 else 2
    return [_dense(context, view, weight, bias, alpha, roundings)]


@rule("MatMul")
def matmul(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Matrix product with a constant: block-diagonal in the other axes, so its norm is ||W||_2."""
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        raise Refusal("a product of two tensors that both depend on the image has no Lipschitz constant")
    if isinstance(left, View):
        weight = float_operand(right, "the right operand")
        if weight.ndim != 2:
            raise Refusal("the constant operand must be a matrix")
        return [_dense(context, left, weight, None)]
    view = data_operand(right, "one operand")
    weight = float_operand(left, "the left operand")
    if weight.ndim != 2 or len(view.shape) < 2:
        raise Refusal("a constant left operand must be a matrix, and the tensor N x ... x n x P")
    turned = _dense(context, view.rearranged(np.swapaxes(view.index, -1, -2)), weight.T, None)
    return [turned.rearranged(np.swapaxes(turned.index, -1, -2))]


def _shifted(context: Context, view: View, constant: Array, sign: float) -> View:
    """`sign * x + constant`: Lipschitz unchanged; one rounding of each result."""
    constant, view = broadcast_constant(constant, view)
    facts = context.domain.joint(view)
    center = sign * view.center + constant
    after = Facts(
        facts.lipschitz,
        facts.error,
        add_up(norm_up(center), facts.error, mul_up(facts.lipschitz, context.domain.radius)),
        add_up(facts.largest, float(np.max(np.abs(constant), initial=0.0))),
    )
    context.no_overflow(after.largest)
    rounding, rounding_max = rounding_of(context, after, center.size)
    joined, joined_max = joined_rounding(
        context, view, norm_up(np.ascontiguousarray(constant)), float(np.max(np.abs(constant), initial=0.0))
    )
    error_max = add_up(view.source.error_max, rounding_max, joined_max)
    source = view.source
    affine = None
    if source.affine is not None and center.ndim == 1 and (view.index >= 0).all():
        affine = Affine(sign * source.affine.rows[view.index], source.affine.lipschitz)
    step = scaling_step(view, sign)
    return context.source(center, facts.lipschitz, add_up(facts.error, rounding, joined), error_max, affine, step)


def _sum_of_branches(context: Context, left: View, right: View, sign: float) -> View:
    """`x + y` of two branches: the Lipschitz bounds add (triangle inequality); one rounding of each result."""
    if len(left.shape) != len(right.shape):
        raise Refusal(f"tensors of shapes {left.shape} and {right.shape} would broadcast across the batch")
    try:
        shape = np.broadcast_shapes(left.shape, right.shape)
    except ValueError as error:
        raise Refusal(f"shapes {left.shape} and {right.shape} do not broadcast") from error
    left = left.rearranged(np.broadcast_to(left.index, shape))
    right = right.rearranged(np.broadcast_to(right.index, shape))
    one, other = context.domain.joint(left), context.domain.joint(right)
    both = Facts(
        add_up(one.lipschitz, other.lipschitz),
        add_up(one.error, other.error),
        add_up(one.norm, other.norm),
        add_up(one.largest, other.largest),
    )
    context.no_overflow(both.largest)
    rounding, rounding_max = rounding_of(context, both, left.index.size)
    downhill = mul_up(context.joint.gradient_step(left, right, sign), one.lipschitz)
    if sign > 0.0:
        downhill = min(downhill, mul_up(context.joint.gradient_step(right, left, 1.0), other.lipschitz))
    lipschitz = context.smaller(both.lipschitz, downhill, _GRADIENT_STEP)
    if sign < 0.0 and _centres(left, right):
        lipschitz = context.smaller(lipschitz, one.lipschitz, _CENTRING)
    step = LinearStep(
        operands=(left, right),
        apply=lambda stacks: stacks[0] + sign * stacks[1],
        norm=sqrt_up(2.0),
        spread=sqrt_up(2.0),
        terms=2,
        convolutions=(identity_convolution(shape), identity_convolution(shape, sign)) if len(shape) in (2, 3) else None,
    )
    return context.source(
        left.center + sign * right.center,
        lipschitz,
        add_up(both.error, rounding),
        add_up(left.source.error_max, right.source.error_max, rounding_max),
        step=step,
    )


_GRADIENT_STEP = "x - N^T S a(N x + b), slopes of a in [0, h]: max(1, h ||sqrt(S) N||^2 - 1)."
_CENTRING = "x minus the mean of its group: an orthogonal projection."


def _centres(left: View, right: View) -> bool:
    """Whether `right` holds, beside each element of `left`, the mean of its group: `left - right` is a projection."""
    step = right.source.step
    if step is None or not step.mean or step.operands[0].source is not left.source:
        return False
    groups = step.operands[0]
    if groups.repetition > 1 or (groups.index < 0).any() or left.repetition > 1 or (left.index < 0).any():
        return False
    group_of = np.full(left.source.center.size, -1)
    group_of[groups.index] = np.arange(right.source.center.size).reshape(*groups.shape[:-1], 1)
    return bool((right.index >= 0).all() and (group_of[left.index] == right.index).all())


@rule("Add")
def add(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Sum: a constant changes no distance; the bounds of two branches add (triangle inequality)."""
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        return [_sum_of_branches(context, left, right, 1.0)]
    if isinstance(left, View):
        return [_shifted(context, left, float_operand(right, "the addend"), 1.0)]
    return [_shifted(context, data_operand(right), float_operand(left, "the addend"), 1.0)]


@rule("Sum", "Mean")
def sum_or_mean(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Sum of tensors: their bounds add (triangle inequality); the mean divides by their number."""
    total = inputs[0]
    for value in inputs[1:]:
        (total,) = add(context, node, [total, value])
    if node.operator == "Mean":
        total = _scaled(context, data_operand(total), np.full((), float(len(inputs))), divide=True)
    return [data_operand(total)]


@rule("Sub")
def subtract(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Difference: a constant changes no distance; the bounds of two branches add (triangle inequality)."""
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        return [_sum_of_branches(context, left, right, -1.0)]
    if isinstance(left, View):
        return [_shifted(context, left, np.asarray(-float_operand(right, "the subtrahend")), 1.0)]
    return [_shifted(context, data_operand(right), float_operand(left, "the minuend"), -1.0)]


def _scaled(context: Context, view: View, constant: Array, divide: bool) -> View:
    """A diagonal map: its norm is the largest factor. One rounding of each result."""
    constant, view = broadcast_constant(constant, view)
    facts = context.domain.joint(view)
    magnitude = np.abs(constant)
    if divide:
        smallest = float(np.min(magnitude))
        if smallest == 0.0:
            raise Refusal("it divides by zero")
        factor = div_up(1.0, smallest) if smallest != 1.0 else 1.0
        center = view.center / constant
    else:
        factor = float(np.max(magnitude))
        center = view.center * constant
    after = facts.scaled(factor)
    context.no_overflow(after.largest)
    rounding, rounding_max = rounding_of(context, after, center.size)
    if divide:
        # A runtime may multiply by a rounded reciprocal: two roundings instead of one, and underflow that grows with x.
        tiny = context.precision.smallest_normal
        rounding = add_up(mul_up(2.0, rounding), mul_up(tiny, add_up(facts.norm, facts.error)))
        rounding_max = add_up(mul_up(2.0, rounding_max), mul_up(tiny, facts.largest))
    affine = None
    inner = view.source.affine
    if inner is not None and center.ndim == 1 and (view.index >= 0).all() and np.ptp(magnitude) == 0.0:
        # |c| moves into the Lipschitz bound: scaled rows would be rounded, and their differences no longer proved.
        signs = np.sign(constant)[:, None]
        affine = Affine(signs * inner.rows[view.index], mul_up(factor, inner.lipschitz))
    factors = 1.0 / constant if divide else constant
    return context.source(
        center,
        after.lipschitz,
        add_up(after.error, rounding),
        add_up(mul_up(factor, view.source.error_max), rounding_max),
        affine,
        diagonal_step(view, factors, factor),
    )


@rule("Mul")
def multiply(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Product with a constant: a diagonal map, whose norm is the largest absolute factor."""
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        raise Refusal("a product of two tensors that both depend on the image has no Lipschitz constant")
    if isinstance(left, View):
        return [_scaled(context, left, float_operand(right, "the factor"), divide=False)]
    return [_scaled(context, data_operand(right), float_operand(left, "the factor"), divide=False)]


@rule("Div")
def divide(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Quotient by a constant: a diagonal map, whose norm is 1 / the smallest absolute divisor."""
    if not isinstance(inputs[0], View) or isinstance(inputs[1], View):
        raise Refusal("a quotient by a tensor that depends on the image has no Lipschitz constant")
    return [_scaled(context, inputs[0], float_operand(inputs[1], "the divisor"), divide=True)]


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


def _sorted_pair(context: Context, left: View, right: View) -> Source:
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


def _half(source: Source, which: int) -> View:
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
        return [_half(_sorted_pair(context, left, right), 0 if node.operator == "Max" else 1)]
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


@rule("ReduceMax", "ReduceMin", attributes=_REDUCE_ATTRIBUTES)
def reduce_max(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Largest (smallest) of disjoint groups: 1-Lipschitz, and exact; of pairs: half of the sorted pair."""
    view = data_operand(inputs[0])
    grouped, axes, keep = grouped_axes(node, inputs, view)
    largest = node.operator == "ReduceMax"
    if grouped.shape[-1] == 2:
        left, right = (grouped.rearranged(grouped.index[..., half]) for half in (0, 1))
        return [with_axes(_half(_sorted_pair(context, left, right), 0 if largest else 1), axes, keep)]
    facts = context.domain.joint(grouped)
    center = grouped.center.max(axis=-1) if largest else grouped.center.min(axis=-1)
    return [with_axes(context.source(center, facts.lipschitz, facts.error, view.source.error_max), axes, keep)]


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


# --- rearrangements: nothing is computed ------------------------------------------------------------------------------


@rule("Identity", "Dropout", attributes=("seed",))
def identity(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """The identity (Dropout: its inference form)."""
    mode = optional_operand(inputs, 2)
    if mode is not None and not (isinstance(mode, Constant) and not mode.array.any()):
        raise Refusal("training_mode must be a constant false")
    return [data_operand(inputs[0]), Unknown("the mask of Dropout")]


@rule("Cast", attributes=("to", "saturate", "round_mode"))
def cast(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A cast to the graph's own format is the identity."""
    view = data_operand(inputs[0])
    wanted = {"float64": 11, "float32": 1}[context.precision.name]
    if int_attribute(node, "to", 0) != wanted:
        raise Refusal(f"a cast of data away from {context.precision.name}: the analysis covers one format per graph")
    return [view]


@rule("Flatten", attributes=("axis",))
def flatten(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = data_operand(inputs[0])
    if int_attribute(node, "axis", 1) % (len(view.shape) + 1) != 1:
        raise Refusal("axis other than 1 would mix images")
    return [view.rearranged(view.index.reshape(-1))]


@rule("Reshape", attributes=("allowzero",))
def reshape(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement that keeps the batch axis: every element once, an isometry."""
    view = data_operand(inputs[0])
    target = integer_operand(inputs[1], "the new shape", batch_allowed=True)
    old = (context.batch, *view.shape)
    if not flag_attribute(node, "allowzero", 0):
        if any(size == 0 and position >= len(old) for position, size in enumerate(target)):
            raise Refusal(f"the new shape {target} copies an axis that is not there")
        target = [old[position] if size == 0 else size for position, size in enumerate(target)]
    known = math.prod(size for size in target if size != -1)
    total = math.prod(old)
    if target.count(-1) == 1 and known > 0 and total % known == 0:
        target[target.index(-1)] = total // known
    if math.prod(target) != total or target[0] != context.batch:
        raise Refusal("the new shape does not keep the batch axis: give it as 0 or -1 and the rest as numbers")
    return [view.rearranged(view.index.reshape(target[1:]))]


@rule("Transpose", attributes=("perm",))
def transpose(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement that keeps the batch axis: every element once, an isometry."""
    view = data_operand(inputs[0])
    permutation = node.attributes.get("perm")
    if not isinstance(permutation, (list, tuple)) or not permutation or permutation[0] != 0:
        raise Refusal("it moves the batch axis")
    return [view.rearranged(np.transpose(view.index, [int(axis) - 1 for axis in permutation[1:]]))]  # type: ignore[reportUnknownVariableType]


@rule("Squeeze")
def squeeze(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = data_operand(inputs[0])
    if len(inputs) < 2:
        raise Refusal("it names no axes: a batch of one would be squeezed away")
    axes = tuple(image_axis(axis, view) for axis in integer_operand(inputs[1], "the axes"))
    if any(view.shape[axis] != 1 for axis in axes):
        raise Refusal("it squeezes an axis longer than 1")
    return [view.rearranged(np.squeeze(view.index, axes))]


@rule("Unsqueeze")
def unsqueeze(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = data_operand(inputs[0])
    axes = integer_operand(inputs[1], "the axes")
    rank = len(view.shape) + 1 + len(axes)
    resolved = sorted(axis % rank for axis in axes)
    if resolved and resolved[0] == 0:
        raise Refusal("it puts an axis before the batch")
    return [view.rearranged(np.expand_dims(view.index, tuple(axis - 1 for axis in resolved)))]


@rule("Split", attributes=("axis", "num_outputs"))
def split(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Disjoint parts of one tensor: together they cost what it costs."""
    view = data_operand(inputs[0])
    axis = image_axis(int_attribute(node, "axis", 0), view)
    length = view.shape[axis]
    sizes_value = optional_operand(inputs, 1)
    if sizes_value is not None:
        sizes = integer_operand(sizes_value, "the sizes")
    else:
        parts = int_attribute(node, "num_outputs", len(node.outputs))
        chunk = -(-length // parts)
        sizes = [min(chunk, length - start) for start in range(0, length, chunk)]
    if sum(sizes) != length or len(sizes) != len(node.outputs):
        raise Refusal(f"sizes {sizes} do not split an axis of {length} into {len(node.outputs)}")
    bounds = np.cumsum(sizes)[:-1]
    return [view.rearranged(part) for part in np.split(view.index, bounds, axis=axis)]


@rule("Slice")
def slice_(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A part of a tensor, each element at most once: never expands."""
    view = data_operand(inputs[0])
    starts, ends = integer_operand(inputs[1], "starts"), integer_operand(inputs[2], "ends")
    axes_value, steps_value = optional_operand(inputs, 3), optional_operand(inputs, 4)
    axes = integer_operand(axes_value, "axes") if axes_value is not None else list(range(len(starts)))
    steps = integer_operand(steps_value, "steps") if steps_value is not None else [1] * len(starts)
    index = view.index
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        position = image_axis(axis, view)
        length = index.shape[position]
        # ONNX counts a negative end past the front once; numpy's slice needs None there.
        stop = (None if end < -length else end) if step <= 0 else min(end, length)
        index = index[(slice(None),) * position + (slice(start, stop, step),)]
    if index.size == 0:
        raise Refusal("nothing is left of the tensor")
    return [view.rearranged(index)]


@rule("Gather", attributes=("axis",))
def gather(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Elements picked by constant positions: an element used m times counts sqrt(m)."""
    view = data_operand(inputs[0])
    axis = image_axis(int_attribute(node, "axis", 0), view)
    numbers = integer_operand(inputs[1], "the positions")
    positions = np.array(numbers, dtype=np.int64).reshape(constant_shape(inputs[1]))
    length = view.shape[axis]
    if ((positions < -length) | (positions >= length)).any():
        raise Refusal(f"positions outside of an axis of {length}")
    return [view.rearranged(np.take(view.index, positions % length, axis=axis))]


@rule("Concat", attributes=("axis",))
def concat(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Stacked branches: parts of one tensor count together, different tensors add in squares."""
    views = [data_operand(value, "every operand") for value in inputs]
    axis = image_axis(int_attribute(node, "axis", 0), views[0])
    if all(view.source is views[0].source for view in views):
        return [views[0].rearranged(np.concatenate([view.index for view in views], axis=axis))]
    facts = context.domain.joint(*views)
    center = np.concatenate([view.center for view in views], axis=axis)
    error_max = max(view.source.error_max for view in views)
    step = LinearStep(
        operands=tuple(views),
        apply=lambda stacks: np.concatenate(stacks, axis=axis + 1),
        norm=1.0,
        spread=1.0,
        terms=1,
    )
    return [context.source(center, facts.lipschitz, facts.error, error_max, step=step)]


@rule("Pad", attributes=("mode",))
def pad(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Zeros cost nothing; an element that reflect, edge or wrap padding repeats m times counts sqrt(m)."""
    view = data_operand(inputs[0])
    mode = node.attributes.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise Refusal(f"mode {mode!r} has no proved rule")
    value = optional_operand(inputs, 2)
    if value is not None and float_operand(value, "the padding value").any():
        raise Refusal("a padding value other than 0")
    pads = integer_operand(inputs[1], "the pads")
    rank = len(view.shape) + 1
    axes_value = optional_operand(inputs, 3)
    axes = integer_operand(axes_value, "the axes") if axes_value is not None else list(range(rank))
    before, after = pads[: len(axes)], pads[len(axes) :]
    widths = [(0, 0)] * len(view.shape)
    for axis, low, high in zip(axes, before, after, strict=True):
        if low < 0 or high < 0:
            raise Refusal("negative pads; use Slice")
        if axis % rank == 0:
            if low or high:
                raise Refusal("it pads the batch axis")
            continue
        widths[image_axis(axis, view)] = (low, high)
    if mode == "constant":
        return [view.rearranged(np.pad(view.index, widths, mode="constant", constant_values=-1))]
    return [view.rearranged(np.pad(view.index, widths, mode=mode))]  # type: ignore[reportCallIssue, reportArgumentType]


@rule("SpaceToDepth", attributes=("blocksize",))
def space_to_depth(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = data_operand(inputs[0])
    block = int_attribute(node, "blocksize", 0)
    channels, height, width = view.shape
    if block < 1 or height % block or width % block:
        raise Refusal(f"a blocksize of {block} does not divide {height} x {width}")
    split_up = view.index.reshape(channels, height // block, block, width // block, block)
    return [view.rearranged(split_up.transpose(2, 4, 0, 1, 3).reshape(-1, height // block, width // block))]


@rule("DepthToSpace", attributes=("blocksize", "mode"))
def depth_to_space(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = data_operand(inputs[0])
    block = int_attribute(node, "blocksize", 0)
    channels, height, width = view.shape
    if block < 1 or channels % (block * block):
        raise Refusal(f"a blocksize of {block} does not divide {channels} channels")
    depth = channels // (block * block)
    if node.attributes.get("mode", "DCR") == "DCR":
        moved = view.index.reshape(block, block, depth, height, width).transpose(2, 3, 0, 4, 1)
    else:
        moved = view.index.reshape(depth, block, block, height, width).transpose(0, 3, 1, 4, 2)
    return [view.rearranged(moved.reshape(depth, height * block, width * block))]
