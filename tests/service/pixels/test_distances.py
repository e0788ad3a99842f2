"""Distances are compared with radii without rounding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.pixels.distances import distance, is_inside, squared_distance


def test_radius_is_compared_without_rounding() -> None:
    """The distance is 5 / 8 exactly: not inside 5 / 8, and inside the next float."""
    image, other = np.array([0.0, 0.0]), np.array([3 / 8, 4 / 8])
    assert not is_inside(image, other, 0.625)
    assert is_inside(image, other, float(np.nextafter(0.625, 1)))
    # Squares that a float cannot tell from 1.
    assert is_inside(np.zeros(1), np.array([np.nextafter(1.0, 0)]), 1.0)
    assert not is_inside(np.zeros(2), np.array([1.0, 1e-30]), 1.0)


def test_distance_is_exact_for_numbers_that_cancel() -> None:
    image = np.array([1e8, 1.0, 1e-8])
    assert distance(np.add(image, [3.0, 4.0, 0.0]), image) == pytest.approx(5.0, rel=1e-15)


PIXELS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6)


@given(PIXELS, st.floats(0, 3))
def test_squared_distance_is_that_of_rational_arithmetic(pixels: list[tuple[float, float]], radius: float) -> None:
    image, other = np.array(pixels).T
    square = sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in pixels), Fraction(0))
    assert squared_distance(image, other) == square
    assert is_inside(image, other, radius) == (square < Fraction(radius) ** 2)
    assert distance(image, other) == pytest.approx(float(square) ** 0.5, rel=1e-14, abs=1e-160)


def test_inside_tells_neighbouring_floats_apart() -> None:
    image, other = np.zeros((1, 2, 2)), np.full((1, 2, 2), 0.25)
    assert squared_distance(image, other) == Fraction(1, 4)
    assert not is_inside(image, other, 0.5)
    assert is_inside(image, other, float(np.nextafter(0.5, 1.0)))
    assert is_inside(image, np.nextafter(other, 0.0), 0.5)
