"""Proved norms of convolutions, and their evaluation at one point.

A convolution with zero padding is a compression of the convolution on a torus that is large enough, where the
Fourier transform makes it block-diagonal: one matrix, the symbol, for each frequency. (The torus of the image's own
size is *not* large enough: there the kernel wraps around.)

Axes: O output channels, I input channels, F frequencies.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.certificate.norms import spectral_norm_bound
from service.certificate.rounding import (
    FLOAT64,
    SMALLEST_NORMAL,
    add_up,
    div_up,
    down,
    gamma_up,
    mul_up,
    norm_up,
    sqrt_up,
    sum_up,
)

Array = NDArray[np.float64]


def convolve(image: Array, kernel: Array, strides: Sequence[int], dilations: Sequence[int], groups: int) -> Array:
    """Cross-correlation of a padded `I x *S` image with an `O x I/groups x *K` kernel, as ONNX defines Conv."""
    spatial = kernel.ndim - 2
    extents = [(size - 1) * dilation + 1 for size, dilation in zip(kernel.shape[2:], dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(image, extents, axis=tuple(range(1, spatial + 1)))
    picks = tuple(slice(None, None, stride) for stride in strides)
    taps = tuple(slice(None, None, dilation) for dilation in dilations)
    windows = windows[(slice(None), *picks, *taps)]
    channels_in = image.shape[0] // groups
    channels_out = kernel.shape[0] // groups
    contracted = [0, *range(1 + spatial, 1 + 2 * spatial)]
    return np.concatenate(
        [
            np.tensordot(
                kernel[g * channels_out : (g + 1) * channels_out],
                windows[g * channels_in : (g + 1) * channels_in],
                axes=([1, *range(2, 2 + spatial)], contracted),
            )
            for g in range(groups)
        ]
    )


def transposed_convolve(
    image: Array, kernel: Array, strides: Sequence[int], dilations: Sequence[int], groups: int
) -> Array:
    """The full result of ONNX ConvTranspose without pads: the adjoint of `convolve`, `I x *S` to `O x *T`."""
    size = [
        (n - 1) * s + (k - 1) * d + 1
        for n, k, s, d in zip(image.shape[1:], kernel.shape[2:], strides, dilations, strict=True)
    ]
    per_group = kernel.shape[0] // groups
    channels = kernel.shape[1]
    result = np.zeros((channels * groups, *size))
    for tap in itertools.product(*(range(k) for k in kernel.shape[2:])):
        places = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilations, image.shape[1:], strides, strict=True)
        )
        for g in range(groups):
            weights = kernel[(slice(g * per_group, (g + 1) * per_group), slice(None), *tap)]
            part = np.tensordot(weights, image[g * per_group : (g + 1) * per_group], axes=(0, 0))
            result[(slice(g * channels, (g + 1) * channels), *places)] += part
    return result


def convolution_norm_bound(
    kernel: Array, size: Sequence[int], strides: Sequence[int], dilations: Sequence[int], groups: int
) -> float:
    """Upper bound of the L2 norm of a convolution with zero padding of any widths.

    Args:
        kernel: `O x I/groups x *K`.
        size: spatial size of the image before padding.
        strides, dilations: one number for each spatial axis.
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


def _one_group(kernel: Array, size: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> float:
    for axis, (stride, dilation) in enumerate(zip(strides, dilations, strict=True)):
        kernel = _phases(_dilated(kernel, 2 + axis, dilation), 2 + axis, stride)
    # n points cover ceil(n / stride) coarse ones, and one more where padding shifts them by a part of a stride.
    coarse = [-(-n // s) + (1 if s > 1 else 0) for n, s in zip(size, strides, strict=True)]
    if all(k == 1 for k in kernel.shape[2:]):
        return spectral_norm_bound(kernel.reshape(kernel.shape[0], -1))
    torus = [n + k - 1 for n, k in zip(coarse, kernel.shape[2:], strict=True)]
    return torus_norm_bound(kernel, torus)


def _dilated(kernel: Array, axis: int, dilation: int) -> Array:
    if dilation == 1:
        return kernel
    shape = list(kernel.shape)
    shape[axis] = (shape[axis] - 1) * dilation + 1
    spread = np.zeros(shape)
    spread[(slice(None),) * axis + (slice(None, None, dilation),)] = kernel
    return spread


def _phases(kernel: Array, axis: int, stride: int) -> Array:
    """Kernel of the stride-1 convolution on the phases: tap t becomes tap t // stride of phase t % stride."""
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


def torus_norm_bound(kernel: Array, torus: Sequence[int]) -> float:
    """Upper bound of `max ||K^(w)||_2` over the frequencies of the torus, `K^(w) = sum_t K_t exp(-i <w, t>)`.

    Proof by Cholesky, as in `spectral_norm_bound`: one `s` for all frequencies, `s I - K^* K` factorised for each.
    Complex products are off by at most `gamma_4n` in place of `gamma_n` (Higham 2002, lemma 3.5). Conjugate
    frequencies have equal norms, so that half of them suffices.
    """
    peak = float(np.max(np.abs(kernel), initial=0.0))
    if peak == 0.0:
        return 0.0
    exponent = math.frexp(peak)[1]
    kernel = np.ldexp(kernel, -exponent)
    if kernel.shape[0] < kernel.shape[1]:
        # The adjoint has the same norm and the smaller Gram matrix.
        kernel = np.swapaxes(kernel, 0, 1)
    n_out, n_in = kernel.shape[:2]
    taps = kernel.reshape(n_out * n_in, -1)
    # |error of an entry of the symbol| <= gamma * sum |K_t|: the sum, and for each axis some 20 u of a cosine and sine
    # whose argument is reduced exactly in integers first.
    gamma_entry = gamma_up(8 * (taps.shape[1] + 16))
    symbol_error = mul_up(gamma_entry, norm_up(np.abs(taps).sum(axis=1)), 1.0 + 2.0**-30)
    frobenius = add_up(norm_up(np.abs(taps).sum(axis=1)), symbol_error)
    frequencies = _half_of_the_frequencies(torus)
    phases = _phase_factors(kernel.shape[2:], torus, frequencies)
    guess = _estimate(taps, phases, n_out, n_in)
    unit = FLOAT64.unit_roundoff
    gram_error = add_up(
        mul_up(gamma_up(4 * (n_out + 2)), frobenius, frobenius), mul_up(16.0 * n_out * n_in, SMALLEST_NORMAL)
    )
    for factor in (*(1.0 + 2.0**-power for power in (12, 9, 7, 6, 5, 3)), 2.0, 4.0):
        shift = add_up(mul_up(guess, guess, factor), mul_up(16.0 * n_in * unit, frobenius, frobenius))
        if _all_factorise(taps, phases, n_out, n_in, shift):
            gamma = gamma_up(4 * (n_in + 2))
            trace_bound = mul_up(float(n_in), add_up(shift, gram_error))
            slack = add_up(
                mul_up(div_up(gamma, down(1.0 - gamma)), trace_bound),
                mul_up(4.0 * unit, add_up(shift, mul_up(frobenius, frobenius))),
                gram_error,
                mul_up(32.0 * n_in * n_in, SMALLEST_NORMAL),
            )
            return mul_up(add_up(sqrt_up(add_up(shift, slack)), symbol_error), 2.0**exponent)
    return mul_up(frobenius, 2.0**exponent)


def _half_of_the_frequencies(torus: Sequence[int]) -> NDArray[np.int64]:
    """One of each pair `w`, `-w`: integer vectors, F x axes."""
    chosen: list[tuple[int, ...]] = []
    for frequency in itertools.product(*(range(n) for n in torus)):
        conjugate = tuple(-w % n for w, n in zip(frequency, torus, strict=True))
        if frequency <= conjugate:
            chosen.append(frequency)
    return np.array(chosen, dtype=np.int64)


def _phase_factors(
    kernel_size: Sequence[int], torus: Sequence[int], frequencies: NDArray[np.int64]
) -> NDArray[np.complex128]:
    """`exp(-2 pi i sum_axis w t / n)`, F x T."""
    positions = np.array(list(itertools.product(*(range(k) for k in kernel_size))), dtype=np.int64)
    factors = np.ones((len(frequencies), len(positions)), dtype=np.complex128)
    for axis, n in enumerate(torus):
        turns = np.outer(frequencies[:, axis], positions[:, axis]) % n
        angle = 2.0 * np.pi * (np.arange(n) / n)
        factors *= (np.cos(angle) - 1j * np.sin(angle))[turns]
    return factors


def _symbols(taps: Array, phases: NDArray[np.complex128], n_out: int, n_in: int) -> NDArray[np.complex128]:
    return (phases @ taps.T).reshape(-1, n_out, n_in)


def _blocks(n_frequencies: int, entries: int) -> list[NDArray[np.int64]]:
    """Index blocks that keep the symbols of a block below some 64 MB."""
    return np.array_split(np.arange(n_frequencies), max(1, -(-n_frequencies * entries // (1 << 22))))


def _estimate(taps: Array, phases: NDArray[np.complex128], n_out: int, n_in: int) -> float:
    """Estimate of the largest norm: only a guess for the proof to check.

    A few steps of power iteration rank the frequencies; the norms of the foremost are then computed.
    """
    rough = np.zeros(len(phases))
    start = 1.0 + 0.5 * np.cos(np.arange(n_in) * 2.399963)
    for block in _blocks(len(phases), n_out * n_in):
        symbols = _symbols(taps, phases[block], n_out, n_in)
        vector = np.broadcast_to(start / np.linalg.norm(start), (len(block), n_in)).astype(np.complex128)
        for _ in range(8):
            image = np.einsum("foi,fi->fo", symbols, vector)
            vector = np.einsum("foi,fo->fi", symbols.conj(), image)
            rough[block] = np.linalg.norm(vector, axis=1)
            vector /= np.maximum(rough[block], 1e-300)[:, None]
    foremost = np.argsort(rough)[-16:]
    return max(float(np.linalg.norm(symbol, 2)) for symbol in _symbols(taps, phases[foremost], n_out, n_in))


def _all_factorise(taps: Array, phases: NDArray[np.complex128], n_out: int, n_in: int, shift: float) -> bool:
    diagonal = np.arange(n_in)
    for block in _blocks(len(phases), n_out * n_in):
        symbols = _symbols(taps, phases[block], n_out, n_in)
        difference = -(np.conj(np.swapaxes(symbols, 1, 2)) @ symbols)
        # Cholesky reads the lower triangle and the real diagonal.
        difference[:, diagonal, diagonal] = shift + difference[:, diagonal, diagonal].real
        try:
            factorised = np.linalg.cholesky(difference)
        except np.linalg.LinAlgError:
            return False
        if not np.isfinite(factorised).all():
            return False
    return True


def absolute_convolution_bound(kernel: Array, groups: int) -> float:
    """Upper bound of the norm of the convolution with `|kernel|`: the factor of rounding errors.

    Schur's test: `sqrt(largest row sum * largest column sum)` of the operator, for any padding, stride and dilation.
    """
    absolute = np.abs(kernel)
    row = max(sum_up(weights) for weights in absolute)
    per_group = absolute.reshape(groups, kernel.shape[0] // groups, *kernel.shape[1:])
    column = max(sum_up(per_group[g][:, i]) for g in range(groups) for i in range(kernel.shape[1]))
    return sqrt_up(mul_up(row, column))
