"""Gradients of sorts and shifts, bit for bit those of the definition, in every format and layout."""

from __future__ import annotations

import pytest
import torch
from layer_cases import offsets_of_channels

from models.nets.layers.convolution import Shift2d
from models.nets.layers.sorting import GroupSort2

FORMATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


def gradients(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    special = torch.randn(shape, dtype=dtype)
    special.flatten()[:4] = torch.tensor([float("inf"), -0.0, float("nan"), 0.0], dtype=dtype)
    last = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
    return [special, last, torch.ones(1, dtype=dtype).expand(shape)]


@FORMATS
def test_the_gradient_of_a_sort_is_exchanged_where_the_numbers_were(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, 4, 5, dtype=dtype, requires_grad=True)
    a, b = x.detach().chunk(2, dim=1)
    y = GroupSort2()(x)
    assert torch.equal(y, torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1))
    for gradient in gradients((3, 8, 4, 5), dtype):
        upper, lower = gradient.chunk(2, dim=1)
        expected = torch.cat([torch.where(a >= b, upper, lower), torch.where(a >= b, lower, upper)], dim=1)
        (found,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [(5, 4), (1, 3), (2, 1), (1, 1)])
@pytest.mark.parametrize("window", [2, 3])
def test_a_shift_fills_what_it_leaves_with_zeros(window: int, size: tuple[int, int]) -> None:
    x = torch.rand(2, 20, *size)
    wide = torch.nn.functional.pad(x, (1, 1, 1, 1))
    layer = Shift2d(3 if window == 3 else 2)
    for _ in range(3):
        # Memory that is taken again holds other numbers.
        torch.full_like(x, float("nan"))
        y = layer(x)
        for channel, (dy, dx) in enumerate(offsets_of_channels(layer, 20)):
            moved = wide[:, channel, 1 - dy : 1 - dy + size[0], 1 - dx : 1 - dx + size[1]]
            assert torch.equal(y[:, channel], moved)
