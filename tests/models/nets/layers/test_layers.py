"""Every layer satisfies its stated constant, against singular values of dense Jacobians in float64."""

import collections
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import IMAGE, each_layer, offsets_of_channels, trained
from thorough import often

from models.nets.layers.base import Layer
from models.nets.layers.convolution import OrthogonalConv2d, Shift2d
from models.nets.layers.linear import OrthogonalDense, OrthogonalMatrix, UnitHead, cayley, newton_schulz
from models.nets.layers.pooling import L2Pool2d, ScaledAvgPool2d
from models.nets.layers.reshaping import Normalize, SpaceToDepth
from models.nets.layers.sorting import FullSort, GroupSort2

TOLERANCE = 1e-6
"""Relative excess that rounding of weights to float32 may cause."""


def jacobian(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Return the dense Jacobian at one point (batch axis of size 1), as a matrix."""
    full = torch.autograd.functional.jacobian(layer, x)
    assert isinstance(full, torch.Tensor)
    return full.reshape(-1, x.numel())


@each_layer
def test_layer_never_stretches_more_than_it_states(make: Callable[[], Layer], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = trained(make()).fold()
    for _ in range(3):
        x = torch.randn(1, *shape, dtype=torch.float64)
        stretch = torch.linalg.matrix_norm(jacobian(layer, x), 2).item()
        assert stretch <= layer.lipschitz_constant * (1 + TOLERANCE)


@each_layer
def test_distance_of_outputs_is_at_most_the_constant_times_that_of_inputs(
    make: Callable[[], Layer], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    layer = trained(make()).fold()
    x, y = torch.randn(2, 50, *shape, dtype=torch.float64)
    moved = torch.linalg.vector_norm((layer(x) - layer(y)).flatten(1), dim=1)
    apart = torch.linalg.vector_norm((x - y).flatten(1), dim=1)
    assert (moved <= layer.lipschitz_constant * (1 + TOLERANCE) * apart).all()


@each_layer
def test_folding_changes_no_output_beyond_float32_rounding(make: Callable[[], Layer], shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    layer = trained(make())
    x = torch.randn(5, *shape)
    torch.testing.assert_close(layer.fold()(x.double()).float(), layer(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: OrthogonalDense(12, 7), (12,)),
        (GroupSort2, (8,)),
        (FullSort, (9,)),
        (lambda: SpaceToDepth(2), IMAGE),
        (lambda: Shift2d(2), IMAGE),
        (lambda: L2Pool2d(2), IMAGE),
        (lambda: ScaledAvgPool2d(3), IMAGE),
        (lambda: Normalize([0.0] * 4, [0.5, 0.25, 2.0, 1.0]), IMAGE),
    ],
)
def test_stated_constant_is_attained(make: Callable[[], Layer], shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    layer = make().fold()
    stretch = torch.linalg.matrix_norm(jacobian(layer, torch.randn(1, *shape, dtype=torch.float64)), 2).item()
    assert stretch >= layer.lipschitz_constant * (1 - TOLERANCE)


@settings(max_examples=often(10, 40), deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    seed=st.integers(0, 10),
)
def test_cayley_of_any_matrix_is_orthogonal(rows: int, columns: int, scale: float, seed: int) -> None:
    raw = scale * torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    singular_values = torch.linalg.svdvals(cayley(raw))
    torch.testing.assert_close(singular_values, torch.ones_like(singular_values), atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_newton_schulz_finds_the_polar_factor(shape: tuple[int, int]) -> None:
    torch.manual_seed(4)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    disturbed = U @ torch.diag(torch.linspace(0.7, 1.3, min(shape), dtype=torch.float64)) @ Vh
    torch.testing.assert_close(newton_schulz(disturbed, 8), U @ Vh, atol=1e-12, rtol=0)


def test_head_rows_have_unit_norm() -> None:
    torch.manual_seed(7)
    head = trained(UnitHead(30, 10))
    rows = head.fold().state_dict()["weight_OD"]
    torch.testing.assert_close(
        torch.linalg.vector_norm(rows, dim=1), torch.ones(10, dtype=torch.float64), atol=1e-7, rtol=0
    )


def test_shift_moves_each_group_by_its_own_offset_and_fills_with_zero() -> None:
    x = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3).expand(1, 18, 3, 3).contiguous()
    layer = Shift2d(3)
    y, offsets = layer(x), offsets_of_channels(layer, 18)
    assert sorted(offsets) == sorted([*itertools.product((-1, 0, 1), repeat=2)] * 2)
    assert all(one != other for one, other in zip(offsets[:9], offsets[9:], strict=True))
    for channel, (dy, dx) in enumerate(offsets):
        for i, j in itertools.product(range(3), repeat=2):
            inside = 0 <= i - dy < 3 and 0 <= j - dx < 3
            assert y[0, channel, i, j] == (x[0, channel, i - dy, j - dx] if inside else 0.0)


def test_convolution_is_a_zero_padded_convolution_with_its_shifted_kernel() -> None:
    torch.manual_seed(8)
    layer = OrthogonalConv2d(9, 5).double()
    x = torch.randn(2, 9, 6, 5, dtype=torch.float64)
    kernel = torch.zeros(5, 9, 3, 3, dtype=torch.float64)
    for channel, (dy, dx) in enumerate(offsets_of_channels(layer.shift, 9)):
        # Correlation reads x[i + k - 1]; the shift reads x[i - d], so tap k belongs to d = 1 - k.
        kernel[:, channel, 1 - dy, 1 - dx] = layer.matrix().detach()[:, channel]
    expected = torch.nn.functional.conv2d(x, kernel, layer.bias_O, padding=1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("channels", [1, 2, 4, 12, 27, 64, 128])
def test_every_channel_is_in_one_run_and_all_offsets_have_as_many(channels: int) -> None:
    runs = [run for half in Shift2d(3).halves(channels) for run in half]
    assert [c for run in runs for c in range(run.channels.start, run.channels.stop)] == [*range(channels)]
    share = collections.Counter(offsets_of_channels(Shift2d(3), channels))
    assert max(share.values()) - min(share.get(at, 0) for at in Shift2d(3).offsets) <= 2


def test_space_to_depth_has_the_pixels_of_pixel_unshuffle_in_the_order_of_onnx() -> None:
    x = torch.randn(2, 3, 6, 4)
    window_first = torch.nn.PixelUnshuffle(2)(x).reshape(2, 3, 4, 3, 2).transpose(1, 2).reshape(2, 12, 3, 2)
    assert torch.equal(SpaceToDepth(2)(x), window_first)


def test_pooling_matches_its_definition() -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = 3 * torch.nn.functional.avg_pool2d(x, 3)
    torch.testing.assert_close(ScaledAvgPool2d(3)(x), expected)
    torch.testing.assert_close(L2Pool2d(3)(x), torch.nn.functional.lp_pool2d(x, 2, 3))


def test_gradient_of_l2_pooling_is_finite_at_an_empty_window() -> None:
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    L2Pool2d(2)(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("layer", [L2Pool2d(2), ScaledAvgPool2d(2), SpaceToDepth(2)])
def test_incomplete_windows_are_refused(layer: Layer) -> None:
    with pytest.raises(ValueError, match="pad or crop"):
        layer(torch.zeros(1, 1, 5, 4))


def test_group_sort_refuses_an_odd_number_of_channels() -> None:
    with pytest.raises(ValueError, match="even"):
        GroupSort2()(torch.zeros(1, 3))


@pytest.mark.parametrize("std", [[0.0], [1.0, 1.0]])
def test_normalize_without_a_constant_is_refused(std: list[float]) -> None:
    with pytest.raises(ValueError, match="std"):
        Normalize([0.0], std)


@each_layer
def test_gradient_is_that_of_finite_differences(make: Callable[[], Layer], shape: tuple[int, ...]) -> None:
    torch.manual_seed(11)
    layer = trained(make()).double()
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    # Along random directions: of all entries of the Jacobian it takes minutes.
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_cayley_stays_orthogonal_under_autocast() -> None:
    matrix = OrthogonalMatrix(16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        W = matrix()
    torch.testing.assert_close(W @ W.T, torch.eye(16), atol=1e-5, rtol=0)
