"""Average and maximum pools."""

from __future__ import annotations

import math

import numpy as np
from flint import arb

from service.audit.affine import linear
from service.audit.balls import NotAuditableError
from service.audit.graph import Node
from service.audit.maps import Shared, ball_weights
from service.audit.matrices import require_size
from service.audit.network import Network, Tensor
from service.audit.nonexpansive import ABSENT, each_group, largest_of
from service.audit.operators.table import Operands, rule, tensor
from service.audit.operators.windows import windows

POOL_ATTRIBUTES = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")


def pool_windows(node: Node, x: Tensor) -> tuple[tuple[int, ...], np.ndarray]:
    """As `windows`, for all channels: `C out x taps`, -1 for padding.

    Raises:
        NotAuditableError: `ceil_mode`, no spatial axes, or a window of padding only.
    """
    if node.integer("ceil_mode", 0) or len(x.shape) < 2:
        raise NotAuditableError("ceil_mode, or no spatial axes")
    kernel = node.integers("kernel_shape", [0] * (len(x.shape) - 1))
    after, window = windows(node, x.shape[1:], kernel)
    if (window < 0).all(axis=1).any():
        raise NotAuditableError("a window holds padding only")
    channels, pixels = x.shape[0], math.prod(x.shape[1:])
    require_size(channels * window.size)
    places = np.where(window < 0, -1, window + (np.arange(channels) * pixels)[:, None, None])
    return (channels, *after), places.reshape(-1, window.shape[1])


@rule("AveragePool", attributes=(*POOL_ATTRIBUTES, "count_include_pad"))
def _average_pool(network: Network, node: Node, operands: Operands) -> Tensor:
    x = tensor(operands)
    shape, places = pool_windows(node, x)
    taps = places.shape[1]
    counts = np.full(len(places), taps) if node.integer("count_include_pad", 0) else (places >= 0).sum(axis=1)
    made = np.zeros(len(places), dtype=np.int64)
    # Windows at the border may hold fewer numbers.
    for count in np.unique(counts).tolist():
        operator = Shared(ball_weights([arb(1) / count] * taps, 1), places[counts == count], x.flat.size)
        made[counts == count] = linear(network, x.flat, operator, taps + 2)
    return Tensor(made.reshape(shape))


@rule("MaxPool", attributes=(*POOL_ATTRIBUTES, "storage_order"))
def _max_pool(network: Network, node: Node, operands: Operands) -> Tensor:
    x = tensor(operands)
    if len(node.outputs) > 1:
        raise NotAuditableError("its indices jump")
    shape, places = pool_windows(node, x)
    return Tensor(each_group(network, np.where(places < 0, ABSENT, x.flat[places]), largest_of).reshape(shape))
