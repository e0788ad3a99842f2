"""Bounds of a tensor and how they compose: the algebra in which a rule states its theorem.

`x` is the exact tensor, `x^` the computed one. Every result is rounded outwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.certificate.rounding import add_up, mul_up, norm_up, sqrt_up


@dataclass(frozen=True)
class LocalError:
    """Error that one operator commits, beside the errors of its operands (the local error of numerical analysis)."""

    l2: float
    """Bound of its L2 norm."""
    largest: float = math.inf
    """Bound of its largest component; infinity: `l2` is the best known bound."""

    @classmethod
    def of_each(cls, bound: float, size: int) -> "LocalError":
        """Return the error of a tensor of `size` elements, each off by at most `bound`."""
        return cls(mul_up(bound, sqrt_up(float(size))), bound)

    @classmethod
    def relative(cls, factor: float, norm: float, largest: float) -> "LocalError":
        """Return the error of a tensor that is off by at most `factor` times its size.

        Args:
            factor: relative error, e.g. `gamma_n`.
            norm: bound of the L2 norm of the tensor.
            largest: bound of its largest component.
        """
        return cls(mul_up(factor, norm), mul_up(factor, largest))

    def __add__(self, other: "LocalError") -> "LocalError":
        return LocalError(add_up(self.l2, other.l2), add_up(self.largest, other.largest))

    def scaled(self, factor: float) -> "LocalError":
        """Return the error times a non-negative factor."""
        return LocalError(mul_up(factor, self.l2), mul_up(factor, self.largest))


@dataclass(frozen=True)
class Facts:
    """Bounds of one tensor, or of several stacked as one vector, for every image of the domain."""

    lipschitz: float
    """L2 Lipschitz bound of the exact map from the image to the tensor."""
    error: float
    """Bound of `||x^ - x||_2`."""
    error_max: float = math.inf
    """Bound of the largest component of `x^ - x`; infinity: `error` is the best known bound."""
    norm: float = math.inf
    """Bound of `||x||_2`."""
    largest: float = math.inf
    """Bound of the largest component of `x` and of `x^`."""

    @property
    def computed_norm(self) -> float:
        """Bound of `||x^||_2`."""
        return add_up(self.norm, self.error)

    def scaled(self, factor: float) -> "Facts":
        """Return the bounds of `D x`, D a diagonal matrix (or any map with `f(0) = 0`) of norms at most `factor`."""
        return Facts(
            lipschitz=mul_up(factor, self.lipschitz),
            error=mul_up(factor, self.error),
            error_max=mul_up(factor, self.error_max),
            norm=mul_up(factor, self.norm),
            largest=mul_up(factor, self.largest),
        )

    def mapped(self, slope: float, slope_max: float) -> "Facts":
        """Return the bounds of `f(x)`; those of its values are left open, since `f(0)` may be anything.

        Args:
            slope: Lipschitz constant of `f` in the L2 norm.
            slope_max: Lipschitz constant of `f` in the maximum norm.
        """
        return Facts(
            lipschitz=mul_up(slope, self.lipschitz),
            error=mul_up(slope, self.error),
            error_max=mul_up(slope_max, self.error_max),
        )

    def __add__(self, other: "Facts") -> "Facts":
        """Return the bounds of `x + y` and of `x - y` (triangle inequality)."""
        return Facts(
            lipschitz=add_up(self.lipschitz, other.lipschitz),
            error=add_up(self.error, other.error),
            error_max=add_up(self.error_max, other.error_max),
            norm=add_up(self.norm, other.norm),
            largest=add_up(self.largest, other.largest),
        )

    def plus(self, *errors: LocalError) -> "Facts":
        """Return the bounds of the same exact tensor, computed with further local errors."""
        return Facts(
            lipschitz=self.lipschitz,
            error=add_up(self.error, *(error.l2 for error in errors)),
            error_max=add_up(self.error_max, *(error.largest for error in errors)),
            norm=self.norm,
            largest=add_up(self.largest, *(error.largest for error in errors)),
        )

    @staticmethod
    def stacked(parts: Sequence["Facts"]) -> "Facts":
        """Return the bounds of the vector of all `parts` (Pythagoras)."""
        if len(parts) == 1:
            return parts[0]
        return Facts(
            lipschitz=norm_up(np.array([part.lipschitz for part in parts])),
            error=norm_up(np.array([part.error for part in parts])),
            error_max=max(part.error_max for part in parts),
            norm=norm_up(np.array([part.norm for part in parts])),
            largest=max(part.largest for part in parts),
        )
