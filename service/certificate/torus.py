"""Proved norms of convolutions on a torus.

The Fourier transform makes them block-diagonal: one matrix, the symbol, for each frequency.

Axes: O output channels, I input channels, F frequencies, D lags.
"""

import itertools
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.certificate.limits import fits
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

_MOST_SHIFTS = 40
"""Terms of a correction: the linear programme takes the cube of their number."""
_CHANNELS_OF_A_CORRECTION = 64
"""Most input channels for a correction: the eigenvalues of all frequencies cost more than it gains, some 1e-3."""


def torus_norm_bound(kernel: Array, torus: Sequence[int], window: Sequence[int] | None = None) -> float:
    """Return an upper bound of `max ||K^(w)||_2` over the frequencies of the torus, `K^(w) = sum_t K_t exp(-i <w, t>)`.

    Proof by Cholesky, as in `spectral_norm_bound`: `s I - K^* K` factorised for each frequency. Complex products are
    off by at most `gamma_4n` in place of `gamma_n` (Higham 2002, lemma 3.5). Conjugate frequencies have equal norms,
    so that half of them suffices. Where a proof would be too large, or no factorisation succeeds, the Frobenius norm of
    `sum_t |K_t|` is returned.

    With a `window` the bound is that of images that vanish outside of it, and lower: let `P` restrict to the window
    and `B` be a convolution with `P B P >= 0`; then `P K^*K P <= P (K^*K + B) P`, and the norm on the torus of
    `K^*K + B` counts. `B` combines terms `c (cos(pi / (l + 1)) -+ cos <w, m>)` with `c >= 0`: shifts by `m` link the
    points of the window in chains of at most `l`, whose adjacency matrices have the norm `2 cos(pi / (l + 1))`.

    Args:
        kernel: `O x I x *K`.
        torus: points along each axis; with a window at least `n + k - 1`.
        window: points n along each axis.
    """
    peak = float(np.max(np.abs(kernel), initial=0.0))
    if peak == 0.0:
        return 0.0
    exponent = math.frexp(peak)[1]
    kernel = np.ldexp(kernel, -exponent)
    if kernel.shape[0] < kernel.shape[1] and (window is None or kernel.shape[1] > _CHANNELS_OF_A_CORRECTION):
        # The adjoint has the same norm and the smaller Gram matrix, but its images have another window.
        kernel, window = np.swapaxes(kernel, 0, 1), None
    n_out, n_in = kernel.shape[:2]
    n_taps = math.prod(kernel.shape[2:])
    frobenius = norm_up(np.abs(kernel.reshape(n_out * n_in, -1)).sum(axis=1) * (1.0 + 2.0**-40))
    n_lags = math.prod(2 * k - 1 for k in kernel.shape[2:]) // 2
    if not fits(math.prod(torus) // 2 + 1, n_lags + 1):
        return mul_up(frobenius, 2.0**exponent)
    frequencies = _half_of_the_frequencies(torus)
    grams = _grams(kernel, frequencies, torus)
    correction = np.zeros(len(frequencies))
    correction_error = 0.0
    n_terms = 2 * min(n_lags, _MOST_SHIFTS)
    if window is not None and n_in <= _CHANNELS_OF_A_CORRECTION and fits(len(frequencies), n_terms):
        blocks = _blocks(len(frequencies), n_in)
        spectrum = np.concatenate([_largest_eigenvalues(grams.at(block)) for block in blocks])
        correction, correction_error = _window_correction(spectrum, frequencies, torus, window)
    # An entry of a Gram matrix is a sum over outputs, taps and lags of products with a cosine and a sine, which are off
    # by less than 64 u; its terms' absolute values add up to those of (sum |K_t|)^T (sum |K_t|).
    terms = n_out * n_taps + 4 * n_lags + 128
    gram_error = add_up(
        mul_up(4.0, gamma_up(terms), frobenius, frobenius), mul_up(16.0 * n_in * n_in * terms, SMALLEST_NORMAL)
    )
    room = mul_up(16.0 * n_in * FLOAT64.unit_roundoff, frobenius, frobenius)
    shift = _proved_shift(grams, n_in, correction, room)
    if not math.isfinite(shift):
        return mul_up(frobenius, 2.0**exponent)
    gamma = gamma_up(4 * (n_in + 2))
    largest = add_up(shift, float(np.max(np.abs(correction))))
    slack = add_up(
        mul_up(div_up(gamma, down(1.0 - gamma)), float(n_in), add_up(largest, gram_error)),
        mul_up(8.0 * FLOAT64.unit_roundoff, add_up(largest, mul_up(frobenius, frobenius))),
        gram_error,
        correction_error,
        mul_up(32.0 * n_in * n_in, SMALLEST_NORMAL),
    )
    return mul_up(sqrt_up(add_up(shift, slack)), 2.0**exponent)


@dataclass(frozen=True, eq=False)
class _Grams:
    """`K^(w)* K^(w) = sum over lags d of R_d exp(-i <w, d>)` with the autocorrelation `R_d = sum_t K_t^T K_(t + d)`.

    A few lags stand for all frequencies: no product of two symbols is needed. `R_-d` is the transpose of `R_d`.
    """

    middle: Array
    """`R_0`, I x I."""
    lags: Array
    """`R_d` of one of each pair d, -d, flattened: D x I I."""
    cosines: Array
    sines: Array
    """Of `<w, d>`: F x D."""

    def at(self, block: NDArray[np.int64]) -> NDArray[np.complex128]:
        """Return the Gram matrices of some frequencies, exactly Hermitian: `F x I x I`."""
        shape = (len(block), *self.middle.shape)
        even, odd = ((waves[block] @ self.lags).reshape(shape) for waves in (self.cosines, self.sines))
        return (self.middle + even + np.swapaxes(even, 1, 2)) - 1j * (odd - np.swapaxes(odd, 1, 2))


def _grams(kernel: Array, frequencies: NDArray[np.int64], torus: Sequence[int]) -> _Grams:
    n_in, size = kernel.shape[1], kernel.shape[2:]
    middle = np.zeros((n_in, n_in))
    # Of each pair d, -d one, and d = 0.
    chosen = [lag for lag in itertools.product(*(range(-(k - 1), k) for k in size)) if lag >= (0,) * len(lag)]
    lags: list[Array] = []
    cosines, sines = np.empty((2, len(frequencies), len(chosen) - 1))
    for lag in chosen:
        early = tuple(slice(max(0, -d), k - max(0, d)) for d, k in zip(lag, size, strict=True))
        late = tuple(slice(max(0, d), k - max(0, -d)) for d, k in zip(lag, size, strict=True))
        left, right = (
            np.moveaxis(kernel[(slice(None), slice(None), *part)], 1, -1).reshape(-1, n_in) for part in (early, late)
        )
        product = left.T @ right
        if not any(lag):
            # Mirrored, so that the factorised matrix is exactly symmetric.
            middle = np.tril(product) + np.tril(product, -1).T
            continue
        wave = _wave(frequencies, lag, torus)
        cosines[:, len(lags)], sines[:, len(lags)] = wave.real, wave.imag
        lags.append(product.ravel())
    return _Grams(middle, np.array(lags).reshape(len(lags), n_in * n_in), cosines, sines)


def _half_of_the_frequencies(torus: Sequence[int]) -> NDArray[np.int64]:
    """Return one of each pair `w`, `-w`: integer vectors, F x axes, in lexicographic order."""
    every = np.indices(torus).reshape(len(torus), -1)
    conjugate = np.ravel_multi_index(tuple(-every % np.array(torus)[:, None]), tuple(torus))
    return np.ascontiguousarray(every[:, np.arange(every.shape[1]) <= conjugate].T)


def _wave(frequencies: NDArray[np.int64], shift: Sequence[int], torus: Sequence[int]) -> NDArray[np.complex128]:
    """Return `exp(i <w, m>)` of a shift m at each frequency: axis by axis, each angle reduced exactly first."""
    wave = np.ones(len(frequencies), dtype=np.complex128)
    for axis, (m, n) in enumerate(zip(shift, torus, strict=True)):
        angle = 2.0 * np.pi * (np.arange(n) / n)
        turns = frequencies[:, axis] * m % n
        wave *= np.cos(angle)[turns] + 1j * np.sin(angle)[turns]
    return wave


def _window_correction(
    spectrum: Array, frequencies: NDArray[np.int64], torus: Sequence[int], window: Sequence[int]
) -> tuple[Array, float]:
    """Return the symbol of `B` at each frequency, for a small maximum of `spectrum + B`, and a bound of its error.

    The coefficients are not negative in any case, so that `P B P >= 0`.
    """
    reach = [range(-(size - n), size - n + 1) for size, n in zip(torus, window, strict=True)]
    columns: list[Array] = []
    # Of each pair m, -m, which link the same points, one; the nearest gain most.
    shifts = [shift for shift in itertools.product(*reach) if shift > (0,) * len(shift)]
    for shift in sorted(shifts, key=lambda m: sum(k * k for k in m))[:_MOST_SHIFTS]:
        chain = min(-(-n // abs(m)) for n, m in zip(window, shift, strict=True) if m)
        wave = _wave(frequencies, shift, torus)
        limit = math.cos(math.pi / (chain + 1))
        columns += [limit - wave.real, limit + wave.real]
    if not columns:
        return np.zeros(len(frequencies)), 0.0
    terms = np.stack(columns, axis=1)
    coefficients = _smallest_maximum(spectrum, terms)
    # Each term is off by less than 2**-46: a few roundings of numbers of size 1.
    error = mul_up(sum_up(coefficients), add_up(2.0**-46, gamma_up(2 * len(coefficients))), 4.0)
    return terms @ coefficients, error


def _smallest_maximum(offsets: Array, terms: Array) -> Array:
    """Return non-negative coefficients c for which `max(offsets + terms c)` is small: a linear programme.

    Newton steps on its logarithmic barrier (Boyd and Vandenberghe, *Convex Optimization*, 2004, section 11.3).
    """
    scale = float(np.max(np.abs(offsets))) or 1.0
    offsets = offsets / scale
    n = terms.shape[1]
    # Unknowns c and the maximum t; rows of `limits` say terms c - t <= -offsets and -c <= 0.
    limits = np.block([[terms, -np.ones((len(terms), 1))], [-np.eye(n), np.zeros((n, 1))]])
    bounds = np.concatenate([-offsets, np.zeros(n)])
    point = np.full(n + 1, 1e-2)
    point[-1] = float(np.max(offsets + terms @ point[:-1])) + 1e-2
    weight = np.zeros(n + 1)
    weight[-1] = 1.0
    for _ in range(60):
        weight[-1] *= 2.0
        room = bounds - limits @ point
        gradient = weight + limits.T @ (1.0 / room)
        hessian = (limits / np.square(room)[:, None]).T @ limits
        direction = -np.linalg.lstsq(hessian, gradient, rcond=1e-14)[0]
        # The longest step that keeps a tenth of every distance to a limit.
        approach = float(np.max(limits @ direction / room))
        point = point + min(1.0, 0.9 / max(approach, 1e-300)) * direction
        if len(limits) < 1e-5 * weight[-1]:
            break
    coefficients = np.maximum(point[:-1], 0.0)
    if not float(np.max(offsets + terms @ coefficients)) < float(offsets.max()):
        return np.zeros(n)
    return coefficients * scale


def _blocks(n_frequencies: int, n_in: int) -> list[NDArray[np.int64]]:
    """Return blocks of frequencies; the Gram matrices of a block take some 32 MB."""
    n_blocks = max(1, -(-n_frequencies * n_in * n_in // (1 << 21)))
    return np.array_split(np.arange(n_frequencies), min(n_blocks, n_frequencies))


def _proved_shift(grams: _Grams, n_in: int, correction: Array, room: float) -> float:
    """Return an s for which `(s - correction) I - K^* K`, as computed, has a Cholesky factor at every frequency.

    Blocks of frequencies are factorised side by side on all CPUs. Each starts from the largest guess so far and goes
    up where the factorisation fails; infinity if all of them fail.
    """
    blocks = _blocks(len(correction), n_in)
    # A sample of all frequencies first, so that few blocks have to go up.
    sample = np.unique(np.linspace(0, len(correction) - 1, 24).astype(np.int64))
    known = _guess(grams.at(sample), correction[sample])
    lock = threading.Lock()

    def shift_of(block: NDArray[np.int64]) -> float:
        nonlocal known
        gram = grams.at(block)
        guess = known
        for attempt, factor in enumerate(2.0**-power for power in (14, 14, 12, 10, 8, 7, 6, 5, 3, 0, -2)):
            if attempt == 1:
                # The guess so far is too small: only now the spectrum of the block is worth its cost.
                guess = max(guess, _guess(gram, correction[block]))
                with lock:
                    known = max(known, guess)
            shift = add_up(mul_up(guess, 1.0 + factor), room)
            if _factorises(gram, shift - correction[block]):
                return shift
        return math.inf

    with ThreadPoolExecutor(min(len(blocks), len(os.sched_getaffinity(0)))) as pool:
        return max(pool.map(shift_of, blocks))


def _largest_eigenvalues(gram: NDArray[np.complex128]) -> Array:
    return np.asarray(np.linalg.eigvalsh(gram)[:, -1], dtype=np.float64)


def _guess(gram: NDArray[np.complex128], correction: Array) -> float:
    """Return an estimate of the largest eigenvalue of `gram + correction`, for the proof to check: never a bound."""
    n = gram.shape[1]
    if n <= 32:
        return max(0.0, float(np.max(_largest_eigenvalues(gram) + correction)))
    start = 1.0 + 0.5 * np.cos(np.arange(n) * 2.399963)
    vectors = np.broadcast_to((start / np.linalg.norm(start))[:, None], (len(gram), n, 1)).astype(np.complex128)
    sizes = np.zeros(len(gram))
    for _ in range(12):
        vectors = gram @ vectors
        sizes = np.linalg.norm(vectors[:, :, 0], axis=1)
        vectors = vectors / np.maximum(sizes, 1e-300)[:, None, None]
    foremost = np.argsort(sizes + correction)[-3:]
    return max(float(_largest_eigenvalues(gram[f : f + 1])[0] + correction[f]) for f in foremost)


def _factorises(gram: NDArray[np.complex128], shifts: Array) -> bool:
    diagonal = np.arange(gram.shape[1])
    difference = -gram
    # Cholesky reads the lower triangle and the real diagonal.
    difference[:, diagonal, diagonal] = shifts[:, None] + difference[:, diagonal, diagonal].real
    try:
        factors = np.linalg.cholesky(difference)
    except np.linalg.LinAlgError:
        return False
    return bool(np.isfinite(factors).all())
