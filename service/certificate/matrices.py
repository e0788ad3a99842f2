"""Consecutive linear steps multiplied out as matrices, where these are small.

A tensor is `sum M_h h + constant` over the nonlinear tensors `h` before it. The `deviation` of each `M_h` bounds the
rounding of these products. Axes: N elements of h, K of the tensor.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.certificate.budget import Budget
from service.certificate.limits import MOST_ELEMENTS
from service.certificate.rounding import SMALLEST_NORMAL, add_up, gamma_up, mul_up, norm_up, sqrt_up
from service.certificate.values import LinearStep, Source
from service.network.limits import WORK_OF_NUMBER

Array = NDArray[np.float64]

_LARGEST_MATRIX = 1 << 22
"""Entries of a matrix that is multiplied out."""
_LARGEST_STACK = 4 * MOST_ELEMENTS
"""Elements of an array on the way to a matrix, e.g. all windows of a pool."""


def is_small(entries: int) -> bool:
    """Return whether a matrix with this number of entries is multiplied out."""
    return entries <= _LARGEST_MATRIX


@dataclass(frozen=True, eq=False)
class Matrix:
    """The part of a tensor that depends on one nonlinear tensor of n elements."""

    images: Array
    """`n x *shape`: the tensor that each of its elements makes, alone and of value 1."""
    deviation: float
    """Bound of the spectral norm of the exact map minus this one."""


class Matrices:
    """The linear maps of one graph as matrices; each is multiplied out once."""

    def __init__(self, budget: Budget) -> None:
        """Know no matrix; each costs of the budget."""
        self._budget = budget
        self._known: dict[tuple[Source, Source | None], dict[Source, Matrix] | None] = {}

    def of(self, source: Source, base: Source | None = None) -> dict[Source, Matrix] | None:
        """Return the maps from the nonlinear tensors before `source`, or from `base` where it is met.

        Null where one of them is too large, or beyond the budget.
        """
        key = (source, base)
        if key not in self._known:
            if source.step is not None and source is not base:
                made = self.through(source.step, source.center.shape, base)
            elif self._affords(source.center.size**2):
                n = source.center.size
                made = {source: Matrix(np.eye(n).reshape(n, *source.center.shape), 0.0)}
            else:
                made = None
            self._known[key] = made
        return self._known[key]

    def through(
        self, step: LinearStep, shape: tuple[int, ...], base: Source | None = None
    ) -> dict[Source, Matrix] | None:
        """Return the maps of the result of a step.

        Args:
            step: the last step.
            shape: of its result.
            base: tensor to stop at; default: the nonlinear ones.
        """
        parts = [self.of(view.source, base) for view in step.operands]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        result: dict[Source, Matrix] = {}
        for source in dict.fromkeys(source for part in found for source in part):
            matrix = self._applied(step, shape, source, found)
            if matrix is None:
                return None
            result[source] = matrix
        return result

    def _affords(self, entries: int, cost: float = 0.0) -> bool:
        return is_small(entries) and self._budget.affords(WORK_OF_NUMBER * entries + cost)

    def _applied(
        self, step: LinearStep, shape: tuple[int, ...], base: Source, parts: list[dict[Source, Matrix]]
    ) -> Matrix | None:
        """Return the map of `base` through a step, whose operands have the maps `parts`; null: it is too large."""
        n = base.center.size
        largest = max(math.prod(shape), *(view.index.size for view in step.operands))
        cost = n * (WORK_OF_NUMBER * step.widest + float(math.prod(shape)) * step.terms)
        if n * step.widest > _LARGEST_STACK or not self._affords(n * largest, cost):
            return None
        return _multiplied_out(step, base, parts)


def _multiplied_out(step: LinearStep, base: Source, parts: list[dict[Source, Matrix]]) -> Matrix | None:
    n = base.center.size
    stacks: list[Array] = []
    deviations: list[float] = []
    for view, part in zip(step.operands, parts, strict=True):
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
    return Matrix(images, deviation)
