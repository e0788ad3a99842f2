"""TODO: service/certificate/kernels.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.certificate.convolutions import (
    absolute_convolution_bound,
    convolution_cost,
)
from service.certificate.rounding import FLOAT64, SMALLEST_NORMAL, add_up, gamma_up, mul_up
from service.certificate.values import Convolution, View

Array = NDArray[np.float64]
_LARGEST_KERNEL = 1 << 23
"""Entries of a kernel that is multiplied out."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """Part of an image tensor that is a convolution of one nonlinear image."""

    base: View
    convolution: Convolution
    deviation: float
    """Bound of the spectral norm of the exact map minus this one."""

    @property
    def cost(self) -> float:
        made = self.convolution
        return convolution_cost(made.kernel, self.base.shape[1:], made.strides, made.groups)


def identity_convolution(shape: tuple[int, ...], factor: float = 1.0) -> Convolution:
    """The multiplication of an image `C x *n` by a number."""
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
    """The kernel of the same convolution written with fewer groups; `fewer` divides `groups`."""
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


def composed_kernel(
    outer: Convolution, inner: Kernel, middle: tuple[int, ...], after: tuple[int, ...], roundings: int
) -> Kernel | None:
    """`outer` of `inner` as one convolution; None where the border of the image between them is in the way.

    Args:
        outer, inner: the steps.
        middle: size of the image between them.
        after: size of the result.
        roundings: that the numbers of `outer` carry already.
    """
    if _is_identity(outer) and after == middle and roundings <= 2:
        # With zeros behind the image it would cut off what `inner` has there.
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
    if outer.kernel.shape[0] * per_group * math.prod(extent) > _LARGEST_KERNEL:
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
        tuple(s1 * s2 for s1, s2 in zip(first.strides, outer.strides, strict=True)),
        tuple(p1 + s1 * p2 for p1, s1, p2 in zip(first.offsets, first.strides, outer.offsets, strict=True)),
        groups,
    )
    return Kernel(inner.base, made, deviation)


def added(left: Kernel, right: Kernel) -> Kernel | None:
    """The sum of two convolutions of one image."""
    one, other = left.convolution, right.convolution
    if one.strides != other.strides or one.kernel.shape[0] != other.kernel.shape[0]:
        return None
    groups = math.gcd(one.groups, other.groups)
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
