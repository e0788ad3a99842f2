"""Candidates of a search: 8-bit images, each classified by the path that serves predictions; the best are recorded.

Axes: N batch, L images that are measured together, C channels, H and W of the image as sent, K classes, D = C H W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from service.certificate import Radii
from service.inference.closest import LEVELS, rows_dot


@dataclass(frozen=True)
class Margins:
    """The margin `f_i - f_j` between an image and its target class."""

    falling_L: np.ndarray
    """i."""
    rising_L: np.ndarray
    """j."""
    margin_L: np.ndarray


@dataclass(frozen=True)
class Measured(Margins):
    """The measurement of one candidate for each of L images."""

    class_id_L: np.ndarray
    distance_L: np.ndarray
    better_L: np.ndarray
    """Whether the candidate is of the target class and nearer than every one before."""


class Candidates:
    """The best candidate of each image of a batch.

    It is the nearest one of the target class; without one, that with the least margin left among those that are certain
    of their class and not nearer than the radius.
    """

    def __init__(
        self,
        classify: Callable[[np.ndarray], tuple[np.ndarray, Radii]],
        image_NCHW: np.ndarray,
        class_id_N: np.ndarray,
        target_N: np.ndarray,
        radius_N: np.ndarray,
    ) -> None:
        """Start without candidates.

        Args:
            classify: logits and radii, by the path that serves predictions.
            image_NCHW: the images as sent, pixels in [0, 1].
            class_id_N: their predicted classes.
            target_N: target classes; -1 for any other class.
            radius_N: certified radii, L2.
        """
        n_images = len(image_NCHW)
        n_pixels = image_NCHW[0].size
        self.classify = classify
        self.image_NCHW = image_NCHW
        self.class_id_N = class_id_N
        self.target_N = target_N
        self.radius_N = radius_N
        self.found_ND = np.zeros((n_images, n_pixels), np.uint8)
        self.found_class_N = class_id_N.copy()
        self.found_distance_N = np.full(n_images, np.inf)
        """Distance of the nearest candidate of the target class; infinite without one."""
        self.other_ND = np.zeros((n_images, n_pixels), np.uint8)
        self.other_class_N = class_id_N.copy()
        self.other_margin_N = np.full(n_images, np.inf)
        """Least margin left among the other candidates; infinite without one."""

    def margins(self, index_L: np.ndarray, logits_LK: np.ndarray) -> Margins:
        """Return the margin left to the target class, and the pair of classes that it is between."""
        row_L = np.arange(len(index_L))
        class_L, target_L = self.class_id_N[index_L], self.target_N[index_L]
        free_L = target_L < 0
        rivals_LK = logits_LK.copy()
        rivals_LK[row_L, np.where(free_L, class_L, target_L)] = -np.inf
        rival_L = rivals_LK.argmax(axis=1)
        falling_L, rising_L = np.where(free_L, class_L, rival_L), np.where(free_L, rival_L, target_L)
        return Margins(falling_L, rising_L, logits_LK[row_L, falling_L] - logits_LK[row_L, rising_L])

    def measure(self, index_L: np.ndarray, level_LD: np.ndarray, start_LD: np.ndarray) -> Measured:
        """Classify one candidate for each of some images, in one batch, and record the best.

        Args:
            index_L: places of the images in the batch.
            level_LD: the candidates, whole numbers in 0..255.
            start_LD: the images as sent, in units of 1 / 255.
        """
        logits_LK, radii = self.classify(self.images(level_LD))
        margins = self.margins(index_L, logits_LK)
        difference_LD = level_LD - start_LD
        distance_L = np.sqrt(rows_dot(difference_LD, difference_LD)) / LEVELS
        reached_L = (radii.class_id_N == margins.rising_L) & (margins.rising_L != self.class_id_N[index_L])
        better_L = radii.certified_N & reached_L & (distance_L < self.found_distance_N[index_L])
        images = index_L[better_L]
        self.found_ND[images] = level_LD[better_L]
        self.found_class_N[images] = radii.class_id_N[better_L]
        self.found_distance_N[images] = distance_L[better_L]
        lower_L = (
            radii.certified_N
            & ~reached_L
            & (distance_L >= self.radius_N[index_L])
            & (margins.margin_L < self.other_margin_N[index_L])
        )
        if lower_L.any():
            self._record_other(index_L[lower_L], level_LD[lower_L], radii.class_id_N[lower_L])
            self.other_margin_N[index_L[lower_L]] = margins.margin_L[lower_L]
        return Measured(margins.falling_L, margins.rising_L, margins.margin_L, radii.class_id_N, distance_L, better_L)

    def settle(self, slope_ND: np.ndarray) -> None:
        """Find a candidate for images without any: far down the given slope, and at last the farthest image."""
        far_L = self._unanswered()
        if len(far_L) == 0:
            return
        start_LD = self._start(far_L)
        corner_LD = np.where(slope_ND[far_L] > 0, 0.0, LEVELS)
        for level_LD in (np.rint(0.5 * (start_LD + corner_LD)), corner_LD):
            self.measure(far_L, level_LD, start_LD)
        far_L = self._unanswered()
        if len(far_L) == 0:
            return
        start_LD = self._start(far_L)
        farthest_LD = np.where(start_LD < LEVELS / 2, LEVELS, 0.0)
        class_L = self.measure(far_L, farthest_LD, start_LD).class_id_L
        # The degenerate case: even this image is nearer than the radius, or uncertain of its class.
        rest_L = ~np.isfinite(self.found_distance_N[far_L]) & ~np.isfinite(self.other_margin_N[far_L])
        self._record_other(far_L[rest_L], farthest_LD[rest_L], class_L[rest_L])

    def images(self, level_LD: np.ndarray) -> np.ndarray:
        """Return images in [0, 1] from pixels in units of 1 / 255."""
        return (level_LD / LEVELS).reshape(-1, *self.image_NCHW.shape[1:])

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pixels 0..255 (N C H W) and class of the best candidates, and whether each is of the target class."""
        found_N = np.isfinite(self.found_distance_N)
        pixels_ND = np.where(found_N[:, None], self.found_ND, self.other_ND)
        class_id_N = np.where(found_N, self.found_class_N, self.other_class_N)
        return pixels_ND.reshape(self.image_NCHW.shape), class_id_N, found_N

    def _record_other(self, images: np.ndarray, level_LD: np.ndarray, class_id_L: np.ndarray) -> None:
        self.other_ND[images] = level_LD
        self.other_class_N[images] = class_id_L

    def _unanswered(self) -> np.ndarray:
        return np.flatnonzero(~np.isfinite(self.found_distance_N) & ~np.isfinite(self.other_margin_N))

    def _start(self, index_L: np.ndarray) -> np.ndarray:
        return self.image_NCHW[index_L].reshape(len(index_L), -1) * LEVELS
