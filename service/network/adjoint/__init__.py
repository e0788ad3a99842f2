"""The gradient of a network as a network: `differentiate`, with one pullback for each kind of operator."""

from __future__ import annotations

import math
from collections.abc import Sequence

from service.network.adjoint import choices, elementwise, linear, rearrangements
from service.network.adjoint.builder import PULLBACKS, Builder
from service.network.adjoint.elementwise import sorted_pair
from service.network.limits import LARGEST_TENSOR, size_error
from service.network.operators import Network, Operator, Tensor, UnsupportedModelError

MODULES = (choices, elementwise, linear, rearrangements)


def without_gradient(operators: Sequence[Operator]) -> list[str]:
    """Return the reasons against a gradient: operators without a pullback, or with one that takes too much memory."""
    found = [(operator, _why_not(operator)) for operator in operators]
    return [f"{operator.label or operator.kind}: {why}" for operator, why in found if why]


def _why_not(operator: Operator) -> str:
    """Return why an operator has no gradient; empty where it has one."""
    if operator.kind not in PULLBACKS:
        return "no gradient of this operator"
    if operator.kind == "MaxPool":
        # The gradient picks among all pixels of all windows.
        elements = math.prod((*operator.results[0].shape, *operator.integers("kernel_shape")))
        if elements > LARGEST_TENSOR:
            return f"no gradient, whose windows are {size_error(elements, LARGEST_TENSOR)}"
    return ""


def differentiate(network: Network) -> Network:
    """Return the network of inputs `(image, weights)` and outputs `(logits, gradient)`.

    `gradient` is that of `sum_k weights[k] logits[k]` with respect to the image, by reverse-mode differentiation: with
    `weights = e_i - e_j` the gradient of the margin `f_i - f_j`.

    Raises:
        UnsupportedModelError: operators without a pullback; the message names them.
    """
    missing = without_gradient(network.operators)
    if missing:
        raise UnsupportedModelError(missing)
    b = Builder(network)
    (logits,) = network.outputs
    weights = b.tensor(logits.shape)
    partners = _partners(network)
    waiting: dict[int, Tensor] = {}
    cotangents: dict[int, Tensor | None] = {logits.number: weights}
    for position in range(len(network.operators) - 1, -1, -1):
        operator = network.operators[position]
        given = [cotangents.get(result.number) for result in operator.results]
        if all(g is None for g in given):
            continue
        partner = partners.get(position)
        if partner is not None:
            own = given[0]
            assert own is not None
            if partner < position:
                # The pair is pulled back at its first operator, when both cotangents are known.
                waiting[partner] = own
                continue
            other = waiting.get(position)
            if other is not None:
                of_max, of_min = (own, other) if operator.kind == "Max" else (other, own)
                left, right = operator.operands
                assert isinstance(left, Tensor)
                assert isinstance(right, Tensor)
                for operand, g in zip((left, right), sorted_pair(b, left, right, of_max, of_min), strict=True):
                    cotangents[operand.number] = b.add(cotangents.get(operand.number), g)
                continue
        for operand, g in zip(operator.operands, PULLBACKS[operator.kind](b, operator, given), strict=False):
            if isinstance(operand, Tensor) and g is not None:
                cotangents[operand.number] = b.add(cotangents.get(operand.number), g)
    gradient = cotangents.get(network.image.number)
    if gradient is None:
        gradient = b.zeros_like(network.image)
    return Network((network.image, weights), network.precision, tuple(b.operators), (logits, gradient))


def _partners(network: Network) -> dict[int, int]:
    """Return, for each Max and Min of the same two tensors of one shape, the position of the other."""
    seen: dict[tuple[str, int, int], int] = {}
    found: dict[int, int] = {}
    for position, operator in enumerate(network.operators):
        if not _is_pair(operator):
            continue
        left, right = operator.operands
        assert isinstance(left, Tensor)
        assert isinstance(right, Tensor)
        other = seen.pop(("Min" if operator.kind == "Max" else "Max", left.number, right.number), None)
        if other is None:
            seen[operator.kind, left.number, right.number] = position
        else:
            found[position], found[other] = other, position
    return found


def _is_pair(operator: Operator) -> bool:
    operands = operator.operands
    return (
        operator.kind in ("Max", "Min")
        and len(operands) == 2
        and all(isinstance(operand, Tensor) for operand in operands)
        and len({operand.shape for operand in operands if isinstance(operand, Tensor)}) == 1
    )


__all__ = ["MODULES", "PULLBACKS", "differentiate", "without_gradient"]
