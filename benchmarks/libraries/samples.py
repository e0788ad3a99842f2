"""The small networks of tests/samples_of_libraries: one for each pattern that exporters write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deel import torchlip
from forms import (
    NEWER,
    OLDER,
    ORTHOGONIUM,
    PIXELS_TOO_OFTEN,
    TORCHLIP,
    Form,
    Network,
    as_it_is,
    jointly,
    nothing_claimed,
    per_logit,
    vanilla_and_kernels,
)
from orthogonium.layers import AdaptiveOrthoConv2d, AdaptiveOrthoConvTranspose2d, HouseHolder, MaxMin, OrthoLinear
from orthogonium.layers.conv.AOL import AOLConv2D
from orthogonium.layers.conv.SLL import AOCLipschitzResBlock, SDPBasedLipschitzDense, SDPBasedLipschitzResBlock
from orthogonium.layers.custom_activations import SoftHuber
from orthogonium.layers.residual import L2NormResidual
from orthogonium_networks import aoc_and_maxmin
from torch import nn
from torch_networks import resnet
from torchlip_networks import ResidualStep, one_convolution, torchlip_dense

SHAPE = (1, 8, 8)


def dense(activation: nn.Module, factor: int = 1) -> nn.Module:
    """64 - 16 - 4 with one activation, which makes `factor` values of one."""
    return torchlip.Sequential(
        nn.Flatten(), torchlip.SpectralLinear(64, 16), activation, torchlip.SpectralLinear(factor * 16, 4)
    )


def after_convolution(*layers: nn.Module, features: int, padding: str = "zeros") -> nn.Module:
    """deel-torchlip: convolution to 4 channels, GroupSort2, `layers`, dense head."""
    return nn.Sequential(
        torchlip.SpectralConv2d(1, 4, 3, padding=1, padding_mode=padding),
        torchlip.GroupSort2(),
        *layers,
        nn.Flatten(),
        torchlip.SpectralLinear(features, 4),
    )


def between_orthogonal(*blocks: nn.Module) -> nn.Module:
    """orthogonium: blocks on 4 channels of 4 x 4."""
    return nn.Sequential(
        AdaptiveOrthoConv2d(1, 4, 2, stride=2, padding=0), *blocks, nn.Flatten(), OrthoLinear(4 * 16, 4)
    )


def circular() -> nn.Module:
    """Circular padding of both parities, stride 2 and groups."""
    return nn.Sequential(
        AdaptiveOrthoConv2d(1, 4, 3, padding=1),
        MaxMin(),
        AdaptiveOrthoConv2d(4, 8, 4, stride=2, padding=1),
        MaxMin(),
        AdaptiveOrthoConv2d(8, 8, 3, padding="same", groups=2),
        nn.Flatten(),
        OrthoLinear(128, 4),
    )


def transposed() -> nn.Module:
    """AOL, AOC and the transpose of AOC."""
    return nn.Sequential(
        AOLConv2D(1, 4, 3, padding=1),
        MaxMin(),
        AdaptiveOrthoConv2d(4, 8, 4, stride=2, padding=1, padding_mode="zeros"),
        MaxMin(),
        AdaptiveOrthoConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        OrthoLinear(256, 4),
    )


def l2_pools() -> nn.Module:
    """The L2-norm pool of 2 x 2 after a convolution."""
    return after_convolution(torchlip.ScaledL2NormPool2d(2), features=64)


def dense_of_sll() -> nn.Module:
    """x - 2 W^T t relu(W x + b), whose t the exporter folds at this width."""
    return nn.Sequential(nn.Flatten(), SDPBasedLipschitzDense(64, 64, 16), OrthoLinear(64, 4))


def unit_rows() -> nn.Module:
    """Each logit is 1-Lipschitz, the map to all of them only sqrt(4)-Lipschitz."""
    head = torchlip.FrobeniusLinear(16, 4, disjoint_neurons=True)
    return torchlip.Sequential(nn.Flatten(), torchlip.SpectralLinear(64, 16), torchlip.GroupSort2(), head)


def sample(
    name: str, library: str, layers: str, build: Callable[[], nn.Module], *patterns: str, **options: Any
) -> Network:
    """Return a network in one form.

    Args:
        name: of the file.
        library: of the network.
        layers: description of the network.
        build: of the module.
        patterns: operators that the file must contain.
        options: `form` of the export, `shape` of the image and options of `jointly`.
    """
    form, shape = options.pop("form", NEWER), options.pop("shape", SHAPE)
    return jointly(name, library, layers, build, shape, forms=(form,), patterns=patterns, **options)


def padded(padding: str, size: int, **options: Any) -> Network:
    """Return `one_convolution` on a small image: its claim is true or false for any weights."""
    side = 4 if size == 3 else 3
    return sample(
        f"{padding}-{size}x{size}",
        TORCHLIP,
        f"padding {padding}",
        lambda: one_convolution(padding, size),
        "Conv",
        shape=(1, side, side),
        steps=0,
        **options,
    )


SAMPLES: list[Network] = [
    sample("fullsort", TORCHLIP, "FullSort", lambda: dense(torchlip.FullSort()), "TopK", "Shape"),
    sample("groupsort2", TORCHLIP, "GroupSort2", lambda: dense(torchlip.GroupSort2()), "ReduceMax", "ReduceMin"),
    sample(
        "groupsort4-coefficient-2",
        TORCHLIP,
        "GroupSort(4), parametrised, constant 2",
        lambda: torchlip.Sequential(
            nn.Flatten(),
            torchlip.SpectralLinear(64, 16),
            torchlip.GroupSort(4),
            torchlip.SpectralLinear(16, 4),
            k_coef_lip=2.0,
        ),
        "TopK",
        form=OLDER,
        claim=2.0,
        freeze=as_it_is,
    ),
    sample("positive-and-negative", TORCHLIP, "MaxMin", lambda: dense(torchlip.MaxMin(), 2), "Relu", "Neg", "Concat"),
    sample("lprelu", TORCHLIP, "LPReLU", lambda: dense(torchlip.LPReLU(16)), "PRelu"),
    sample("lprelu-older", TORCHLIP, "LPReLU", lambda: dense(torchlip.LPReLU(16)), "PRelu", "Clip", form=OLDER),
    sample("l2-pool", TORCHLIP, "ScaledL2NormPool2d", l2_pools, "Pow", "AveragePool", "Sign"),
    sample("l2-pool-older", TORCHLIP, "ScaledL2NormPool2d", l2_pools, "Pow", "AveragePool", "Sign", form=OLDER),
    sample(
        "l2-pool-of-all",
        TORCHLIP,
        "ScaledAdaptativeL2NormPool2d",
        lambda: after_convolution(torchlip.ScaledAdaptativeL2NormPool2d((1, 1)), features=4),
        "Pow",
        "Sign",
    ),
    sample(
        "centering",
        TORCHLIP,
        "LayerCentering, BatchCentering, ScaledAvgPool2d",
        lambda: after_convolution(
            torchlip.LayerCentering(4), torchlip.ScaledAvgPool2d(2), torchlip.BatchCentering(4), features=64
        ),
        "ReduceMean",
        "Sub",
    ),
    sample(
        "residual",
        TORCHLIP,
        "LipResidual, InvertibleDownSampling",
        lambda: after_convolution(ResidualStep(4), torchlip.InvertibleDownSampling(2), features=256),
        "Add",
    ),
    padded("circular", 3),
    padded("symmetric", 5),
    padded("replicate", 3),
    padded("reflect", 3, holds=False, why=PIXELS_TOO_OFTEN),
    padded("replicate", 5, holds=False, why=PIXELS_TOO_OFTEN),
    per_logit(
        *("unit-rows", TORCHLIP, "head with rows of norm 1", unit_rows, SHAPE), k=4, forms=(NEWER,), patterns=("Gemm",)
    ),
    sample("wrap-by-pad", ORTHOGONIUM, "AOC, padding circular", circular, "Pad", "Split", "Max", "Min"),
    sample("wrap-by-slices", ORTHOGONIUM, "AOC, padding circular", circular, "Slice", "Concat", form=OLDER),
    sample("transposed", ORTHOGONIUM, "AOL, AOC, transposed AOC", transposed, "ConvTranspose"),
    sample("sll-dense", ORTHOGONIUM, "SDPBasedLipschitzDense", dense_of_sll, "Relu", "Sub"),
    sample(
        "sll-convolution",
        ORTHOGONIUM,
        "SDPBasedLipschitzResBlock",
        lambda: between_orthogonal(SDPBasedLipschitzResBlock(4, 2.0, 3), SDPBasedLipschitzResBlock(4, 1.0, 3)),
        "Conv",
        "ConvTranspose",
        "Sub",
        freeze=vanilla_and_kernels,
    ),
    sample(
        "aoc-residual",
        ORTHOGONIUM,
        "AOCLipschitzResBlock",
        lambda: between_orthogonal(AOCLipschitzResBlock(4, 2, 3), AOCLipschitzResBlock(4, 1, 3, padding_mode="zeros")),
        "ConvTranspose",
        "Sub",
    ),
    sample(
        "l2-norm-residual",
        ORTHOGONIUM,
        "L2NormResidual",
        lambda: between_orthogonal(L2NormResidual(aoc_and_maxmin(4))),
        "Pow",
        "Sqrt",
    ),
    sample("soft-huber", ORTHOGONIUM, "SoftHuber", lambda: between_orthogonal(SoftHuber()), "Pow", "Sqrt"),
    nothing_claimed(
        "resnet", "ReLU, BatchNorm, basic blocks", lambda: resnet(4, 1, (1, 2)), SHAPE, forms=(NEWER,), steps=30
    ),
    nothing_claimed(
        "resnet-older", "ReLU, BatchNorm, basic blocks", lambda: resnet(4, 1, (1, 2)), SHAPE, forms=(OLDER,), steps=30
    ),
    sample(
        "householder-torchlip",
        TORCHLIP,
        "HouseHolder",
        lambda: dense(torchlip.HouseHolder(16)),
        "LessOrEqual",
        "Greater",
    ),
    sample(
        "householder-orthogonium",
        ORTHOGONIUM,
        "HouseHolder",
        lambda: between_orthogonal(HouseHolder(4)),
        "Sin",
        "Greater",
        form=OLDER,
    ),
    sample(
        "weights-computed",
        TORCHLIP,
        "LipResidual, whose factor the older exporter leaves to be computed",
        lambda: after_convolution(ResidualStep(4), features=256),
        "Sigmoid",
        form=OLDER,
    ),
    sample(
        "weights-in-another-file",
        TORCHLIP,
        "torch's defaults",
        lambda: torchlip_dense(lambda _: torchlip.GroupSort2(), pixels=64, width=64),
        "Gemm",
        form=Form("dynamo", 20, one_file=False),
    ),
]
