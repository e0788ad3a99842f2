"""Outward rounding: every function whose name ends in `_up` (`_down`) returns an upper (lower) bound.

Assumes IEEE 754 binary64 with rounding to nearest, as numpy computes. `u = 2**-53` is the unit roundoff of binary64. An
operation that rounds to nearest is off by at most half a unit in the last place, so one `nextafter` outwards
turns its result into a bound. Sums are bounded for any order of summation:
`|fl(sum) - sum| <= gamma(n) * sum |terms|` (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., 2002,
sections 3.1 and 4.2).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALLEST_NORMAL = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Precision:
    """One binary floating-point format, as the runtime that executes the graph uses it."""

    name: str
    unit_roundoff: float
    """Largest relative error of one correctly rounded operation, absent underflow."""
    smallest_normal: float
    """Largest absolute error of one operation that underflows, flush-to-zero included."""
    largest: float


FLOAT64 = Precision("float64", 2.0**-53, SMALLEST_NORMAL, float(np.finfo(np.float64).max))
FLOAT32 = Precision("float32", 2.0**-24, float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max))


def up(value: float) -> float:
    """Return the next float64 above `value`: an upper bound of any result that rounded to `value`."""
    return math.nextafter(value, math.inf)


def down(value: float) -> float:
    """Return the next float64 below `value`."""
    return math.nextafter(value, -math.inf)


def add_up(*terms: float) -> float:
    """Return an upper bound of the sum of `terms` (any signs)."""
    total = 0.0
    for term in terms:
        total = up(total + term)
    return total


def mul_up(*factors: float) -> float:
    """Return an upper bound of the product of `factors`. An exact 0 or 1 costs nothing.

    An infinite factor stands for an unknown bound: the product is unknown, too, even if another factor is 0.

    Raises:
        ValueError: a factor is negative.
    """
    if math.inf in factors:
        return math.inf
    product = 1.0
    for factor in factors:
        if factor < 0.0:
            raise ValueError(f"mul_up takes non-negative factors, got {factor}")
        if product == 1.0:
            product = factor
        elif factor == 0.0 or product == 0.0:
            return 0.0
        elif factor != 1.0:
            product = up(product * factor)
    return product


def div_up(numerator: float, denominator: float) -> float:
    """Return an upper bound of `numerator / denominator`, the numerator not negative, the denominator positive."""
    return up(numerator / denominator)


def sqrt_up(value: float) -> float:
    """Return an upper bound of the square root; exact for 0 and 1."""
    return value if value in (0.0, 1.0) else up(math.sqrt(value))


def gamma_up(n: int, unit_roundoff: float = FLOAT64.unit_roundoff) -> float:
    """Return an upper bound of `gamma_n = n u / (1 - n u)` (Higham 2002, lemma 3.1).

    Raises:
        ValueError: `n u >= 1/2`, where the bound is useless.
    """
    nu = up(n * unit_roundoff)
    if nu >= 0.5:
        raise ValueError(f"a sum of {n} terms is too long for unit roundoff {unit_roundoff}")
    return div_up(nu, down(1.0 - nu))


def sum_up(values: NDArray[np.float64]) -> float:
    """Return an upper bound of the sum of non-negative `values` of any shape."""
    return mul_up(up(float(np.sum(values))), add_up(1.0, gamma_up(max(1, 2 * values.size))))


def norm_up(values: NDArray[np.float64]) -> float:
    """Return an upper bound of the Euclidean norm of all entries of `values` (Frobenius norm of a matrix).

    Scaled by a power of two, so that squares neither overflow nor lose more than `SMALLEST_NORMAL` each.
    """
    if values.size == 0:
        return 0.0
    peak = max(float(np.max(values)), -float(np.min(values)))
    if peak == 0.0 or not math.isfinite(peak):
        return peak
    if peak > 2.0**1000:
        # The power of two above the peak may itself overflow.
        return mul_up(2.0**100, norm_up(values / 2.0**100))
    scale = 2.0 ** math.frexp(peak)[1]
    squares = values / scale
    np.square(squares, out=squares)
    total = add_up(sum_up(squares), mul_up(float(values.size), 4.0 * SMALLEST_NORMAL))
    # Each square carries one rounding (1 + u); sum_up's 2 n covers it together with the additions.
    return mul_up(scale, sqrt_up(total))
