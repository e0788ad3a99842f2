"""The network that runs, for the network that is proved: the same numbers, moved in larger pieces.

A shift of channels, exported as a Gather over all elements and a mask, takes as long as the matrix product behind it.
Here each becomes a Split and a Concat of long rows, between two matrix products whose rows and columns change places.
Elements are moved and multiplied by the same mask, and products are summed in another order, nothing else: bounds and
rounding errors that hold for any order of a sum hold for both networks. A pattern is recognised by its index map,
number by number, and the map of what replaces it is compared with that map. Whatever is not recognised stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from service.network.arrangement.patterns import Links, Shift, find_shift
from service.network.arrangement.planes import Roll, is_same_map, rolled, runs
from service.network.operators import Attribute, Constant, Network, Operand, Operator, Shape, Tensor

_FEWEST = 2048
"""Elements of a shift that is worth several operators."""
_MOST_RUNS = 64
"""Of a row that is split without sorting its planes first."""


def arranged(network: Network) -> Network:
    """Return the network with shifts of channels written as moves of long rows.

    Inputs, outputs and the logits are those of the network, but for the order in which products are summed.
    """
    links = Links(network)
    plan = _Plan(network)
    for position in range(len(network.operators)):
        shift = find_shift(links, position)
        if shift is not None and shift.moves.mask.size >= _FEWEST:
            plan.add(shift)
    return plan.network()


def _order(shift: Shift) -> np.ndarray:
    """Return the order of the planes in which those of one distance are neighbours, as far as that is worth it."""
    distances = shift.moves.of_source
    if shift.pair is not None:
        # Both halves in one order: the numbers of a pair stay a pair.
        first, second = np.split(distances, 2)
        pairs = np.lexsort((second, first))
        return np.concatenate([pairs, pairs + len(pairs)])
    if len(runs(distances.tolist())) <= _MOST_RUNS:
        return np.arange(len(distances))
    return np.argsort(distances, kind="stable")


class _Plan:
    """Changes of a network, collected for all of its shifts before one is made."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._rows: dict[int, np.ndarray] = {}
        self._columns: dict[int, np.ndarray] = {}
        self._dropped: set[int] = set()
        self._before: dict[int, list[Operator]] = {}
        self._operand: dict[int, Tensor] = {}
        tensors = [*network.inputs, *(tensor for operator in network.operators for tensor in operator.results)]
        self._next = max(tensor.number for tensor in tensors) + 1

    def add(self, shift: Shift) -> None:
        """Plan the change of one shift, unless the map would be another."""
        moves, (channels, pixels) = shift.moves, shift.moves.mask.shape
        order = _order(shift)
        distances, row = moves.of_source[order], (order[:, None] * pixels + np.arange(pixels)).ravel()
        pieces = 1 if shift.pair is None else 2
        rolls = [rolled(of_planes.tolist(), pixels) for of_planes in np.split(distances, pieces)]
        moved = [roll.applied(part) for roll, part in zip(rolls, np.split(row, pieces), strict=True)]
        if not is_same_map(moves, order, np.concatenate(moved)):
            return
        made: list[Operator] = []
        if shift.pair is not None:
            sources = [shift.pair.first, shift.pair.second]
            self._rows |= dict.fromkeys(shift.pair.rows, order)
            self._dropped |= shift.pair.dropped
        else:
            sources = [self._sorted_planes(made, shift, order)]
        parts: list[Tensor] = []
        for tensor, roll in zip(sources, rolls, strict=True):
            parts += self._parts(made, self._shaped(made, tensor, (channels * pixels // pieces,)), roll)
        flat = parts[0]
        if len(parts) > 1:
            flat = self._one(made, "Concat", parts, (channels * pixels,), axis=1)
        result = np.argsort(moves.source)[order]
        if not moves.mask.all():
            flat = self._one(made, "Mul", [flat, Constant(moves.mask[result].ravel())], flat.shape)
        self._before[shift.product] = made
        self._operand[shift.product] = self._shaped(made, flat, (channels, pixels))
        self._columns[shift.product] = result
        self._dropped |= shift.dropped

    def network(self) -> Network:
        """Return the changed network."""
        operators: list[Operator] = []
        for position, operator in enumerate(self._network.operators):
            if position in self._dropped:
                continue
            operators += self._before.get(position, [])
            operators.append(self._changed(position, operator))
        return replace(self._network, operators=tuple(operators))

    def _changed(self, position: int, operator: Operator) -> Operator:
        """Return an operator with the rows and columns of its constant in their new order."""
        operands: list[Operand] = []
        for operand in operator.operands:
            given = operand
            if isinstance(given, Constant) and position in self._rows:
                given = Constant(given.array[self._rows[position]])
            if isinstance(given, Constant) and position in self._columns:
                given = Constant(given.array[:, self._columns[position]])
            if isinstance(given, Tensor) and position in self._operand:
                given = self._operand[position]
            operands.append(given)
        return replace(operator, operands=tuple(operands))

    def _sorted_planes(self, made: list[Operator], shift: Shift, order: np.ndarray) -> Tensor:
        planes, (channels, pixels) = shift.source, shift.moves.mask.shape
        if shift.block > 1:
            _, height, width = planes.shape
            shape = (channels, height // shift.block, width // shift.block)
            planes = self._one(made, "SpaceToDepth", [planes], shape, blocksize=shift.block)
        if (order == np.arange(channels)).all():
            return planes
        planes = self._shaped(made, planes, (channels, pixels))
        return self._one(made, "Gather", [planes, Constant(order)], planes.shape, axis=1)

    def _parts(self, made: list[Operator], flat: Tensor, roll: Roll) -> list[Tensor]:
        if len(roll.sizes) == 1:
            return [flat]
        sizes = Constant(np.array(roll.sizes, np.int64))
        results = tuple(self._tensor((size,)) for size in roll.sizes)
        made.append(Operator("Split", (flat, sizes), (("axis", 1),), results))
        return [results[part] for part in roll.order]

    def _shaped(self, made: list[Operator], tensor: Tensor, shape: Shape) -> Tensor:
        if tensor.shape == shape:
            return tensor
        return self._one(made, "Reshape", [tensor, Constant(np.array((0, *shape), np.int64))], shape, allowzero=0)

    def _one(
        self, made: list[Operator], kind: str, operands: Sequence[Operand], shape: Shape, **attributes: Attribute
    ) -> Tensor:
        result = self._tensor(shape)
        made.append(Operator(kind, tuple(operands), tuple(sorted(attributes.items())), (result,)))
        return result

    def _tensor(self, shape: Shape) -> Tensor:
        self._next += 1
        return Tensor(self._next - 1, shape)


__all__ = ["arranged"]
