"""Proved upper bounds of matrix norms.

Nothing here estimates: power iteration, Lanczos and a computed SVD are lower bounds or unproved, and serve at most as a
guess that a proof then checks. Axes: M rows, N columns.
"""

import math

import numpy as np

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
from service.shapes import Float64

_KRYLOV_STEPS = 48
_GUESS_FACTORS = (1.0 + 2.0**-40, 1.0 + 2.0**-30, 1.0 + 2.0**-20, 1.0 + 2.0**-16, 1.0 + 2.0**-13, 1.0 + 2.0**-8)


def spectral_norm_bound(matrix_MN: Float64[np.ndarray, "M N"]) -> float:
    """Return an upper bound of the largest singular value, within about 1e-9 of it for ordinary matrices.

    Theorem (after Rump, *Verification of positive definiteness*, BIT 46, 2006). Let `G` be the Gram matrix `W^T W` as
    computed, of the smaller side n, and `s` any number. If a floating-point Cholesky factorisation of
    `A = s I - G` runs to completion, then `A` plus a perturbation of norm at most
    `gamma_{n+1} / (1 - gamma_{n+1}) * trace(A)` is positive semidefinite (Higham 2002, theorem 10.3), so that
    `||W||^2 <= s + that + the rounding of G and of the diagonal of A`. The guess for `s` comes from a
    few steps of Lanczos' method; one that is too small makes the factorisation fail, never the bound.

    Assumes that matrix products and the factorisation sum in any order but do not use Strassen-like schemes, as in
    OpenBLAS and MKL. Where every guess fails, the Frobenius norm is returned.

    Raises:
        ValueError: an entry is not finite.
    """
    peak = float(np.max(np.abs(matrix_MN), initial=0.0))
    if not math.isfinite(peak):
        raise ValueError("the matrix has entries that are not finite")
    if peak == 0.0:
        return 0.0
    # A power of two changes no digit; entries of at most 1 keep the Gram matrix from over- and underflow.
    exponent = math.frexp(peak)[1]
    scaled = _times_power_of_two(matrix_MN, np.array(-exponent))
    if scaled.shape[0] < scaled.shape[1]:
        scaled = scaled.T
    frobenius = norm_up(scaled)
    bound = frobenius
    if scaled.shape[1] > 1:
        bound = min(bound, _cholesky_bound(scaled, frobenius))
    # ldexp of the bound may round only when it is subnormal; one ulp more covers that.
    return mul_up(bound, 2.0**exponent) if exponent < 1023 else mul_up(bound, 2.0**1022, 2.0 ** (exponent - 1022))


def _cholesky_bound(tall_MN: Float64[np.ndarray, "M N"], frobenius: float) -> float:
    n_rows, n = tall_MN.shape
    unit = FLOAT64.unit_roundoff
    gram = tall_MN.T @ tall_MN
    guess = _largest_eigenvalue_guess(gram)
    diagonal = np.diagonal(gram).copy()
    # Only the lower triangle is read: the factorised matrix is exactly symmetric. In place, because fresh memory costs
    # as much as the arithmetic.
    difference = np.negative(gram, out=gram)
    gram_error = add_up(mul_up(gamma_up(n_rows), frobenius, frobenius), mul_up(4.0 * n_rows * n, SMALLEST_NORMAL))
    gamma = gamma_up(n + 1)
    for factor in _GUESS_FACTORS:
        # Room for the rounding that the factorisation itself commits, so that the first guess usually passes.
        shift = add_up(mul_up(guess, factor), mul_up(4.0 * n * unit, frobenius, frobenius))
        np.fill_diagonal(difference, shift - diagonal)
        try:
            factorised = np.linalg.cholesky(difference)
        except np.linalg.LinAlgError:
            continue
        if not np.isfinite(factorised).all():
            continue
        trace = sum_up(np.abs(np.diagonal(difference)))
        diagonal_error = mul_up(2.0 * unit, add_up(shift, mul_up(frobenius, frobenius)))
        factor_error = add_up(mul_up(div_up(gamma, down(1.0 - gamma)), trace), mul_up(8.0 * n * n, SMALLEST_NORMAL))
        return sqrt_up(add_up(shift, diagonal_error, factor_error, gram_error))
    return math.inf


def _largest_eigenvalue_guess(gram_NN: Float64[np.ndarray, "N N"]) -> float:
    """Return the largest eigenvalue in a Krylov space: an estimate from below of the largest of the matrix."""
    n = gram_NN.shape[0]
    basis = np.zeros((min(n, _KRYLOV_STEPS), n))
    # Deterministic, and no eigenvector of anything in practice: multiples of the golden angle.
    vector = 1.0 + 0.5 * np.cos(2.399963229728653 * np.arange(n))
    size = 0
    for size in range(1, len(basis) + 1):
        basis[size - 1] = vector / math.sqrt(vector @ vector)
        vector = gram_NN @ basis[size - 1]
        reach = math.sqrt(vector @ vector)
        for _ in range(2):
            vector -= basis[:size].T @ (basis[:size] @ vector)
        if math.sqrt(vector @ vector) <= 1e-13 * reach:
            break
    space = basis[:size]
    return float(np.linalg.eigvalsh(space @ gram_NN @ space.T)[-1])


def absolute_norm_bound(matrix_MN: Float64[np.ndarray, "M N"]) -> float:
    """Return an upper bound of the spectral norm of the absolute values: the factor of rounding errors in `W x`.

    The smaller of the Frobenius norm and `sqrt(||W||_1 ||W||_inf)` (Schur's test): both see only absolute
    values.
    """
    if matrix_MN.size == 0:
        return 0.0
    absolute = np.abs(matrix_MN)
    n_rows, n_columns = absolute.shape
    largest_column = mul_up(float(absolute.sum(axis=0).max()), add_up(1.0, gamma_up(2 * n_rows)))
    largest_row = mul_up(float(absolute.sum(axis=1).max()), add_up(1.0, gamma_up(2 * n_columns)))
    return min(norm_up(matrix_MN), sqrt_up(mul_up(largest_column, largest_row)))


def row_norms_up(matrix_MN: Float64[np.ndarray, "M N"]) -> Float64[np.ndarray, " M"]:
    """Return upper bounds of the Euclidean norms of the rows.

    Each row is scaled by a power of two, so that its squares neither overflow nor lose more than `SMALLEST_NORMAL`.
    """
    n = matrix_MN.shape[1]
    peak_M = np.max(np.abs(matrix_MN), axis=1, initial=0.0)
    # One more than the exponent of the peak could overflow.
    exponent_M = np.minimum(np.frexp(peak_M)[1], 1000)
    scaled_MN = _times_power_of_two(matrix_MN, -exponent_M[:, None])
    total_M = np.sum(np.square(scaled_MN), axis=1) * (1.0 + gamma_up(2 * n + 8)) + 8.0 * max(n, 1) * SMALLEST_NORMAL
    # Three roundings of this line and the root: 2**-50 covers them.
    with np.errstate(over="ignore"):
        norm_M = np.ldexp(np.sqrt(total_M) * (1.0 + 2.0**-50), exponent_M)
    return np.where(peak_M > 0.0, np.nextafter(norm_M, np.inf), 0.0)


def _times_power_of_two(matrix_MN: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Return `np.ldexp(matrix, exponent)`; by a product, which is much faster, where the power is a normal number."""
    if np.abs(exponent).max(initial=0) < 1000:
        return matrix_MN * np.ldexp(1.0, exponent)
    return np.ldexp(matrix_MN, exponent)


def pairwise_distance_bounds(rows_KN: Float64[np.ndarray, "K N"]) -> Float64[np.ndarray, "K K"]:
    """Return upper bounds of `||w_i - w_j||` for all pairs of rows; zero on the diagonal."""
    n_rows = rows_KN.shape[0]
    bounds_KK = np.zeros((n_rows, n_rows))
    for i in range(1, n_rows):
        # Each computed difference is within a relative u of the exact one.
        norms = row_norms_up(rows_KN[:i] - rows_KN[i]) * (1.0 + 2.0**-50)
        bounds_KK[i, :i] = bounds_KK[:i, i] = norms
    return bounds_KK
