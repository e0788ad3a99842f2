"""Resizing: a linear map inside its proved norm, its error and its adjoint."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.preprocessing import resize_map, triangle_filter

SIZES = st.integers(1, 24)


@given(SIZES, SIZES)
def test_filter_rows_are_averages(n_in: int, n_out: int) -> None:
    weights = triangle_filter(n_in, n_out)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-14)


@given(SIZES)
def test_filter_of_the_same_size_is_the_identity(n: int) -> None:
    np.testing.assert_array_equal(triangle_filter(n, n), np.eye(n))


@given(SIZES, SIZES, SIZES, SIZES)
def test_norm_is_bounded(height: int, width: int, to_height: int, to_width: int) -> None:
    resize = resize_map(height, width, to_height, to_width)
    true = np.linalg.norm(np.kron(resize.rows_AH, resize.columns_BW), 2)
    assert true * (1 - 1e-13) <= resize.norm <= true * (1 + 1e-6)


@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 2**32 - 1))
def test_adjoint_is_the_adjoint(height: int, width: int, to_height: int, to_width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    resize = resize_map(height, width, to_height, to_width)
    image = random.random((2, 3, height, width))
    gradient = random.normal(size=(2, 3, to_height, to_width))
    np.testing.assert_allclose(
        np.vdot(resize(image), gradient), np.vdot(image, resize.adjoint(gradient)), rtol=1e-9, atol=1e-12
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_rounding_error_is_bounded(height: int, width: int, to_height: int, to_width: int, seed: int) -> None:
    """Against exact rationals, of pixels v / 255 that the computation itself rounds."""
    levels = np.random.default_rng(seed).choice([0, 1, 254, 255, 85, 128], size=(height, width))
    resize = resize_map(height, width, to_height, to_width)
    rows = [[Fraction(weight) for weight in row] for row in resize.rows_AH]
    columns = [[Fraction(weight) for weight in row] for row in resize.columns_BW]
    pixels = [[Fraction(int(level), 255) for level in row] for row in levels]
    computed = resize((levels / 255)[None, None])[0, 0]
    squares = Fraction(0)
    for a in range(to_height):
        for b in range(to_width):
            exact = sum(rows[a][h] * pixels[h][w] * columns[b][w] for h in range(height) for w in range(width))
            squares += (Fraction(computed[a, b]) - min(exact, Fraction(1))) ** 2
    assert squares <= Fraction(resize.error_l2(channels=1)) ** 2
    assert resize.error_l2(channels=1) < 1e-13


def test_clipping_keeps_the_promise_of_the_model_about_its_input() -> None:
    resized = resize_map(50, 37, 28, 28)(np.ones((1, 1, 50, 37)))
    assert resized.max() <= 1.0
    np.testing.assert_allclose(resized, 1.0, rtol=1e-14)


@pytest.mark.parametrize("size", [(14, 14), (56, 41), (28, 300)])
def test_result_is_what_a_known_library_gives(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random(size).astype(np.float32)
    expected = np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR))
    resized = resize_map(*size, 28, 28)(image[None, None].astype(np.float64))[0, 0]
    np.testing.assert_allclose(resized, expected, atol=1e-5)


def test_maps_of_a_size_are_shared_and_read_only() -> None:
    resize = resize_map(9, 9, 4, 4)
    assert resize_map(9, 9, 4, 4) is resize
    assert not resize.rows_AH.flags.writeable
