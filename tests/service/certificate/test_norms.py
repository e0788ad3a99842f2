"""Norm bounds against oracles: never below the true norm, and tight."""

from fractions import Fraction

import numpy as np
import pytest
from exact_matrices import exceeds_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from thorough import often

from service.certificate.norms import (
    absolute_norm_bound,
    pairwise_distance_bounds,
    row_norms_up,
    spectral_norm_bound,
)

matrices = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, max_side=7),
    elements=st.floats(-1e3, 1e3) | st.floats(-1e-3, 1e-3),
)


@settings(max_examples=often(75, 300), deadline=None)
@given(matrices)
def test_spectral_bound_is_never_below_the_norm_in_exact_arithmetic(matrix: np.ndarray) -> None:
    assert exceeds_norm(spectral_norm_bound(matrix), matrix)


@settings(max_examples=often(25, 100), deadline=None)
@given(matrices)
def test_the_exact_oracle_rejects_what_is_below_the_norm(matrix: np.ndarray) -> None:
    norm = float(np.linalg.norm(matrix, 2))
    if norm > 1e-150:
        assert not exceeds_norm(norm * (1 - 1e-9), matrix)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (30, 30), (200, 60), (60, 200), (300, 300)])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_spectral_bound_is_tight(shape: tuple[int, int], scale: float) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    true = float(np.linalg.norm(matrix, 2)) * scale
    assert true * (1 - 1e-12) <= spectral_norm_bound(matrix * scale) <= true * (1 + 1e-8)


def test_spectral_bound_of_an_orthogonal_matrix_in_float32_shows_its_rounding() -> None:
    orthogonal = np.linalg.qr(np.random.default_rng(1).standard_normal((128, 128)))[0]
    stored = orthogonal.astype(np.float32).astype(np.float64)
    bound = spectral_norm_bound(stored)
    assert np.linalg.norm(stored, 2) <= bound <= 1 + 1e-6


def test_power_iteration_is_not_a_bound_where_two_singular_values_are_close() -> None:
    # The reason for all this: 20 steps from a random start stay below the norm, the proved bound does not.
    rng = np.random.default_rng(2)
    matrix = np.diag(np.linspace(1.0, 0.98, 50))
    vector = rng.standard_normal(50)
    for _ in range(20):
        vector = matrix.T @ (matrix @ vector)
        vector /= np.linalg.norm(vector)
    assert np.linalg.norm(matrix @ vector) < 1.0 <= spectral_norm_bound(matrix)


@pytest.mark.parametrize("matrix", [np.zeros((3, 2)), np.full((3, 3), 5e-324), np.full((2, 2), 8e307)])
def test_spectral_bound_holds_at_the_ends_of_the_number_range(matrix: np.ndarray) -> None:
    assert exceeds_norm(spectral_norm_bound(matrix), matrix)


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        spectral_norm_bound(np.array([[1.0, np.nan]]))


@settings(max_examples=often(25, 100), deadline=None)
@given(matrices)
def test_absolute_bound_is_never_below_the_norm_of_absolute_values(matrix: np.ndarray) -> None:
    assert exceeds_norm(absolute_norm_bound(matrix), np.abs(matrix))


@settings(max_examples=often(25, 100), deadline=None)
@given(matrices)
def test_row_norms_and_pairwise_distances_are_never_below_the_exact_ones(matrix: np.ndarray) -> None:
    rows = np.vectorize(Fraction, otypes=[object])(matrix)
    norms, distances = row_norms_up(matrix), pairwise_distance_bounds(matrix)
    for i, row in enumerate(rows):
        assert Fraction(norms[i]) ** 2 >= (row**2).sum()
        for j, other in enumerate(rows):
            assert Fraction(distances[i, j]) ** 2 >= ((row - other) ** 2).sum()
