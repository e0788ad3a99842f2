"""Norm bounds of convolutions against the matrix of the operator, and their tightness."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.certificate.convolutions import (
    absolute_convolution_bound,
    convolution_norm_bound,
    convolve,
    torus_norm_bound,
    transposed_convolve,
)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[np.ndarray, list[int], list[int], list[int], int, list[tuple[int, int]]]:
    """Kernel, image size, strides, dilations, groups, pads."""
    axes = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel_size = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    strides = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    dilations = draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes))
    size = [(k - 1) * d + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel_size, dilations, strict=True)]
    pads = [(draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in size]
    channels_in, channels_out = draw(st.integers(1, 3)), draw(st.integers(1, 3)) * groups
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.standard_normal((channels_out, channels_in, *kernel_size)), size, strides, dilations, groups, pads


def operator(kernel: np.ndarray, size: list[int], strides, dilations, groups: int, pads) -> np.ndarray:
    """The convolution as a matrix, one column for each pixel."""
    shape = (kernel.shape[1] * groups, *size)
    columns = [
        convolve(np.pad(unit.reshape(1, *shape), [(0, 0), (0, 0), *pads]), kernel, strides, dilations, groups).ravel()
        for unit in np.eye(int(np.prod(shape)))
    ]
    return np.array(columns).T


@settings(max_examples=150)
@given(convolutions())
def test_bound_is_never_below_the_norm_of_the_operator(case: tuple) -> None:
    kernel, size, strides, dilations, groups, _ = case
    matrix = operator(*case)
    bound = convolution_norm_bound(kernel, size, strides, dilations, groups)
    assert np.linalg.norm(matrix, 2) <= bound * (1 + 1e-12)
    assert np.linalg.norm(np.abs(matrix), 2) <= absolute_convolution_bound(kernel, groups) * (1 + 1e-12)


@settings(max_examples=60)
@given(convolutions())
def test_transposed_convolution_is_the_adjoint(case: tuple) -> None:
    kernel, size, strides, dilations, groups, _ = case
    rng = np.random.default_rng(0)
    result = convolve(rng.standard_normal((1, kernel.shape[1] * groups, *size)), kernel, strides, dilations, groups)
    back = transposed_convolve(result, kernel, strides, dilations, groups)
    x = rng.standard_normal(back.shape)
    forward = convolve(x, kernel, strides, dilations, groups)
    assert np.vdot(forward, result) == pytest.approx(np.vdot(x, back), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("channels", [(3, 16), (16, 3), (24, 24)])
def test_bound_is_tight_on_the_torus(channels: tuple[int, int]) -> None:
    kernel = np.random.default_rng(1).standard_normal((*channels, 3, 3))
    symbols = np.fft.fft2(kernel, (18, 18)).transpose(2, 3, 0, 1)
    true = float(np.linalg.norm(symbols, 2, axis=(2, 3)).max())
    assert true * (1 - 1e-12) <= torus_norm_bound(kernel, (18, 18)) <= true * 1.01


def test_the_torus_of_the_images_own_size_would_be_no_bound() -> None:
    # Two taps two apart wrap onto each other on a torus of two points, where they cancel.
    kernel = np.array([[[1.0, 0.0, -1.0]]])
    matrix = operator(kernel, [2], [1], [1], 1, [(2, 2)])
    assert torus_norm_bound(kernel, [2]) < 1e-6 < np.linalg.norm(matrix, 2)
    assert convolution_norm_bound(kernel, [2], [1], [1], 1) >= np.linalg.norm(matrix, 2)


@pytest.mark.parametrize("scale", [0.0, 1e-180, 1e180])
def test_bound_holds_at_the_ends_of_the_number_range(scale: float) -> None:
    kernel = scale * np.random.default_rng(2).standard_normal((2, 2, 3))
    matrix = operator(kernel, [5], [1], [1], 1, [(1, 1)])
    assert np.linalg.norm(matrix / (scale or 1.0), 2) * scale <= convolution_norm_bound(kernel, [5], [1], [1], 1)
