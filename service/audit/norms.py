"""Proved bounds of spectral norms of float64 matrices.

Eigenvalues, Cholesky factors and Perron vectors of numpy serve as guesses only; each guess is then checked.
"""

from __future__ import annotations

import math

import numpy as np
from flint import arb

from service.audit.balls import NotAuditableError, power, root, smaller, upper
from service.audit.slices import RunningSum, dropped, gram_products, length, slice_bits, sliced

LARGEST_BLOCK = 3072
"""Largest block, by the smaller of its two sides, whose norm is proved."""
LARGEST_MATRIX = 16_000_000
"""Largest number of entries of one matrix."""

# Relative enlargements of the guess of the squared norm: the first that the factorisation accepts is taken.
_SLACKS = tuple(2.0**-bits for bits in (51, 50, 49, 48, 47, 46, 44, 42, 40, 38, 36, 33, 30, 26, 22, 18, 14, 10, 5))
# Enlargements below this one rarely succeed for matrices of more than `_SMALL` rows.
_SMALL_SLACK, _SMALL = 2.0**-46, 128
_LARGEST_DENSE = 24_000_000
# Rows whose products are summed together, so that temporary arrays stay small.
_ROWS = 256


def require_block(rows: int, columns: int) -> None:
    """Refuse a dense block whose norm takes too long.

    Raises:
        NotAuditableError: it is too large.
    """
    if rows * columns > _LARGEST_DENSE or min(rows, columns) > LARGEST_BLOCK:
        raise NotAuditableError(
            f"the norm of a matrix of {rows} x {columns} is needed; up to {LARGEST_BLOCK} rows or columns are proved "
            "here"
        )


def spectral_norm(matrix: np.ndarray) -> arb:
    """Return an upper bound of the spectral norm.

    Theorem. Let `G = A A^T` (or `A^T A`, whichever is smaller), s a number and L any matrix. Then
    `||A||^2 <= s + ||s I - G - L L^T||_F`. Proof. `s I - G = L L^T + R` and `L L^T` is positive semidefinite, so
    `G <= s I - R <= (s + ||R||_F) I`. The guesses are s and L; products are exact, see `service.audit.slices`, and the
    rounding of their sum is bounded.

    Raises:
        NotAuditableError: the matrix is too large.
    """
    frobenius = length(matrix)
    if min(matrix.shape) == 1 or not frobenius > 0:
        return frobenius
    require_block(*matrix.shape)
    # A power of two: entries and eigenvalues of the Gram matrix are at most 1.
    exponent = math.frexp(float(frobenius))[1] + 1
    wide = np.ldexp(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T, -exponent)
    n, inner = wide.shape
    bits = slice_bits(inner)
    slices, rest = sliced(wide, bits)
    parts = list(gram_products(slices, bits))
    del slices
    squared = _certified(parts, bits)
    if squared is None:
        return frobenius
    # Entries of the products of last slices, of G and of L L^T.
    lost = arb(n) * (arb(dropped(inner, bits)) + arb(dropped(n, bits)))
    bound = root(squared + lost) + arb(rest) * root(arb(wide.size))
    return smaller(upper(bound * power(exponent)), frobenius)


def _certified(parts: list[np.ndarray], bits: int) -> arb | None:
    """Return `s + ||s I - G - L L^T||_F` for guesses s and L, G the sum of the parts; absent where no guess fits."""
    guess = np.zeros(parts[0].shape)
    for part in reversed(parts):
        guess += part
    n = len(guess)
    try:
        peak = float(np.linalg.eigvalsh(guess)[-1])
    except np.linalg.LinAlgError:
        return None
    if not 0.0 < peak <= 2.0:
        return None
    diagonal = np.diagonal(guess).copy()
    for slack in _SLACKS if n <= _SMALL else [slack for slack in _SLACKS if slack >= _SMALL_SLACK]:
        shift = peak * (1.0 + slack)
        np.fill_diagonal(guess, diagonal - shift)
        try:
            factor = np.tril(np.linalg.cholesky(-guess))
        except np.linalg.LinAlgError:
            continue
        # Entries of at most 1 are cut into slices; any factor is a valid one.
        if not (np.isfinite(factor).all() and float(np.max(np.abs(factor))) <= 1.0):
            continue
        slices, _ = sliced(factor, bits)
        rest = RunningSum(np.diag(np.full(n, shift)))
        for part in parts:
            rest.add(-part)
        for part in gram_products(slices, bits):
            rest.add(-part)
        return upper(arb(shift) + length(rest.total) + rest.error)
    return None


def absolute_norm(matrix: np.ndarray) -> arb:
    """Return an upper bound of the spectral norm of the absolute values (Collatz).

    `||A||^2 <= max of (A^T A v)_j / v_j` for every positive v: `A^T A` of a non-negative A has the largest eigenvalue
    rho with a non-negative left eigenvector y, `rho y.v = y.(A^T A v) <= max((A^T A v)_j / v_j) y.v`, and `y.v > 0`.
    The vector v is a guess; sums of non-negative terms are off by a relative `gamma_n` at most.
    """
    frobenius = length(matrix)
    if min(matrix.shape) <= 1 or not frobenius > 0:
        return frobenius
    exponent = math.frexp(float(frobenius))[1] + 1
    sizes = np.abs(np.ldexp(matrix, -exponent))
    rows, columns = sizes.shape
    vector = np.ones(columns)
    for _ in range(30):
        vector = sizes.T @ (sizes @ vector)
        vector /= vector.max() or 1.0
    vector = np.where(vector > 2.0**-30, vector, 2.0**-30)
    if not np.isfinite(vector).all():
        return frobenius
    back = np.zeros(columns)
    for first in range(0, rows, _ROWS):
        chunk = sizes[first : first + _ROWS]
        back += (chunk * (chunk * vector).sum(axis=1)[:, None]).sum(axis=0)
    ratio = float((back / vector).max())
    roundings = arb(2 * (rows + columns + 8)) * power(-53)
    # Products that underflow lose less than 2**-1000, of at most `rows columns` terms over v >= 2**-30.
    squared = arb(ratio) * (arb(1) + roundings) + arb(rows * columns) * power(-900)
    return smaller(upper(root(squared) * power(exponent)), frobenius)
