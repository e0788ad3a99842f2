"""Lipschitz bounds of consecutive linear steps taken as one map.

A product of norms, and a sum over branches, are larger than the norm of the product: `I + W` of a residual, an im2col
that repeats elements before it weighs them, a normalisation behind a convolution. The linear steps since the last
nonlinear tensor `h` are multiplied out, as a matrix where that is small and as a convolution kernel where all of them
are convolutions; with several such `h` the value is `sum M_h h + constant`, and its bound `sum ||M_h|| L_h`. Maps that
cost more than they gain are left alone, see `budget`.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.certificate.budget import LARGEST_PROOF, Budget
from service.certificate.convolutions import convolution_norm_bound
from service.certificate.descent import step_of_kernels, step_of_matrices
from service.certificate.kernels import Kernels
from service.certificate.limits import fits
from service.certificate.margins import Head
from service.certificate.matrices import Matrices
from service.certificate.norms import pairwise_distance_bounds, spectral_norm_bound
from service.certificate.rounding import add_up, mul_up
from service.certificate.values import Convolution, Domain, LinearStep, Source, View

Array = NDArray[np.float64]


class Joint:
    """The joint maps of one graph, and their bounds."""

    def __init__(self, domain: Domain, work: float) -> None:
        """Know no bound yet.

        Args:
            domain: of the images.
            work: multiply-adds that all of them may take; more than `Budget` has are not needed.
        """
        self._domain = domain
        self._budget = Budget()
        self._budget.left = min(self._budget.left, work)
        self._matrices = Matrices(self._budget)
        self._kernels = Kernels(self._budget)
        self._norms: dict[object, float] = {}

    def affords(self, cost: float) -> bool:
        """Spend some multiply-adds of the budget of all joint bounds; return false where it has fewer left."""
        return self._budget.affords(cost)

    def lipschitz(self, step: LinearStep, shape: tuple[int, ...]) -> float:
        """Return a Lipschitz bound, from the image, of the result of `step`; infinity where a joint map is no help."""
        if step.joint or _nothing_to_gain(step):
            return math.inf
        matrices = self._matrices.through(step, shape)
        if matrices is None:
            return self._by_kernels(step, shape)
        total = 0.0
        for base, matrix in matrices.items():
            columns = matrix.images.reshape(len(matrix.images), -1)
            small, large = sorted(columns.shape)
            if not self._budget.affords(float(small) * small * large, LARGEST_PROOF):
                return self._by_kernels(step, shape)
            norm = add_up(spectral_norm_bound(columns), matrix.deviation)
            total = add_up(total, mul_up(norm, base.lipschitz))
        return total

    def margin_bounds(self, logits: View) -> Array | None:
        """Return `K x K` Lipschitz bounds of all differences of `logits`; null where they are not linear."""
        heads = self.heads(logits)
        if heads is None:
            return None
        total_KK = np.zeros((logits.index.size, logits.index.size))
        for head in heads:
            # A row of a map is off by at most its norm, and a difference by that of two rows.
            distance_KK = pairwise_distance_bounds(head.rows_KM) + 2.0 * head.deviation
            bound_KK = np.nextafter(np.nextafter(distance_KK, np.inf) * head.lipschitz, np.inf)
            total_KK = np.nextafter(total_KK + bound_KK, np.inf)
        np.fill_diagonal(total_KK, 0.0)
        return total_KK

    def heads(self, logits: View) -> tuple[Head, ...] | None:
        """Return `logits` as a sum of linear forms of tensors before them; null where they are not linear."""
        if logits.source.step is None or (logits.index < 0).any():
            return None
        matrices = self._matrices.of(logits.source)
        if matrices is None or not all(fits(len(matrix.images), logits.index.size) for matrix in matrices.values()):
            return None
        return tuple(
            Head(
                np.ascontiguousarray(matrix.images.reshape(len(matrix.images), -1)[:, logits.index].T),
                base.lipschitz,
                matrix.deviation,
            )
            for base, matrix in matrices.items()
        )

    def matrix_norm(self, matrix_MN: Array) -> float:
        """Return a bound of the spectral norm; infinity where the proof is beyond the budget."""
        small, large = sorted(matrix_MN.shape)
        if not self._budget.affords(float(small) * small * large, LARGEST_PROOF):
            return math.inf
        return spectral_norm_bound(matrix_MN)

    def convolution_norm(self, convolution: Convolution, size: Sequence[int]) -> float:
        """Return `convolution_norm_bound` of images of `size`; each is proved once."""
        return self._affordable_norm(convolution, size, cost=0.0)

    def gradient_step(self, x: View, step: View, sign: float) -> float:
        """Return a Lipschitz bound of `x -> x + sign g(x)` where it is a step of gradient descent; else infinity.

        See `descent` for the theorem.

        Args:
            x: the tensor before the step; all elements of its source, each once.
            step: g.
            sign: 1 or -1.
        """
        if x.index.size != x.source.center.size or x.repetition != 1 or (x.index < 0).any():
            return math.inf
        return min(
            step_of_matrices(self._matrices, self._budget, x, step, sign),
            step_of_kernels(self._kernels, self._budget, x, step, sign),
        )

    def _by_kernels(self, step: LinearStep, shape: tuple[int, ...]) -> float:
        if len(step.operands) == 1 and step.operands[0].source.step is None:
            # The step alone: its norm is of this kind already.
            return math.inf
        kernels = self._kernels.through(step, shape)
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

    def _affordable_norm(self, convolution: Convolution, size: Sequence[int], cost: float) -> float:
        """Return the norm, proved once; infinity where it is not known yet and its `cost` is beyond the budget."""
        digest = hashlib.sha256(np.ascontiguousarray(convolution.kernel).tobytes()).digest()
        key = digest, convolution.kernel.shape, tuple(size), tuple(convolution.strides), convolution.groups
        if key not in self._norms:
            if not self._budget.affords(cost):
                return math.inf
            kernel, ones = convolution.kernel, [1] * len(size)
            self._norms[key] = convolution_norm_bound(kernel, size, convolution.strides, ones, convolution.groups)
        return self._norms[key]


def _nothing_to_gain(step: LinearStep) -> bool:
    if len(step.operands) != 1 or step.operands[0].repetition > 1:
        return False
    return step.scalar or (step.tight and _plain(step.operands[0].source))


def _plain(source: Source) -> bool:
    """Return whether all there is before it, since the last nonlinear tensor, is a multiplication by a number."""
    step = source.step
    return step is None or (step.scalar and step.operands[0].repetition <= 1 and _plain(step.operands[0].source))
