"""Networks of other libraries, the forms in which they are exported, and the claims about them.

A claim refers to the L2 Lipschitz constant of the map from the image to all logits. A head whose rows have norm 1 makes
each logit 1-Lipschitz: the map of K logits has at most the constant sqrt(K), and a margin at most 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deel import torchlip
from orthogonium.layers.conv.SLL import SDPBasedLipschitzResBlock
from torch import nn
from torch.nn.utils import parametrize

TORCHLIP, ORTHOGONIUM, TORCH = "deel-torchlip", "orthogonium", "torch"
Shape = tuple[int, int, int]
GREY, COLOUR = (1, 28, 28), (3, 32, 32)
ITERATIONS = "up to the accuracy of its iterations"


@dataclass(frozen=True)
class Form:
    """The form of an exported network: exporter of torch, operator set, number format."""

    exporter: str
    """`dynamo` or `script`: `torch.onnx.export(dynamo=True)` or `(dynamo=False)`."""
    opset: int
    dtype: str = "float32"
    one_file: bool = True
    """False: weights are in a second file, the default of the newer exporter."""

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
    layers: str
    """Description in one line."""
    build: Callable[[], nn.Module]
    shape: Shape
    claim: float | None
    """Claim of the library about the map to the logits, if any."""
    claim_margin: float | None
    """Claim about the difference of two logits, if any."""
    holds: bool
    """Whether the claim is true, rounding and the accuracy of iterations aside."""
    why: str
    freeze: Freeze
    forms: Sequence[Form] = (NEWER, OLDER)
    steps: int = 12
    """Training steps."""
    patterns: Sequence[str] = ()
    """Operators that the file must contain; for samples only."""


def as_it_is(model: nn.Module) -> nn.Module:
    """Leave parametrisations in the module; the exporter folds them."""
    return model


def vanilla(model: nn.Module) -> nn.Module:
    """Convert to plain layers by the function of deel-torchlip."""
    if isinstance(model, torchlip.Sequential):
        return model.vanilla_export()
    torchlip.vanilla_model(model, in_place=True)
    return model


def vanilla_and_kernels(model: nn.Module) -> nn.Module:
    """Convert also the kernels of SLL blocks, which `vanilla_model` does not know."""
    for module in model.modules():
        if isinstance(module, SDPBasedLipschitzResBlock) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "kernel")
    return vanilla(model)


def without_parametrisations(model: nn.Module) -> nn.Module:
    """Convert to plain parameters by torch's function; `forward` of orthogonium's layers still computes with them."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
    return model


def jointly(
    *description: Any, claim: float = 1.0, outputs: int = 10, holds: bool = True, why: str = ITERATIONS, **options: Any
) -> Network:
    """Return a network whose map to all logits has the claimed constant.

    A margin then has sqrt(2) times that; one output f stands for the logits (f, -f), whose margin is 2 f.

    Args:
        description: name, library, layers, build and shape of `Network`.
        claim: about the map to all logits.
        outputs: of the network.
        holds: whether the claim is true.
        why: reason why it is true or false.
        options: other fields of `Network`.
    """
    margin = (2.0 if outputs == 1 else math.sqrt(2.0)) * claim
    return Network(*description, claim, margin, holds, why, **{"freeze": vanilla, **options})


def per_logit(*description: Any, k: int = 10, **options: Any) -> Network:
    """Return a network whose head has k rows of norm 1, on a body of constant 1; other arguments as of `jointly`."""
    return Network(*description, math.sqrt(k), 2.0, True, ITERATIONS, vanilla, **options)


def nothing_claimed(*description: Any, **options: Any) -> Network:
    """Return a network of plain torch; name, layers, build and shape, and other fields of `Network`."""
    name, *others = description
    return Network(name, TORCH, *others, None, None, True, "no claim", as_it_is, **{"steps": 40, **options})


PIXELS_TOO_OFTEN = (
    "false: the factor 1 / k of a k x k kernel counts a pixel in k k patches, and this padding puts pixels near the "
    "border in more"
)
