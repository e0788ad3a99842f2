"""Consecutive linear steps of images multiplied out as convolution kernels.

An image is `sum M_h h + constant` over the nonlinear images `h` before it, each `M_h` a convolution. The `deviation`
of each `M_h` bounds the rounding of these products.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.certificate.budget import Budget
from service.certificate.convolutions import absolute_convolution_bound, convolution_cost
from service.certificate.limits import fits
from service.certificate.rounding import FLOAT64, SMALLEST_NORMAL, add_up, gamma_up, mul_up
from service.certificate.values import Convolution, Identity, LinearStep, Source, View, identity_of
from service.network.limits import WORK_OF_NUMBER

Array = NDArray[np.float64]
_LARGEST_KERNEL = 1 << 23
"""Entries of a kernel that is multiplied out."""
_WORK_OF_TAP = 2.0**15
"""Multiply-adds that take as long as the call that adds one tap."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """The part of an image that is a convolution of one nonlinear image."""

    base: View
    convolution: Convolution
    deviation: float
    """Bound of the spectral norm of the exact map minus this one."""

    @property
    def cost(self) -> float:
        """Multiply-adds for a proof of its norm, approximately."""
        made = self.convolution
        return convolution_cost(made.kernel, self.base.shape[1:], made.strides, made.groups)


def identity_convolution(shape: tuple[int, ...], factor: float = 1.0) -> Convolution:
    """Return the multiplication of an image `C x *n` by a number."""
    channels, *size = shape
    kernel = np.full((channels, 1, *[1] * len(size)), factor)
    return Convolution(kernel, (1,) * len(size), (0,) * len(size), channels)


def _is_identity(convolution: Convolution) -> bool:
    made = convolution.kernel
    return (
        made.shape[0] == convolution.groups
        and made.size == made.shape[0]
        and set(convolution.strides) == {1}
        and set(convolution.offsets) == {0}
        and bool((made == 1.0).all())
    )


def _in_groups(kernel: Array, groups: int, fewer: int) -> Array:
    """Return the kernel of the same convolution written with fewer groups; `fewer` divides `groups`."""
    if groups == fewer:
        return kernel
    together = groups // fewer
    per_out, per_in = kernel.shape[0] // groups, kernel.shape[1]
    spread = np.zeros((kernel.shape[0], per_in * together, *kernel.shape[2:]))
    for group in range(groups):
        rows = slice(group * per_out, (group + 1) * per_out)
        place = group % together
        spread[rows, place * per_in : (place + 1) * per_in] = kernel[rows]
    return spread


def _fit_in_groups(convolutions: Sequence[Convolution], fewer: int) -> bool:
    """Return whether kernels that are written with fewer groups are within the limit."""
    return all(fits(made.kernel.size, made.groups // fewer) for made in convolutions)


class Kernels:
    """The linear maps of one graph as kernels; each is multiplied out once."""

    def __init__(self, budget: Budget) -> None:
        """Know no kernel; each costs of the budget."""
        self._budget = budget
        self._known: dict[tuple[Source, Source | None], dict[Identity, Kernel] | None] = {}

    def of(self, view: View, base: Source | None = None) -> dict[Identity, Kernel] | None:
        """Return the maps from the nonlinear images before `view`, or from `base` where it is met.

        Null where one of them is no convolution, or too large.
        """
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
        if key not in self._known:
            self._known[key] = self.through(source.step, source.center.shape, base)
        return self._known[key]

    def through(
        self, step: LinearStep, shape: tuple[int, ...], base: Source | None = None
    ) -> dict[Identity, Kernel] | None:
        """Return the maps of the result of a step.

        Args:
            step: the last step.
            shape: of its result.
            base: tensor to stop at; default: the nonlinear ones.
        """
        if step.convolutions is None:
            return None
        result: dict[Identity, Kernel] = {}
        for view, outer in zip(step.operands, step.convolutions, strict=True):
            inner = self.of(view, base)
            if inner is None:
                return None
            for key, kernel in inner.items():
                made = compose_kernels(outer, kernel, view.shape[1:], shape[1:], step.terms, self._budget)
                if made is not None and key in result:
                    made = add_kernels(result[key], made, self._budget)
                if made is None:
                    return None
                result[key] = made
        return result


def compose_kernels(
    outer: Convolution,
    inner: Kernel,
    middle: tuple[int, ...],
    after: tuple[int, ...],
    roundings: int,
    budget: Budget,
) -> Kernel | None:
    """Return `outer` of `inner` as one convolution; null where the border of the image between them is in the way.

    Null as well where it is too large, or beyond the budget.

    Args:
        outer: the second step.
        inner: the first step.
        middle: size of the image between them.
        after: size of the result.
        roundings: of the numbers of `outer`, so far.
        budget: of the graph.
    """
    if _is_identity(outer) and after == middle and roundings <= 2:
        # With zeros behind the image it would cut off the results of `inner` there.
        return inner
    first, base_size = inner.convolution, inner.base.shape[1:]
    axes = range(len(middle))
    pointwise = (
        set(first.kernel.shape[2:]) == {1} and set(first.strides) == {1} and set(first.offsets) == {0}
    ) and middle == base_size
    inside = all(
        outer.offsets[a] <= 0
        and (after[a] - 1) * outer.strides[a] + outer.kernel.shape[2 + a] - 1 - outer.offsets[a] <= middle[a] - 1
        for a in axes
    )
    if not (pointwise or inside):
        # Outside of the image between, the outer step sees zeros where the joint convolution would see more.
        return None
    groups = math.gcd(outer.groups, first.groups)
    extent = tuple(
        k1 + s1 * (k2 - 1)
        for k1, s1, k2 in zip(first.kernel.shape[2:], first.strides, outer.kernel.shape[2:], strict=True)
    )
    per_group = inner.base.shape[0] // groups
    strides = tuple(s1 * s2 for s1, s2 in zip(first.strides, outer.strides, strict=True))
    if outer.kernel.shape[0] * per_group * math.prod(extent) > _LARGEST_KERNEL:
        return None
    # The norm is that of a kernel filled up to whole strides.
    whole = [-(-k // s) * s for k, s in zip(extent, strides, strict=True)]
    if not (fits(outer.kernel.shape[0], per_group, *whole) and _fit_in_groups((outer, first), groups)):
        return None
    taps, entries = math.prod(outer.kernel.shape[2:]), outer.kernel.shape[0] * per_group * math.prod(extent)
    products = outer.kernel.size * (outer.groups // groups) * per_group * math.prod(first.kernel.shape[2:])
    if not budget.affords(WORK_OF_NUMBER * entries + _WORK_OF_TAP * taps * groups + products):
        return None
    outer_kernel = _in_groups(outer.kernel, outer.groups, groups)
    inner_kernel = _in_groups(first.kernel, first.groups, groups)
    outputs, channels = outer_kernel.shape[0] // groups, inner_kernel.shape[0] // groups
    kernel = np.zeros((outer_kernel.shape[0], per_group, *extent))
    for tap in np.ndindex(*outer_kernel.shape[2:]):
        place = tuple(
            slice(t * s, t * s + k) for t, s, k in zip(tap, first.strides, first.kernel.shape[2:], strict=True)
        )
        weights = outer_kernel[(slice(None), slice(None), *tap)]
        for g in range(groups):
            rows = slice(g * outputs, (g + 1) * outputs)
            part = inner_kernel[g * channels : (g + 1) * channels]
            kernel[(rows, slice(None), *place)] += np.tensordot(weights[rows], part, axes=(1, 0))
    if not np.isfinite(kernel).all():
        return None
    outer_size = absolute_convolution_bound(outer.kernel, outer.groups)
    inner_size = absolute_convolution_bound(first.kernel, first.groups)
    terms = math.prod(outer_kernel.shape[1:])
    deviation = add_up(
        mul_up(outer_size, inner.deviation),
        mul_up(gamma_up(terms + roundings + 2), outer_size, inner_size),
        mul_up(4.0 * terms * kernel.size, SMALLEST_NORMAL),
    )
    made = Convolution(
        kernel,
        strides,
        tuple(p1 + s1 * p2 for p1, s1, p2 in zip(first.offsets, first.strides, outer.offsets, strict=True)),
        groups,
    )
    return Kernel(inner.base, made, deviation)


def add_kernels(left: Kernel, right: Kernel, budget: Budget) -> Kernel | None:
    """Return the sum of two convolutions of one image; null where their results differ in size or spacing.

    Null as well where it is too large, or beyond the budget.

    Args:
        left: one of them.
        right: the other one.
        budget: of the graph.
    """
    one, other = left.convolution, right.convolution
    if one.strides != other.strides or one.kernel.shape[0] != other.kernel.shape[0]:
        return None
    groups = math.gcd(one.groups, other.groups)
    entries = sum(made.kernel.size * (made.groups // groups) for made in (one, other))
    if not (_fit_in_groups((one, other), groups) and budget.affords(WORK_OF_NUMBER * entries)):
        return None
    kernels = [_in_groups(made.kernel, made.groups, groups) for made in (one, other)]
    offsets = tuple(max(p, q) for p, q in zip(one.offsets, other.offsets, strict=True))
    starts = [tuple(p - q for p, q in zip(offsets, made.offsets, strict=True)) for made in (one, other)]
    extent = tuple(
        max(start[a] + kernel.shape[2 + a] for start, kernel in zip(starts, kernels, strict=True))
        for a in range(len(offsets))
    )
    if math.prod((*kernels[0].shape[:2], *extent)) > _LARGEST_KERNEL:
        return None
    total = np.zeros((*kernels[0].shape[:2], *extent))
    for start, kernel in zip(starts, kernels, strict=True):
        place = tuple(slice(low, low + k) for low, k in zip(start, kernel.shape[2:], strict=True))
        total[(slice(None), slice(None), *place)] += kernel
    sizes = [absolute_convolution_bound(made.kernel, made.groups) for made in (one, other)]
    deviation = add_up(left.deviation, right.deviation, mul_up(2.0 * FLOAT64.unit_roundoff, add_up(*sizes)))
    return Kernel(left.base, Convolution(total, one.strides, offsets, groups), deviation)
