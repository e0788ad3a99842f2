"""Pullbacks of reductions, sorts, maxima of windows and softmax."""

from __future__ import annotations

import math

import numpy as np

from service.network.adjoint.builder import (
    Builder,
    Cotangents,
    constant_of,
    pulls_back,
    tensor_of,
)
from service.network.adjoint.elementwise import divided, only
from service.network.operators import Constant, Operator, Tensor


def _axes(operator: Operator) -> list[int]:
    """Return the reduced axes, as those of the image's shape."""
    return [axis - 1 for axis in constant_of(operator, 1).tolist()]


def _kept(b: Builder, operator: Operator, of: Tensor) -> Tensor:
    """Return a tensor of the result's shape with the reduced axes as axes of length 1."""
    axes = _axes(operator)
    return b.reshape(of, [1 if axis in axes else n for axis, n in enumerate(tensor_of(operator).shape)])


@pulls_back("ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare")
def _reduction(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` for each element, times the slope of its share."""
    x = tensor_of(operator)
    g = _kept(b, operator, only(cotangents))
    match operator.kind:
        case "ReduceMean":
            n = math.prod(x.shape[axis] for axis in _axes(operator))
            gradient = b.expanded(b.times(g, b.number(1.0 / n)), x.shape)
        case "ReduceL1":
            gradient = b.times(b.one("Sign", [x], x.shape), g)
        case "ReduceL2":
            gradient = b.times(x, divided(b, g, _kept(b, operator, operator.results[0])))
        case "ReduceSumSquare":
            gradient = b.times(x, b.times(g, b.number(2.0)))
        case _:
            gradient = b.expanded(g, x.shape)
    return [gradient, None]


def _placed(b: Builder, x: Tensor, g: Tensor, axis: int, largest: bool) -> Tensor:
    """Return zeros but for `g`, of length 1 along the axis, where x has its first largest (smallest) element."""
    kind = "ArgMax" if largest else "ArgMin"
    at = b.one(kind, [x], g.shape, axis=axis + 1, keepdims=1, select_last_index=0)
    return b.one("ScatterElements", [b.zeros_like(x), at, g], x.shape, axis=axis + 1, reduction="none")


@pulls_back("ReduceMax", "ReduceMin")
def _extremum(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` for the first element that is the largest (smallest)."""
    x, axes = tensor_of(operator), _axes(operator)
    g = _kept(b, operator, only(cotangents))
    largest = operator.kind == "ReduceMax"
    if len(axes) == 1:
        return [_placed(b, x, g, axes[0], largest), None]
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    order = kept + axes
    outer = [x.shape[axis] for axis in kept]
    moved = b.transpose(x, order)
    flat = b.reshape(moved, [*outer, math.prod(x.shape[axis] for axis in axes)])
    placed = _placed(b, flat, b.reshape(b.transpose(g, order), [*outer, 1]), len(outer), largest)
    back = b.reshape(placed, moved.shape)
    return [b.transpose(back, [order.index(axis) for axis in range(len(order))]), None]


@pulls_back("GlobalMaxPool")
def _global_maximum(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` for the first largest pixel of each channel."""
    g, x = only(cotangents), tensor_of(operator)
    flat = b.reshape(x, [x.shape[0], math.prod(x.shape[1:])])
    placed = _placed(b, flat, b.reshape(g, [x.shape[0], 1]), 1, True)
    return [b.reshape(placed, x.shape)]


@pulls_back("MaxPool")
def _window_maximum(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return, for each pixel, the sum of the `g` of the windows of which it is the first largest."""
    g, x = only(cotangents), tensor_of(operator)
    windows = _windows(operator)
    pixels, (outputs, taps) = math.prod(x.shape[1:]), windows.shape
    flat = b.reshape(x, [x.shape[0], pixels])
    lowest = b.number(float(np.finfo(b.precision).min))
    padded = b.one("Pad", [flat, b.indices(0, 0, 0, 0, 0, 1), lowest], (x.shape[0], pixels + 1), mode="constant")
    picked = b.one("Gather", [padded, Constant(windows)], (x.shape[0], outputs, taps), axis=2)
    tap = b.one("ArgMax", [picked], (x.shape[0], outputs), axis=3, keepdims=0, select_last_index=0)
    # The pixel at each tap: offset of the window's row in the table of positions, plus the tap.
    row = Constant(np.arange(outputs, dtype=np.int64) * taps)
    place = b.one("Add", [tap, row], (x.shape[0], outputs))
    pixel = b.one("Gather", [Constant(windows.reshape(-1)), place], (x.shape[0], outputs), axis=0)
    summed = b.one(
        "ScatterElements",
        [b.zeros_like(flat), pixel, b.reshape(g, [x.shape[0], outputs])],
        flat.shape,
        axis=2,
        reduction="add",
    )
    return [b.reshape(summed, x.shape)]


def _windows(operator: Operator) -> np.ndarray:
    """Return the positions of a pool's windows in a flat channel, `out x taps`; that behind the last for padding."""
    x, result = tensor_of(operator), operator.results[0]
    strides, dilations = operator.integers("strides"), operator.integers("dilations")
    pads, kernel = operator.integers("pads"), operator.integers("kernel_shape")
    axes = len(strides)
    grid = np.zeros([*result.shape[1:], *kernel], np.int64)
    inside = np.ones(grid.shape, bool)
    for axis, (n, m, k) in enumerate(zip(x.shape[1:], result.shape[1:], kernel, strict=True)):
        taps = np.arange(m)[:, None] * strides[axis] + np.arange(k) * dilations[axis] - pads[axis]
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = m, k
        grid = grid * n + taps.reshape(shape)
        inside &= ((taps >= 0) & (taps < n)).reshape(shape)
    pixels = math.prod(x.shape[1:])
    return np.where(inside, grid, pixels).reshape(math.prod(result.shape[1:]), math.prod(kernel))


@pulls_back("TopK")
def _sort(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return each `g` at the place that its element came from."""
    g, x = only(cotangents), tensor_of(operator)
    axis = operator.integer("axis")
    placed = b.one("ScatterElements", [b.zeros_like(x), operator.results[1], g], x.shape, axis=axis, reduction="none")
    return [placed, None]


@pulls_back("Softmax", "LogSoftmax")
def _softmax(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `p (g - sum g p)`, or `g - p sum g` of the logarithm."""
    g, y = only(cotangents), operator.results[0]
    axis = operator.integer("axis") - 1
    if operator.kind == "Softmax":
        inner = b.reduced("ReduceSum", b.times(g, y), [axis])
        return [b.times(b.one("Sub", [g, inner], y.shape), y)]
    p = b.one("Exp", [y], y.shape)
    return [b.one("Sub", [g, b.times(p, b.reduced("ReduceSum", g, [axis]))], y.shape)]
