"""Balls of python-flint used as bounds."""

from __future__ import annotations

from collections.abc import Iterable

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
