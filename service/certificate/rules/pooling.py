"""TODO: service/certificate/rules/pooling.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.certificate.convolutions import (
    convolution_norm_bound,
    dilated,
)
from service.certificate.graph import Node
from service.certificate.rounding import div_up, mul_up, sqrt_up
from service.certificate.rules.convolution import numbers_of, pads_of, windows_of
from service.certificate.rules.operands import (
    Array,
    Operands,
    Refusal,
    data_operand,
    flag_attribute,
)
from service.certificate.rules.table import Context, linear_result, rule
from service.certificate.values import Convolution, Value


def _coverage(
    size: Sequence[int],
    pads: Sequence[tuple[int, int]],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> NDArray[np.int64]:
    """Indices into the image (one channel) of each window, -1 for padding: `*out x window`."""
    positions = np.arange(math.prod(size)).reshape(1, *size)
    return windows_of(np.pad(positions, [(0, 0), *pads], constant_values=-1), kernel, strides, dilations)[0]


def _pool_geometry(node: Node, shape: tuple[int, ...]) -> tuple[list[int], list[int], list[int], list[tuple[int, int]]]:
    axes = len(shape) - 1
    if axes not in (1, 2):
        raise Refusal(f"{axes} spatial axes; the rule covers 1 and 2")
    if flag_attribute(node, "ceil_mode", 0):
        raise Refusal("ceil_mode=1 has no proved rule")
    kernel = numbers_of(node, "kernel_shape", [0] * axes)
    strides, dilations = numbers_of(node, "strides", [1] * axes), numbers_of(node, "dilations", [1] * axes)
    if node.attributes.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        apart = any((-(-n // s) - 1) * s + k < n for n, k, s in zip(shape[1:], kernel, strides, strict=True))
        if apart or set(dilations) != {1}:
            raise Refusal("auto_pad of windows with gaps, which runtimes read in two ways; give the pads as numbers")
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return kernel, strides, dilations, pads_of(node, shape[1:], extent, strides)


POOL_ATTRIBUTES = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")


def pool_windows(node: Node, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], Array]:
    """Positions `C x *out x window` in a flattened `C x *S` image, -1 for padding, and the divisors of their means."""
    kernel, strides, dilations, pads = _pool_geometry(node, shape)
    one = _coverage(shape[1:], pads, kernel, strides, dilations)
    offsets = np.arange(shape[0]).reshape(-1, *[1] * one.ndim) * math.prod(shape[1:])
    divisors = _divisors(node, one >= 0)
    return np.where(one >= 0, one + offsets, -1), np.broadcast_to(divisors, (shape[0], *divisors.shape))


def _divisors(node: Node, inside: NDArray[np.bool_]) -> Array:
    if flag_attribute(node, "count_include_pad", 0):
        return np.full(inside.shape[:-1], float(inside.shape[-1]))
    divisors = inside.sum(axis=-1).astype(np.float64)
    if (divisors == 0.0).any():
        raise Refusal("a window holds padding only")
    return divisors


@rule("MaxPool", attributes=(*POOL_ATTRIBUTES, "storage_order"))
def max_pool(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Maxima of windows: sqrt(m)-Lipschitz if a pixel lies in at most m windows (1 if they are disjoint). Exact."""
    if len(node.outputs) > 1:
        raise Refusal("the indices of a maximum jump and have no Lipschitz constant")
    view = data_operand(inputs[0])
    kernel, strides, dilations, pads = _pool_geometry(node, view.shape)
    padded = np.pad(view.center, [(0, 0), *pads], constant_values=-np.inf)
    center = windows_of(padded, kernel, strides, dilations).max(axis=-1)
    if not np.isfinite(center).all():
        raise Refusal("a window holds padding only")
    used = _coverage(view.shape[1:], pads, kernel, strides, dilations).ravel()
    times = float(np.bincount(used[used >= 0]).max())
    facts = context.domain.joint(view)
    factor = sqrt_up(times)
    return [context.source(center, mul_up(factor, facts.lipschitz), mul_up(factor, facts.error), view.source.error_max)]


@rule("AveragePool", attributes=(*POOL_ATTRIBUTES, "count_include_pad"))
def average_pool(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Means of windows: sqrt(largest row sum * largest column sum) of its weights (Schur's test)."""
    view = data_operand(inputs[0])
    kernel, strides, dilations, pads = _pool_geometry(node, view.shape)
    indices = _coverage(view.shape[1:], pads, kernel, strides, dilations)
    inside = indices >= 0
    n = math.prod(kernel)
    divisors = _divisors(node, inside)
    # The sum, before it is divided.
    context.no_overflow(mul_up(float(n), context.domain.joint(view).largest))

    def apply(stack: Array) -> Array:
        padded = np.pad(stack, [(0, 0), (0, 0), *pads])
        return windows_of(padded, kernel, strides, dilations).sum(axis=-1) / divisors

    shares = np.broadcast_to((1.0 / divisors)[..., None], inside.shape)[inside]
    columns = np.bincount(indices[inside], weights=shares)
    # Row sums are at most 1; a column is a sum of at most n quotients, each rounded once.
    column = mul_up(float(columns.max()), 1.0 + 4.0 * (n + 2) * 2.0**-53)
    norm = spread = sqrt_up(column)
    row_norm = div_up(1.0, math.sqrt(float(divisors.min()))) * (1.0 + 2.0**-50)
    convolution = None
    if (divisors == n).all():
        # The same weights everywhere: a convolution of each channel with ones, divided by n.
        weights = dilated(np.ones((view.shape[0], 1, *kernel)), dilations)
        alone = convolution_norm_bound(weights[:1], view.shape[1:], strides, [1] * len(kernel), 1)
        norm = min(norm, div_up(alone, float(n)))
        offsets = tuple(low for low, _ in pads)
        convolution = Convolution(weights / n, tuple(strides), offsets, view.shape[0])
    return [
        linear_result(
            context,
            view,
            apply,
            None,
            norm=norm,
            spread=spread,
            row_norm=row_norm,
            terms=n + 1,
            convolution=convolution,
        )
    ]


@rule("GlobalAveragePool", "GlobalMaxPool")
def global_pool(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Over a whole channel of n pixels: the mean has norm 1 / sqrt(n), the maximum is 1-Lipschitz and exact."""
    view = data_operand(inputs[0])
    flat = view.center.reshape(view.shape[0], -1)
    shape = (view.shape[0], *[1] * (len(view.shape) - 1))
    if node.operator == "GlobalMaxPool":
        facts = context.domain.joint(view)
        return [context.source(flat.max(axis=1).reshape(shape), facts.lipschitz, facts.error, view.source.error_max)]
    n = flat.shape[1]
    context.no_overflow(mul_up(float(n), context.domain.joint(view).largest))
    norm = div_up(sqrt_up(float(n)), float(n)) if n > 1 else 1.0
    channels = view.rearranged(view.index.reshape(flat.shape))

    def apply(stack: Array) -> Array:
        return stack.mean(axis=2).reshape(-1, *shape)

    return [
        linear_result(
            context,
            channels,
            apply,
            None,
            norm=norm,
            spread=norm,
            row_norm=norm,
            terms=n + 1,
            tight=True,
            mean=True,
        )
    ]
