"""From the image that was sent to the model's: against the map in exact rationals, its norm, its error, its adjoint."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from exact_matrices import exceeds_norm
from exact_preprocessing import exact_conversion, exact_filter, exact_map
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from thorough import often

from service.pixels.preprocessing import conversion_between, preprocessing_between, triangle_filter

SIZES = st.integers(1, 24)
SMALL = st.integers(1, 5)
CHANNELS = st.sampled_from([(1, 1), (3, 3), (2, 2), (3, 1), (1, 3)])
SEEDS = st.integers(0, 2**32 - 1)
HALF = Fraction(1, 2)


@given(SIZES, SIZES)
def test_the_exact_filter_averages(n_in: int, n_out: int) -> None:
    assert (exact_filter(n_in, n_out).sum(axis=1) == 1).all()


@given(SIZES, SIZES)
def test_every_entry_of_the_filter_is_the_float_nearest_to_the_exact_one(n_in: int, n_out: int) -> None:
    exact = exact_filter(n_in, n_out)
    nearest = np.array([[weight.numerator / weight.denominator for weight in row] for row in exact])
    np.testing.assert_array_equal(triangle_filter(n_in, n_out), nearest)


@pytest.mark.parametrize(("n_in", "n_out"), [(4096, 28), (28, 1000), (4095, 224), (8191, 3)])
def test_entries_of_large_filters_are_the_floats_nearest_to_the_exact_ones(n_in: int, n_out: int) -> None:
    weights = triangle_filter(n_in, n_out)
    random = np.random.default_rng(0)
    scale, width = Fraction(n_in, n_out), max(Fraction(n_in, n_out), Fraction(1))
    for j in [0, n_out - 1, int(random.integers(n_out))]:
        row = [max(Fraction(0), 1 - abs((j + HALF) * scale - (k + HALF)) / width) for k in range(n_in)]
        total = sum(row)
        assert weights[j].tolist() == [float(weight / total) for weight in row]


@given(SIZES)
def test_filter_of_the_same_size_is_the_identity(n: int) -> None:
    np.testing.assert_array_equal(triangle_filter(n, n), np.eye(n))


@pytest.mark.parametrize(("n_in", "n_out"), [(0, 3), (3, 0), (8193, 3), (3, 8193)])
def test_sides_that_are_too_long_are_refused(n_in: int, n_out: int) -> None:
    with pytest.raises(ValueError, match="pixels"):
        triangle_filter(n_in, n_out)


@settings(max_examples=often(10, 40), deadline=None)
@given(CHANNELS, SMALL, SMALL, st.integers(1, 3), st.integers(1, 3))
def test_norm_is_not_below_that_of_the_exact_map(
    channels: tuple[int, int], height: int, width: int, to_height: int, to_width: int
) -> None:
    sent, taken = (channels[0], height, width), (channels[1], to_height, to_width)
    assert exceeds_norm(preprocessing_between(sent, taken).norm, exact_map(sent, taken).T)


@given(CHANNELS, SIZES, SIZES, SIZES, SIZES)
def test_norm_is_tight(channels: tuple[int, int], height: int, width: int, to_height: int, to_width: int) -> None:
    mapping = preprocessing_between((channels[0], height, width), (channels[1], to_height, to_width))
    true = np.linalg.norm(exact_conversion(*channels).astype(float), 2)
    for n_in, n_out in ((height, to_height), (width, to_width)):
        true *= np.linalg.norm(triangle_filter(n_in, n_out), 2)
    assert true * (1 - 1e-13) <= mapping.norm <= true * (1 + 1e-6)


def test_norms_of_the_conversions_are_the_closed_forms_rounded_up() -> None:
    to_grey = Fraction(preprocessing_between((3, 4, 5), (1, 4, 5)).norm)
    to_rgb = Fraction(preprocessing_between((1, 4, 5), (3, 4, 5)).norm)
    exact = Fraction("0.299") ** 2 + Fraction("0.587") ** 2 + Fraction("0.114") ** 2
    assert exact <= to_grey**2 <= exact * (1 + Fraction(1, 10**15))
    assert 3 <= to_rgb**2 <= 3 * (1 + Fraction(1, 10**15))


@given(CHANNELS, SIZES, SIZES, SIZES, SIZES, SEEDS)
def test_adjoint_is_the_adjoint(
    channels: tuple[int, int], height: int, width: int, to_height: int, to_width: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    mapping = preprocessing_between((channels[0], height, width), (channels[1], to_height, to_width))
    image = random.random((2, channels[0], height, width))
    gradient = random.normal(size=(2, channels[1], to_height, to_width))
    np.testing.assert_allclose(
        np.vdot(mapping(image), gradient), np.vdot(image, mapping.adjoint(gradient)), rtol=1e-9, atol=1e-12
    )


@settings(max_examples=often(15, 60), deadline=None)
@given(CHANNELS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), SEEDS, st.booleans())
def test_rounding_error_is_bounded(
    channels: tuple[int, int],
    height: int,
    width: int,
    to_height: int,
    to_width: int,
    seed: int,
    eight_bit: bool,
) -> None:
    """Against the exact map of the exact image: pixels v / 255, which are rounded too, or float64, some tiny."""
    random = np.random.default_rng(seed)
    sent, taken = (channels[0], height, width), (channels[1], to_height, to_width)
    if eight_bit:
        levels = random.choice([0, 1, 254, 255, 85, 128], size=sent)
        image, exact = levels / 255, [Fraction(int(level), 255) for level in levels.ravel()]
    else:
        image = random.random(sent) * random.choice([1.0, 1e-310, 1e-17], size=sent)
        exact = [Fraction(value) for value in image.ravel().tolist()]
    mapping = preprocessing_between(sent, taken)
    computed = [Fraction(value) for value in mapping(image[None])[0].ravel().tolist()]
    result = exact_map(sent, taken) @ np.array(exact, dtype=object)
    assert all(0 <= value <= 1 for value in result)
    errors = [abs(a - b) for a, b in zip(computed, result, strict=True)]
    assert max(errors) <= Fraction(mapping.pixel_error)
    assert sum(error * error for error in errors) <= Fraction(mapping.error_l2) ** 2
    assert mapping.error_l2 < 1e-13


@given(CHANNELS, SIZES, SIZES, SIZES, SIZES)
def test_error_of_the_image_is_that_of_each_of_its_pixels(
    channels: tuple[int, int], height: int, width: int, to_height: int, to_width: int
) -> None:
    mapping = preprocessing_between((channels[0], height, width), (channels[1], to_height, to_width))
    pixels = channels[1] * to_height * to_width
    assert Fraction(mapping.error_l2) ** 2 >= pixels * Fraction(mapping.pixel_error) ** 2


def test_clipping_keeps_the_promise_of_the_model_about_its_input() -> None:
    for channels in (1, 3):
        resized = preprocessing_between((channels, 50, 37), (1, 28, 28))(np.ones((1, channels, 50, 37)))
        assert resized.max() <= 1.0
        np.testing.assert_allclose(resized, 1.0, rtol=1e-14)


@pytest.mark.parametrize("size", [(14, 14), (56, 41), (28, 300)])
def test_resize_is_what_a_known_library_gives(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random(size).astype(np.float32)
    expected = np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR))
    resized = preprocessing_between((1, *size), (1, 28, 28))(image[None, None].astype(np.float64))[0, 0]
    np.testing.assert_allclose(resized, expected, atol=1e-5)


def test_grey_is_what_a_known_library_gives_up_to_its_rounding_to_8_bits() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(levels).convert("L"))
    grey = preprocessing_between((3, 16, 16), (1, 16, 16))(np.moveaxis(levels, -1, 0)[None] / 255)[0, 0]
    assert np.abs(255 * grey - expected).max() <= 0.51


def test_grey_to_rgb_is_three_copies_to_the_last_bit() -> None:
    image = np.random.default_rng(0).random((2, 1, 4, 5))
    np.testing.assert_array_equal(preprocessing_between((1, 4, 5), (3, 4, 5))(image), np.repeat(image, 3, axis=1))


@pytest.mark.parametrize(("sent", "taken"), [(1, 2), (2, 1), (3, 4), (4, 3), (2, 3), (4, 1)])
def test_other_channels_have_no_conversion(sent: int, taken: int) -> None:
    with pytest.raises(ValueError, match=f"no conversion of {sent} channels to {taken}"):
        conversion_between(sent, taken)
    with pytest.raises(ValueError, match="no conversion"):
        preprocessing_between((sent, 4, 5), (taken, 4, 5))


def test_maps_of_a_shape_are_shared_and_read_only() -> None:
    mapping = preprocessing_between((1, 9, 9), (1, 4, 4))
    assert preprocessing_between((1, 9, 9), (1, 4, 4)) is mapping
    assert mapping.rows_AH is not None
    assert not mapping.rows_AH.flags.writeable
