"""Norm bounds of convolutions against the matrix of the operator, and their tightness."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import often

from service.certificate.convolutions import (
    absolute_convolution_bound,
    convolution_norm_bound,
    convolve,
    transposed_convolve,
)
from service.certificate.torus import torus_norm_bound


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


@settings(max_examples=often(37, 150))
@given(convolutions())
def test_bound_is_never_below_the_norm_of_the_operator(case: tuple) -> None:
    kernel, size, strides, dilations, groups, _ = case
    matrix = operator(*case)
    bound = convolution_norm_bound(kernel, size, strides, dilations, groups)
    assert np.linalg.norm(matrix, 2) <= bound * (1 + 1e-12)
    assert np.linalg.norm(np.abs(matrix), 2) <= absolute_convolution_bound(kernel, groups) * (1 + 1e-12)


@settings(max_examples=often(15, 60))
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


def zero_padded_norm(kernel: np.ndarray, size: int, steps: int = 50) -> float:
    """A lower bound of the norm of the convolution with padding k // 2: Lanczos' method on torch's convolution."""
    weight, pad = torch.tensor(kernel), kernel.shape[-1] // 2
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn((1, kernel.shape[1], size, size), generator=generator, dtype=torch.float64)
    basis: list[torch.Tensor] = []
    images: list[torch.Tensor] = []
    for _ in range(steps):
        for _ in range(2):
            for other in basis:
                vector = vector - (vector * other).sum() * other
        basis.append(vector / vector.norm())
        image = torch.nn.functional.conv2d(basis[-1], weight, padding=pad)
        images.append(image.flatten())
        vector = torch.nn.functional.conv_transpose2d(image, weight, padding=pad)
    return float(torch.linalg.matrix_norm(torch.stack(images), 2))


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize(("channels", "size_k"), [(2, 3), (16, 3), (80, 3), (4, 5), (16, 5)])
def test_bound_is_within_a_hundredth_of_the_zero_padded_norm(channels: int, size_k: int, spread: float) -> None:
    # All-equal kernels have their largest symbol at one sharp peak, where a window counts most.
    kernel = 1.0 + spread * 3.0 * np.random.default_rng(3).standard_normal((channels, channels, size_k, size_k))
    bound = convolution_norm_bound(kernel, [32, 32], [1, 1], [1, 1], 1)
    true = zero_padded_norm(kernel, 32)
    assert true <= bound * (1 + 1e-12)
    assert bound <= 1.01 * true


@settings(max_examples=often(10, 40))
@given(convolutions())
def test_bound_of_a_window_is_never_below_the_norm_of_the_operator_with_all_its_results(case: tuple) -> None:
    kernel, size, _, dilations, groups, _ = case
    extent = [(k - 1) * d for k, d in zip(kernel.shape[2:], dilations, strict=True)]
    ones = [1] * len(size)
    matrix = operator(kernel, size, ones, dilations, groups, [(k, k) for k in extent])
    assert np.linalg.norm(matrix, 2) <= convolution_norm_bound(kernel, size, ones, dilations, groups) * (1 + 1e-12)


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
