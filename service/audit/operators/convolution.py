"""Convolutions and their adjoints, any stride, dilation, groups and zero padding."""

from __future__ import annotations

import math

import numpy as np

from service.audit.affine import linear
from service.audit.balls import NotAuditableError
from service.audit.graph import Node
from service.audit.matrices import gathered, require_size
from service.audit.network import Network, Tensor
from service.audit.operators.table import Operands, balls, floats, is_given, numbers, rule, tensor
from service.audit.operators.windows import pads_of, windows


def _filter(
    network: Network, x: Tensor, weight: np.ndarray, places: np.ndarray, picks: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """Sums of weights `picks[o, t]` times numbers `places[o, t]`."""
    operator = gathered(places, picks, numbers(network, weight), x.flat.size)
    return linear(network, x.flat, operator, places.shape[1] + 1, None if bias is None else balls(bias))


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


def _channel_bias(operands: Operands, channels: int, pixels: int) -> np.ndarray | None:
    if not is_given(operands, 2):
        return None
    bias = floats(operands, 2)
    if bias.shape != (channels,):
        raise NotAuditableError(f"a bias of shape {bias.shape} does not fit {channels} channels")
    return np.repeat(bias, pixels)


_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@rule("Conv", attributes=_ATTRIBUTES)
def _conv(network: Network, node: Node, operands: Operands) -> Tensor:
    x, weight, groups = _operands(node, operands, 1)
    after, window = windows(node, x.shape[1:], weight.shape[2:])
    outputs, per_group, pixels = len(weight), weight.shape[1], math.prod(x.shape[1:])
    require_size(outputs * window.shape[0] * per_group * window.shape[1])
    first = np.arange(outputs) // (outputs // groups) * per_group
    channel = (first[:, None] + np.arange(per_group)) * pixels
    # O x places x channels x taps
    places = np.where(window[:, None, :] < 0, -1, window[:, None, :] + channel[:, None, :, None])
    picks = np.arange(weight.size).reshape(outputs, 1, per_group, -1)
    picks = np.broadcast_to(picks, places.shape)
    rows = outputs * window.shape[0]
    bias = _channel_bias(operands, outputs, window.shape[0])
    made = _filter(network, x, weight, places.reshape(rows, -1), picks.reshape(rows, -1), bias)
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
    inputs_per_group, outputs_per_group = weight.shape[0] // groups, weight.shape[1]
    outputs, pixels, n_taps = outputs_per_group * groups, math.prod(size), math.prod(kernel)
    require_size(outputs * window.shape[0] * inputs_per_group * n_taps)
    out = np.arange(outputs)
    channel = (out // outputs_per_group * inputs_per_group)[:, None] + np.arange(inputs_per_group)
    places = np.where(window[:, None, :] < 0, -1, window[:, None, :] + channel[:, None, :, None] * pixels)
    kernels = channel * outputs_per_group + (out % outputs_per_group)[:, None]
    picks = kernels[:, None, :, None] * n_taps + np.arange(n_taps)
    rows = outputs * window.shape[0]
    bias = _channel_bias(operands, outputs, window.shape[0])
    picks = np.broadcast_to(picks, places.shape)
    made = _filter(network, x, weight, places.reshape(rows, -1), picks.reshape(rows, -1), bias)
    return Tensor(made.reshape(outputs, *after))
