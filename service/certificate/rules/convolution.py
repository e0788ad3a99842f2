"""Rules of operators that work on images: convolution, pooling, batch normalisation. Notation as in `rules`."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from service.certificate.convolutions import (
    absolute_convolution_bound,
    circular_norm_bound,
    convolve,
    dilated,
    transposed_convolve,
)
from service.certificate.graph import Node
from service.certificate.norms import row_norms_up, spectral_norm_bound
from service.certificate.rounding import SMALLEST_NORMAL, add_up, div_up, down, mul_up, norm_up, sqrt_up
from service.certificate.rules.operands import (
    Array,
    Operands,
    Refusal,
    data_operand,
    flag_attribute,
    float_attribute,
    float_operand,
    int_attribute,
    optional_operand,
)
from service.certificate.rules.table import Context, diagonal_step, linear_result, rule
from service.certificate.values import Convolution, Value, View

Number = TypeVar("Number", bound=np.generic)


def numbers_of(node: Node, name: str, default: Sequence[int]) -> list[int]:
    value = node.attributes.get(name, list(default))
    if not isinstance(value, (list, tuple)):
        raise Refusal(f"attribute {name} must be a list of integers")
    numbers = [int(number) for number in value]  # type: ignore[reportUnknownArgumentType]
    if len(numbers) != len(default):
        raise Refusal(f"attribute {name} has {len(numbers)} entries, expected {len(default)}")
    return numbers


def pads_of(node: Node, size: Sequence[int], extent: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after each spatial axis; `auto_pad` as ONNX defines it."""
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = numbers_of(node, "pads", [0] * (2 * len(size)))
        if min(pads, default=0) < 0:
            raise Refusal("negative pads; use Slice")
        return list(zip(pads[: len(size)], pads[len(size) :], strict=True))
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


def _kernel(node: Node, weight: Array) -> Array:
    if weight.ndim not in (3, 4):
        raise Refusal(f"a kernel with {weight.ndim - 2} spatial axes; the rule covers 1 and 2")
    if numbers_of(node, "kernel_shape", weight.shape[2:]) != list(weight.shape[2:]):
        raise Refusal("kernel_shape is not the shape of the weight")
    return weight


def _bias(inputs: Operands, channels: int, axes: int) -> Array:
    """One number for each channel, with the axes of an image."""
    value = optional_operand(inputs, 2)
    bias = float_operand(value, "the bias") if value is not None else np.zeros(channels)
    if bias.shape != (channels,):
        raise Refusal(f"a bias of shape {bias.shape} does not fit {channels} channels")
    return bias.reshape(-1, *[1] * axes)


_CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@rule("Conv", attributes=_CONV_ATTRIBUTES)
def conv(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Zero-padded convolution: at most the largest norm of its symbol on a torus of n + k - 1 points."""
    view = data_operand(inputs[0])
    kernel = _kernel(node, float_operand(inputs[1], "the weight"))
    axes = kernel.ndim - 2
    groups = int_attribute(node, "group", 1)
    if len(view.shape) != axes + 1 or view.shape[0] != kernel.shape[1] * groups or kernel.shape[0] % groups:
        raise Refusal(f"a kernel {kernel.shape} in {groups} groups does not fit an image {view.shape}")
    size = view.shape[1:]
    strides, dilations = numbers_of(node, "strides", [1] * axes), numbers_of(node, "dilations", [1] * axes)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilations, strict=True)]
    pads = pads_of(node, size, extent, strides)
    if any(n + low + high < k for n, (low, high), k in zip(size, pads, extent, strict=True)):
        raise Refusal("the kernel is larger than the padded image")

    def apply(stack: Array) -> Array:
        return convolve(np.pad(stack, [(0, 0), (0, 0), *pads]), kernel, strides, dilations, groups)

    convolution = Convolution(dilated(kernel, dilations), tuple(strides), tuple(low for low, _ in pads), groups)
    norm = context.joint.convolution_norm(convolution, size)
    row_norm = float(np.max(row_norms_up(kernel.reshape(len(kernel), -1))))
    spread = absolute_convolution_bound(kernel, groups)
    terms = math.prod(kernel.shape[1:])
    return [
        linear_result(
            context,
            view,
            apply,
            _bias(inputs, len(kernel), axes),
            norm=norm,
            spread=spread,
            row_norm=row_norm,
            terms=terms,
            convolution=convolution,
            others=[
                (math.inf if np.any(pads) else _circular_bound(context, view, convolution), _CIRCULAR),
                (_patch_bound(view, kernel, strides, dilations, groups, pads), _PATCHES),
            ],
        )
    ]


_CIRCULAR = "Circular convolution: the largest norm of its symbol on the torus of the image itself."
_PATCHES = "Kernel as a matrix W on patches, an element in at most m of them: ||W||_2 sqrt(m)."


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


def _patch_bound(
    view: View,
    kernel: Array,
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    pads: Sequence[tuple[int, int]],
) -> float:
    """`||W|| sqrt(m) L`, W the kernel as a matrix on patches, where an element stands in at most m patches.

    Only for a tensor that repeats its elements: otherwise the symbol tells more.
    """
    if view.repetition <= 1:
        return math.inf
    padded = np.pad(view.index, [(0, 0), *pads], constant_values=-1)
    patches = windows_of(padded, kernel.shape[2:], strides, dilations)
    times = np.bincount(patches[patches >= 0]).max(initial=0)
    norm = max(spectral_norm_bound(part.reshape(len(part), -1)) for part in np.split(kernel, groups))
    return mul_up(norm, sqrt_up(float(times)), view.source.lipschitz)


def _period(index: NDArray[np.int64], axis: int) -> int:
    """The smallest p for which the array repeats itself after p steps along `axis`; its length if it never does."""
    moved = np.moveaxis(index, axis, 0)
    return next((p for p in range(1, len(moved)) if np.array_equal(moved[p:], moved[:-p])), len(moved))


@rule("ConvTranspose", attributes=(*_CONV_ATTRIBUTES, "output_padding"))
def conv_transpose(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """The adjoint of a zero-padded convolution (some results cut off): the same norm bound."""
    view = data_operand(inputs[0])
    kernel = _kernel(node, float_operand(inputs[1], "the weight"))
    axes = kernel.ndim - 2
    groups = int_attribute(node, "group", 1)
    if len(view.shape) != axes + 1 or view.shape[0] != kernel.shape[0] or kernel.shape[0] % groups:
        raise Refusal(f"a kernel {kernel.shape} in {groups} groups does not fit an image {view.shape}")
    if node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Refusal("auto_pad, which runtimes read in two ways; give the pads as numbers")
    strides, dilations = numbers_of(node, "strides", [1] * axes), numbers_of(node, "dilations", [1] * axes)
    extra = numbers_of(node, "output_padding", [0] * axes)
    pads = pads_of(node, view.shape[1:], [1] * axes, strides)
    # As the adjoint of the convolution of an image as large as the full result.
    whole = [
        (n - 1) * s + (k - 1) * d + 1 + more
        for n, k, s, d, more in zip(view.shape[1:], kernel.shape[2:], strides, dilations, extra, strict=True)
    ]
    if any(n - low - high < 1 for n, (low, high) in zip(whole, pads, strict=True)):
        raise Refusal("nothing is left of the tensor")
    kept = tuple(slice(low, n - high) for n, (low, high) in zip(whole, pads, strict=True))

    def apply(stack: Array) -> Array:
        full = transposed_convolve(stack, kernel, strides, dilations, groups)
        return np.pad(full, [(0, 0), (0, 0), *((0, more) for more in extra)])[(slice(None), slice(None), *kept)]

    adjoint = Convolution(dilated(kernel, dilations), tuple(strides), tuple(low for low, _ in pads), groups)
    norm = context.joint.convolution_norm(adjoint, whole)
    channels = kernel.shape[1] * groups
    per_output = np.swapaxes(kernel.reshape(groups, -1, *kernel.shape[1:]), 1, 2).reshape(channels, -1)
    row_norm = float(np.max(row_norms_up(per_output)))
    spread = absolute_convolution_bound(kernel, groups)
    bias, terms = _bias(inputs, channels, axes), per_output.shape[1]
    return [
        linear_result(
            context,
            view,
            apply,
            bias,
            norm=norm,
            spread=spread,
            row_norm=row_norm,
            terms=terms,
            adjoint=adjoint,
        )
    ]


def windows_of(
    values: NDArray[Number], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> NDArray[Number]:
    """`... x *out x window` of a padded `... x *S` array."""
    axes = len(kernel)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if any(n < k for n, k in zip(values.shape[-axes:], extent, strict=True)):
        raise Refusal("the window is larger than the padded image")
    windows = np.lib.stride_tricks.sliding_window_view(values, extent, axis=tuple(range(-axes, 0)))
    picks = tuple(slice(None, None, stride) for stride in strides)
    taps = tuple(slice(None, None, dilation) for dilation in dilations)
    chosen = windows[(..., *picks, *taps)]
    return chosen.reshape(*chosen.shape[:-axes], -1)


@rule("BatchNormalization", attributes=("epsilon", "momentum", "training_mode"))
def batch_normalization(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """In inference form a diagonal map per channel: its norm is the largest |scale| / sqrt(variance + epsilon)."""
    view = data_operand(inputs[0])
    if flag_attribute(node, "training_mode", 0) or len(node.outputs) > 1:
        raise Refusal("its training form mixes the images of a batch")
    scale, bias, mean, variance = (float_operand(value, "every parameter") for value in inputs[1:5])
    if any(parameter.shape != (view.shape[0],) for parameter in (scale, bias, mean, variance)):
        raise Refusal(f"its parameters do not fit {view.shape[0]} channels")
    epsilon = float_attribute(node, "epsilon", 1e-5)
    if not (variance + epsilon >= context.precision.smallest_normal).all():
        raise Refusal("variance + epsilon must be positive, and not so small that it may underflow")
    # Five roundings in float64 at most; the slack covers them.
    factor = np.abs(scale) / np.sqrt(variance + epsilon) * (1.0 + 2.0**-48)
    peak = float(np.max(factor))
    if ((factor < SMALLEST_NORMAL) & (scale != 0.0)).any():
        raise Refusal("a factor underflows")
    # A runtime may divide the centred image by the deviation before it scales it.
    deviation = down(math.sqrt(float(np.min(variance + epsilon))) * (1.0 - 2.0**-50))
    context.no_overflow(div_up(add_up(context.domain.joint(view).largest, float(np.max(np.abs(mean)))), deviation))
    facts = context.domain.joint(view)
    column = (-1, *[1] * (len(view.shape) - 1))
    factors = np.broadcast_to((scale / np.sqrt(variance + epsilon)).reshape(column), view.shape)
    center = (view.center - mean.reshape(column)) * factors + bias.reshape(column)
    # However a runtime arranges it, (x - mean) f + b or x f + (b - mean f), at most ten roundings touch the terms
    # f x, f mean and b, each of relative size 1.
    constant = factor * np.abs(mean) + np.abs(bias)
    constant_norm = norm_up(np.broadcast_to(constant.reshape(column), center.shape))
    gamma = context.gamma(10)
    # The factor may underflow, too.
    reach = add_up(1.0, peak, facts.largest, float(np.max(np.abs(mean))))
    tiny = mul_up(16.0, context.precision.smallest_normal, reach)
    context.no_overflow(add_up(mul_up(peak, facts.largest), mul_up(2.0, float(np.max(constant)))))
    error = add_up(
        mul_up(peak, facts.error),
        mul_up(gamma, add_up(mul_up(peak, add_up(facts.norm, facts.error)), constant_norm)),
        mul_up(tiny, sqrt_up(float(center.size))),
    )
    error_max = add_up(
        mul_up(peak, view.source.error_max),
        mul_up(gamma, add_up(mul_up(peak, facts.largest), mul_up(2.0, float(np.max(constant))))),
        tiny,
    )
    step = diagonal_step(view, factors, peak)
    return [context.source(center, mul_up(peak, facts.lipschitz), error, error_max, step=step)]
