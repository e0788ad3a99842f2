"""Exact logits of some images in balls, with bounds of margins and of rounding, from the bytes of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flint import arb, ctx

from service.audit.balls import NotAuditableError, power, root, smaller, upper
from service.audit.constants import PerBatch, fold, of_batch, per_batch, picked, shape_of
from service.audit.formats import FORMATS
from service.audit.graph import Graph, Node, read_graph
from service.audit.matrices import difference_norm
from service.audit.moves import MOVES, ZERO
from service.audit.network import Base, Network, Tensor
from service.audit.operators import RULES
from service.audit.operators.refused import refusal
from service.audit.operators.table import Signs, Value
from service.audit.preprocessing import ModelInput

_STRIDE = 2**40
"""Larger than any number of identities: tells the images of a probed batch apart."""


@dataclass(frozen=True)
class Derivation:
    """The proved numbers of a model; a model with one output has two classes."""

    logits: list[list[arb]]
    """Enclosures of the exact logits of each image."""
    logit_error: arb
    """`E`: |computed - exact| for every image of the box and any order of summation."""
    margin_bounds: list[list[arb]]
    """`K_ij`, about the image that was sent."""


def derive(model_bytes: bytes, inputs: Sequence[ModelInput], input_shape: tuple[int, ...], digits: int) -> Derivation:
    """Walk the graph once.

    Args:
        model_bytes: an ONNX file.
        inputs: at least one image; all were sent in the same shape.
        input_shape: of the model's input, as the card states it.
        digits: bits of the balls.

    Raises:
        NotAuditableError: nodes have no rule; each reason names one.
    """
    ctx.prec = digits
    graph = read_graph(model_bytes)
    if graph.input_shape != input_shape:
        raise NotAuditableError(f"the graph takes images {graph.input_shape}, the card states {input_shape}")
    size = math.prod(graph.input_shape)
    points = [[power(-1)] * size, *(list(one.pixels) for one in inputs)]
    network = Network(FORMATS[graph.dtype], [[] for _ in points])
    ids = network.add_base(_box(network, inputs[0], size), points)
    values: dict[str, Value] = {**graph.constants, graph.input_name: Tensor(ids.reshape(graph.input_shape))}
    reasons: list[str] = []
    for node in graph.nodes:
        if any(name and name not in values for name in node.inputs):
            # An operand comes from a node without a rule; such nodes are reported all at once.
            if node.operator not in RULES and node.operator not in MOVES and node.operator != "Shape":
                reasons.append(f"{node.label}: {refusal(node.operator)}")
            continue
        try:
            outputs = _evaluated(graph, network, node, [values[name] if name else None for name in node.inputs])
        except NotAuditableError as error:
            reasons.append(f"{node.label}: {error}")
        except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
            reasons.append(f"{node.label}: its operands do not fit ({error})")
        else:
            values.update(zip(node.outputs, outputs, strict=False))
    if reasons:
        raise NotAuditableError(*reasons)
    logits = values.get(graph.output_name)
    if not isinstance(logits, Tensor) or len(logits.shape) != 1:
        raise NotAuditableError("the output must be one vector for each image")
    return _derivation(network, logits.ids)


def _box(network: Network, image: ModelInput, size: int) -> Base:
    """Every image of the box [0, 1]^d, half its diagonal from the centre; computed in float64, cast to the format."""
    error = image.pixel_error
    if network.format.digits < 53:
        error = error + network.format.unit * (arb(1) + error) + network.format.tiny
    side = root(arb(size))
    return Base(upper(image.norm), upper(side * power(-1)), upper(error * side), upper(error))


def _evaluated(graph: Graph, network: Network, node: Node, operands: Sequence[Value | None]) -> Sequence[Value]:
    depends = any(isinstance(value, (Tensor, Signs)) for value in operands)
    if node.operator == "Shape":
        return [_shape(graph, node, operands)]
    if not depends and any(isinstance(value, PerBatch) for value in operands):
        return picked(node, operands, len(graph.batches))
    constants = [value if isinstance(value, np.ndarray) else None for value in operands]
    move, rule = MOVES.get(node.operator), RULES.get(node.operator)
    if depends and move is None and rule is None:
        raise NotAuditableError(refusal(node.operator))
    unread = node.attributes.keys() - (move or rule or (None, frozenset[str]()))[1]
    if unread and (move is not None or depends):
        raise NotAuditableError(f"no rule for attribute {', '.join(sorted(unread))}")
    if not depends:
        if move is None or node.operator == "Pad":
            return [fold(node, constants)]
        # numpy's pick from an array may be a scalar of its own type.
        return [np.asarray(array) for array in move[0](node, constants)]
    if move is not None:
        return _moved(graph, node, operands)
    assert rule is not None
    made = rule[0](network, node, operands)
    if made.ids.size == 0:
        raise NotAuditableError("nothing is left of the tensor")
    return [made]


def _shape(graph: Graph, node: Node, operands: Sequence[Value | None]) -> Value:
    (value,) = operands
    if node.attributes.keys() - {"start", "end"} or value is None or isinstance(value, Signs):
        raise NotAuditableError("no rule for its attributes or operands")
    if isinstance(value, Tensor):
        return per_batch([shape_of(node, (batch, *value.shape)) for batch in graph.batches])
    return shape_of(node, (value.arrays[0] if isinstance(value, PerBatch) else value).shape)


def _moved(graph: Graph, node: Node, operands: Sequence[Value | None]) -> list[Value]:
    """Move batches of two sizes: every image of each must be moved alike, and by itself."""
    function = MOVES[node.operator][0]
    concat = node.operator == "Concat"
    data, others = (operands, []) if concat else (operands[:1], operands[1:])
    if not all(isinstance(v, Tensor) for v in data) or any(isinstance(v, Tensor) for v in others):
        raise NotAuditableError("it mixes constants and numbers that depend on the image")
    if node.operator != "Reshape" and any(isinstance(value, PerBatch) for value in others):
        # A new shape can hold the batch size in one place only; a position that depends on it is another map.
        raise NotAuditableError("it computes with the size of the batch")
    found: list[list[np.ndarray]] = []
    for which, batch in enumerate(graph.batches):
        outputs = function(node, [_batch(v, batch) if isinstance(v, Tensor) else of_batch(v, which) for v in operands])
        for output in outputs:
            alone = output[0] if output.ndim else output
            expected = np.stack([np.where(alone == ZERO, ZERO, alone + n * _STRIDE) for n in range(batch)])
            if output.shape != expected.shape or (output != expected).any() or (alone >= _STRIDE).any():
                raise NotAuditableError("it mixes the images of a batch")
        found.append([output[0] for output in outputs])
    if any(not np.array_equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)):
        raise NotAuditableError("it depends on the size of the batch")
    if any(output.size == 0 for output in found[0]):
        raise NotAuditableError("nothing is left of the tensor")
    return [Tensor(np.ascontiguousarray(output).reshape(output.shape)) for output in found[0]]


def _batch(tensor: Tensor, size: int) -> np.ndarray:
    return np.stack([np.where(tensor.ids == ZERO, ZERO, tensor.ids + n * _STRIDE) for n in range(size)])


def _derivation(network: Network, logits: np.ndarray) -> Derivation:
    facts = network.facts(logits)
    error = smaller(facts.error_max, facts.error)
    exact = [network.at(point, logits.tolist()) for point in range(1, len(network.values))]
    if logits.size == 1:
        # One output f stands for (f, -f), whose margin is 2 f.
        twice = upper(arb(2) * facts.lipschitz)
        return Derivation([[f, -f] for (f,) in exact], error, [[arb(0), twice], [twice, arb(0)]])
    bounds = [[arb(0)] * logits.size for _ in logits]
    # |d_i - d_j| <= sqrt(2) ||d||, for any logits.
    rough = upper(root(arb(2)) * facts.lipschitz)
    for i, left in enumerate(logits.tolist()):
        for j, right in enumerate(logits.tolist()[:i]):
            bounds[i][j] = bounds[j][i] = smaller(rough, _margin_bound(network, left, right))
    return Derivation(exact, error, bounds)


def _margin_bound(network: Network, left: int, right: int) -> arb:
    """`L ||m_i - m_j||` for two logits `m h + c` on one base h of Lipschitz bound L, or the sum over several bases."""
    if ZERO in (left, right):
        return network.facts(np.array([left, right])).lipschitz
    one, other = network.layer_of(left), network.layer_of(right)
    if one.base is not other.base:
        return upper(sum((network.facts(np.array([i])).lipschitz for i in (left, right)), arb(0)))
    length = difference_norm((one.matrix, left - one.start), (other.matrix, right - other.start))
    whole = upper(length * one.base.lipschitz)
    if one is not other or not one.parts:
        return whole
    # Terms on several bases, each by its own.
    terms = [
        difference_norm((matrix, left - one.start), (matrix, right - one.start)) * base.lipschitz
        for base, matrix in one.parts
    ]
    return smaller(whole, upper(sum(terms, arb(0))))
