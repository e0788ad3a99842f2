"""Rules of convolutions, transposed ones, and batch normalisation. Notation as in `table`."""

import math

import numpy as np
from numpy.typing import NDArray

from service.certificate.convolutions import (
    absolute_convolution_bound,
    circular_norm_bound,
    convolve,
    dilated,
    transposed_convolve,
)
from service.certificate.facts import LocalError
from service.certificate.limits import fits
from service.certificate.norms import row_norms_up, spectral_norm_bound
from service.certificate.rounding import SMALLEST_NORMAL, add_up, div_up, down, mul_up, norm_up, sqrt_up
from service.certificate.rules.linear import LinearMap, diagonal_step, linear_result
from service.certificate.rules.operands import (
    Array,
    Operands,
    data_operand,
    float_operand,
    limit_size,
    optional_operand,
)
from service.certificate.rules.table import Context, rule
from service.certificate.rules.windows import Windows, pads_of, windows_of
from service.certificate.values import Convolution, Value, View
from service.network.limits import WORK_OF_NUMBER
from service.network.operators import Operator, Refusal

_CONV_ATTRIBUTES = ("dilations", "group", "pads", "strides")
_CIRCULAR = "Circular convolution: the largest norm of its symbol on the torus of the image itself."
_MOST_PERIODS = 64
_PATCHES = "Kernel as a matrix W on patches, an element in at most m of them: ||W||_2 sqrt(m)."


def _kernel(value: Value | None) -> Array:
    weight = float_operand(value, "the weight")
    if weight.ndim not in (3, 4, 5):
        raise Refusal(f"a kernel with {weight.ndim - 2} spatial axes; the rule covers 1 to 3")
    return weight


def _bias(inputs: Operands, channels: int, axes: int) -> Array:
    """Return one number for each channel, with the axes of an image."""
    value = optional_operand(inputs, 2)
    bias = float_operand(value, "the bias") if value is not None else np.zeros(channels)
    return bias.reshape(-1, *[1] * axes)


@rule("Conv", attributes=_CONV_ATTRIBUTES)
def conv(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Zero-padded convolution: at most the largest norm of its symbol on a torus of n + k - 1 points.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    kernel = _kernel(inputs[1])
    axes = kernel.ndim - 2
    groups = node.integer("group")
    windows = windows_of(node, view.shape[1:], kernel.shape[2:])
    strides, dilations, pads = windows.strides, windows.dilations, windows.pads
    padded = (view.shape[0], *windows.padded)
    limit_size(padded, (len(kernel), *windows.after), (*kernel.shape[:2], *windows.whole_strides))

    def apply(stack: Array) -> Array:
        return convolve(np.pad(stack, [(0, 0), (0, 0), *pads]), kernel, strides, dilations, groups)

    convolution = Convolution(dilated(kernel, dilations), strides, tuple(low for low, _ in pads), groups)
    linear = LinearMap(
        apply,
        norm=context.joint.convolution_norm(convolution, windows.size),
        spread=absolute_convolution_bound(kernel, groups),
        row_norm=float(np.max(row_norms_up(kernel.reshape(len(kernel), -1)))),
        terms=math.prod(kernel.shape[1:]),
        convolution=convolution,
        widest=math.prod(padded),
    )
    others = [
        (math.inf if np.any(pads) else _circular_bound(context, view, convolution), _CIRCULAR),
        (_patch_bound(context, view, kernel, windows, groups), _PATCHES),
    ]
    return [linear_result(context, view, linear, _bias(inputs, len(kernel), axes), others=others)]


def _circular_bound(context: Context, view: View, convolution: Convolution) -> float:
    """Lipschitz bound of a convolution of an image that wrap padding has made periodic; infinity for another image.

    A circular convolution on n points is block-diagonal in the frequencies of the torus of n points itself.
    """
    periods = [_period(view.index, axis) for axis in range(1, len(view.shape))]
    if tuple(periods) == view.shape[1:]:
        return math.inf
    kernel, strides = convolution.kernel, convolution.strides
    for n, k, s, period in zip(view.shape[1:], kernel.shape[2:], strides, periods, strict=True):
        # Each result of the torus is read once at most.
        if period % s or (n - k) // s + 1 > period // s:
            return math.inf
    core = view.rearranged(view.index[(slice(None), *(slice(0, period) for period in periods))])
    norm = circular_norm_bound(kernel, periods, strides, convolution.groups)
    return mul_up(norm, context.domain.joint(core).lipschitz)


def _patch_bound(context: Context, view: View, kernel: Array, windows: Windows, groups: int) -> float:
    """`||W|| sqrt(m) L`, W the kernel as a matrix on patches, where an element stands in at most m patches.

    Only for a tensor that repeats its elements: otherwise the symbol tells more.
    """
    entries = math.prod((len(view.index), *windows.after, *windows.kernel))
    if view.repetition <= 1 or not fits(entries) or not context.joint.affords(WORK_OF_NUMBER * entries):
        return math.inf
    patches = windows.of(np.pad(view.index, [(0, 0), *windows.pads], constant_values=-1))
    times = np.bincount(patches[patches >= 0]).max(initial=0)
    norm = max(spectral_norm_bound(part.reshape(len(part), -1)) for part in np.split(kernel, groups))
    return mul_up(norm, sqrt_up(float(times)), view.source.lipschitz)


def _period(index: NDArray[np.int64], axis: int) -> int:
    """Return the smallest p for which the array repeats itself after p steps along `axis`; else its length.

    The length, too, where no p is found among the first `_MOST_PERIODS` that are possible.
    """
    rows = np.moveaxis(index, axis, 0).reshape(index.shape[axis], -1)
    # Where the tensor repeats itself, its first element comes back.
    candidates = 1 + np.flatnonzero(rows[1:, 0] == rows[0, 0])[:_MOST_PERIODS]
    return next((p for p in candidates.tolist() if np.array_equal(rows[p:], rows[:-p])), len(rows))


@rule("ConvTranspose", attributes=(*_CONV_ATTRIBUTES, "output_padding"))
def conv_transpose(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """The adjoint of a zero-padded convolution (some results cut off): the same norm bound.

    Args: see `Rule`.

    Raises:
        Refusal: nothing is left of the image.
    """
    view = data_operand(inputs[0])
    kernel = _kernel(inputs[1])
    axes = kernel.ndim - 2
    groups = node.integer("group")
    strides, dilations, extra = (node.integers(name) for name in ("strides", "dilations", "output_padding"))
    pads = pads_of(node)
    # As the adjoint of the convolution of an image as large as the full result.
    whole = [
        (n - 1) * s + (k - 1) * d + 1 + more
        for n, k, s, d, more in zip(view.shape[1:], kernel.shape[2:], strides, dilations, extra, strict=True)
    ]
    windows = Windows(tuple(whole), kernel.shape[2:], strides, dilations, pads)
    channels = kernel.shape[1] * groups
    limit_size((channels, *whole), (*kernel.shape[:2], *windows.whole_strides))
    if any(n - low - high < 1 for n, (low, high) in zip(whole, pads, strict=True)):
        raise Refusal("nothing is left of the tensor")
    inside = tuple(slice(low, n - high) for n, (low, high) in zip(whole, pads, strict=True))

    def apply(stack: Array) -> Array:
        full = transposed_convolve(stack, kernel, strides, dilations, groups)
        return np.pad(full, [(0, 0), (0, 0), *((0, more) for more in extra)])[(slice(None), slice(None), *inside)]

    adjoint = Convolution(dilated(kernel, dilations), tuple(strides), tuple(low for low, _ in pads), groups)
    per_output = np.swapaxes(kernel.reshape(groups, -1, *kernel.shape[1:]), 1, 2).reshape(channels, -1)
    linear = LinearMap(
        apply,
        norm=context.joint.convolution_norm(adjoint, whole),
        spread=absolute_convolution_bound(kernel, groups),
        row_norm=float(np.max(row_norms_up(per_output))),
        terms=per_output.shape[1],
        adjoint=adjoint,
        widest=channels * math.prod(whole),
    )
    return [linear_result(context, view, linear, _bias(inputs, channels, axes))]


@rule("BatchNormalization", attributes=("epsilon",))
def batch_normalization(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """In inference form a diagonal map per channel: its norm is the largest |scale| / sqrt(variance + epsilon).

    Args: see `Rule`.

    Raises:
        Refusal: its factors may underflow or overflow.
    """
    view = data_operand(inputs[0])
    scale, bias, mean, variance = (float_operand(value, "every parameter") for value in inputs[1:5])
    epsilon = node.number("epsilon")
    if not (variance + epsilon >= context.precision.smallest_normal).all():
        raise Refusal("variance + epsilon must be positive, and not so small that it may underflow")
    # Five roundings in float64 at most; the slack covers them.
    factor = np.abs(scale) / np.sqrt(variance + epsilon) * (1.0 + 2.0**-48)
    peak = float(np.max(factor))
    if ((factor < SMALLEST_NORMAL) & (scale != 0.0)).any():
        raise Refusal("a factor underflows")
    # A kernel computes the factor, and b - mean f, as numbers of the graph's format.
    context.no_overflow(add_up(peak, mul_up(peak, float(np.max(np.abs(mean)))), float(np.max(np.abs(bias)))))
    # A runtime may divide the centred image by the deviation before it scales it.
    deviation = down(math.sqrt(float(np.min(variance + epsilon))) * (1.0 - 2.0**-50))
    facts, mean_peak = context.domain.joint(view), float(np.max(np.abs(mean)))
    context.no_overflow(div_up(add_up(facts.largest, mean_peak), deviation))
    column = (-1, *[1] * (len(view.shape) - 1))
    factors = np.broadcast_to((scale / np.sqrt(variance + epsilon)).reshape(column), view.shape)
    center = (view.center - mean.reshape(column)) * factors + bias.reshape(column)
    # However a runtime arranges it, (x - mean) f + b or x f + (b - mean f), at most ten roundings touch the terms
    # f x, f mean and b, each of relative size 1.
    constant = factor * np.abs(mean) + np.abs(bias)
    constant_norm = norm_up(np.broadcast_to(constant.reshape(column), center.shape))
    reach = add_up(mul_up(peak, facts.largest), mul_up(2.0, float(np.max(constant))))
    context.no_overflow(reach)
    rounding = LocalError.relative(
        context.gamma(10), norm=add_up(mul_up(peak, facts.computed_norm), constant_norm), largest=reach
    )
    # The factor may underflow, too.
    tiny = mul_up(16.0, context.precision.smallest_normal, add_up(1.0, peak, facts.largest, mean_peak))
    result = facts.mapped(peak, peak).plus(rounding, LocalError.of_each(tiny, center.size))
    return [context.source(center, result, step=diagonal_step(view, factors, peak))]
