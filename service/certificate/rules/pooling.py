"""Rules of pools: maxima and means of windows, and of whole channels. Notation as in `table`."""

import math

import numpy as np
from numpy.typing import NDArray

from service.certificate.convolutions import convolution_norm_bound, dilated
from service.certificate.rounding import div_up, mul_up, sqrt_up
from service.certificate.rules.linear import LinearMap, linear_result, mean_norm
from service.certificate.rules.operands import (
    Array,
    Operands,
    data_operand,
    limit_size,
)
from service.certificate.rules.table import Context, rule
from service.certificate.rules.windows import Windows, windows_of
from service.certificate.values import Convolution, Value
from service.network.operators import Operator, Refusal

POOL_ATTRIBUTES = ("dilations", "kernel_shape", "pads", "strides")


def _read_pool(node: Operator, shape: tuple[int, ...]) -> Windows:
    """Return the windows of a pool of an image `C x *S`; refuse more of them than fit into an array."""
    axes = len(shape) - 1
    if axes not in (1, 2, 3):
        raise Refusal(f"{axes} spatial axes; the rule covers 1 to 3")
    kernel = node.integers("kernel_shape")
    windows = windows_of(node, shape[1:], kernel)
    limit_size((shape[0], *windows.padded), (shape[0], *windows.after, *kernel), (shape[0], *windows.whole_strides))
    return windows


def pool_windows(node: Operator, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], Array]:
    """Return positions `C x *out x taps` in a flattened `C x *S` image, -1 for padding, and the divisors of means."""
    one = _read_pool(node, shape).positions()
    offsets = np.arange(shape[0]).reshape(-1, *[1] * one.ndim) * math.prod(shape[1:])
    divisors = _divisors(node, one >= 0)
    return np.where(one >= 0, one + offsets, -1), np.broadcast_to(divisors, (shape[0], *divisors.shape))


def _divisors(node: Operator, inside: NDArray[np.bool_]) -> Array:
    if node.kind == "AveragePool" and node.integer("count_include_pad"):
        return np.full(inside.shape[:-1], float(inside.shape[-1]))
    divisors = inside.sum(axis=-1).astype(np.float64)
    if (divisors == 0.0).any():
        raise Refusal("a window holds padding only")
    return divisors


@rule("MaxPool", attributes=POOL_ATTRIBUTES)
def max_pool(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Maxima of windows: sqrt(m)-Lipschitz if a pixel lies in at most m windows (1 if they are disjoint). Exact.

    Args: see `Rule`.

    Raises:
        Refusal: a window holds padding only.
    """
    view = data_operand(inputs[0])
    windows = _read_pool(node, view.shape)
    padded = np.pad(view.center, [(0, 0), *windows.pads], constant_values=-np.inf)
    center = windows.largest(padded)
    if not np.isfinite(center).all():
        raise Refusal("a window holds padding only")
    return [context.source(center, context.domain.joint(view).mapped(sqrt_up(float(windows.uses())), 1.0))]


@rule("AveragePool", attributes=(*POOL_ATTRIBUTES, "count_include_pad"))
def average_pool(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Means of windows: sqrt(largest row sum * largest column sum) of its weights (Schur's test).

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    windows = _read_pool(node, view.shape)
    indices = windows.positions()
    inside = indices >= 0
    n = math.prod(windows.kernel)
    divisors = _divisors(node, inside)
    # The sum, before it is divided.
    context.no_overflow(mul_up(float(n), context.domain.joint(view).largest))

    def apply(stack: Array) -> Array:
        return windows.of(np.pad(stack, [(0, 0), (0, 0), *windows.pads])).sum(axis=-1) / divisors

    shares = np.broadcast_to((1.0 / divisors)[..., None], inside.shape)[inside]
    columns = np.bincount(indices[inside], weights=shares)
    # Row sums are at most 1; a column is a sum of at most n quotients, each rounded once.
    column = mul_up(float(columns.max()), 1.0 + 4.0 * (n + 2) * 2.0**-53)
    spread = norm = sqrt_up(column)
    convolution = None
    if (divisors == n).all():
        # The same weights everywhere: a convolution of each channel with ones, divided by n.
        weights = dilated(np.ones((view.shape[0], 1, *windows.kernel)), windows.dilations)
        alone = convolution_norm_bound(weights[:1], windows.size, windows.strides, [1] * len(windows.size), 1)
        norm = min(norm, div_up(alone, float(n)))
        offsets = tuple(low for low, _ in windows.pads)
        convolution = Convolution(weights / n, windows.strides, offsets, view.shape[0])
    mean = LinearMap(
        apply,
        norm=norm,
        spread=spread,
        row_norm=div_up(1.0, math.sqrt(float(divisors.min()))) * (1.0 + 2.0**-50),
        terms=n + 1,
        convolution=convolution,
        widest=view.shape[0] * max(math.prod(windows.padded), n * math.prod(windows.after)),
    )
    return [linear_result(context, view, mean)]


@rule("GlobalAveragePool", "GlobalMaxPool")
def global_pool(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Over a whole channel of n pixels: the mean has norm 1 / sqrt(n), the maximum is 1-Lipschitz and exact.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    channels = view.rearranged(view.index.reshape(view.shape[0], -1))
    shape = (view.shape[0], *[1] * (len(view.shape) - 1))
    if node.kind == "GlobalMaxPool":
        return [context.source(channels.center.max(axis=1).reshape(shape), context.domain.joint(view))]
    n = channels.shape[1]
    context.no_overflow(mul_up(float(n), context.domain.joint(view).largest))
    norm = mean_norm(n)

    def apply(stack: Array) -> Array:
        return stack.mean(axis=2).reshape(-1, *shape)

    mean = LinearMap(apply, norm=norm, spread=norm, row_norm=norm, terms=n + 1, tight=True, mean=True)
    return [linear_result(context, channels, mean)]
