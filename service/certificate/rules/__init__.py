"""Rules of ONNX operators, one module for each kind; importing the package registers all of them in `table.RULES`."""

from service.certificate.rules import (
    activations,
    arithmetic,
    convolution,
    piecewise,
    pooling,
    rearrangements,
    reductions,
    resizing,
    selections,
    squares,
)

__all__ = [
    "activations",
    "arithmetic",
    "convolution",
    "piecewise",
    "pooling",
    "rearrangements",
    "reductions",
    "resizing",
    "selections",
    "squares",
]
