"""Matrices whose entries are known exactly, and proved bounds of their norms.

Entries are integers over a power of two, so that sums and products have no error. What is no such number (a third, a
square root) is cut off far below the largest entry, and the rest is accounted for in `defect`. Floating-point numbers
serve as guesses only; each guess is then checked in integers. Bounds are balls of python-flint, rounded upwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from flint import arb, fmpz, fmpz_mat

Row = dict[int, int]
"""Numerators of one row by column; zeros are left out."""

LARGEST_BLOCK = 3072
"""Most rows or columns, whichever are fewer, of a block whose norm is proved."""
LARGEST_MATRIX = 8_000_000
"""Most entries of one matrix."""

_CACHED_BLOCK = 2048
# What the guess of the squared norm is enlarged by: the first that the factorisation accepts is taken.
_SLACKS = tuple(2.0**-bits for bits in (51, 50, 49, 48, 47, 46, 44, 42, 40, 38, 36, 33, 30, 26, 22, 18, 14, 10, 5))
# Not worth a try for large matrices.
_SMALL_SLACK, _SMALL = 2.0**-46, 128
# Digits of the guessed factor, after the binary point.
_FACTOR_BITS = 60


class NotAuditableError(Exception):
    """Why something cannot be checked; the message says what."""


def power(exponent: int) -> arb:
    """`2**exponent`, exact."""
    return arb((1, exponent))


def upper(value: arb) -> arb:
    """The upper end of a ball, as an exact number.

    Raises:
        NotAuditableError: it is not finite.
    """
    end = value.upper()
    if not end.is_finite():
        raise NotAuditableError("a bound is not finite")
    return end


def root(value: arb) -> arb:
    """Upper bound of the square root of a non-negative number that `value` encloses."""
    end = upper(value)
    return upper(end.sqrt()) if end > 0 else arb(0)


def smaller(left: arb, right: arb) -> arb:
    """The smaller of two upper bounds."""
    return left if left < right else right


def larger(left: arb, right: arb) -> arb:
    """The larger of two exact numbers."""
    return right if left < right else left


def hypotenuse(parts: Iterable[arb]) -> arb:
    """Upper bound of `sqrt(sum of squares)`."""
    return root(sum((part * part for part in parts), arb(0)))


@dataclass(frozen=True)
class Numbers:
    """Numbers `numerator / 2**shift`, each off by at most `error`."""

    numerators: list[int]
    shift: int
    error: arb


def float_numbers(values: Iterable[float], bits: int) -> Numbers:
    """Floats as the numbers that they are; digits more than `bits` below the largest are cut off."""
    ratios = [value.as_integer_ratio() for value in values]
    places = [denominator.bit_length() - 1 for _, denominator in ratios]
    top = max((n.bit_length() - place for (n, _), place in zip(ratios, places, strict=True) if n), default=0)
    shift = min(max(places, default=0), bits - top)
    cut = any(place > shift for place in places)
    numerators = [_shifted(n, shift - place) for (n, _), place in zip(ratios, places, strict=True)]
    return Numbers(numerators, shift, power(-shift) if cut else arb(0))


def ball_numbers(values: Sequence[arb], bits: int) -> Numbers:
    """Balls as numbers with `bits` digits."""
    parts = [value.mid().man_exp() for value in values]
    pairs = [(int(mantissa), int(exponent)) for mantissa, exponent in parts]
    top = max((mantissa.bit_length() + exponent for mantissa, exponent in pairs if mantissa), default=0)
    shift = bits - top
    radius = arb(0)
    for value in values:
        radius = larger(radius, upper(value.rad()))
    return Numbers(
        [_shifted(mantissa, exponent + shift) for mantissa, exponent in pairs], shift, upper(radius + power(-shift))
    )


def _shifted(number: int, places: int) -> int:
    return number << places if places >= 0 else number >> -places


@dataclass(frozen=True)
class Matrix:
    """`rows / 2**shift`, up to a difference whose Frobenius norm is at most `defect`."""

    rows: Sequence[Row]
    width: int
    shift: int
    defect: arb

    @cached_property
    def unit(self) -> arb:
        """What a numerator of 1 is worth."""
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
        bound = root(arb(_absolute_squared_norm_bound(self.rows, self.width))) * self.unit + self.defect
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
        """Upper bounds of the Euclidean norms and of the sums of absolute values of some rows."""
        chosen = list(positions)
        square = max((self.squares[p] for p in chosen), default=0)
        total = max((self.sums[p] for p in chosen), default=0)
        return (
            upper(root(arb(square)) * self.unit + self.defect),
            upper(arb(total) * self.unit + root(arb(self.width)) * self.defect),
        )

    def apply(self, vector: Sequence[arb]) -> list[arb]:
        """The product with a vector of balls."""
        blur = arb(0)
        if self.defect > 0:
            blur = arb(0, upper(self.defect * hypotenuse(vector)))
        return [sum((vector[i] * v for i, v in row.items()), arb(0)) * self.unit + blur for row in self.rows]


def identity(size: int) -> Matrix:
    """The identity."""
    return Matrix([{i: 1} for i in range(size)], size, 0, arb(0))


def gathered(positions: np.ndarray, picks: np.ndarray, numbers: Numbers, width: int) -> Matrix:
    """The matrix whose row r holds number `picks[r, t]` at column `positions[r, t]`, for each t; -1 is no column."""
    if positions.size > LARGEST_MATRIX:
        raise NotAuditableError(f"its matrix has {positions.size} entries, more than {LARGEST_MATRIX}")
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
    """`left right`."""
    cost = sum(sum(len(right.rows[i]) for i in row) for row in left.rows)
    size = max(len(left.rows), len(right.rows), right.width)
    rows = _dense_product(left, right) if cost > 20_000_000 and size <= LARGEST_BLOCK else _sparse_product(left, right)
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
        if entries > LARGEST_MATRIX:
            raise NotAuditableError(f"its matrix has more than {LARGEST_MATRIX} entries")
    return rows


def _dense_product(left: Matrix, right: Matrix) -> list[Row]:
    result = _dense(left.rows, left.width) * _dense(right.rows, right.width)
    entries = [int(v) for v in result.entries()]
    width = right.width
    return [
        {column: v for column, v in enumerate(entries[r * width : (r + 1) * width]) if v} for r in range(len(left.rows))
    ]


def _dense(rows: Sequence[Row], width: int) -> fmpz_mat:
    return fmpz_mat(len(rows), width, [row.get(column, 0) for row in rows for column in range(width)])


def trimmed(matrix: Matrix, bits: int) -> Matrix:
    """The same matrix with numerators of `bits` digits, where they have more than twice as many."""
    longest = max((v.bit_length() for row in matrix.rows for v in row.values()), default=0)
    if longest <= 2 * bits:
        return matrix
    places = longest - bits
    count = sum(map(len, matrix.rows))
    rows = [{column: v >> places for column, v in row.items() if v >> places} for row in matrix.rows]
    lost = upper(power(places - matrix.shift) * root(arb(count)))
    return Matrix(rows, matrix.width, matrix.shift - places, upper(matrix.defect + lost))


def stacked(parts: Sequence[tuple[Matrix, Sequence[int], Sequence[int]]]) -> Matrix:
    """Rows of several matrices below each other: matrix, positions of the rows, how often each is repeated."""
    shift = max(matrix.shift for matrix, _, _ in parts)
    rows: list[Row] = []
    defects: list[arb] = []
    for matrix, positions, counts in parts:
        places = shift - matrix.shift
        for position, count in zip(positions, counts, strict=True):
            row = matrix.rows[position]
            rows.extend([{column: v << places for column, v in row.items()} if places else row] * count)
        defects.append(root(arb(max(counts, default=0))) * matrix.defect)
    return Matrix(rows, parts[0][0].width, shift, hypotenuse(defects))


# --- norms ------------------------------------------------------------------------------------------------------------


def squared_norm_bound(rows: Sequence[Row]) -> int:
    """An integer that the squared spectral norm of an integer matrix does not exceed.

    Rows that share no column with others are blocks of their own; the norm is that of the largest block.
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
    """Squared norm of one block.

    Theorem. Let `G = A A^T` (or `A^T A`, whichever is smaller), s a number and L any matrix. Then
    `||A||^2 <= s + ||s I - G - L L^T||_F`. Proof. `s I - G = L L^T + R` and `L L^T` is positive semidefinite, so
    `G <= s I - R <= (s + ||R||_F) I`. Everything on the right is computed in integers; s and L are guesses.
    """
    if len(block) * len(columns) > 3 * LARGEST_MATRIX or min(len(block), len(columns)) > LARGEST_BLOCK:
        raise NotAuditableError(
            f"the norm of a matrix of {len(block)} x {len(columns)} is needed; up to {LARGEST_BLOCK} rows or columns "
            "are proved here"
        )
    dense = _dense([{columns[c]: v for c, v in row.items()} for row in block], len(columns))
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
    """`s + ||s I - G - L L^T||_F` in integers, rounded upwards; L is `factor` times `2**(scale / 2)`."""
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


def _absolute_squared_norm_bound(rows: Sequence[Row], width: int) -> int:
    """Squared norm of the absolute values, by Collatz: `||A||^2 <= max of (A^T A v)_j / v_j` for every positive v.

    `A^T A` of a non-negative A has the largest eigenvalue rho with a non-negative left eigenvector y:
    `rho y.v = y.(A^T A v) <= max((A^T A v)_j / v_j) y.v`, and `y.v > 0`. The vector v is a guess.
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
