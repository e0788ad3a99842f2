"""`certify`: from the bytes of an ONNX classifier to its certificate.

The walk visits the nodes in order. Nodes whose inputs are all constant are folded, if folding
them is exact; the others go through `rules.RULES`. Nothing is believed from the file but its numbers.
"""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from service.certificate.facts import Facts
from service.certificate.folding import EXACT_FOLDS, INTEGER_FOLDS, ROUNDS, fold, fold_shape
from service.certificate.graph import Graph, Node, read_graph
from service.certificate.limits import MOST_ELEMENTS_TOGETHER, fits, size_error
from service.certificate.rounding import FLOAT64, add_up, mul_up, sqrt_up
from service.certificate.rules import squares
from service.certificate.rules.operands import Operands, Refusal
from service.certificate.rules.table import RULES, Context
from service.certificate.statement import Certificate, NodeReport, UnsupportedGraphError
from service.certificate.values import Constant, Domain, Squares, Unknown, Value, View, affine_of, elements_of


def certify(model_bytes: bytes) -> Certificate:
    """Prove Lipschitz and error bounds of an ONNX classifier for images in the box [0, 1]^d.

    Raises:
        UnsupportedGraphError: some part has no proved rule; the message names every such part.
    """
    graph = read_graph(model_bytes)
    reasons = list(graph.refusals)
    reports: list[NodeReport] = []
    context = Context(Domain(max(1, math.prod(graph.input_shape))), graph.precision, graph.batch)
    logits = _walk(context, graph, reports, reasons)
    reason = _why_no_logits(logits)
    if reason:
        reasons.append(f"output {graph.output_name!r}{reason}")
    if reasons or not isinstance(logits, View):
        raise UnsupportedGraphError(reasons)
    try:
        certificate = _certificate(context, graph, logits, reports)
    except RecursionError as error:
        raise UnsupportedGraphError(["too many linear steps in a row before the output"]) from error
    if not (np.isfinite(certificate.margin_bounds_KK).all() and math.isfinite(certificate.logit_error)):
        raise UnsupportedGraphError(["the bounds of the logits are not finite"])
    return certificate


def _walk(context: Context, graph: Graph, reports: list[NodeReport], reasons: list[str]) -> Value:
    """Visit all nodes; add to `reports` and `reasons`; return the value of the graph's output."""
    values: dict[str, Value] = {name: Constant(array) for name, array in graph.initializers.items()}
    for name in graph.input_names:
        values[name] = _image(context, graph) if graph.input_shape else Unknown("")
    made = 0
    for node in graph.nodes:
        inputs = [values.get(name, Unknown("an input is not in the graph")) if name else None for name in node.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        try:
            outputs = _outputs(context, node, inputs, reports)
            made += sum(map(elements_of, outputs))
            if made > MOST_ELEMENTS_TOGETHER:
                reasons.append(f"{node.label}: {size_error(made, MOST_ELEMENTS_TOGETHER)} in all values so far")
                raise UnsupportedGraphError(reasons)
        except Refusal as refusal:
            if str(refusal):
                reasons.append(f"{node.label}: {refusal}")
            outputs = [Unknown("") for _ in node.outputs]
        values.update(zip(node.outputs, outputs, strict=False))
    return values.get(graph.output_name, Unknown("the output is not computed by any node"))


def _why_no_logits(value: Value) -> str:
    """Return why the value of the output is no vector of logits; empty where it is one, or the reason is on record."""
    match value:
        case Unknown():
            return value.reason and f": {value.reason}"
        case Constant():
            return " does not depend on the image"
        case Squares():
            return " is a square, which has no Lipschitz constant"
        case View() if len(value.shape) != 1:
            return f" has shape N x {value.shape}, expected N x K logits"
        case View() if not fits(len(value.index), len(value.index)):
            return f" has {len(value.index)} logits: the bounds of all pairs are too large to analyse"
        case View():
            return ""


def _image(context: Context, graph: Graph) -> View:
    """Return the input: any image of the box, 8-bit pixels divided by 255 in float64 and cast to the graph's format."""
    size = math.prod(graph.input_shape)
    unit = FLOAT64.unit_roundoff
    if graph.precision is not FLOAT64:
        unit = add_up(unit, mul_up(graph.precision.unit_roundoff, 1.0 + 2.0**-50), graph.precision.smallest_normal)
    pixels = Facts(lipschitz=1.0, error=mul_up(unit, sqrt_up(float(size))), error_max=unit)
    return context.source(np.full(graph.input_shape, 0.5), pixels)


def _outputs(context: Context, node: Node, inputs: Operands, reports: list[NodeReport]) -> Sequence[Value]:
    present = [value for value in inputs if value is not None]
    entry = squares.entry_for(node, inputs) or RULES.get(node.operator)
    if node.operator == "Shape":
        return [fold_shape(context, node, present)]
    foldable = node.operator in EXACT_FOLDS or node.operator in INTEGER_FOLDS
    if foldable and all(isinstance(value, Constant) for value in present):
        return fold(context, node, cast(Sequence[Constant | None], inputs))
    if entry is None:
        for value in present:
            if foldable and isinstance(value, Unknown):
                # Constants would have passed: the node that made the operand is at fault.
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
    except MemoryError as error:
        raise Refusal("too large to analyse: it needs more memory than there is") from error
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:
        # A malformed node: numpy cannot evaluate it.
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
        affine = affine_of(logits)
        if affine is not None:
            bounds_KK = np.minimum(bounds_KK, affine.margin_bounds())
        joint_KK = context.joint.margin_bounds(logits)
        if joint_KK is not None:
            bounds_KK = np.minimum(bounds_KK, joint_KK)
    return Certificate(
        input_shape=graph.input_shape,
        n_outputs=n_outputs,
        precision=graph.precision.name,
        lipschitz_bound=facts.lipschitz,
        margin_bounds_KK=bounds_KK,
        logit_error=min(facts.error, facts.error_max),
        nodes=tuple(reports),
    )
