"""The algebra of bounds against exact vectors: no result is smaller than the quantity that it bounds."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.certificate.facts import Facts, LocalError

numbers = st.floats(0.0, 1e3, allow_nan=False)
factors = st.floats(0.0, 1e3, allow_nan=False)
bounds = st.builds(Facts, numbers, numbers, numbers, numbers, numbers)
errors = st.builds(LocalError, numbers, numbers)
FIELDS = ("lipschitz", "error", "error_max", "norm", "largest")


def exact(facts: Facts) -> list[Fraction]:
    return [Fraction(getattr(facts, name)) for name in FIELDS]


@given(bounds, factors)
def test_scaled_bounds_are_never_below_the_exact_products(facts: Facts, factor: float) -> None:
    for before, after in zip(exact(facts), exact(facts.scaled(factor)), strict=True):
        assert before * Fraction(factor) <= after


@given(bounds, factors, factors)
def test_mapped_bounds_say_nothing_about_the_values(facts: Facts, slope: float, slope_max: float) -> None:
    after = facts.mapped(slope, slope_max)
    assert Fraction(after.lipschitz) >= Fraction(slope) * Fraction(facts.lipschitz)
    assert Fraction(after.error) >= Fraction(slope) * Fraction(facts.error)
    assert Fraction(after.error_max) >= Fraction(slope_max) * Fraction(facts.error_max)
    assert after.norm == after.largest == math.inf


@given(bounds, bounds)
def test_the_bounds_of_a_sum_are_never_below_the_exact_sums(one: Facts, other: Facts) -> None:
    for left, right, both in zip(exact(one), exact(other), exact(one + other), strict=True):
        assert left + right <= both


@given(bounds, st.lists(errors, min_size=1, max_size=3))
def test_local_errors_add_to_the_errors_and_move_no_exact_value(facts: Facts, local: list[LocalError]) -> None:
    after = facts.plus(*local)
    assert Fraction(after.error) >= Fraction(facts.error) + sum(Fraction(error.l2) for error in local)
    assert Fraction(after.error_max) >= Fraction(facts.error_max) + sum(Fraction(error.largest) for error in local)
    assert Fraction(after.largest) >= Fraction(facts.largest) + sum(Fraction(error.largest) for error in local)
    assert (after.lipschitz, after.norm) == (facts.lipschitz, facts.norm)


@given(st.lists(bounds, min_size=1, max_size=4))
def test_stacked_bounds_add_in_squares_and_largest_components_do_not_add(parts: list[Facts]) -> None:
    after = Facts.stacked(parts)
    for name in ("lipschitz", "error", "norm"):
        assert Fraction(getattr(after, name)) ** 2 >= sum(Fraction(getattr(part, name)) ** 2 for part in parts)
    for name in ("error_max", "largest"):
        assert getattr(after, name) == max(getattr(part, name) for part in parts)


def test_one_part_is_not_rounded_by_stacking() -> None:
    facts = Facts(1.0, 2.0, 3.0, 4.0, 5.0)
    assert Facts.stacked([facts]) is facts


@given(numbers, st.integers(0, 10_000))
def test_an_error_of_each_element_adds_in_squares(bound: float, size: int) -> None:
    error = LocalError.of_each(bound, size)
    assert Fraction(error.l2) ** 2 >= size * Fraction(bound) ** 2
    assert error.largest == bound


@given(errors, errors, factors)
def test_local_errors_add_and_scale(one: LocalError, other: LocalError, factor: float) -> None:
    both, scaled = one + other, one.scaled(factor)
    relative = LocalError.relative(factor, one.l2, one.largest)
    for name in ("l2", "largest"):
        assert Fraction(getattr(both, name)) >= Fraction(getattr(one, name)) + Fraction(getattr(other, name))
        assert Fraction(getattr(scaled, name)) >= Fraction(factor) * Fraction(getattr(one, name))
    assert relative == scaled


@pytest.mark.parametrize("unknown", [Facts(0.0, 0.0).scaled(0.0), Facts(0.0, 0.0) + Facts(1.0, 1.0)])
def test_a_bound_that_is_not_known_stays_unknown(unknown: Facts) -> None:
    # Not even 0 times it is a bound.
    assert unknown.error_max == unknown.norm == unknown.largest == math.inf
    assert np.isfinite([unknown.lipschitz, unknown.error]).all()
