"""Counterfactuals: the nearest image found that gets another class, as the 8-bit image that the client
receives.

Theory. A network trained with the hKR loss approaches, as its loss falls, the Kantorovich potential between
the classes, and its gradient then points along the optimal transport plan (Serrurier et al. 2021; Béthune et
al. 2022). Descending the margin `m = f_i - f_j` along its gradient therefore moves an image towards the
images of class j.

Cuts. A run of the transport graph at `x_k` gives the cut `m_k + <g_k, x - x_k>`: the margin as it looks from there.
The closest point of the box to the first image `x_0` where one cut is at most `-s` is
`clip(x_0 - lambda g, 0, 1)` with one scalar lambda; with no box that is the Newton-like step `x - (1 + s') m g /
||g||^2` of the design. Where the margin is convex it lies above all its cuts, and the closest point where *all* are at
most `-s` is better than that of any one. By duality that point belongs to one mixture of the cuts, the one that is
farthest away, and the mixture can stand for both cuts it was made of when the next one comes (aggregation: Kiwiel 1985;
Lemaréchal, Nemirovskii and Nesterov 1995). So a step costs one run, and its memory is one gradient.

How far. Between two cuts the margin lies above both. If it is a parabola along the way, then it exceeds them where they
meet by a quarter of what it exceeded the first cut where the second was made. That is known, so the next image is
aimed that much lower, and most of the time it is across the boundary, by little: two runs find at least 95 % of the
answers of ordinary networks.

The image that is sent is 8-bit, and on that grid the closest point is `round(clip(x_0 - lambda g))`: rounding belongs
to the step, so that it cannot undo it.

An answer is what it was measured to be: it is classified by the path that serves predictions, and counts as reached
only if its class is certified (margin above `4 logit_error`), because then it is the same in any batch.

Axes: N batch, M images that are still searched for, C channels, H and W of the image that was sent, K classes, D = C H
W.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import numpy as np

from service.certificate import Radii
from service.shapes import Float64, Int64, UInt8

LEVELS = 255.0

# Chosen on test images of the shipped models; docs/counterfactuals.md says what they give.
# Ordinary networks need two to four runs; the cap is for detectors under a global maximum, which take a run each.
_MAX_STEPS = 48
_MOST_MISSES = 12
# Aim beyond the first cut by this share of the first margin, and on the way from elsewhere by this one, doubled after
# each step that did not lower the margin.
_FIRST_AIM = 0.04
_NEXT_AIM = 0.02
# Aim beyond a mixture by this share of what the margin last exceeded it by: more than the quarter of a parabola, so
# that nearly all images get across, and by this share of the first margin in any case.
_EXCESS = 0.42
_MOST_EXCESS = 0.06
_AIM = 0.003
# No mixture forgets its newest cut.
_MOST_OLD = 0.95
# An answer that is across the boundary by less than this share of its distance is good enough; one that is farther
# across is worth another run, and further ones as long as they promise to shorten the distance by this share.
_ACROSS = 0.1
_WORTHWHILE = 0.02
# After so many runs without an answer, and whenever the margin is lowered then, the search goes on from there and no
# longer from the first image: along a kinked path the mixture forgets cuts that it would need.
_MOVE_ON_AFTER = 4
_NEWTON_STEPS = 12
_FIRST_ERROR = 1e-2
_NEWTON_ERROR = 1e-3
# Rounding moves the solution by little, except where most moves are below half a level.
_GROWTHS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12, 0.25, 0.5, *(1.0,) * 30)
_BISECTIONS = 6
_NARROW = 5e-3
# No product of these, one of the other and a sum over pixels, is infinite.
_MOST = 1e150
_LARGEST = 1e100


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


def l2_distance(
    image_NCHW: Float64[np.ndarray, "N C H W"], pixels_NCHW: UInt8[np.ndarray, "N C H W"]
) -> Float64[np.ndarray, " N"]:
    """L2 distances between images in [0, 1] and 8-bit ones divided by 255.

    If one of the former is 8-bit too (each pixel is the float64 of some v / 255) its sum of squares is an integer below
    2^53, exact in any order. Otherwise it is summed in extended precision (64-bit significand or longer on x86 and ARM
    Linux). Either way the result is off by the last rounding to float64 only, so that rounding alone never finds a
    distance below a radius.
    """
    image_ND, pixels_ND = image_NCHW.reshape(len(image_NCHW), -1), pixels_NCHW.reshape(len(pixels_NCHW), -1)
    level_ND = np.rint(image_ND * LEVELS)
    eight_bit_N = (level_ND / LEVELS == image_ND).all(axis=1)
    level_ND -= pixels_ND
    squares_N = _rows_dot(level_ND, level_ND).astype(np.longdouble)
    for n in np.flatnonzero(~eight_bit_N):
        real_D = image_ND[n].astype(np.longdouble) * np.longdouble(LEVELS) - pixels_ND[n]
        squares_N[n] = np.sum(real_D * real_D)
    return (np.sqrt(squares_N) / np.longdouble(LEVELS)).astype(np.float64)


class _Search:
    """State of one batch; images drop out of the work as they finish.

    Logits count in units of 1 / 255 here, as the pixels do: so gradients are those of the model.
    """

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
        self.class_id_N = class_id_N
        self.target_N = target_N
        self.radius_N = radius_N
        self.n_classes = n_classes
        start_ND = image_NCHW.reshape(n_images, -1) * LEVELS
        self.live = _Live(
            index_M=np.arange(n_images),
            start_MD=start_ND,
            centre_MD=start_ND,
            at_MD=start_ND,
            slope_MD=np.zeros_like(start_ND),
            value_M=np.zeros(n_images),
            rival_M=np.full(n_images, -1),
            scale_M=np.zeros(n_images),
            lowest_M=np.full(n_images, np.inf),
            misses_M=np.zeros(n_images, np.int64),
            falling_M=class_id_N,
            rising_M=np.where(target_N < 0, runner_up_N, target_N),
        )
        self.steps_N = np.zeros(n_images, np.int64)
        # The nearest image of the wanted class.
        self.found_ND = np.zeros(start_ND.shape, np.uint8)
        self.found_class_N = class_id_N.copy()
        self.found_distance_N = np.full(n_images, np.inf)
        # The least margin left among the others that are certain of their class and not nearer than the radius.
        self.other_ND = np.zeros(start_ND.shape, np.uint8)
        self.other_class_N = class_id_N.copy()
        self.other_margin_N = np.full(n_images, np.inf)
        # Where those without any answer end.
        self.last_slope_ND = self.live.slope_MD

    def descend(self) -> None:
        """Step until another step is not worthwhile: all unfinished images at once, one run for each step."""
        self._first_step()
        for step in range(1, _MAX_STEPS):
            if len(self.live.index_M) == 0:
                return
            self._step(may_move_on=step + 1 >= _MOVE_ON_AFTER)

    def settle(self) -> None:
        """Where there is no answer yet, look far down the last gradient, and at last at the farthest image."""
        far_L = self._unanswered()
        if len(far_L) == 0:
            return
        start_LD = self._start(far_L)
        corner_LD = np.where(self.last_slope_ND[far_L] > 0, 0.0, LEVELS)
        for level_LD in (np.rint(0.5 * (start_LD + corner_LD)), corner_LD):
            self._measure(far_L, level_LD, start_LD)
        far_L = self._unanswered()
        if len(far_L) == 0:
            return
        start_LD = self._start(far_L)
        farthest_LD = np.where(start_LD < LEVELS / 2, LEVELS, 0.0)
        class_L = self._measure(far_L, farthest_LD, start_LD).class_id_L
        # The degenerate case: even this image is nearer than the radius, or uncertain of its class.
        rest_L = ~np.isfinite(self.found_distance_N[far_L]) & ~np.isfinite(self.other_margin_N[far_L])
        self.other_ND[far_L[rest_L]] = farthest_LD[rest_L]
        self.other_class_N[far_L[rest_L]] = class_L[rest_L]

    def answers(self) -> list[Counterfactual]:
        """The best of what was measured."""
        found_N = np.isfinite(self.found_distance_N)
        pixels_ND = np.where(found_N[:, None], self.found_ND, self.other_ND)
        class_N = np.where(found_N, self.found_class_N, self.other_class_N)
        pixels_NCHW = pixels_ND.reshape(self.image_NCHW.shape)
        return [
            Counterfactual(pixels_CHW, class_id, distance, reached, steps)
            for pixels_CHW, class_id, distance, reached, steps in zip(
                pixels_NCHW,
                class_N.tolist(),
                l2_distance(self.image_NCHW, pixels_NCHW).tolist(),
                found_N.tolist(),
                self.steps_N.tolist(),
                strict=True,
            )
        ]

    def _first_step(self) -> None:
        """One cut, and the closest point beyond it; most often it is not across, and is not classified."""
        live = self.live
        margin_M, gradient_MD, _ = self._run(self.image_NCHW)
        live.scale_M = np.abs(margin_M) + np.finfo(np.float32).tiny
        live.lowest_M = margin_M
        live.slope_MD, live.value_M, live.rival_M = gradient_MD, margin_M, live.rising_M
        self.last_slope_ND = gradient_MD
        need_M = margin_M + _FIRST_AIM * live.scale_M
        with np.errstate(divide="ignore", invalid="ignore"):
            guess_M = np.nan_to_num(need_M / _rows_dot(gradient_MD, gradient_MD), posinf=0.0, neginf=0.0)
        lambda_M, _ = _multiplier(live.centre_MD, gradient_MD, need_M, guess_M, _FIRST_ERROR)
        live.at_MD = _moved(live.centre_MD, gradient_MD, lambda_M)

    def _step(self, may_move_on: bool) -> None:
        """A run at the iterate, the mixture of its cut with the last mixture, and the image that it asks for."""
        live = self.live
        margin_M, gradient_MD, logits_MK = self._run(self._images(live.at_MD))
        last_MD = live.at_MD
        move_MD = live.at_MD - live.centre_MD
        new_fall_M, old_fall_M = -_rows_dot(gradient_MD, move_MD), -_rows_dot(live.slope_MD, move_MD)
        cut_M = margin_M + new_fall_M
        mixed_M = live.rival_M == live.rising_M
        # With a target the margin is the greatest of several: it is that which exceeds the mixture.
        highest_M = LEVELS * self._margins(live.index_M, logits_MK).margin_L
        excess_M = np.where(self.target_N[live.index_M] < 0, margin_M, highest_M) - (live.value_M - old_fall_M)
        aim_M = np.where(
            mixed_M,
            np.clip(_EXCESS * excess_M, 0.0, _MOST_EXCESS * live.scale_M) + _AIM * live.scale_M,
            _NEXT_AIM * live.scale_M * 2.0**live.misses_M,
        )
        free_MD = (live.at_MD > 0.0) & (live.at_MD < LEVELS)
        share_M, lambda_M = _mix(
            live.slope_MD,
            live.value_M + aim_M - old_fall_M,
            gradient_MD,
            cut_M + aim_M - new_fall_M,
            move_MD,
            free_MD,
            mixed_M,
        )
        slope_MD = live.slope_MD * share_M[:, None]
        slope_MD += np.multiply(gradient_MD, (1.0 - share_M)[:, None], out=move_MD)
        live.value_M = share_M * np.where(mixed_M, live.value_M, 0.0) + (1.0 - share_M) * cut_M
        live.rival_M = live.rising_M
        live.slope_MD = slope_MD
        live.at_MD = _closest_levels(live.centre_MD, slope_MD, live.value_M + aim_M, lambda_M)

        before_M = self.found_distance_N[live.index_M]
        measured = self._measure(live.index_M, live.at_MD, live.start_MD)
        live.falling_M, live.rising_M = measured.falling_L, measured.rising_L
        margin_M = LEVELS * measured.margin_L
        with np.errstate(divide="ignore", invalid="ignore"):
            across_M = -margin_M / (live.scale_M - margin_M)
            gain_M = 1.0 - measured.distance_L / before_M
        first_M = np.isinf(before_M)
        finished_M = np.where(first_M, measured.better_L & ~(across_M > _ACROSS), gain_M < _WORTHWHILE)
        if finished_M.all():
            live.keep(~finished_M)
            return
        self._centre(measured, margin_M, may_move_on)
        live.keep(
            ~finished_M & (live.misses_M < _MOST_MISSES) & (live.at_MD != last_MD).any(axis=1),
        )

    def _centre(self, measured: _Measured, margin_M: np.ndarray, may_move_on: bool) -> None:
        """Where the next step starts from: the first image, or on long ways the iterate with the least margin."""
        live = self.live
        missing_M = np.isinf(self.found_distance_N[live.index_M])
        lower_M = margin_M < live.lowest_M
        live.lowest_M = np.minimum(live.lowest_M, margin_M)
        if may_move_on:
            live.misses_M += missing_M & ~lower_M
            moves_M = missing_M & lower_M
            live.centre_MD = np.where(moves_M[:, None], live.at_MD, live.centre_MD)
            live.rival_M = np.where(moves_M, -1, live.rival_M)
        # An answer that was found from elsewhere: back to the first image, with the way to the answer as its cut.
        back_M = measured.better_L & (live.centre_MD != live.start_MD).any(axis=1)
        if back_M.any():
            way_BD = live.at_MD[back_M] - live.start_MD[back_M]
            # A secant: it falls from the first margin to that of the answer.
            steepness_B = (live.scale_M - margin_M)[back_M] / _rows_dot(way_BD, way_BD)
            live.slope_MD[back_M] = -steepness_B[:, None] * way_BD
            live.value_M[back_M] = live.scale_M[back_M]
            live.rival_M = np.where(back_M, live.rising_M, live.rival_M)
            live.centre_MD = np.where(back_M[:, None], live.start_MD, live.centre_MD)

    def _run(self, image_MCHW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Margin M of the pair and its gradient M x D, in units of 1 / 255, and logits M x K, at the iterates."""
        live = self.live
        row_M = np.arange(len(live.index_M))
        weights_MK = np.zeros((len(row_M), self.n_classes))
        weights_MK[row_M, live.falling_M] = 1.0
        weights_MK[row_M, live.rising_M] = -1.0
        logits_MK, gradient_MCHW = self.model.margin_gradient(image_MCHW, weights_MK)
        self.steps_N[live.index_M] += 1
        gradient_MD = gradient_MCHW.reshape(len(row_M), -1)
        odd_M = ~np.isfinite(_rows_dot(gradient_MD, gradient_MD))
        if odd_M.any():
            # The gradient graph carries no proof; a pixel whose entry is not a number stays where it is.
            gradient_MD = np.where(odd_M[:, None], _bounded(gradient_MD), gradient_MD)
        return LEVELS * np.nan_to_num((weights_MK * logits_MK).sum(axis=1)), gradient_MD, logits_MK

    def _margins(self, index_L: np.ndarray, logits_LK: np.ndarray) -> _Margins:
        """The margin that is left to the wanted class, and the pair of classes that it is between."""
        row_L = np.arange(len(index_L))
        class_L, target_L = self.class_id_N[index_L], self.target_N[index_L]
        free_L = target_L < 0
        rivals_LK = logits_LK.copy()
        rivals_LK[row_L, np.where(free_L, class_L, target_L)] = -np.inf
        rival_L = rivals_LK.argmax(axis=1)
        falling_L, rising_L = np.where(free_L, class_L, rival_L), np.where(free_L, rival_L, target_L)
        return _Margins(falling_L, rising_L, logits_LK[row_L, falling_L] - logits_LK[row_L, rising_L])

    def _measure(self, index_L: np.ndarray, level_LD: np.ndarray, start_LD: np.ndarray) -> _Measured:
        """Classify one 8-bit image for each of the images `index_L`, all in one batch; keep the best."""
        logits_LK, radii = self.model.classify(self._images(level_LD))
        margins = self._margins(index_L, logits_LK)
        difference_LD = level_LD - start_LD
        distance_L = np.sqrt(_rows_dot(difference_LD, difference_LD)) / LEVELS
        reached_L = (radii.class_id_N == margins.rising_L) & (margins.rising_L != self.class_id_N[index_L])
        found_L = radii.certified_N & reached_L
        better_L = found_L & (distance_L < self.found_distance_N[index_L])
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
            images = index_L[lower_L]
            self.other_ND[images] = level_LD[lower_L]
            self.other_class_N[images] = radii.class_id_N[lower_L]
            self.other_margin_N[images] = margins.margin_L[lower_L]
        return _Measured(margins.falling_L, margins.rising_L, margins.margin_L, radii.class_id_N, distance_L, better_L)

    def _unanswered(self) -> np.ndarray:
        return np.flatnonzero(~np.isfinite(self.found_distance_N) & ~np.isfinite(self.other_margin_N))

    def _start(self, index_L: np.ndarray) -> np.ndarray:
        return self.image_NCHW[index_L].reshape(len(index_L), -1) * LEVELS

    def _images(self, level_MD: np.ndarray) -> np.ndarray:
        return (level_MD / LEVELS).reshape(-1, *self.image_NCHW.shape[1:])


@dataclass
class _Live:
    """The images that are still searched for."""

    index_M: np.ndarray
    """Their places in the batch."""
    start_MD: np.ndarray
    """The image that was sent, in units of 1 / 255; not rounded."""
    centre_MD: np.ndarray
    """The image that the next one shall be close to."""
    at_MD: np.ndarray
    """The iterate."""
    slope_MD: np.ndarray
    """The mixture of cuts is `value + <slope, x - centre>`."""
    value_M: np.ndarray
    rival_M: np.ndarray
    """The class with whose logit the mixture was made; -1 where there is none."""
    scale_M: np.ndarray
    """|margin| at the start."""
    lowest_M: np.ndarray
    """The least margin so far."""
    misses_M: np.ndarray
    """Steps that did not lower the margin."""
    falling_M: np.ndarray
    """The class whose logit is to fall, i of the margin `f_i - f_j`."""
    rising_M: np.ndarray

    def keep(self, kept_M: np.ndarray) -> None:
        """Drop the others."""
        if not kept_M.all():
            for field in fields(self):
                setattr(self, field.name, getattr(self, field.name)[kept_M])


@dataclass(frozen=True)
class _Margins:
    falling_L: np.ndarray
    rising_L: np.ndarray
    margin_L: np.ndarray


@dataclass(frozen=True)
class _Measured(_Margins):
    """What one image for each of L was measured to be."""

    class_id_L: np.ndarray
    distance_L: np.ndarray
    better_L: np.ndarray
    """Of the wanted class, and the nearest so far."""


def closest_levels(
    anchor_MD: Float64[np.ndarray, "M D"], gradient_MD: Float64[np.ndarray, "M D"], fall_M: Float64[np.ndarray, " M"]
) -> Float64[np.ndarray, "M D"]:
    """The 8-bit image closest to `anchor` where a linear function has fallen by `fall`; pixels in units of 1 / 255.

    `round(clip(anchor - lambda g))` minimises the Lagrangian `||q - anchor||^2 + 2 lambda <g, q>` over the grid, pixel
    by pixel, and the function never rises with lambda: so the smallest sufficient lambda is found without rounding,
    and raised where rounding lost too much. Where no lambda suffices the result is the corner of the box that is
    farthest downhill.
    """
    return _closest_levels(anchor_MD, gradient_MD, fall_M, np.zeros_like(fall_M))


def _closest_levels(
    anchor_MD: np.ndarray, gradient_MD: np.ndarray, fall_M: np.ndarray, lambda_M: np.ndarray
) -> np.ndarray:
    """`closest_levels` from a guess of lambda."""
    # A little more, so that rounding seldom leaves too little.
    more_M = fall_M + _NEWTON_ERROR * np.abs(fall_M)
    lambda_M, corner_M = _multiplier(anchor_MD, gradient_MD, more_M, lambda_M, _NEWTON_ERROR)
    level_MD = _moved(anchor_MD, gradient_MD, lambda_M)
    np.rint(level_MD, out=level_MD)
    short_M = ~corner_M & (_fall(anchor_MD, gradient_MD, level_MD) < fall_M)
    if short_M.any():
        level_MD[short_M] = _raised(anchor_MD[short_M], gradient_MD[short_M], fall_M[short_M], lambda_M[short_M])
    return level_MD


def _raised(anchor_LD: np.ndarray, gradient_LD: np.ndarray, fall_L: np.ndarray, lambda_L: np.ndarray) -> np.ndarray:
    """Raise lambda where rounding lost too much: ever faster, then back by halves where that was far."""
    with np.errstate(divide="ignore"):
        # Moves the image by one level altogether.
        unit_L = np.minimum(1.0 / np.sqrt(_rows_dot(gradient_LD, gradient_LD)), _MOST)
    low_L, high_L = lambda_L, lambda_L
    short_L = np.ones(len(fall_L), np.bool_)
    level_LD = anchor_LD
    for growth in _GROWTHS:
        low_L = np.where(short_L, high_L, low_L)
        high_L = np.where(short_L, np.minimum(high_L + growth * np.maximum(high_L, unit_L), _MOST), high_L)
        level_LD = np.rint(_moved(anchor_LD, gradient_LD, high_L))
        short_L = _fall(anchor_LD, gradient_LD, level_LD) < fall_L
        if not short_L.any():
            break
    if (high_L - low_L <= _NARROW * high_L).all():
        return level_LD
    for _ in range(_BISECTIONS):
        middle_L = 0.5 * (low_L + high_L)
        middle_LD = np.rint(_moved(anchor_LD, gradient_LD, middle_L))
        enough_L = _fall(anchor_LD, gradient_LD, middle_LD) >= fall_L
        high_L = np.where(enough_L, middle_L, high_L)
        low_L = np.where(enough_L, low_L, middle_L)
    return np.rint(_moved(anchor_LD, gradient_LD, high_L))


def _multiplier(
    anchor_MD: np.ndarray, gradient_MD: np.ndarray, fall_M: np.ndarray, lambda_M: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """The lambda at which `<g, .>` has fallen by `fall` from `anchor` to `clip(anchor - lambda g)`; where none does.

    The fall is concave in lambda and piecewise linear, so Newton's method from any guess ends after a few steps.
    """
    low_MD, high_MD = -anchor_MD, LEVELS - anchor_MD
    line_MD, move_MD = np.empty_like(anchor_MD), np.empty_like(anchor_MD)
    stuck_M = np.zeros(len(fall_M), np.bool_)
    for _ in range(_NEWTON_STEPS):
        np.multiply(gradient_MD, -lambda_M[:, None], out=line_MD)
        np.clip(line_MD, low_MD, high_MD, out=move_MD)
        missing_M = fall_M + _rows_dot(gradient_MD, move_MD)
        wrong_M = np.abs(missing_M) > tolerance * np.abs(fall_M)
        if not wrong_M.any():
            break
        # Pixels that are at their bound move no further.
        np.multiply(gradient_MD, line_MD == move_MD, out=move_MD)
        free_M = _rows_dot(move_MD, gradient_MD)
        stuck_M = wrong_M & (missing_M > 0.0) & ~(free_M > 0.0)
        if (stuck_M == wrong_M).all():
            break
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            step_M = np.where(free_M > 0.0, missing_M / free_M, -0.5 * lambda_M)
            lambda_M = np.where(wrong_M & ~stuck_M, np.clip(lambda_M + step_M, 0.0, _MOST), lambda_M)
    return lambda_M, stuck_M


def _mix(
    old_MD: np.ndarray,
    old_left_M: np.ndarray,
    new_MD: np.ndarray,
    new_left_M: np.ndarray,
    move_MD: np.ndarray,
    free_MD: np.ndarray,
    mixed_M: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The share of the old cut in the mixture that both ask for, 0 unless `mixed`, and a guess of its lambda.

    Closest to the centre where both linear functions have fallen far enough, from the iterate by what is left, is a
    point of the plane that their gradients span, found from two equations; pixels at their bound stay there.
    """
    old_free_MD, new_free_MD = old_MD * free_MD, new_MD * free_MD
    old_old_M = _rows_dot(old_free_MD, old_free_MD)
    old_new_M = _rows_dot(old_free_MD, new_free_MD)
    new_new_M = _rows_dot(new_free_MD, new_free_MD)
    # Pixels at their bound have made their contribution, the others shall move anew.
    old_need_M = old_left_M - _rows_dot(old_free_MD, move_MD)
    new_need_M = new_left_M - _rows_dot(new_free_MD, move_MD)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        determinant_M = old_old_M * new_new_M - old_new_M * old_new_M
        old_M = (old_need_M * new_new_M - new_need_M * old_new_M) / determinant_M
        new_M = (new_need_M * old_old_M - old_need_M * old_new_M) / determinant_M
        share_M = np.minimum(np.where(new_M <= 0.0, 1.0, old_M / (old_M + new_M)), _MOST_OLD)
        known_M = mixed_M & np.isfinite(share_M) & (old_M > 0.0)
        lambda_M = np.where(known_M, old_M + np.maximum(new_M, 0.0), new_need_M / new_new_M)
    usable_M = np.isfinite(lambda_M) & (lambda_M > 0.0)
    return np.where(known_M, share_M, 0.0), np.where(usable_M, np.minimum(lambda_M, _MOST), 0.0)


def _moved(anchor_MD: np.ndarray, gradient_MD: np.ndarray, lambda_M: np.ndarray) -> np.ndarray:
    """`clip(anchor - lambda g)`."""
    moved_MD = gradient_MD * -lambda_M[:, None]
    moved_MD += anchor_MD
    return np.clip(moved_MD, 0.0, LEVELS, out=moved_MD)


def _fall(anchor_MD: np.ndarray, gradient_MD: np.ndarray, moved_MD: np.ndarray) -> np.ndarray:
    return _rows_dot(gradient_MD, anchor_MD - moved_MD)


def _bounded(gradient_MD: np.ndarray) -> np.ndarray:
    """Entries that are not numbers become 0, and none is so large that its square is infinite."""
    return np.clip(np.nan_to_num(gradient_MD), -_LARGEST, _LARGEST)


def _rows_dot(left_MD: np.ndarray, right_MD: np.ndarray) -> np.ndarray:
    return np.einsum("md,md->m", left_MD, right_MD)
