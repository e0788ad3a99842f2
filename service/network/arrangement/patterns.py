"""Patterns of operators around a shift of channels: where it begins and ends, and what may be reordered."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from service.network.arrangement.planes import PlaneMoves, plane_moves
from service.network.operators import Constant, Network, Operator, Tensor


class Links:
    """Which operator makes each tensor of a network, and which take it."""

    def __init__(self, network: Network) -> None:
        self.operators = network.operators
        self._maker = {
            tensor.number: position
            for position, operator in enumerate(network.operators)
            for tensor in operator.results
        }
        self._takers: dict[int, list[int]] = {}
        for position, operator in enumerate(network.operators):
            for operand in operator.operands:
                if isinstance(operand, Tensor):
                    self._takers.setdefault(operand.number, []).append(position)
        for tensor in network.outputs:
            # Nobody may change an output.
            self._takers.setdefault(tensor.number, []).append(-1)

    def maker(self, tensor: Tensor) -> int:
        """Return the position of the operator that makes a tensor; -1 for an input."""
        return self._maker.get(tensor.number, -1)

    def takers(self, tensor: Tensor) -> list[int]:
        """Return the positions of the operators that take a tensor, -1 for an output."""
        return self._takers.get(tensor.number, [])

    def taker(self, tensor: Tensor) -> int:
        """Return the position of the only operator that takes a tensor; -1 where it is an output or several do."""
        takers = self.takers(tensor)
        return takers[0] if len(takers) == 1 else -1

    def kind(self, position: int) -> str:
        """Return the kind of an operator; empty for no operator."""
        return self.operators[position].kind if position >= 0 else ""


@dataclass(frozen=True)
class Pair:
    """A maximum and a minimum, stacked: the halves of a matrix product, whose rows may be permuted with them."""

    first: Tensor
    second: Tensor
    rows: tuple[int, ...]
    """Positions of the product and of the addition of its bias: one row for each channel."""
    dropped: frozenset[int]
    """Positions of operators between the pair and the stacked tensor."""


@dataclass(frozen=True)
class Shift:
    """A Gather and a mask between a tensor of planes and a matrix product."""

    moves: PlaneMoves
    source: Tensor
    """The planes, C x ... ; where there are blocks, the pixels that they are made of."""
    block: int
    """Pixels of a block in each direction that SpaceToDepth makes planes of; 1 where it has no part in the shift."""
    product: int
    """Position of the product `W y`, of which y, C x P, is the shifted tensor."""
    dropped: frozenset[int]
    """Positions of the operators from the planes to y."""
    pair: Pair | None
    """What makes the planes, where their order is free."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of pixels that become channels, written as Reshape, Transpose, Reshape."""

    source: Tensor
    """C x H x W."""
    size: int
    """Of a block in each direction."""
    dropped: frozenset[int]
    """Positions of the three operators."""


def find_shift(links: Links, position: int) -> Shift | None:
    """Return the shift that a Gather belongs to; null where it belongs to no shift.

    Args:
        links: of the network.
        position: of any operator.
    """
    gather = links.operators[position]
    if gather.kind != "Gather" or gather.integer("axis") != 1:
        return None
    flat, positions = gather.operands[:2]
    if not isinstance(flat, Tensor) or not isinstance(positions, Constant) or gather.results[0].shape != flat.shape:
        return None
    if len(flat.shape) != 1 or links.taker(flat) != position or links.kind(links.maker(flat)) != "Reshape":
        return None
    dropped = {position, links.maker(flat)}
    source = links.operators[links.maker(flat)].operands[0]
    assert isinstance(source, Tensor)
    channels = source.shape[0]
    mask, result = np.ones(flat.shape), gather.results[0]
    masking = links.taker(result)
    factor = _constant(links, masking, "Mul")
    if factor is not None:
        if factor.shape != flat.shape:
            return None
        dropped.add(masking)
        mask, result = factor, links.operators[masking].results[0]
    product = links.taker(result)
    while links.kind(product) == "Reshape":
        dropped.add(product)
        result = links.operators[product].results[0]
        product = links.taker(result)
    weight = _constant(links, product, "MatMul")
    if weight is None or result.shape != (channels, flat.shape[0] // channels) or weight.shape[1:] != (channels,):
        return None
    if links.operators[product].operands[1] != result:
        return None
    moves = plane_moves(positions.array, mask, channels)
    if moves is None:
        return None
    blocks = _find_blocks(links, source, links.maker(flat))
    if blocks is None:
        return Shift(moves, source, 1, product, frozenset(dropped), _find_pair(links, source, links.maker(flat)))
    # Channel c of pixel k of a block is plane c B + k here, and plane k C + c of SpaceToDepth.
    pixels, whole = blocks.size**2, blocks.source.shape[0]
    moves = replace(moves, source=moves.source % pixels * whole + moves.source // pixels)
    return Shift(moves, blocks.source, blocks.size, product, frozenset(dropped | blocks.dropped), None)


def _constant(links: Links, position: int, kind: str) -> np.ndarray | None:
    """Return the constant of an operator of one kind with one constant and one tensor; null for any other."""
    if links.kind(position) != kind:
        return None
    arrays = [operand.array for operand in links.operators[position].operands if isinstance(operand, Constant)]
    return arrays[0] if len(arrays) == 1 else None


def _find_blocks(links: Links, planes: Tensor, taker: int) -> Blocks | None:
    """Return the blocks that become planes, if nothing else takes them; null otherwise.

    Args:
        links: of the network.
        planes: C size^2 x h x w.
        taker: position of the operator that takes them.
    """
    found: list[int] = []
    tensor, shapes = planes, [planes.shape]
    for kind in ("Reshape", "Transpose", "Reshape"):
        maker = links.maker(tensor)
        if links.kind(maker) != kind or links.taker(tensor) != taker:
            return None
        found.append(maker)
        tensor, taker = _first(links.operators[maker]), maker
        shapes.append(tensor.shape)
    if links.operators[found[1]].integers("perm") != (0, 1, 3, 5, 2, 4):
        return None
    channels, height, size, width, _ = cut = shapes[2]
    if cut != (channels, height, size, width, size) or shapes[0] != (channels * size**2, height, width):
        return None
    if tensor.shape != (channels, height * size, width * size):
        return None
    return Blocks(tensor, size, frozenset(found))


def _find_pair(links: Links, source: Tensor, taker: int) -> Pair | None:
    """Return the pair that makes planes, if nothing else takes it; null otherwise.

    Args:
        links: of the network.
        source: the planes.
        taker: position of the operator that takes them.
    """
    stack = links.maker(source)
    if links.taker(source) != taker or links.kind(stack) != "Concat" or links.operators[stack].integer("axis") != 1:
        return None
    halves = [operand for operand in links.operators[stack].operands if isinstance(operand, Tensor)]
    if len(halves) != 2 or any(links.taker(half) != stack for half in halves):
        return None
    makers = [links.maker(half) for half in halves]
    if sorted(map(links.kind, makers)) != ["Max", "Min"]:
        return None
    one, other = (links.operators[maker] for maker in makers)
    split = _split_of(links, one, makers)
    if split is None or one.operands != other.operands:
        return None
    rows = _rows_of(links, links.operators[split], split)
    return None if rows is None else Pair(halves[0], halves[1], rows, frozenset({stack}))


def _split_of(links: Links, sort: Operator, sorters: list[int]) -> int | None:
    """Return the position of the Split into halves that a maximum and a minimum take, and nothing else does."""
    made: set[int] = set()
    for operand in sort.operands:
        if not isinstance(operand, Tensor) or sorted(links.takers(operand)) != sorted(sorters):
            return None
        made.add(links.maker(operand))
    split = made.pop()
    if made or links.kind(split) != "Split" or links.operators[split].integer("axis") != 1:
        return None
    results = links.operators[split].results
    if len(results) != 2 or results[0].shape != results[1].shape or set(results) != set(sort.operands):
        return None
    return split


def _rows_of(links: Links, operator: Operator, position: int) -> tuple[int, ...] | None:
    """Return the matrix product behind an operator, and the addition between, where a channel is one row of both."""
    rows: list[int] = []
    channels = _first(operator).shape[0]
    while True:
        tensor = _first(operator)
        maker = links.maker(tensor)
        if links.taker(tensor) != position or tensor.shape[0] != channels:
            return None
        match links.kind(maker):
            case "Reshape":
                pass
            case "Add":
                bias = _constant(links, maker, "Add")
                if rows or bias is None or bias.shape != (channels, 1) or len(tensor.shape) != 2:
                    return None
                rows.append(maker)
            case "MatMul":
                weight = _constant(links, maker, "MatMul")
                on_the_left = isinstance(links.operators[maker].operands[0], Constant)
                if weight is None or not on_the_left or len(tensor.shape) != 2 or weight.shape[:1] != (channels,):
                    return None
                return (*rows, maker)
            case _:
                return None
        operator, position = links.operators[maker], maker


def _first(operator: Operator) -> Tensor:
    """Return the first operand that is a tensor."""
    return next(operand for operand in operator.operands if isinstance(operand, Tensor))
