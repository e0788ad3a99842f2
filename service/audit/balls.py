"""Balls of python-flint used as bounds, and decimal-free copies of floats and balls as scaled integers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flint import arb


class NotAuditableError(Exception):
    """A check that cannot be decided; each argument is a reason."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for each obstacle."""
        return tuple(map(str, self.args))


def power(exponent: int) -> arb:
    """Return `2**exponent`, exact."""
    return arb((1, exponent))


def upper(value: arb) -> arb:
    """Return the upper end of a ball, as an exact number.

    Raises:
        NotAuditableError: the end is not finite.
    """
    end = value.upper()
    if not end.is_finite():
        raise NotAuditableError("a bound is not finite")
    return end


def root(value: arb) -> arb:
    """Return an upper bound of the square root of a non-negative number that `value` encloses."""
    end = upper(value)
    return upper(end.sqrt()) if end > 0 else arb(0)


def smaller(left: arb, right: arb) -> arb:
    """Return the smaller of two upper bounds."""
    return left if left < right else right


def larger(left: arb, right: arb) -> arb:
    """Return the larger of two exact numbers."""
    return right if left < right else left


def largest_magnitude(values: Iterable[arb]) -> arb:
    """Return an upper bound of every `|value|`; 0 for an empty sequence."""
    found = arb(0)
    for value in values:
        found = larger(found, upper(abs(value)))
    return found


def hypotenuse(parts: Iterable[arb]) -> arb:
    """Return an upper bound of `sqrt(sum of squares)`."""
    return root(sum((part * part for part in parts), arb(0)))


@dataclass(frozen=True)
class Numbers:
    """Numbers `numerator / 2**shift`, each off by at most `error`."""

    numerators: list[int]
    shift: int
    error: arb


def float_numbers(values: Iterable[float], bits: int) -> Numbers:
    """Return floats exactly, except that digits more than `bits` below the largest float are cut off."""
    ratios = [value.as_integer_ratio() for value in values]
    places = [denominator.bit_length() - 1 for _, denominator in ratios]
    top = max((n.bit_length() - place for (n, _), place in zip(ratios, places, strict=True) if n), default=0)
    shift = min(max(places, default=0), bits - top)
    cut = any(place > shift for place in places)
    numerators = [_shifted(n, shift - place) for (n, _), place in zip(ratios, places, strict=True)]
    return Numbers(numerators, shift, power(-shift) if cut else arb(0))


def ball_numbers(values: Sequence[arb], bits: int) -> Numbers:
    """Return the centres of balls with `bits` digits; the radii enter the error."""
    parts = [value.mid().man_exp() for value in values]
    pairs = [(int(mantissa), int(exponent)) for mantissa, exponent in parts]
    top = max((mantissa.bit_length() + exponent for mantissa, exponent in pairs if mantissa), default=0)
    shift = bits - top
    radius = largest_magnitude(value.rad() for value in values)
    numerators = [_shifted(mantissa, exponent + shift) for mantissa, exponent in pairs]
    return Numbers(numerators, shift, upper(radius + power(-shift)))


def _shifted(number: int, places: int) -> int:
    return number << places if places >= 0 else number >> -places
