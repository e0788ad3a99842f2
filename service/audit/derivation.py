"""What the bytes of a model say about one image: exact logits in balls, bounds of margins and of rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flint import arb, ctx

from service.audit.exact import NotAuditableError, power, root, smaller, upper
from service.audit.graph import MOVES, NOTHING, PICKS, Graph, Node, Sized, folded, read_graph, shape_of, sized
from service.audit.operators import RULES, Tensor, Value
from service.audit.tensors import FORMATS, Base, Layer, Network

_STRIDE = 2**40
"""More than any number of identities: tells the images of a probed batch apart."""


@dataclass(frozen=True)
class Sight:
    """The image as the model sees it, and what lies between it and the image that was sent."""

    pixels: Sequence[arb]
    """Enclosures of the exact pixels, flat."""
    norm: arb
    """Bound of the L2 norm of the linear map from the image that was sent."""
    pixel_error: arb
    """Bound of |computed - exact| of each pixel, in float64, for every image of the box."""


@dataclass(frozen=True)
class Derivation:
    """What is proved, two classes for a model with one output."""

    logits: list[arb]
    logit_error: arb
    """`E`: |computed - exact| for every image of the box and any order of summation."""
    margin_bounds: list[list[arb]]
    """`K_ij`, about the image that was sent."""


def derive(model_bytes: bytes, sight: Sight, input_shape: tuple[int, ...], digits: int) -> Derivation:
    """Walk the graph once, with balls of `digits` bits.

    Raises:
        NotAuditableError: the graph holds something without a rule; the message names the node.
    """
    ctx.prec = digits
    graph = read_graph(model_bytes)
    if graph.input_shape != input_shape:
        raise NotAuditableError(f"the graph takes images {graph.input_shape}, the card states {input_shape}")
    size = math.prod(graph.input_shape)
    network = Network(FORMATS[graph.dtype], digits, [[], []])
    ids = network.add_base(_image(network, sight, size), [[power(-1)] * size, list(sight.pixels)])
    values: dict[str, Value] = {**graph.constants, graph.input_name: Tensor(ids.reshape(graph.input_shape))}
    for node in graph.nodes:
        try:
            outputs = _evaluated(graph, network, node, [values[name] if name else None for name in node.inputs])
        except NotAuditableError as error:
            raise NotAuditableError(f"{node.label}: {error}") from error
        except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
            raise NotAuditableError(f"{node.label}: its operands do not fit ({error})") from error
        values.update(zip(node.outputs, outputs, strict=False))
    logits = values.get(graph.output_name)
    if not isinstance(logits, Tensor) or len(logits.shape) != 1:
        raise NotAuditableError("the output must be one vector for each image")
    return _derivation(network, logits.ids)


def _image(network: Network, sight: Sight, size: int) -> Base:
    """Every image of the box [0, 1]^d, half its diagonal from the centre; computed in float64, cast to the format."""
    error = sight.pixel_error
    if network.format.digits < 53:
        error = error + network.format.unit * (arb(1) + error) + network.format.tiny
    side = root(arb(size))
    return Base(upper(sight.norm), upper(side * power(-1)), upper(error * side), upper(error))


def _evaluated(graph: Graph, network: Network, node: Node, inputs: Sequence[Value | None]) -> Sequence[Value]:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if node.operator == "Shape":
        return [_shape(graph, node, inputs)]
    if not tensors and any(isinstance(value, Sized) for value in inputs):
        return _picked(graph, node, inputs)
    constants = [value if isinstance(value, np.ndarray) else None for value in inputs]
    rule = MOVES.get(node.operator)
    attributes = rule[1] if rule else RULES[node.operator][1] if node.operator in RULES else None
    if attributes is None and tensors:
        raise NotAuditableError("no rule for this operator")
    unread = node.attributes.keys() - (attributes or frozenset())
    if rule is not None:
        if unread:
            raise NotAuditableError(f"no rule for attribute {', '.join(sorted(unread))}")
        if tensors:
            return _moved(graph, node, inputs)
        if node.operator != "Pad":
            # What numpy takes from an array may be a scalar of its own type.
            return [np.asarray(array) for array in rule[0](node, constants)]
    if not tensors:
        return [folded(node, constants)]
    if unread:
        raise NotAuditableError(f"no rule for attribute {', '.join(sorted(unread))}")
    made = RULES[node.operator][0](network, node, inputs)
    if made.flat.size == 0:
        raise NotAuditableError("nothing is left of the tensor")
    return [made]


def _shape(graph: Graph, node: Node, inputs: Sequence[Value | None]) -> Value:
    (value,) = inputs
    if node.attributes.keys() - {"start", "end"} or value is None:
        raise NotAuditableError("no rule for its attributes or operands")
    if isinstance(value, Tensor):
        return sized([shape_of(node, (batch, *value.shape)) for batch in graph.batches])
    return shape_of(node, (value.arrays[0] if isinstance(value, Sized) else value).shape)


def _picked(graph: Graph, node: Node, inputs: Sequence[Value | None]) -> list[Value]:
    """Integers picked from shapes that hold the batch size."""
    others = [] if node.operator == "Concat" else inputs[1:]
    if node.operator not in PICKS or any(isinstance(value, Sized) for value in others):
        raise NotAuditableError("it computes with the size of the batch")
    function, attributes = MOVES[node.operator]
    if node.attributes.keys() - attributes:
        raise NotAuditableError("no rule for its attributes")
    found = [function(node, [_of_batch(value, n) for value in inputs]) for n in range(len(graph.batches))]
    return [sized([np.asarray(array) for array in arrays]) for arrays in zip(*found, strict=True)]


def _of_batch(value: Value | None, which: int) -> np.ndarray | None:
    """A constant as it is in one of the probed batches."""
    return value.arrays[which] if isinstance(value, Sized) else value if isinstance(value, np.ndarray) else None


def _moved(graph: Graph, node: Node, inputs: Sequence[Value | None]) -> list[Value]:
    """Move batches of two sizes: every image of each must be moved alike, and by itself."""
    function = MOVES[node.operator][0]
    first = isinstance(inputs[0], Tensor)
    rest = inputs if node.operator == "Concat" else inputs[:1]
    others = [] if node.operator == "Concat" else inputs[1:]
    if not first or not all(isinstance(v, Tensor) for v in rest) or any(isinstance(v, Tensor) for v in others):
        raise NotAuditableError("it mixes constants and numbers that depend on the image")
    if node.operator != "Reshape" and any(isinstance(value, Sized) for value in others):
        # A new shape can hold the batch size in one place only; a position that depends on it is another map.
        raise NotAuditableError("it computes with the size of the batch")
    found: list[list[np.ndarray]] = []
    for which, batch in enumerate(graph.batches):
        operands = [_batch(v, batch) if isinstance(v, Tensor) else _of_batch(v, which) for v in inputs]
        outputs = function(node, operands)
        for output in outputs:
            alone = output[0] if output.ndim else output
            expected = np.stack([np.where(alone == NOTHING, NOTHING, alone + n * _STRIDE) for n in range(batch)])
            if output.shape != expected.shape or (output != expected).any() or (alone >= _STRIDE).any():
                raise NotAuditableError("it mixes the images of a batch")
        found.append([output[0] for output in outputs])
    if any(not np.array_equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)):
        raise NotAuditableError("it depends on the size of the batch")
    if any(output.size == 0 for output in found[0]):
        raise NotAuditableError("nothing is left of the tensor")
    return [Tensor(np.ascontiguousarray(output).reshape(output.shape)) for output in found[0]]


def _batch(tensor: Tensor, size: int) -> np.ndarray:
    return np.stack([np.where(tensor.ids == NOTHING, NOTHING, tensor.ids + n * _STRIDE) for n in range(size)])


def _derivation(network: Network, logits: np.ndarray) -> Derivation:
    facts = network.facts(logits)
    error = smaller(facts.error_max, facts.error)
    exact = network.at(1, logits.tolist())
    if len(exact) == 1:
        # One output f stands for (f, -f), whose margin is 2 f.
        twice = upper(arb(2) * facts.lipschitz)
        return Derivation([exact[0], -exact[0]], error, [[arb(0), twice], [twice, arb(0)]])
    bounds = [[arb(0)] * len(exact) for _ in exact]
    # |d_i - d_j| <= sqrt(2) ||d||, whatever the logits are.
    rough = upper(root(arb(2)) * facts.lipschitz)
    for i, left in enumerate(logits.tolist()):
        for j, right in enumerate(logits.tolist()[:i]):
            bounds[i][j] = bounds[j][i] = smaller(rough, _margin_bound(network, left, right))
    return Derivation(exact, error, bounds)


def _margin_bound(network: Network, left: int, right: int) -> arb:
    """`L ||m_i - m_j||` for two logits `m h + c` on one base h of Lipschitz bound L."""
    if NOTHING in (left, right):
        return network.facts(np.array([left, right])).lipschitz
    one, other = network.layer_of(left), network.layer_of(right)
    if one.base is not other.base:
        return upper(sum((network.facts(np.array([i])).lipschitz for i in (left, right)), arb(0)))
    shift = max(one.matrix.shift, other.matrix.shift)
    difference = _scaled(one, left, shift)
    for column, number in _scaled(other, right, shift).items():
        difference[column] = difference.get(column, 0) - number
    squared = sum(number * number for number in difference.values())
    length = root(arb(squared)) * power(-shift) + one.matrix.defect + other.matrix.defect
    return upper(length * one.base.lipschitz)


def _scaled(layer: Layer, number: int, shift: int) -> dict[int, int]:
    places = shift - layer.matrix.shift
    return {column: v << places for column, v in layer.matrix.rows[number - layer.start].items()}
