"""Lowering of operators that work on each element, and of sums, products and maxima of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from service.network.lowering.table import (
    Inputs,
    Known,
    Reading,
    Unknown,
    broadcast,
    constant_array,
    lowers,
    operand,
    tensor_operand,
    without_batch,
)
from service.network.nodes import Node
from service.network.operators import Constant, Operand, Refusal, Tensor

_SELU = {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}


@lowers("Abs", "Neg", "Relu", "Sigmoid", "Sqrt", "Tanh", versions=(6, 13, 14))
@lowers("Erf", "Sign", versions=(9, 13))
@lowers("HardSwish", versions=(14, 22))
@lowers("Softplus", "Softsign", versions=(1, 22))
def _unary(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return the operator as it is."""
    x = tensor_operand(operand(inputs, 0))
    return reading.emit(node, [x], x.shape)


@lowers("Identity", versions=(1, 13, 14, 16, 19, 21, 23, 24, 25))
@lowers("Dropout", versions=(7, 10, 12, 13, 22), attributes=("ratio", "seed"))
def _identity(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return the operand; of Dropout the inference form."""
    mode = operand(inputs, 2)
    if mode is not None and constant_array(mode, "training_mode").any():
        raise Refusal("training_mode must be a constant false")
    return [tensor_operand(operand(inputs, 0)), Unknown("the mask of Dropout")]


@lowers("Cast", versions=(6, 9, 13, 19, 21, 23, 24, 25), attributes=("to", "saturate", "round_mode"))
def _cast(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return the operand of a cast to the network's own precision."""
    if node.integer("to", 0) != {"float64": 11, "float32": 1}[reading.precision]:
        raise Refusal(f"a cast of data away from {reading.precision}: the analysis covers one format per graph")
    return [tensor_operand(operand(inputs, 0))]


@lowers("LeakyRelu", versions=(6, 16), attributes=("alpha",))
def _leaky_relu(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the slope."""
    x = tensor_operand(operand(inputs, 0))
    return reading.emit(node, [x], x.shape, alpha=node.number("alpha", 0.01))


@lowers("Elu", versions=(6, 22), attributes=("alpha",))
@lowers("Celu", versions=(12,), attributes=("alpha",))
@lowers("ThresholdedRelu", versions=(10, 22), attributes=("alpha",))
def _with_alpha(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State alpha."""
    x = tensor_operand(operand(inputs, 0))
    return reading.emit(node, [x], x.shape, alpha=node.number("alpha", 1.0))


@lowers("Selu", versions=(6, 22), attributes=("alpha", "gamma"))
def _selu(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State alpha and gamma."""
    x = tensor_operand(operand(inputs, 0))
    return reading.emit(node, [x], x.shape, **{name: node.number(name, default) for name, default in _SELU.items()})


@lowers("HardSigmoid", versions=(6, 22), attributes=("alpha", "beta"))
def _hard_sigmoid(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State alpha and beta."""
    x = tensor_operand(operand(inputs, 0))
    return reading.emit(node, [x], x.shape, alpha=node.number("alpha", 0.2), beta=node.number("beta", 0.5))


@lowers("PRelu", versions=(7, 9, 16))
def _prelu(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the slope without the batch axis."""
    x = tensor_operand(operand(inputs, 0))
    slope = without_batch(reading.number(operand(inputs, 1), "the slope").array, len(x.shape))
    if broadcast(x.shape, slope.shape) != x.shape:
        raise Refusal(f"a slope of shape {slope.shape} that broadcasts the tensor {x.shape}")
    return reading.emit(node, [x, Constant(slope)], x.shape)


@lowers("Clip", versions=(6, 11, 12, 13), attributes=("min", "max"))
def _clip(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the limits as operands."""
    x = tensor_operand(operand(inputs, 0))
    if node.version < 11:
        # The default limits are those of float32: no limits for its finite numbers.
        largest = float(np.finfo(np.float32).max)
        stated = reading.precision == "float64"
        limits: list[Operand] = [
            Constant(np.array(node.number(name, default), reading.precision))
            if stated or name in node.attributes
            else None
            for name, default in (("min", -largest), ("max", largest))
        ]
    elif node.attributes:
        raise Refusal("limits as attributes, which this opset does not have")
    else:
        given = [operand(inputs, 1), operand(inputs, 2)]
        limits = [None if one is None else Constant(reading.number(one, "a limit").array.reshape(())) for one in given]
    if limits == [None, None]:
        return [x]
    return reading.emit(node, [x, *limits], x.shape)


def _operands(reading: Reading, inputs: Inputs) -> tuple[list[Operand], tuple[int, ...]]:
    """Return tensors and constants without batch axis, and the shape to which they broadcast."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if not tensors:
        raise Refusal("one operand must depend on the image")
    rank = len(tensors[0].shape)
    if any(len(one.shape) != rank for one in tensors):
        raise Refusal(
            f"tensors of shapes {', '.join(str(one.shape) for one in tensors)} would broadcast across the batch"
        )
    found: list[Operand] = []
    for value in inputs:
        if isinstance(value, Tensor):
            found.append(value)
        else:
            found.append(Constant(without_batch(reading.number(value, "every other operand").array, rank)))
    shapes = [one.shape if isinstance(one, Tensor) else one.array.shape for one in found if one is not None]
    return found, broadcast(*shapes)


@lowers("Add", "Sub", "Mul", "Div", versions=(7, 13, 14))
def _binary(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the operands without batch axis."""
    if len(inputs) != 2:
        raise Refusal("it needs two operands")
    operands, shape = _operands(reading, inputs)
    return reading.emit(node, operands, shape)


@lowers("Max", "Min", "Sum", "Mean", versions=(6, 8, 12, 13))
def _variadic(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the operands without batch axis, of Max and Min each once; of a single operand, the identity."""
    operands, shape = _operands(reading, inputs)
    if node.kind in ("Max", "Min"):
        operands = list(dict.fromkeys(operands))
    if len(operands) == 1:
        return [tensor_operand(inputs[0])]
    return reading.emit(node, operands, shape)


@lowers("Pow", versions=(7, 12, 13, 15))
def _power(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the exponent as one number."""
    x = tensor_operand(operand(inputs, 0))
    array = constant_array(operand(inputs, 1), "the exponent")
    if array.size != 1 or array.ndim > len(x.shape) + 1 or array.dtype.kind not in "iuf":
        raise Refusal("the exponent must be one number")
    exponent = float(array.item())
    if exponent == 1.0:
        return [x]
    if exponent == 3.0:
        return [_product(reading, node, _product(reading, node, x, x), x)]
    return reading.emit(node, [x, Constant(np.array(exponent, reading.precision))], x.shape)


# --- activations that are products of simpler ones --------------------------------------------------------------------


def _one(reading: Reading, node: Node, kind: str, *operands: Tensor | float) -> Tensor:
    """Return the result of an operator on tensors of one shape and numbers of the network's precision."""
    stated = [one if isinstance(one, Tensor) else Constant(np.array(one, reading.precision)) for one in operands]
    (shape,) = {one.shape for one in operands if isinstance(one, Tensor)}
    (result,) = reading.emit(node.called(kind), stated, shape)
    return result


def _product(reading: Reading, node: Node, left: Tensor, right: Tensor | float) -> Tensor:
    return _one(reading, node, "Mul", left, right)


@lowers("Gelu", versions=(20,), attributes=("approximate",))
def _gelu(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return `x / 2 (1 + erf(x / sqrt 2))`, or with tanh; the irrational constants are the nearest of the precision."""
    x = tensor_operand(operand(inputs, 0))
    if node.text("approximate", "none", ("none", "tanh")) == "none":
        inner = _one(reading, node, "Erf", _product(reading, node, x, math.sqrt(0.5)))
    else:
        cube = _product(reading, node, _product(reading, node, _product(reading, node, x, 0.044715), x), x)
        argument = _product(reading, node, _one(reading, node, "Add", x, cube), math.sqrt(2.0 / math.pi))
        inner = _one(reading, node, "Tanh", argument)
    return [_product(reading, node, _product(reading, node, x, 0.5), _one(reading, node, "Add", inner, 1.0))]


@lowers("Mish", versions=(18, 22))
def _mish(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return `x tanh(softplus(x))`."""
    x = tensor_operand(operand(inputs, 0))
    return [_product(reading, node, x, _one(reading, node, "Tanh", _one(reading, node, "Softplus", x)))]


@lowers("Swish", versions=(24,), attributes=("alpha",))
def _swish(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return `x sigmoid(alpha x)`."""
    x = tensor_operand(operand(inputs, 0))
    alpha = node.number("alpha", 1.0)
    scaled = x if alpha == 1.0 else _product(reading, node, x, alpha)
    return [_product(reading, node, x, _one(reading, node, "Sigmoid", scaled))]
