"""Products with constant matrices and vectors, sums, normalisation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from flint import arb

from service.audit.affine import add, linear, shifted
from service.audit.balls import NotAuditableError, root, upper
from service.audit.functions import added, plus_number, product, sum_of_functions, times_number
from service.audit.graph import Node
from service.audit.maps import Diagonal, Shared, Weights, ball_weights, exact_weights, signs
from service.audit.network import Network, Tensor
from service.audit.operators.table import (
    Operands,
    Signs,
    balls,
    broadcast,
    floats,
    is_given,
    rule,
    tensor,
)
from service.audit.products import added_blocks, note
from service.audit.steps import gradient_step


def _dense(network: Network, x_LN: np.ndarray, weight_NM: np.ndarray, bias_M: np.ndarray | None) -> np.ndarray:
    """`x W + b` along the last axis of `L x N`."""
    (lead, n), m = x_LN.shape, weight_NM.shape[1]
    if weight_NM.shape[0] != n or n == 0 or m == 0:
        raise NotAuditableError(f"a weight {weight_NM.shape} does not fit {n} numbers")
    operator = Shared(exact_weights(weight_NM.T), np.arange(lead * n).reshape(lead, n), lead * n)
    bias = None if bias_M is None else balls(bias_M) * lead
    made = linear(network, x_LN.ravel(), operator, n + 1, bias)
    note(network, made, x_LN, weight_NM, bias)
    return made.reshape(lead, m)


@rule("Gemm", attributes=("alpha", "beta", "transA", "transB"))
def _gemm(network: Network, node: Node, operands: Operands) -> Tensor:
    x, weight = tensor(operands), floats(operands, 1)
    if node.number("alpha", 1.0) != 1.0 or node.number("beta", 1.0) != 1.0 or node.integer("transA", 0):
        raise NotAuditableError("alpha or beta other than 1, or transA")
    if len(x.shape) != 1 or weight.ndim != 2:
        raise NotAuditableError("a flat tensor and a matrix are read here")
    weight = weight.T if node.integer("transB", 0) else weight
    bias = None
    if is_given(operands, 2):
        bias = floats(operands, 2)
        if bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1):
            raise NotAuditableError(f"a bias of shape {bias.shape}")
        bias = np.broadcast_to(bias.reshape(-1), (weight.shape[1],))
    return Tensor(_dense(network, x.ids[None], weight, bias)[0])


@rule("MatMul")
def _matmul(network: Network, node: Node, operands: Operands) -> Tensor:
    turned = not isinstance(operands[0], Tensor)
    x, weight = tensor(operands, int(turned)), floats(operands, int(not turned))
    if weight.ndim != 2 or (turned and len(x.shape) < 2):
        raise NotAuditableError("a constant matrix, on the left of a tensor with two axes or more or on its right")
    ids, weight = (np.swapaxes(x.ids, -1, -2), weight.T) if turned else (x.ids, weight)
    made = _dense(network, ids.reshape(-1, ids.shape[-1]), weight, None).reshape(*ids.shape[:-1], weight.shape[1])
    return Tensor(np.swapaxes(made, -1, -2) if turned else made)


@rule("Add", "Sub")
def _add(network: Network, node: Node, operands: Operands) -> Tensor:
    sign = 1 if node.operator == "Add" else -1
    left, right = operands[0], operands[1]
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if len(left.shape) != len(right.shape):
            raise NotAuditableError("tensors of different rank")
        shape = np.broadcast_shapes(left.shape, right.shape)
        one, other = (np.broadcast_to(value.ids, shape).ravel() for value in (left, right))
        made = added_blocks(network, one, other, sign)
        return Tensor((_sum_of_two(network, one, other, sign) if made is None else made).reshape(shape))
    if isinstance(left, Tensor):
        ids, constant = broadcast(left, floats(operands, 1))
        return _plus(network, ids, sign * constant, 1)
    ids, constant = broadcast(tensor(operands, 1), floats(operands, 0))
    return _plus(network, ids, constant, sign)


def _plus(network: Network, ids: np.ndarray, constant: np.ndarray, sign: int) -> Tensor:
    made = shifted(network, ids.ravel(), balls(constant), sign)
    if _is_one_number(constant):
        plus_number(network, made, ids.ravel(), sign, arb(float(constant.flat[0])))
    return Tensor(made.reshape(ids.shape))


def _is_one_number(constant: np.ndarray) -> bool:
    return constant.size > 0 and bool((constant == constant.flat[0]).all())


def _sum_of_two(network: Network, left: np.ndarray, right: np.ndarray, sign: int) -> np.ndarray:
    sharper = None
    if not network.shares_base(np.concatenate([left, right])):
        # Terms on two bases that are functions of one tensor, or cancel each other.
        found = [sum_of_functions(network, left, right, sign), gradient_step(network, left, right, sign)]
        found.append(gradient_step(network, right, left, sign))
        for bounds in found:
            sharper = sharper if bounds is None else bounds if sharper is None else sharper.smaller(bounds)
    made = add(network, left, right, sign, sharper)
    added(network, made, left, right, sign)
    return made


@rule("Sum", "Mean")
def _sum(network: Network, node: Node, operands: Operands) -> Tensor:
    total = tensor(operands)
    if len(operands) == 1:
        return total
    share = ball_weights([arb(1) / len(operands)] * total.flat.size, 1)
    if len(operands) == 2:
        total = _add(network, replace(node, operator="Add"), operands)
        # Half of a number is exact; the quotient by it may be rounded.
        share = exact_weights(np.full(total.shape, 0.5))
    else:
        total = _sum_of_many(network, [tensor(operands, k) for k in range(len(operands))])
    return total if node.operator == "Sum" else _scaled(network, total.ids, share, 2)


def _sum_of_many(network: Network, terms: list[Tensor]) -> Tensor:
    """Append sums of three or more tensors, in any order: off by `gamma_n` times the sum of absolute values."""
    if len({term.shape for term in terms}) > 1:
        raise NotAuditableError("more than two operands of different shapes")
    facts = [network.facts(term.ids) for term in terms]
    total = terms[0].flat
    for term in terms[1:]:
        # Each of these has a rounding too, which is more than there need be.
        total = _sum_of_two(network, total, term.flat, 1)
    gamma = network.format.gamma(len(terms))
    tiny = 4 * network.format.tiny * len(terms)
    rounding = gamma * sum((one.computed for one in facts), arb(0)) + tiny * root(arb(total.size))
    rounding_max = gamma * sum((one.largest for one in facts), arb(0)) + tiny
    network.require_no_overflow(upper(sum((one.largest for one in facts), arb(0))))
    unique, inverse = np.unique(total, return_inverse=True)
    values = [network.at(point, unique.tolist()) for point in range(len(network.values))]
    made = network.nonlinear(unique, values, None, upper(rounding), upper(rounding_max))
    return Tensor(made[inverse].reshape(terms[0].shape))


def _scaled(network: Network, ids: np.ndarray, factors: Weights, roundings: int) -> Tensor:
    return Tensor(linear(network, ids.ravel(), Diagonal(factors), roundings).reshape(ids.shape))


@rule("Mul")
def _mul(network: Network, node: Node, operands: Operands) -> Tensor:
    one, other = operands
    for left, right in ((one, other), (other, one)):
        if isinstance(left, Signs) and isinstance(right, Tensor) and np.array_equal(left.ids, right.ids):
            # A sum of squares times its sign, computed and exact.
            return right
        # Any other sign is refused.
        if isinstance(left, Signs):
            return tensor([left])
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _product(network, one, other)
    first = isinstance(one, Tensor)
    ids, constant = broadcast(tensor(operands, int(not first)), floats(operands, int(first)))
    made = _scaled(network, ids, exact_weights(constant), 1)
    if _is_one_number(constant):
        times_number(network, made.flat, ids.ravel(), arb(float(constant.flat[0])), 1)
    return made


def _product(network: Network, left: Tensor, right: Tensor) -> Tensor:
    if len(left.shape) != len(right.shape):
        raise NotAuditableError("tensors of different rank")
    shape = np.broadcast_shapes(left.shape, right.shape)
    pairs = np.stack([np.broadcast_to(value.ids, shape).ravel() for value in (left, right)])
    # A product that occurs twice is one number.
    unique, inverse = np.unique(pairs, axis=1, return_inverse=True)
    made = product(network, unique[0], unique[1], 1)
    return Tensor(made[inverse.ravel()].reshape(shape))


@rule("Div")
def _div(network: Network, node: Node, operands: Operands) -> Tensor:
    ids, constant = broadcast(tensor(operands), floats(operands, 1))
    if not constant.all():
        raise NotAuditableError("it divides by zero")
    network.require_no_overflow(upper(arb(1) / arb(float(np.abs(constant).min()))))
    reciprocals = ball_weights([arb(1) / value for value in balls(constant)], 1)
    # A runtime may multiply by a rounded reciprocal: two roundings.
    made = _scaled(network, ids, reciprocals, 2)
    if _is_one_number(constant):
        times_number(network, made.flat, ids.ravel(), arb(1) / arb(float(constant.flat[0])), 2)
    return made


@rule("Neg")
def _neg(network: Network, node: Node, operands: Operands) -> Tensor:
    x = tensor(operands)
    made = linear(network, x.flat, signs(x.flat.size, -1), 0)
    network.origins.add_opposites(made, x.flat)
    times_number(network, made, x.flat, arb(-1), 0)
    return Tensor(made.reshape(x.shape))


@rule("BatchNormalization", attributes=("epsilon", "momentum", "training_mode"))
def _batch_normalization(network: Network, node: Node, operands: Operands) -> Tensor:
    x = tensor(operands)
    if node.integer("training_mode", 0) or len(node.outputs) > 1:
        raise NotAuditableError("its training form")
    parameters = [floats(operands, position) for position in (1, 2, 3, 4)]
    if any(values.shape != (x.shape[0],) for values in parameters):
        raise NotAuditableError("its parameters do not fit the channels")
    scale, shift, mean, variance = map(balls, parameters)
    epsilon = arb(node.number("epsilon", 1e-5))
    if not all(v + epsilon > 0 for v in variance):
        raise NotAuditableError("variance + epsilon must be positive")
    factors = [s / (v + epsilon).sqrt() for s, v in zip(scale, variance, strict=True)]
    bias = [b - m * f for b, m, f in zip(shift, mean, factors, strict=True)]
    size = [abs(b) + abs(m * f) for b, m, f in zip(shift, mean, factors, strict=True)]
    pixels = x.flat.size // x.shape[0]
    spread, added, sizes = ([v for v in values for _ in range(pixels)] for values in (factors, bias, size))
    # However it is arranged, at most ten roundings touch each of the terms f x, f mean and b.
    made = linear(network, x.flat, Diagonal(ball_weights(spread, 1)), 10, added, sizes)
    return Tensor(made.reshape(x.shape))
