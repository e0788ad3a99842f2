"""Lipschitz bounds of steps of gradient descent, `x -> x - N^T S a(N x + b)`.

Theorem. Let the slopes of the elementwise activation `a` lie in [0, h], and the diagonal S be non-negative. Almost
everywhere the Jacobian is `I - N^T S D N` with a diagonal `0 <= D <= h`, symmetric, with eigenvalues in
`[1 - h ||sqrt(S) N||^2, 1]`; so the bound is `max(1, h ||sqrt(S) N||^2 - 1)`. (Steps of gradient descent on a
convex potential: Meunier et al., *A dynamical system perspective for Lipschitz neural networks*, ICML 2022;
Araujo et al., *A unified algebraic perspective on Lipschitz neural networks*, ICLR 2023.) A step `x + sign g(x)` is
compared with that form: S is fitted, and the difference of `-sign g` from the form counts by its norm.

Axes: N elements of x, H of the activation.
"""

import math

import numpy as np
from numpy.typing import NDArray

from service.certificate.budget import LARGEST_PROOF, Budget
from service.certificate.convolutions import absolute_convolution_bound, convolution_norm_bound
from service.certificate.kernels import Kernel, Kernels, compose_kernels, identity_convolution
from service.certificate.matrices import Matrices, is_small
from service.certificate.norms import spectral_norm_bound
from service.certificate.rounding import FLOAT64, add_up, mul_up, norm_up, sqrt_up
from service.certificate.values import View, identity_of, stand_in

Array = NDArray[np.float64]


def step_of_matrices(matrices: Matrices, budget: Budget, x: View, step: View, sign: float) -> float:
    """Return a bound of `x -> x + sign g(x)` by matrices multiplied out; infinity where g has another form.

    Args:
        matrices: of the graph.
        budget: of the graph.
        x: the tensor before the step; all elements of its source, each once.
        step: g.
        sign: 1 or -1.
    """
    n = x.index.size
    if not is_small(n * n) or (step.index < 0).any():
        return math.inf
    outer = matrices.of(step.source)
    if outer is None or len(outer) != 1:
        return math.inf
    ((activation, back),) = outer.items()
    if activation.slopes is None or activation.slopes.low < 0.0 or activation is x.source:
        return math.inf
    before = activation.slopes.of
    inner = matrices.of(before.source, x.source)
    if inner is None or set(inner) != {x.source} or (before.index < 0).any():
        return math.inf
    forward = inner[x.source]
    hidden = activation.center.size
    if not budget.affords(2.0 * n * hidden * min(n, hidden), LARGEST_PROOF):
        return math.inf
    # Columns of N^T and of -sign M, for the elements of the source in their own order.
    first_NH = forward.images.reshape(n, -1)[:, before.index.ravel()]
    last_NH = np.empty((n, hidden))
    last_NH[x.index.ravel()] = (-sign * back.images.reshape(hidden, -1)[:, step.index.ravel()]).T
    weights_H = _least_squares(first_NH, last_NH)
    rest = _distance_up(last_NH, first_NH * weights_H)
    widening = sqrt_up(float(max(1, step.repetition, before.repetition)))
    first_deviation, last_deviation = (mul_up(widening, part.deviation) for part in (forward, back))
    size = add_up(spectral_norm_bound(first_NH), first_deviation)
    scaled = add_up(
        mul_up(spectral_norm_bound(first_NH * np.sqrt(weights_H)), 1.0 + 2.0**-40),
        mul_up(math.sqrt(float(np.max(weights_H))) * (1.0 + 2.0**-40), first_deviation),
    )
    stray = mul_up(add_up(rest, last_deviation, mul_up(float(np.max(weights_H)), first_deviation)), size)
    return _step_bound(activation.slopes.high, scaled, stray)


def step_of_kernels(kernels: Kernels, budget: Budget, x: View, step: View, sign: float) -> float:
    """Return a bound of `x -> x + sign g(x)` by convolution kernels; infinity where g has another form.

    Args:
        kernels: of the graph.
        budget: of the graph.
        x: the tensor before the step; all elements of its source, each once.
        step: g.
        sign: 1 or -1.
    """
    # From the result back to the activation, each step by its adjoint: together the adjoint of g.
    if len(step.shape) not in (2, 3) or x.shape != step.shape:
        return math.inf
    back = Kernel(stand_in(step.shape), identity_convolution(step.shape, -sign), 0.0)
    view = step
    while view.source.step is not None:
        made = view.source.step
        if not view.whole or made.adjoint is None:
            return math.inf
        following = made.operands[0]
        composed = compose_kernels(made.adjoint, back, view.shape[1:], following.shape[1:], made.terms, budget)
        if composed is None:
            return math.inf
        back, view = composed, following
    activation = view.source
    if not view.whole or activation.slopes is None or activation.slopes.low < 0.0:
        return math.inf
    found = kernels.of(activation.slopes.of, x.source)
    if found is None or set(found) != {identity_of(x)}:
        return math.inf
    (forward,) = found.values()
    one, other = forward.convolution, back.convolution
    if (one.strides, one.offsets, one.groups) != (other.strides, other.offsets, other.groups):
        return math.inf
    if one.kernel.shape != other.kernel.shape or not budget.affords(2.0 * forward.cost):
        return math.inf
    outputs = len(one.kernel)
    first_NH, last_NH = (made.kernel.reshape(outputs, -1).T for made in (one, other))
    weights_H = _least_squares(first_NH, last_NH)
    factors = weights_H.reshape(-1, *[1] * (one.kernel.ndim - 1))
    difference = other.kernel - one.kernel * factors
    scaled_kernel = one.kernel * np.sqrt(factors)
    ones = [1] * len(one.strides)
    shape = x.shape[1:]
    # Each entry of the difference and of the scaled kernel is off by some roundings of its own size.
    peak = float(np.max(weights_H))
    sizes = [absolute_convolution_bound(made.kernel, one.groups) for made in (one, other)]
    slack = mul_up(2.0**-48, add_up(sizes[1], mul_up(peak, sizes[0])))
    rest = add_up(absolute_convolution_bound(difference, one.groups), slack)
    size = add_up(sizes[0], forward.deviation)
    scaled = add_up(
        mul_up(convolution_norm_bound(scaled_kernel, shape, one.strides, ones, one.groups), 1.0 + 2.0**-40),
        mul_up(2.0**-48, absolute_convolution_bound(scaled_kernel, one.groups)),
        mul_up(math.sqrt(peak) * (1.0 + 2.0**-40), forward.deviation),
    )
    stray = mul_up(add_up(rest, back.deviation, mul_up(peak, forward.deviation)), size)
    return _step_bound(activation.slopes.high, scaled, stray)


def _least_squares(first_NH: Array, last_NH: Array) -> Array:
    """Return non-negative weights S for which `first S` is near `last`; any would do for the proof."""
    square_H = np.sum(np.square(first_NH), axis=0)
    weights_H = np.sum(first_NH * last_NH, axis=0) / np.where(square_H > 0.0, square_H, 1.0)
    return np.where(np.isfinite(weights_H), np.maximum(weights_H, 0.0), 0.0)


def _distance_up(left: Array, right: Array) -> float:
    """Return a bound of the Frobenius norm of `left - right`, `right` known to one rounding of each entry."""
    rounding = mul_up(4.0 * FLOAT64.unit_roundoff, add_up(norm_up(left), norm_up(right)))
    return add_up(norm_up(left - right), rounding)


def _step_bound(highest_slope: float, scaled: float, stray: float) -> float:
    """Return `max(1, h ||sqrt(S) N||^2 - 1) + h stray`.

    Args:
        highest_slope: h.
        scaled: bound of `||sqrt(S) N||`.
        stray: bound of the difference of g from the form, times the norm of N.
    """
    excess = add_up(mul_up(highest_slope, scaled, scaled), -1.0)
    return add_up(max(1.0, excess), mul_up(highest_slope, stray))
