"""The rows of `docs/layers.md`: one network for each parametrisation, of about the same number of multiply-adds.

All end with `UnitHead` and sort with `GroupSort2`, except inside the residual steps of SLL, which are defined with
relu. The dense layer after 3 x 3 kernels is Cayley in all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.layers.constructions import (
    AolKernel,
    AolMatrix,
    Convolution,
    Dense,
    PointKernel,
    QrMatrix,
    SllConvolution,
    SllDense,
)
from models.layers import (
    Chain,
    Flatten,
    GroupSort2,
    Layer,
    OrthogonalConv2d,
    OrthogonalDense,
    Parametrisation,
    SpaceToDepth,
    UnitHead,
)
from models.networks import LipschitzNetwork, dense_network

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
CLASSES = 10
WIDTH, LAYERS = 512, 3
CHANNELS, TAIL = (32, 64), 256
"""Of the 3 x 3 convolutions."""
WIDER_CHANNELS = (64, 128)
"""Of shift and mix, two a stage: as many multiply-adds as the 3 x 3 convolutions; one costs a ninth of theirs."""
SLL_CHANNELS, SLL_HIDDEN = 32, 16

ADAM = (2e-3, 4e-3, 8e-3)
"""Learning rates of Adam that are tried first; `training.chosen_rate` goes on where the best is the last."""
LOW = (5e-4, 1e-3, 2e-3)
"""The same for weights that larger steps of Adam turned to NaN, or to a product far from orthogonal."""
ROTATION = (0.02, 0.04, 0.08)
"""The same for the descent along the manifold, in radians a step; biases and head then have Adam's middle rate."""

MakeMatrix = Callable[[int, int], nn.Module]
"""`(out_features, in_features) -> weight`."""
MakeKernel = Callable[[int, int, int], nn.Module]
"""`(out_channels, in_channels, kernel_size) -> weight`."""


@dataclass(frozen=True)
class Method:
    """One row."""

    name: str
    title: str
    source: str
    build: Callable[[], LipschitzNetwork]
    rates: tuple[float, ...] = ADAM
    on_manifold: bool = False


def _dense(make: MakeMatrix) -> LipschitzNetwork:
    layers: list[Layer] = [Flatten()]
    features = GREY[0] * GREY[1] * GREY[2]
    for _ in range(LAYERS):
        layers += [Dense(make(WIDTH, features), WIDTH), GroupSort2()]
        features = WIDTH
    return LipschitzNetwork(GREY, Chain(layers), UnitHead(features, CLASSES))


def _dense_of_library(name: str) -> LipschitzNetwork:
    from benchmarks.layers import libraries

    return _dense(getattr(libraries, name))


def _ours(parametrisation: Parametrisation) -> LipschitzNetwork:
    return dense_network(GREY, [WIDTH] * LAYERS, CLASSES, parametrisation=parametrisation)


def _sll() -> LipschitzNetwork:
    # A residual step keeps the width, so another layer has to change it; with half the width hidden, two steps cost as
    # much as two dense layers.
    pixels = GREY[0] * GREY[1] * GREY[2]
    layers: list[Layer] = [Flatten(), OrthogonalDense(pixels, WIDTH), GroupSort2()]
    layers += [SllDense(WIDTH, WIDTH // 2) for _ in range(LAYERS - 1)]
    return LipschitzNetwork(GREY, Chain(layers), UnitHead(WIDTH, CLASSES))


DENSE = (
    Method("stiefel", "descent along the manifold", "`models.layers`, `models.optimisers`", lambda: _ours("stiefel"),
           ROTATION, on_manifold=True),
    Method("cayley", "Cayley", "`models.layers`", lambda: _ours("cayley")),
    Method("bjorck", "Newton-Schulz (Björck)", "deel-torchlip `SpectralLinear`",
           lambda: _dense_of_library("bjorck_matrix"), LOW),
    Method("qr", "QR", "`torch.linalg.qr`", lambda: _dense(QrMatrix)),
    Method("aol", "AOL", "`benchmarks/layers`", lambda: _dense(AolMatrix), LOW),
    Method("sll", "SLL (first layer Cayley)", "`benchmarks/layers`", _sll),
)  # fmt: skip


def _convolutional(make: MakeKernel) -> LipschitzNetwork:
    # The dense layer is the same in all rows with kernels, so that the rows differ by these alone.
    features, height, width = COLOUR
    layers: list[Layer] = []
    for channels in CHANNELS:
        layers += [SpaceToDepth(2), Convolution(make(channels, 4 * features, 3), channels), GroupSort2()]
        features, height, width = channels, height // 2, width // 2
    layers += [Flatten(), OrthogonalDense(features * height * width, TAIL), GroupSort2()]
    return LipschitzNetwork(COLOUR, Chain(layers), UnitHead(TAIL, CLASSES))


def _convolutional_of_library(name: str) -> LipschitzNetwork:
    from benchmarks.layers import libraries

    return _convolutional(getattr(libraries, name))


def _shifted(parametrisation: Parametrisation, stages: tuple[int, ...], blocks: int) -> LipschitzNetwork:
    features, height, width = COLOUR
    layers: list[Layer] = []
    for channels in stages:
        layers.append(SpaceToDepth(2))
        features, height, width = 4 * features, height // 2, width // 2
        for _ in range(blocks):
            layers += [OrthogonalConv2d(features, channels, 3, parametrisation), GroupSort2()]
            features = channels
    layers += [Flatten(), OrthogonalDense(features * height * width, TAIL, parametrisation), GroupSort2()]
    return LipschitzNetwork(COLOUR, Chain(layers), UnitHead(TAIL, CLASSES))


def _sll_convolutional() -> LipschitzNetwork:
    # A residual step keeps its channels; orthonormal columns widen 12 of them without loss.
    features = 4 * SLL_CHANNELS
    tail = features * (COLOUR[1] // 4) * (COLOUR[2] // 4)
    layers: list[Layer] = [
        SpaceToDepth(2),
        Convolution(PointKernel(SLL_CHANNELS, 4 * COLOUR[0]), SLL_CHANNELS),
        SllConvolution(SLL_CHANNELS, SLL_HIDDEN, 3),
        SpaceToDepth(2),
        SllConvolution(features, SLL_HIDDEN, 3),
        Flatten(),
        OrthogonalDense(tail, TAIL),
        GroupSort2(),
    ]
    return LipschitzNetwork(COLOUR, Chain(layers), UnitHead(TAIL, CLASSES))


CONVOLUTIONAL = (
    Method("stiefel-conv-large", "shift and mix, two of twice the width a stage, descent along the manifold",
           "`models.layers`, `models.optimisers`", lambda: _shifted("stiefel", WIDER_CHANNELS, 2), ROTATION,
           on_manifold=True),
    Method("stiefel-conv", "shift and mix, descent along the manifold",
           "`models.layers`, `models.optimisers`", lambda: _shifted("stiefel", CHANNELS, 1), ROTATION,
           on_manifold=True),
    Method("cayley-conv", "shift and mix, Cayley", "`models.layers`",
           lambda: _shifted("cayley", CHANNELS, 1)),
    Method("aoc", "orthogonal convolution 3 x 3 (AOC)", "orthogonium `AdaptiveOrthoConv2d`",
           lambda: _convolutional_of_library("aoc_kernel")),
    Method("rko", "reshaped orthogonal kernel 3 x 3 (RKO)", "deel-torchlip `SpectralConv2d`",
           lambda: _convolutional_of_library("rko_kernel"), LOW),
    Method("aol-conv", "AOL 3 x 3", "`benchmarks/layers`", lambda: _convolutional(AolKernel), LOW),
    Method("sll-conv", "SLL 3 x 3", "`benchmarks/layers`", _sll_convolutional),
)  # fmt: skip
