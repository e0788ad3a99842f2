"""Proved bounds of spectral norms of integer matrices.

Floating-point numbers serve as guesses only; each guess is then checked in integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from flint import fmpz, fmpz_mat

from service.audit.balls import NotAuditableError

Row = dict[int, int]
"""Numerators of one row by column; zeros are left out."""

LARGEST_BLOCK = 3072
"""Largest block, by the smaller of its two sides, whose norm is proved."""
LARGEST_MATRIX = 8_000_000
"""Largest number of entries of one matrix."""

# Blocks with at most this number of entries are looked up before they are bounded.
_CACHED_BLOCK = 200_000
# Relative enlargements of the guess of the squared norm: the first that the factorisation accepts is taken.
_SLACKS = tuple(2.0**-bits for bits in (51, 50, 49, 48, 47, 46, 44, 42, 40, 38, 36, 33, 30, 26, 22, 18, 14, 10, 5))
# Enlargements below this one rarely succeed for matrices of more than `_SMALL` rows.
_SMALL_SLACK, _SMALL = 2.0**-46, 128
# Digits of the guessed factor, after the binary point.
_FACTOR_BITS = 60


def to_dense(rows: Sequence[Row], width: int) -> fmpz_mat:
    """Return sparse rows as a dense integer matrix."""
    return fmpz_mat(len(rows), width, [row.get(column, 0) for row in rows for column in range(width)])


def squared_norm_bound(rows: Sequence[Row]) -> int:
    """Return an integer that the squared spectral norm of an integer matrix does not exceed.

    Rows that share no column with others are blocks; the norm is that of the block with the largest norm.
    """
    seen: dict[tuple[tuple[tuple[int, int], ...], ...], int] = {}
    largest = 0
    for block in _blocks([row for row in rows if row]):
        columns = {column: position for position, column in enumerate(sorted({c for row in block for c in row}))}
        if len(block) == 1 or len(columns) == 1:
            largest = max(largest, sum(v * v for row in block for v in row.values()))
            continue
        if sum(map(len, block)) > _CACHED_BLOCK:
            largest = max(largest, _block_bound(block, columns))
            continue
        key = tuple(tuple((columns[c], row[c]) for c in sorted(row)) for row in block)
        if key not in seen:
            seen[key] = _block_bound(block, columns)
        largest = max(largest, seen[key])
    return largest


def _blocks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    parent: dict[int, int] = {}

    def find(column: int) -> int:
        while parent[column] != column:
            parent[column] = parent[parent[column]]
            column = parent[column]
        return column

    for row in rows:
        first = -1
        for column in row:
            top = find(column) if column in parent else parent.setdefault(column, column)
            if first < 0:
                first = top
            elif top != first:
                parent[top] = first
    blocks: dict[int, list[Row]] = {}
    for row in rows:
        blocks.setdefault(find(next(iter(row))), []).append(row)
    yield from blocks.values()


def _block_bound(block: Sequence[Row], columns: dict[int, int]) -> int:
    """Return a bound of the squared norm of one block.

    Theorem. Let `G = A A^T` (or `A^T A`, whichever is smaller), s a number and L any matrix. Then
    `||A||^2 <= s + ||s I - G - L L^T||_F`. Proof. `s I - G = L L^T + R` and `L L^T` is positive semidefinite, so
    `G <= s I - R <= (s + ||R||_F) I`. Everything on the right is computed in integers; s and L are guesses.
    """
    if len(block) * len(columns) > 3 * LARGEST_MATRIX or min(len(block), len(columns)) > LARGEST_BLOCK:
        raise NotAuditableError(
            f"the norm of a matrix of {len(block)} x {len(columns)} is needed; up to {LARGEST_BLOCK} rows or columns "
            "are proved here"
        )
    dense = to_dense([{columns[c]: v for c, v in row.items()} for row in block], len(columns))
    gram = dense * dense.transpose() if len(block) <= len(columns) else dense.transpose() * dense
    n = gram.nrows()
    entries = [int(v) for v in gram.entries()]
    trace = sum(entries[:: n + 1])
    # The guesses are made for G / 2**scale, whose eigenvalues are at most 1; the scale is even, for the root.
    scale = trace.bit_length() + trace.bit_length() % 2
    # Python divides integers of any length with one rounding.
    one = 1 << scale
    guess = np.array([v / one for v in entries]).reshape(n, n)
    try:
        peak = float(np.linalg.eigvalsh(guess)[-1])
    except np.linalg.LinAlgError:
        return trace
    if not 0.0 <= peak <= 2.0:
        return trace
    for slack in _SLACKS if n <= _SMALL else [slack for slack in _SLACKS if slack >= _SMALL_SLACK]:
        bound = math.ceil(math.ldexp(peak * (1.0 + slack), _FACTOR_BITS + 30))
        shift = bound << scale >> _FACTOR_BITS + 30
        np.fill_diagonal(guess, [(v - shift) / one for v in entries[:: n + 1]])
        try:
            factor = np.linalg.cholesky(-guess)
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(factor).all() and float(np.abs(factor).max()) < 4.0:
            return min(trace, _checked(gram, shift, factor, scale))
    return trace


def _checked(gram: fmpz_mat, shift: int, factor: np.ndarray, scale: int) -> int:
    """Return `s + ||s I - G - L L^T||_F` in integers, rounded upwards; L is `factor` times `2**(scale / 2)`."""
    n = gram.nrows()
    digits = np.rint(np.ldexp(np.tril(factor), _FACTOR_BITS)).astype(np.int64)
    lower = fmpz_mat(n, n, digits.ravel().tolist())
    squared = lower * lower.transpose()
    # L L^T is squared * 2**(scale - 2 digits): both sides are brought to whole numbers.
    places = scale - 2 * _FACTOR_BITS
    left, right = max(0, -places), max(0, places)
    # G + L L^T, and then R = s I - that.
    rest = gram * (1 << left) + squared * (1 << right)
    for i in range(n):
        rest[i, i] = rest[i, i] - (shift << left)
    total = int(sum((v * v for v in rest.entries()), fmpz(0)))
    return shift + (math.isqrt(total) + 1 >> left) + 1


def absolute_squared_norm_bound(rows: Sequence[Row], width: int) -> int:
    """Return a bound of the squared norm of the absolute values (Collatz).

    `||A||^2 <= max of (A^T A v)_j / v_j` for every positive v: `A^T A` of a non-negative A has the largest eigenvalue
    rho with a non-negative left eigenvector y, `rho y.v = y.(A^T A v) <= max((A^T A v)_j / v_j) y.v`, and `y.v > 0`.
    The vector v is a guess.
    """
    count = sum(map(len, rows))
    if not count:
        return 0
    of_row = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    of_column = np.fromiter((column for row in rows for column in row), np.int64, count)
    peak = max(abs(v) for row in rows for v in row.values())
    sizes = np.fromiter((abs(v) / peak for row in rows for v in row.values()), np.float64, count)
    vector = np.ones(width)
    for _ in range(30):
        image = np.bincount(of_row, sizes * vector[of_column], len(rows))
        vector = np.bincount(of_column, sizes * image[of_row], width)
        vector /= vector.max() or 1.0
    weights = [int(v) + 1 for v in np.nan_to_num(vector) * 2.0**30]
    back = [0] * width
    for row in rows:
        total = sum(abs(v) * weights[column] for column, v in row.items())
        for column, v in row.items():
            back[column] += abs(v) * total
    return max(-(-v // w) for v, w in zip(back, weights, strict=True))
