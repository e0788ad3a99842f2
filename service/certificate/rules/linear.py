"""Linear maps: their results, and the steps that joint bounds are made of. Notation as in `table`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from service.certificate.facts import Facts, LocalError
from service.certificate.kernels import identity_convolution
from service.certificate.rounding import add_up, div_up, mul_up, norm_up, sqrt_up
from service.certificate.rules.operands import Array
from service.certificate.rules.table import Context
from service.certificate.values import Affine, Convolution, LinearStep, ProductSum, View


def scaling_step(view: View, factor: float) -> LinearStep:
    """Return the multiplication of `view` by 1 or -1, which rounds nothing, plus any constant."""
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
    """Return the multiplication of each element by its own factor, known to a relative error of a few roundings.

    Args:
        view: the tensor that is multiplied.
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


def mean_norm(n: int) -> float:
    """Return a bound of `1 / sqrt(n)`, the norm of the mean of n elements."""
    # 1 / sqrt(n) rounded up: 1 over a lower bound of the root.
    return div_up(sqrt_up(float(n)), float(n)) if n > 1 else 1.0


@dataclass(frozen=True)
class LinearMap:
    """A linear map W of one tensor: sums of products with constant weights, in any order."""

    apply: Callable[[Array], Array]
    """The map, of a stack `B x *view.shape` to a stack of results."""
    norm: float
    """Bound of `||W||_2`."""
    spread: float
    """Bound of `|| |W| ||_2`."""
    row_norm: float
    """Bound of the Euclidean norm of the weights of one output."""
    terms: int
    """Products in one sum."""
    tight: bool = False
    """Whether `norm` is as good as the map taken alone allows."""
    convolution: Convolution | None = None
    """The map as a convolution, where it is one."""
    adjoint: Convolution | None = None
    """Its adjoint as a convolution, where it is one."""
    mean: bool = False
    """Whether it is the mean over the last axis of its input."""
    product: bool = False
    """Whether it is a matrix product, which a runtime may join with the addition that follows."""
    widest: int = 0
    """Elements of the largest array that `apply` makes for one image, beside the result."""

    def step(self, view: View) -> LinearStep:
        """Return the map of `view` as a linear step."""
        return LinearStep(
            operands=(view,),
            apply=lambda stacks: self.apply(stacks[0]),
            norm=self.norm,
            spread=self.spread,
            terms=self.terms,
            tight=self.tight,
            convolutions=None if self.convolution is None else (self.convolution,),
            adjoint=self.adjoint,
            mean=self.mean,
            product=self.product,
            widest=self.widest,
        )


def linear_result(
    context: Context,
    view: View,
    linear: LinearMap,
    bias: Array | None = None,
    *,
    others: Sequence[tuple[float, str]] = (),
    affine: Affine | None = None,
    products: ProductSum | None = None,
) -> View:
    """Return `y = W x + b`, sums of n products in any order.

    Lipschitz: `||W|| L`. Error: `||y^ - y|| <= ||W|| e + gamma_{n+1} (|| |W| || ||x^|| + ||b||)`, and for one component
    the same with the norm of its own row.

    Args:
        context: of this analysis.
        view: x.
        linear: W.
        bias: b; it broadcasts against one result. Default: 0.
        others: Lipschitz bounds of the result that were proved in another way, and their theorems.
        affine: the result as a linear form, where it is flat.
        products: the result as a sum of matrix products.
    """
    facts = context.domain.joint(view)
    added = np.zeros(()) if bias is None else bias
    center = np.asarray(linear.apply(view.center[None])[0] + added)
    bias_norm = norm_up(np.ascontiguousarray(np.broadcast_to(added, center.shape)))
    bias_peak = float(np.max(np.abs(added), initial=0.0))
    norm, spread, row_norm, terms = linear.norm, linear.spread, linear.row_norm, linear.terms
    context.no_overflow(add_up(mul_up(row_norm, facts.computed_norm), bias_peak))
    gamma, tiny = context.gamma(terms + 1), context.precision.smallest_normal
    rounding = LocalError.relative(
        gamma,
        norm=add_up(mul_up(spread, facts.computed_norm), bias_norm),
        largest=add_up(mul_up(row_norm, facts.computed_norm), bias_peak),
    )
    underflow = LocalError.of_each(mul_up(4.0 * (terms + 2), tiny, add_up(1.0, facts.largest, row_norm)), center.size)
    result = Facts(
        lipschitz=mul_up(norm, facts.lipschitz),
        error=mul_up(norm, facts.error),
        error_max=mul_up(row_norm, facts.error),
    ).plus(rounding, underflow)
    for other, theorem in others:
        result = replace(result, lipschitz=context.smaller(result.lipschitz, other, theorem))
    return context.source(center, result, affine=affine, step=linear.step(view), products=products)
