"""Networks of deel-torchlip that the certifier is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from deel import torchlip
from forms import (
    GREY,
    ITERATIONS,
    NEWER,
    OLDER,
    PIXELS_TOO_OFTEN,
    TORCHLIP,
    Form,
    Network,
    Shape,
    as_it_is,
    jointly,
    per_logit,
)
from torch import nn

EVERY_OPSET = (Form("script", 13), Form("script", 16), OLDER, NEWER, *(Form("dynamo", n) for n in (20, 23, 24)))
DOUBLE = (Form("dynamo", 20, "float64"), Form("script", 13, "float64"))


def _torchlip_cnn(
    padding: str, pool: Callable[[], nn.Module], width: int = 16, head: nn.Module | None = None
) -> nn.Module:
    """Two 3 x 3 convolutions with pools and two dense layers, as in the library's notebooks."""
    return torchlip.Sequential(
        torchlip.SpectralConv2d(1, width, 3, padding=1, padding_mode=padding),
        torchlip.GroupSort2(),
        pool(),
        torchlip.SpectralConv2d(width, 2 * width, 3, padding=1, padding_mode=padding),
        torchlip.GroupSort2(),
        pool(),
        nn.Flatten(),
        torchlip.SpectralLinear(2 * width * 49, 64),
        torchlip.GroupSort2(),
        head or torchlip.SpectralLinear(64, 10),
    )


def torchlip_dense(
    activation: Callable[[int], nn.Module], factor: int = 1, pixels: int = 784, width: int = 64
) -> nn.Module:
    """Two hidden layers; the activation makes `factor` values of one."""
    return torchlip.Sequential(
        nn.Flatten(),
        torchlip.SpectralLinear(pixels, width),
        activation(width),
        torchlip.SpectralLinear(factor * width, width // 2),
        activation(width // 2),
        torchlip.SpectralLinear(factor * width // 2, 10),
    )


def one_convolution(padding: str, size: int) -> nn.Module:
    """Return a convolution with orthonormal columns: its norm is that of the patches, over `size`."""
    return torchlip.Sequential(
        torchlip.SpectralConv2d(1, size * size, size, padding=size // 2, padding_mode=padding), nn.Flatten()
    )


def dense_stack(
    sizes: Sequence[int],
    activation: Callable[[], nn.Module],
    head: Callable[[], nn.Module] | None = None,
    **options: float,
) -> nn.Module:
    """Return SpectralLinear layers of these sizes, each followed by an activation, and a head of ten logits.

    Args:
        sizes: of the image and of the hidden layers.
        activation: of each hidden layer.
        head: made last, as the order decides the random weights; default: SpectralLinear.
        options: of `torchlip.Sequential`.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [torchlip.SpectralLinear(inputs, outputs), activation()]
    return torchlip.Sequential(*layers, head() if head else torchlip.SpectralLinear(sizes[-1], 10), **options)


class ResidualStep(nn.Module):
    """`a x + (1 - a) f(x)` with deel-torchlip's LipResidual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = torchlip.SpectralConv2d(channels, channels, 3, padding=1)
        self.activation = torchlip.GroupSort2()
        self.residual = torchlip.LipResidual()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual(x, self.activation(self.convolution(x)))


def unit_rows(columns: int, k: int = 10) -> nn.Module:
    """deel-torchlip's head with rows of norm 1."""
    return torchlip.FrobeniusLinear(columns, k, disjoint_neurons=True)


def network(
    name: str,
    layers: str,
    build: Callable[[], nn.Module],
    shape: Shape = GREY,
    make: Callable[..., Network] = jointly,
    **options: Any,
) -> Network:
    """Return a network of this library; arguments as of `jointly`.

    Args:
        name: of the network.
        layers: description in one line.
        build: of the module.
        shape: of the image.
        make: `jointly`, or `per_logit` for a head with rows of norm 1.
        options: of `make`.
    """
    return make(name, TORCHLIP, layers, build, shape, **options)


NETWORKS: list[Network] = [
    network(
        "mnist-0-8",
        "dense 128-64-32-1, FullSort",
        lambda: dense_stack((784, 128, 64, 32), torchlip.FullSort, lambda: torchlip.FrobeniusLinear(32, 1)),
        outputs=1,
    ),
    network(
        "dense-groupsort2",
        "dense 128-64, GroupSort2, head with rows of norm 1",
        lambda: dense_stack((784, 128, 64), torchlip.GroupSort2, lambda: unit_rows(64)),
        make=per_logit,
    ),
    network(
        "dense-groupsort4",
        "dense 64-64, GroupSort(4), coefficient 2 for the whole network",
        lambda: dense_stack((784, 64, 64), lambda: torchlip.GroupSort(4), k_coef_lip=2.0),
        claim=2.0,
    ),
    network("dense-maxmin", "dense 64-32, MaxMin", lambda: torchlip_dense(lambda _: torchlip.MaxMin(), 2), GREY),
    network("dense-lprelu", "dense 64-32, LPReLU", lambda: torchlip_dense(torchlip.LPReLU)),
    network("dense-householder", "dense 64-32, HouseHolder", lambda: torchlip_dense(torchlip.HouseHolder), GREY),
    network(
        "dense-parametrised",
        "dense 64-32, FullSort, exported without vanilla_export",
        lambda: torchlip_dense(lambda _: torchlip.FullSort()),
        freeze=as_it_is,
    ),
    network(
        "every-opset",
        "convolution 3 x 3 circular, average and L2 pool, FullSort",
        lambda: torchlip.Sequential(
            torchlip.SpectralConv2d(1, 8, 3, padding=1, padding_mode="circular"),
            torchlip.GroupSort2(),
            torchlip.ScaledAvgPool2d(2),
            torchlip.ScaledL2NormPool2d(2),
            nn.Flatten(),
            torchlip.SpectralLinear(8 * 49, 32),
            torchlip.FullSort(),
            torchlip.SpectralLinear(32, 10),
        ),
        forms=(*EVERY_OPSET, DOUBLE[0], Form("dynamo", 20, one_file=False)),
    ),
    network(
        "dense-float64",
        "dense 64-32, GroupSort(8), float64",
        lambda: torchlip_dense(lambda _: torchlip.GroupSort(8)),
        forms=DOUBLE,
    ),
    *[
        network(
            f"cnn-{padding}-{pool}",
            f"two convolutions 3 x 3, padding {padding}, {layer.__name__}, two dense layers",
            lambda padding=padding, layer=layer: _torchlip_cnn(padding, lambda: layer(2)),
            holds=padding != "reflect",
            why=PIXELS_TOO_OFTEN if padding == "reflect" else ITERATIONS,
        )
        for padding in ("zeros", "circular", "replicate", "symmetric", "reflect")
        for pool, layer in (("l2", torchlip.ScaledL2NormPool2d), ("average", torchlip.ScaledAvgPool2d))
        if pool == "l2" or padding in ("zeros", "reflect")
    ],
    network(
        "cnn-unit-rows",
        "two convolutions 3 x 3, ScaledL2NormPool2d, head with rows of norm 1",
        lambda: _torchlip_cnn("zeros", lambda: torchlip.ScaledL2NormPool2d(2), head=unit_rows(64)),
        make=per_logit,
    ),
    *[
        network(
            f"layer-{padding}-{size}x{size}",
            f"one convolution {size} x {size} of {size * size} channels, padding {padding}, on 6 x 6",
            lambda padding=padding, size=size: one_convolution(padding, size),
            (1, 6, 6),
            holds=holds,
            why=ITERATIONS if holds else PIXELS_TOO_OFTEN,
            steps=0,
        )
        for padding, size, holds in (
            ("zeros", 3, True),
            ("circular", 3, True),
            ("replicate", 3, True),
            ("symmetric", 5, True),
            ("reflect", 3, False),
            ("reflect", 5, False),
            ("replicate", 5, False),
        )
    ],
    network(
        "invertible-downsampling",
        "convolutions, InvertibleDownSampling, InvertibleUpSampling, head with rows of norm 1",
        lambda: torchlip.Sequential(
            torchlip.SpectralConv2d(1, 8, 3, padding=1),
            torchlip.GroupSort2(),
            torchlip.InvertibleDownSampling(2),
            torchlip.SpectralConv2d(32, 32, 3, padding=1),
            torchlip.GroupSort2(),
            torchlip.InvertibleDownSampling(2),
            torchlip.SpectralConv2d(128, 32, 1),
            torchlip.GroupSort2(),
            torchlip.InvertibleUpSampling(2),
            nn.Flatten(),
            torchlip.SpectralLinear(8 * 196, 64),
            torchlip.GroupSort2(),
            unit_rows(64),
        ),
        make=per_logit,
    ),
    network(
        "adaptive-pools",
        "convolutions 5 x 5 with stride 2 and 3 x 3, ScaledAdaptiveAvgPool2d, head with rows of norm 1",
        lambda: torchlip.Sequential(
            torchlip.SpectralConv2d(1, 16, 5, stride=2, padding=2),
            torchlip.GroupSort2(),
            torchlip.SpectralConv2d(16, 64, 3, padding=1),
            torchlip.GroupSort2(),
            torchlip.ScaledAdaptiveAvgPool2d((1, 1)),
            nn.Flatten(),
            unit_rows(64),
        ),
        make=per_logit,
    ),
    network(
        "centering",
        "convolutions, BatchCentering, LayerCentering, ScaledL2NormPool2d",
        lambda: nn.Sequential(
            torchlip.SpectralConv2d(1, 16, 3, padding=1),
            torchlip.LayerCentering(16),
            torchlip.GroupSort2(),
            torchlip.ScaledL2NormPool2d(2),
            torchlip.SpectralConv2d(16, 16, 3, padding=1),
            torchlip.BatchCentering(16),
            torchlip.GroupSort2(),
            nn.Flatten(),
            torchlip.SpectralLinear(16 * 196, 10),
        ),
    ),
    network(
        "residual",
        "LipResidual on convolutions, ScaledL2NormPool2d",
        lambda: nn.Sequential(
            torchlip.SpectralConv2d(1, 16, 3, padding=1),
            torchlip.GroupSort2(),
            ResidualStep(16),
            torchlip.ScaledL2NormPool2d(2),
            ResidualStep(16),
            nn.Flatten(),
            torchlip.SpectralLinear(16 * 196, 10),
        ),
    ),
    network(
        "transposed",
        "SpectralConvTranspose2d with stride 2, FrobeniusConv2d, ScaledAvgPool2d",
        lambda: torchlip.Sequential(
            torchlip.SpectralConv2d(1, 16, 3, stride=2, padding=1),
            torchlip.GroupSort2(),
            torchlip.SpectralConvTranspose2d(16, 8, 2, stride=2),
            torchlip.GroupSort2(),
            torchlip.FrobeniusConv2d(8, 4, 3, padding=1),
            torchlip.ScaledAvgPool2d(2),
            nn.Flatten(),
            torchlip.SpectralLinear(4 * 196, 10),
        ),
    ),
]
