"""Tensors as the analysis knows them.

A `Source` is the result of one operator that computes. Operators that only move elements (Reshape, Transpose, Slice,
Split, Gather, Concat, Pad...) make a `View`: an array of positions in a source. So the Lipschitz bound of any
rearrangement is exact bookkeeping: that of the source times the square root of the most uses of one element.

Shapes leave the batch axis out: a rule that would mix images is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from service.certificate.facts import Facts
from service.certificate.limits import fits
from service.certificate.norms import pairwise_distance_bounds
from service.certificate.rounding import add_up, mul_up, norm_up, sqrt_up
from service.network.operators import Constant


@dataclass(frozen=True)
class Affine:
    """`value = rows @ h + constant` for some `h` of Lipschitz bound `lipschitz` from the image."""

    rows: NDArray[np.float64]
    lipschitz: float

    def margin_bounds(self) -> NDArray[np.float64]:
        """Return `K_ij >= L ||w_i - w_j||`: `f_i - f_j` is the linear form `w_i - w_j` of `h` (Cauchy-Schwarz)."""
        distances = pairwise_distance_bounds(self.rows)
        return np.where(distances > 0.0, np.nextafter(distances * self.lipschitz, np.inf), 0.0)


@dataclass(frozen=True, eq=False)
class Convolution:
    """`y[o, q] = sum over i, t of K[o, i, t] x[i, s q + t - p]` of an image `I x *n`, zero outside of it."""

    kernel: NDArray[np.float64]
    """`O x I/groups x *K`, dilations spelled out as zeros."""
    strides: tuple[int, ...]
    offsets: tuple[int, ...]
    """p: zeros before the image, along each axis."""
    groups: int


@dataclass(frozen=True, eq=False)
class LinearStep:
    """A source as a linear map of views, plus a constant: joint bounds are made of such steps."""

    operands: tuple["View", ...]
    apply: Callable[[Sequence[NDArray[np.float64]]], NDArray[np.float64]]
    """The map without the constant, of stacks `B x *operand.shape` to a stack `B x *shape`."""
    norm: float
    """Bound of its norm, from all operands stacked."""
    spread: float
    """Bound of its norm with absolute weights."""
    terms: int
    """Products in the sum that makes one element."""
    scalar: bool = False
    """Whether it is the multiplication by a number: a joint bound with the steps before it gains nothing."""
    tight: bool = False
    """Whether `norm` is as good as the map taken alone allows."""
    convolutions: tuple[Convolution, ...] | None = None
    """The map as a convolution of each operand, summed, where it is one."""
    adjoint: Convolution | None = None
    """The adjoint of the map of a single operand as a convolution, where it is one."""
    mean: bool = False
    """Whether it is the mean over the last axis of its operand."""
    negates: bool = False
    product: bool = False
    """Whether it is a matrix product: runtimes start its sums from the addend of the addition that follows."""
    widest: int = 0
    """Elements of the largest array that `apply` makes for one image, beside operands and result."""
    joint: bool = False
    """Whether the bound of the source is the joint one of the steps since the last nonlinear tensor already."""


@dataclass(frozen=True, eq=False)
class ProductSum:
    """A source that the graph computes as a sum of matrix products and constants: `x_1 W_1 + ... + x_k W_k + c`."""

    operands: tuple["View", ...]
    """x_b, `*rest x n_b`; the axes before the last are those of the source."""
    weights: tuple[NDArray[np.float64], ...]
    """W_b, `n_b x m`."""
    added: NDArray[np.float64]
    """Bound of the sum of the absolute constants; broadcasts against the source."""
    roundings: int
    """The most roundings that one product or constant goes through."""
    operations: int
    """Operations that make one element."""


@dataclass(frozen=True, eq=False)
class Slopes:
    """A source as an elementwise function of a view."""

    of: "View"
    low: float
    high: float
    """Every difference quotient lies in [low, high]."""


@dataclass(frozen=True, eq=False)
class Source:
    """The computed result of one operator, of shape `center.shape` per image.

    All bounds hold for every image of the domain, the box [0, 1]^d.
    """

    center: NDArray[np.float64]
    """Its value at the centre of the box, off by at most `error` in L2."""
    lipschitz: float
    """L2 Lipschitz bound of the exact map from the image to this tensor."""
    error: float
    """Bound of the L2 norm of computed minus exact."""
    error_max: float
    """Bound of the largest component of computed minus exact."""
    affine: Affine | None = None
    step: LinearStep | None = None
    """The source as a linear map of tensors before it, where it is known to be one."""
    slopes: Slopes | None = None
    """The source as an elementwise function of a tensor before it, where it is one."""
    part: "Part | None" = None
    """The tensor of which the source is the positive or the negative part, where it is one."""
    products: ProductSum | None = None
    """The source as the graph sums it of matrix products, where it is such a sum."""


@dataclass(frozen=True, eq=False)
class View:
    """Elements of a source, rearranged: `value[p] = source[index[p]]`, or the constant 0 where the index is -1."""

    source: Source
    index: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.shape

    @property
    def repetition(self) -> int:
        """The most uses of one element of the source."""
        used = self.index[self.index >= 0]
        return int(np.bincount(used).max()) if used.size else 0

    @property
    def whole(self) -> bool:
        """Whether it is the source as it stands."""
        return self.shape == self.source.center.shape and bool((self.index.ravel() == np.arange(self.index.size)).all())

    @property
    def center(self) -> NDArray[np.float64]:
        return np.where(self.index >= 0, self.source.center.ravel()[self.index], 0.0)

    def rearranged(self, index: NDArray[np.int64]) -> "View":
        """Return the same source, seen through other positions of any shape."""
        # np.ascontiguousarray would give an index without axes one.
        return View(self.source, np.array(index, dtype=np.int64, order="C"))


def seen_whole(source: Source) -> View:
    """Return a source as it stands."""
    return View(source, np.arange(source.center.size).reshape(source.center.shape))


def affine_of(view: View) -> Affine | None:
    """Return a flat view as linear forms; null where they are not known, or too large."""
    inner = view.source.affine
    if (
        inner is None
        or len(view.shape) != 1
        or (view.index < 0).any()
        or not fits(view.index.size, inner.rows.shape[1])
    ):
        return None
    return replace(inner, rows=inner.rows[view.index])


def stand_in(shape: tuple[int, ...]) -> View:
    """Return a tensor of which only the positions count."""
    return seen_whole(Source(np.zeros(shape), 0.0, 0.0, 0.0))


@dataclass(frozen=True, eq=False)
class SquareTerm:
    """`sum over k of weights[p, k] x[positions[p, k]]^2` of the elements x of a view."""

    view: View
    positions: NDArray[np.int64]
    """Into the flattened view."""
    weights: NDArray[np.float64]
    """Not negative; each known to some roundings."""


@dataclass(frozen=True, eq=False)
class Squares:
    """Sums of weighted squares, which have no Lipschitz constant until their root is taken."""

    terms: tuple[SquareTerm, ...]
    constant: NDArray[np.float64]
    """Added to each sum; not negative."""
    largest: float
    """Bound of the largest element."""
    roundings: int
    """Relative roundings that an element has been through, beside its additions."""
    underflow: float
    """Absolute error that underflow may have added to an element."""
    sign_of: "Squares | None" = None
    """Set if the value is not the sum but its sign, 1 or 0."""


@dataclass(frozen=True, eq=False)
class Unknown:
    """The result of a refused operator, or one without a Lipschitz constant (the indices of a sort)."""

    reason: str
    """Empty where the refusal is on record already."""


Value = View | Squares | Constant | Unknown


def elements_of(value: Value) -> int:
    """Return how many numbers the analysis holds of a value."""
    match value:
        case View():
            return value.index.size
        case Squares():
            return sum(term.positions.size for term in value.terms)
        case Constant():
            return value.array.size
        case Unknown():
            return 0


@dataclass(frozen=True)
class Part:
    """The positive part `max(x, 0)` of a tensor x, or its negative part `max(-x, 0)`.

    Together they are 1-Lipschitz in x: each element moves in one of them, or from one to the other through 0.
    """

    of: "Identity"
    negative: bool


Identity = tuple[Source, tuple[int, ...], bytes]
"""Source, shape and positions of a view: equal for equal tensors. The source itself, so that it stays alive."""


def identity_of(view: View) -> Identity:
    """Return the identity of the tensor that a view holds."""
    return view.source, view.shape, view.index.tobytes()


@dataclass
class Domain:
    """The box [0, 1]^d of valid images."""

    size: int
    radius: float = field(init=False)
    """L2 distance from the centre of the box to its corners, rounded up."""
    _known: dict[View, Facts] = field(init=False, default_factory=dict[View, Facts])
    """Of single views: each is asked about by the node that makes it and by those that read it."""

    def __post_init__(self) -> None:
        self.radius = mul_up(0.5, sqrt_up(float(self.size)))

    def joint(self, *views: View) -> Facts:
        """Return the bounds of the stacked vector of `views`.

        Views of one source count together: an element that is used `m` times contributes `m` times its square, so that
        disjoint parts of one tensor cost no more than the tensor itself. Different sources add in squares.
        """
        if len(views) == 1:
            if views[0] not in self._known:
                self._known[views[0]] = self._stacked(views)
            return self._known[views[0]]
        return self._stacked(views)

    def _stacked(self, views: Sequence[View]) -> Facts:
        together: dict[object, list[View]] = {}
        for view in views:
            part = view.source.part
            together.setdefault(view.source if part is None else part.of, []).append(view)
        groups = [facts for group in together.values() if (facts := self._together(group)) is not None]
        facts = Facts.stacked(groups) if groups else Facts(0.0, 0.0, norm=0.0, largest=0.0)
        return replace(facts, error_max=max(view.source.error_max for view in views))

    def _together(self, group: list[View]) -> Facts | None:
        """Bounds of views of one source, or of the positive and negative part of one tensor (elements count apart).

        Null where the views hold the constant 0 alone.
        """
        used: list[NDArray[np.int64]] = []
        centers: list[NDArray[np.float64]] = []
        for view in group:
            part = view.source.part
            index = view.index[view.index >= 0]
            centers.append(view.source.center.ravel()[index])
            used.append(index + (view.source.center.size if part is not None and part.negative else 0))
        elements = np.concatenate(used)
        if elements.size == 0:
            return None
        sources = {view.source for view in group}
        repetition = sqrt_up(float(np.bincount(elements).max()))
        lipschitz = max(source.lipschitz for source in sources)
        error = max(source.error for source in sources)
        error_max = max(source.error_max for source in sources)
        swing = mul_up(lipschitz, self.radius)
        center = np.concatenate(centers)
        return Facts(
            lipschitz=mul_up(repetition, lipschitz),
            error=mul_up(repetition, error),
            error_max=error_max,
            norm=add_up(norm_up(center), mul_up(repetition, add_up(error, swing))),
            # The computed value strays from the exact one by at most error_max, and so does the centre's.
            largest=add_up(float(np.max(np.abs(center))), mul_up(2.0, error_max), swing),
        )
