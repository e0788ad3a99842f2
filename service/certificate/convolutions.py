"""Convolutions: their evaluation, and proved bounds of their norms.

A convolution with zero padding is a compression of the convolution on a torus that is large enough. (The torus of the
image's own size is *not* large enough: there the kernel wraps around.)

Axes: O output channels, I input channels, K taps and S points along each spatial axis.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.certificate.norms import spectral_norm_bound
from service.certificate.rounding import mul_up, sqrt_up, sum_up
from service.certificate.torus import torus_norm_bound

Array = NDArray[np.float64]


def convolve(images: Array, kernel: Array, strides: Sequence[int], dilations: Sequence[int], groups: int) -> Array:
    """Return the cross-correlation of images with a kernel, as ONNX defines Conv: `B x O x *out`.

    Args:
        images: padded, `B x I x *S`.
        kernel: `O x I/groups x *K`.
        strides: one for each spatial axis.
        dilations: one for each spatial axis.
        groups: of channels.
    """
    n_images, size = len(images), images.shape[2:]
    after = [
        (n - (k - 1) * d - 1) // s + 1 for n, k, s, d in zip(size, kernel.shape[2:], strides, dilations, strict=True)
    ]
    grouped = images.reshape(n_images, groups, -1, *size)
    weights = kernel.reshape(groups, -1, *kernel.shape[1:])
    result = np.zeros((n_images, groups, weights.shape[1], math.prod(after)))
    for tap in np.ndindex(*kernel.shape[2:]):
        picks = tuple(
            slice(t * d, t * d + (m - 1) * s + 1, s) for t, d, m, s in zip(tap, dilations, after, strides, strict=True)
        )
        seen = grouped[(slice(None), slice(None), slice(None), *picks)].reshape(*grouped.shape[:3], -1)
        result += weights[(slice(None), slice(None), slice(None), *tap)] @ seen
    return result.reshape(n_images, kernel.shape[0], *after)


def transposed_convolve(
    images: Array, kernel: Array, strides: Sequence[int], dilations: Sequence[int], groups: int
) -> Array:
    """Return the full result of ONNX ConvTranspose without pads, the adjoint of `convolve`: `B x O x *T`.

    Args:
        images: `B x I x *S`.
        kernel: `I x O/groups x *K`.
        strides: one for each spatial axis.
        dilations: one for each spatial axis.
        groups: of channels.
    """
    n_images, size = len(images), images.shape[2:]
    full = [
        (n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(size, kernel.shape[2:], strides, dilations, strict=True)
    ]
    grouped = images.reshape(n_images, groups, -1, math.prod(size))
    weights = np.swapaxes(kernel.reshape(groups, -1, *kernel.shape[1:]), 1, 2)
    result = np.zeros((n_images, groups, weights.shape[1], *full))
    for tap in np.ndindex(*kernel.shape[2:]):
        places = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilations, size, strides, strict=True)
        )
        part = weights[(slice(None), slice(None), slice(None), *tap)] @ grouped
        result[(slice(None), slice(None), slice(None), *places)] += part.reshape(*part.shape[:3], *size)
    return result.reshape(n_images, -1, *full)


def convolution_norm_bound(
    kernel: Array, size: Sequence[int], strides: Sequence[int], dilations: Sequence[int], groups: int
) -> float:
    """Return an upper bound of the L2 norm of a convolution with zero padding of any widths.

    Args:
        kernel: `O x I/groups x *K`.
        size: spatial size of the image before padding.
        strides: one for each spatial axis.
        dilations: one for each spatial axis.
        groups: groups act on disjoint channels, so that the largest norm of a group counts.

    Theorem. Let the torus have at least `n + k - 1` points along each axis of n points and a kernel of k (dilated).
    The image, zero elsewhere, is embedded in it isometrically, no sum wraps around, and reading some of the results
    never expands: so the norm is at most that on the torus, the largest `||K^(w)||_2` over its frequencies. A stride
    `s` splits image and kernel in `s` phases along the axis (space to depth), each of stride 1.
    """
    channels_out = kernel.shape[0] // groups
    return max(
        _one_group(kernel[g * channels_out : (g + 1) * channels_out], size, strides, dilations) for g in range(groups)
    )


def convolution_cost(kernel: Array, size: Sequence[int], strides: Sequence[int], groups: int) -> float:
    """Return the approximate multiply-adds of the proof of `convolution_norm_bound`.

    Args:
        kernel: `O x I/groups x *K`, dilations spelled out.
        size: spatial size of the image before padding.
        strides: one for each spatial axis.
        groups: of channels.
    """
    phases = math.prod(strides)
    outputs, inputs = kernel.shape[0] / groups, kernel.shape[1] * phases
    small, large = min(outputs, inputs), max(outputs, inputs)
    taps = [-(-k // s) for k, s in zip(kernel.shape[2:], strides, strict=True)]
    frequencies = math.prod(n / s + k for n, s, k in zip(size, strides, taps, strict=True)) / 2.0
    lags = math.prod(2 * k - 1 for k in taps) / 2.0
    factorisations = frequencies * small * small * (4.0 * small + 2.0 * lags)
    return groups * (factorisations + lags * math.prod(taps) * large * small * small)


def circular_norm_bound(kernel: Array, size: Sequence[int], strides: Sequence[int], groups: int) -> float:
    """Return an upper bound of the L2 norm of a circular convolution.

    Args:
        kernel: `O x I/groups x *K`, dilations spelled out.
        size: spatial size of the image, which the strides divide.
        strides: one for each spatial axis.
        groups: of channels.
    """
    torus = [n // s for n, s in zip(size, strides, strict=True)]
    channels_out = kernel.shape[0] // groups
    return max(
        torus_norm_bound(_in_phases(kernel[g * channels_out : (g + 1) * channels_out], strides), torus)
        for g in range(groups)
    )


def _one_group(kernel: Array, size: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> float:
    kernel = _in_phases(dilated(kernel, dilations), strides)
    # n points cover ceil(n / stride) coarse ones, and one more where padding shifts them by a part of a stride.
    coarse = [-(-n // s) + (1 if s > 1 else 0) for n, s in zip(size, strides, strict=True)]
    if all(k == 1 for k in kernel.shape[2:]):
        return spectral_norm_bound(kernel.reshape(kernel.shape[0], -1))
    torus = [n + k - 1 for n, k in zip(coarse, kernel.shape[2:], strict=True)]
    return torus_norm_bound(kernel, torus, coarse)


def dilated(kernel: Array, dilations: Sequence[int]) -> Array:
    """Return the same kernel with its dilations spelled out as zeros."""
    size = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilations, strict=True)]
    spread = np.zeros((*kernel.shape[:2], *size))
    spread[(slice(None), slice(None), *(slice(None, None, d) for d in dilations))] = kernel
    return spread


def _in_phases(kernel: Array, strides: Sequence[int]) -> Array:
    """Return the kernel of stride 1 on the phases of the image, along all axes."""
    for axis, stride in enumerate(strides):
        kernel = _phases(kernel, 2 + axis, stride)
    return kernel


def _phases(kernel: Array, axis: int, stride: int) -> Array:
    """Return the kernel of stride 1 on the phases along one axis: tap t is tap t // stride of phase t % stride."""
    if stride == 1:
        return kernel
    missing = -kernel.shape[axis] % stride
    widths = [(0, 0)] * kernel.ndim
    widths[axis] = (0, missing)
    padded = np.pad(kernel, widths)
    taps = padded.shape[axis] // stride
    split = padded.reshape(*padded.shape[:axis], taps, stride, *padded.shape[axis + 1 :])
    moved = np.moveaxis(split, axis + 1, 2)
    return moved.reshape(kernel.shape[0], kernel.shape[1] * stride, *moved.shape[3:])


def absolute_convolution_bound(kernel: Array, groups: int) -> float:
    """Return an upper bound of the norm of the convolution with `|kernel|`: the factor of rounding errors.

    Schur's test: `sqrt(largest row sum * largest column sum)` of the operator, for any padding, stride and dilation.
    """
    absolute = np.abs(kernel)
    row = max(sum_up(weights) for weights in absolute)
    per_group = absolute.reshape(groups, kernel.shape[0] // groups, *kernel.shape[1:])
    column = max(sum_up(per_group[g][:, i]) for g in range(groups) for i in range(kernel.shape[1]))
    return sqrt_up(mul_up(row, column))
