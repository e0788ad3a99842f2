"""The radius: one formula, rounded down."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from service.certificate import certified_radius, two_class_logits

logits_5 = arrays(np.float64, (1, 5), elements=st.floats(-1e6, 1e6))
errors = st.floats(0.0, 1e-3)
bounds_5 = arrays(np.float64, (5, 5), elements=st.floats(1e-3, 1e3))


@given(logits_5, bounds_5, errors)
def test_radius_is_never_above_the_exact_formula(logits: np.ndarray, bounds: np.ndarray, error: float) -> None:
    radii = certified_radius(logits, bounds, error)
    i = int(radii.class_id_N[0])
    f = [Fraction(value) for value in logits[0]]
    exact = min((f[i] - f[j] - 4 * Fraction(error)) / Fraction(bounds[i, j]) for j in range(5) if j != i)
    assert 0 <= Fraction(radii.radius_N[0]) <= max(exact, 0)
    assert radii.certified_N[0] == (radii.radius_N[0] > 0)
    assert radii.lipschitz_bound_N[0] == bounds[i, radii.runner_up_N[0]]


@given(logits_5, errors, st.permutations(range(5)))
def test_radius_does_not_depend_on_the_order_of_the_classes(logits: np.ndarray, error: float, order: list[int]) -> None:
    bounds = np.full((5, 5), 1.5)
    one = certified_radius(logits, bounds, error)
    other = certified_radius(logits[:, order], bounds, error)
    assert one.radius_N[0] == other.radius_N[0]


@given(arrays(np.int64, (1, 5), elements=st.integers(-1000, 1000)), st.integers(-1000, 1000))
def test_radius_does_not_change_when_all_logits_shift(logits: np.ndarray, shift: int) -> None:
    bounds = np.full((5, 5), 2.0)
    one = certified_radius(logits.astype(float), bounds, 1e-9)
    other = certified_radius((logits + shift).astype(float), bounds, 1e-9)
    assert one.radius_N[0] == other.radius_N[0]


@given(logits_5, st.integers(1, 10))
def test_radius_scales_inversely_with_the_lipschitz_bound(logits: np.ndarray, power: int) -> None:
    bounds = np.full((5, 5), 1.0)
    one = certified_radius(logits, bounds, 0.0).radius_N[0]
    other = certified_radius(logits, bounds * 2.0**power, 0.0).radius_N[0]
    assert other == pytest.approx(one / 2.0**power, rel=1e-12)


@pytest.mark.parametrize(
    ("logits", "error"),
    [
        ([1.0, 1.0, 0.0], 0.0),
        ([np.nan, 1.0, 0.0], 0.0),
        ([np.inf, 1.0, 0.0], 0.0),
        ([-np.inf, 1.0, 0.0], 0.0),
        ([1.0, 0.5, 0.0], 0.125),
        ([1.0, 0.5, 0.0], 0.2),
    ],
)
def test_tie_nonfinite_logit_or_margin_within_the_error_abstains(logits: list[float], error: float) -> None:
    radii = certified_radius(np.array([logits]), np.ones((3, 3)), error)
    assert radii.radius_N[0] == 0.0
    assert not radii.certified_N[0]


def test_the_runner_up_is_the_class_that_decides_not_the_second_largest_logit() -> None:
    bounds = np.array([[0.0, 1.0, 10.0], [1.0, 0.0, 1.0], [10.0, 1.0, 0.0]])
    radii = certified_radius(np.array([[3.0, 2.0, 1.0]]), bounds, 0.0)
    assert radii.runner_up_N[0] == 2
    assert radii.radius_N[0] == pytest.approx(0.2)


def test_each_image_of_a_batch_has_the_radius_it_has_alone() -> None:
    logits = np.random.default_rng(0).standard_normal((20, 4))
    bounds = np.full((4, 4), 1.4)
    together = certified_radius(logits, bounds, 1e-10).radius_N
    alone = [certified_radius(row[None], bounds, 1e-10).radius_N[0] for row in logits]
    np.testing.assert_array_equal(together, alone)


def test_a_margin_that_never_changes_is_certified_at_a_finite_radius() -> None:
    radii = certified_radius(np.array([[1.0, 0.0]]), np.zeros((2, 2)), 0.0)
    assert radii.certified_N[0]
    assert np.isfinite(radii.radius_N[0])


def test_two_class_logits_are_f_and_minus_f() -> None:
    np.testing.assert_array_equal(two_class_logits(np.array([[2.5], [-1.0]])), [[2.5, -2.5], [-1.0, 1.0]])


@pytest.mark.parametrize(
    ("logits", "bounds", "error"),
    [
        (np.zeros((1, 1)), np.ones((1, 1)), 0.0),
        (np.zeros((1, 2)), np.full((2, 2), np.nan), 0.0),
        (np.zeros((1, 2)), -np.ones((2, 2)), 0.0),
        (np.zeros((1, 2)), np.ones((2, 2)), np.inf),
        (np.zeros((1, 2)), np.ones((2, 2)), -1.0),
    ],
)
def test_bounds_that_are_no_bounds_are_refused(logits: np.ndarray, bounds: np.ndarray, error: float) -> None:
    with pytest.raises(ValueError, match=r"two classes|expected|finite"):
        certified_radius(logits, bounds, error)


def test_bounds_of_another_number_of_classes_are_refused() -> None:
    # The shapes in the annotations are checked under test, before the function's own check.
    with pytest.raises((ValueError, TypeError)):
        certified_radius(np.zeros((1, 2)), np.ones((3, 3)), 0.0)
