"""TODO: service/certificate/rules/operands.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.certificate.graph import Node
from service.certificate.values import (
    Constant,
    Squares,
    Value,
    View,
)

Array = NDArray[np.float64]


class Refusal(Exception):
    """Why one node has no proved rule."""


Operands = Sequence[Value | None]
"""The operands of a node, None where an optional one is left out."""


def data_operand(value: Value | None, what: str = "its input") -> View:
    if isinstance(value, View):
        return value
    if isinstance(value, Squares):
        raise Refusal(f"{what} is a square, which has no Lipschitz constant")
    raise Refusal(f"{what} must depend on the image")


def float_operand(value: Value | None, what: str) -> Array:
    """A constant operand as the exact float64 numbers that it holds."""
    if not isinstance(value, Constant) or value.depends_on_batch:
        raise Refusal(f"{what} must be a constant")
    if value.array.dtype.kind != "f":
        raise Refusal(f"{what} must hold floating-point numbers")
    return value.array.astype(np.float64)


def integer_operand(value: Value | None, what: str, batch_allowed: bool = False) -> list[int]:
    """Constant integers; only a new shape may name the batch size, or the images of one batch size get another map."""
    if isinstance(value, Constant) and value.depends_on_batch and not batch_allowed:
        raise Refusal(f"{what} depends on the batch size")
    if not isinstance(value, Constant) or value.array.dtype.kind not in "iu":
        raise Refusal(f"{what} must be constant integers")
    return value.array.ravel().tolist()


def constant_shape(value: Value | None) -> tuple[int, ...]:
    """The shape of a constant operand."""
    return value.array.shape if isinstance(value, Constant) else ()


def optional_operand(inputs: Operands, position: int) -> Value | None:
    return inputs[position] if position < len(inputs) else None


def int_attribute(node: Node, name: str, default: int) -> int:
    value = node.attributes.get(name, default)
    if not isinstance(value, int):
        raise Refusal(f"attribute {name} must be an integer")
    return value


def flag_attribute(node: Node, name: str, default: int) -> bool:
    """An attribute that is 0 or 1: of any other number runtimes make what they like."""
    value = int_attribute(node, name, default)
    if value not in (0, 1):
        raise Refusal(f"attribute {name} must be 0 or 1")
    return value == 1


def float_attribute(node: Node, name: str, default: float) -> float:
    # ONNX attributes are float32, defaults included: a float64 kernel computes with float32(0.01), not with 0.01.
    value = node.attributes.get(name, float(np.float32(default)))
    if not isinstance(value, (int, float)):
        raise Refusal(f"attribute {name} must be a number")
    if not math.isfinite(value):
        raise Refusal(f"attribute {name} is not finite")
    return float(value)


def image_axis(axis: int, view: View) -> int:
    """An ONNX axis, which counts the batch, as an axis of the image's own shape."""
    rank = len(view.shape) + 1
    if not -rank <= axis < rank:
        raise Refusal(f"axis {axis} is outside of the {rank} axes")
    axis %= rank
    if axis == 0:
        raise Refusal("it works along the batch axis and would mix images")
    return axis - 1


def broadcast_constant(constant: Array, view: View) -> tuple[Array, View]:
    """Numpy broadcasting of a constant against the image's own axes; a view may repeat its elements."""
    rank = len(view.shape)
    if constant.ndim == rank + 1:
        if constant.shape[0] != 1:
            raise Refusal("a constant has its own batch axis")
        constant = constant[0]
    if constant.ndim > rank:
        raise Refusal("a constant has more axes than the image's tensor")
    try:
        shape = np.broadcast_shapes(constant.shape, view.shape)
    except ValueError as error:
        raise Refusal(f"shapes {constant.shape} and {view.shape} do not broadcast") from error
    spread = view if shape == view.shape else view.rearranged(np.broadcast_to(view.index, shape))
    return np.broadcast_to(constant, shape), spread
