"""Reading of an operator's operands by its rule; those that no theorem covers are refused."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from service.certificate.limits import MOST_ELEMENTS, fits
from service.certificate.values import Squares, Value, View
from service.network.limits import size_error
from service.network.operators import Constant, Refusal

Array = NDArray[np.float64]

Operands = Sequence[Value | None]
"""The operands of an operator; null where an optional one is left out."""


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
    if not isinstance(value, Constant):
        raise Refusal(f"{name} must be a constant")
    if value.array.dtype.kind != "f":
        raise Refusal(f"{name} must hold floating-point numbers")
    return value.array.astype(np.float64)


def integer_array(value: Value | None, name: str) -> NDArray[np.int64]:
    """Return constant integers.

    Raises:
        Refusal: the operand is not constant, or holds no integers.
    """
    if not isinstance(value, Constant) or value.array.dtype.kind not in "iu":
        raise Refusal(f"{name} must be constant integers")
    return cast(NDArray[np.int64], value.array)


def integer_operand(value: Value | None, name: str) -> list[int]:
    """Return a few constant integers, such as axes or a shape.

    Raises:
        Refusal: see `integer_array`.
    """
    return integer_array(value, name).ravel().tolist()


def optional_operand(inputs: Operands, position: int) -> Value | None:
    """Return an operand, or null where it is left out."""
    return inputs[position] if position < len(inputs) else None


def limit_size(*shapes: Sequence[int]) -> None:
    """Refuse a node before it makes an array that is too large.

    Args:
        shapes: of the result and of the arrays on the way to it, the batch axis left out.

    Raises:
        Refusal: an array would have more than `limits.MOST_ELEMENTS` elements.
    """
    largest = max(shapes, key=math.prod)
    if not fits(*largest):
        raise Refusal(size_error(math.prod(largest), MOST_ELEMENTS))


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


def broadcast_constant(constant: Array, view: View) -> tuple[Array, View]:
    """Return a constant and a view broadcast against each other; the view may repeat its elements."""
    shape = broadcast_shape(constant.shape, view.shape)
    spread = view if shape == view.shape else view.rearranged(np.broadcast_to(view.index, shape))
    return np.broadcast_to(constant, shape), spread
