"""The two graphs that run: the network itself, and its gradient; both in canonical ONNX."""

from __future__ import annotations

from dataclasses import dataclass

from service.network.adjoint import differentiate
from service.network.operators import Network
from service.network.writer import Piece, joined, write_pieces


@dataclass(frozen=True)
class Graph:
    """A written graph."""

    pieces: list[Piece]
    """Bytes and weights, in the order of the file."""

    @property
    def content(self) -> bytes:
        """The serialised model."""
        return joined(self.pieces)


def forward_graph(network: Network) -> Graph:
    """Return the graph of input `image` and output `logits`."""
    return Graph(write_pieces(network, ("image",), ("logits",)))


def gradient_graph(network: Network) -> Graph:
    """Return the graph of inputs `image` and `margin_weights` and outputs `logits` and `gradient`.

    `gradient` is that of `sum_k margin_weights[k] logits[k]` with respect to the image. The logits are computed by the
    operators of the forward graph.

    Raises:
        UnsupportedModelError: an operator has no gradient; the message names each.
    """
    return Graph(write_pieces(differentiate(network), ("image", "margin_weights"), ("logits", "gradient")))
