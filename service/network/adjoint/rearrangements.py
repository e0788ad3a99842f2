"""Pullbacks of operators that move elements."""

from __future__ import annotations

import numpy as np

from service.network.adjoint.builder import (
    Builder,
    Cotangents,
    constant_of,
    pulls_back,
    tensor_of,
)
from service.network.adjoint.elementwise import only
from service.network.operators import Operator, Tensor


@pulls_back("Reshape")
def _reshape(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` in the shape of the operand."""
    return [b.reshape(only(cotangents), tensor_of(operator).shape), None]


@pulls_back("Transpose")
def _transpose(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` with the axes moved back."""
    order = [axis - 1 for axis in operator.integers("perm")[1:]]
    return [b.transpose(only(cotangents), [order.index(axis) for axis in range(len(order))])]


@pulls_back("Split")
def _split(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return the parts stacked."""
    axis = operator.integer("axis")
    parts = [g if g is not None else b.zeros_like(part) for g, part in zip(cotangents, operator.results, strict=True)]
    return [b.one("Concat", parts, tensor_of(operator).shape, axis=axis), None]


@pulls_back("Concat")
def _concat(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` in parts."""
    axis = operator.integer("axis")
    parts = [tensor_of(operator, position) for position in range(len(operator.operands))]
    sizes = b.indices(*(part.shape[axis - 1] for part in parts))
    return b.results("Split", [only(cotangents), sizes], [part.shape for part in parts], axis=axis)


@pulls_back("Slice")
def _slice(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` with zeros where elements were cut off."""
    g, x = only(cotangents), tensor_of(operator)
    starts, stops, axes, steps = (constant_of(operator, position).tolist() for position in range(1, 5))
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        n = x.shape[axis - 1]
        g = b.scattered(g, axis - 1, np.arange(n)[start:stop:step], n)
    return [g, *[None] * 4]


@pulls_back("Gather")
def _gather(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return for each element the sum of the `g` at which it was picked."""
    g, x = only(cotangents), tensor_of(operator)
    axis, positions = operator.integer("axis") - 1, constant_of(operator, 1)
    flat = b.reshape(g, (*x.shape[:axis], positions.size, *x.shape[axis + 1 :]))
    return [b.scattered(flat, axis, positions.ravel(), x.shape[axis]), None]


@pulls_back("Pad")
def _pad(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return for each element the sum of the `g` of its copies."""
    g, x = only(cotangents), tensor_of(operator)
    pads, rank = constant_of(operator, 1).tolist(), len(x.shape) + 1
    mode = operator.text("mode")
    for axis in range(1, rank):
        low, high, n = pads[axis], pads[rank + axis], x.shape[axis - 1]
        if not low and not high:
            continue
        index = np.arange(n)
        if mode == "constant":
            positions = np.pad(index, (low, high), constant_values=-1)
        else:
            positions = np.pad(index, (low, high), mode=mode)  # type: ignore[call-overload]
        g = b.scattered(g, axis - 1, positions, n)
    return [g, *[None] * (len(operator.operands) - 1)]


@pulls_back("Expand")
def _expand(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return the sum over repeated axes."""
    g, x = only(cotangents), tensor_of(operator)
    added = len(g.shape) - len(x.shape)
    summed = b.summed_to(g, (*[1] * added, *x.shape))
    return [b.reshape(summed, x.shape), None]


@pulls_back("Tile")
def _tile(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return the sum over the copies."""
    g, x = only(cotangents), tensor_of(operator)
    shape: list[int] = []
    axes: list[int] = []
    for n, times in zip(x.shape, constant_of(operator, 1).tolist()[1:], strict=True):
        axes.append(len(shape))
        shape += [times, n]
    return [b.reduced("ReduceSum", b.reshape(g, shape), axes, keep=False), None]


@pulls_back("Where")
def _where(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` for the branch that was taken."""
    g, zero = only(cotangents), b.number(0.0)
    mask, *branches = operator.operands
    chosen = ((g, zero), (zero, g))
    return [
        None,
        *(
            b.summed_to(b.where(mask, *pair, g.shape), branch.shape) if isinstance(branch, Tensor) else None
            for branch, pair in zip(branches, chosen, strict=True)
        ),
    ]


@pulls_back("SpaceToDepth")
def _space_to_depth(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return the inverse."""
    block = operator.integer("blocksize")
    return [b.one("DepthToSpace", [only(cotangents)], tensor_of(operator).shape, blocksize=block, mode="DCR")]


@pulls_back("DepthToSpace")
def _depth_to_space(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return the inverse."""
    g, x, block = only(cotangents), tensor_of(operator), operator.integer("blocksize")
    if operator.text("mode") == "DCR":
        return [b.one("SpaceToDepth", [g], x.shape, blocksize=block)]
    depth, height, width = g.shape[0], x.shape[1], x.shape[2]
    cut = b.reshape(g, (depth, height, block, width, block))
    return [b.reshape(b.transpose(cut, (0, 2, 4, 1, 3)), x.shape)]
