"""Geometry of sliding windows: padding, dilation and stride of convolutions and pools.

Axes: C channels, S spatial axes of the image, `out` those of the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from service.certificate.graph import Node
from service.certificate.rules.operands import Refusal, integers_attribute

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class Windows:
    """How a window slides over the spatial axes of an image."""

    size: tuple[int, ...]
    """Of the image before padding, `*S`."""
    kernel: tuple[int, ...]
    """Taps along each axis."""
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    """Zeros before and after the image, along each axis."""

    @property
    def extent(self) -> tuple[int, ...]:
        """Points that a window covers along each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def whole_strides(self) -> tuple[int, ...]:
        """The extent of a window, filled up to whole strides (a kernel is stored so, see `convolutions`)."""
        return tuple(-(-k // s) * s for k, s in zip(self.extent, self.strides, strict=True))

    @property
    def padded(self) -> tuple[int, ...]:
        """Size of the padded image."""
        return tuple(n + low + high for n, (low, high) in zip(self.size, self.pads, strict=True))

    @property
    def after(self) -> tuple[int, ...]:
        """Size of the result, `*out`."""
        return tuple((n - k) // s + 1 for n, k, s in zip(self.padded, self.extent, self.strides, strict=True))

    def of(self, padded: NDArray[Number]) -> NDArray[Number]:
        """Return the windows `... x *out x taps` of a padded array `... x *S`."""
        axes = len(self.kernel)
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.extent, axis=tuple(range(-axes, 0)))
        picks = tuple(slice(None, None, stride) for stride in self.strides)
        taps = tuple(slice(None, None, dilation) for dilation in self.dilations)
        chosen = windows[(..., *picks, *taps)]
        return chosen.reshape(*chosen.shape[:-axes], -1)

    def positions(self) -> NDArray[np.int64]:
        """Return the positions of each window in the flattened image, -1 in the padding: `*out x taps`."""
        image = np.arange(math.prod(self.size)).reshape(self.size)
        return self.of(np.pad(image, self.pads, constant_values=-1))


def read_windows(node: Node, size: Sequence[int], kernel: Sequence[int]) -> Windows:
    """Return the windows of a node; `auto_pad` as ONNX defines it.

    Args:
        node: Conv or a pool: its strides, dilations and pads.
        size: spatial size of the image, `*S`.
        kernel: taps along each axis.

    Raises:
        Refusal: an attribute has no proved rule, or a window is larger than the padded image.
    """
    axes = len(size)
    strides = integers_attribute(node, "strides", [1] * axes)
    dilations = integers_attribute(node, "dilations", [1] * axes)
    if min(*kernel, *strides, *dilations) < 1:
        raise Refusal("its kernel, strides and dilations must be positive")
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(node, size, extent, strides)
    found = Windows(tuple(size), tuple(kernel), tuple(strides), tuple(dilations), tuple(pads))
    if any(n < k for n, k in zip(found.padded, extent, strict=True)):
        raise Refusal("the window is larger than the padded image")
    return found


def explicit_pads(node: Node, axes: int) -> list[tuple[int, int]]:
    """Return the attribute `pads`: zeros before and after each of some axes.

    Raises:
        Refusal: a pad is negative.
    """
    pads = integers_attribute(node, "pads", [0] * (2 * axes))
    if min(pads, default=0) < 0:
        raise Refusal("negative pads; use Slice")
    return list(zip(pads[:axes], pads[axes:], strict=True))


def _pads(node: Node, size: Sequence[int], extent: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return explicit_pads(node, len(size))
    if mode == "VALID":
        return [(0, 0)] * len(size)
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise Refusal(f"auto_pad {mode!r} has no proved rule")
    found: list[tuple[int, int]] = []
    for n, k, s in zip(size, extent, strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        small, large = total // 2, total - total // 2
        found.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return found
