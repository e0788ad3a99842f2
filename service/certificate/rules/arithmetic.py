"""One rule per ONNX operator: what it does to the Lipschitz bound and to the rounding error.

Every rule states its theorem. An operator, attribute, mode or operand without a proved rule is refused. Throughout,
`x` is the exact input of the operator, `x^` the computed one with `||x^ - x||_2 <= e`, `u` the unit roundoff of the
graph's format, `gamma_n = n u / (1 - n u)`. A sum of products of n terms, biases included, is off by at most
`gamma_n sum |w| |x^|` in any order, with or without fused multiply-add (Higham 2002, section 3.1). Underflow,
flush-to-zero included, adds at most the smallest normal number for each operation; overflow is excluded.
"""

import numpy as np

from service.certificate.graph import Node
from service.certificate.kernels import identity_convolution
from service.certificate.norms import absolute_norm_bound, row_norms_up, spectral_norm_bound
from service.certificate.rounding import add_up, div_up, mul_up, norm_up, sqrt_up
from service.certificate.rules.operands import (
    Array,
    Operands,
    Refusal,
    broadcast_constant,
    data_operand,
    flag_attribute,
    float_attribute,
    float_operand,
    optional_operand,
)
from service.certificate.rules.table import (
    Context,
    diagonal_step,
    joined_rounding,
    linear_result,
    rounding_of,
    rule,
    scaling_step,
)
from service.certificate.values import (
    Affine,
    Facts,
    LinearStep,
    Value,
    View,
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
