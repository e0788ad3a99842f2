"""Windows over an image: pads and output sizes of convolutions and pools, and the lowering of pools."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.network.lowering.table import Inputs, Known, Reading, lowers, operand, tensor_operand
from service.network.nodes import Node
from service.network.operators import Constant, Refusal

Pads = list[tuple[int, int]]
_SAME = ("SAME_UPPER", "SAME_LOWER")
_GAPS = "auto_pad of windows with gaps, which runtimes read in two ways; give the pads as numbers"
_POOL_ATTRIBUTES = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")


def extent_of(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Return how many pixels a dilated kernel spans along each axis."""
    return [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]


def pads_of(node: Node, size: Sequence[int], extent: Sequence[int], strides: Sequence[int]) -> Pads:
    """Return the pixels before and after each spatial axis, `auto_pad` resolved as ONNX defines it.

    Args:
        node: the convolution or pool.
        size: of the image.
        extent: of the window.
        strides: of the window.

    Raises:
        Refusal: negative pads, an unknown mode, or one that leaves pixels out.
    """
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = node.sizes("pads", [0] * (2 * len(size)))
        if min(pads, default=0) < 0:
            raise Refusal("negative pads; use Slice")
        return list(zip(pads[: len(size)], pads[len(size) :], strict=True))
    if node.listed("pads") and any(node.sizes("pads", [0] * (2 * len(size)))):
        raise Refusal("both auto_pad and pads; give one")
    if mode == "VALID":
        return [(0, 0)] * len(size)
    if mode not in _SAME:
        raise Refusal(f"auto_pad {mode!r} has no proved rule")
    found: Pads = []
    for n, k, s in zip(size, extent, strides, strict=True):
        total = (-(-n // s) - 1) * s + k - n
        if total < 0:
            raise Refusal(_GAPS)
        small, large = total // 2, total - total // 2
        found.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return found


def output_size(size: Sequence[int], extent: Sequence[int], strides: Sequence[int], pads: Pads) -> list[int]:
    """Return how many windows fit along each axis.

    Args:
        size: of the image.
        extent: of the window.
        strides: of the window.
        pads: pixels before and after.

    Raises:
        Refusal: the window is larger than the padded image.
    """
    if any(n + low + high < k for n, (low, high), k in zip(size, pads, extent, strict=True)):
        raise Refusal("the kernel is larger than the padded image")
    return [(n + low + high - k) // s + 1 for n, (low, high), k, s in zip(size, pads, extent, strides, strict=True)]


def _geometry(node: Node, shape: tuple[int, ...]) -> tuple[list[int], dict[str, tuple[int, ...]]]:
    """Return the output size of a pool and its attributes, with `ceil_mode` as additional pads at the end."""
    axes = len(shape) - 1
    kernel = node.sizes("kernel_shape", [0] * axes)
    strides, dilations = node.sizes("strides", [1] * axes), node.sizes("dilations", [1] * axes)
    if axes < 1 or min(*kernel, *strides, *dilations) < 1:
        raise Refusal(f"kernel {kernel}, strides {strides} and dilations {dilations} must be 1 or more")
    same = node.attributes.get("auto_pad", "NOTSET") in _SAME
    if same and set(dilations) != {1}:
        raise Refusal(_GAPS)
    extent = extent_of(kernel, dilations)
    pads = pads_of(node, shape[1:], extent, strides)
    if node.flag("ceil_mode", 0) and not same:
        ceiled = [_ceiled(n, k, s, pad) for n, k, s, pad in zip(shape[1:], extent, strides, pads, strict=True)]
        if ceiled != pads and node.attributes.get("auto_pad", "NOTSET") == "VALID":
            raise Refusal("auto_pad VALID with ceil_mode, which runtimes read in two ways; give the pads as numbers")
        pads = ceiled
    size = output_size(shape[1:], extent, strides, pads)
    if any(low >= k or high >= k for (low, high), k in zip(pads, extent, strict=True)):
        raise Refusal("pads as large as the window: a window holds padding only")
    attributes = {
        "dilations": tuple(dilations),
        "kernel_shape": tuple(kernel),
        "pads": (*(low for low, _ in pads), *(high for _, high in pads)),
        "strides": tuple(strides),
    }
    return size, attributes


def _ceiled(n: int, extent: int, stride: int, pad: tuple[int, int]) -> tuple[int, int]:
    """Return pads that give the windows of `ceil_mode=1`: one more, if it starts in the image or before it."""
    low, high = pad
    rest = (n + low + high - extent) % stride
    if rest == 0:
        return pad
    start = n + low + high - extent - rest + stride
    if start >= n + low:
        return pad
    return low, high + stride - rest


@lowers("MaxPool", versions=(1, 8, 10, 11, 12, 22), attributes=(*_POOL_ATTRIBUTES, "storage_order"))
def _max_pool(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the windows."""
    if len([name for name in node.outputs if name]) > 1:
        raise Refusal("the indices of a maximum jump and have no Lipschitz constant")
    x = tensor_operand(operand(inputs, 0))
    size, attributes = _geometry(node, x.shape)
    return reading.emit(node, [x], (x.shape[0], *size), **attributes)


@lowers("AveragePool", versions=(7, 10, 11, 19, 22), attributes=(*_POOL_ATTRIBUTES, "count_include_pad"))
def _average_pool(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the windows, and whether pads count."""
    x = tensor_operand(operand(inputs, 0))
    size, attributes = _geometry(node, x.shape)
    counted = node.flag("count_include_pad", 0)
    if counted and node.flag("ceil_mode", 0):
        raise Refusal("ceil_mode with count_include_pad, which runtimes read in two ways; give the pads as numbers")
    return reading.emit(node, [x], (x.shape[0], *size), count_include_pad=int(counted), **attributes)


@lowers("LpPool", versions=(11, 18, 22), attributes=(*_POOL_ATTRIBUTES, "p"))
def _lp_pool(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the windows and the exponent."""
    x = tensor_operand(operand(inputs, 0))
    size, attributes = _geometry(node, x.shape)
    return reading.emit(node, [x], (x.shape[0], *size), p=node.integer("p", 2), **attributes)


@lowers("GlobalAveragePool", "GlobalMaxPool", versions=(1, 22))
def _global_pool(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return one number for each channel."""
    x = tensor_operand(operand(inputs, 0))
    if len(x.shape) < 2:
        raise Refusal("it needs channels and at least one spatial axis")
    return reading.emit(node, [x], (x.shape[0], *[1] * (len(x.shape) - 1)))


@lowers("GlobalLpPool", versions=(2, 22), attributes=("p",))
def _global_lp_pool(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return ReduceL2 over the spatial axes."""
    x = tensor_operand(operand(inputs, 0))
    if len(x.shape) < 2:
        raise Refusal("it needs channels and at least one spatial axis")
    if node.integer("p", 2) != 2:
        raise Refusal("p other than 2 has no proved rule")
    axes = Constant(np.arange(2, len(x.shape) + 1))
    shape = (x.shape[0], *[1] * (len(x.shape) - 1))
    return reading.emit(node.called("ReduceL2"), [x, axes], shape, keepdims=1, noop_with_empty_axes=0)
