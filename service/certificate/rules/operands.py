"""Reading of a node's operands and attributes by its rule; all that does not fit is refused."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from service.certificate.graph import Node
from service.certificate.limits import fits, size_error
from service.certificate.values import Constant, Squares, Value, View

Array = NDArray[np.float64]

_FEW = 1 << 12
"""Most entries of an operand that names axes, lengths or the like; no tensor has as many axes."""


class Refusal(Exception):
    """Why one node has no proved rule."""


Operands = Sequence[Value | None]
"""The operands of a node; null where an optional one is left out."""


def data_operand(value: Value | None, name: str = "its input") -> View:
    """Return an operand that depends on the image.

    Raises:
        Refusal: it is a constant, a square or left out.
    """
    if isinstance(value, View):
        return value
    if isinstance(value, Squares):
        raise Refusal(f"{name} is a square, which has no Lipschitz constant")
    raise Refusal(f"{name} must depend on the image")


def float_operand(value: Value | None, name: str) -> Array:
    """Return a constant operand as the exact float64 numbers that it holds.

    Raises:
        Refusal: it is not constant, or holds no floating-point numbers.
    """
    if not isinstance(value, Constant) or value.depends_on_batch:
        raise Refusal(f"{name} must be a constant")
    if value.array.dtype.kind != "f":
        raise Refusal(f"{name} must hold floating-point numbers")
    return value.array.astype(np.float64)


def integer_array(value: Value | None, name: str, batch_allowed: bool = False) -> NDArray[np.integer]:
    """Return constant integers.

    Args:
        value: the operand.
        name: its name in a refusal.
        batch_allowed: whether the batch size may be among them. It may in a new shape alone; elsewhere the images of
            one batch size would get another map than those of another.

    Raises:
        Refusal: it is not constant, holds no integers, or holds the batch size.
    """
    if isinstance(value, Constant) and value.depends_on_batch and not batch_allowed:
        raise Refusal(f"{name} depends on the batch size")
    if not isinstance(value, Constant) or value.array.dtype.kind not in "iu":
        raise Refusal(f"{name} must be constant integers")
    return cast(NDArray[np.integer], value.array)


def integer_operand(value: Value | None, name: str, batch_allowed: bool = False) -> list[int]:
    """Return a few constant integers, such as axes or a shape.

    Args:
        value: see `integer_array`.
        name: see `integer_array`.
        batch_allowed: see `integer_array`.

    Raises:
        Refusal: see `integer_array`; or there are too many of them.
    """
    return few_integers(integer_array(value, name, batch_allowed), name)


def few_integers(array: NDArray[np.generic], name: str) -> list[int]:
    """Return the entries of an array that holds one number for each axis, or thereabouts.

    Raises:
        Refusal: there are far more of them.
    """
    if array.size > _FEW:
        raise Refusal(f"{name} are {array.size} numbers, at most {_FEW} are read")
    return array.ravel().tolist()


def optional_operand(inputs: Operands, position: int) -> Value | None:
    """Return an operand, or null where it is left out."""
    return inputs[position] if position < len(inputs) else None


def int_attribute(node: Node, name: str, default: int) -> int:
    """Return an attribute that is an integer.

    Args:
        node: the node.
        name: of the attribute.
        default: its value where it is left out.

    Raises:
        Refusal: it has another type.
    """
    value = node.attributes.get(name, default)
    if not isinstance(value, int):
        raise Refusal(f"attribute {name} must be an integer")
    return value


def flag_attribute(node: Node, name: str, default: int) -> bool:
    """Return an attribute that is 0 or 1: runtimes read other numbers in different ways.

    Args:
        node: the node.
        name: of the attribute.
        default: its value where it is left out.

    Raises:
        Refusal: it is another number.
    """
    value = int_attribute(node, name, default)
    if value not in (0, 1):
        raise Refusal(f"attribute {name} must be 0 or 1")
    return value == 1


def float_attribute(node: Node, name: str, default: float) -> float:
    """Return an attribute that is a finite number.

    Args:
        node: the node.
        name: of the attribute.
        default: its value where it is left out, rounded to float32: ONNX attributes are float32, defaults included, so
            that a float64 kernel computes with float32(0.01) and not with 0.01.

    Raises:
        Refusal: it is no number, or not finite.
    """
    value = node.attributes.get(name, float(np.float32(default)))
    if not isinstance(value, (int, float)):
        raise Refusal(f"attribute {name} must be a number")
    if not math.isfinite(value):
        raise Refusal(f"attribute {name} is not finite")
    return float(value)


def integers_attribute(node: Node, name: str, default: Sequence[int]) -> list[int]:
    """Return an attribute that is a list of integers.

    Args:
        node: the node.
        name: of the attribute.
        default: its value where it is left out; a list of another length is refused.

    Raises:
        Refusal: it is no list, or has another length.
    """
    value = node.attributes.get(name, list(default))
    if not isinstance(value, (list, tuple)):
        raise Refusal(f"attribute {name} must be a list of integers")
    numbers = [int(number) for number in value]  # type: ignore[reportUnknownArgumentType]
    if len(numbers) != len(default):
        raise Refusal(f"attribute {name} has {len(numbers)} entries, expected {len(default)}")
    return numbers


def image_axis(axis: int, view: View) -> int:
    """Return an ONNX axis, which counts the batch, as an axis of the image's own shape.

    Raises:
        Refusal: it is the batch axis, or outside of the tensor.
    """
    rank = len(view.shape) + 1
    if not -rank <= axis < rank:
        raise Refusal(f"axis {axis} is outside of the {rank} axes")
    axis %= rank
    if axis == 0:
        raise Refusal("it works along the batch axis and would mix images")
    return axis - 1


def limit_size(*shapes: Sequence[int]) -> None:
    """Refuse a node before it makes an array that is too large.

    Args:
        shapes: of the result and of the arrays on the way to it, the batch axis left out.

    Raises:
        Refusal: an array would have more than `limits.MOST_ELEMENTS` elements.
    """
    largest = max(shapes, key=math.prod)
    if not fits(*largest):
        raise Refusal(size_error(math.prod(largest)))


def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of several tensors broadcast together, the batch axis left out.

    Raises:
        Refusal: they do not broadcast, or the result would be too large.
    """
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise Refusal(f"shapes {' and '.join(map(str, shapes))} do not broadcast") from error
    limit_size(shape)
    return shape


def constant_of_one_image(constant: Array, rank: int) -> Array:
    """Return a constant without the batch axis, for tensors that have `rank` axes beside it.

    Raises:
        Refusal: it holds several images, or has more axes than the tensors.
    """
    if constant.ndim == rank + 1:
        if constant.shape[0] != 1:
            raise Refusal("a constant has its own batch axis")
        return constant[0]
    if constant.ndim > rank:
        raise Refusal("a constant has more axes than the image's tensor")
    return constant


def broadcast_constant(constant: Array, view: View) -> tuple[Array, View]:
    """Return a constant and a view broadcast against each other; the view may repeat its elements."""
    constant = constant_of_one_image(constant, len(view.shape))
    shape = broadcast_shape(constant.shape, view.shape)
    spread = view if shape == view.shape else view.rearranged(np.broadcast_to(view.index, shape))
    return np.broadcast_to(constant, shape), spread
