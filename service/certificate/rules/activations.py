"""Rules of activations that a runtime computes with transcendental functions. Notation as in `table`.

An elementwise `f` of slope at most `s` maps a computed `x^` to a result off by at most `s |x^ - x|` (the error of the
input) plus the inaccuracy of the runtime's own `f` at `x^`. IEEE 754 prescribes nothing about exp, tanh or erf, so that
this second part is an assumption: `FUNCTION_ERROR`, the only one, measured by `benchmarks/activations.py`. Softmax and
LogSoftmax are its exp and log between operations that are analysed; runtimes subtract the maximum first.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from service.certificate.facts import LocalError
from service.certificate.limits import fits
from service.certificate.rounding import FLOAT64, add_up, div_up, down, mul_up, sqrt_up
from service.certificate.rules.operands import (
    Array,
    Operands,
    data_operand,
)
from service.certificate.rules.table import Context, rule
from service.certificate.values import Affine, LinearStep, Slopes, Value, View, affine_of
from service.network.operators import Operator, Refusal

FUNCTION_ERROR = 64.0
"""Assumption: each elementary function, as the runtime computes it in a format with unit roundoff `u`, is off by at
most `FUNCTION_ERROR * u * max(scale, |y|)`, `y` the exact result. `scale` is 1 for exp, log, tanh, erf, sigmoid,
softplus and softsign, and the largest of 1 and their saturated values for Elu, Selu and Celu: an absolute error near
zero, since runtimes compute `alpha (exp(x) - 1)` as it stands. numpy's own functions keep the same promise in float64.

The largest error measured of ONNX Runtime, in each format that it has kernels for: `benchmarks/ACTIVATIONS.md`. Not
all runtimes keep it: onnx's reference evaluator computes Erf in float32 whatever the format.
"""

_LARGEST_EXPONENT = 700.0
"""Largest x whose exp(x) is far from overflow in float64."""


# --- elementwise ------------------------------------------------------------------------------------------------------


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
    """Return `f(x)`: `slope L`; `||y^ - y|| <= slope e + FUNCTION_ERROR u (scale sqrt(n) + growth ||x^||)`.

    Args:
        context: of this analysis.
        view: x.
        value: `f` in numpy's float64, accurate to `FUNCTION_ERROR`.
        slope: Lipschitz constant of `f`, rounded up.
        low: lower bound of its difference quotients; 0 where it never falls.
        scale: `max(scale of FUNCTION_ERROR, |f(x)|) <= scale + growth |x|`.
        growth: see `scale`.
        gap: largest difference between `f` and the function that a runtime means to compute.
    """
    facts, n = context.domain.joint(view), view.index.size
    context.no_overflow(add_up(scale, mul_up(add_up(1.0, slope, growth), facts.largest)))
    unit = FUNCTION_ERROR * context.precision.unit_roundoff
    inaccuracy = LocalError.relative(
        unit,
        norm=add_up(mul_up(scale, sqrt_up(float(n))), mul_up(growth, facts.computed_norm)),
        largest=add_up(scale, mul_up(growth, facts.largest)),
    )
    # The centre is no worse: its own error is at most e, and numpy's functions keep FUNCTION_ERROR with a u no larger.
    result = facts.mapped(slope, slope).plus(inaccuracy, LocalError.of_each(gap, n))
    return context.source(value(view.center), result, slopes=Slopes(view, low, slope))


@rule("Elu", attributes=("alpha",))
def elu(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """x, or alpha (exp(x) - 1) below 0: slopes 1 and alpha exp(x), so max(1, |alpha|)-Lipschitz.

    Args: see `Rule`.
    """
    view, alpha = data_operand(inputs[0]), node.number("alpha")
    bound, low = max(1.0, abs(alpha)), min(0.0, alpha)
    return [_activated(context, view, lambda x: _elu(x, alpha), slope=bound, low=low, scale=bound, growth=1.0)]


def _elu(x: Array, alpha: float) -> Array:
    return np.where(x >= 0.0, x, alpha * np.expm1(np.minimum(x, 0.0)))


@rule("Selu", attributes=("alpha", "gamma"))
def selu(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """gamma times Elu: |gamma| max(1, |alpha|)-Lipschitz.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    alpha, gamma = node.number("alpha"), node.number("gamma")
    slope = mul_up(abs(gamma), max(1.0, abs(alpha)))
    low = 0.0 if min(alpha, gamma) >= 0.0 else -slope
    scale = max(1.0, mul_up(abs(gamma), abs(alpha)))

    def value(x: Array) -> Array:
        return gamma * _elu(x, alpha)

    return [_activated(context, view, value, slope=slope, low=low, scale=scale, growth=abs(gamma))]


@rule("Celu", attributes=("alpha",))
def celu(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """x, or alpha (exp(x / alpha) - 1) below 0, alpha > 0: slopes 1 and exp(x / alpha) <= 1, so 1-Lipschitz.

    Args: see `Rule`.

    Raises:
        Refusal: alpha is not positive, or tiny.
    """
    view, alpha = data_operand(inputs[0]), node.number("alpha")
    if alpha < 2.0**-20:
        raise Refusal("alpha must be positive, and not tiny: below zero it would grow without bound")
    context.no_overflow(div_up(context.domain.joint(view).largest, alpha))
    return [_activated(context, view, lambda x: alpha * _elu(x / alpha, 1.0), slope=1.0, scale=1.0 + alpha, growth=1.0)]


@rule("Softplus")
def softplus(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """log(1 + exp(x)): its slope is the sigmoid, so 1-Lipschitz.

    Args: see `Rule`.

    Raises:
        Refusal: exp(x) may overflow.
    """
    view = data_operand(inputs[0])
    if context.precision is FLOAT64 and context.domain.joint(view).largest > _LARGEST_EXPONENT:
        # No kernel of this format: ONNX Runtime computes exp, a sum and log, as the specification's function body.
        raise Refusal(f"exp(x) may overflow: x may exceed {_LARGEST_EXPONENT:g}; use float32, whose kernel avoids it")
    # max(1, y) <= max(1, log 2 + max(x, 0)) <= 1 + |x|.
    return [_activated(context, view, lambda x: np.logaddexp(0.0, x), slope=1.0, scale=1.0, growth=1.0)]


@rule("Softsign")
def softsign(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """x / (1 + |x|): slope 1 / (1 + |x|)^2, so 1-Lipschitz.

    Args: see `Rule`.
    """
    return [_activated(context, data_operand(inputs[0]), lambda x: x / (1.0 + np.abs(x)), slope=1.0)]


@rule("Sigmoid")
def sigmoid(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """1 / (1 + exp(-x)): slope y (1 - y), so 1/4-Lipschitz.

    Args: see `Rule`.
    """
    return [_activated(context, data_operand(inputs[0]), _sigmoid, slope=0.25)]


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0.0, 1.0, small) / (1.0 + small)


@rule("Tanh")
def tanh(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """tanh(x): slope 1 - y^2, so 1-Lipschitz.

    Args: see `Rule`.
    """
    return [_activated(context, data_operand(inputs[0]), np.tanh, slope=1.0)]


@rule("Erf")
def erf(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """erf(x): slope 2 / sqrt(pi) exp(-x^2), so 2 / sqrt(pi)-Lipschitz.

    Args: see `Rule`.
    """
    slope = div_up(2.0, down(math.sqrt(down(math.pi))))
    return [_activated(context, data_operand(inputs[0]), np.vectorize(math.erf, otypes=[np.float64]), slope=slope)]


@rule("HardSigmoid", attributes=("alpha", "beta"))
def hard_sigmoid(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """alpha x + beta, projected on [0, 1]: |alpha|-Lipschitz; two roundings before the projection.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    alpha, beta = node.number("alpha"), node.number("beta")

    def value(x: Array) -> Array:
        return np.clip(alpha * x + beta, 0.0, 1.0)

    # gamma_2 (|alpha x| + |beta|) is below FUNCTION_ERROR u times the same: no assumption here.
    low, scale = min(0.0, alpha), max(1.0, abs(beta))
    return [_activated(context, view, value, slope=abs(alpha), low=low, scale=scale, growth=abs(alpha))]


@rule("HardSwish")
def hard_swish(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """x times x / 6 + 1/2 projected on [0, 1]: slope (2 x + 3) / 6 on [-3, 3], so 3/2-Lipschitz.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])

    def value(x: Array) -> Array:
        return x * np.clip(x / 6.0 + 0.5, 0.0, 1.0)

    # A few roundings of numbers of at most max(3, |x|): below FUNCTION_ERROR. Runtimes take float32(1/6) for 1/6 in
    # float64 too: |x|^2 |float32(1/6) - 1/6| <= 4.5e-8 where either is not saturated, that is for |x| <= 3.001.
    return [_activated(context, view, value, slope=1.5, low=-0.5, scale=3.0, growth=1.0, gap=4.5e-8)]


@rule("ThresholdedRelu", attributes=("alpha",))
def thresholded_relu(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Refused: it jumps.

    Args: see `Rule`.

    Raises:
        Refusal: always.
    """
    raise Refusal("it jumps at its threshold and has no Lipschitz constant; use Relu of x - alpha")


# --- along one axis ---------------------------------------------------------------------------------------------------


def _exponentials(x: Array) -> tuple[Array, Array]:
    """Return `x - max x` along the last axis, and the sum of its exponentials."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted, np.exp(shifted).sum(axis=-1, keepdims=True)


def _sum_error(context: Context, n: int) -> float:
    """Return a bound of the relative error of a computed `S = sum exp(x_i - max x) >= 1` of n terms.

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
def softmax(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Jacobian diag(p) - p p^T, absolute row sums 2 p_i (1 - p_i) <= 1/2 (Gershgorin): 1/2-Lipschitz.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    axis = node.integer("axis") - 1
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
    center = np.moveaxis(np.exp(shifted) / total, -1, axis)
    # The largest row sum is the Lipschitz constant in the maximum norm, too.
    result = facts.mapped(0.5, 0.5).plus(LocalError(mul_up(groups, of_group), of_one))
    return [context.source(center, result)]


@rule("LogSoftmax", attributes=("axis",))
def log_softmax(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Jacobian I - 1 p^T, a projection: as long as its complement, ||1|| ||p|| <= sqrt(n). Differences stay.

    For a projection P other than 0 and I, `||P|| = ||I - P||` (Kato, *Perturbation Theory*, I 6.8). `p` at a corner of
    the simplex comes close to `sqrt(n)`. In `f_i - f_j` the shift cancels: the margins are those of the input.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    axis = node.integer("axis") - 1
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
    result = facts.mapped(sqrt_up(float(n)), 2.0).plus(LocalError.of_each(of_one, view.index.size))
    center = np.moveaxis(shifted - np.log(total), -1, axis)
    if len(view.shape) != 1:
        return [context.source(center, result)]
    # log sum exp is 1-Lipschitz, a mean of the x in every direction.
    shift = context.source(np.log(total) + view.center.max(), replace(result, lipschitz=facts.lipschitz))
    step = LinearStep(
        operands=(view, shift.rearranged(np.broadcast_to(shift.index, view.shape))),
        apply=lambda stacks: stacks[0] - stacks[1],
        norm=sqrt_up(2.0),
        spread=sqrt_up(2.0),
        terms=2,
    )
    affine = _shifted_together(view, facts.lipschitz)
    return [context.source(center, result, affine=affine, step=step)]


def _shifted_together(view: View, lipschitz: float) -> Affine | None:
    """Return `w_i h - log sum exp x` as a linear form of `(h, 2^-k log sum exp x)`: the same last entry for all `i`.

    `log sum exp` is 1-Lipschitz, so that `2^-k` of it adds almost nothing to the Lipschitz bound of `h`, and the last
    entries of two rows cancel in their difference. It stays a true linear form whatever is done with it afterwards.
    """
    inner = affine_of(view)
    if inner is None:
        if not fits(view.index.size, view.index.size):
            return None
        inner = Affine(np.eye(view.index.size), lipschitz)
    bound = inner.lipschitz
    if not (0.0 < bound < math.inf and 0.0 < lipschitz < math.inf):
        return None
    exponent = math.frexp(lipschitz)[1] - math.frexp(bound)[1] + 30
    if abs(exponent) > 300:
        return None
    column = np.full((len(inner.rows), 1), -(2.0**exponent))
    return Affine(np.concatenate([inner.rows, column], axis=1), mul_up(bound, sqrt_up(add_up(1.0, 2.0**-58))))
