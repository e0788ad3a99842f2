"""Nodes of an ONNX file: decoded attributes, the version of each operator, and parameters in their older forms.

Older opsets state axes, pads and sizes as attributes, newer ones as operands; the functions here read either form.
Arrays are those of constant operands; an operand that is absent, or depends on the image, is null in a list of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from service.network.limits import MOST_NUMBERS
from service.network.operators import Refusal

_NUMBERS = frozenset("biuf")


@dataclass(frozen=True)
class Node:
    """One node of the file."""

    label: str
    """Operator, and the node's name or first output: how messages name it."""
    kind: str
    """Name of the operator; with its domain, if that is not the standard one."""
    version: int
    """The opset in which this form of the operator was introduced; 0 if the operator is not known."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, object]

    def called(self, kind: str) -> Node:
        """Return the node as one of another kind, for an operator that stands for it."""
        return replace(self, kind=kind)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer attribute; raise Refusal where it is something else, or absent without a default."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise Refusal(f"attribute {name} must be an integer")
        return value

    def flag(self, name: str, default: int) -> bool:
        """Return an attribute that is 0 or 1; raise Refusal for other numbers, which runtimes read in several ways."""
        value = self.integer(name, default)
        if value not in (0, 1):
            raise Refusal(f"attribute {name} must be 0 or 1")
        return value == 1

    def number(self, name: str, default: float) -> float:
        """Return a float attribute, by the format a float32, the default too; raise Refusal if it is not finite."""
        value = self.attributes.get(name, float(np.float32(default)))
        if not isinstance(value, (int, float)) or not np.isfinite(value):
            raise Refusal(f"attribute {name} must be a finite number")
        return float(value)

    def text(self, name: str, default: str, allowed: Sequence[str]) -> str:
        """Return a text attribute.

        Args:
            name: of the attribute.
            default: its value where it is absent.
            allowed: values.

        Raises:
            Refusal: it has another value.
        """
        value = self.attributes.get(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise Refusal(f"{name} {value!r} has no proved rule; supported: {', '.join(allowed)}")
        return value

    def listed(self, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        """Return an attribute that lists integers; null if it is absent and has no default.

        Raises:
            Refusal: it is no such list.
        """
        value = self.attributes.get(name)
        if value is None:
            return None if default is None else list(default)
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, int) for one in value):
            raise Refusal(f"attribute {name} must be a list of integers")
        if len(value) > MOST_NUMBERS:
            raise Refusal(f"attribute {name} lists {len(value)} integers, at most {MOST_NUMBERS}")
        return list(value)  # type: ignore[arg-type]

    def sizes(self, name: str, default: Sequence[int]) -> list[int]:
        """Return an attribute with one integer for each entry of its default.

        Raises:
            Refusal: it has another length.
        """
        found = self.listed(name, default) or list(default)
        if len(found) != len(default):
            raise Refusal(f"attribute {name} has {len(found)} entries, expected {len(default)}")
        return found

    def integers(self, name: str, arrays: Sequence[np.ndarray | None], position: int) -> list[int]:
        """Return integers that are an operand, or, in older opsets, an attribute.

        Args:
            name: of the attribute.
            arrays: constant operands.
            position: of the operand.

        Raises:
            Refusal: neither is there.
        """
        given = self.listed(name)
        operand = optional(arrays, position)
        if (given is None) == (operand is None):
            raise Refusal(f"{name} must be given once, as constant integers")
        return given if given is not None else integers(operand, name)


def optional(arrays: Sequence[np.ndarray | None], position: int) -> np.ndarray | None:
    """Return an operand, null if it is absent."""
    return arrays[position] if position < len(arrays) else None


def integers(array: np.ndarray | None, name: str) -> list[int]:
    """Return the integers of a constant operand; raise Refusal if it is not one, or holds too many."""
    if array is None or array.dtype.kind not in "iu":
        raise Refusal(f"{name} must be constant integers")
    if array.size > MOST_NUMBERS:
        raise Refusal(f"{name}: {array.size} integers, at most {MOST_NUMBERS}")
    return array.ravel().tolist()


def axes_of(node: Node, arrays: Sequence[np.ndarray | None], position: int) -> list[int] | None:
    """Return the axes of a node; null if it names no axes.

    Args:
        node: the node, of any opset.
        arrays: constant operands.
        position: of the operand; in older opsets the axes are an attribute.

    Raises:
        Refusal: axes are given twice.
    """
    given, operand = node.listed("axes"), optional(arrays, position)
    if given is not None and operand is not None:
        raise Refusal("axes are given twice")
    return integers(operand, "the axes") if operand is not None else given


def slice_bounds(
    node: Node, arrays: Sequence[np.ndarray | None], shape: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """Return (axis, start, stop, step) of each axis that a Slice cuts, clamped as the specification says.

    `stop` is -1 where a backward slice runs to the front.

    Args:
        node: the Slice, of any opset.
        arrays: constant operands; the first is the data or null.
        shape: of the data.

    Raises:
        Refusal: a parameter is missing, an axis is named twice, or a step is 0.
    """
    starts, ends = node.integers("starts", arrays, 1), node.integers("ends", arrays, 2)
    axes = axes_of(node, arrays, 3)
    steps_operand = optional(arrays, 4)
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps_operand is None else integers(steps_operand, "the steps")
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise Refusal("starts, ends, axes and steps of different lengths")
    rank = len(shape)
    found: list[tuple[int, int, int, int]] = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if not -rank <= axis < rank:
            raise Refusal(f"axis {axis} is outside of the {rank} axes")
        if step == 0:
            raise Refusal("a step of 0")
        length = shape[axis]
        if step < 0 and (start < -length or end >= length):
            raise Refusal("a backward slice that starts before the front or ends behind the back: read in two ways")
        low, high = (start + length if start < 0 else start), (end + length if end < 0 else end)
        if step > 0:
            bounds = min(max(low, 0), length), min(max(high, 0), length)
        else:
            bounds = min(max(low, 0), length - 1), min(max(high, -1), length - 1)
        found.append((axis % rank, *bounds, step))
    if len({axis for axis, *_ in found}) != len(found):
        raise Refusal("an axis is named twice")
    return found


def split_sizes(node: Node, arrays: Sequence[np.ndarray | None], length: int) -> list[int]:
    """Return the sizes of the parts of a Split.

    Args:
        node: the Split, of any opset.
        arrays: constant operands; the first is the data or null.
        length: of the axis that is split.

    Raises:
        Refusal: the sizes do not fit.
    """
    count = len(node.outputs)
    if optional(arrays, 1) is not None or node.listed("split") is not None:
        sizes = node.integers("split", arrays, 1)
    else:
        if node.integer("num_outputs", count) != count:
            raise Refusal(f"num_outputs other than the {count} outputs")
        if "num_outputs" not in node.attributes and length % max(1, count):
            raise Refusal(f"an axis of {length} does not split into {count} equal parts")
        chunk = -(-length // max(1, count))
        sizes = [max(0, min(chunk, length - k * chunk)) for k in range(count)]
    if sum(sizes) != length or len(sizes) != count or min(sizes, default=0) < 1:
        raise Refusal(f"sizes {sizes} do not split an axis of {length} into {count}")
    return sizes


def decode(label: str, proto: onnx.NodeProto, reasons: list[str]) -> dict[str, object]:
    """Return the attributes of a node by name; append to `reasons` those that cannot be read.

    Args:
        label: of the node, for messages.
        proto: the node.
        reasons: messages so far.
    """
    found: dict[str, object] = {}
    for attribute in proto.attribute:
        try:
            found[attribute.name] = _attribute(attribute, attribute.name in found)
        except (TypeError, ValueError) as error:
            reasons.append(f"{label}: attribute {attribute.name}: {error}")
    return found


def _attribute(attribute: onnx.AttributeProto, again: bool) -> object:
    if again:
        raise ValueError("is given twice")
    if attribute.ref_attr_name:
        raise ValueError("refers to an attribute of a function that the graph is not in")
    kinds = onnx.AttributeProto
    match attribute.type:
        case kinds.FLOAT | kinds.INT:
            return onnx.helper.get_attribute_value(attribute)
        case kinds.INTS | kinds.FLOATS:
            return tuple(onnx.helper.get_attribute_value(attribute))
        case kinds.STRING:
            return attribute.s.decode("utf-8", "replace")
        case kinds.TENSOR:
            return tensor_array(attribute.t)
        case _:
            raise ValueError("has a type that is not supported: numbers, texts and dense tensors are")


def tensor_array(tensor: onnx.TensorProto) -> np.ndarray:
    """Return a tensor that is stored in the file as an array.

    Raises:
        ValueError: it holds other elements than those of `SUPPORTED_TYPES`.
    """
    if tensor.data_type not in SUPPORTED_TYPES:
        raise ValueError(
            f"has elements of type {type_name(tensor.data_type)}; convert it to float64, float32, bool or integers"
        )
    array = numpy_helper.to_array(tensor)
    if array.dtype.kind not in _NUMBERS:
        raise ValueError("does not hold numbers")
    if array.dtype == np.bool_ and (set(tensor.int32_data) - {0, 1} or (array.view(np.uint8) > 1).any()):
        raise ValueError("holds booleans other than 0 and 1, which runtimes read in two ways")
    if tensor.int32_data and array.dtype.kind in "iu" and not np.array_equal(array.ravel(), tensor.int32_data):
        raise ValueError(f"holds integers outside of {array.dtype.name}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


SUPPORTED_TYPES = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("FLOAT", "DOUBLE", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
)
"""Element types of constants; others (strings, float16, bfloat16, float8, sub-byte types) are read in several ways."""


def type_name(data_type: int) -> str:
    """Return the name of an ONNX element type in lower case."""
    try:
        return onnx.TensorProto.DataType.Name(data_type).lower()
    except ValueError:
        return f"type {data_type}"
