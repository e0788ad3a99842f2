"""Counterfactuals: the nearest image found that gets another class, as the 8-bit image that the client
receives.

Theory. A network trained with the hKR loss approaches, as its loss falls, the Kantorovich potential between
the classes, and its gradient then points along the optimal transport plan (Serrurier et al. 2021; Béthune et
al. 2022). Descending the margin `m = f_i - f_j` along its gradient therefore moves an image towards the
images of class j.

One step. At iterate `x_k` with margin `m_k` and gradient `g`, the next iterate is the point of the box
closest to the *first* image `x_0` where the linearised margin is negative enough:

    minimise ||x - x_0||  subject to  m_k + <g, x - x_k> <= -s,  0 <= x <= 1

whose solution is `x_0 + clip(-lambda g, -x_0, 1 - x_0)` with one scalar lambda. With no box and `x_k = x_0`
that is the Newton-like step `x - (1 + s') m g / ||g||^2` of the design; the box form loses nothing to
clipping. The image that is sent is 8-bit, and on that grid the same argument gives `round(clip(x_0 - lambda
g))`: rounding belongs to the step, so that it cannot undo it. A piecewise-linear network needs a few steps.

An answer is what it was measured to be: every candidate is classified by the path that serves predictions,
and counts as reached only if its class is certified (margin above `4 logit_error`), because then it is the
same in any batch.

Axes: N batch, C channels, H and W of the image that was sent, K classes, D = C H W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from service.certificate import Radii

LEVELS = 255.0

# Measured on MNIST: median 2 steps; the last ones are for targets that are far away.
_MAX_STEPS = 16
# From this step on the descent goes on from the iterate and not from the first image: slower, but it cannot
# cycle.
_STEPS_FROM_FIRST_IMAGE = 8
# Once another class is found, go on only while a step shortens the distance by this share.
_WORTHWHILE = 0.01
# Aim this share of the first margin beyond the boundary, and this factor further after each miss.
_OVERSHOOT = 0.002
_OVERSHOOT_GROWTH = 2.0
# Candidates on the segment between the image and the one found, as shares of its length.
_SEGMENT = (0.8, 0.86, 0.9, 0.93, 0.955, 0.975, 0.99)
_BISECTIONS = 12
_NEWTON_STEPS = 24


@dataclass(frozen=True)
class Counterfactual:
    """The image found for one image of a batch, and what it was measured to be."""

    pixels_CHW: UInt8[np.ndarray, "C H W"]
    """What the client receives; posted back, it gets `class_id`."""
    class_id: int
    distance: float
    """L2 between the image that was sent and `pixels_CHW / 255`, in [0, 1] pixel units; see `l2_distance`."""
    reached: bool
    """Whether the wanted class (without a target: another class) was reached."""
    steps: int = 0
    """Gradients that were computed."""


class Differentiable(Protocol):
    """A classifier as the search sees it: pixels of the image that was sent, in [0, 1]."""

    def classify(self, image_NCHW: Float64[np.ndarray, "N C H W"]) -> tuple[Float64[np.ndarray, "N K"], Radii]:
        """Logits and radii, by the path that serves predictions."""
        ...

    def margin_gradient(
        self, image_NCHW: Float64[np.ndarray, "N C H W"], weights_NK: Float64[np.ndarray, "N K"]
    ) -> tuple[Float64[np.ndarray, "N K"], Float64[np.ndarray, "N C H W"]]:
        """Logits, and the gradient of `sum_k weights[k] logits[k]` with respect to the image."""
        ...


def find_counterfactuals(
    model: Differentiable,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    class_id_N: Int64[np.ndarray, " N"],
    runner_up_N: Int64[np.ndarray, " N"],
    radius_N: Float64[np.ndarray, " N"],
    n_classes: int,
    target: int | None,
) -> list[Counterfactual]:
    """The nearest images found that `model` gives another class than `class_id_N`, or exactly `target`.

    Args:
        model: classifies and differentiates; called with batches of at most a few times N images.
        image_NCHW: pixels in [0, 1].
        class_id_N: predicted classes, none of which is `target`.
        runner_up_N: class to descend towards first where there is no target.
        radius_N: certified radii; no answer is nearer. Where nothing is reached, the answer is the image with
            the lowest margin left among those at least that far. Only if the radius exceeds the distance to
            every image tried, the farthest corner of the box included, is the answer that corner.
        n_classes: K.
        target: wanted class; None for any other.
    """
    if len(image_NCHW) == 0:
        return []
    search = _Search(model, image_NCHW, class_id_N, runner_up_N, radius_N, n_classes, target)
    search.descend()
    search.shorten()
    search.settle_unreached()
    return search.answers()


def l2_distance(image_CHW: Float64[np.ndarray, "C H W"], pixels_CHW: UInt8[np.ndarray, "C H W"]) -> float:
    """L2 distance between an image in [0, 1] and an 8-bit one divided by 255.

    If the first is 8-bit too (each pixel is the float64 of some v / 255) the sum of squares is an exact
    integer. Otherwise it is summed in extended precision (64-bit significand or longer on x86 and ARM Linux).
    Either way the result is off by the last rounding to float64 only, so that rounding alone never finds a
    distance below a radius.
    """
    level_CHW = np.rint(image_CHW * LEVELS)
    if np.array_equal(level_CHW / LEVELS, image_CHW):
        difference = level_CHW.astype(np.int64) - pixels_CHW
        squares = np.longdouble(int(np.sum(difference * difference)))
    else:
        real = image_CHW.astype(np.longdouble) * np.longdouble(LEVELS) - pixels_CHW
        squares = np.sum(real * real)
    return float(np.sqrt(squares) / np.longdouble(LEVELS))


class _Search:
    """State of one batch; images drop out of the work as they finish."""

    def __init__(
        self,
        model: Differentiable,
        image_NCHW: np.ndarray,
        class_id_N: np.ndarray,
        runner_up_N: np.ndarray,
        radius_N: np.ndarray,
        n_classes: int,
        target: int | None,
    ) -> None:
        n_images = len(image_NCHW)
        self.model = model
        self.image_NCHW = image_NCHW
        self.level_ND = image_NCHW.reshape(n_images, -1) * LEVELS
        """The image that was sent, in units of 1 / 255; not rounded."""
        self.class_id_N = class_id_N
        self.radius_N = radius_N
        self.n_classes = n_classes
        self.target = target
        self.falling_N = class_id_N.copy()
        """The class whose logit is to fall, i of the margin `f_i - f_j`."""
        self.rising_N = runner_up_N.copy() if target is None else np.full(n_images, target)
        self.gradient_ND = np.zeros_like(self.level_ND)
        self.steps_N = np.zeros(n_images, np.int64)
        # The best image of the wanted class.
        self.reached_ND = np.zeros(self.level_ND.shape, np.uint8)
        self.reached_class_N = np.zeros(n_images, np.int64)
        self.reached_distance_N = np.full(n_images, np.inf)
        # The best of the others. Those too near, or whose class is not certain, count only if there is
        # nothing else.
        self.other_ND = np.zeros(self.level_ND.shape, np.uint8)
        self.other_class_N = class_id_N.copy()
        self.other_margin_N = np.full(n_images, np.inf)
        self.other_valid_N = np.zeros(n_images, bool)

    def descend(self) -> None:
        """Step until another step is not worthwhile, all unfinished images in one batch."""
        active_M = np.arange(len(self.level_ND))
        at_MD = self.level_ND
        overshoot_N = np.zeros(len(self.level_ND))
        for step in range(_MAX_STEPS):
            margin_M, gradient_MD = self._linearise(active_M, at_MD)
            if step == 0:
                overshoot_N = _OVERSHOOT * np.abs(margin_M) + np.finfo(np.float64).tiny
            anchor_MD = self.level_ND[active_M] if step < _STEPS_FROM_FIRST_IMAGE else at_MD
            next_MD = _closest_levels(anchor_MD, at_MD, gradient_MD, margin_M + overshoot_N[active_M])
            before_M = self.reached_distance_N[active_M]
            reached_M = self._measure(active_M, next_MD)
            shorter_M = self.reached_distance_N[active_M] < (1.0 - _WORTHWHILE) * before_M
            moved_M = (next_MD != at_MD).any(axis=1)
            # A miss after a hit ends the search as well: the hit was already near the boundary.
            finished_M = np.where(np.isfinite(before_M), ~shorter_M, ~moved_M & ~reached_M)
            overshoot_N[active_M[~reached_M]] *= _OVERSHOOT_GROWTH
            active_M, at_MD = active_M[~finished_M], next_MD[~finished_M]
            if len(active_M) == 0:
                return

    def shorten(self) -> None:
        """Try the segment between the image and the one found, all candidates in one batch."""
        found_M = np.flatnonzero(np.isfinite(self.reached_distance_N))
        if len(found_M) == 0:
            return
        start_MD = self.level_ND[found_M]
        along_MD = self.reached_ND[found_M] - start_MD
        shares = np.array(_SEGMENT)[:, None, None]
        candidate_SMD = np.rint(start_MD + shares * along_MD)
        # Longest first, so that of equal candidates the measured order does not matter; all in one call.
        self._measure(np.tile(found_M, len(_SEGMENT)), candidate_SMD.reshape(-1, start_MD.shape[1]))

    def settle_unreached(self) -> None:
        """Where nothing valid was found, look further out along the last gradient, up to the farthest
        image."""
        open_M = np.flatnonzero(~np.isfinite(self.reached_distance_N) & ~self.other_valid_N)
        if len(open_M) == 0:
            return
        start_MD = self.level_ND[open_M]
        farthest_MD = np.where(start_MD < LEVELS / 2, LEVELS, 0.0)
        downhill_MD = np.where(self.gradient_ND[open_M] > 0, 0.0, LEVELS)
        halfway_MD = np.rint((start_MD + downhill_MD) / 2)
        self._measure(np.tile(open_M, 3), np.concatenate([halfway_MD, downhill_MD, farthest_MD]))
        still_M = open_M[~np.isfinite(self.reached_distance_N[open_M]) & ~self.other_valid_N[open_M]]
        if len(still_M):
            farthest_MD = np.where(self.level_ND[still_M] < LEVELS / 2, LEVELS, 0.0)
            self.other_margin_N[still_M] = np.inf
            self._measure(still_M, farthest_MD)

    def answers(self) -> list[Counterfactual]:
        """The best of what was measured."""
        reached_N = np.isfinite(self.reached_distance_N)
        pixels_ND = np.where(reached_N[:, None], self.reached_ND, self.other_ND)
        class_N = np.where(reached_N, self.reached_class_N, self.other_class_N)
        pixels_NCHW = pixels_ND.reshape(self.image_NCHW.shape)
        return [
            Counterfactual(
                pixels_CHW=pixels_CHW,
                class_id=int(class_id),
                distance=l2_distance(image_CHW, pixels_CHW),
                reached=bool(reached),
                steps=int(steps),
            )
            for image_CHW, pixels_CHW, class_id, reached, steps in zip(
                self.image_NCHW, pixels_NCHW, class_N, reached_N, self.steps_N, strict=True
            )
        ]

    def _linearise(self, active_M: np.ndarray, at_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Margin and its gradient for one unit of 1 / 255, at the iterates of the images `active_M`."""
        row_M = np.arange(len(active_M))
        weights_MK = np.zeros((len(active_M), self.n_classes))
        weights_MK[row_M, self.falling_N[active_M]] = 1.0
        weights_MK[row_M, self.rising_N[active_M]] = -1.0
        logits_MK, gradient_MCHW = self.model.margin_gradient(self._images(at_MD), weights_MK)
        gradient_MD = np.nan_to_num(gradient_MCHW.reshape(at_MD.shape)) / LEVELS
        self.gradient_ND[active_M] = gradient_MD
        self.steps_N[active_M] += 1
        return np.nan_to_num((weights_MK * logits_MK).sum(axis=1)), gradient_MD

    def _measure(self, index_M: np.ndarray, level_MD: np.ndarray) -> np.ndarray:
        """Classify candidates for the images `index_M` (which may repeat) and keep the best; True where
        reached."""
        logits_MK, radii = self.model.classify(self._images(level_MD))
        class_M, certain_M = radii.class_id_N, radii.certified_N
        row_M = np.arange(len(index_M))
        distance_M = np.sqrt(np.square(level_MD - self.level_ND[index_M]).sum(axis=1)) / LEVELS
        if self.target is None:
            wanted_M = class_M != self.class_id_N[index_M]
            rival_MK = logits_MK.copy()
            rival_MK[row_M, self.class_id_N[index_M]] = -np.inf
            margin_M = logits_MK[row_M, self.class_id_N[index_M]] - rival_MK.max(axis=1)
        else:
            wanted_M = class_M == self.target
            rival_MK = logits_MK.copy()
            rival_MK[:, self.target] = -np.inf
            margin_M = rival_MK.max(axis=1) - logits_MK[:, self.target]
        reached_M = wanted_M & certain_M
        valid_M = certain_M & (distance_M >= self.radius_N[index_M])
        for m, n in enumerate(index_M):
            if reached_M[m]:
                if distance_M[m] < self.reached_distance_N[n]:
                    self.reached_distance_N[n] = distance_M[m]
                    self.reached_class_N[n] = class_M[m]
                    self.reached_ND[n] = level_MD[m]
            elif (not valid_M[m], margin_M[m]) < (not self.other_valid_N[n], self.other_margin_N[n]):
                self.other_valid_N[n] = valid_M[m]
                self.other_margin_N[n] = margin_M[m]
                self.other_class_N[n] = class_M[m]
                self.other_ND[n] = level_MD[m]
        # The pair for the next step: the class to leave and the one to reach, as they are at this candidate.
        if self.target is None:
            same_M = class_M == self.class_id_N[index_M]
            self.rising_N[index_M] = np.where(same_M, radii.runner_up_N, class_M)
        else:
            self.falling_N[index_M] = rival_MK.argmax(axis=1)
        return reached_M

    def _images(self, level_MD: np.ndarray) -> np.ndarray:
        return (level_MD / LEVELS).reshape(-1, *self.image_NCHW.shape[1:])


def _closest_levels(
    anchor_MD: np.ndarray, at_MD: np.ndarray, gradient_MD: np.ndarray, fall_M: np.ndarray
) -> np.ndarray:
    """The 8-bit image closest to `anchor` where the linearisation at `at` has fallen by `fall`; units of 1 /
    255.

    `round(clip(anchor - lambda g))` minimises the Lagrangian `||q - anchor||^2 + 2 lambda <g, q>` over the
    grid, pixel by pixel, and its linearised margin never rises with lambda: so the smallest sufficient lambda
    is bracketed and bisected. Where no lambda suffices the result is the corner of the box that is farthest
    downhill.
    """
    slope_MD = gradient_MD * gradient_MD
    # What is left to fall, seen from the anchor: the linearisation is about another point.
    need_M = fall_M + (gradient_MD * (anchor_MD - at_MD)).sum(axis=1)
    with np.errstate(divide="ignore", over="ignore"):
        room_MD = np.where(gradient_MD > 0, anchor_MD, LEVELS - anchor_MD) / np.abs(gradient_MD)
    room_MD[gradient_MD == 0] = 0.0
    corner_M = room_MD.max(axis=1)

    # Without rounding the fall is concave in lambda, so Newton's method from 0 ends exactly after a few
    # steps.
    lambda_M = np.zeros(len(anchor_MD))
    for _ in range(_NEWTON_STEPS):
        fallen_M = _fall(anchor_MD, gradient_MD, lambda_M, rounded=False)
        free_M = np.where(room_MD > lambda_M[:, None], slope_MD, 0.0).sum(axis=1)
        missing_M = need_M - fallen_M
        more_M = (missing_M > 1e-9 * np.abs(need_M)) & (free_M > 0)
        if not more_M.any():
            break
        lambda_M = np.where(
            more_M, np.minimum(lambda_M + missing_M / np.where(more_M, free_M, 1.0), corner_M), lambda_M
        )

    low_M, high_M = np.zeros_like(lambda_M), lambda_M
    for _ in range(_BISECTIONS):
        short_M = _fall(anchor_MD, gradient_MD, high_M, rounded=True) < need_M
        short_M &= high_M < corner_M
        if not short_M.any():
            break
        low_M = np.where(short_M, high_M, low_M)
        high_M = np.where(short_M, np.minimum(1.25 * high_M + 1e-12 * corner_M, corner_M), high_M)
    else:
        high_M = np.where(_fall(anchor_MD, gradient_MD, high_M, rounded=True) < need_M, corner_M, high_M)
    low_M = np.maximum(low_M, 0.8 * high_M)
    low_M = np.where(_fall(anchor_MD, gradient_MD, low_M, rounded=True) < need_M, low_M, 0.0)
    for _ in range(_BISECTIONS):
        middle_M = 0.5 * (low_M + high_M)
        enough_M = _fall(anchor_MD, gradient_MD, middle_M, rounded=True) >= need_M
        high_M = np.where(enough_M, middle_M, high_M)
        low_M = np.where(enough_M, low_M, middle_M)
    return np.rint(np.clip(anchor_MD - high_M[:, None] * gradient_MD, 0.0, LEVELS))


def _fall(anchor_MD: np.ndarray, gradient_MD: np.ndarray, lambda_M: np.ndarray, rounded: bool) -> np.ndarray:
    """How far the linearised margin has fallen at `clip(anchor - lambda g)`."""
    moved_MD = np.clip(anchor_MD - lambda_M[:, None] * gradient_MD, 0.0, LEVELS)
    if rounded:
        np.rint(moved_MD, out=moved_MD)
    return (gradient_MD * (anchor_MD - moved_MD)).sum(axis=1)
