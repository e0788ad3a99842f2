"""`certify`: from the bytes of an ONNX classifier to what is proved about it.

The walk visits the nodes in order. Nodes whose inputs are all constant are folded, if folding
them is exact; the others go through `rules.RULES`. Nothing is believed from the file but its numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from onnx import TensorProto, helper

from service.certificate.rules import rearrangements
from service.certificate.rules import resizing
from service.certificate.rules import arithmetic as rules
from service.certificate.rules import activations as smooth
from service.certificate.rules import convolution as spatial
from service.certificate.rules import squares
from service.certificate.graph import PROBE_BATCH, Graph, Node, read_graph
from service.certificate.rules.table import RULES, Context, Operands, Refusal, int_attribute
from service.certificate.rounding import FLOAT64, add_up, mul_up, sqrt_up
from service.certificate.statement import Certificate, NodeReport, UnsupportedGraphError
from service.certificate.values import Constant, Domain, Squares, Unknown, Value, View

_EXACT_FOLDS = frozenset(
    [
        *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"),
        *("Identity", "NonZero", "Pad", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze"),
        *("Tile", "Transpose", "Trilu", "Unsqueeze", "Where"),
        *("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"),
        *("Abs", "Clip", "Max", "Min", "Neg", "ReduceMax", "ReduceMin", "Relu", "Sign"),
    ]
)
"""Operators that round nothing: they move, compare or choose."""
_INTEGER_FOLDS = frozenset(["Add", "Div", "Mod", "Mul", "Range", "ReduceProd", "Sub"])
_ROUNDS = (
    "arithmetic on constants rounds, and each runtime may round it in its own way; let the exporter or ONNX Runtime's "
    "offline optimisation compute it once, and certify what they wrote"
)
_EXACT_CASTS = frozenset(
    getattr(TensorProto, name)
    for name in ("FLOAT", "DOUBLE", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
)
"""Formats to which every runtime casts a constant in one and the same way."""
_DOUBLE = int(TensorProto.DOUBLE)
_PICKING_FOLDS = frozenset(
    ["Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"]
)
"""What may be done with integers that hold the batch size: each entry of the result is one of the first operand's."""
# Importing these modules fills the table of operators.
RULE_MODULES = (rearrangements, resizing, rules, smooth, spatial, squares)


def certify(model_bytes: bytes) -> Certificate:
    """Prove Lipschitz and error bounds of an ONNX classifier for images in the box [0, 1]^d.

    Raises:
        UnsupportedGraphError: some part has no proved rule; the message names every such part.
    """
    graph = read_graph(model_bytes)
    reasons = list(graph.refusals)
    reports: list[NodeReport] = []
    context = Context(Domain(max(1, math.prod(graph.input_shape))), graph.precision, graph.batch)
    values: dict[str, Value] = {name: Constant(array) for name, array in graph.initializers.items()}
    for name in graph.input_names:
        values[name] = _image(context, graph) if graph.input_shape else Unknown("")
    for node in graph.nodes:
        inputs = [values.get(name, Unknown("an input is not in the graph")) if name else None for name in node.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        try:
            outputs = _outputs(context, node, inputs, reports)
        except Refusal as refusal:
            if str(refusal):
                reasons.append(f"{node.label}: {refusal}")
            outputs = [Unknown("") for _ in node.outputs]
        values.update(zip(node.outputs, outputs, strict=False))
    logits = values.get(graph.output_name, Unknown("the output is not computed by any node"))
    if isinstance(logits, Unknown):
        if logits.reason:
            reasons.append(f"output {graph.output_name!r}: {logits.reason}")
    elif isinstance(logits, Constant):
        reasons.append(f"output {graph.output_name!r} does not depend on the image")
    elif isinstance(logits, Squares):
        reasons.append(f"output {graph.output_name!r} is a square, which has no Lipschitz constant")
    elif len(logits.shape) != 1:
        reasons.append(f"output {graph.output_name!r} has shape N x {logits.shape}, expected N x K logits")
    if reasons or not isinstance(logits, View):
        raise UnsupportedGraphError(reasons)
    try:
        certificate = _certificate(context, graph, logits, reports)
    except RecursionError as error:
        raise UnsupportedGraphError(["too many linear steps in a row before the output"]) from error
    if not (np.isfinite(certificate.margin_bounds_KK).all() and math.isfinite(certificate.logit_error)):
        raise UnsupportedGraphError(["the bounds of the logits are not finite"])
    return certificate


def _image(context: Context, graph: Graph) -> View:
    """The input: any image of the box, 8-bit pixels divided by 255 in float64 and cast to the graph's format."""
    size = math.prod(graph.input_shape)
    unit = FLOAT64.unit_roundoff
    if graph.precision is not FLOAT64:
        unit = add_up(unit, mul_up(graph.precision.unit_roundoff, 1.0 + 2.0**-50), graph.precision.smallest_normal)
    return context.source(np.full(graph.input_shape, 0.5), 1.0, mul_up(unit, sqrt_up(float(size))), error_max=unit)


def _outputs(context: Context, node: Node, inputs: Operands, reports: list[NodeReport]) -> Sequence[Value]:
    present = [value for value in inputs if value is not None]
    entry = squares.entry_for(node, inputs) or RULES.get(node.operator)
    if node.operator == "Shape":
        return [_shape(context, node, present)]
    foldable = node.operator in _EXACT_FOLDS or node.operator in _INTEGER_FOLDS
    if foldable and all(isinstance(value, Constant) for value in present):
        return _folded(context, node, cast(Sequence[Constant | None], inputs))
    if entry is None:
        for value in present:
            if foldable and isinstance(value, Unknown):
                # Not this node is at fault, which constants would have passed.
                raise Refusal(value.reason)
        raise Refusal("no proved rule for this operator")
    unread = node.attributes.keys() - entry.attributes
    if unread:
        raise Refusal(f"no proved rule for attribute {', '.join(sorted(unread))}")
    for value in present:
        if isinstance(value, Unknown):
            raise Refusal(value.reason)
    if all(isinstance(value, Constant) for value in present):
        raise Refusal(_ROUNDS)
    context.theorem = None
    try:
        outputs = entry.apply(context, node, inputs)
    except RecursionError as error:
        raise Refusal("too many linear steps in a row") from error
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:
        # A malformed node: what numpy cannot evaluate has no proof either.
        raise Refusal(f"its operands do not fit: {error}") from error
    for output in outputs:
        if isinstance(output, View):
            facts = context.domain.joint(output)
            reports.append(NodeReport(node.label, facts.lipschitz, facts.error, context.theorem or entry.theorem))
            break
    return outputs


def _shape(context: Context, node: Node, inputs: Sequence[Value]) -> Constant:
    (value,) = inputs
    if isinstance(value, Unknown):
        raise Refusal(value.reason)
    if isinstance(value, Constant):
        shape = value.array.shape
    else:
        shape = (context.batch, *(value.constant.shape if isinstance(value, Squares) else value.shape))
    # Both ends are clamped as Python's slices are.
    start, end = int_attribute(node, "start", 0), int_attribute(node, "end", len(shape))
    picked = np.array(shape, dtype=np.int64)[start:end]
    # A batch size that the graph fixes is a number like any other.
    on_batch = not isinstance(value, Constant) and context.batch == PROBE_BATCH and 0 in range(len(shape))[start:end]
    return Constant(picked, depends_on_batch=on_batch)


def _folded(context: Context, node: Node, inputs: Sequence[Constant | None]) -> list[Value]:
    on_batch = [value is not None and value.depends_on_batch for value in inputs]
    depends_on_batch = any(on_batch)
    picks = node.operator == "Concat" or (node.operator in _PICKING_FOLDS and not any(on_batch[1:]))
    if depends_on_batch and not picks:
        raise Refusal("it computes with the batch size, so that images of one batch size get another map than others")
    integers = all(value is None or value.array.dtype.kind in "iub" for value in inputs)
    if (node.operator in _INTEGER_FOLDS or node.attributes.get("reduction", "none") != "none") and not integers:
        raise Refusal(_ROUNDS)
    if node.operator == "Cast" and node.attributes.get("to") not in _EXACT_CASTS:
        raise Refusal("a constant cast to a narrow format: some runtimes round it to float32 first, others do not")
    _check_fold(node, inputs)
    data = inputs[0].array if inputs and inputs[0] is not None else None
    if node.operator == "Cast" and data is not None and data.dtype == np.float32 and node.attributes["to"] == _DOUBLE:
        # How weights are stored; without the reference implementation, which takes longer to load than a proof.
        arrays = [data.astype(np.float64)]
    else:
        arrays = _evaluated(node, inputs)
    folded = [np.asarray(array) for array in arrays]
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in folded):
        raise Refusal("a constant that is not finite")
    return [Constant(array, depends_on_batch and bool((array == context.batch).any())) for array in folded]


def _evaluated(node: Node, inputs: Sequence[Constant | None]) -> list[np.ndarray]:
    """The results of a node of constants, by the reference implementation of ONNX."""
    from onnx.reference import ReferenceEvaluator

    feeds = {name: value.array for name, value in zip(node.inputs, inputs, strict=False) if value is not None and name}
    try:
        # ReferenceEvaluator is annotated too narrowly: a single node is fine.
        run = cast(Callable[..., list[np.ndarray]], ReferenceEvaluator(node.proto).run)
        return run(None, feeds)
    except Exception as error:  # the reference implementation raises whatever its numpy code raises
        raise Refusal(f"its constant inputs do not fit: {error}") from error


def _check_fold(node: Node, inputs: Sequence[Constant | None]) -> None:
    """Raises Refusal where the reference evaluator and ONNX Runtime read a node of constants in two ways."""
    for name in ("allowzero", "fmod", "keepdims", "noop_with_empty_axes", "upper"):
        if node.attributes.get(name, 0) not in (0, 1):
            raise Refusal(f"attribute {name} must be 0 or 1")
    arrays = [None if value is None else value.array for value in inputs]
    data = arrays[0] if arrays else None
    if node.operator == "Cast" and data is not None and data.dtype.kind == "f":
        target = helper.tensor_dtype_to_np_dtype(int_attribute(node, "to", 0))
        if target.kind in "iu":
            limits = np.iinfo(target)
            whole = np.trunc(data.astype(np.float64))
            # The largest integer itself may not be a float64, the one after it is.
            if not ((whole >= float(limits.min)) & (whole < float(limits.max) + 1.0)).all():
                raise Refusal(
                    "a constant outside of the integers that it is cast to: each processor makes its own of it"
                )
    if node.operator in ("ReduceProd", "Div", "Mod") and data is not None:
        if node.operator != "ReduceProd":
            if arrays[1] is not None and not arrays[1].all():
                raise Refusal("it divides by zero")
        elif float(np.prod(np.abs(data.astype(np.float64)))) >= 2.0**24:
            raise Refusal("a product of integers beyond 24 bits: runtimes compute it in formats of their own")
    if node.operator == "Slice" and data is not None and len(arrays) == 5 and arrays[4] is not None:
        starts, ends, given, steps = ([] if array is None else array.ravel().tolist() for array in arrays[1:])
        axes = given or range(data.ndim)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=False):
            length = data.shape[axis] if -data.ndim <= axis < data.ndim else 0
            if step < 0 and (start < -length or end >= length):
                raise Refusal("a backward slice that starts before the front or ends behind the back: read in two ways")


def _certificate(context: Context, graph: Graph, logits: View, reports: Sequence[NodeReport]) -> Certificate:
    facts = context.domain.joint(logits)
    n_outputs = logits.shape[0]
    if n_outputs == 1:
        # The margin of (f, -f) is 2 f.
        bounds_KK = np.array([[0.0, 1.0], [1.0, 0.0]]) * mul_up(2.0, facts.lipschitz)
    else:
        # |d_i - d_j| <= sqrt(2) ||d||, whatever the last layer is.
        bounds_KK = np.full((n_outputs, n_outputs), mul_up(sqrt_up(2.0), facts.lipschitz))
        np.fill_diagonal(bounds_KK, 0.0)
        affine = logits.source.affine
        if affine is not None and (logits.index >= 0).all():
            rows = affine.rows[logits.index]
            bounds_KK = np.minimum(bounds_KK, replace(affine, rows=rows).margin_bounds())
        joint_KK = context.joint.margin_bounds(logits)
        if joint_KK is not None:
            bounds_KK = np.minimum(bounds_KK, joint_KK)
    return Certificate(
        input_shape=graph.input_shape,
        n_outputs=n_outputs,
        precision=graph.precision.name,
        lipschitz_bound=facts.lipschitz,
        margin_bounds_KK=bounds_KK,
        logit_error=min(facts.error, logits.source.error_max),
        nodes=tuple(reports),
    )
