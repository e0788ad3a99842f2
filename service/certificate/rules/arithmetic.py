"""Rules of matrix products, sums, differences and products with constants. Notation as in `table`."""

from dataclasses import replace

import numpy as np

from service.certificate.facts import Facts, LocalError
from service.certificate.kernels import identity_convolution
from service.certificate.norms import absolute_norm_bound, row_norms_up, spectral_norm_bound
from service.certificate.rounding import add_up, div_up, mul_up, norm_up, sqrt_up
from service.certificate.rules.blocks import (
    PRODUCTS,
    bounds_of_products,
    constant_added,
    moved_alike,
    one_product,
    sum_of_products,
)
from service.certificate.rules.linear import LinearMap, diagonal_step, linear_result, scaling_step
from service.certificate.rules.operands import (
    Array,
    Operands,
    broadcast_constant,
    broadcast_shape,
    data_operand,
    float_operand,
    limit_size,
    optional_operand,
)
from service.certificate.rules.products import COMPOSED, composed_sum, product
from service.certificate.rules.table import Context, rule
from service.certificate.values import Affine, LinearStep, Value, View, affine_of, seen_whole
from service.network.operators import Operator, Refusal

_GRADIENT_STEP = "x - N^T S a(N x + b), slopes of a in [0, h]: max(1, h ||sqrt(S) N||^2 - 1)."
_CENTRING = "x minus the mean of its group: an orthogonal projection."


# --- matrix products --------------------------------------------------------------------------------------------------


@rule("Gemm", attributes=("alpha", "beta", "transA", "transB"))
def gemm(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Dense layer: ||W x - W x'|| <= ||W||_2 ||x - x'||, with a proved bound of the spectral norm.

    Args: see `Rule`.
    """
    view, weight = data_operand(inputs[0], "the first operand"), float_operand(inputs[1], "the weight")
    if node.integer("transB"):
        weight = weight.T
    alpha, beta = node.number("alpha"), node.number("beta")
    bias_value = optional_operand(inputs, 2)
    bias = None if bias_value is None else beta * float_operand(bias_value, "the bias")
    # A scaled sum or scaled weights, and a scaled bias.
    roundings = 0 if alpha == beta == 1.0 else 2
    return [_dense(context, view, weight, bias, alpha, roundings)]


@rule("MatMul")
def matmul(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Matrix product with a constant: block-diagonal in the other axes, so its norm is ||W||_2.

    Args: see `Rule`.
    """
    left, right = inputs[0], inputs[1]
    if isinstance(left, View):
        return [_dense(context, left, float_operand(right, "the right operand"), None)]
    view, weight = data_operand(right, "one operand"), float_operand(left, "the left operand")
    turned = _dense(context, view.rearranged(np.swapaxes(view.index, -1, -2)), weight.T, None)
    return [turned.rearranged(np.swapaxes(turned.index, -1, -2))]


def _dense(
    context: Context, view: View, weight_NM: Array, bias_M: Array | None, scale: float = 1.0, roundings: int = 0
) -> View:
    """Return `y = scale x W + b` along the last axis of `x`; its other axes are disjoint blocks: `|scale| ||W||_2`.

    Args:
        context: of this analysis.
        view: x.
        weight_NM: W.
        bias_M: b.
        scale: of the products.
        roundings: of a product or of the bias, beside those of the sum.
    """
    n, m = weight_NM.shape
    if m == 0 or n == 0:
        raise Refusal("the weight is empty")
    limit_size((*view.shape[:-1], m))
    size, facts = abs(scale), context.domain.joint(view)
    row_norm = float(np.max(row_norms_up(weight_NM.T)))
    # A runtime may scale the sum, which must not overflow either, or underflow and then be scaled up.
    context.no_overflow(mul_up(row_norm, facts.computed_norm))
    row_norm = mul_up(size, max(row_norm, 1.0) if size > 1.0 else row_norm)
    product = LinearMap(
        apply=lambda stack: scale * (stack @ weight_NM),
        norm=mul_up(size, spectral_norm_bound(weight_NM)),
        spread=mul_up(size, absolute_norm_bound(weight_NM)),
        row_norm=row_norm,
        terms=n + roundings,
        tight=True,
        product=True,
    )
    # The size of the scale moves into the bound: scaled rows would be rounded.
    affine = Affine(weight_NM.T, mul_up(size, facts.lipschitz)) if len(view.shape) == 1 else None
    products = one_product(view, weight_NM, bias_M) if scale == 1.0 and roundings == 0 else None
    return linear_result(context, view, product, bias_M, affine=affine, products=products)


# --- sums and differences ---------------------------------------------------------------------------------------------


@rule("Add")
def add(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Sum: a constant changes no distance; the bounds of two branches add (triangle inequality).

    Args: see `Rule`.
    """
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        return [_sum_of_branches(context, left, right, 1.0)]
    if isinstance(left, View):
        return [_shifted(context, left, float_operand(right, "the addend"), 1.0)]
    return [_shifted(context, data_operand(right), float_operand(left, "the addend"), 1.0)]


@rule("Sum", "Mean")
def sum_or_mean(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Sum of tensors: their bounds add (triangle inequality); the mean divides by their number.

    Args: see `Rule`.
    """
    total = inputs[0]
    for value in inputs[1:]:
        if isinstance(total, View) and isinstance(value, View):
            total = _sum_of_branches(context, total, value, 1.0, ordered=len(inputs) == 2)
        else:
            (total,) = add(context, node, [total, value])
    if node.kind == "Mean":
        total = _scaled(context, data_operand(total), np.full((), float(len(inputs))), divide=True)
    return [data_operand(total)]


@rule("Sub")
def subtract(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Difference: a constant changes no distance; the bounds of two branches add (triangle inequality).

    Args: see `Rule`.
    """
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        return [_sum_of_branches(context, left, right, -1.0)]
    if isinstance(left, View):
        return [_shifted(context, left, np.asarray(-float_operand(right, "the subtrahend")), 1.0)]
    return [_shifted(context, data_operand(right), float_operand(left, "the minuend"), -1.0)]


def _shifted(context: Context, view: View, constant: Array, sign: float) -> View:
    """Return `sign x + constant`: Lipschitz bound unchanged; one rounding of each result."""
    constant, view = broadcast_constant(constant, view)
    facts = context.domain.joint(view)
    center = sign * view.center + constant
    peak = float(np.max(np.abs(constant), initial=0.0))
    after = replace(
        facts,
        norm=add_up(norm_up(center), facts.error, mul_up(facts.lipschitz, context.domain.radius)),
        largest=add_up(facts.largest, peak),
    )
    context.no_overflow(after.largest)
    rounding = context.one_rounding(after, center.size)
    joined = _joined_rounding(context, view, norm_up(np.ascontiguousarray(constant)), peak)
    affine = affine_of(view)
    if affine is not None:
        affine = replace(affine, rows=sign * affine.rows)
    return context.source(
        center,
        facts.plus(rounding, joined),
        affine=affine,
        step=scaling_step(view, sign),
        products=constant_added(view, constant, sign),
    )


def _joined_rounding(context: Context, view: View, norm: float, largest: float) -> LocalError:
    """Return the error of an addition that a runtime may join with `view`, beside the addition's own.

    ONNX Runtime makes one Gemm of a matrix product and the addition that follows. Its sums of n products may then
    start from the addend, which so takes part in each of their roundings: `gamma_{n+1} ||b||`.

    Args:
        context: of this analysis.
        view: the tensor that is added to.
        norm: bound of the L2 norm of the addend.
        largest: bound of its largest component.
    """
    step = view.source.step
    if step is None or not step.product:
        return LocalError(0.0, 0.0)
    return LocalError.relative(context.gamma(step.terms + 1), norm, largest)


def _sum_of_branches(context: Context, left: View, right: View, sign: float, *, ordered: bool = True) -> View:
    """Return `x + sign y` of two branches: their Lipschitz bounds add; one rounding of each result.

    Sums of matrix products: see `blocks`, and the smaller bound counts.

    Args:
        context: of this analysis.
        left: x.
        right: y.
        sign: 1 or -1.
        ordered: whether the runtime adds these two, and not three or more in an order of its own.

    Raises:
        Refusal: the shapes do not fit, or the sum may overflow.
    """
    if len(left.shape) != len(right.shape):
        raise Refusal(f"tensors of shapes {left.shape} and {right.shape} would broadcast across the batch")
    shape = broadcast_shape(left.shape, right.shape)
    left = left.rearranged(np.broadcast_to(left.index, shape))
    right = right.rearranged(np.broadcast_to(right.index, shape))
    if ordered and moved_alike(left, right):
        whole = _sum_of_branches(context, seen_whole(left.source), seen_whole(right.source), sign)
        return whole.rearranged(whole.index.ravel()[left.index])
    one, other = context.domain.joint(left), context.domain.joint(right)
    both = one + other
    context.no_overflow(both.largest)
    rounding = context.one_rounding(both, left.index.size)
    products = sum_of_products(left, right, sign) if ordered else None
    together = None if products is None else bounds_of_products(context, products, left.index.size)
    lipschitz = both.lipschitz
    if together is None or together.step is None:
        downhill = mul_up(context.joint.gradient_step(left, right, sign), one.lipschitz)
        if sign > 0.0:
            downhill = min(downhill, mul_up(context.joint.gradient_step(right, left, 1.0), other.lipschitz))
        lipschitz = context.smaller(lipschitz, downhill, _GRADIENT_STEP)
    lipschitz = context.smaller(lipschitz, composed_sum(context, left, right, sign), COMPOSED)
    if sign < 0.0 and _centres(left, right):
        lipschitz = context.smaller(lipschitz, one.lipschitz, _CENTRING)
    result = Facts(
        lipschitz=lipschitz,
        error=add_up(both.error, rounding.l2),
        error_max=add_up(one.error_max, other.error_max, rounding.largest),
    )
    if together is not None:
        result = Facts(
            lipschitz=context.smaller(lipschitz, together.facts.lipschitz, PRODUCTS),
            error=min(result.error, together.facts.error),
            error_max=min(result.error_max, together.facts.error_max),
        )
    step = together.step if together is not None else None
    if step is None:
        spatial = len(shape) in (2, 3)
        step = LinearStep(
            operands=(left, right),
            apply=lambda stacks: stacks[0] + sign * stacks[1],
            norm=sqrt_up(2.0),
            spread=sqrt_up(2.0),
            terms=2,
            convolutions=(identity_convolution(shape), identity_convolution(shape, sign)) if spatial else None,
        )
    affine = None if together is None else together.affine
    return context.source(left.center + sign * right.center, result, affine=affine, step=step, products=products)


def _centres(left: View, right: View) -> bool:
    """Return whether `right` holds, beside each element of `left`, the mean of its group: a projection then."""
    step = right.source.step
    if step is None or not step.mean or step.operands[0].source is not left.source:
        return False
    groups = step.operands[0]
    if groups.repetition > 1 or (groups.index < 0).any() or left.repetition > 1 or (left.index < 0).any():
        return False
    group_of = np.full(left.source.center.size, -1)
    group_of[groups.index] = np.arange(right.source.center.size).reshape(*groups.shape[:-1], 1)
    return bool((right.index >= 0).all() and (group_of[left.index] == right.index).all())


# --- products and quotients -------------------------------------------------------------------------------------------


@rule("Mul")
def multiply(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Product with a constant: a diagonal map, whose norm is the largest absolute factor.

    Of two tensors: see `products`.

    Args: see `Rule`.
    """
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        return [product(context, left, right)]
    if isinstance(left, View):
        return [_scaled(context, left, float_operand(right, "the factor"), divide=False)]
    return [_scaled(context, data_operand(right), float_operand(left, "the factor"), divide=False)]


@rule("Div")
def divide(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Quotient by a constant: a diagonal map, whose norm is 1 / the smallest absolute divisor.

    Args: see `Rule`.

    Raises:
        Refusal: the divisor depends on the image.
    """
    if not isinstance(inputs[0], View) or isinstance(inputs[1], View):
        raise Refusal("a quotient by a tensor that depends on the image has no Lipschitz constant")
    return [_scaled(context, inputs[0], float_operand(inputs[1], "the divisor"), divide=True)]


def _scaled(context: Context, view: View, constant: Array, divide: bool) -> View:
    """Return a diagonal map of `view`: its norm is the largest factor; one rounding of each result."""
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
    rounding = context.one_rounding(after, center.size)
    if divide:
        # A runtime may multiply by a rounded reciprocal: two roundings instead of one, and underflow that grows with x.
        tiny = context.precision.smallest_normal
        rounding = rounding.scaled(2.0) + LocalError.relative(tiny, facts.computed_norm, facts.largest)
    affine = affine_of(view) if np.ptp(magnitude) == 0.0 else None
    if affine is not None:
        # |c| moves into the Lipschitz bound: scaled rows would be rounded, and their differences no longer proved.
        affine = Affine(np.sign(constant)[:, None] * affine.rows, mul_up(factor, affine.lipschitz))
    factors = 1.0 / constant if divide else constant
    step = diagonal_step(view, factors, factor)
    return context.source(center, after.plus(rounding), affine=affine, step=step)
