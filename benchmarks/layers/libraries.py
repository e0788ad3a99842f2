"""Weights of deel-torchlip and orthogonium as modules for `constructions.Dense` and `constructions.Convolution`.

The only module here that needs these libraries (`benchmarks/libraries/requirements.txt`).
"""

from __future__ import annotations

import torch
from deel import torchlip
from orthogonium.layers import AdaptiveOrthoConv2d
from torch import Tensor, nn

from benchmarks.layers.constructions import Weight


class LibraryWeight(Weight):
    """The constrained `weight` of a library's layer; nothing else of that layer is used."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        """The weight as the library computes it in a forward pass."""
        return self.layer.weight

    def fold(self) -> Tensor:
        """The float32 numbers that the library computes: what its own export would write."""
        with torch.no_grad():
            return self.layer.weight.detach().clone().double()


def bjorck_matrix(out_features: int, in_features: int) -> LibraryWeight:
    """deel-torchlip: spectral normalisation by power iteration, then at most 15 iterations of Bjorck and Bowie."""
    return LibraryWeight(torchlip.SpectralLinear(in_features, out_features, bias=False))


def rko_kernel(out_channels: int, in_channels: int, kernel_size: int) -> LibraryWeight:
    """deel-torchlip: the kernel as a matrix made orthogonal, divided by its size (reshaped kernel, RKO)."""
    layer = torchlip.SpectralConv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return LibraryWeight(layer)


def aoc_kernel(out_channels: int, in_channels: int, kernel_size: int) -> LibraryWeight:
    """orthogonium: adaptive orthogonal convolution, products of orthogonal 1 x 2 and 2 x 1 kernels (BCOP)."""
    layer = AdaptiveOrthoConv2d(in_channels, out_channels, kernel_size, bias=False, padding_mode="zeros")
    return LibraryWeight(layer)
