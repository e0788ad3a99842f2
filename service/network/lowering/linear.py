"""Lowering of matrix products, convolutions and batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.network.lowering.table import Inputs, Known, Reading, lowers, operand, tensor_operand
from service.network.lowering.windows import extent_of, output_size, pads_of
from service.network.nodes import Node
from service.network.operators import Constant, Operand, Refusal, Shape, Tensor

_CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@lowers("Gemm", versions=(7, 9, 11, 13), attributes=("alpha", "beta", "transA", "transB"))
def _gemm(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State weight and bias; a bias of any shape that broadcasts to one row becomes that row's vector."""
    x = tensor_operand(operand(inputs, 0), "the first operand")
    if node.flag("transA", 0):
        raise Refusal("transA=1 would contract the batch axis")
    weight = reading.number(operand(inputs, 1), "the weight")
    transposed = node.flag("transB", 0)
    if len(x.shape) != 1 or weight.array.ndim != 2:
        raise Refusal("Gemm needs a flat tensor N x n and a weight matrix")
    n, m = weight.array.shape[::-1] if transposed else weight.array.shape
    _check_inner(n, x.shape)
    bias: Operand = None
    given = operand(inputs, 2)
    if given is not None:
        array = reading.number(given, "the bias").array
        array = array[0] if array.ndim == 2 and array.shape[0] == 1 else array
        if array.shape not in ((), (1,), (m,)):
            raise Refusal(f"a bias of shape {array.shape} does not fit {m} outputs")
        bias = Constant(np.broadcast_to(array, (m,)))
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    if bias is None:
        beta = 1.0
    return reading.emit(node, [x, weight, bias], (m,), alpha=alpha, beta=beta, transA=0, transB=int(transposed))


def _check_inner(n: int, shape: Shape) -> None:
    if shape[-1:] != (n,):
        raise Refusal(f"the weight has {n} rows but the tensor ends with {shape[-1:]}")


@lowers("MatMul", versions=(1, 9, 13))
def _matmul(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the constant matrix, left or right."""
    left, right = operand(inputs, 0), operand(inputs, 1)
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        raise Refusal("a product of two tensors that both depend on the image has no Lipschitz constant")
    if isinstance(left, Tensor):
        weight = reading.number(right, "the right operand")
        if weight.array.ndim != 2:
            raise Refusal("the constant operand must be a matrix")
        _check_inner(weight.array.shape[0], left.shape)
        return reading.emit(node, [left, weight], (*left.shape[:-1], weight.array.shape[1]))
    x = tensor_operand(right, "one operand")
    weight = reading.number(left, "the left operand")
    if weight.array.ndim != 2 or len(x.shape) < 2 or weight.array.shape[1] != x.shape[-2]:
        raise Refusal("a constant left operand must be a matrix, and the tensor N x ... x n x P")
    return reading.emit(node, [weight, x], (*x.shape[:-2], weight.array.shape[0], x.shape[-1]))


def _kernel(node: Node, kernel: np.ndarray) -> int:
    """Return the number of spatial axes of a kernel."""
    axes = kernel.ndim - 2
    if axes < 1:
        raise Refusal(f"a kernel of shape {kernel.shape}")
    if node.sizes("kernel_shape", kernel.shape[2:]) != list(kernel.shape[2:]):
        raise Refusal("kernel_shape is not the shape of the weight")
    return axes


def _bias(reading: Reading, value: Known | None, channels: int) -> Operand:
    if value is None:
        return None
    bias = reading.number(value, "the bias")
    if bias.array.shape != (channels,):
        raise Refusal(f"a bias of shape {bias.array.shape} does not fit {channels} channels")
    return bias


def _steps(node: Node, axes: int) -> tuple[list[int], list[int]]:
    """Return strides and dilations, all at least 1."""
    strides, dilations = node.sizes("strides", [1] * axes), node.sizes("dilations", [1] * axes)
    if min(*strides, *dilations) < 1:
        raise Refusal(f"strides {strides} and dilations {dilations} must be 1 or more")
    return strides, dilations


@lowers("Conv", versions=(1, 11, 22), attributes=_CONV_ATTRIBUTES)
def _conv(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State pads as numbers, and strides, dilations and groups."""
    x = tensor_operand(operand(inputs, 0))
    kernel = reading.number(operand(inputs, 1), "the weight")
    axes, group = _kernel(node, kernel.array), node.integer("group", 1)
    out, per_group = kernel.array.shape[:2]
    if group < 1 or len(x.shape) != axes + 1 or x.shape[0] != per_group * group or out % group:
        raise Refusal(f"a kernel {kernel.array.shape} in {group} groups does not fit an image {x.shape}")
    strides, dilations = _steps(node, axes)
    extent = extent_of(kernel.array.shape[2:], dilations)
    pads = pads_of(node, x.shape[1:], extent, strides)
    size = output_size(x.shape[1:], extent, strides, pads)
    return reading.emit(
        node,
        [x, kernel, _bias(reading, operand(inputs, 2), out)],
        (out, *size),
        dilations=tuple(dilations),
        group=group,
        pads=(*(low for low, _ in pads), *(high for _, high in pads)),
        strides=tuple(strides),
    )


@lowers("ConvTranspose", versions=(1, 11, 22), attributes=(*_CONV_ATTRIBUTES, "output_padding", "output_shape"))
def _conv_transpose(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State pads as numbers, and strides, dilations, groups and output padding."""
    x = tensor_operand(operand(inputs, 0))
    kernel = reading.number(operand(inputs, 1), "the weight")
    axes, group = _kernel(node, kernel.array), node.integer("group", 1)
    if group < 1 or len(x.shape) != axes + 1 or x.shape[0] != kernel.array.shape[0] or x.shape[0] % group:
        raise Refusal(f"a kernel {kernel.array.shape} in {group} groups does not fit an image {x.shape}")
    if node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Refusal("auto_pad, which runtimes read in two ways; give the pads as numbers")
    if "output_shape" in node.attributes:
        raise Refusal("output_shape has no proved rule; give the pads as numbers")
    strides, dilations = _steps(node, axes)
    extra = node.sizes("output_padding", [0] * axes)
    if any(not 0 <= more < max(s, d) for more, s, d in zip(extra, strides, dilations, strict=True)):
        raise Refusal(f"output_padding {extra} must be below stride or dilation")
    pads = pads_of(node, x.shape[1:], [1] * axes, strides)
    size = [
        (n - 1) * s + k + more - low - high
        for n, s, k, more, (low, high) in zip(
            x.shape[1:], strides, extent_of(kernel.array.shape[2:], dilations), extra, pads, strict=True
        )
    ]
    channels = kernel.array.shape[1] * group
    return reading.emit(
        node,
        [x, kernel, _bias(reading, operand(inputs, 2), channels)],
        (channels, *size),
        dilations=tuple(dilations),
        group=group,
        output_padding=tuple(extra),
        pads=(*(low for low, _ in pads), *(high for _, high in pads)),
        strides=tuple(strides),
    )


@lowers(
    "BatchNormalization",
    versions=(7, 9, 14, 15),
    attributes=("epsilon", "momentum", "spatial", "training_mode"),
)
def _batch_normalization(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State epsilon; the inference form."""
    x = tensor_operand(operand(inputs, 0))
    if node.flag("training_mode", 0) or len([name for name in node.outputs if name]) > 1:
        raise Refusal("its training form mixes the images of a batch")
    if not node.flag("spatial", 1):
        raise Refusal("spatial=0 has no proved rule")
    if len(inputs) != 5 or not x.shape:
        raise Refusal("it needs scale, bias, mean and variance")
    parameters = [reading.number(value, "every parameter") for value in inputs[1:5]]
    if any(one.array.shape != x.shape[:1] for one in parameters):
        raise Refusal(f"its parameters do not fit {x.shape[0]} channels")
    return reading.emit(node, [x, *parameters], x.shape, epsilon=node.number("epsilon", 1e-5))
