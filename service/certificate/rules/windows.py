"""Geometry of sliding windows: padding, dilation and stride of convolutions and pools.

Axes: C channels, S spatial axes of the image, `out` those of the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from service.network.operators import Operator

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

    def largest(self, padded: NDArray[Number]) -> NDArray[Number]:
        """Return the largest element of each window of a padded array `... x *S`: `... x *out`, one axis at a time."""
        for axis, (after, stride) in enumerate(zip(self.after, self.strides, strict=True), start=-len(self.kernel)):
            moved = np.moveaxis(padded, axis, -1)
            starts = (k * self.dilations[axis] for k in range(self.kernel[axis]))
            picks = [moved[..., start : start + (after - 1) * stride + 1 : stride] for start in starts]
            best = picks[0].copy()
            for pick in picks[1:]:
                np.maximum(best, pick, out=best)
            padded = np.moveaxis(best, -1, axis)
        return padded

    def uses(self) -> int:
        """Return in how many windows the pixel lies that lies in the most."""
        most = 1
        for axis, (low, _) in enumerate(self.pads):
            times = np.zeros(self.padded[axis], np.int64)
            reach = (self.after[axis] - 1) * self.strides[axis] + 1
            for tap in range(self.kernel[axis]):
                start = tap * self.dilations[axis]
                times[start : start + reach : self.strides[axis]] += 1
            most *= int(times[low : low + self.size[axis]].max())
        return most

    def positions(self) -> NDArray[np.int64]:
        """Return the positions of each window in the flattened image, -1 in the padding: `*out x taps`."""
        image = np.arange(math.prod(self.size)).reshape(self.size)
        return self.of(np.pad(image, self.pads, constant_values=-1))


def windows_of(node: Operator, size: Sequence[int], kernel: Sequence[int]) -> Windows:
    """Return the windows of Conv or a pool.

    Args:
        node: its strides, dilations and pads.
        size: spatial size of the image, `*S`.
        kernel: taps along each axis.
    """
    return Windows(tuple(size), tuple(kernel), node.integers("strides"), node.integers("dilations"), pads_of(node))


def pads_of(node: Operator) -> tuple[tuple[int, int], ...]:
    """Return the zeros before and after the image, along each axis."""
    pads = node.integers("pads")
    axes = len(pads) // 2
    return tuple(zip(pads[:axes], pads[axes:], strict=True))
