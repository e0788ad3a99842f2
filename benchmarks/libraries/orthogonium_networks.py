"""Networks of orthogonium that the certifier is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forms import (
    COLOUR,
    GREY,
    ORTHOGONIUM,
    Network,
    Shape,
    jointly,
    per_logit,
    vanilla_and_kernels,
    without_parametrisations,
)
from orthogonium.layers import (
    Abs,
    AdaptiveOrthoConv2d,
    AdaptiveOrthoConvTranspose2d,
    ChannelShuffle,
    HouseHolder,
    HouseHolder_Order_2,
    MaxMin,
    OrthoLinear,
    UnitNormLinear,
)
from orthogonium.layers.conv.AOL import AOLConv2D, AOLConvTranspose2D
from orthogonium.layers.conv.SLL import (
    AOCLipschitzResBlock,
    SDPBasedLipschitzDense,
    SDPBasedLipschitzResBlock,
    SLLxAOCLipschitzResBlock,
)
from orthogonium.layers.custom_activations import SoftHuber
from orthogonium.layers.normalization import BatchCentering2D, LayerCentering2D
from orthogonium.layers.residual import AdditiveResidual, ConcatResidual, L2NormResidual, PrescaledAdditiveResidual
from orthogonium.model_factory.classparam import ClassParam
from orthogonium.model_factory.models_factory import ConvMixerInspired, PatchBasedCNN, StagedCNN
from torch import nn


def _aoc_cnn(padding: str, activation: Callable[[int], nn.Module] = lambda _: MaxMin(), width: int = 16) -> nn.Module:
    """Orthogonal convolutions: 3 x 3, 4 x 4 with stride 2, 3 x 3, 2 x 2 with stride 2."""
    return nn.Sequential(
        AdaptiveOrthoConv2d(3, width, 3, padding_mode=padding, padding=1),
        activation(width),
        AdaptiveOrthoConv2d(width, 2 * width, 4, stride=2, padding=1, padding_mode=padding),
        activation(2 * width),
        AdaptiveOrthoConv2d(2 * width, 2 * width, 3, padding=1, padding_mode=padding),
        activation(2 * width),
        AdaptiveOrthoConv2d(2 * width, 2 * width, 2, stride=2, padding=0, padding_mode=padding),
        activation(2 * width),
        nn.Flatten(),
        OrthoLinear(2 * width * 64, 64),
        MaxMin(),
        OrthoLinear(64, 10),
    )


def between_orthogonal(*blocks: nn.Module, width: int = 16) -> nn.Module:
    """Blocks on `width` channels of 16 x 16, between an orthogonal 2 x 2 convolution and an orthogonal matrix."""
    return nn.Sequential(
        AdaptiveOrthoConv2d(3, width, 2, stride=2, padding=0), *blocks, nn.Flatten(), OrthoLinear(width * 256, 10)
    )


def maxmin_after_each(*layers: nn.Module, features: int) -> nn.Module:
    """Return the layers, each followed by MaxMin, and an orthogonal head of ten logits."""
    sorting = [part for layer in layers for part in (layer, MaxMin())]
    return nn.Sequential(*sorting, nn.Flatten(), OrthoLinear(features, 10))


def sll_blocks() -> nn.Module:
    """Return two SLL blocks between orthogonal layers."""
    return between_orthogonal(SDPBasedLipschitzResBlock(16, 2.0, 3), SDPBasedLipschitzResBlock(16, 1.0, 3))


def sll_dense(width: int, *hidden: int) -> nn.Module:
    """Return dense SLL blocks with these inner widths between orthogonal matrices."""
    layers: list[nn.Module] = [nn.Flatten(), OrthoLinear(784, width)]
    layers += [SDPBasedLipschitzDense(width, width, inner) for inner in hidden]
    return nn.Sequential(*layers, OrthoLinear(width, 10))


def aoc_and_maxmin(channels: int) -> nn.Module:
    """One branch of a residual block."""
    return nn.Sequential(AdaptiveOrthoConv2d(channels, channels, 3, padding=1), MaxMin())


def network(name: str, layers: str, build: Callable[[], nn.Module], shape: Shape = COLOUR, **options: Any) -> Network:
    """Return a network of this library; arguments as of `jointly`.

    Args:
        name: of the network.
        layers: description in one line.
        build: of the module.
        shape: of the image.
        options: of `jointly`.
    """
    return jointly(name, ORTHOGONIUM, layers, build, shape, **options)


NETWORKS: list[Network] = [
    *[
        network(f"aoc-{padding}", f"AOC, padding {padding}, MaxMin", lambda p=padding: _aoc_cnn(p))
        for padding in ("zeros", "circular")
    ],
    network(
        "aoc-circular-parametrisations-removed",
        "AOC, padding circular, MaxMin, torch's remove_parametrizations",
        lambda: _aoc_cnn("circular"),
        freeze=without_parametrisations,
    ),
    network(
        "aoc-groups-dilation",
        "AOC with padding same, groups, dilation, ChannelShuffle",
        lambda: nn.Sequential(
            AdaptiveOrthoConv2d(3, 32, 4, stride=2, padding=1),
            MaxMin(),
            AdaptiveOrthoConv2d(32, 32, 3, groups=4, padding="same"),
            ChannelShuffle(8, 4),
            MaxMin(),
            AdaptiveOrthoConv2d(32, 32, 4, padding="same"),
            MaxMin(),
            AdaptiveOrthoConv2d(32, 32, 3, dilation=2, padding="same"),
            MaxMin(),
            nn.Flatten(),
            OrthoLinear(32 * 256, 10),
        ),
    ),
    network(
        "aoc-transposed",
        "AOC and its transpose, stride 1 and 2",
        lambda: maxmin_after_each(
            AdaptiveOrthoConv2d(3, 32, 4, stride=2, padding=1),
            AdaptiveOrthoConvTranspose2d(32, 16, 4, stride=2, padding=1),
            AdaptiveOrthoConv2d(16, 32, 2, stride=2, padding=0),
            AdaptiveOrthoConvTranspose2d(32, 32, 3, padding=1),
            features=32 * 256,
        ),
    ),
    network(
        "aoc-abs-softhuber",
        "AOC, Abs, SoftHuber",
        lambda: nn.Sequential(
            AdaptiveOrthoConv2d(3, 16, 3, padding=1),
            Abs(),
            AdaptiveOrthoConv2d(16, 32, 4, stride=2, padding=1),
            SoftHuber(),
            nn.Flatten(),
            OrthoLinear(32 * 256, 10),
        ),
    ),
    per_logit(
        "aoc-centering-lppool",
        ORTHOGONIUM,
        "AOC, BatchCentering2D, LayerCentering2D, LPPool2d, UnitNormLinear",
        lambda: nn.Sequential(
            AdaptiveOrthoConv2d(3, 16, 3, padding=1),
            BatchCentering2D(16),
            MaxMin(),
            AdaptiveOrthoConv2d(16, 32, 4, stride=2, padding=1),
            LayerCentering2D(32),
            MaxMin(),
            nn.LPPool2d(2, (4, 4)),
            nn.Flatten(),
            UnitNormLinear(512, 10, bias=False),
        ),
        COLOUR,
    ),
    network("aoc-householder", "AOC, HouseHolder", lambda: _aoc_cnn("circular", HouseHolder)),
    network("aoc-householder-order-2", "AOC, HouseHolder_Order_2", lambda: _aoc_cnn("circular", HouseHolder_Order_2)),
    network(
        "aol",
        "AOLConv2D and AOLConvTranspose2D",
        lambda: maxmin_after_each(
            AOLConv2D(3, 32, 3, padding=1, stride=2, niter=4),
            AOLConv2D(32, 16, 3, padding=1, padding_mode="circular"),
            AOLConvTranspose2D(16, 8, 4, stride=2, padding=1),
            features=8 * 1024,
        ),
    ),
    network(
        "sll-convolutions", "SDPBasedLipschitzResBlock x 2, kernels folded", sll_blocks, freeze=vanilla_and_kernels
    ),
    network("sll-convolutions-parametrised", "SDPBasedLipschitzResBlock x 2, as vanilla_model leaves it", sll_blocks),
    network("sll-dense", "SDPBasedLipschitzDense x 2, 64 wide", lambda: sll_dense(64, 64, 32), GREY),
    network("sll-dense-128", "SDPBasedLipschitzDense x 2, 128 wide", lambda: sll_dense(128, 64, 256), GREY),
    network(
        "sll-aoc",
        "SLLxAOCLipschitzResBlock with stride 2",
        lambda: nn.Sequential(
            AdaptiveOrthoConv2d(3, 16, 3, padding=1, padding_mode="zeros"),
            SLLxAOCLipschitzResBlock(16, 32, 1.0, 3, 2),
            nn.Flatten(),
            OrthoLinear(32 * 256, 10),
        ),
    ),
    network(
        "aoc-residual",
        "AOCLipschitzResBlock x 2",
        lambda: between_orthogonal(
            AOCLipschitzResBlock(16, 2, 3), AOCLipschitzResBlock(16, 1, 3, padding_mode="zeros")
        ),
    ),
    network(
        "residual-l2-additive",
        "L2NormResidual, AdditiveResidual",
        lambda: between_orthogonal(L2NormResidual(aoc_and_maxmin(16)), AdditiveResidual(aoc_and_maxmin(16))),
    ),
    network(
        "residual-prescaled",
        "PrescaledAdditiveResidual",
        lambda: between_orthogonal(PrescaledAdditiveResidual(aoc_and_maxmin(16))),
    ),
    network(
        "residual-concat",
        "ConcatResidual: half of the channels pass by",
        lambda: between_orthogonal(ConcatResidual(aoc_and_maxmin(8))),
    ),
    network(
        "patch-based-cnn",
        "PatchBasedCNN of the model factory, LayerCentering2D",
        lambda: PatchBasedCNN(dim=32, depth=3, norm=ClassParam(LayerCentering2D, num_features=32)),
        steps=4,
    ),
    network(
        "conv-mixer",
        "ConvMixerInspired of the model factory",
        lambda: ConvMixerInspired(dim=32, depth=2, channels_per_group=2, norm=None),
        steps=4,
    ),
    network(
        "staged-cnn",
        "StagedCNN of the model factory",
        lambda: StagedCNN(
            dim_repeats=[(16, 1), (32, 1)],
            dim_nb_dense=(64, 1),
            norm=None,
            conv=ClassParam(AdaptiveOrthoConv2d, bias=False, kernel_size=3, padding=1),
        ),
        steps=4,
    ),
]
