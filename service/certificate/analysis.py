"""`certify`: from the bytes of an ONNX classifier to what is proved about it.

The walk visits the nodes in order. Nodes whose inputs are all constant are folded, if folding
them is exact; the others go through `rules.RULES`. Nothing is believed from the file but its numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from service.certificate.folding import EXACT_FOLDS, INTEGER_FOLDS, ROUNDS, folded_constant, shape_of
from service.certificate.graph import Graph, Node, read_graph
from service.certificate.rounding import FLOAT64, add_up, mul_up, sqrt_up
from service.certificate.rules import activations as smooth
from service.certificate.rules import arithmetic as rules
from service.certificate.rules import convolution as spatial
from service.certificate.rules import rearrangements, resizing, squares
from service.certificate.rules.operands import Operands, Refusal
from service.certificate.rules.table import RULES, Context
from service.certificate.statement import Certificate, NodeReport, UnsupportedGraphError
from service.certificate.values import Constant, Domain, Squares, Unknown, Value, View

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
        return [shape_of(context, node, present)]
    foldable = node.operator in EXACT_FOLDS or node.operator in INTEGER_FOLDS
    if foldable and all(isinstance(value, Constant) for value in present):
        return folded_constant(context, node, cast(Sequence[Constant | None], inputs))
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
        raise Refusal(ROUNDS)
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
