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
from typing import Protocol, runtime_checkable

import numpy as np

from service.certificate import Radii
from service.shapes import Float64, Int64, UInt8

LEVELS = 255.0

# Chosen on 500 MNIST test images and a dense net of 384 units: 2.8 steps on average, and a mean distance within 3 % of
# what many more steps find.
_MAX_STEPS = 48
# While nothing is found: aim beyond the boundary by these shares of the first margin, doubled after every step that
# did not lower the margin, as long as there are so many at most,
_OVERSHOOTS = (0.01, 0.04, 0.1)
_MOST_MISSES = 12
# and after this many steps also at this share of what is missing: beyond a kink, where another detector of the network
# takes over, the whole step may raise the margin that half of it lowers.
_CAREFUL_AFTER = 2
_CAREFUL = 0.5
# Once another class is found: go on only while a step shortens the distance by this share,
_WORTHWHILE = 0.02
# aim at the boundary with this little to spare,
_SPARE = 0.003
# and try blends between the image found and the closest point on the new linearisation, at these lengths.
_BLENDS = (0.15, 0.4)
_LENGTHS = (0.98, 1.0, 1.02)
_NEWTON_STEPS = 12
# Rounding moves the solution by a few percent of lambda at most: growth of the bracket, and halvings of it.
_BRACKET = 1.04
_BRACKETINGS = 40
_BISECTIONS = 6


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


@runtime_checkable
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
    target_N: Int64[np.ndarray, " N"],
) -> list[Counterfactual]:
    """The nearest images found that `model` gives another class than `class_id_N`, or exactly `target_N`.

    Args:
        model: classifies and differentiates; called with batches of at most a few times N images.
        image_NCHW: pixels in [0, 1].
        class_id_N: predicted classes, each of which differs from its target.
        runner_up_N: class to descend towards first where there is no target.
        radius_N: certified radii; no answer is nearer. Where nothing is reached, the answer is the image with
            the lowest margin left among those at least that far. Only if the radius exceeds the distance to
            every image tried, the farthest corner of the box included, is the answer that corner.
        n_classes: K.
        target_N: wanted classes; -1 for any other.
    """
    if len(image_NCHW) == 0:
        return []
    search = _Search(model, image_NCHW, class_id_N, runner_up_N, radius_N, n_classes, target_N)
    search.descend()
    search.settle()
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
    """State of one batch; images drop out of the work as they finish. S counts candidates for one image."""

    def __init__(
        self,
        model: Differentiable,
        image_NCHW: np.ndarray,
        class_id_N: np.ndarray,
        runner_up_N: np.ndarray,
        radius_N: np.ndarray,
        n_classes: int,
        target_N: np.ndarray,
    ) -> None:
        n_images = len(image_NCHW)
        self.model = model
        self.image_NCHW = image_NCHW
        self.start_ND = image_NCHW.reshape(n_images, -1) * LEVELS
        """The image that was sent, in units of 1 / 255; not rounded."""
        self.class_id_N = class_id_N
        self.radius_N = radius_N
        self.n_classes = n_classes
        self.target_N = target_N
        self.falling_N = class_id_N.copy()
        """The class whose logit is to fall, i of the margin `f_i - f_j`."""
        self.rising_N = np.where(target_N < 0, runner_up_N, target_N)
        self.at_ND = self.start_ND.copy()
        """The iterate: the best image found, or else the candidate of the last step with the least margin left."""
        self.gradient_ND = np.zeros_like(self.start_ND)
        self.steps_N = np.zeros(n_images, np.int64)
        # The nearest image of the wanted class.
        self.found_ND = np.zeros(self.start_ND.shape, np.uint8)
        self.found_class_N = class_id_N.copy()
        self.found_distance_N = np.full(n_images, np.inf)
        # The least margin left among the others that are certain of their class and not nearer than the radius.
        self.other_ND = np.zeros(self.start_ND.shape, np.uint8)
        self.other_class_N = class_id_N.copy()
        self.other_margin_N = np.full(n_images, np.inf)

    def descend(self) -> None:
        """Step until another step is not worthwhile: all unfinished images at once, one gradient for each step."""
        active_M = np.arange(len(self.start_ND))
        first_margin_N = np.zeros(len(self.start_ND))
        lowest_margin_N = np.full(len(self.start_ND), np.inf)
        misses_N = np.zeros(len(self.start_ND), np.int64)
        for step in range(_MAX_STEPS):
            margin_M = self._linearise(active_M)
            if step == 0:
                first_margin_N = np.abs(margin_M) + np.finfo(np.float32).tiny
            misses_N[active_M] += margin_M >= lowest_margin_N[active_M]
            lowest_margin_N[active_M] = np.minimum(lowest_margin_N[active_M], margin_M)
            scale_M = first_margin_N[active_M]
            found_M = np.isfinite(self.found_distance_N[active_M])
            before_M = self.found_distance_N[active_M]
            groups: list[tuple[np.ndarray, np.ndarray]] = []
            if not found_M.all():
                missing_L = active_M[~found_M]
                overshoots_SL = np.outer(_OVERSHOOTS, scale_M[~found_M] * 2.0 ** misses_N[missing_L])
                if step >= _CAREFUL_AFTER:
                    overshoots_SL = np.vstack([overshoots_SL, (_CAREFUL - 1.0) * margin_M[~found_M]])
                groups.append((missing_L, self._reach(missing_L, margin_M[~found_M], overshoots_SL)))
            if found_M.any():
                groups.append(
                    (active_M[found_M], self._shorten(active_M[found_M], (margin_M + _SPARE * scale_M)[found_M]))
                )
            last_MD = self.at_ND[active_M]
            self._measure(groups)
            shorter_M = self.found_distance_N[active_M] < (1.0 - _WORTHWHILE) * before_M
            moved_M = (self.at_ND[active_M] != last_MD).any(axis=1)
            hopeful_M = moved_M & (misses_N[active_M] < _MOST_MISSES)
            active_M = active_M[np.where(found_M, shorter_M, hopeful_M)]
            if len(active_M) == 0:
                return

    def settle(self) -> None:
        """Where there is no answer yet, look far down the last gradient, and at last at the farthest image."""
        far_L = self._unanswered()
        if len(far_L) == 0:
            return
        start_LD = self.start_ND[far_L]
        corner_LD = np.where(self.gradient_ND[far_L] > 0, 0.0, LEVELS)
        self._measure([(far_L, np.rint(np.stack([0.5 * (start_LD + corner_LD), corner_LD])))])
        far_L = self._unanswered()
        if len(far_L) == 0:
            return
        farthest_LD = np.where(self.start_ND[far_L] < LEVELS / 2, LEVELS, 0.0)
        self._measure([(far_L, farthest_LD[None])])
        far_L = self._unanswered()
        if len(far_L):
            # The degenerate case: even this image is nearer than the radius, or uncertain of its class.
            farthest_LD = np.where(self.start_ND[far_L] < LEVELS / 2, LEVELS, 0.0)
            _, radii = self.model.classify(self._images(farthest_LD))
            self.other_ND[far_L] = farthest_LD
            self.other_class_N[far_L] = radii.class_id_N

    def answers(self) -> list[Counterfactual]:
        """The best of what was measured."""
        found_N = np.isfinite(self.found_distance_N)
        pixels_ND = np.where(found_N[:, None], self.found_ND, self.other_ND)
        class_N = np.where(found_N, self.found_class_N, self.other_class_N)
        pixels_NCHW = pixels_ND.reshape(self.image_NCHW.shape)
        return [
            Counterfactual(
                pixels_CHW=pixels_CHW,
                class_id=int(class_id),
                distance=l2_distance(image_CHW, pixels_CHW),
                reached=bool(found),
                steps=int(steps),
            )
            for image_CHW, pixels_CHW, class_id, found, steps in zip(
                self.image_NCHW, pixels_NCHW, class_N, found_N, self.steps_N, strict=True
            )
        ]

    def _unanswered(self) -> np.ndarray:
        return np.flatnonzero(~np.isfinite(self.found_distance_N) & ~np.isfinite(self.other_margin_N))

    def _linearise(self, active_M: np.ndarray) -> np.ndarray:
        """Margins at the iterates of the images `active_M`; stores their gradients for units of 1 / 255."""
        row_M = np.arange(len(active_M))
        weights_MK = np.zeros((len(active_M), self.n_classes))
        weights_MK[row_M, self.falling_N[active_M]] = 1.0
        weights_MK[row_M, self.rising_N[active_M]] = -1.0
        logits_MK, gradient_MCHW = self.model.margin_gradient(self._images(self.at_ND[active_M]), weights_MK)
        # The gradient graph carries no proof; a pixel whose entry is not a number stays where it is.
        self.gradient_ND[active_M] = np.nan_to_num(gradient_MCHW.reshape(len(active_M), -1)) / LEVELS
        self.steps_N[active_M] += 1
        return (weights_MK * logits_MK).sum(axis=1)

    def _reach(self, index_L: np.ndarray, margin_L: np.ndarray, overshoots_SL: np.ndarray) -> np.ndarray:
        """Candidates S x L x D beyond the boundary: the nearest exactly, the others along the same line.

        After the first step they continue from the iterate and no longer start at the first image: that costs some
        distance, which `_shorten` wins back, but two linearisations cannot send the iterate to and fro.
        """
        at_LD, gradient_LD = self.at_ND[index_L], self.gradient_ND[index_L]
        needs_SL = margin_L + overshoots_SL
        nearest_LD = closest_levels(at_LD, at_LD, gradient_LD, needs_SL[0])
        factor_SL = needs_SL / np.where(needs_SL[0] > 0, needs_SL[0], 1.0)
        candidate_SLD = at_LD + factor_SL[:, :, None] * (nearest_LD - at_LD)
        candidate_SLD[0] = nearest_LD
        return _to_levels(candidate_SLD)

    def _shorten(self, index_L: np.ndarray, need_L: np.ndarray) -> np.ndarray:
        """Candidates S x L x D between the image found and the closest point on its own linearised boundary."""
        start_LD, at_LD = self.start_ND[index_L], self.at_ND[index_L]
        closest_LD = closest_levels(start_LD, at_LD, self.gradient_ND[index_L], need_L)
        found_LD, aim_LD = at_LD - start_LD, closest_LD - start_LD
        return _to_levels(
            np.stack(
                [
                    start_LD + length * ((1.0 - blend) * found_LD + blend * aim_LD)
                    for blend in _BLENDS
                    for length in _LENGTHS
                ]
            )
        )

    def _measure(self, groups: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Classify the candidates (images `index_L`, levels S x L x D) of all groups in one batch; keep the best."""
        flat = [level_SLD.reshape(-1, level_SLD.shape[2]) for _, level_SLD in groups]
        logits_BK, radii = self.model.classify(self._images(np.concatenate(flat)))
        offset = 0
        for index_L, level_SLD in groups:
            shape = level_SLD.shape[:2]
            part = slice(offset, offset + shape[0] * shape[1])
            offset = part.stop
            self._keep_best(
                index_L,
                level_SLD,
                logits_BK[part].reshape(*shape, -1),
                radii.class_id_N[part].reshape(shape),
                radii.runner_up_N[part].reshape(shape),
                radii.certified_N[part].reshape(shape),
            )

    def _keep_best(
        self,
        index_L: np.ndarray,
        level_SLD: np.ndarray,
        logits_SLK: np.ndarray,
        class_SL: np.ndarray,
        runner_up_SL: np.ndarray,
        certain_SL: np.ndarray,
    ) -> None:
        row_L = np.arange(len(index_L))
        distance_SL = np.sqrt(np.square(level_SLD - self.start_ND[index_L]).sum(axis=2)) / LEVELS
        # The margin that is left to the wanted class, and the pair of classes that it is between.
        target_L = self.target_N[index_L]
        free_L = target_L < 0
        rivals_SLK = logits_SLK.copy()
        rivals_SLK[:, row_L[~free_L], target_L[~free_L]] = -np.inf
        falling_SL = np.where(free_L, self.class_id_N[index_L], rivals_SLK.argmax(axis=2))
        rising_SL = np.where(free_L, np.where(class_SL == falling_SL, runner_up_SL, class_SL), target_L)
        margin_SL = (
            np.take_along_axis(logits_SLK, falling_SL[:, :, None], axis=2)
            - np.take_along_axis(logits_SLK, rising_SL[:, :, None], axis=2)
        )[:, :, 0]
        found_SL = certain_SL & (class_SL == rising_SL) & (class_SL != falling_SL)

        found_distance_SL = np.where(found_SL, distance_SL, np.inf)
        best_L = found_distance_SL.argmin(axis=0)
        nearer_L = found_distance_SL[best_L, row_L] < self.found_distance_N[index_L]
        chosen, images = best_L[nearer_L], index_L[nearer_L]
        self.found_ND[images] = level_SLD[chosen, row_L[nearer_L]]
        self.found_class_N[images] = class_SL[chosen, row_L[nearer_L]]
        self.found_distance_N[images] = found_distance_SL[chosen, row_L[nearer_L]]

        valid_SL = certain_SL & ~found_SL & (distance_SL >= self.radius_N[index_L])
        other_margin_SL = np.where(valid_SL, margin_SL, np.inf)
        least_L = other_margin_SL.argmin(axis=0)
        lower_L = other_margin_SL[least_L, row_L] < self.other_margin_N[index_L]
        chosen, images = least_L[lower_L], index_L[lower_L]
        self.other_ND[images] = level_SLD[chosen, row_L[lower_L]]
        self.other_class_N[images] = class_SL[chosen, row_L[lower_L]]
        self.other_margin_N[images] = other_margin_SL[chosen, row_L[lower_L]]

        # Go on from the best found; from the least margin while nothing is.
        next_L = np.where(nearer_L, best_L, margin_SL.argmin(axis=0))
        moving_L = nearer_L | ~np.isfinite(self.found_distance_N[index_L])
        chosen, images = next_L[moving_L], index_L[moving_L]
        self.at_ND[images] = level_SLD[chosen, row_L[moving_L]]
        self.falling_N[images] = falling_SL[chosen, row_L[moving_L]]
        self.rising_N[images] = rising_SL[chosen, row_L[moving_L]]

    def _images(self, level_MD: np.ndarray) -> np.ndarray:
        return (level_MD / LEVELS).reshape(-1, *self.image_NCHW.shape[1:])


def closest_levels(
    anchor_MD: Float64[np.ndarray, "M D"],
    at_MD: Float64[np.ndarray, "M D"],
    gradient_MD: Float64[np.ndarray, "M D"],
    fall_M: Float64[np.ndarray, " M"],
) -> Float64[np.ndarray, "M D"]:
    """The 8-bit image closest to `anchor` where the linearisation at `at` has fallen by `fall`; units of 1 / 255.

    `round(clip(anchor - lambda g))` minimises the Lagrangian `||q - anchor||^2 + 2 lambda <g, q>` over the grid, pixel
    by pixel, and its linearised margin never rises with lambda: so the smallest sufficient lambda is bracketed and
    bisected. Where no lambda suffices the result is the corner of the box that is farthest downhill.
    """
    slope_MD = gradient_MD * gradient_MD
    # What is left to fall, seen from the anchor: the linearisation is about another point.
    need_M = fall_M + _rows_dot(gradient_MD, anchor_MD - at_MD)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        room_MD = np.where(gradient_MD > 0, anchor_MD, LEVELS - anchor_MD) / np.abs(gradient_MD)
    room_MD[gradient_MD == 0] = 0.0
    # Beyond this every pixel is at its bound; not infinite, or 0 times it would not be a number.
    corner_M = np.minimum(room_MD.max(axis=1), 1e300)

    # Without rounding the fall is concave in lambda, so Newton's method from 0 ends exactly after a few steps.
    lambda_M = np.zeros(len(anchor_MD))
    for _ in range(_NEWTON_STEPS):
        missing_M = need_M - _fall(anchor_MD, gradient_MD, lambda_M, rounded=False)
        free_M = np.where(room_MD > lambda_M[:, None], slope_MD, 0.0).sum(axis=1)
        more_M = (missing_M > 1e-6 * np.abs(need_M)) & (free_M > 0)
        if not more_M.any():
            break
        step_M = missing_M / np.where(more_M, free_M, 1.0)
        lambda_M = np.where(more_M, np.minimum(lambda_M + step_M, corner_M), lambda_M)

    low_M, high_M = lambda_M / _BRACKET, lambda_M
    for _ in range(_BRACKETINGS):
        short_M = (_fall(anchor_MD, gradient_MD, high_M, rounded=True) < need_M) & (high_M < corner_M)
        if not short_M.any():
            break
        low_M = np.where(short_M, high_M, low_M)
        high_M = np.where(short_M, np.minimum(_BRACKET * high_M + 1e-9 * corner_M, corner_M), high_M)
    else:
        high_M = np.where(_fall(anchor_MD, gradient_MD, high_M, rounded=True) < need_M, corner_M, high_M)
    for _ in range(_BISECTIONS):
        middle_M = 0.5 * (low_M + high_M)
        enough_M = _fall(anchor_MD, gradient_MD, middle_M, rounded=True) >= need_M
        high_M = np.where(enough_M, middle_M, high_M)
        low_M = np.where(enough_M, low_M, middle_M)
    return _to_levels(anchor_MD - high_M[:, None] * gradient_MD)


def _fall(anchor_MD: np.ndarray, gradient_MD: np.ndarray, lambda_M: np.ndarray, rounded: bool) -> np.ndarray:
    """How far the linearised margin has fallen at `clip(anchor - lambda g)`."""
    moved_MD = anchor_MD - lambda_M[:, None] * gradient_MD
    np.clip(moved_MD, 0.0, LEVELS, out=moved_MD)
    if rounded:
        np.rint(moved_MD, out=moved_MD)
    return _rows_dot(gradient_MD, anchor_MD - moved_MD)


def _rows_dot(left_MD: np.ndarray, right_MD: np.ndarray) -> np.ndarray:
    return np.einsum("md,md->m", left_MD, right_MD)


def _to_levels(value: np.ndarray) -> np.ndarray:
    """The nearest 8-bit image, as float64."""
    return np.rint(np.clip(value, 0.0, LEVELS))
