"""Matrices whose entries are known exactly, with proved bounds of their norms.

Entries are integers over a power of two, so that sums and products have no error. Other numbers (a third, a square
root) are cut off far below the largest entry, and `defect` accounts for the difference. Bounds are rounded upwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from flint import arb

from service.audit.balls import NotAuditableError, Numbers, hypotenuse, power, root, smaller, upper
from service.audit.norms import (
    LARGEST_BLOCK,
    LARGEST_MATRIX,
    Row,
    absolute_squared_norm_bound,
    squared_norm_bound,
    to_dense,
)

# Products of more scalar multiplications than this are dense.
_SPARSE_PRODUCT = 20_000_000


@dataclass(frozen=True)
class Matrix:
    """`rows / 2**shift`, up to a difference whose Frobenius norm is at most `defect`."""

    rows: Sequence[Row]
    width: int
    shift: int
    defect: arb

    @cached_property
    def unit(self) -> arb:
        """The value of the numerator 1."""
        return power(-self.shift)

    @cached_property
    def squares(self) -> list[int]:
        """Squared norm of each row of numerators."""
        return [sum(v * v for v in row.values()) for row in self.rows]

    @cached_property
    def sums(self) -> list[int]:
        """Sum of the absolute values of each row of numerators."""
        return [sum(map(abs, row.values())) for row in self.rows]

    @cached_property
    def frobenius(self) -> arb:
        """Upper bound of the Frobenius norm."""
        return upper(root(arb(sum(self.squares))) * self.unit + self.defect)

    @cached_property
    def norm(self) -> arb:
        """Upper bound of the spectral norm."""
        return upper(root(arb(squared_norm_bound(self.rows))) * self.unit + self.defect)

    @cached_property
    def absolute_norm(self) -> arb:
        """Upper bound of the spectral norm of the matrix of absolute values."""
        bound = root(arb(absolute_squared_norm_bound(self.rows, self.width))) * self.unit + self.defect
        return smaller(upper(bound), self.frobenius)

    @cached_property
    def largest_row(self) -> arb:
        """Upper bound of the Euclidean norm of every row."""
        return self.row_bounds(range(len(self.rows)))[0]

    @cached_property
    def largest_sum(self) -> arb:
        """Upper bound of the sum of absolute values of every row."""
        return self.row_bounds(range(len(self.rows)))[1]

    def row_bounds(self, positions: Iterable[int]) -> tuple[arb, arb]:
        """Return upper bounds of the Euclidean norms and of the sums of absolute values of some rows."""
        chosen = list(positions)
        square = max((self.squares[p] for p in chosen), default=0)
        total = max((self.sums[p] for p in chosen), default=0)
        return (
            upper(root(arb(square)) * self.unit + self.defect),
            upper(arb(total) * self.unit + root(arb(self.width)) * self.defect),
        )

    def scaled_row(self, position: int, shift: int) -> Row:
        """Return one row with numerators over `2**shift`, not smaller than `self.shift`."""
        places = shift - self.shift
        row = self.rows[position]
        return {column: v << places for column, v in row.items()} if places else row

    def apply(self, vector: Sequence[arb]) -> list[arb]:
        """Return the product with a vector of balls."""
        blur = arb(0)
        if self.defect > 0:
            blur = arb(0, upper(self.defect * hypotenuse(vector)))
        return [sum((vector[i] * v for i, v in row.items()), arb(0)) * self.unit + blur for row in self.rows]


def diagonal(size: int, sign: int = 1) -> Matrix:
    """Return the identity, or its negative."""
    return Matrix([{i: sign} for i in range(size)], size, 0, arb(0))


def require_size(entries: int) -> None:
    """Refuse a matrix with more entries than `LARGEST_MATRIX`.

    Raises:
        NotAuditableError: it is too large.
    """
    if entries > LARGEST_MATRIX:
        raise NotAuditableError(f"its matrix has {entries} entries, more than {LARGEST_MATRIX}")


def gathered(positions: np.ndarray, picks: np.ndarray, numbers: Numbers, width: int) -> Matrix:
    """Return the matrix whose row r holds number `picks[r, t]` at column `positions[r, t]`, for each t.

    Args:
        positions: rows x terms; -1 is no column. Numbers on one place add up.
        picks: rows x terms, indices into `numbers`.
        numbers: the entries.
        width: number of columns.

    Raises:
        NotAuditableError: the matrix is too large.
    """
    require_size(positions.size)
    numerators = numbers.numerators
    rows: list[Row] = []
    for columns, chosen in zip(positions.tolist(), picks.tolist(), strict=True):
        row: Row = {}
        for column, pick in zip(columns, chosen, strict=True):
            number = numerators[pick]
            if column >= 0 and number:
                row[column] = row.get(column, 0) + number
        rows.append(row)
    # Entries that fall on one place add their errors, so that the count is not under a root.
    defect = upper(numbers.error * positions.size) if numbers.error > 0 else arb(0)
    return Matrix(rows, width, numbers.shift, defect)


def product(left: Matrix, right: Matrix, bits: int) -> Matrix:
    """Return `left right`.

    Args:
        left: rows x inner.
        right: inner x columns.
        bits: digits of the numerators of the result, see `trimmed`.

    Raises:
        NotAuditableError: the result is too large.
    """
    cost = sum(sum(len(right.rows[i]) for i in row) for row in left.rows)
    size = max(len(left.rows), len(right.rows), right.width)
    dense = cost > _SPARSE_PRODUCT and size <= LARGEST_BLOCK
    rows = _dense_product(left, right) if dense else _sparse_product(left, right)
    defect = arb(0)
    if left.defect > 0 or right.defect > 0:
        defect = upper(left.frobenius * right.defect + left.defect * (right.frobenius + right.defect))
    return trimmed(Matrix(rows, right.width, left.shift + right.shift, defect), bits)


def _sparse_product(left: Matrix, right: Matrix) -> list[Row]:
    rows: list[Row] = []
    entries = 0
    for row in left.rows:
        total: Row = {}
        for i, factor in row.items():
            for column, v in right.rows[i].items():
                total[column] = total.get(column, 0) + factor * v
        rows.append({column: v for column, v in total.items() if v})
        entries += len(rows[-1])
        require_size(entries)
    return rows


def _dense_product(left: Matrix, right: Matrix) -> list[Row]:
    result = to_dense(left.rows, left.width) * to_dense(right.rows, right.width)
    entries = [int(v) for v in result.entries()]
    width = right.width
    return [
        {column: v for column, v in enumerate(entries[r * width : (r + 1) * width]) if v} for r in range(len(left.rows))
    ]


def trimmed(matrix: Matrix, bits: int) -> Matrix:
    """Return the same matrix with numerators of `bits` digits, where they have more than twice that number."""
    longest = max((v.bit_length() for row in matrix.rows for v in row.values()), default=0)
    if longest <= 2 * bits:
        return matrix
    places = longest - bits
    count = sum(map(len, matrix.rows))
    rows = [{column: v >> places for column, v in row.items() if v >> places} for row in matrix.rows]
    lost = upper(power(places - matrix.shift) * root(arb(count)))
    return Matrix(rows, matrix.width, matrix.shift - places, upper(matrix.defect + lost))


def stacked(parts: Sequence[tuple[Matrix, Sequence[int], Sequence[int]]]) -> Matrix:
    """Stack rows of several matrices: each part is a matrix, positions of its rows, and how often each is repeated."""
    shift = max(matrix.shift for matrix, _, _ in parts)
    rows: list[Row] = []
    defects: list[arb] = []
    for matrix, positions, counts in parts:
        for position, count in zip(positions, counts, strict=True):
            rows.extend([matrix.scaled_row(position, shift)] * count)
        defects.append(root(arb(max(counts, default=0))) * matrix.defect)
    return Matrix(rows, parts[0][0].width, shift, hypotenuse(defects))
