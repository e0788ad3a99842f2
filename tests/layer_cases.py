"""One layer of each kind with its input shape, for the tests that every layer must pass."""

from collections.abc import Callable

import pytest
import torch

from models.nets.layers.base import Chain, Layer
from models.nets.layers.convolution import OrthogonalConv2d, Shift2d
from models.nets.layers.linear import OrthogonalDense, OrthogonalMatrix, UnitHead
from models.nets.layers.pooling import GlobalL2Pool2d, GlobalMaxPool2d, L2Pool2d, ScaledAvgPool2d
from models.nets.layers.reshaping import Flatten, Normalize, SpaceToDepth
from models.nets.layers.sorting import FullSort, GroupSort2

IMAGE = (4, 6, 6)
LAYERS: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "orthogonal dense, wide": (lambda: OrthogonalDense(12, 7), (12,)),
    "orthogonal dense, tall": (lambda: OrthogonalDense(7, 12), (7,)),
    "orthogonal dense, stiefel": (lambda: OrthogonalDense(12, 7, "stiefel"), (12,)),
    "unit head": (lambda: UnitHead(9, 1), (9,)),
    "convolution 3 x 3": (lambda: OrthogonalConv2d(4, 6, 3), IMAGE),
    "convolution 2 x 2": (lambda: OrthogonalConv2d(4, 4, 2), IMAGE),
    "convolution, many groups": (lambda: OrthogonalConv2d(12, 6, 3, "stiefel"), (12, 4, 5)),
    "shift 3 x 3": (lambda: Shift2d(3), (10, 4, 5)),
    "GroupSort2, flat": (GroupSort2, (8,)),
    "GroupSort2, image": (GroupSort2, IMAGE),
    "full sort": (FullSort, (9,)),
    "L2 pooling": (lambda: L2Pool2d(3), IMAGE),
    "global maximum": (GlobalMaxPool2d, (4, 3, 5)),
    "global L2 pooling": (GlobalL2Pool2d, (4, 3, 5)),
    "scaled average pooling": (lambda: ScaledAvgPool2d(2), IMAGE),
    "space to depth": (lambda: SpaceToDepth(2), IMAGE),
    "flatten": (Flatten, IMAGE),
    "normalize": (lambda: Normalize([0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 2.0, 1.0]), IMAGE),
    "chain": (
        lambda: Chain([SpaceToDepth(2), OrthogonalConv2d(16, 8), GroupSort2(), L2Pool2d(3), Flatten()]),
        IMAGE,
    ),
}
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())


def trained(layer: Layer) -> Layer:
    """Move the parameters far from their initial values, as training might; return the layer."""
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, OrthogonalMatrix) and module.parametrisation == "stiefel":
                continue
            for parameter in module.parameters(recurse=False):
                parameter.add_(0.7 * torch.randn_like(parameter))
    return layer


def offsets_of_channels(layer: Shift2d, channels: int) -> list[tuple[int, int]]:
    """Return by how much each channel moves, dy and dx."""
    runs = [run for half in layer.halves(channels) for run in half]
    return [(run.dy, run.dx) for run in runs for _ in range(run.size)]
