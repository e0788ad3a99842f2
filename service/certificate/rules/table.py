"""The table of operators with a proved rule, and the context that the rules of one analysis share.

Every rule states its theorem. An operator, attribute, mode or operand without a proved rule is refused. Throughout,
`x` is the exact input of the operator, `x^` the computed one with `||x^ - x||_2 <= e`, `L` the Lipschitz bound of the
map from the image to `x`, `u` the unit roundoff of the graph's format, `gamma_n = n u / (1 - n u)`. A sum of products
of n terms, biases included, is off by at most `gamma_n sum |w| |x^|` in any order, with or without fused multiply-add
(Higham 2002, section 3.1). Underflow, flush-to-zero included, adds at most the smallest normal number for each
operation; overflow is excluded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from service.certificate.facts import Facts, LocalError
from service.certificate.formulas import Formula
from service.certificate.joint import Joint
from service.certificate.rounding import Precision, gamma_up
from service.certificate.rules.operands import Array, Operands
from service.certificate.values import (
    Affine,
    Domain,
    Identity,
    LinearStep,
    Part,
    ProductSum,
    Slopes,
    Source,
    Value,
    View,
    seen_whole,
)
from service.network.operators import Operator, Refusal

_JOINT = "Linear steps since the last nonlinear tensors, multiplied out: sum ||M_h|| L_h."


@dataclass(frozen=True)
class Composition:
    """A tensor as an elementwise function of another one, the same function for each element."""

    base: View
    """The other tensor, of the same shape."""
    formula: Formula
    local: LocalError
    """Bound of the difference between the computed tensor and the exact function of the computed base."""


@dataclass
class Context:
    """Shared by the rules during the analysis of one graph."""

    domain: Domain
    precision: Precision
    work: float
    """Multiply-adds that joint bounds may take."""
    sorted_pairs: dict[frozenset[Identity], Source] = field(default_factory=dict[frozenset[Identity], Source])
    compositions: dict[Source, "Composition"] = field(default_factory=dict[Source, "Composition"])
    """Sources that are elementwise functions of a tensor, the same function for each element."""
    joint: Joint = field(init=False)
    theorem: str | None = None
    """Theorem that gave the bound of the current node, where it is not the first line of its rule."""

    def __post_init__(self) -> None:
        self.joint = Joint(self.domain, self.work)

    def smaller(self, bound: float, other: float, theorem: str) -> float:
        """Return the smaller of two proved Lipschitz bounds.

        Args:
            bound: by the theorem of the rule.
            other: by another theorem.
            theorem: that the report quotes where `other` is smaller.
        """
        if other < bound:
            self.theorem = theorem
            return other
        return bound

    def gamma(self, n: int) -> float:
        """Return `gamma_n` in the graph's format.

        Raises:
            Refusal: n is so large that the bound says nothing.
        """
        try:
            return gamma_up(n, self.precision.unit_roundoff)
        except ValueError as error:
            raise Refusal(str(error)) from error

    def no_overflow(self, bound: float) -> None:
        """Refuse a node whose intermediate results, of size `bound`, come near overflow.

        Raises:
            Refusal: `bound` is more than a quarter of the largest number.
        """
        if not bound < self.precision.largest / 4.0:
            raise Refusal(f"overflow cannot be excluded: intermediate values may reach {bound:.3g}")

    def one_rounding(self, facts: Facts, size: int) -> LocalError:
        """Return the error of one rounding of each of `size` elements that `facts` bounds.

        Counted twice: the centre, from which `facts` may come, is rounded as well.
        """
        unit, tiny = 2.0 * self.precision.unit_roundoff, self.precision.smallest_normal
        return LocalError.relative(unit, facts.computed_norm, facts.largest) + LocalError.of_each(tiny, size)

    def source(
        self,
        computed: Array | np.float64,
        facts: Facts,
        *,
        affine: Affine | None = None,
        step: LinearStep | None = None,
        slopes: Slopes | None = None,
        part: Part | None = None,
        products: ProductSum | None = None,
    ) -> View:
        """Return a new source, seen whole.

        A linear step is bounded together with those before it, too: the smaller bound counts.

        Args:
            computed: its value at the centre of the box.
            facts: its Lipschitz and error bounds; those of its values follow from the centre.
            affine: see `Source`.
            step: see `Source`.
            slopes: see `Source`.
            part: see `Source`.
            products: see `Source`.

        Raises:
            Refusal: a bound is not finite.
        """
        # Arithmetic on arrays without axes gives numpy scalars.
        center = np.asarray(computed, dtype=np.float64)
        if not (np.isfinite(center).all() and math.isfinite(facts.lipschitz) and math.isfinite(facts.error)):
            raise Refusal("its bounds are not finite")
        lipschitz = facts.lipschitz
        if step is not None:
            lipschitz = self.smaller(lipschitz, self.joint.lipschitz(step, center.shape), _JOINT)
        error_max = min(facts.error, facts.error_max)
        return seen_whole(Source(center, lipschitz, facts.error, error_max, affine, step, slopes, part, products))


Rule = Callable[[Context, Operator, Operands], list[Value]]
"""A rule of an operator: the values of a node's outputs.

Args:
    context: of this analysis.
    node: the node; its attributes are those that the rule was registered with.
    inputs: its operands; all of them are known, and one at least is not constant.

Raises:
    Refusal: the node has no proved bound; the message says why.
"""


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
