"""Outward rounding against exact rationals."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.certificate.rounding import add_up, div_up, gamma_up, mul_up, norm_up, sqrt_up, sum_up

finite = st.floats(-1e100, 1e100)
positive = st.floats(0.0, 1e100)


@given(st.lists(finite, max_size=8))
def test_add_up_is_never_below_the_exact_sum(terms: list[float]) -> None:
    assert Fraction(add_up(*terms)) >= sum(map(Fraction, terms))


@given(st.lists(st.floats(0.0, 1e30), max_size=6))
def test_mul_up_is_never_below_the_exact_product(factors: list[float]) -> None:
    assert Fraction(mul_up(*factors)) >= math.prod(map(Fraction, factors))


@given(positive, st.floats(1e-100, 1e100))
def test_div_up_is_never_below_the_exact_quotient(numerator: float, denominator: float) -> None:
    assert Fraction(div_up(numerator, denominator)) >= Fraction(numerator) / Fraction(denominator)


@given(positive)
def test_sqrt_up_is_never_below_the_exact_root(value: float) -> None:
    assert Fraction(sqrt_up(value)) ** 2 >= Fraction(value)


@given(st.lists(st.floats(0.0, 1e60) | st.floats(0.0, 1e-300), min_size=1, max_size=60))
def test_sum_up_is_never_below_the_exact_sum(values: list[float]) -> None:
    assert Fraction(sum_up(np.array(values))) >= sum(map(Fraction, values))


@given(st.lists(st.floats(-1e150, 1e150) | st.floats(-1e-160, 1e-160), min_size=1, max_size=40))
def test_norm_up_is_never_below_the_exact_norm_and_close_to_it(values: list[float]) -> None:
    bound = norm_up(np.array(values))
    exact_square = sum(Fraction(value) ** 2 for value in values)
    assert Fraction(bound) ** 2 >= exact_square
    assert Fraction(bound) ** 2 <= exact_square * Fraction(1 + 1e-12) ** 2 + Fraction(1e-300)


@pytest.mark.parametrize("value", [1.7e308, 5e-324, 2.0**1023, 1.0])
def test_norm_up_survives_the_ends_of_the_number_range(value: float) -> None:
    assert math.inf > norm_up(np.array([value, 0.0])) >= value


@given(st.integers(1, 10**9))
def test_gamma_up_is_never_below_its_formula(n: int) -> None:
    u = Fraction(1, 2**53)
    assert Fraction(gamma_up(n)) >= n * u / (1 - n * u)


def test_gamma_of_a_sum_too_long_for_its_format_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        gamma_up(2**23, 2.0**-24)


def test_mul_up_refuses_a_negative_factor() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        mul_up(2.0, -1.0)
