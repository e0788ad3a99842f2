"""Networks with a known Lipschitz constant: a body, and a head with one row for each logit.

Axes: N batch, C channels, H height, W width, D features, K logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.nets.layers.base import Chain, Layer
from models.nets.layers.convolution import OrthogonalConv2d
from models.nets.layers.linear import Affine, OrthogonalDense, UnitHead
from models.nets.layers.pooling import GlobalL2Pool2d, GlobalMaxPool2d
from models.nets.layers.reshaping import Flatten, SpaceToDepth
from models.nets.layers.sorting import FullSort, GroupSort2
from models.parts import Network, Parametrisation, Stage


class LipschitzNetwork(nn.Module):
    """`head(body(image))` with an affine head, whose rows give the constant of each `f_i - f_j`."""

    def __init__(self, input_shape: tuple[int, int, int], body: Chain, head: UnitHead | Affine) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.body = body
        self.head = head

    @property
    def outputs(self) -> int:
        """Number of logits: K, or 1 for the two-class case `(f, -f)`."""
        return self.head.weight().shape[0]

    def forward(self, image_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        """Return the logits of a batch of images."""
        return self.head(self.body(image_NCHW))

    def fold(self) -> LipschitzNetwork:
        """Return the network that is served, in float64 with weights exact in float32."""
        return LipschitzNetwork(
            self.input_shape,
            self.body.fold(),
            self.head.fold() if isinstance(self.head, UnitHead) else self.head,
        )

    def declared_margin_bounds_KK(self) -> Float[Tensor, "K K"]:
        """Return the constants of `f_i - f_j` by construction: the body's constant times `||w_i - w_j||`.

        Losses and the figures of a training use them. The bound that is served is proved from the exported bytes.
        For one output f the classes are `(f, -f)`: a 2 x 2 matrix with `2 ||w||` off the diagonal.
        """
        weight_KD = self.head.weight()
        rows_KD = torch.cat([weight_KD, -weight_KD]) if self.outputs == 1 else weight_KD
        difference = rows_KD[:, None, :] - rows_KD[None, :, :]
        # The clamp keeps the infinite slope of the root at 0 out of the gradient of the diagonal.
        return self.body.lipschitz_constant * difference.square().sum(2).clamp(min=1e-30).sqrt()


def both_logits(logits_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N K2"]:
    """Return a single output f as the two logits `(f, -f)`, more outputs as they are."""
    return torch.cat([logits_NK, -logits_NK], dim=1) if logits_NK.shape[1] == 1 else logits_NK


def dense_network(
    input_shape: tuple[int, int, int],
    widths: Sequence[int],
    outputs: int,
    *,
    activation: Literal["groupsort2", "fullsort"] = "groupsort2",
    parametrisation: Parametrisation = "cayley",
) -> LipschitzNetwork:
    """Return a network that flattens, then has an orthogonal dense layer and a sort for each width, and a `UnitHead`.

    Args:
        input_shape: (C, H, W) of an image.
        widths: features of each dense layer.
        outputs: K logits, or 1 for two classes.
        activation: the sort after each layer.
        parametrisation: of the orthogonal matrices.
    """
    C, H, W = input_shape
    layers: list[Layer] = [Flatten()]
    features = C * H * W
    for width in widths:
        layers.append(OrthogonalDense(features, width, parametrisation))
        layers.append(GroupSort2() if activation == "groupsort2" else FullSort())
        features = width
    return LipschitzNetwork(input_shape, Chain(layers), UnitHead(features, outputs))


def convolutional_network(
    input_shape: tuple[int, int, int],
    stem: Sequence[Stage],
    pool: Literal["none", "max", "l2"],
    widths: Sequence[int],
    outputs: int,
    *,
    activation: Literal["groupsort2", "fullsort"] = "groupsort2",
    parametrisation: Parametrisation = "cayley",
) -> LipschitzNetwork:
    """Return stages of `SpaceToDepth` and orthogonal convolutions, a pool over all pixels, then a `dense_network`.

    An image must consist of whole windows of each stage (`models.recipes.Network.multiple`).

    Args:
        input_shape: (C, H, W) of an image.
        stem: the stages; GroupSort2 follows each convolution.
        pool: reduction of each channel after the stages.
        widths: features of each dense layer.
        outputs: K logits, or 1 for two classes.
        activation: the sort after each dense layer.
        parametrisation: of the orthogonal matrices.
    """
    features, height, width = input_shape
    layers: list[Layer] = []
    for stage in stem:
        if stage.window > 1:
            layers.append(SpaceToDepth(stage.window))
        features, height, width = features * stage.window**2, height // stage.window, width // stage.window
        for _ in range(stage.blocks):
            layers += [OrthogonalConv2d(features, stage.channels, 3, parametrisation), GroupSort2()]
            features = stage.channels
    if pool != "none":
        layers.append(GlobalMaxPool2d() if pool == "max" else GlobalL2Pool2d())
        height, width = 1, 1
    tail = dense_network(
        (features, height, width), widths, outputs, activation=activation, parametrisation=parametrisation
    )
    return LipschitzNetwork(input_shape, Chain([*layers, tail.body]), tail.head)


def outputs_for(classes: int) -> int:
    """Return the number of outputs: one logit for each class, or the one output f of two classes."""
    return 1 if classes == 2 else classes


def build_network(network: Network, input_shape: tuple[int, int, int], outputs: int) -> LipschitzNetwork:
    """Return the network that a recipe describes; initial weights come from torch's global generator.

    Args:
        network: its description.
        input_shape: (C, H, W) of an image.
        outputs: K logits, or 1 for two classes.
    """
    if network.stem:
        return convolutional_network(
            input_shape,
            network.stem,
            network.pool,
            network.widths,
            outputs,
            activation=network.activation,
            parametrisation=network.parametrisation,
        )
    return dense_network(
        input_shape,
        network.widths,
        outputs,
        activation=network.activation,
        parametrisation=network.parametrisation,
    )
