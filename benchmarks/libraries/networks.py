"""The networks of other libraries that the certifier is measured on, and what is claimed about each.

A claim is about the L2 Lipschitz constant of the map from the image to all logits. A head whose rows have norm 1
makes each logit 1-Lipschitz, so that the map of K logits has sqrt(K) at most, and a margin 2 at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from deel import torchlip
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
from torch.nn.utils import parametrize

TORCHLIP, ORTHOGONIUM, TORCH = "deel-torchlip", "orthogonium", "torch"
GREY, COLOUR = (1, 28, 28), (3, 32, 32)
ITERATIONS = "up to the accuracy of its iterations"


@dataclass(frozen=True)
class Form:
    """How a network is written: torch's exporter, operator set, number format."""

    exporter: str
    """`dynamo` or `script`: `torch.onnx.export(dynamo=True)` or `(dynamo=False)`."""
    opset: int
    dtype: str = "float32"
    one_file: bool = True
    """False: weights in a second file, as the newer exporter does unless it is told not to."""

    @property
    def name(self) -> str:
        parts = [f"{self.exporter}{self.opset}"]
        parts += [] if self.dtype == "float32" else [self.dtype]
        parts += [] if self.one_file else ["external"]
        return "-".join(parts)


NEWER, OLDER = Form("dynamo", 18), Form("script", 17)
Freeze = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Network:
    """One architecture."""

    name: str
    library: str
    what: str
    """Its layers in a line."""
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    claim: float | None
    """What the library claims about the map to the logits; None where it claims nothing."""
    claim_margin: float | None
    """The same about the difference of two logits."""
    holds: bool
    """Whether the claim is true, rounding and the accuracy of iterations aside."""
    why: str
    freeze: Freeze
    forms: Sequence[Form] = (NEWER, OLDER)
    steps: int = 12
    """Training steps."""
    patterns: Sequence[str] = ()
    """Operators that the file shall have; only for samples."""


def as_it_is(model: nn.Module) -> nn.Module:
    """Parametrisations stay in the module; the exporter folds them."""
    return model


def vanilla(model: nn.Module) -> nn.Module:
    """deel-torchlip's own way to plain layers."""
    if isinstance(model, torchlip.Sequential):
        return model.vanilla_export()
    torchlip.vanilla_model(model, in_place=True)
    return model


def vanilla_and_kernels(model: nn.Module) -> nn.Module:
    """Also the kernels of SLL blocks, which `vanilla_model` does not know."""
    for module in model.modules():
        if isinstance(module, SDPBasedLipschitzResBlock) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "kernel")
    return vanilla(model)


def without_parametrisations(model: nn.Module) -> nn.Module:
    """torch's own way to plain parameters; `forward` of orthogonium's layers still computes with them."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
    return model


def jointly(
    name: str,
    library: str,
    what: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    *,
    holds: bool = True,
    why: str = ITERATIONS,
    claim: float = 1.0,
    outputs: int = 10,
    freeze: Freeze = vanilla,
    forms: Sequence[Form] = (NEWER, OLDER),
    steps: int = 12,
    patterns: Sequence[str] = (),
) -> Network:
    """A network whose map to all logits has the claimed constant.

    A margin then has sqrt(2) times that; one output f stands for the logits (f, -f), whose margin is 2 f.
    """
    margin = (2.0 if outputs == 1 else math.sqrt(2.0)) * claim
    return Network(name, library, what, build, shape, claim, margin, holds, why, freeze, forms, steps, patterns)


def per_logit(
    name: str, library: str, what: str, build: Callable[[], nn.Module], shape: tuple[int, int, int], k: int = 10
) -> Network:
    """A network whose head has k rows of norm 1 on a body of constant 1."""
    return Network(name, library, what, build, shape, math.sqrt(k), 2.0, True, ITERATIONS, vanilla)


def nothing_claimed(
    name: str,
    what: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    forms: Sequence[Form] = (NEWER, OLDER),
    steps: int = 40,
) -> Network:
    """A network of plain torch."""
    return Network(name, TORCH, what, build, shape, None, None, True, "no claim", as_it_is, forms, steps)


def torchlip_cnn(
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


def aoc_cnn(padding: str, activation: Callable[[int], nn.Module] = lambda _: MaxMin(), width: int = 16) -> nn.Module:
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


def aoc_and_maxmin(channels: int) -> nn.Module:
    """One branch of a residual block."""
    return nn.Sequential(AdaptiveOrthoConv2d(channels, channels, 3, padding=1), MaxMin())


class ResidualBlock(nn.Module):
    """The basic block of ResNet-18: two 3 x 3 convolutions with BatchNorm, and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            convolution = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def resnet(channels: int, colours: int = 3, blocks: Sequence[int] = (1, 2, 2)) -> nn.Module:
    """Stem, pool, basic blocks with these strides, global average, linear head."""
    layers: list[nn.Module] = [nn.Conv2d(colours, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    for stride in blocks:
        layers.append(ResidualBlock(channels, channels * stride, stride))
        channels *= stride
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, 10))


class NormalisedCnn(nn.Module):
    """Two convolutions and two dense layers, with the normalisation of the pixels inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        )
        self.dense = nn.Sequential(nn.Linear(32 * 144, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.layers((x - 0.1307) / 0.3081))


PIXELS_TOO_OFTEN = (
    "false: the factor 1 / k of a k x k kernel counts a pixel in k k patches, and this padding puts pixels near the "
    "border in more"
)
EVERY_OPSET = (
    Form("script", 13),
    Form("script", 16),
    OLDER,
    NEWER,
    Form("dynamo", 20),
    Form("dynamo", 23),
    Form("dynamo", 24),
)
DOUBLE = (Form("dynamo", 20, "float64"), Form("script", 13, "float64"))

NETWORKS: list[Network] = [
    jointly(
        "mnist-0-8",
        TORCHLIP,
        "dense 128-64-32-1, FullSort",
        lambda: torchlip.Sequential(
            nn.Flatten(),
            torchlip.SpectralLinear(784, 128),
            torchlip.FullSort(),
            torchlip.SpectralLinear(128, 64),
            torchlip.FullSort(),
            torchlip.SpectralLinear(64, 32),
            torchlip.FullSort(),
            torchlip.FrobeniusLinear(32, 1),
        ),
        GREY,
        outputs=1,
    ),
    per_logit(
        "dense-groupsort2",
        TORCHLIP,
        "dense 128-64, GroupSort2, head with rows of norm 1",
        lambda: torchlip.Sequential(
            nn.Flatten(),
            torchlip.SpectralLinear(784, 128),
            torchlip.GroupSort2(),
            torchlip.SpectralLinear(128, 64),
            torchlip.GroupSort2(),
            unit_rows(64),
        ),
        GREY,
    ),
    jointly(
        "dense-groupsort4",
        TORCHLIP,
        "dense 64-64, GroupSort(4), coefficient 2 for the whole network",
        lambda: torchlip.Sequential(
            nn.Flatten(),
            torchlip.SpectralLinear(784, 64),
            torchlip.GroupSort(4),
            torchlip.SpectralLinear(64, 64),
            torchlip.GroupSort(4),
            torchlip.SpectralLinear(64, 10),
            k_coef_lip=2.0,
        ),
        GREY,
        claim=2.0,
    ),
    jointly(
        "dense-maxmin", TORCHLIP, "dense 64-32, MaxMin", lambda: torchlip_dense(lambda _: torchlip.MaxMin(), 2), GREY
    ),
    jointly("dense-lprelu", TORCHLIP, "dense 64-32, LPReLU", lambda: torchlip_dense(torchlip.LPReLU), GREY),
    jointly(
        "dense-householder", TORCHLIP, "dense 64-32, HouseHolder", lambda: torchlip_dense(torchlip.HouseHolder), GREY
    ),
    jointly(
        "dense-parametrised",
        TORCHLIP,
        "dense 64-32, FullSort, exported without vanilla_export",
        lambda: torchlip_dense(lambda _: torchlip.FullSort()),
        GREY,
        freeze=as_it_is,
    ),
    jointly(
        "every-opset",
        TORCHLIP,
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
        GREY,
        forms=(*EVERY_OPSET, DOUBLE[0], Form("dynamo", 20, one_file=False)),
    ),
    jointly(
        "dense-float64",
        TORCHLIP,
        "dense 64-32, GroupSort(8), float64",
        lambda: torchlip_dense(lambda _: torchlip.GroupSort(8)),
        GREY,
        forms=DOUBLE,
    ),
    *[
        jointly(
            f"cnn-{padding}-{pool}",
            TORCHLIP,
            f"two convolutions 3 x 3, padding {padding}, {layer.__name__}, two dense layers",
            lambda padding=padding, layer=layer: torchlip_cnn(padding, lambda: layer(2)),
            GREY,
            holds=padding != "reflect",
            why=PIXELS_TOO_OFTEN if padding == "reflect" else ITERATIONS,
        )
        for padding in ("zeros", "circular", "replicate", "symmetric", "reflect")
        for pool, layer in (("l2", torchlip.ScaledL2NormPool2d), ("average", torchlip.ScaledAvgPool2d))
        if pool == "l2" or padding in ("zeros", "reflect")
    ],
    per_logit(
        "cnn-unit-rows",
        TORCHLIP,
        "two convolutions 3 x 3, ScaledL2NormPool2d, head with rows of norm 1",
        lambda: torchlip_cnn("zeros", lambda: torchlip.ScaledL2NormPool2d(2), head=unit_rows(64)),
        GREY,
    ),
    *[
        jointly(
            f"layer-{padding}-{size}x{size}",
            TORCHLIP,
            f"one convolution {size} x {size} of {size * size} channels, padding {padding}, on 6 x 6",
            lambda padding=padding, size=size: torchlip.Sequential(
                torchlip.SpectralConv2d(1, size * size, size, padding=size // 2, padding_mode=padding), nn.Flatten()
            ),
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
    per_logit(
        "invertible-downsampling",
        TORCHLIP,
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
        GREY,
    ),
    per_logit(
        "adaptive-pools",
        TORCHLIP,
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
        GREY,
    ),
    jointly(
        "centering",
        TORCHLIP,
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
        GREY,
    ),
    jointly(
        "residual",
        TORCHLIP,
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
        GREY,
    ),
    jointly(
        "transposed",
        TORCHLIP,
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
        GREY,
    ),
    *[
        jointly(f"aoc-{padding}", ORTHOGONIUM, f"AOC, padding {padding}, MaxMin", lambda p=padding: aoc_cnn(p), COLOUR)
        for padding in ("zeros", "circular")
    ],
    jointly(
        "aoc-circular-parametrisations-removed",
        ORTHOGONIUM,
        "AOC, padding circular, MaxMin, torch's remove_parametrizations",
        lambda: aoc_cnn("circular"),
        COLOUR,
        freeze=without_parametrisations,
    ),
    jointly(
        "aoc-groups-dilation",
        ORTHOGONIUM,
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
        COLOUR,
    ),
    jointly(
        "aoc-transposed",
        ORTHOGONIUM,
        "AOC and its transpose, stride 1 and 2",
        lambda: nn.Sequential(
            AdaptiveOrthoConv2d(3, 32, 4, stride=2, padding=1),
            MaxMin(),
            AdaptiveOrthoConvTranspose2d(32, 16, 4, stride=2, padding=1),
            MaxMin(),
            AdaptiveOrthoConv2d(16, 32, 2, stride=2, padding=0),
            MaxMin(),
            AdaptiveOrthoConvTranspose2d(32, 32, 3, padding=1),
            MaxMin(),
            nn.Flatten(),
            OrthoLinear(32 * 256, 10),
        ),
        COLOUR,
    ),
    jointly(
        "aoc-abs-softhuber",
        ORTHOGONIUM,
        "AOC, Abs, SoftHuber",
        lambda: nn.Sequential(
            AdaptiveOrthoConv2d(3, 16, 3, padding=1),
            Abs(),
            AdaptiveOrthoConv2d(16, 32, 4, stride=2, padding=1),
            SoftHuber(),
            nn.Flatten(),
            OrthoLinear(32 * 256, 10),
        ),
        COLOUR,
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
    jointly("aoc-householder", ORTHOGONIUM, "AOC, HouseHolder", lambda: aoc_cnn("circular", HouseHolder), COLOUR),
    jointly(
        "aoc-householder-order-2",
        ORTHOGONIUM,
        "AOC, HouseHolder_Order_2",
        lambda: aoc_cnn("circular", HouseHolder_Order_2),
        COLOUR,
    ),
    jointly(
        "aol",
        ORTHOGONIUM,
        "AOLConv2D and AOLConvTranspose2D",
        lambda: nn.Sequential(
            AOLConv2D(3, 32, 3, padding=1, stride=2, niter=4),
            MaxMin(),
            AOLConv2D(32, 16, 3, padding=1, padding_mode="circular"),
            MaxMin(),
            AOLConvTranspose2D(16, 8, 4, stride=2, padding=1),
            MaxMin(),
            nn.Flatten(),
            OrthoLinear(8 * 1024, 10),
        ),
        COLOUR,
    ),
    jointly(
        "sll-convolutions",
        ORTHOGONIUM,
        "SDPBasedLipschitzResBlock x 2, kernels folded",
        lambda: between_orthogonal(SDPBasedLipschitzResBlock(16, 2.0, 3), SDPBasedLipschitzResBlock(16, 1.0, 3)),
        COLOUR,
        freeze=vanilla_and_kernels,
    ),
    jointly(
        "sll-convolutions-parametrised",
        ORTHOGONIUM,
        "SDPBasedLipschitzResBlock x 2, as vanilla_model leaves it",
        lambda: between_orthogonal(SDPBasedLipschitzResBlock(16, 2.0, 3), SDPBasedLipschitzResBlock(16, 1.0, 3)),
        COLOUR,
    ),
    jointly(
        "sll-dense",
        ORTHOGONIUM,
        "SDPBasedLipschitzDense x 2, 64 wide",
        lambda: nn.Sequential(
            nn.Flatten(),
            OrthoLinear(784, 64),
            SDPBasedLipschitzDense(64, 64, 64),
            SDPBasedLipschitzDense(64, 64, 32),
            OrthoLinear(64, 10),
        ),
        GREY,
    ),
    jointly(
        "sll-dense-128",
        ORTHOGONIUM,
        "SDPBasedLipschitzDense x 2, 128 wide",
        lambda: nn.Sequential(
            nn.Flatten(),
            OrthoLinear(784, 128),
            SDPBasedLipschitzDense(128, 128, 64),
            SDPBasedLipschitzDense(128, 128, 256),
            OrthoLinear(128, 10),
        ),
        GREY,
    ),
    jointly(
        "sll-aoc",
        ORTHOGONIUM,
        "SLLxAOCLipschitzResBlock with stride 2",
        lambda: nn.Sequential(
            AdaptiveOrthoConv2d(3, 16, 3, padding=1, padding_mode="zeros"),
            SLLxAOCLipschitzResBlock(16, 32, 1.0, 3, 2),
            nn.Flatten(),
            OrthoLinear(32 * 256, 10),
        ),
        COLOUR,
    ),
    jointly(
        "aoc-residual",
        ORTHOGONIUM,
        "AOCLipschitzResBlock x 2",
        lambda: between_orthogonal(
            AOCLipschitzResBlock(16, 2, 3), AOCLipschitzResBlock(16, 1, 3, padding_mode="zeros")
        ),
        COLOUR,
    ),
    jointly(
        "residual-l2-additive",
        ORTHOGONIUM,
        "L2NormResidual, AdditiveResidual",
        lambda: between_orthogonal(L2NormResidual(aoc_and_maxmin(16)), AdditiveResidual(aoc_and_maxmin(16))),
        COLOUR,
    ),
    jointly(
        "residual-prescaled",
        ORTHOGONIUM,
        "PrescaledAdditiveResidual",
        lambda: between_orthogonal(PrescaledAdditiveResidual(aoc_and_maxmin(16))),
        COLOUR,
    ),
    jointly(
        "residual-concat",
        ORTHOGONIUM,
        "ConcatResidual: half of the channels pass by",
        lambda: between_orthogonal(ConcatResidual(aoc_and_maxmin(8))),
        COLOUR,
    ),
    jointly(
        "patch-based-cnn",
        ORTHOGONIUM,
        "PatchBasedCNN of the model factory, LayerCentering2D",
        lambda: PatchBasedCNN(dim=32, depth=3, norm=ClassParam(LayerCentering2D, num_features=32)),
        COLOUR,
        steps=4,
    ),
    jointly(
        "conv-mixer",
        ORTHOGONIUM,
        "ConvMixerInspired of the model factory",
        lambda: ConvMixerInspired(dim=32, depth=2, channels_per_group=2, norm=None),
        COLOUR,
        steps=4,
    ),
    jointly(
        "staged-cnn",
        ORTHOGONIUM,
        "StagedCNN of the model factory",
        lambda: StagedCNN(
            dim_repeats=[(16, 1), (32, 1)],
            dim_nb_dense=(64, 1),
            norm=None,
            conv=ClassParam(AdaptiveOrthoConv2d, bias=False, kernel_size=3, padding=1),
        ),
        COLOUR,
        steps=4,
    ),
    nothing_claimed("resnet", "ReLU, BatchNorm2d, basic blocks, MaxPool, global average", lambda: resnet(16), COLOUR),
    nothing_claimed("cnn-normalised", "normalisation, convolutions, ReLU, MaxPool", NormalisedCnn, GREY),
    nothing_claimed(
        "vgg-gelu",
        "BatchNorm, LeakyReLU, ELU, reflect padding, GELU",
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.1),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ELU(),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.GELU(),
            nn.Linear(64, 10),
        ),
        COLOUR,
        forms=(NEWER, Form("dynamo", 20)),
    ),
]
