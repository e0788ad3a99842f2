"""What the analysis knows of a tensor.

A `Source` is the result of one operator that computes. Operators that only move elements (Reshape, Transpose, Slice,
Split, Gather, Concat, Pad...) make a `View`: an array of positions in a source. So the Lipschitz bound of any
rearrangement is exact bookkeeping: that of the source times the square root of how often one element is used at most.

Shapes leave the batch axis out: a rule that would mix images is refused.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.certificate.norms import pairwise_distance_bounds
from service.certificate.rounding import add_up, mul_up, norm_up, sqrt_up


@dataclass(frozen=True)
class Affine:
    """`value = rows @ h + constant` for some `h` of Lipschitz bound `lipschitz` from the image."""

    rows: NDArray[np.float64]
    lipschitz: float

    def margin_bounds(self) -> NDArray[np.float64]:
        """`K_ij >= L ||w_i - w_j||`: the margin `f_i - f_j` is the linear form `w_i - w_j` of `h` (Cauchy-Schwarz)."""
        distances = pairwise_distance_bounds(self.rows)
        return np.where(distances > 0.0, np.nextafter(distances * self.lipschitz, np.inf), 0.0)


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


@dataclass(frozen=True, eq=False)
class View:
    """Elements of a source, rearranged: `value[p] = source[index[p]]`, or the constant 0 where the index is -1."""

    source: Source
    index: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.shape

    @property
    def center(self) -> NDArray[np.float64]:
        return np.where(self.index >= 0, self.source.center.ravel()[self.index], 0.0)

    def rearranged(self, index: NDArray[np.int64]) -> "View":
        """The same source, seen through other positions of any shape."""
        # np.ascontiguousarray would give an index without axes one.
        return View(self.source, np.array(index, dtype=np.int64, order="C"))


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that does not depend on the image."""

    array: NDArray[np.generic]
    depends_on_batch: bool = False
    """Integers among which the batch size stands, as `PROBE_BATCH`: of use as a shape only.

    Every other entry is the same for all batch sizes: such a constant is only ever picked from, never computed with.
    """


@dataclass(frozen=True, eq=False)
class Unknown:
    """The output of a refused node, or one without a Lipschitz constant (the indices of a sort)."""

    reason: str
    """Empty when the refusal is on record already."""


Value = View | Constant | Unknown


@dataclass(frozen=True)
class Facts:
    """Bounds of several views taken together as one vector."""

    lipschitz: float
    error: float
    norm: float
    """Bound of the L2 norm of the exact value."""
    largest: float
    """Bound of the largest component, of the exact and the computed value."""

    def scaled(self, factor: float) -> "Facts":
        """After a map that expands nothing by more than `factor`."""
        return Facts(*(mul_up(factor, bound) for bound in (self.lipschitz, self.error, self.norm, self.largest)))


@dataclass
class Domain:
    """The box [0, 1]^d of valid images."""

    size: int
    radius: float = field(init=False)
    """L2 distance from the centre of the box to its corners, rounded up."""

    def __post_init__(self) -> None:
        self.radius = mul_up(0.5, sqrt_up(float(self.size)))

    def joint(self, *views: View) -> Facts:
        """Bounds of the stacked vector of `views`.

        Views of one source count together: an element that is used `m` times contributes `m` times its square, so that
        disjoint parts of one tensor cost no more than the tensor itself. Different sources add in squares.
        """
        by_source: dict[int, list[View]] = {}
        for view in views:
            by_source.setdefault(id(view.source), []).append(view)
        groups = [facts for group in by_source.values() if (facts := self._of_one_source(group)) is not None]
        if not groups:
            return Facts(0.0, 0.0, 0.0, 0.0)
        if len(groups) == 1:
            return groups[0]
        return Facts(
            lipschitz=norm_up(np.array([facts.lipschitz for facts in groups])),
            error=norm_up(np.array([facts.error for facts in groups])),
            norm=norm_up(np.array([facts.norm for facts in groups])),
            largest=max(facts.largest for facts in groups),
        )

    def _of_one_source(self, group: list[View]) -> Facts | None:
        source = group[0].source
        used = np.concatenate([view.index.ravel() for view in group])
        used = used[used >= 0]
        if used.size == 0:
            return None
        repetition = sqrt_up(float(np.bincount(used).max()))
        swing = mul_up(source.lipschitz, self.radius)
        center = source.center.ravel()[used]
        return Facts(
            lipschitz=mul_up(repetition, source.lipschitz),
            error=mul_up(repetition, source.error),
            norm=add_up(norm_up(center), mul_up(repetition, add_up(source.error, swing))),
            # The computed value strays from the exact one by at most error_max, and so does the centre's.
            largest=add_up(float(np.max(np.abs(center))), mul_up(2.0, source.error_max), swing),
        )
