"""Pullbacks of matrix products, convolutions, batch normalisation, resampling and average pools."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from service.network.adjoint.builder import (
    Builder,
    Cotangents,
    constant_of,
    pulls_back,
    tensor_of,
)
from service.network.adjoint.elementwise import divided, only
from service.network.operators import Constant, Operator, Shape, Tensor


@pulls_back("Gemm")
def _gemm(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `alpha g W^T`."""
    g, x = only(cotangents), tensor_of(operator)
    transposed = operator.integer("transB")
    alpha = operator.number("alpha")
    gradient = b.one("Gemm", [g, operator.operands[1]], x.shape, alpha=alpha, beta=1.0, transA=0, transB=1 - transposed)
    return [gradient, *[None] * (len(operator.operands) - 1)]


@pulls_back("MatMul")
def _matmul(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g W^T`, or `W^T g` where the constant stands left."""
    g, (left, right) = only(cotangents), operator.operands
    if isinstance(left, Tensor):
        if len(left.shape) == 1:
            return [b.one("Gemm", [g, right], left.shape, alpha=1.0, beta=1.0, transA=0, transB=1), None]
        return [b.one("MatMul", [g, Constant(constant_of(operator, 1).T)], left.shape), None]
    x = tensor_of(operator, 1)
    return [None, b.one("MatMul", [Constant(constant_of(operator, 0).T), g], x.shape)]


def _steps(operator: Operator) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Return strides, dilations, pads and groups."""
    return (
        operator.integers("strides"),
        operator.integers("dilations"),
        operator.integers("pads"),
        operator.integer("group"),
    )


def transposed_convolution(
    b: Builder,
    g: Tensor,
    kernel: np.ndarray,
    shape: Shape,
    *,
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    group: int,
) -> Tensor:
    """Return the adjoint of a zero-padded convolution.

    Args:
        b: appends the operator.
        g: of the shape of the convolution's result.
        kernel: of the convolution.
        shape: of the convolution's image.
        strides: of the convolution.
        dilations: of the convolution.
        pads: of the convolution, before each axis and after.
        group: of the convolution.
    """
    axes = len(strides)
    # Pixels at the end that no window reaches.
    extra = [
        n + pads[axis] + pads[axes + axis] - ((m - 1) * s + (k - 1) * d + 1)
        for axis, (n, m, k, s, d) in enumerate(
            zip(shape[1:], g.shape[1:], kernel.shape[2:], strides, dilations, strict=True)
        )
    ]
    return b.one(
        "ConvTranspose",
        [g, b.number(kernel)],
        shape,
        dilations=tuple(dilations),
        group=group,
        output_padding=tuple(extra),
        pads=tuple(pads),
        strides=tuple(strides),
    )


@pulls_back("Conv")
def _convolution(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return the transposed convolution of `g`."""
    strides, dilations, pads, group = _steps(operator)
    kernel, shape = constant_of(operator, 1), tensor_of(operator).shape
    gradient = transposed_convolution(
        b, only(cotangents), kernel, shape, strides=strides, dilations=dilations, pads=pads, group=group
    )
    return [gradient, *[None] * (len(operator.operands) - 1)]


@pulls_back("ConvTranspose")
def _transposed(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return the convolution of `g`."""
    strides, dilations, pads, group = _steps(operator)
    g, x = only(cotangents), tensor_of(operator)
    axes = len(strides)
    kernel = constant_of(operator, 1)
    # Windows beyond the image, where output padding added pixels, are cut off by smaller pads.
    short = [
        (m - 1) * s + (k - 1) * d + 1 - n - pads[axis] - pads[axes + axis]
        for axis, (n, m, k, s, d) in enumerate(
            zip(g.shape[1:], x.shape[1:], kernel.shape[2:], strides, dilations, strict=True)
        )
    ]
    if any(missing < 0 for missing in short):
        starts, stops = [0] * axes, [n + min(0, missing) for n, missing in zip(g.shape[1:], short, strict=True)]
        names = list(range(2, axes + 2))
        g = b.one(
            "Slice",
            [g, b.indices(*starts), b.indices(*stops), b.indices(*names), b.indices(*[1] * axes)],
            (g.shape[0], *stops),
        )
    gradient = b.one(
        "Conv",
        [g, b.number(kernel)],
        x.shape,
        dilations=tuple(dilations),
        group=group,
        pads=tuple(pads),
        strides=tuple(strides),
    )
    return [gradient, *[None] * (len(operator.operands) - 1)]


@pulls_back("BatchNormalization")
def _normalized(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g scale / sqrt(variance + epsilon)`."""
    g = only(cotangents)
    scale, variance = (constant_of(operator, position).astype(np.float64) for position in (1, 4))
    factor = scale / np.sqrt(variance + operator.number("epsilon"))
    column = factor.reshape(-1, *[1] * (len(g.shape) - 1))
    return [b.times(g, b.number(column)), *[None] * 4]


def _spread(b: Builder, operator: Operator, g: Tensor) -> Tensor:
    """Return the sum over all windows that hold a pixel of the `g` of the window."""
    x = tensor_of(operator)
    kernel = np.ones((x.shape[0], 1, *operator.integers("kernel_shape")))
    return transposed_convolution(
        b,
        g,
        kernel,
        x.shape,
        strides=operator.integers("strides"),
        dilations=operator.integers("dilations"),
        pads=operator.integers("pads"),
        group=x.shape[0],
    )


def _counts(operator: Operator) -> np.ndarray:
    """Return the number of pixels of the image in each window of a pool: the product of the counts along its axes."""
    x = tensor_of(operator)
    strides, dilations = operator.integers("strides"), operator.integers("dilations")
    pads, axes = operator.integers("pads"), len(strides)
    result = np.ones(())
    for axis, (n, m, k) in enumerate(
        zip(x.shape[1:], operator.results[0].shape[1:], operator.integers("kernel_shape"), strict=True)
    ):
        taps = np.arange(m)[:, None] * strides[axis] + np.arange(k) * dilations[axis] - pads[axis]
        result = np.multiply.outer(result, ((taps >= 0) & (taps < n)).sum(axis=1))
    return result.reshape(operator.results[0].shape[1:]) if axes else result


@pulls_back("AveragePool")
def _average_pool(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g / divisor`, for each pixel summed over its windows."""
    g = only(cotangents)
    counted = operator.number("count_include_pad")
    divisors = np.array(math.prod(operator.integers("kernel_shape"))) if counted else _counts(operator)
    return [_spread(b, operator, b.times(g, b.number(1.0 / divisors)))]


@pulls_back("LpPool")
def _l2_pool(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `x` times, summed over its windows, `g / y`."""
    g, x = only(cotangents), tensor_of(operator)
    return [b.times(x, _spread(b, operator, divided(b, g, operator.results[0])))]


@pulls_back("GlobalAveragePool")
def _global_average(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g / n` for each pixel."""
    g, x = only(cotangents), tensor_of(operator)
    return [b.expanded(b.times(g, b.number(1.0 / math.prod(x.shape[1:]))), x.shape)]


@pulls_back("Resize")
def _resized(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return the product of `g` with the transposed matrix of each axis."""
    g, x = only(cotangents), tensor_of(operator)
    for axis in operator.integers("axes"):
        matrix = interpolation(operator, x.shape[axis - 1], operator.results[0].shape[axis - 1], axis)
        order = [index for index in range(len(g.shape)) if index != axis - 1] + [axis - 1]
        moved = b.transpose(g, order)
        product = b.one("MatMul", [moved, b.number(matrix)], (*moved.shape[:-1], matrix.shape[1]))
        g = b.transpose(product, [order.index(index) for index in range(len(order))])
    return [g, *[None] * (len(operator.operands) - 1)]


def interpolation(operator: Operator, length: int, size: int, axis: int) -> np.ndarray:
    """Return the matrix `size x length` by which a Resize maps one axis, in float64.

    Args:
        operator: a Resize.
        length: of the axis before.
        size: of the axis after.
        axis: as the operator names it.
    """
    position = operator.integers("axes").index(axis)
    scales = operator.operands[2] if len(operator.operands) > 2 else None
    scale = float(scales.array[position]) if isinstance(scales, Constant) else size / length
    j = np.arange(size, dtype=np.float64)
    match operator.text("coordinate_transformation_mode"):
        case "asymmetric":
            x = j / scale
        case "align_corners":
            x = j * (length - 1) / (size - 1) if size > 1 else np.zeros(size)
        case "pytorch_half_pixel" if size == 1:
            x = np.zeros(size)
        case _:
            x = (j + 0.5) / scale - 0.5
    matrix = np.zeros((size, length))
    rows = np.arange(size)
    if operator.text("mode") == "nearest":
        round_ = {
            "round_prefer_floor": lambda v: np.ceil(v - 0.5),
            "round_prefer_ceil": lambda v: np.floor(v + 0.5),
            "floor": np.floor,
            "ceil": np.ceil,
        }[operator.text("nearest_mode")]
        matrix[rows, np.clip(round_(x), 0, length - 1).astype(int)] = 1.0
        return matrix
    inside = np.clip(x, 0.0, length - 1.0)
    first = np.floor(inside).astype(int)
    np.add.at(matrix, (rows, first), 1.0 - (inside - first))
    np.add.at(matrix, (rows, np.minimum(first + 1, length - 1)), inside - first)
    return matrix
