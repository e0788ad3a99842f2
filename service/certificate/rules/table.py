"""What the rules share: the table of operators, the context of one analysis, and the reading of operands."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from service.certificate.graph import Node
from service.certificate.joint import Joint
from service.certificate.kernels import identity_convolution
from service.certificate.rounding import Precision, add_up, gamma_up, mul_up, norm_up, sqrt_up
from service.certificate.rules.operands import Array, Operands, Refusal
from service.certificate.values import (
    Affine,
    Convolution,
    Domain,
    Facts,
    Identity,
    LinearStep,
    Part,
    Slopes,
    Source,
    Value,
    View,
    seen_whole,
)

_JOINT = "Linear steps since the last nonlinear tensors, multiplied out: sum ||M_h|| L_h."


@dataclass
class Context:
    """What the rules share during the analysis of one graph."""

    domain: Domain
    precision: Precision
    batch: int
    """The batch size that shapes are computed with."""
    sorted_pairs: dict[frozenset[Identity], Source] = field(default_factory=dict[frozenset[Identity], Source])
    joint: Joint = field(init=False)
    theorem: str | None = None
    """What gave the bound of the node that is looked at, where that is another theorem than its rule's first line."""

    def __post_init__(self) -> None:
        self.joint = Joint(self.domain)

    def smaller(self, bound: float, other: float, theorem: str) -> float:
        """The smaller of two proved bounds; where that is `other`, the report quotes `theorem`."""
        if other < bound:
            self.theorem = theorem
            return other
        return bound

    def gamma(self, n: int) -> float:
        try:
            return gamma_up(n, self.precision.unit_roundoff)
        except ValueError as error:
            raise Refusal(str(error)) from error

    def no_overflow(self, bound: float) -> None:
        """Raises Refusal unless every intermediate result of size `bound` stays far below overflow."""
        if not bound < self.precision.largest / 4.0:
            raise Refusal(f"overflow cannot be excluded: intermediate values may reach {bound:.3g}")

    def source(
        self,
        computed: Array | np.float64,
        lipschitz: float,
        error: float,
        error_max: float | None = None,
        affine: Affine | None = None,
        step: LinearStep | None = None,
        slopes: Slopes | None = None,
        part: Part | None = None,
    ) -> View:
        """A new source with the value `computed` at the centre of the box, seen whole.

        A linear step is bounded together with those before it, too: the smaller bound counts.
        """
        # Arithmetic on arrays without axes gives numpy scalars.
        center = np.asarray(computed, dtype=np.float64)
        if not (np.isfinite(center).all() and math.isfinite(lipschitz) and math.isfinite(error)):
            raise Refusal("its bounds are not finite")
        if step is not None:
            lipschitz = self.smaller(lipschitz, self.joint.lipschitz(step, center.shape), _JOINT)
        largest_error = min(error, error_max if error_max is not None else error)
        return seen_whole(Source(center, lipschitz, error, largest_error, affine, step, slopes, part))


Rule = Callable[[Context, Node, Operands], list[Value]]


@dataclass(frozen=True)
class RuleEntry:
    """A rule and the attributes that it reads; any other attribute is refused."""

    apply: Rule
    attributes: frozenset[str]
    theorem: str


RULES: dict[str, RuleEntry] = {}


def rule(*operators: str, attributes: Sequence[str] = ()) -> Callable[[Rule], Rule]:
    """Register a rule; the first line of its docstring is the theorem that reports quote."""

    def register(function: Rule) -> Rule:
        theorem = (function.__doc__ or "").strip().splitlines()[0]
        for operator in operators:
            RULES[operator] = RuleEntry(function, frozenset(attributes), theorem)
        return function

    return register


def rounding_of(context: Context, facts: Facts, view_size: int) -> tuple[float, float]:
    """Error, in L2 and of a component, that one rounding per element adds to values bounded by `facts`.

    Counted twice: the centre, from which `facts` may come, is rounded as well.
    """
    unit, tiny = 2.0 * context.precision.unit_roundoff, context.precision.smallest_normal
    in_l2 = add_up(mul_up(unit, add_up(facts.norm, facts.error)), mul_up(sqrt_up(float(view_size)), tiny))
    return in_l2, add_up(mul_up(unit, facts.largest), tiny)


def joined_rounding(context: Context, view: View, norm: float, largest: float) -> tuple[float, float]:
    """Error, in L2 and of a component, of an addition that a runtime may join with `view`, beside the addition's own.

    ONNX Runtime makes one Gemm of a matrix product and the addition that follows. Its sums of n products may then
    start from the addend, which so takes part in each of their roundings: `gamma_{n+1} ||b||`.

    Args:
        context: of this analysis.
        view: what is added to.
        norm: bound of the L2 norm of the computed addend.
        largest: bound of its largest component.
    """
    step = view.source.step
    if step is None or not step.product:
        return 0.0, 0.0
    gamma = context.gamma(step.terms + 1)
    return mul_up(gamma, norm), mul_up(gamma, largest)


def scaling_step(view: View, factor: float) -> LinearStep:
    """The multiplication by a number that rounds nothing (1 or -1), and whatever is added."""
    size = abs(factor)
    convolution = identity_convolution(view.shape, factor) if len(view.shape) in (2, 3) else None
    return LinearStep(
        operands=(view,),
        apply=lambda stacks: factor * stacks[0],
        norm=size,
        spread=size,
        terms=1,
        scalar=True,
        tight=True,
        convolutions=None if convolution is None else (convolution,),
        adjoint=convolution,
    )


def diagonal_step(view: View, factors: Array, norm: float) -> LinearStep:
    """The multiplication of each element by its own factor, known to a relative error of a few roundings.

    Args:
        view: what is multiplied.
        factors: of the shape of `view`.
        norm: bound of the largest exact factor.
    """
    per_channel = factors.reshape((*factors.shape[:1], -1))
    convolution = None
    if len(view.shape) in (2, 3) and np.ptp(per_channel, axis=1).max(initial=0.0) == 0.0:
        identity = identity_convolution(view.shape)
        convolution = replace(identity, kernel=per_channel[:, :1].reshape(identity.kernel.shape))
    return LinearStep(
        operands=(view,),
        apply=lambda stacks: factors * stacks[0],
        norm=norm,
        spread=norm,
        # The quotients and roots that make a factor count as roundings of a longer sum.
        terms=8,
        scalar=bool(np.ptp(factors) == 0.0),
        tight=True,
        convolutions=None if convolution is None else (convolution,),
        adjoint=convolution,
    )


def linear_result(
    context: Context,
    view: View,
    apply: Callable[[Array], Array],
    bias: Array | None,
    *,
    norm: float,
    spread: float,
    row_norm: float,
    terms: int,
    tight: bool = False,
    convolution: Convolution | None = None,
    adjoint: Convolution | None = None,
    mean: bool = False,
    product: bool = False,
    others: Sequence[tuple[float, str]] = (),
    affine: Affine | None = None,
) -> View:
    """The result of a linear map and a bias: sums of at most `terms` products, in any order.

    Lipschitz: `norm L`. Rounding: `||y^ - y|| <= norm e + gamma_{terms+1} (spread ||x^|| + ||b||)`, and for one
    component with the norm of its own row.

    Args:
        view: the input of the map.
        apply: the map, bias left out, of a stack `B x *view.shape` to a stack of results.
        bias: broadcasts against one result.
        norm: bound of the norm of the map.
        spread: bound of the norm of the map with absolute weights.
        row_norm: bound of the Euclidean norm of the weights of one output.
        terms: products in one sum.
        tight: whether `norm` is as good as the map taken alone allows.
        convolution: the map as a convolution, where it is one.
        adjoint: its adjoint as a convolution, where it is one.
        mean: whether it is the mean over the last axis of `view`.
        product: whether it is a matrix product, which a runtime may join with an addition that follows.
        others: Lipschitz bounds of the result that were proved in another way, and their theorems.
        affine: what is known of the result as a function of the input.
    """
    facts = context.domain.joint(view)
    added = np.zeros(()) if bias is None else bias
    center = np.asarray(apply(view.center[None])[0] + added)
    bias_norm = norm_up(np.ascontiguousarray(np.broadcast_to(added, center.shape)))
    bias_peak = float(np.max(np.abs(added), initial=0.0))
    computed_norm = add_up(facts.norm, facts.error)
    context.no_overflow(add_up(mul_up(row_norm, computed_norm), bias_peak))
    gamma = context.gamma(terms + 1)
    underflow = mul_up(4.0 * (terms + 2), context.precision.smallest_normal, add_up(1.0, facts.largest, row_norm))
    error = add_up(
        mul_up(norm, facts.error),
        mul_up(gamma, add_up(mul_up(spread, computed_norm), bias_norm)),
        mul_up(underflow, sqrt_up(float(center.size))),
    )
    error_max = add_up(
        mul_up(row_norm, facts.error),
        mul_up(gamma, add_up(mul_up(row_norm, computed_norm), bias_peak)),
        underflow,
    )
    step = LinearStep(
        operands=(view,),
        apply=lambda stacks: apply(stacks[0]),
        norm=norm,
        spread=spread,
        terms=terms,
        tight=tight,
        convolutions=None if convolution is None else (convolution,),
        adjoint=adjoint,
        mean=mean,
        product=product,
    )
    lipschitz = mul_up(norm, facts.lipschitz)
    for other, theorem in others:
        lipschitz = context.smaller(lipschitz, other, theorem)
    return context.source(center, lipschitz, error, error_max, affine, step)
