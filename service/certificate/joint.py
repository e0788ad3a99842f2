"""Lipschitz bounds of consecutive linear steps taken as one map.

A product of norms, and a sum over branches, lose what matrices multiplied out do not: `I + W` of a residual, an im2col
that repeats elements before it weighs them, a normalisation behind a convolution. The linear steps since the last
nonlinear tensor `h` are multiplied out, as a matrix where that is small and as a convolution kernel where all of them
are convolutions; with several such `h` the value is `sum M_h h + constant`, and its bound `sum ||M_h|| L_h`. What was
rounded in multiplying out is bounded beside each map: its `deviation`.

What costs more than it is worth is left alone: the budget counts multiply-adds, not seconds, so that the bound of a
graph is the same on every machine.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.certificate.convolutions import (
    absolute_convolution_bound,
    convolution_norm_bound,
)
from service.certificate.kernels import Array, Kernel, added, composed_kernel, identity_convolution
from service.certificate.norms import pairwise_distance_bounds, spectral_norm_bound
from service.certificate.rounding import FLOAT64, SMALLEST_NORMAL, add_up, gamma_up, mul_up, norm_up, sqrt_up
from service.certificate.values import Convolution, Domain, Identity, LinearStep, Source, View, identity_of, stand_in

_LARGEST_MATRIX = 1 << 22
"""Entries of a matrix that is multiplied out."""
_LARGEST_PROOF = 1e10
"""Multiply-adds for the norm of one matrix."""
_BUDGET = 5e11
"""Multiply-adds for all joint norms of a graph: some 20 seconds of two cores."""


@dataclass(frozen=True, eq=False)
class _Matrix:
    """Part of a tensor that depends on one nonlinear tensor of n elements."""

    images: Array
    """`n x *shape`: what each of its elements, alone and of value 1, makes of the tensor."""
    deviation: float
    """Bound of the spectral norm of the exact map minus this one."""


class Joint:
    """The joint maps of one graph; each is multiplied out once."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._left = _BUDGET
        self._matrices: dict[tuple[Source, Source | None], dict[Source, _Matrix] | None] = {}
        self._kernels: dict[tuple[Source, Source | None], dict[Identity, Kernel] | None] = {}
        self._norms: dict[object, float] = {}

    def lipschitz(self, step: LinearStep, shape: tuple[int, ...]) -> float:
        """Lipschitz bound, from the image, of the result of `step`; infinity where joint maps are no help."""
        if self._nothing_to_gain(step):
            return math.inf
        matrices = self._matrices_through(step, shape)
        if matrices is not None:
            total = 0.0
            for base, matrix in matrices.items():
                columns = matrix.images.reshape(len(matrix.images), -1)
                small, large = sorted(columns.shape)
                if not self._afford(float(small) * small * large, _LARGEST_PROOF):
                    return self._by_kernels(step, shape)
                norm = add_up(spectral_norm_bound(columns), matrix.deviation)
                total = add_up(total, mul_up(norm, base.lipschitz))
            return total
        return self._by_kernels(step, shape)

    def margin_bounds(self, logits: View) -> Array | None:
        """`K x K` bounds of the Lipschitz constants of all differences of `logits`; None where they are not linear."""
        if logits.source.step is None or (logits.index < 0).any():
            return None
        matrices = self._matrices_of(logits.source)
        if matrices is None:
            return None
        total_KK = np.zeros((logits.index.size, logits.index.size))
        for base, matrix in matrices.items():
            rows_KN = matrix.images.reshape(len(matrix.images), -1)[:, logits.index].T
            # A row of a map is off by at most its norm, and a difference by that of two rows.
            distance_KK = pairwise_distance_bounds(np.ascontiguousarray(rows_KN)) + 2.0 * matrix.deviation
            bound_KK = np.nextafter(np.nextafter(distance_KK, np.inf) * base.lipschitz, np.inf)
            total_KK = np.nextafter(total_KK + bound_KK, np.inf)
        np.fill_diagonal(total_KK, 0.0)
        return total_KK

    def convolution_norm(self, convolution: Convolution, size: Sequence[int]) -> float:
        """`convolution_norm_bound` of images of `size`, each proved once."""
        return self._affordable_norm(convolution, size, cost=0.0)

    def _affordable_norm(self, convolution: Convolution, size: Sequence[int], cost: float) -> float:
        """The norm, proved once; infinity where it is not known yet and its `cost` is beyond the budget."""
        digest = hashlib.sha256(np.ascontiguousarray(convolution.kernel).tobytes()).digest()
        key = digest, convolution.kernel.shape, tuple(size), tuple(convolution.strides), convolution.groups
        if key not in self._norms:
            if not self._afford(cost, math.inf):
                return math.inf
            kernel, ones = convolution.kernel, [1] * len(size)
            self._norms[key] = convolution_norm_bound(kernel, size, convolution.strides, ones, convolution.groups)
        return self._norms[key]

    def _nothing_to_gain(self, step: LinearStep) -> bool:
        if len(step.operands) != 1 or step.operands[0].repetition > 1:
            return False
        return step.scalar or (step.tight and _plain(step.operands[0].source))

    def _afford(self, cost: float, limit: float) -> bool:
        if cost > min(limit, self._left):
            return False
        self._left -= cost
        return True

    # --- matrices ---------------------------------------------------------------------------------------------------

    def _matrices_of(self, source: Source, base: Source | None = None) -> dict[Source, _Matrix] | None:
        """The linear maps that make `source`, from the nonlinear tensors before it, or from `base` where it is met."""
        key = (source, base)
        if key not in self._matrices:
            if source.step is not None and source is not base:
                made = self._matrices_through(source.step, source.center.shape, base)
            elif source.center.size**2 <= _LARGEST_MATRIX:
                n = source.center.size
                made = {source: _Matrix(np.eye(n).reshape(n, *source.center.shape), 0.0)}
            else:
                made = None
            self._matrices[key] = made
        return self._matrices[key]

    def _matrices_through(
        self, step: LinearStep, shape: tuple[int, ...], base_wanted: Source | None = None
    ) -> dict[Source, _Matrix] | None:
        parts = [self._matrices_of(view.source, base_wanted) for view in step.operands]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        bases = list(dict.fromkeys(base for part in found for base in part))
        result: dict[Source, _Matrix] = {}
        for base in bases:
            n = base.center.size
            if n * max(math.prod(shape), *(view.index.size for view in step.operands)) > _LARGEST_MATRIX:
                return None
            stacks: list[Array] = []
            deviations: list[float] = []
            for view, part in zip(step.operands, found, strict=True):
                if base not in part:
                    stacks.append(np.zeros((n, *view.shape)))
                    continue
                seen = part[base].images.reshape(n, -1)[:, view.index]
                stacks.append(np.where(view.index >= 0, seen, 0.0))
                deviations.append(mul_up(sqrt_up(float(view.repetition)), part[base].deviation))
            images = step.apply(stacks)
            if not np.isfinite(images).all():
                return None
            size = norm_up(np.array([norm_up(stack) for stack in stacks]))
            rounding = mul_up(gamma_up(step.terms + 2), step.spread, size)
            underflow = mul_up(4.0 * (step.terms + 2), SMALLEST_NORMAL, sqrt_up(float(images.size)))
            deviation = add_up(mul_up(step.norm, norm_up(np.array([0.0, *deviations]))), rounding, underflow)
            result[base] = _Matrix(images, deviation)
        return result

    # --- convolution kernels ----------------------------------------------------------------------------------------

    def _by_kernels(self, step: LinearStep, shape: tuple[int, ...]) -> float:
        if len(step.operands) == 1 and step.operands[0].source.step is None:
            # The step alone: its norm is of this kind already.
            return math.inf
        kernels = self._kernels_through(step, shape)
        if kernels is None:
            return math.inf
        total = 0.0
        for kernel in kernels.values():
            proved = self._affordable_norm(kernel.convolution, kernel.base.shape[1:], kernel.cost)
            if math.isinf(proved):
                return math.inf
            norm = add_up(proved, kernel.deviation)
            total = add_up(total, mul_up(norm, self._domain.joint(kernel.base).lipschitz))
        return total

    def _kernels_of(self, view: View, base: Source | None = None) -> dict[Identity, Kernel] | None:
        source = view.source
        if len(view.shape) not in (2, 3):
            return None
        if source.step is None or source is base:
            if (view.index < 0).any():
                return None
            return {identity_of(view): Kernel(view, identity_convolution(view.shape), 0.0)}
        if not view.whole:
            return None
        key = (source, base)
        if key not in self._kernels:
            self._kernels[key] = self._kernels_through(source.step, source.center.shape, base)
        return self._kernels[key]

    def _kernels_through(
        self, step: LinearStep, shape: tuple[int, ...], base: Source | None = None
    ) -> dict[Identity, Kernel] | None:
        if step.convolutions is None:
            return None
        result: dict[Identity, Kernel] = {}
        for view, outer in zip(step.operands, step.convolutions, strict=True):
            inner = self._kernels_of(view, base)
            if inner is None:
                return None
            for key, kernel in inner.items():
                made = composed_kernel(outer, kernel, view.shape[1:], shape[1:], step.terms)
                if made is not None and key in result:
                    made = added(result[key], made)
                if made is None:
                    return None
                result[key] = made
        return result

    # --- gradient steps ---------------------------------------------------------------------------------------------

    def gradient_step(self, x: View, step: View, sign: float) -> float:
        """Lipschitz bound of `x -> x + sign g(x)` where `-sign g` is `N^T S a(N x + b)`; infinity for any other `g`.

        Theorem. Let the slopes of the elementwise activation `a` lie in [0, h], and the diagonal S be non-negative.
        Almost everywhere the Jacobian is `I - N^T S D N` with a diagonal `0 <= D <= h`, symmetric, with eigenvalues in
        `[1 - h ||sqrt(S) N||^2, 1]`; so the bound is `max(1, h ||sqrt(S) N||^2 - 1)`. (Steps of gradient descent on a
        convex potential: Meunier et al., *A dynamical system perspective for Lipschitz neural networks*, ICML 2022;
        Araujo et al., *A unified algebraic perspective on Lipschitz neural networks*, ICLR 2023.) What
        `-sign g` differs by from that form counts by its norm.

        Args:
            x: the tensor before the step; all elements of its source, each once.
            step: g.
            sign: 1 or -1.
        """
        if x.index.size != x.source.center.size or x.repetition != 1 or (x.index < 0).any():
            return math.inf
        return min(self._gradient_step_of_matrices(x, step, sign), self._gradient_step_of_kernels(x, step, sign))

    def _gradient_step_of_matrices(self, x: View, step: View, sign: float) -> float:
        n = x.index.size
        if n * n > _LARGEST_MATRIX or (step.index < 0).any():
            return math.inf
        outer = self._matrices_of(step.source)
        if outer is None or len(outer) != 1:
            return math.inf
        ((activation, back),) = outer.items()
        if activation.slopes is None or activation.slopes.low < 0.0 or activation is x.source:
            return math.inf
        before = activation.slopes.of
        inner = self._matrices_of(before.source, x.source)
        if inner is None or set(inner) != {x.source} or (before.index < 0).any():
            return math.inf
        forward = inner[x.source]
        hidden = activation.center.size
        if not self._afford(2.0 * n * hidden * min(n, hidden), _LARGEST_PROOF):
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
        return _gradient_bound(activation.slopes.high, scaled, stray)

    def _gradient_step_of_kernels(self, x: View, step: View, sign: float) -> float:
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
            composed = composed_kernel(made.adjoint, back, view.shape[1:], following.shape[1:], made.terms)
            if composed is None:
                return math.inf
            back, view = composed, following
        activation = view.source
        if not view.whole or activation.slopes is None or activation.slopes.low < 0.0:
            return math.inf
        kernels = self._kernels_of(activation.slopes.of, x.source)
        if kernels is None or set(kernels) != {identity_of(x)}:
            return math.inf
        (forward,) = kernels.values()
        one, other = forward.convolution, back.convolution
        if (one.strides, one.offsets, one.groups) != (other.strides, other.offsets, other.groups):
            return math.inf
        if one.kernel.shape != other.kernel.shape or not self._afford(2.0 * forward.cost, math.inf):
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
        return _gradient_bound(activation.slopes.high, scaled, stray)


def _least_squares(first_NH: Array, last_NH: Array) -> Array:
    """Non-negative weights S for which `first S` is near `last`; any would do for the proof."""
    square_H = np.sum(np.square(first_NH), axis=0)
    weights_H = np.sum(first_NH * last_NH, axis=0) / np.where(square_H > 0.0, square_H, 1.0)
    return np.where(np.isfinite(weights_H), np.maximum(weights_H, 0.0), 0.0)


def _distance_up(left: Array, right: Array) -> float:
    """Bound of the Frobenius norm of `left - right`, where `right` is known to one rounding of each entry."""
    rounding = mul_up(4.0 * FLOAT64.unit_roundoff, add_up(norm_up(left), norm_up(right)))
    return add_up(norm_up(left - right), rounding)


def _gradient_bound(highest_slope: float, scaled: float, stray: float) -> float:
    excess = add_up(mul_up(highest_slope, scaled, scaled), -1.0)
    return add_up(max(1.0, excess), mul_up(highest_slope, stray))


def _plain(source: Source) -> bool:
    """Whether all there is before it, since the last nonlinear tensor, is a multiplication by a number."""
    step = source.step
    return step is None or (step.scalar and step.operands[0].repetition <= 1 and _plain(step.operands[0].source))
