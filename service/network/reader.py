"""ONNX bytes -> `Network`: every operator lowered to its canonical form, constants evaluated exactly, shapes proved.

Operators, attributes, constants and the shape of the input are read, and nothing else: declarations of other shapes are
ignored, nodes that do not reach the output are dropped, names mean nothing. A form of an operator that the table of
lowerings does not know, in any opset, is refused. All reasons are collected before an error is raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message

from service.network.constants import EVALUATORS, PICKING, ROUNDS, evaluate
from service.network.limits import (
    COPIES_OF_WEIGHTS,
    LARGEST_CONSTANT,
    LARGEST_WEIGHT,
    MOST_AXES,
    WORK_OF_NUMBER,
    Work,
    allowed_work,
    quoted,
    size_error,
)
from service.network.lowering import LOWERINGS
from service.network.lowering.table import PROBE_BATCH, Folded, Inputs, Known, Reading, Unknown, constant_array
from service.network.nodes import Node, decode, tensor_array, type_name
from service.network.operators import (
    Constant,
    Network,
    Operator,
    Precision,
    Refusal,
    Tensor,
    UnsupportedModelError,
)

OLDEST_OPSET = 7
PRECISIONS: dict[int, Precision] = {onnx.TensorProto.DOUBLE: "float64", onnx.TensorProto.FLOAT: "float32"}
_WHY_NOT: dict[int, str] = {
    onnx.TensorProto.FLOAT16: "float16 has too little precision for a certificate; export float64 (or float32)",
    onnx.TensorProto.BFLOAT16: "bfloat16 has too little precision for a certificate; export float64 (or float32)",
}
_NAME = 100
"""Characters of a name in a message."""
_SHAPES = ("Shape", "Size")
_COMPUTES_WITH_BATCH = "it computes with the batch size, so that images of one batch size get another map than others"


@dataclass(frozen=True)
class Draft:
    """The part of a model that could be read, and every reason why the model is not a network."""

    image: Tensor | None
    """Null where the input cannot be read."""
    precision: Precision
    operators: tuple[Operator, ...]
    output: Tensor | None
    reasons: tuple[str, ...]
    work: float
    """Multiply-adds that the proof may take."""
    weights: tuple[np.ndarray, ...]
    """Of the file, those that could be read, in its order."""

    def network(self) -> Network:
        """Return the network.

        Raises:
            UnsupportedModelError: there are reasons against it.
        """
        if self.reasons or self.image is None or self.output is None:
            raise UnsupportedModelError(self.reasons)
        return Network((self.image,), self.precision, self.operators, (self.output,))


def read(model_bytes: bytes) -> Network:
    """Read an ONNX classifier with one input, the image, and one output, the logits.

    Raises:
        UnsupportedModelError: some part cannot be read; the message names every such part.
    """
    return read_draft(model_bytes).network()


def read_draft(model_bytes: bytes, work: float = 0.0) -> Draft:
    """Read as much of a model as can be read, so that all reasons against it are known at once.

    Args:
        model_bytes: the file.
        work: multiply-adds that the model may ask for; 0: as many as `allowed_work` has for its weights.

    Raises:
        UnsupportedModelError: the bytes are not an ONNX model, or its tensors are beyond the work.
    """
    model = _parsed(model_bytes)
    reasons: list[str] = []
    opset = _opset(model, reasons)
    graph = model.graph
    values: dict[str, Known] = _stored(graph, reasons)
    image, precision, batch = _image(graph, values, reasons)
    weights = tuple(value.array for value in values.values() if isinstance(value, Folded))
    stored = sum(array.size for array in weights)
    held = stored + _held_by_nodes(graph)
    reading = Reading(
        precision,
        batch,
        constants_left=LARGEST_CONSTANT + COPIES_OF_WEIGHTS * stored,
        work=Work(work or allowed_work(held)),
    )
    if image is not None:
        name, shape = image
        try:
            values[name] = reading.tensor(shape)
            reading.work.spend(WORK_OF_NUMBER * math.prod(shape), f"input {quoted(name, _NAME)!r}: image")
        except Refusal as refusal:
            reasons.append(f"input {quoted(name, _NAME)!r}: image {refusal}")
    if len(graph.output) != 1:
        reasons.append(f"{len(graph.output)} outputs; the certifier needs exactly one, the logits")
    output_name = graph.output[0].name if graph.output else ""
    for node in _needed(graph, output_name, opset, reasons):
        _add(reading, node, values, reasons)
    output = values.get(output_name, Unknown("it is not computed by any node"))
    if isinstance(output, Unknown) and output.reason:
        reasons.append(f"output {quoted(output_name, _NAME)!r}: {output.reason}")
    elif isinstance(output, Folded):
        reasons.append(f"output {quoted(output_name, _NAME)!r} does not depend on the image")
    start = values.get(image[0]) if image is not None else None
    return Draft(
        start if isinstance(start, Tensor) else None,
        precision,
        tuple(reading.operators),
        output if isinstance(output, Tensor) else None,
        tuple(reasons),
        work or allowed_work(min(held, _weights(reading.operators))),
        weights,
    )


def _held_by_nodes(graph: onnx.GraphProto) -> int:
    """Return how many numbers the tensors of Constant nodes have, at most as many as the file has bytes."""
    tensors = [attribute.t for node in graph.node if node.op_type == "Constant" for attribute in node.attribute]
    return sum(min(math.prod(tensor.dims), tensor.ByteSize()) for tensor in tensors)


def _weights(operators: Sequence[Operator]) -> int:
    """Return how many numbers the constants of a network have: as many as its canonical file holds."""
    constants = {operand for operator in operators for operand in operator.operands if isinstance(operand, Constant)}
    return sum(constant.array.size for constant in constants)


def _parsed(model_bytes: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(model_bytes)
        # Before the checker, which would look for the files.
        outside = [tensor.name for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL]
        if outside:
            raise UnsupportedModelError(
                [
                    f"weight {quoted(name, _NAME)!r} is stored outside the file, where its digest does not reach; "
                    "write one file: onnx.save(onnx.load(FILE), FILE)"
                    for name in outside
                ]
            )
        onnx.checker.check_model(model_bytes)
    except (DecodeError, onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        if "alloc failed" in str(error):
            raise MemoryError from error
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError([f"not a valid ONNX model: {first_line}"]) from error
    return model


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: weights, attributes, parts of sparse tensors, bodies of functions and branches."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                yield from _tensors(part)


def _opset(model: onnx.ModelProto, reasons: list[str]) -> int:
    opsets = [imported.version for imported in model.opset_import if imported.domain in ("", "ai.onnx")]
    opset = opsets[-1] if opsets else 0
    newest = onnx.defs.onnx_opset_version()
    if len(opsets) > 1:
        reasons.append(f"it imports several opsets of the standard operators, {opsets}: runtimes may take either")
    elif not OLDEST_OPSET <= opset <= newest:
        reasons.append(
            f"opset {opset}: opsets {OLDEST_OPSET} to {newest} are read; convert the file: "
            f"onnx.save(onnx.version_converter.convert_version(onnx.load(FILE), 18), FILE)"
        )
    if model.functions:
        reasons.append("the model defines functions of its own; inline them before the export: onnx.inliner")
    if model.graph.sparse_initializer:
        reasons.append("sparse initializers; store them dense")
    return opset


def _stored(graph: onnx.GraphProto, reasons: list[str]) -> dict[str, Known]:
    """Return the weights by name."""
    values: dict[str, Known] = {}
    for tensor in graph.initializer:
        try:
            if len(tensor.dims) > MOST_AXES:
                raise ValueError(f"has {len(tensor.dims)} axes, at most {MOST_AXES}")
            if math.prod(tensor.dims) > LARGEST_WEIGHT:
                raise ValueError(size_error(math.prod(tensor.dims), LARGEST_WEIGHT))
            array = tensor_array(tensor)
        except ValueError as error:
            reasons.append(f"weight {quoted(tensor.name, _NAME)!r} {error}")
            values[tensor.name] = Unknown()
            continue
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            reasons.append(f"weight {quoted(tensor.name, _NAME)!r} holds NaN or infinity")
            values[tensor.name] = Unknown()
            continue
        values[tensor.name] = Folded(array)
    return values


def _image(
    graph: onnx.GraphProto, stored: dict[str, Known], reasons: list[str]
) -> tuple[tuple[str, tuple[int, ...]] | None, Precision, int]:
    """Return name and shape of the image, the precision, and the batch size; weights may be among the inputs."""
    inputs = [value for value in graph.input if value.name not in stored]
    if len(inputs) != 1:
        reasons.append(f"{len(inputs)} inputs; the certifier needs exactly one, the image")
        for value in inputs:
            stored[value.name] = Unknown()
        return None, "float64", PROBE_BATCH
    name, tensor_type = inputs[0].name, inputs[0].type.tensor_type
    sizes = [
        one.dim_value if one.HasField("dim_value") and one.dim_value > 0 else None for one in tensor_type.shape.dim
    ]
    precision = PRECISIONS.get(tensor_type.elem_type, "float64")
    if tensor_type.elem_type not in PRECISIONS:
        why = _WHY_NOT.get(tensor_type.elem_type, "the certifier has an error analysis for float64 and float32 only")
        reasons.append(f"input {quoted(name, _NAME)!r} is {type_name(tensor_type.elem_type)}: {why}")
    shape = [size for size in sizes[1:] if size is not None]
    if len(sizes) < 2 or len(shape) < len(sizes) - 1:
        reasons.append(f"input {quoted(name, _NAME)!r} needs a fixed shape after the batch axis, found {sizes}")
        stored[name] = Unknown()
        return None, precision, PROBE_BATCH
    stored[name] = Unknown()
    return (name, tuple(shape)), precision, sizes[0] or PROBE_BATCH


def _needed(graph: onnx.GraphProto, output: str, opset: int, reasons: list[str]) -> list[Node]:
    """Return the nodes that reach the output, in the order of the file."""
    makers: dict[str, int] = {}
    for position, proto in enumerate(graph.node):
        makers.update(dict.fromkeys((name for name in proto.output if name), position))
    needed: set[int] = set()
    pending = [output]
    while pending:
        position = makers.get(pending.pop())
        if position is not None and position not in needed:
            needed.add(position)
            pending += [name for name in graph.node[position].input if name]
    nodes: list[Node] = []
    for position in sorted(needed):
        proto = graph.node[position]
        name = proto.name or (proto.output[0] if proto.output else "")
        label = f"{quoted(proto.op_type, _NAME)} {quoted(name, _NAME)!r}"
        standard = proto.domain in ("", "ai.onnx")
        kind = proto.op_type if standard else f"{proto.domain}::{proto.op_type}"
        version = _version(proto.op_type, opset) if standard else 0
        attributes = decode(label, proto, reasons)
        nodes.append(Node(label, kind, version, tuple(proto.input), tuple(proto.output), attributes))
    return nodes


def _version(kind: str, opset: int) -> int:
    try:
        return onnx.defs.get_schema(kind, opset).since_version
    except onnx.defs.SchemaError:
        return 0


def _add(reading: Reading, node: Node, values: dict[str, Known], reasons: list[str]) -> None:
    inputs = [values.get(name, Unknown("an input is not in the graph")) if name else None for name in node.inputs]
    while inputs and inputs[-1] is None:
        inputs.pop()
    results: Sequence[Known]
    try:
        results = _results(reading, node, inputs)
    except Refusal as refusal:
        if str(refusal):
            reasons.append(f"{node.label}: {quoted(str(refusal))}")
        results = [Unknown()] * len(node.outputs)
    values.update((name, value) for name, value in zip(node.outputs, results, strict=False) if name)


def _results(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    constant = all(value is None or isinstance(value, Folded) for value in inputs)
    if node.kind in _SHAPES:
        return [_shape(reading, node, inputs)]
    if constant and (node.kind in EVALUATORS or node.kind in LOWERINGS):
        return _folded(reading, node, inputs)
    entry = LOWERINGS.get(node.kind)
    if entry is None:
        if node.kind in EVALUATORS:
            for value in inputs:
                if isinstance(value, Unknown):
                    raise Refusal(value.reason)
        raise Refusal(_ADVICE.get(node.kind, "no proved rule for this operator"))
    if node.version not in entry.versions:
        raise Refusal(
            f"its form of opset {node.version} has no proved rule; convert the file to opset 18: "
            "onnx.version_converter.convert_version"
        )
    unread = node.attributes.keys() - entry.attributes
    if unread:
        raise Refusal(f"no proved rule for attribute {', '.join(sorted(unread))}")
    for value in inputs:
        if isinstance(value, Unknown):
            raise Refusal(value.reason)
    try:
        return entry.apply(reading, node, inputs)
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:
        # A malformed node: operands of a rank or type that no form of the operator has.
        raise Refusal(f"its operands do not fit: {error}") from error


_ADVICE = {
    "InstanceNormalization": "it divides by a deviation that depends on the image and may be 0: no Lipschitz constant; "
    "use BatchNormalization or a layer that subtracts the mean alone",
    "LayerNormalization": "it divides by a deviation that depends on the image and may be 0: no Lipschitz constant; "
    "use a layer that subtracts the mean alone",
    "GroupNormalization": "it divides by a deviation that depends on the image and may be 0: no Lipschitz constant; "
    "use BatchNormalization or a layer that subtracts the mean alone",
}


def _shape(reading: Reading, node: Node, inputs: Inputs) -> Folded:
    (value,) = inputs
    if isinstance(value, Unknown) or value is None:
        raise Refusal(value.reason if value is not None else "it has no operand")
    shape = value.array.shape if isinstance(value, Folded) else (reading.batch, *value.shape)
    free = isinstance(value, Tensor) and reading.batch == PROBE_BATCH
    if node.kind == "Size":
        if free:
            raise Refusal(
                "it computes with the batch size, so that images of one batch size get another map than others"
            )
        return Folded(np.array(math.prod(shape), np.int64))
    # Both ends are clamped as Python's slices are.
    start, end = node.integer("start", 0), node.integer("end", len(shape))
    # A batch size that the file fixes is a number like any other.
    return Folded(np.array(shape, np.int64)[start:end], free and 0 in range(len(shape))[start:end])


def _folded(reading: Reading, node: Node, inputs: Inputs) -> list[Folded]:
    on_batch = [isinstance(value, Folded) and value.on_batch for value in inputs]
    picks = node.kind == "Concat" or (node.kind in PICKING and not any(on_batch[1:]))
    if any(on_batch) and not picks:
        raise Refusal(_COMPUTES_WITH_BATCH)
    if node.kind not in EVALUATORS:
        raise Refusal(ROUNDS)
    arrays = [None if value is None else constant_array(value, "an operand", batch_allowed=True) for value in inputs]
    results = evaluate(node, arrays)
    reading.count(node, arrays, results)
    return [Folded(array, any(on_batch) and bool((array == reading.batch).any())) for array in results]
