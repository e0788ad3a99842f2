"""Smooth activations: exact values in balls, slopes, and the inaccuracy that is assumed of a runtime's functions.

Assumption 5 of docs/soundness.md: exp, log, tanh, erf and the activations made of them are within
`64 u max(scale, |y|)` of the exact value y of the computed argument. So a result of slope at most s is off by
`s e + 64 u (scale sqrt(n) + growth ||x^||)` where `max(scale, |y|) <= scale + growth |x|`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flint import arb

from service.audit import expressions
from service.audit.affine import terms_of
from service.audit.balls import NotAuditableError, power, root, upper
from service.audit.expressions import Expression, compose, number, scaled
from service.audit.functions import extended
from service.audit.graph import Node
from service.audit.matrices import Matrix, identity
from service.audit.network import Base, Facts, Network, Tensor
from service.audit.operators.table import Operands, image_axis, rule, tensor
from service.audit.origins import Rising

FUNCTION_ERROR = arb(64)
"""In units of u: assumption 5 of docs/soundness.md."""
_HIGHEST_EXPONENT = arb(700)
"""Largest x for which `exp(x)` is far from overflow in float64."""


_NONE = arb(0)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An elementwise function f."""

    value: Callable[[arb], arb]
    """Enclosure of f."""
    slope: arb
    """Lipschitz bound of f."""
    scale: arb
    growth: arb = _NONE
    gap: arb = _NONE
    """Largest difference between f and the function that a runtime means to compute."""
    rises: bool = True
    """Whether no slope is negative."""
    expression: Callable[[Expression], Expression | None] | None = None
    """f of an expression."""


def _activated(network: Network, x: Tensor, f: Activation) -> Tensor:
    ids, inverse = np.unique(x.ids, return_inverse=True)
    facts = network.facts(ids)
    network.require_no_overflow(upper(f.scale + (arb(1) + f.slope + f.growth) * facts.largest))
    unit, tiny = FUNCTION_ERROR * network.format.unit, f.gap + 4 * network.format.tiny
    lost = upper(unit * (f.scale * root(arb(len(ids))) + f.growth * facts.computed) + tiny * root(arb(len(ids))))
    lost_max = upper(unit * (f.scale + f.growth * facts.largest) + tiny)
    values = [[f.value(one) for one in network.at(point, ids.tolist())] for point in range(len(network.values))]
    made = network.nonlinear(ids, values, upper(f.slope), lost, lost_max)
    if f.rises:
        network.origins.rising[int(made[0])] = Rising(ids, upper(f.slope), lost)
    if f.expression is not None:
        extended(network, made, ids, f.expression, upper(f.slope), (lost, lost_max))
    return Tensor(made[inverse.reshape(x.ids.shape)])


def _outer(function: expressions.Elementary) -> Callable[[Expression], Expression | None]:
    return lambda inner: compose("outer", inner, outer=function)


def _bent(x: arb, below: Callable[[arb], arb]) -> arb:
    """Return x where it is not negative, and below of the rest; below(0) is 0."""
    return x.max(arb(0)) + below(x.min(arb(0)))


@rule("Elu", attributes=("alpha",))
def _elu(network: Network, node: Node, operands: Operands) -> Tensor:
    alpha = arb(node.number("alpha", 1.0))
    most = abs(alpha).max(arb(1))
    f = Activation(
        value=lambda x: _bent(x, lambda t: alpha * t.expm1()),
        slope=most,
        scale=most,
        growth=arb(1),
        rises=bool(alpha >= 0),
    )
    return _activated(network, tensor(operands), f)


@rule("Selu", attributes=("alpha", "gamma"))
def _selu(network: Network, node: Node, operands: Operands) -> Tensor:
    alpha = arb(node.number("alpha", 1.67326319217681884765625))
    gamma = arb(node.number("gamma", 1.05070102214813232421875))
    f = Activation(
        value=lambda x: gamma * _bent(x, lambda t: alpha * t.expm1()),
        slope=abs(gamma) * abs(alpha).max(arb(1)),
        scale=(abs(gamma) * abs(alpha)).max(arb(1)),
        growth=abs(gamma),
        rises=bool(alpha >= 0) and bool(gamma >= 0),
    )
    return _activated(network, tensor(operands), f)


@rule("Celu", attributes=("alpha",))
def _celu(network: Network, node: Node, operands: Operands) -> Tensor:
    alpha, x = arb(node.number("alpha", 1.0)), tensor(operands)
    if not alpha >= power(-20):
        raise NotAuditableError("alpha must be positive, and not tiny")
    network.require_no_overflow(upper(network.facts(x.flat).largest / alpha))
    f = Activation(
        value=lambda x: _bent(x, lambda t: alpha * (t / alpha).expm1()),
        slope=arb(1),
        scale=arb(1) + alpha,
        growth=arb(1),
    )
    return _activated(network, x, f)


@rule("Softplus")
def _softplus(network: Network, node: Node, operands: Operands) -> Tensor:
    x = tensor(operands)
    if network.format.digits == 53 and not network.facts(x.flat).largest < _HIGHEST_EXPONENT:
        # Runtimes without a kernel of this format compute log(1 + exp(x)) as it stands.
        raise NotAuditableError("exp(x) may overflow: x may exceed 700")
    # max(1, y) <= max(1, log 2 + max(x, 0)) <= 1 + |x|.
    outer = _outer(expressions.softplus)
    return _activated(
        network,
        x,
        Activation(value=expressions.log_one_plus_exp, slope=arb(1), scale=arb(1), growth=arb(1), expression=outer),
    )


@rule("Softsign")
def _softsign(network: Network, node: Node, operands: Operands) -> Tensor:
    # x / (1 + |x|) = 1 - 1 / (1 + x) for x >= 0, and odd.
    def value(x: arb) -> arb:
        return expressions.between_ends(x, lambda t: t / (arb(1) + abs(t)))

    return _activated(network, tensor(operands), Activation(value=value, slope=arb(1), scale=arb(1)))


@rule("Sigmoid")
def _sigmoid(network: Network, node: Node, operands: Operands) -> Tensor:
    # Slope y (1 - y).
    f = Activation(value=expressions.logistic, slope=power(-2), scale=arb(1), expression=_outer(expressions.sigmoid))
    return _activated(network, tensor(operands), f)


@rule("Tanh")
def _tanh(network: Network, node: Node, operands: Operands) -> Tensor:
    # Slope 1 - y^2.
    return _activated(
        network,
        tensor(operands),
        Activation(value=arb.tanh, slope=arb(1), scale=arb(1), expression=_outer(expressions.tanh)),
    )


@rule("Erf")
def _erf(network: Network, node: Node, operands: Operands) -> Tensor:
    # Slope 2 / sqrt(pi) exp(-x^2).
    slope = arb(2) / arb.pi().sqrt()
    return _activated(
        network,
        tensor(operands),
        Activation(value=arb.erf, slope=slope, scale=arb(1), expression=_outer(expressions.erf)),
    )


@rule("HardSigmoid", attributes=("alpha", "beta"))
def _hard_sigmoid(network: Network, node: Node, operands: Operands) -> Tensor:
    alpha, beta = arb(node.number("alpha", 0.2)), arb(node.number("beta", 0.5))
    projection = expressions.clip(arb(0), arb(1))

    def expression(inner: Expression) -> Expression | None:
        return compose("outer", compose("sum", scaled(alpha, inner), number(beta)), outer=projection)

    # Two roundings of alpha x + beta, and a projection.
    f = Activation(
        value=lambda x: (alpha * x + beta).max(arb(0)).min(arb(1)),
        slope=abs(alpha),
        scale=abs(beta).max(arb(1)),
        growth=abs(alpha),
        rises=bool(alpha >= 0),
        expression=expression,
    )
    return _activated(network, tensor(operands), f)


@rule("HardSwish")
def _hard_swish(network: Network, node: Node, operands: Operands) -> Tensor:
    sixth, half = arb(1) / 6, power(-1)
    # Slope (2 x + 3) / 6 for |x| <= 3. Runtimes take float32(1/6) for 1/6: x^2 |float32(1/6) - 1/6| <= 4.5e-8 where
    # either is not saturated, |x| <= 3.001.
    f = Activation(
        value=lambda x: x * (x * sixth + half).max(arb(0)).min(arb(1)),
        slope=arb("1.5"),
        scale=arb(3),
        growth=arb(1),
        gap=arb("4.5e-8"),
        rises=False,
    )
    return _activated(network, tensor(operands), f)


# --- along an axis ----------------------------------------------------------------------------------------------------


def _groups(node: Node, x: Tensor) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Return groups, one a row, and how results of their shape become a tensor."""
    axis = image_axis(node.integer("axis", -1), x)
    moved = np.moveaxis(x.ids, axis, -1)
    return moved.reshape(-1, moved.shape[-1]), lambda made: np.moveaxis(made.reshape(moved.shape), -1, axis)


def _exponentials(values: list[arb]) -> tuple[list[arb], arb]:
    """Return `x - m` and the sum of its exponentials, m any number near the largest x."""
    middle = max((value.mid() for value in values), key=float)
    moved = [value - middle for value in values]
    return moved, sum((value.exp() for value in moved), arb(0))


def _sum_error(network: Network, n: int) -> tuple[arb, arb]:
    """Return a bound a of the error of one computed `exp(x - max x)`, and the relative error rho of the sum of n.

    The exponent `t <= 0` is rounded once, which moves exp(t) by at most `u |t| exp(t (1 - u)) <= u`; exp is off by
    64 u. The sum is 1 at least, of terms of at most 1: `rho = n a + gamma_n (1 + n a)`.

    Raises:
        NotAuditableError: the sum is too long for the format.
    """
    one = upper((FUNCTION_ERROR + 1) * network.format.unit)
    rho = upper(one * n + network.format.gamma(n) * (arb(1) + one * n))
    if not rho < power(-2):
        raise NotAuditableError(f"a sum of {n} exponentials is too long for {network.format.name}")
    return one, rho


def _grouped(network: Network, groups: np.ndarray, function: Callable[[list[arb]], list[arb]]) -> list[list[arb]]:
    points = range(len(network.values))
    return [[y for row in groups.tolist() for y in function(network.at(point, row))] for point in points]


def _facts_of(network: Network, groups: np.ndarray) -> Facts:
    facts = network.facts(groups)
    network.require_no_overflow(upper(8 * facts.largest))
    return facts


@rule("Softmax", attributes=("axis",))
def _softmax(network: Network, node: Node, operands: Operands) -> Tensor:
    """`diag(p) - p p^T` has the absolute row sums `2 p_i (1 - p_i) <= 1/2` (Gershgorin), in both norms.

    `p = q / S`: with `|q^ - q| <= a` and `S^ = S (1 + t)`, `|t| <= rho`, S at least 1, and three roundings of the
    quotient, `|p^ - p| <= (1 + 4 u) (a + p rho) / (1 - rho) + 3 u p`; the length of p is at most 1.
    """
    groups, shaped = _groups(node, tensor(operands))
    _facts_of(network, groups)
    rows, n = groups.shape
    unit, tiny = network.format.unit, network.format.tiny
    a, rho = _sum_error(network, n)
    wider = (arb(1) + 4 * unit) / (arb(1) - rho)
    of_one = upper(wider * (a + rho) + 3 * unit + 4 * tiny)
    of_group = upper(wider * (a * root(arb(n)) + rho) + 3 * unit + 4 * tiny * n)

    def probabilities(values: list[arb]) -> list[arb]:
        moved, total = _exponentials(values)
        return [value.exp() / total for value in moved]

    half = power(-1)
    values = _grouped(network, groups, probabilities)
    return Tensor(shaped(network.nonlinear(groups, values, half, upper(of_group * root(arb(rows))), of_one)))


@rule("LogSoftmax", attributes=("axis",))
def _log_softmax(network: Network, node: Node, operands: Operands) -> Tensor:
    """`I - 1 p^T` is a projection, as long as its complement: `||1|| ||p|| <= sqrt(n)`; 2 at most in L-infinity.

    (Kato, *Perturbation Theory*, I 6.8.) As `x - log sum exp x`, it is a sum over two bases. Computed as
    `x - max x - log S` in any order: errors of S, of log, and four roundings of numbers of at most `2 max|x| + log S`.
    """
    groups, shaped = _groups(node, tensor(operands))
    facts, (rows, n) = _facts_of(network, groups), groups.shape
    unit, log_n = network.format.unit, arb(1) + arb(n).log()
    _, rho = _sum_error(network, n)
    size = 2 * facts.largest + log_n
    lost = upper(rho / (arb(1) - rho) + FUNCTION_ERROR * unit * log_n + 5 * unit * size + 4 * network.format.tiny)

    def logarithms(values: list[arb]) -> list[arb]:
        moved, total = _exponentials(values)
        return [value - total.log() for value in moved]

    side = root(arb(n))
    base = Base(
        upper(side * facts.lipschitz),
        upper(side * facts.swing),
        upper(side * facts.error + lost * root(arb(groups.size))),
        upper(2 * facts.error_max + lost),
    )
    values = _grouped(network, groups, logarithms)
    parts = terms_of(network, groups.ravel())
    if parts:
        # log sum exp of each group is 1-Lipschitz, and so are those of disjoint groups together.
        sums = Base(facts.lipschitz, facts.swing, facts.error, facts.error_max)
        parts = (*parts, (sums, _less_one_for_each(rows, n)))
    nothing = arb(0)
    return Tensor(shaped(network.add(base, identity(groups.size), values, nothing, nothing, parts)))


def _less_one_for_each(rows: int, n: int) -> Matrix:
    """Return the matrix that takes -1 times one number of each row to all of the row."""
    size = rows * n
    return Matrix(np.arange(size + 1), np.repeat(np.arange(rows, dtype=np.int32), n), np.full(size, -1.0), rows, arb(0))
