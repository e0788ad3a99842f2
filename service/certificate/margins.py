"""Bounds of the margins between thousands of classes: `K_ij` of the rows that an answer asks for.

A table of all pairs of 5,000 classes has 25 million numbers, of which a certificate needs one row. Here the linear
forms stay as they are, and a row is made of their Gram products.

Axes: N answers, K classes, M elements of a tensor before the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from service.certificate.norms import row_norms_up
from service.certificate.rounding import SMALLEST_NORMAL, gamma_up, mul_up
from service.shapes import Float64, Int64

_BLOCK = 64
"""Rows that are made at once where all are asked for."""


@dataclass(frozen=True, eq=False)
class Head:
    """Linear forms of a tensor h, one for each logit."""

    rows_KM: NDArray[np.float64]
    lipschitz: float
    """L2 Lipschitz bound of h, from the image."""
    deviation: float = 0.0
    """Bound of the spectral norm of the exact forms minus these."""
    exponent: int = 0
    """The forms are `2^exponent` times the rows."""

    def scaled(self) -> Head:
        """Return the same forms by rows with entries of at most 1: no square overflows."""
        exponent = math.frexp(float(np.max(np.abs(self.rows_KM), initial=0.0)))[1]
        if exponent == 0:
            return self
        return replace(self, rows_KM=np.ldexp(self.rows_KM, -exponent), exponent=self.exponent + exponent)

    def margins(self, class_id_N: Int64[np.ndarray, " N"]) -> Float64[np.ndarray, "N K"]:
        """Return `(||w_i - w_j|| + 2 deviation) L`, rounded up, of some classes i and all j.

        `||w_i - w_j||^2 = ||w_i||^2 + ||w_j||^2 - 2 w_i . w_j`. The product is off by at most
        `gamma_M ||w_i|| ||w_j||` in any order of summation, and the few operations that follow by a few units of
        `(||w_i|| + ||w_j||)^2`, which is added.
        """
        norm_K, m = self._norm_K, self.rows_KM.shape[1]
        products_NK = self.rows_KM[class_id_N] @ self.rows_KM.T
        norm_N = norm_K[class_id_N][:, None]
        size_NK = np.square(norm_N + norm_K)
        slack_NK = 2.0 * gamma_up(m + 32) * size_NK + 8.0 * (m + 1) * SMALLEST_NORMAL
        square_NK = np.maximum(np.square(norm_N) + np.square(norm_K) - 2.0 * products_NK, 0.0) + slack_NK
        with np.errstate(over="ignore", under="ignore"):
            distance_NK = np.nextafter(np.ldexp(np.sqrt(square_NK) * (1.0 + 2.0**-48), self.exponent), np.inf)
            wide_NK = np.nextafter(distance_NK + 2.0 * self.deviation, np.inf)
            return np.nextafter(wide_NK * self.lipschitz, np.inf)

    @cached_property
    def _norm_K(self) -> NDArray[np.float64]:
        """Bounds of the norms of the rows."""
        return row_norms_up(self.rows_KM)


@dataclass(frozen=True, eq=False)
class MarginRows:
    """The table `K_ij` of many classes by its rows: `bounds[class_id_N]` is `N x K`."""

    n_classes: int
    largest: float
    """Bound of all pairs."""
    sums: tuple[tuple[Head, ...], ...]
    """Each a way to write the logits as a sum of linear forms; the smallest bound counts."""
    factor: float = field(default=1.0)
    """Norm of a map before the image."""

    @property
    def shape(self) -> tuple[int, int]:
        """K, K."""
        return self.n_classes, self.n_classes

    def __len__(self) -> int:
        return self.n_classes

    def __getitem__(self, class_id_N: Int64[np.ndarray, " N"]) -> Float64[np.ndarray, "N K"]:
        """Return the rows of some classes; zero for the class itself."""
        bounds_NK = np.full((len(class_id_N), self.n_classes), self.largest)
        for heads in self.sums:
            total_NK = np.zeros_like(bounds_NK)
            for head in heads:
                total_NK = np.nextafter(total_NK + head.margins(class_id_N), np.inf)
            # Nothing is said by 0 times infinity.
            np.fmin(bounds_NK, total_NK, out=bounds_NK)
        if self.factor != 1.0:
            bounds_NK = np.nextafter(bounds_NK * self.factor, np.inf)
        bounds_NK[np.arange(len(class_id_N)), class_id_N] = 0.0
        return bounds_NK

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[np.float64]:
        """Return the whole table."""
        del dtype, copy
        return np.concatenate([self[block] for block in self._blocks()])

    def tolist(self) -> list[list[float]]:
        """Return the whole table as lists."""
        return np.asarray(self).tolist()

    def max(self) -> float:
        """Return the largest bound."""
        return max(float(self[block].max()) for block in self._blocks())

    def behind(self, norm: float) -> MarginRows:
        """Return the bounds from the image before a map of this norm."""
        return replace(self, factor=mul_up(self.factor, norm))

    def _blocks(self) -> list[NDArray[np.int64]]:
        return np.array_split(np.arange(self.n_classes), -(-self.n_classes // _BLOCK))


Margins = Float64[np.ndarray, "K K"] | MarginRows
"""`K_ij` of all pairs of classes; `margins[class_id_N]` is `N x K` of either kind."""


def margins_behind(margins: Margins, norm: float) -> Margins:
    """Return `K_ij` from the image before a map.

    Args:
        margins: from the image behind it.
        norm: L2 Lipschitz bound of the map.
    """
    if isinstance(margins, MarginRows):
        return margins.behind(norm)
    return np.where(margins > 0.0, np.nextafter(margins * norm, np.inf), 0.0)


def are_bounds(margins: Margins) -> bool:
    """Return whether all bounds are finite and not negative."""
    if isinstance(margins, MarginRows):
        return math.isfinite(margins.largest) and margins.largest >= 0.0 and math.isfinite(margins.factor)
    return bool(np.isfinite(margins).all() and (margins >= 0).all())
