"""The typed network: operators with explicit attributes, constants as arrays, proved shapes, the batch axis apart.

A `Network` is the one meaning of a model: the certifier proves it, `writer` writes it, the runtime runs the written
bytes. `reader` makes one of an ONNX file. An operator has the name, operands and attributes of an ONNX operator, but
every attribute is stated, every axis is counted from the front, and every length is a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np

Shape = tuple[int, ...]
"""Of one image's tensor: the batch axis, always the first, is left out."""
Attribute = int | float | str | tuple[int, ...]
Precision = Literal["float32", "float64"]
ELEMENT_TYPES: dict[Precision, int] = {"float32": 1, "float64": 11}
"""Numbers of the formats in ONNX, `TensorProto.DataType`."""


class UnsupportedModelError(Exception):
    """A model cannot be read, or no bound can be proved for it.

    Attributes:
        reasons: every node (or input, output, weight) that stands in the way, with why, one line each.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("the graph cannot be certified:\n" + "\n".join(f"  - {reason}" for reason in reasons))


class Refusal(Exception):
    """Why one node is not supported."""


@dataclass(frozen=True)
class Tensor:
    """The result of an operator, or an input; of shape `N x shape`."""

    number: int
    shape: Shape


@dataclass(frozen=True, eq=False)
class Constant:
    """An array that does not depend on the image; equal if type, shape and bytes are equal."""

    array: np.ndarray

    def __post_init__(self) -> None:
        array = np.asarray(self.array, order="C").view()
        array.flags.writeable = False
        object.__setattr__(self, "array", array)

    def _bytes(self) -> np.ndarray:
        return self.array.reshape(-1).view(np.uint8)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Constant)
            and (self.array.dtype, self.array.shape) == (other.array.dtype, other.array.shape)
            and np.array_equal(self._bytes(), other._bytes())
        )

    def __hash__(self) -> int:
        # Weights are large, and rarely alike at both ends.
        ends = self._bytes()
        return hash((self.array.dtype.str, self.array.shape, ends[:256].tobytes(), ends[-256:].tobytes()))


Operand = Tensor | Constant | None
"""Null where an optional operand is left out."""


@dataclass(frozen=True)
class Operator:
    """One operator with all of its attributes."""

    kind: str
    """Name of the ONNX operator."""
    operands: tuple[Operand, ...]
    attributes: tuple[tuple[str, Attribute], ...]
    """Sorted by name."""
    results: tuple[Tensor, ...]
    label: str = field(default="", compare=False)
    """How messages name it: operator, and name or first output of the node that it was read from."""

    def attribute(self, name: str) -> Attribute:
        """Return the value of an attribute that this kind of operator has."""
        return dict(self.attributes)[name]

    def integer(self, name: str) -> int:
        """Return an attribute that is an integer, or a flag, 0 or 1."""
        return cast(int, self.attribute(name))

    def integers(self, name: str) -> tuple[int, ...]:
        """Return an attribute that lists integers."""
        return cast("tuple[int, ...]", self.attribute(name))

    def number(self, name: str) -> float:
        """Return an attribute that is a number."""
        return cast(float, self.attribute(name))

    def text(self, name: str) -> str:
        """Return an attribute that is a word."""
        return cast(str, self.attribute(name))


@dataclass(frozen=True)
class Network:
    """A model: inputs, operators in the order of evaluation, outputs."""

    inputs: tuple[Tensor, ...]
    """The image first."""
    precision: Precision
    operators: tuple[Operator, ...]
    outputs: tuple[Tensor, ...]

    @property
    def image(self) -> Tensor:
        """The first input."""
        return self.inputs[0]

    @property
    def largest(self) -> int:
        """Numbers in the largest tensor of one image."""
        tensors = [self.image, *(tensor for operator in self.operators for tensor in operator.results)]
        return max(math.prod(tensor.shape) for tensor in tensors)

    @property
    def dtype(self) -> np.dtype[np.floating]:
        """The floating-point type of all tensors that depend on an input."""
        return np.dtype(self.precision)
