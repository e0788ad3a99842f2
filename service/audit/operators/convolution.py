"""Convolutions and their adjoints, any stride, dilation, groups and zero padding."""

from __future__ import annotations

import math

import numpy as np

from service.audit.affine import linear
from service.audit.balls import NotAuditableError
from service.audit.graph import Node
from service.audit.maps import Shared, exact_weights
from service.audit.network import Network, Tensor
from service.audit.operators.table import Operands, balls, floats, is_given, rule, tensor
from service.audit.operators.windows import pads_of, windows


def _filter(
    network: Network, x: Tensor, weight: np.ndarray, window: np.ndarray, bias: np.ndarray | None, groups: int
) -> np.ndarray:
    """Append sums over the windows of one channel; return the identities, `O x places`.

    Args:
        network: the layers so far.
        x: channels first.
        weight: `O x channels of a group x taps`.
        window: `places x taps`, -1 for padding.
        bias: of each output channel.
        groups: of channels.
    """
    outputs, channels = len(weight) // groups, weight.shape[1]
    pixels = math.prod(x.shape[1:])
    made: list[np.ndarray] = []
    for group in range(groups):
        numbers = x.flat[group * channels * pixels : (group + 1) * channels * pixels]
        here = slice(group * outputs, (group + 1) * outputs)
        # Places x channels x taps.
        channel = np.arange(channels).reshape(1, -1, 1) * pixels
        places = np.where(window[:, None, :] < 0, -1, window[:, None, :] + channel).reshape(len(window), -1)
        operator = Shared(exact_weights(weight[here].reshape(outputs, -1)), places, numbers.size)
        added = None if bias is None else balls(bias[here]) * len(window)
        found = linear(network, numbers, operator, places.shape[1] + 1, added)
        made.append(found.reshape(len(window), outputs).T)
    return np.concatenate(made)


def _operands(node: Node, operands: Operands, channels_axis: int) -> tuple[Tensor, np.ndarray, int]:
    x, weight, groups = tensor(operands), floats(operands, 1), node.integer("group", 1)
    axes = weight.ndim - 2
    if axes < 1 or len(x.shape) != axes + 1 or groups < 1 or weight.shape[0] % groups:
        raise NotAuditableError(f"a kernel {weight.shape} in {groups} groups does not fit {x.shape}")
    if x.shape[0] != (weight.shape[0] if channels_axis == 0 else weight.shape[1] * groups):
        raise NotAuditableError(f"a kernel {weight.shape} in {groups} groups does not fit {x.shape}")
    if node.integers("kernel_shape", list(weight.shape[2:])) != list(weight.shape[2:]):
        raise NotAuditableError("kernel_shape is not the shape of the weight")
    return x, weight, groups


def _channel_bias(operands: Operands, channels: int) -> np.ndarray | None:
    if not is_given(operands, 2):
        return None
    bias = floats(operands, 2)
    if bias.shape != (channels,):
        raise NotAuditableError(f"a bias of shape {bias.shape} does not fit {channels} channels")
    return bias


_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@rule("Conv", attributes=_ATTRIBUTES)
def _conv(network: Network, node: Node, operands: Operands) -> Tensor:
    x, weight, groups = _operands(node, operands, 1)
    after, window = windows(node, x.shape[1:], weight.shape[2:])
    outputs = len(weight)
    taps = weight.reshape(outputs, weight.shape[1], -1)
    made = _filter(network, x, taps, window, _channel_bias(operands, outputs), groups)
    return Tensor(made.reshape(outputs, *after))


@rule("ConvTranspose", attributes=(*_ATTRIBUTES, "output_padding"))
def _conv_transpose(network: Network, node: Node, operands: Operands) -> Tensor:
    x, weight, groups = _operands(node, operands, 0)
    size, kernel, axes = x.shape[1:], weight.shape[2:], weight.ndim - 2
    if node.text("auto_pad", "NOTSET") != "NOTSET":
        raise NotAuditableError("auto_pad")
    strides, dilations = node.integers("strides", [1] * axes), node.integers("dilations", [1] * axes)
    extra, pads = node.integers("output_padding", [0] * axes), pads_of(node, size, kernel, strides)
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
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    # Groups x inputs x outputs x taps: as the weight of a convolution.
    taps = weight.reshape(groups, inputs, outputs, -1).swapaxes(1, 2).reshape(groups * outputs, inputs, -1)
    made = _filter(network, x, taps, window, _channel_bias(operands, groups * outputs), groups)
    return Tensor(made.reshape(groups * outputs, *after))
