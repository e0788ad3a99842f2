"""The two graphs that run: the network itself, and its gradient; both in canonical ONNX."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from service.network.adjoint import differentiate
from service.network.operators import Constant, Network
from service.network.writer import write


class Graph(NamedTuple):
    """One graph."""

    content: bytes
    """Serialised."""
    stored: tuple[np.ndarray, ...]
    """Its constants, each once."""


def forward_graph(network: Network) -> Graph:
    """Return the graph of input `image` and output `logits`."""
    return Graph(write(network), _stored(network))


def gradient_graph(network: Network) -> Graph:
    """Return the graph of inputs `image` and `margin_weights` and outputs `logits` and `gradient`.

    `gradient` is that of `sum_k margin_weights[k] logits[k]` with respect to the image. The logits are computed by the
    operators of the forward graph.

    Raises:
        UnsupportedModelError: an operator has no gradient; the message names each.
    """
    gradient = differentiate(network)
    return Graph(write(gradient, ("image", "margin_weights"), ("logits", "gradient")), _stored(gradient))


def _stored(network: Network) -> tuple[np.ndarray, ...]:
    operands = (operand for operator in network.operators for operand in operator.operands)
    return tuple(one.array for one in dict.fromkeys(operands) if isinstance(one, Constant))
