"""Sparse matrices of float64 entries, with proved bounds of their norms.

Where an entry is not exactly the number that it stands for (a third, a rounded product), `defect` accounts for the
difference. Bounds are rounded upwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from flint import arb

from service.audit.balls import NotAuditableError, hypotenuse, power, root, upper
from service.audit.blocks import distinct_blocks, taken
from service.audit.norms import LARGEST_MATRIX, absolute_norm, spectral_norm
from service.audit.slices import length

# Entries of the rows whose norms are computed together.
_CHUNK = 1_000_000


@dataclass(frozen=True, eq=False)
class Matrix:
    """Entries by row, up to a difference whose Frobenius norm is at most `defect`."""

    starts: np.ndarray
    """Position of the first entry of each row, and the number of entries."""
    columns: np.ndarray
    """Of the entries; different within a row."""
    values: np.ndarray
    """Of the entries; rarely zero."""
    width: int
    defect: arb
    multiple: tuple[arb, Matrix] | None = None
    """A number c and a matrix M, where the norm is at most `c ||M||`, and not much less."""

    @property
    def height(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    @cached_property
    def is_identity(self) -> bool:
        """Whether it is the identity, exactly."""
        places = np.arange(self.height)
        return (
            self.height == self.width
            and not self.defect > 0
            and np.array_equal(self.columns, places)
            and bool((self.values == 1.0).all())
        )

    @cached_property
    def frobenius(self) -> arb:
        """Upper bound of the Frobenius norm."""
        return upper(hypotenuse(map(arb, self._bounds_of_rows[0].tolist())) + self.defect)

    @cached_property
    def norm(self) -> arb:
        """Upper bound of the spectral norm of the matrix that the entries stand for."""
        if self.multiple is not None:
            factor, other = self.multiple
            return upper(factor * other.norm)
        return self._largest(spectral_norm)

    @cached_property
    def absolute_norm(self) -> arb:
        """Upper bound of the spectral norm of the matrix of absolute values."""
        return self._largest(absolute_norm)

    def _largest(self, bound: Callable[[np.ndarray], arb]) -> arb:
        if np.diff(self.starts).max(initial=0) <= 1 and np.unique(self.columns).size == self.columns.size:
            # A diagonal in some order.
            return upper(arb(float(np.max(np.abs(self.values), initial=0.0))) + self.defect)
        found = arb(0)
        for block in distinct_blocks(self.starts, self.columns, self.values, self.width):
            one = bound(block)
            found = one if one > found else found
        return upper(found + self.defect)

    @cached_property
    def _bounds_of_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Euclidean norm and sum of absolute values of each row, without the defect; upper bounds."""
        # A few rows at a time: temporary arrays stay small.
        cuts = np.unique(np.searchsorted(self.starts, np.arange(0, len(self.values) + _CHUNK, _CHUNK)))
        cuts = np.unique(np.clip([0, *cuts.tolist(), self.height], 0, self.height)).tolist()
        bounds = [self._some_rows(first, last) for first, last in pairwise(cuts)]
        return np.concatenate([norms for norms, _ in bounds]), np.concatenate([sums for _, sums in bounds])

    def _some_rows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self.starts[first : last + 1]
        sizes = np.abs(self.values[starts[0] : starts[-1]])
        starts = starts - starts[0]
        peaks = _by_row(np.maximum, sizes, starts)
        # Powers of two that do not overflow themselves.
        exponents = np.clip(np.frexp(peaks)[1], -1000, 1000)
        scaled = np.ldexp(sizes, -np.repeat(exponents, np.diff(starts)))
        squares, sums = _by_row(np.add, np.square(scaled), starts), _by_row(np.add, scaled, starts)
        roundings = float(np.max(np.diff(starts), initial=0)) + 8.0
        slack = 1.0 + 4.0 * roundings * 2.0**-53
        # Squares that underflow; an entry that does so itself is below 2**-1000, too.
        lost = np.where(peaks > 0.0, roundings * 2.0**-1000, 0.0)
        norms, sums = np.sqrt(squares * slack + lost) * slack, sums * slack + lost
        with np.errstate(over="ignore"):
            norms, sums = (np.nextafter(np.ldexp(bounds, exponents), np.inf) for bounds in (norms, sums))
        return np.where(peaks > 0.0, norms, 0.0), np.where(peaks > 0.0, sums, 0.0)

    def row_bounds(self, positions: np.ndarray | None = None) -> tuple[arb, arb]:
        """Return upper bounds of the Euclidean norms and of the sums of absolute values of some rows, or of all."""
        norms, sums = self._bounds_of_rows
        if positions is not None:
            norms, sums = norms[positions], sums[positions]
        return (
            upper(arb(float(np.max(norms, initial=0.0))) + self.defect),
            upper(arb(float(np.max(sums, initial=0.0))) + root(arb(self.width)) * self.defect),
        )

    def select(self, positions: np.ndarray) -> Matrix:
        """Return some rows, each as often as it is named; -1 is a row of zeros.

        The caller accounts for rows that are named more than once, whose defects repeat.
        """
        if len(positions) == self.height and np.array_equal(positions, np.arange(self.height)):
            return self
        present = np.flatnonzero(positions >= 0)
        entries = taken(self.starts, positions[present])
        require_size(len(entries))
        lengths = np.zeros(len(positions), dtype=np.int64)
        lengths[present] = np.diff(self.starts)[positions[present]]
        return Matrix(starts_of(lengths), self.columns[entries], self.values[entries], self.width, self.defect)

    def dense_row(self, position: int) -> np.ndarray:
        """Return one row as a dense vector."""
        row = np.zeros(self.width)
        here = slice(int(self.starts[position]), int(self.starts[position + 1]))
        row[self.columns[here]] = self.values[here]
        return row


def _by_row(combine: np.ufunc, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Combine the non-negative entries of each row; 0 for an empty one."""
    found = np.zeros(len(starts) - 1)
    filled = np.flatnonzero(np.diff(starts))
    if len(filled):
        found[filled] = combine.reduceat(values, starts[filled])
    return found


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Return the positions of the first entries of rows of these lengths, and the number of entries."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def from_dense(values: np.ndarray, defect: arb) -> Matrix:
    """Return a dense matrix as a sparse one."""
    rows, columns = np.nonzero(values)
    starts = starts_of(np.bincount(rows, minlength=values.shape[0]))
    return Matrix(starts, columns.astype(np.int32), values[rows, columns], values.shape[1], defect)


def identity(size: int) -> Matrix:
    """Return the identity."""
    return Matrix(np.arange(size + 1), np.arange(size, dtype=np.int32), np.ones(size), size, arb(0))


def require_size(entries: int) -> None:
    """Refuse a matrix with more entries than `LARGEST_MATRIX`.

    Raises:
        NotAuditableError: it is too large.
    """
    if entries > LARGEST_MATRIX:
        raise NotAuditableError(f"its matrix has {entries} entries, more than {LARGEST_MATRIX}")


def stacked(parts: Sequence[tuple[Matrix, np.ndarray, np.ndarray]]) -> Matrix:
    """Stack rows of several matrices: each part is a matrix, positions of its rows, and how often each is repeated."""
    chosen = [matrix.select(np.repeat(positions, counts)) for matrix, positions, counts in parts]
    if len(chosen) == 1 and chosen[0] is parts[0][0]:
        return chosen[0]
    defects = [root(arb(int(np.max(counts, initial=0)))) * matrix.defect for matrix, _, counts in parts]
    lengths = np.concatenate([np.diff(matrix.starts) for matrix in chosen])
    require_size(int(lengths.sum()))
    return Matrix(
        starts_of(lengths),
        np.concatenate([matrix.columns for matrix in chosen]),
        np.concatenate([matrix.values for matrix in chosen]),
        chosen[0].width,
        hypotenuse(defects),
    )


def difference_norm(left: tuple[Matrix, int], right: tuple[Matrix, int]) -> arb:
    """Return an upper bound of the Euclidean norm of the difference of two rows."""
    (one, i), (other, j) = left, right
    # Each difference is rounded once.
    rounded = length(one.dense_row(i) - other.dense_row(j)) * (arb(1) + power(-52))
    return upper(rounded + one.defect + other.defect)
