"""Windows of convolutions and pools: which pixels each result is computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from service.audit.balls import NotAuditableError
from service.audit.graph import Node


def pads_of(node: Node, size: Sequence[int], extent: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Return the zeros before each axis, then after each; `auto_pad` as ONNX defines it.

    Args:
        node: has the attributes `auto_pad` and `pads`.
        size: of the image, per axis.
        extent: of the window, per axis.
        strides: per axis.

    Raises:
        NotAuditableError: negative pads, or an unknown mode.
    """
    mode = node.text("auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = node.integers("pads", [0] * (2 * len(size)))
        if min(pads, default=0) < 0:
            raise NotAuditableError("negative pads")
        return pads
    if mode == "VALID":
        return [0] * (2 * len(size))
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise NotAuditableError(f"auto_pad {mode!r}")
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(size, extent, strides, strict=True)]
    less = [total // 2 for total in totals]
    more = [total - half for total, half in zip(totals, less, strict=True)]
    return less + more if mode == "SAME_UPPER" else more + less


def windows(node: Node, size: Sequence[int], kernel: Sequence[int]) -> tuple[tuple[int, ...], np.ndarray]:
    """Return the shape of the result, and for each of its places the places of the window in one channel.

    Args:
        node: has the attributes `strides`, `dilations`, `auto_pad` and `pads`.
        size: of the image, per axis.
        kernel: size of the window, per axis.

    Returns:
        Sizes after the operator; places x taps, -1 for padding.

    Raises:
        NotAuditableError: the attributes do not fit the sizes.
    """
    axes = len(size)
    strides, dilations = node.integers("strides", [1] * axes), node.integers("dilations", [1] * axes)
    if len(kernel) != axes or min([*kernel, *strides, *dilations], default=0) < 1:
        raise NotAuditableError("its kernel, strides or dilations do not fit")
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = pads_of(node, size, extent, strides)
    after = tuple((size[a] + pads[a] + pads[a + axes] - extent[a]) // strides[a] + 1 for a in range(axes))
    if min(after) < 1:
        raise NotAuditableError("the window is larger than the padded image")
    places = np.zeros((math.prod(after), math.prod(kernel)), dtype=np.int64)
    outside = np.zeros(places.shape, dtype=bool)
    outs, taps = np.indices(after).reshape(axes, -1, 1), np.indices(tuple(kernel)).reshape(axes, 1, -1)
    for a in range(axes):
        along = outs[a] * strides[a] + taps[a] * dilations[a] - pads[a]
        outside |= (along < 0) | (along >= size[a])
        places = places * size[a] + along
    return after, np.where(outside, -1, places)
