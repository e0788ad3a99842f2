"""Rules of activations that a runtime computes with transcendental functions. Notation as in `rules`.

An elementwise `f` of slope at most `s` maps a computed `x^` to a result off by at most `s |x^ - x|` (what comes in)
plus the inaccuracy of the runtime's own `f` at `x^`. IEEE 754 prescribes nothing about exp, tanh or erf, so that this
second part is an assumption: `FUNCTION_ERROR`, the only one, measured by `benchmarks/activations.py`. Softmax and
LogSoftmax are its exp and log between operations that are analysed; runtimes subtract the maximum first.
"""

import math
from collections.abc import Callable

import numpy as np

from service.certificate.graph import Node
from service.certificate.rounding import add_up, div_up, down, mul_up, sqrt_up
from service.certificate.rules.operands import (
    Array,
    Operands,
    Refusal,
    broadcast_constant,
    data_operand,
    float_attribute,
    float_operand,
    image_axis,
    int_attribute,
)
from service.certificate.rules.table import Context, rounding_of, rule
from service.certificate.values import Affine, LinearStep, Slopes, Value, View

FUNCTION_ERROR = 64.0
"""Assumption: each elementary function, as the runtime computes it in a format with unit roundoff `u`, is off by at
most `FUNCTION_ERROR * u * max(scale, |y|)`, `y` the exact result. `scale` is 1 for exp, log, tanh, erf, sigmoid,
softplus and softsign, and the largest of 1 and their saturated values for Elu, Selu and Celu: an absolute error near
zero, since runtimes compute `alpha (exp(x) - 1)` as it stands. numpy's own functions keep the same promise in float64.

The worst that was measured of ONNX Runtime, in each format that it has kernels for: `benchmarks/ACTIVATIONS.md`. Not
all runtimes keep it: onnx's reference evaluator computes Erf in float32 whatever the format.
"""

_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875
# ONNX attributes are float32, defaults included: float64 kernels compute with this number, not with 0.2.
_HARD_SIGMOID_ALPHA = float(np.float32(0.2))


def _activated(
    context: Context,
    view: View,
    value: Callable[[Array], Array],
    *,
    slope: float,
    low: float = 0.0,
    scale: float = 1.0,
    growth: float = 0.0,
    gap: float = 0.0,
) -> View:
    """`f(x)`, elementwise: `slope L`; `||y^ - y|| <= slope e + FUNCTION_ERROR u (scale sqrt(n) + growth ||x^||)`.

    Args:
        context: of this analysis.
        view: the input.
        value: `f` in numpy's float64, accurate to `FUNCTION_ERROR`.
        slope: Lipschitz constant of `f`, rounded up.
        low: lower bound of its difference quotients; 0 where it never falls.
        scale: `max(scale of FUNCTION_ERROR, |f(x)|) <= scale + growth |x|`.
        growth: see `scale`.
        gap: largest difference between `f` and the function that a runtime means to compute.
    """
    facts = context.domain.joint(view)
    context.no_overflow(add_up(scale, mul_up(add_up(1.0, slope, growth), facts.largest)))
    unit = FUNCTION_ERROR * context.precision.unit_roundoff
    root = sqrt_up(float(view.index.size))
    rounding = mul_up(unit, add_up(mul_up(scale, root), mul_up(growth, add_up(facts.norm, facts.error))))
    rounding_max = mul_up(unit, add_up(scale, mul_up(growth, facts.largest)))
    # The centre is no worse: its own error is at most e, and numpy's functions keep FUNCTION_ERROR with a u no larger.
    return context.source(
        value(view.center),
        mul_up(slope, facts.lipschitz),
        add_up(mul_up(slope, facts.error), rounding, mul_up(gap, root)),
        add_up(mul_up(slope, view.source.error_max), rounding_max, gap),
        slopes=Slopes(view, low, slope),
    )


# --- elementwise ------------------------------------------------------------------------------------------------------


@rule("PRelu")
def prelu(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Elementwise of slopes 1 and c, c constant: max(1, |c|)-Lipschitz; one rounding of the negative side."""
    view = data_operand(inputs[0])
    below, spread = broadcast_constant(float_operand(inputs[1], "the slope"), view)
    if spread.shape != view.shape:
        raise Refusal(f"a slope that broadcasts the tensor {view.shape} to {spread.shape}")
    factor = max(1.0, float(np.max(np.abs(below), initial=0.0)))
    scaled = context.domain.joint(view).scaled(factor)
    context.no_overflow(scaled.largest)
    rounding, rounding_max = rounding_of(context, scaled, view.index.size)
    center = np.where(view.center >= 0.0, view.center, below * view.center)
    error_max = add_up(mul_up(factor, view.source.error_max), rounding_max)
    slopes = Slopes(view, min(1.0, float(np.min(below, initial=1.0))), factor)
    return [context.source(center, scaled.lipschitz, add_up(scaled.error, rounding), error_max, slopes=slopes)]


@rule("Elu", attributes=("alpha",))
def elu(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """x, or alpha (exp(x) - 1) below 0: slopes 1 and alpha exp(x), so max(1, |alpha|)-Lipschitz."""
    view, alpha = data_operand(inputs[0]), float_attribute(node, "alpha", 1.0)
    bound, low = max(1.0, abs(alpha)), min(0.0, alpha)
    return [_activated(context, view, lambda x: _elu(x, alpha), slope=bound, low=low, scale=bound, growth=1.0)]


def _elu(x: Array, alpha: float) -> Array:
    return np.where(x >= 0.0, x, alpha * np.expm1(np.minimum(x, 0.0)))


@rule("Selu", attributes=("alpha", "gamma"))
def selu(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """gamma times Elu: |gamma| max(1, |alpha|)-Lipschitz."""
    view = data_operand(inputs[0])
    alpha, gamma = float_attribute(node, "alpha", _SELU_ALPHA), float_attribute(node, "gamma", _SELU_GAMMA)
    slope = mul_up(abs(gamma), max(1.0, abs(alpha)))
    low = 0.0 if min(alpha, gamma) >= 0.0 else -slope
    scale = max(1.0, mul_up(abs(gamma), abs(alpha)))

    def value(x: Array) -> Array:
        return gamma * _elu(x, alpha)

    return [_activated(context, view, value, slope=slope, low=low, scale=scale, growth=abs(gamma))]


@rule("Celu", attributes=("alpha",))
def celu(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """x, or alpha (exp(x / alpha) - 1) below 0, alpha > 0: slopes 1 and exp(x / alpha) <= 1, so 1-Lipschitz."""
    view, alpha = data_operand(inputs[0]), float_attribute(node, "alpha", 1.0)
    if alpha < 2.0**-20:
        raise Refusal("alpha must be positive, and not tiny: below zero it would grow without bound")
    context.no_overflow(div_up(context.domain.joint(view).largest, alpha))
    return [_activated(context, view, lambda x: alpha * _elu(x / alpha, 1.0), slope=1.0, scale=1.0 + alpha, growth=1.0)]


@rule("Softplus")
def softplus(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """log(1 + exp(x)): its slope is the sigmoid, so 1-Lipschitz."""
    view = data_operand(inputs[0])
    # max(1, y) <= max(1, log 2 + max(x, 0)) <= 1 + |x|.
    return [_activated(context, view, lambda x: np.logaddexp(0.0, x), slope=1.0, scale=1.0, growth=1.0)]


@rule("Softsign")
def softsign(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """x / (1 + |x|): slope 1 / (1 + |x|)^2, so 1-Lipschitz."""
    return [_activated(context, data_operand(inputs[0]), lambda x: x / (1.0 + np.abs(x)), slope=1.0)]


@rule("Sigmoid")
def sigmoid(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """1 / (1 + exp(-x)): slope y (1 - y), so 1/4-Lipschitz."""
    return [_activated(context, data_operand(inputs[0]), _sigmoid, slope=0.25)]


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0.0, 1.0, small) / (1.0 + small)


@rule("Tanh")
def tanh(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """tanh(x): slope 1 - y^2, so 1-Lipschitz."""
    return [_activated(context, data_operand(inputs[0]), np.tanh, slope=1.0)]


@rule("Erf")
def erf(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """erf(x): slope 2 / sqrt(pi) exp(-x^2), so 2 / sqrt(pi)-Lipschitz."""
    slope = div_up(2.0, down(math.sqrt(down(math.pi))))
    return [_activated(context, data_operand(inputs[0]), np.vectorize(math.erf, otypes=[np.float64]), slope=slope)]


@rule("HardSigmoid", attributes=("alpha", "beta"))
def hard_sigmoid(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """alpha x + beta, projected on [0, 1]: |alpha|-Lipschitz; two roundings before the projection."""
    view = data_operand(inputs[0])
    alpha, beta = float_attribute(node, "alpha", _HARD_SIGMOID_ALPHA), float_attribute(node, "beta", 0.5)

    def value(x: Array) -> Array:
        return np.clip(alpha * x + beta, 0.0, 1.0)

    # gamma_2 (|alpha x| + |beta|) is below FUNCTION_ERROR u times the same: no assumption here.
    low, scale = min(0.0, alpha), max(1.0, abs(beta))
    return [_activated(context, view, value, slope=abs(alpha), low=low, scale=scale, growth=abs(alpha))]


@rule("HardSwish")
def hard_swish(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """x times x / 6 + 1/2 projected on [0, 1]: slope (2 x + 3) / 6 on [-3, 3], so 3/2-Lipschitz."""
    # A few roundings of numbers of at most max(3, |x|): below FUNCTION_ERROR. Runtimes take float32(1/6) for 1/6 in
    # float64 too: |x|^2 |float32(1/6) - 1/6| <= 4.5e-8 where either is not saturated, that is for |x| <= 3.001.
    return [
        _activated(
            context,
            data_operand(inputs[0]),
            lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
            slope=1.5,
            low=-0.5,
            scale=3.0,
            growth=1.0,
            gap=4.5e-8,
        )
    ]


@rule("ThresholdedRelu", attributes=("alpha",))
def thresholded_relu(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Refused: it jumps."""
    raise Refusal("it jumps at its threshold and has no Lipschitz constant; use Relu of x - alpha")


# --- along one axis ---------------------------------------------------------------------------------------------------


def _exponentials(x: Array) -> tuple[Array, Array]:
    """`x - max x` along the last axis, and the sum of its exponentials."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted, np.exp(shifted).sum(axis=-1, keepdims=True)


def _sum_error(context: Context, n: int) -> float:
    """Relative error of a computed `S = sum exp(x_i - max x) >= 1` of n terms.

    Each exponent `t <= 0` is rounded once, which moves `exp(t)` by at most `u |t| exp(t (1 - u)) <= u`; exp itself
    is off by `FUNCTION_ERROR u`. Then the sum, in any order: `rho = n a + gamma_n (1 + n a)` with
    `a = (FUNCTION_ERROR + 1) u`.
    """
    spread = mul_up(float(n), FUNCTION_ERROR + 1.0, context.precision.unit_roundoff)
    rho = add_up(spread, mul_up(context.gamma(n), add_up(1.0, spread)))
    if rho > 0.25:
        raise Refusal(f"a sum of {n} exponentials is too long for {context.precision.name}")
    return rho


@rule("Softmax", attributes=("axis",))
def softmax(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Jacobian diag(p) - p p^T, absolute row sums 2 p_i (1 - p_i) <= 1/2 (Gershgorin): 1/2-Lipschitz."""
    view = data_operand(inputs[0])
    axis = image_axis(int_attribute(node, "axis", -1), view)
    facts = context.domain.joint(view)
    context.no_overflow(mul_up(4.0, facts.largest))
    shifted, total = _exponentials(np.moveaxis(view.center, axis, -1))
    n = shifted.shape[-1]
    unit, tiny = context.precision.unit_roundoff, context.precision.smallest_normal
    # p = exp / S: |p^ - p| <= (1 + 3 u) (a + p rho) / (1 - rho) + 3 u p, with a reciprocal or without; ||p||_2 <= 1.
    rho = _sum_error(context, n)
    a = mul_up(FUNCTION_ERROR + 1.0, unit)
    widened = div_up(1.0 + 4.0 * unit, down(1.0 - rho))
    of_one = add_up(mul_up(widened, add_up(a, rho)), 3.0 * unit, tiny)
    of_group = add_up(mul_up(widened, add_up(mul_up(a, sqrt_up(float(n))), rho)), 3.0 * unit, mul_up(float(n), tiny))
    groups = sqrt_up(float(view.index.size // n))
    return [
        context.source(
            np.moveaxis(np.exp(shifted) / total, -1, axis),
            mul_up(0.5, facts.lipschitz),
            add_up(mul_up(0.5, facts.error), mul_up(groups, of_group)),
            # The largest row sum is the Lipschitz constant in the maximum norm, too.
            add_up(mul_up(0.5, view.source.error_max), of_one),
        )
    ]


@rule("LogSoftmax", attributes=("axis",))
def log_softmax(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Jacobian I - 1 p^T, a projection: as long as its complement, ||1|| ||p|| <= sqrt(n). Differences stay.

    For a projection P other than 0 and I, `||P|| = ||I - P||` (Kato, *Perturbation Theory*, I 6.8). `p` at a corner of
    the simplex comes close to `sqrt(n)`. In `f_i - f_j` the shift cancels: the margins are those of the input.
    """
    view = data_operand(inputs[0])
    axis = image_axis(int_attribute(node, "axis", -1), view)
    facts = context.domain.joint(view)
    context.no_overflow(mul_up(8.0, facts.largest))
    shifted, total = _exponentials(np.moveaxis(view.center, axis, -1))
    n = shifted.shape[-1]
    unit = context.precision.unit_roundoff
    # x - max - log S, in any order: the error of S, that of log (S <= n), and four roundings of numbers that are
    # at most 2 max |x| + log S.
    rho = _sum_error(context, n)
    log_n = add_up(1.0, math.log(n))
    size = add_up(mul_up(2.0, facts.largest), log_n)
    of_one = add_up(div_up(rho, down(1.0 - rho)), mul_up(FUNCTION_ERROR * unit, log_n), mul_up(5.0 * unit, size))
    root = sqrt_up(float(n))
    error_max = add_up(mul_up(2.0, view.source.error_max), of_one)
    error = add_up(mul_up(root, facts.error), mul_up(sqrt_up(float(view.index.size)), of_one))
    center = np.moveaxis(shifted - np.log(total), -1, axis)
    if len(view.shape) != 1:
        return [context.source(center, mul_up(root, facts.lipschitz), error, error_max)]
    # log sum exp is 1-Lipschitz, a mean of the x in every direction.
    shift = context.source(np.log(total) + view.center.max(), facts.lipschitz, error, error_max)
    step = LinearStep(
        operands=(view, shift.rearranged(np.broadcast_to(shift.index, view.shape))),
        apply=lambda stacks: stacks[0] - stacks[1],
        norm=sqrt_up(2.0),
        spread=sqrt_up(2.0),
        terms=2,
    )
    affine = _shifted_together(view, facts.lipschitz)
    return [context.source(center, mul_up(root, facts.lipschitz), error, error_max, affine, step)]


def _shifted_together(view: View, lipschitz: float) -> Affine | None:
    """`w_i h - log sum exp x` as a linear form of `(h, 2^-k log sum exp x)`: the same last entry for all `i`.

    `log sum exp` is 1-Lipschitz, so that `2^-k` of it adds almost nothing to the Lipschitz bound of `h`, and the last
    entries of two rows cancel in their difference. It stays a true linear form whatever is done with it afterwards.
    """
    inner = view.source.affine
    if inner is not None and (view.index >= 0).all():
        rows, bound = inner.rows[view.index], inner.lipschitz
    else:
        rows, bound = np.eye(view.index.size), lipschitz
    if not (0.0 < bound < math.inf and 0.0 < lipschitz < math.inf):
        return None
    exponent = math.frexp(lipschitz)[1] - math.frexp(bound)[1] + 30
    if abs(exponent) > 300:
        return None
    shift = 2.0**exponent
    extended = np.concatenate([rows, np.full((len(rows), 1), -shift)], axis=1)
    return Affine(extended, mul_up(bound, sqrt_up(add_up(1.0, 2.0**-58))))
