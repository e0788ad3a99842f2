"""Exact products of float64 matrices, whose entries are cut into short integers: sums of their products never round.

An integer below `2**53` is a float64, and so is every sum of products below it: BLAS computes such a product exactly,
in any order of summation, fused or not. Each product is checked modulo `2**64` in numpy's own integers besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from flint import arb

from service.audit.balls import NotAuditableError, power, root, upper

_UNIT = 2.0**-53
_COUNT = 3
# Pairs of slices whose products are computed; that of the two last ones is bounded instead.
_PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1))
# An entry that underflows when it is scaled loses less than this.
_UNDERFLOW = 2.0**-1000


def slice_bits(inner: int) -> int:
    """Return the number of digits of a slice, for products with sums of `inner` terms."""
    return (53 - inner.bit_length()) // 2


def sliced(matrix: np.ndarray, bits: int) -> tuple[list[np.ndarray], float]:
    """Return integers `A_k` and a bound of every `|a - sum_k A_k / 2**(bits (k + 1))|`, for entries of at most 1.

    The first slice is at most `2**bits`, the others half of that.
    """
    rest = np.ldexp(matrix, bits)
    slices: list[np.ndarray] = []
    for _ in range(_COUNT):
        slices.append(np.rint(rest))
        # The difference of a float and the nearest integer is a float.
        rest = np.ldexp(rest - slices[-1], bits)
    return slices, math.ldexp(float(np.max(np.abs(rest), initial=0.0)), -(_COUNT + 1) * bits) + _UNDERFLOW


def partial_products(left: list[np.ndarray], right: list[np.ndarray], bits: int) -> Iterator[np.ndarray]:
    """Yield matrices whose sum is the product of two sliced matrices, up to `dropped`; the largest one is first.

    Args:
        left: slices of the first matrix.
        right: slices of the second one.
        bits: digits of a slice.
    """
    for k, n in _PAIRS:
        if left[k].any() and right[n].any():
            yield np.ldexp(_exact_product(left[k], right[n]), -bits * (k + n + 2))


def gram_products(slices: list[np.ndarray], bits: int) -> Iterator[np.ndarray]:
    """As `partial_products` of a matrix and its transpose."""
    for k, n in _PAIRS:
        if k <= n and slices[n].any():
            found = np.ldexp(_exact_product(slices[k], slices[n].T), -bits * (k + n + 2))
            # Both are at most 2**52 in units of the last place.
            yield found if k == n else found + found.T


def dropped(inner: int, bits: int) -> float:
    """Return the bound of one entry of the product of the last slices."""
    return math.ldexp(inner, -4 * bits - 2)


class RunningSum:
    """A sum of matrices with a bound of its rounding: each addition is off by at most `u |result|`."""

    def __init__(self, start: np.ndarray) -> None:
        self.total = start
        self._results = np.zeros(start.shape)

    def add(self, matrix: np.ndarray) -> None:
        """Add a matrix."""
        self.total = self.total + matrix
        self._results += np.abs(self.total)

    @property
    def error(self) -> arb:
        """Bound of the Frobenius norm of the rounding."""
        # The sums of absolute values are rounded, too: by far less than a percent.
        return upper(length(self._results) * _UNIT * arb("1.01"))


def rounded_product(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, arb]:
    """Return the product of two matrices in float64, and a bound of the Frobenius norm of its error.

    Raises:
        NotAuditableError: the product overflows, or numpy computes it wrongly.
    """
    inner = left.shape[1]
    scales = [math.frexp(float(np.max(np.abs(matrix), initial=0.0)))[1] for matrix in (left, right)]
    one, other = (np.ldexp(matrix, -scale) for matrix, scale in zip((left, right), scales, strict=True))
    bits = slice_bits(inner)
    (one_slices, one_rest), (other_slices, other_rest) = sliced(one, bits), sliced(other, bits)
    result = RunningSum(np.zeros((left.shape[0], right.shape[1])))
    for part in reversed(list(partial_products(one_slices, other_slices, bits))):
        result.add(part)
    # |x y - x' y'| <= |x - x'| |y| + |x'| |y - y'|, each factor at most 1 and a rest.
    entry = arb(inner) * (arb(one_rest) + arb(other_rest) * 2) + arb(dropped(inner, bits))
    error = result.error + entry * root(arb(result.total.size))
    scale = sum(scales)
    product = np.ldexp(result.total, scale)
    if not np.isfinite(product).all():
        raise NotAuditableError("a product of matrices overflows")
    return product, upper(error * power(scale) + arb(result.total.size) * power(-1022))


def _exact_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    product = np.matmul(left, right)
    if not float(np.max(np.abs(product), initial=0.0)) <= 2.0**53:
        raise NotAuditableError("numpy's product of two matrices is wrong")
    # Unsigned integers wrap around: both sides are exact modulo 2**64.
    probe = np.arange(1, right.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    a, b, c = (matrix.astype(np.int64).view(np.uint64) for matrix in (left, np.ascontiguousarray(right), product))
    if not np.array_equal(a @ (b @ probe), c @ probe):
        raise NotAuditableError("numpy's product of two matrices is wrong")
    return product


def length(values: np.ndarray) -> arb:
    """Return an upper bound of the Euclidean norm of floats, within some units of the last place for short vectors."""
    peak = float(np.max(np.abs(values), initial=0.0))
    if peak == 0.0:
        return arb(0)
    exponent = math.frexp(peak)[1]
    squares = np.square(np.ldexp(values.reshape(-1) if values.ndim < 2 else values, -exponent))
    terms, roundings = squares, 1
    if squares.ndim == 2:
        terms, roundings = squares.sum(axis=1), 1 + squares.shape[1]
    total = math.fsum(terms.ravel().tolist())
    # One rounding each of squares and of the last sum, and those of the sums of rows; squares that underflow.
    bound = arb(total) * (arb(1) + arb(2 * (roundings + 1)) * _UNIT) + arb(values.size) * _UNDERFLOW
    return upper(root(bound) * power(exponent))
