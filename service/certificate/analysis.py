"""`certify`: from a network, or the bytes of an ONNX classifier, to its certificate.

The walk visits the operators in order, each by its rule in `rules.RULES`.
"""

import math
from collections.abc import Sequence

import numpy as np

from service.certificate.facts import Facts
from service.certificate.limits import MOST_ELEMENTS_TOGETHER, fits
from service.certificate.margins import Head, MarginRows, Margins, are_bounds
from service.certificate.rounding import FLOAT32, FLOAT64, add_up, mul_up, sqrt_up
from service.certificate.rules import squares
from service.certificate.rules.operands import Operands
from service.certificate.rules.products import note_composition
from service.certificate.rules.table import RULES, Context
from service.certificate.statement import MOST_TABLED_CLASSES, Certificate, NodeReport
from service.certificate.values import Domain, Squares, Unknown, Value, View, affine_of, elements_of
from service.certificate.work import limit_work
from service.network.limits import WORK_OF_NUMBER, size_error
from service.network.operators import Constant, Operator, Refusal, Tensor, UnsupportedModelError
from service.network.reader import Draft, read_draft


def certify(model: bytes | Draft) -> Certificate:
    """Prove Lipschitz and error bounds of a classifier for images in the box [0, 1]^d.

    Args:
        model: the bytes of an ONNX file, or a model as far as it could be read.

    Raises:
        UnsupportedModelError: some part cannot be read or has no proved rule; the message names every such part. Or the
            proof would take more than the work that the draft allows.
    """
    draft = read_draft(model) if isinstance(model, bytes) else model
    # An overflow is an infinite bound, which each rule refuses.
    with np.errstate(all="ignore"):
        return _proved(draft)


def _proved(draft: Draft) -> Certificate:
    reasons = list(draft.reasons)
    if draft.image is None:
        raise UnsupportedModelError(reasons)
    try:
        limit_work(draft.image, draft.operators, draft.work)
    except UnsupportedModelError as error:
        # Unreadable operators are reported first.
        raise UnsupportedModelError(reasons or error.reasons) from None
    reports: list[NodeReport] = []
    precision = FLOAT64 if draft.precision == "float64" else FLOAT32
    context = Context(Domain(math.prod(draft.image.shape)), precision, draft.work)
    values = _walk(context, draft, draft.image, reports, reasons)
    logits = Unknown("") if draft.output is None else values[draft.output.number]
    reason = _why_no_logits(logits)
    if reason:
        reasons.append(f"the output{reason}")
    if reasons or not isinstance(logits, View):
        raise UnsupportedModelError(reasons)
    try:
        certificate = _certificate(context, draft.image, logits, reports)
    except RecursionError as error:
        raise UnsupportedModelError(["too many linear steps in a row before the output"]) from error
    if not (are_bounds(certificate.margin_bounds_KK) and math.isfinite(certificate.logit_error)):
        raise UnsupportedModelError(["the bounds of the logits are not finite"])
    return certificate


def _walk(
    context: Context, draft: Draft, image: Tensor, reports: list[NodeReport], reasons: list[str]
) -> dict[int, Value]:
    """Visit all operators; add to `reports` and `reasons`; return the value of each tensor by its number."""
    values: dict[int, Value] = {image.number: _image(context, image)}
    made, most = 0, min(MOST_ELEMENTS_TOGETHER, draft.work / WORK_OF_NUMBER)
    for operator in draft.operators:
        inputs = [values[operand.number] if isinstance(operand, Tensor) else operand for operand in operator.operands]
        try:
            results = _results(context, operator, inputs, reports)
            made += sum(map(elements_of, results))
            if made > most:
                reasons.append(f"{operator.label}: {size_error(made, int(most))} in all values so far")
                raise UnsupportedModelError(reasons)
        except Refusal as refusal:
            if str(refusal):
                reasons.append(f"{operator.label}: {refusal}")
            results = [Unknown("") for _ in operator.results]
        values.update((tensor.number, value) for tensor, value in zip(operator.results, results, strict=True))
    return values


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


def _image(context: Context, image: Tensor) -> View:
    """Return the input: any image of the box, 8-bit pixels divided by 255 in float64 and cast to the graph's format."""
    unit = FLOAT64.unit_roundoff
    if context.precision is not FLOAT64:
        single = context.precision
        unit = add_up(unit, mul_up(single.unit_roundoff, 1.0 + 2.0**-50), single.smallest_normal)
    size = float(math.prod(image.shape))
    pixels = Facts(lipschitz=1.0, error=mul_up(unit, sqrt_up(size)), error_max=unit)
    return context.source(np.full(image.shape, 0.5), pixels)


def _results(context: Context, operator: Operator, inputs: Operands, reports: list[NodeReport]) -> Sequence[Value]:
    entry = squares.entry_for(operator, inputs) or RULES.get(operator.kind)
    if entry is None:
        raise Refusal("no proved rule for this operator")
    unread = dict(operator.attributes).keys() - entry.attributes
    if unread:
        raise Refusal(f"no proved rule for attribute {', '.join(sorted(unread))}")
    for value in inputs:
        if isinstance(value, Unknown):
            raise Refusal(value.reason)
    context.theorem = None
    try:
        results = entry.apply(context, operator, inputs)
    except RecursionError as error:
        raise Refusal("too many linear steps in a row") from error
    except MemoryError as error:
        raise Refusal("too large to analyse: it needs more memory than there is") from error
    for tensor, result in zip(operator.results, results, strict=True):
        if isinstance(result, View) and result.shape != tensor.shape:
            raise RuntimeError(f"{operator.label}: proved for {result.shape}, written as {tensor.shape}")
    if len(results) == 1:
        note_composition(context, operator, inputs, results[0])
    first = next((result for result in results if isinstance(result, View)), None)
    if first is not None:
        facts = context.domain.joint(first)
        reports.append(NodeReport(operator.label, facts.lipschitz, facts.error, context.theorem or entry.theorem))
    return results


def _margin_rows(context: Context, logits: View, lipschitz: float) -> MarginRows:
    """Return the bounds of the margins of many classes, by their rows."""
    affine, joint = affine_of(logits), context.joint.heads(logits)
    sums: list[tuple[Head, ...]] = [] if affine is None else [(Head(affine.rows, affine.lipschitz),)]
    if joint is not None:
        sums.append(joint)
    if len(sums) == 2 and len(sums[1]) == 1 and np.array_equal(sums[0][0].rows_KM, sums[1][0].rows_KM):
        # The same forms twice.
        sums = sums[:1] if sums[0][0].lipschitz <= sums[1][0].lipschitz else sums[1:]
    # |d_i - d_j| <= sqrt(2) ||d||, whatever the last layer is.
    return MarginRows(
        logits.shape[0],
        mul_up(sqrt_up(2.0), lipschitz),
        tuple(tuple(head.scaled() for head in heads) for heads in sums),
    )


def _certificate(context: Context, image: Tensor, logits: View, reports: Sequence[NodeReport]) -> Certificate:
    facts = context.domain.joint(logits)
    n_outputs = logits.shape[0]
    bounds_KK: Margins
    if n_outputs > MOST_TABLED_CLASSES:
        bounds_KK = _margin_rows(context, logits, facts.lipschitz)
    elif n_outputs == 1:
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
        input_shape=image.shape,
        n_outputs=n_outputs,
        precision=context.precision.name,
        lipschitz_bound=facts.lipschitz,
        margin_bounds_KK=bounds_KK,
        logit_error=min(facts.error, facts.error_max),
        nodes=tuple(reports),
    )
