"""Linear maps as an operator defines them: exact products with balls, and matrices with bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from flint import arb, arb_mat

from service.audit.balls import power, root, smaller, upper
from service.audit.matrices import Matrix, from_dense, identity, require_size, starts_of
from service.audit.norms import absolute_norm, spectral_norm
from service.audit.slices import length, rounded_product


@dataclass(frozen=True, eq=False)
class Weights:
    """A matrix of exact numbers: floats, or balls with the floats nearest to them."""

    floats: np.ndarray
    balls: Sequence[arb] | None
    """Row by row; absent where the floats are exact."""
    error: arb
    """Bound of the Frobenius norm of the difference between the numbers and the floats."""

    def matrix(self) -> arb_mat:
        """Return the transpose as a matrix of balls."""
        rows, columns = self.floats.shape
        if self.balls is None:
            return arb_mat(columns, rows, self.floats.T.ravel().tolist())
        return arb_mat(rows, columns, list(self.balls)).transpose()


def exact_weights(floats: np.ndarray) -> Weights:
    """Return floats as weights."""
    return Weights(floats, None, arb(0))


def ball_weights(balls: Sequence[arb], rows: int) -> Weights:
    """Return balls as weights, given row by row."""
    floats = [float(ball.mid()) for ball in balls]
    errors = [upper(abs(ball - value)) for ball, value in zip(balls, floats, strict=True)]
    error = root(sum((one * one for one in errors), arb(0)))
    return Weights(np.array(floats).reshape(rows, -1), balls, error)


class Diagonal:
    """A diagonal matrix."""

    def __init__(self, factors: Weights) -> None:
        self._factors = factors
        self._floats = factors.floats.ravel()
        self._largest = upper(arb(float(np.max(np.abs(self._floats), initial=0.0))) + factors.error)

    @property
    def norm(self) -> arb:
        """Upper bound of the spectral norm."""
        return self._largest

    @property
    def absolute_norm(self) -> arb:
        """Upper bound of the spectral norm of the absolute values."""
        return self._largest

    def row_bounds(self) -> tuple[arb, arb]:
        """Return upper bounds of the Euclidean norm and of the sum of absolute values of every row."""
        return self._largest, self._largest

    def apply(self, vector: Sequence[arb]) -> list[arb]:
        """Return the product with a vector of balls."""
        factors = self._floats.tolist() if self._factors.balls is None else self._factors.balls
        return [value * factor for value, factor in zip(vector, factors, strict=True)]

    def rows(self) -> Iterator[tuple[list[int], Sequence[arb]]]:
        """Yield the places and the factors of each result."""
        balls = self._factors.balls
        factors = [arb(factor) for factor in self._floats.tolist()] if balls is None else balls
        for place, factor in enumerate(factors):
            yield [place], [factor]

    def times(self, right: Matrix) -> Matrix:
        """Return the product with a matrix."""
        factors = np.repeat(self._floats, np.diff(right.starts))
        values = right.values * factors
        defect = self._largest * right.defect + self._factors.error * right.row_bounds()[0]
        defect = defect + _rounding(values, right.values, factors)
        present = factors != 0.0
        if present.all():
            # ||D M|| <= max |d| ||M|| of any diagonal; as sharp as the norm itself where its entries are one number.
            multiple = (self._largest, right) if (self._floats == self._floats[0]).all() else None
            return Matrix(right.starts, right.columns, values, right.width, upper(defect), multiple)
        rows = np.repeat(np.arange(right.height), np.diff(right.starts))[present]
        starts = starts_of(np.bincount(rows, minlength=right.height))
        return Matrix(starts, right.columns[present], values[present], right.width, upper(defect))


def signs(size: int, sign: int) -> Diagonal:
    """Return the identity, or its negative."""
    return Diagonal(exact_weights(np.full((1, size), float(sign))))


class Shared:
    """One matrix W at several places: result `l m + i` is the sum of `W[i, j] x[places[l, j]]`."""

    def __init__(self, weights: Weights, places: np.ndarray, width: int) -> None:
        """Describe the map.

        Args:
            weights: W, m x n.
            places: L x n positions in x, different within a row; -1 is the number 0.
            width: length of x.

        Raises:
            NotAuditableError: the matrix is too large.
        """
        require_size(places.size * weights.floats.shape[0])
        self._weights, self._places, self._width = weights, places, width
        used = np.bincount(places[places >= 0], minlength=1)
        self._repeats = int(used.max())
        self._reach = root(arb(self._repeats)) * (length(weights.floats) + weights.error)

    @cached_property
    def _matrix(self) -> Matrix:
        return self._times(identity(self._width))

    @cached_property
    def norm(self) -> arb:
        """Upper bound of the spectral norm; where no place is used twice, that of W."""
        if self._repeats <= 1:
            return upper(spectral_norm(self._weights.floats) + self._weights.error)
        return self._matrix.norm

    @cached_property
    def absolute_norm(self) -> arb:
        """Upper bound of the spectral norm of the absolute values."""
        if self._repeats <= 1:
            return upper(absolute_norm(self._weights.floats) + self._weights.error)
        return self._matrix.absolute_norm

    def row_bounds(self) -> tuple[arb, arb]:
        """Return upper bounds of the Euclidean norm and of the sum of absolute values of every row."""
        return from_dense(self._weights.floats, self._weights.error).row_bounds()

    @cached_property
    def _balls(self) -> arb_mat:
        return self._weights.matrix()

    def apply(self, vector: Sequence[arb]) -> list[arb]:
        """Return the product with a vector of balls."""
        padded = [*vector, arb(0)]
        rows, columns = self._places.shape
        return (arb_mat(rows, columns, [padded[i] for i in self._places.ravel().tolist()]) * self._balls).entries()

    def rows(self) -> Iterator[tuple[list[int], Sequence[arb]]]:
        """Yield the places and the factors of each result; -1 is the number 0."""
        height, width = self._weights.floats.shape
        entries = self._balls.transpose().entries()
        factors = [entries[row * width : (row + 1) * width] for row in range(height)]
        for places in self._places.tolist():
            for row in factors:
                yield places, row

    def times(self, right: Matrix) -> Matrix:
        """Return the product with a matrix."""
        return self._matrix if right.is_identity else self._times(right)

    def _times(self, right: Matrix) -> Matrix:
        # ||A D||_F <= ||A|| ||D||_F for the defect D of the right matrix.
        defect = self._reach * right.defect
        if self._weights.error > 0:
            # The difference of W is multiplied with rows that repeat.
            several = upper(root(arb(self._places.size)) * right.row_bounds()[0])
            defect = defect + self._weights.error * smaller(upper(root(arb(self._repeats)) * right.frobenius), several)
        scaled = self._scaled(right, upper(defect))
        return self._multiplied(right, upper(defect)) if scaled is None else scaled

    def _scaled(self, right: Matrix, defect: arb) -> Matrix | None:
        """Return the product where each row of the right matrix has at most one entry, on different columns."""
        lengths = np.append(np.diff(right.starts), 0)
        if lengths.max() > 1:
            return None
        filled = np.flatnonzero(lengths)
        columns, factors = np.full(len(lengths), -1), np.zeros(len(lengths))
        columns[filled], factors[filled] = right.columns, right.values
        columns, factors = columns[self._places], factors[self._places]
        ordered = np.sort(columns, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            return None
        weights = self._weights.floats
        values = weights[None] * factors[:, None, :]
        defect = upper(defect + _rounding(values, weights, factors))
        shape = values.shape
        spread = np.broadcast_to(columns[:, None, :].astype(np.int32), shape)
        present = (weights != 0.0)[None] & (factors != 0.0)[:, None, :]
        starts = starts_of(present.sum(axis=2).ravel())
        if present.all():
            return Matrix(starts, spread.ravel(), values.ravel(), right.width, defect)
        return Matrix(starts, spread[present], values[present], right.width, defect)

    def _multiplied(self, right: Matrix, defect: arb) -> Matrix:
        """Return the product, place by place."""
        weights, lost = self._weights.floats, arb(0)
        lengths: list[np.ndarray] = []
        columns: list[np.ndarray] = []
        values: list[np.ndarray] = []
        entries = 0
        for places in self._places:
            rows = right.select(places)
            used, found = np.unique(rows.columns, return_inverse=True)
            require_size(weights.shape[1] * len(used))
            dense = np.zeros((weights.shape[1], len(used)))
            dense[np.repeat(np.arange(rows.height), np.diff(rows.starts)), found] = rows.values
            product, error = rounded_product(weights, dense)
            here, there = np.nonzero(product)
            entries += len(here)
            require_size(entries)
            lost = lost + error * error
            lengths.append(np.bincount(here, minlength=len(weights)))
            columns.append(used[there].astype(np.int32))
            values.append(product[here, there])
        return Matrix(
            starts_of(np.concatenate(lengths)),
            np.concatenate(columns),
            np.concatenate(values),
            right.width,
            upper(defect + root(lost)),
        )


LinearMap = Diagonal | Shared
"""The matrix of an operator, with bounds of its norms."""


def _rounding(values: np.ndarray, terms: np.ndarray, factors: np.ndarray) -> arb:
    """Return a bound of the Frobenius norm of the rounding of `values`, products of terms and factors."""
    terms, factors = terms[terms != 0.0], factors[factors != 0.0]
    least = [float(np.min(np.abs(one), initial=1.0)) for one in (terms, factors)]
    if least[0] * least[1] > 2.0**-900 and (_are_powers_of_two(factors) or _are_powers_of_two(terms)):
        return arb(0)
    relative = length(values.reshape(-1, values.shape[-1])) * (power(-53) + power(-70))
    return upper(relative + power(-1000) * root(arb(values.size)))


def _are_powers_of_two(values: np.ndarray) -> bool:
    return bool((np.abs(np.frexp(values)[0]) == 0.5).all())
