"""One rule for each operator that computes, in terms of `Network`: a matrix, or a map that never expands.

Tensors leave the batch axis out. Where nothing is said, a rule takes any attribute that it reads and no other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from flint import arb

from service.audit.exact import (
    LARGEST_MATRIX,
    NotAuditableError,
    Numbers,
    ball_numbers,
    float_numbers,
    gathered,
    root,
    upper,
)
from service.audit.graph import Node, Sized
from service.audit.tensors import ABSENT, Facts, Network, signs


class Tensor:
    """Identities of the numbers of one image's tensor, without its batch axis."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the batch axis."""
        return self.ids.shape

    @property
    def flat(self) -> np.ndarray:
        """Row-major."""
        return self.ids.ravel()


Value = Tensor | np.ndarray | Sized
Rule = Callable[[Network, Node, Sequence[Value | None]], Tensor]
RULES: dict[str, tuple[Rule, frozenset[str]]] = {}


def _rule(*operators: str, attributes: Sequence[str] = ()) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = (function, frozenset(attributes))
        return function

    return register


def _tensor(inputs: Sequence[Value | None], position: int = 0) -> Tensor:
    value = inputs[position] if position < len(inputs) else None
    if not isinstance(value, Tensor):
        raise NotAuditableError(f"operand {position} must depend on the image")
    return value


def _floats(inputs: Sequence[Value | None], position: int) -> np.ndarray:
    value = inputs[position] if position < len(inputs) else None
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise NotAuditableError(f"operand {position} must be a floating-point constant")
    return value.astype(np.float64)


def _given(inputs: Sequence[Value | None], position: int) -> bool:
    return position < len(inputs) and inputs[position] is not None


def _axis(axis: int, tensor: Tensor) -> int:
    """An ONNX axis, which counts the batch, as an axis of the image's own tensor."""
    rank = len(tensor.shape) + 1
    if not -rank <= axis < rank or axis % rank == 0:
        raise NotAuditableError(f"axis {axis} of {rank}: outside, or along the batch")
    return axis % rank - 1


def _balls(values: np.ndarray) -> list[arb]:
    return [arb(float(value)) for value in values.ravel().tolist()]


def _numbers(network: Network, values: np.ndarray) -> Numbers:
    return float_numbers(values.ravel().tolist(), network.bits)


# --- linear operators -------------------------------------------------------------------------------------------------


def _dense(network: Network, x_LN: np.ndarray, weight_NM: np.ndarray, bias_M: np.ndarray | None) -> np.ndarray:
    """`x W + b` along the last axis of `L x N`."""
    (lead, n), m = x_LN.shape, weight_NM.shape[1]
    if weight_NM.shape[0] != n or n == 0 or m == 0:
        raise NotAuditableError(f"a weight {weight_NM.shape} does not fit {n} numbers")
    if lead * n * m > LARGEST_MATRIX:
        raise NotAuditableError(f"its matrix has {lead * n * m} entries, more than {LARGEST_MATRIX}")
    picks_MN = np.arange(n * m).reshape(n, m).T
    positions = np.repeat(np.arange(lead * n).reshape(lead, 1, n), m, axis=1).reshape(lead * m, n)
    operator = gathered(positions, np.tile(picks_MN, (lead, 1)), _numbers(network, weight_NM), lead * n)
    bias = None if bias_M is None else _balls(bias_M) * lead
    return network.linear(x_LN.ravel(), operator, n + 1, bias).reshape(lead, m)


@_rule("Gemm", attributes=("alpha", "beta", "transA", "transB"))
def _gemm(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    x, weight = _tensor(inputs), _floats(inputs, 1)
    if node.number("alpha", 1.0) != 1.0 or node.number("beta", 1.0) != 1.0 or node.integer("transA", 0):
        raise NotAuditableError("alpha or beta other than 1, or transA")
    if len(x.shape) != 1 or weight.ndim != 2:
        raise NotAuditableError("a flat tensor and a matrix are read here")
    weight = weight.T if node.integer("transB", 0) else weight
    bias = None
    if _given(inputs, 2):
        bias = _floats(inputs, 2)
        if bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1):
            raise NotAuditableError(f"a bias of shape {bias.shape}")
        bias = np.broadcast_to(bias.reshape(-1), (weight.shape[1],))
    return Tensor(_dense(network, x.ids[None], weight, bias)[0])


@_rule("MatMul")
def _matmul(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    turned = not isinstance(inputs[0], Tensor)
    x, weight = _tensor(inputs, int(turned)), _floats(inputs, int(not turned))
    if weight.ndim != 2 or (turned and len(x.shape) < 2):
        raise NotAuditableError("a constant matrix, on the left of a tensor with two axes or more or on its right")
    ids, weight = (np.swapaxes(x.ids, -1, -2), weight.T) if turned else (x.ids, weight)
    made = _dense(network, ids.reshape(-1, ids.shape[-1]), weight, None).reshape(*ids.shape[:-1], weight.shape[1])
    return Tensor(np.swapaxes(made, -1, -2) if turned else made)


def _spread(x: Tensor, constant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A tensor and a constant, broadcast to each other's shape."""
    shape = np.broadcast_shapes(constant.shape, (1, *x.shape))
    if len(shape) != len(x.shape) + 1 or shape[0] != 1:
        raise NotAuditableError("a constant with a batch axis of its own")
    return np.broadcast_to(x.ids, shape[1:]), np.broadcast_to(constant, shape)[0]


@_rule("Add", "Sub")
def _add(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    sign = 1 if node.operator == "Add" else -1
    left, right = inputs[0], inputs[1]
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if len(left.shape) != len(right.shape):
            raise NotAuditableError("tensors of different rank")
        shape = np.broadcast_shapes(left.shape, right.shape)
        one, other = (np.broadcast_to(value.ids, shape).ravel() for value in (left, right))
        return Tensor(network.sum(one, other, sign).reshape(shape))
    if isinstance(left, Tensor):
        ids, constant = _spread(left, _floats(inputs, 1))
        return Tensor(network.shifted(ids.ravel(), _balls(sign * constant), 1).reshape(ids.shape))
    ids, constant = _spread(_tensor(inputs, 1), _floats(inputs, 0))
    return Tensor(network.shifted(ids.ravel(), _balls(constant), sign).reshape(ids.shape))


def _diagonal(
    network: Network,
    ids: np.ndarray,
    numbers: Numbers,
    roundings: int,
    bias: Sequence[arb] | None = None,
    constants: Sequence[arb] | None = None,
) -> Tensor:
    places = np.arange(ids.size).reshape(-1, 1)
    operator = gathered(places, places, numbers, ids.size)
    return Tensor(network.linear(ids.ravel(), operator, roundings, bias, constants).reshape(ids.shape))


@_rule("Mul")
def _mul(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    first = isinstance(inputs[0], Tensor)
    ids, constant = _spread(_tensor(inputs, int(not first)), _floats(inputs, int(first)))
    return _diagonal(network, ids, _numbers(network, constant), 1)


@_rule("Div")
def _div(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    ids, constant = _spread(_tensor(inputs), _floats(inputs, 1))
    if not constant.all():
        raise NotAuditableError("it divides by zero")
    network.no_overflow(upper(arb(1) / arb(float(np.abs(constant).min()))))
    numbers = ball_numbers([arb(1) / value for value in _balls(constant)], network.bits)
    # A runtime may multiply by a rounded reciprocal: two roundings.
    return _diagonal(network, ids, numbers, 2)


@_rule("Neg")
def _neg(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    x = _tensor(inputs)
    return Tensor(network.linear(x.flat, signs(x.flat.size, -1), 0).reshape(x.shape))


@_rule("BatchNormalization", attributes=("epsilon", "momentum", "training_mode"))
def _batch_normalization(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    x = _tensor(inputs)
    if node.integer("training_mode", 0) or len(node.outputs) > 1:
        raise NotAuditableError("its training form")
    parameters = [_floats(inputs, position) for position in (1, 2, 3, 4)]
    if any(values.shape != (x.shape[0],) for values in parameters):
        raise NotAuditableError("its parameters do not fit the channels")
    scale, shift, mean, variance = map(_balls, parameters)
    epsilon = arb(node.number("epsilon", 1e-5))
    if not all(v + epsilon > 0 for v in variance):
        raise NotAuditableError("variance + epsilon must be positive")
    factors = [s / (v + epsilon).sqrt() for s, v in zip(scale, variance, strict=True)]
    bias = [b - m * f for b, m, f in zip(shift, mean, factors, strict=True)]
    size = [abs(b) + abs(m * f) for b, m, f in zip(shift, mean, factors, strict=True)]
    repeats = x.flat.size // x.shape[0]
    channel = np.repeat(np.arange(x.shape[0]), repeats)
    operator = gathered(
        np.arange(x.flat.size).reshape(-1, 1), channel.reshape(-1, 1), ball_numbers(factors, network.bits), x.flat.size
    )
    # However it is arranged, at most ten roundings touch each of the terms f x, f mean and b.
    return Tensor(
        network.linear(
            x.flat, operator, 10, [bias[c] for c in channel.tolist()], [size[c] for c in channel.tolist()]
        ).reshape(x.shape)
    )


# --- windows ----------------------------------------------------------------------------------------------------------


def _pads(node: Node, size: Sequence[int], extent: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Zeros before each axis, then after each; `auto_pad` as ONNX defines it."""
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


def _windows(node: Node, size: Sequence[int], kernel: Sequence[int]) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape of the result, and for each of its places the places (in one channel) of the window; -1 for padding."""
    axes = len(size)
    strides, dilations = node.integers("strides", [1] * axes), node.integers("dilations", [1] * axes)
    if len(kernel) != axes or min([*kernel, *strides, *dilations], default=0) < 1:
        raise NotAuditableError("its kernel, strides or dilations do not fit")
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(node, size, extent, strides)
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


def _filter(
    network: Network, x: Tensor, weight: np.ndarray, places: np.ndarray, picks: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """Sums of weights `picks[o, t]` times numbers `places[o, t]`."""
    operator = gathered(places, picks, _numbers(network, weight), x.flat.size)
    return network.linear(x.flat, operator, places.shape[1] + 1, None if bias is None else _balls(bias))


def _convolution_operands(
    node: Node, inputs: Sequence[Value | None], channels_axis: int
) -> tuple[Tensor, np.ndarray, int]:
    x, weight, groups = _tensor(inputs), _floats(inputs, 1), node.integer("group", 1)
    axes = weight.ndim - 2
    if axes < 1 or len(x.shape) != axes + 1 or groups < 1 or weight.shape[0] % groups:
        raise NotAuditableError(f"a kernel {weight.shape} in {groups} groups does not fit {x.shape}")
    if x.shape[0] != (weight.shape[0] if channels_axis == 0 else weight.shape[1] * groups):
        raise NotAuditableError(f"a kernel {weight.shape} in {groups} groups does not fit {x.shape}")
    if node.integers("kernel_shape", list(weight.shape[2:])) != list(weight.shape[2:]):
        raise NotAuditableError("kernel_shape is not the shape of the weight")
    return x, weight, groups


def _channel_bias(inputs: Sequence[Value | None], channels: int, pixels: int) -> np.ndarray | None:
    if not _given(inputs, 2):
        return None
    bias = _floats(inputs, 2)
    if bias.shape != (channels,):
        raise NotAuditableError(f"a bias of shape {bias.shape} does not fit {channels} channels")
    return np.repeat(bias, pixels)


def _fits(entries: int) -> None:
    if entries > LARGEST_MATRIX:
        raise NotAuditableError(f"its matrix has {entries} entries, more than {LARGEST_MATRIX}")


_CONVOLUTION = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@_rule("Conv", attributes=_CONVOLUTION)
def _conv(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    x, weight, groups = _convolution_operands(node, inputs, 1)
    after, window = _windows(node, x.shape[1:], weight.shape[2:])
    outputs, per_group, pixels = len(weight), weight.shape[1], math.prod(x.shape[1:])
    _fits(outputs * window.shape[0] * per_group * window.shape[1])
    first = np.arange(outputs) // (outputs // groups) * per_group
    channel = (first[:, None] + np.arange(per_group)) * pixels
    # O x places x channels x taps
    places = np.where(window[:, None, :] < 0, -1, window[:, None, :] + channel[:, None, :, None])
    picks = np.arange(weight.size).reshape(outputs, 1, per_group, -1)
    picks = np.broadcast_to(picks, places.shape)
    rows = outputs * window.shape[0]
    bias = _channel_bias(inputs, outputs, window.shape[0])
    made = _filter(network, x, weight, places.reshape(rows, -1), picks.reshape(rows, -1), bias)
    return Tensor(made.reshape(outputs, *after))


@_rule("ConvTranspose", attributes=(*_CONVOLUTION, "output_padding"))
def _conv_transpose(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    x, weight, groups = _convolution_operands(node, inputs, 0)
    size, kernel, axes = x.shape[1:], weight.shape[2:], weight.ndim - 2
    if node.text("auto_pad", "NOTSET") != "NOTSET":
        raise NotAuditableError("auto_pad")
    strides, dilations = node.integers("strides", [1] * axes), node.integers("dilations", [1] * axes)
    extra, pads = node.integers("output_padding", [0] * axes), _pads(node, size, kernel, strides)
    after = tuple(
        (size[a] - 1) * strides[a] + (kernel[a] - 1) * dilations[a] + 1 + extra[a] - pads[a] - pads[a + axes]
        for a in range(axes)
    )
    if min([*after, *strides, *dilations]) < 1:
        raise NotAuditableError("nothing is left of the tensor")
    outs, taps = np.indices(after).reshape(axes, -1, 1), np.indices(kernel).reshape(axes, 1, -1)
    window = np.zeros((math.prod(after), math.prod(kernel)), dtype=np.int64)
    outside = np.zeros(window.shape, dtype=bool)
    for a in range(axes):
        # out = in * stride + tap * dilation - pad
        reached = outs[a] + pads[a] - taps[a] * dilations[a]
        along = reached // strides[a]
        outside |= (reached % strides[a] != 0) | (along < 0) | (along >= size[a])
        window = window * size[a] + along
    window = np.where(outside, -1, window)
    inputs_per_group, outputs_per_group = weight.shape[0] // groups, weight.shape[1]
    outputs, pixels, n_taps = outputs_per_group * groups, math.prod(size), math.prod(kernel)
    _fits(outputs * window.shape[0] * inputs_per_group * n_taps)
    out = np.arange(outputs)
    channel = (out // outputs_per_group * inputs_per_group)[:, None] + np.arange(inputs_per_group)
    places = np.where(window[:, None, :] < 0, -1, window[:, None, :] + channel[:, None, :, None] * pixels)
    kernels = channel * outputs_per_group + (out % outputs_per_group)[:, None]
    picks = kernels[:, None, :, None] * n_taps + np.arange(n_taps)
    rows = outputs * window.shape[0]
    bias = _channel_bias(inputs, outputs, window.shape[0])
    picks = np.broadcast_to(picks, places.shape)
    made = _filter(network, x, weight, places.reshape(rows, -1), picks.reshape(rows, -1), bias)
    return Tensor(made.reshape(outputs, *after))


_POOL = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")


def _pool_windows(node: Node, x: Tensor) -> tuple[tuple[int, ...], np.ndarray]:
    """As `_windows`, for all channels: `C out x taps`, -1 for padding."""
    if node.integer("ceil_mode", 0) or len(x.shape) < 2:
        raise NotAuditableError("ceil_mode, or no spatial axes")
    kernel = node.integers("kernel_shape", [0] * (len(x.shape) - 1))
    after, window = _windows(node, x.shape[1:], kernel)
    if (window < 0).all(axis=1).any():
        raise NotAuditableError("a window holds padding only")
    channels, pixels = x.shape[0], math.prod(x.shape[1:])
    _fits(channels * window.size)
    places = np.where(window < 0, -1, window + (np.arange(channels) * pixels)[:, None, None])
    return (channels, *after), places.reshape(-1, window.shape[1])


@_rule("AveragePool", attributes=(*_POOL, "count_include_pad"))
def _average_pool(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    x = _tensor(inputs)
    shape, places = _pool_windows(node, x)
    taps = places.shape[1]
    counts = np.full(len(places), taps) if node.integer("count_include_pad", 0) else (places >= 0).sum(axis=1)
    shares = ball_numbers([arb(1) / n for n in range(1, taps + 1)], network.bits)
    operator = gathered(places, np.broadcast_to((counts - 1)[:, None], places.shape), shares, x.flat.size)
    return Tensor(network.linear(x.flat, operator, taps + 2).reshape(shape))


@_rule("MaxPool", attributes=(*_POOL, "storage_order"))
def _max_pool(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    x = _tensor(inputs)
    if len(node.outputs) > 1:
        raise NotAuditableError("its indices jump")
    shape, places = _pool_windows(node, x)
    return Tensor(network.groups(np.where(places < 0, ABSENT, x.flat[places]), _largest).reshape(shape))


# --- reductions -------------------------------------------------------------------------------------------------------


def _largest(values: list[arb]) -> list[arb]:
    found = values[0]
    for value in values[1:]:
        found = found.max(value)
    return [found]


def _smallest(values: list[arb]) -> list[arb]:
    found = values[0]
    for value in values[1:]:
        found = found.min(value)
    return [found]


def _reduced(node: Node, inputs: Sequence[Value | None], x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """Groups that are reduced, one a row, and the shape of the result."""
    if _given(inputs, 1):
        operand = inputs[1]
        if not isinstance(operand, np.ndarray) or operand.dtype.kind not in "iu":
            raise NotAuditableError("the axes must be constant integers")
        axes = [int(axis) for axis in operand.ravel()]
    else:
        named = node.attributes.get("axes", [])
        axes = [int(axis) for axis in named] if isinstance(named, list) else []
    if not axes:
        raise NotAuditableError("it names no axes, so that it would reduce the batch too")
    gone = sorted({_axis(axis, x) for axis in axes})
    kept = [axis for axis in range(len(x.shape)) if axis not in gone]
    groups = np.transpose(x.ids, kept + gone).reshape(math.prod(x.shape[axis] for axis in kept), -1)
    keep = node.integer("keepdims", 1)
    shape = [1 if axis in gone else size for axis, size in enumerate(x.shape) if keep or axis not in gone]
    return groups, tuple(shape)


_REDUCE = ("axes", "keepdims", "noop_with_empty_axes")


def _sums(network: Network, groups: np.ndarray, mean: bool) -> np.ndarray:
    n = groups.shape[1]
    share = ball_numbers([arb(1) / n], network.bits) if mean else Numbers([1], 0, arb(0))
    places = np.arange(groups.size).reshape(groups.shape)
    return network.linear(groups.ravel(), gathered(places, np.zeros_like(places), share, groups.size), n + 1)


@_rule("ReduceSum", "ReduceMean", attributes=_REDUCE)
def _reduce_sum(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    groups, shape = _reduced(node, inputs, _tensor(inputs))
    return Tensor(_sums(network, groups, node.operator == "ReduceMean").reshape(shape))


@_rule("ReduceMax", "ReduceMin", attributes=_REDUCE)
def _reduce_max(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    groups, shape = _reduced(node, inputs, _tensor(inputs))
    largest = node.operator == "ReduceMax"
    if groups.shape[1] == 2:
        return Tensor(network.sorted_pairs(groups[:, 0], groups[:, 1], largest).reshape(shape))
    return Tensor(network.groups(groups, _largest if largest else _smallest).reshape(shape))


@_rule("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    x = _tensor(inputs)
    groups = x.ids.reshape(x.shape[0], -1)
    average = node.operator == "GlobalAveragePool"
    made = _sums(network, groups, mean=True) if average else network.groups(groups, _largest)
    return Tensor(made.reshape(x.shape[0], *[1] * (len(x.shape) - 1)))


def _euclidean(values: list[arb]) -> list[arb]:
    total = sum((value * value for value in values), arb(0))
    low, high = total.lower(), total.upper()
    return [(low.sqrt() if low > 0 else arb(0)).union(high.sqrt())]


@_rule("ReduceL2", attributes=_REDUCE)
def _reduce_l2(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    groups, shape = _reduced(node, inputs, _tensor(inputs))
    n = groups.shape[1]
    facts = network.facts(groups)
    network.no_overflow(upper(arb(n) * facts.largest * facts.largest))

    def rounding(bounds: Facts) -> arb:
        # n squares, their sum and the root; squares that underflow shift the root by at most sqrt(n tiny).
        lost = network.format.gamma(n + 2) * bounds.computed
        return upper(lost + root(arb(2 * (n + 1)) * network.format.tiny) * root(arb(len(groups))))

    return Tensor(network.groups(groups, _euclidean, rounding).reshape(shape))


@_rule("TopK", attributes=("axis", "largest", "sorted"))
def _top_k(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    x = _tensor(inputs)
    operand = inputs[1]
    if not isinstance(operand, np.ndarray) or operand.size != 1 or not node.integer("sorted", 1):
        raise NotAuditableError("k must be a constant, and the result sorted")
    axis, k = _axis(node.integer("axis", -1), x), int(operand.ravel()[0])
    moved = np.moveaxis(x.ids, axis, -1)
    if not 1 <= k <= moved.shape[-1]:
        raise NotAuditableError(f"k = {k} of {moved.shape[-1]}")
    descending = bool(node.integer("largest", 1))

    def ordered(values: list[arb]) -> list[arb]:
        # The i-th of the true numbers lies between the i-th of the lower and the i-th of the upper ends.
        lows = sorted((value.lower() for value in values), key=_order, reverse=descending)
        highs = sorted((value.upper() for value in values), key=_order, reverse=descending)
        return [low.union(high) for low, high in zip(lows, highs, strict=True)][:k]

    made = network.groups(moved.reshape(-1, moved.shape[-1]), ordered)
    return Tensor(np.moveaxis(made.reshape(*moved.shape[:-1], k), -1, axis))


class _order:
    """Exact numbers in their order."""

    def __init__(self, value: arb) -> None:
        self.value = value

    def __lt__(self, other: _order) -> bool:
        return bool(self.value < other.value)


# --- elementwise ------------------------------------------------------------------------------------------------------


@_rule("Max", "Min")
def _max(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    if len(inputs) != 2:
        raise NotAuditableError("two operands are read here")
    left, right = inputs
    largest = node.operator == "Max"
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.shape != right.shape:
            raise NotAuditableError("operands of different shape")
        return Tensor(network.sorted_pairs(left.flat, right.flat, largest).reshape(left.shape))
    first = isinstance(left, Tensor)
    ids, constant = _spread(_tensor(inputs, int(not first)), _floats(inputs, int(first)))
    limits = itertools.cycle(_balls(constant))
    # Groups of one number each, with the constant that belongs to it.
    clip = (lambda v: [v[0].max(next(limits))]) if largest else (lambda v: [v[0].min(next(limits))])
    return Tensor(network.groups(ids.reshape(-1, 1), clip).reshape(ids.shape))


@_rule("Relu")
def _relu(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    return Tensor(network.each(_tensor(inputs).ids, lambda value: value.max(arb(0))))


@_rule("Abs")
def _abs(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    return Tensor(network.each(_tensor(inputs).ids, abs))


@_rule("LeakyRelu", attributes=("alpha",))
def _leaky_relu(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    alpha = arb(node.number("alpha", 0.01))
    slope = upper(abs(alpha).max(arb(1)))
    return Tensor(
        network.each(_tensor(inputs).ids, lambda value: value.max(arb(0)) + alpha * value.min(arb(0)), slope, 1)
    )


@_rule("Clip")
def _clip(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    low, high = (
        arb(float(_floats(inputs, position).reshape(()))) if _given(inputs, position) else None for position in (1, 2)
    )

    def clip(value: arb) -> arb:
        value = value if low is None else value.max(low)
        return value if high is None else value.min(high)

    return Tensor(network.each(_tensor(inputs).ids, clip))


@_rule("Cast", attributes=("to", "saturate", "round_mode"))
def _cast(network: Network, node: Node, inputs: Sequence[Value | None]) -> Tensor:
    wanted = {"float64": 11, "float32": 1}[network.format.name]
    if node.integer("to", 0) != wanted:
        raise NotAuditableError("a cast of data to another format than the graph's")
    return _tensor(inputs)
