"""Counterfactuals: the nearest image found with another class, as the 8-bit image that the client receives.

Theory. A network trained with the hKR loss approaches, as its loss falls, the Kantorovich potential between
the classes, and its gradient then points along the optimal transport plan (Serrurier et al. 2021; Béthune et
al. 2022). Descending the margin `m = f_i - f_j` along its gradient therefore moves an image towards the
images of class j.

Cuts. A run of the transport graph at `x_k` gives the cut `m_k + <g_k, x - x_k>`: the margin linearised at `x_k`.
The closest point of the box to the first image `x_0` where one cut is at most `-s` is
`clip(x_0 - lambda g, 0, 1)` with one scalar lambda; without the box that is the Newton-like step `x - (1 + s') m g /
||g||^2` of the design. A convex margin lies above all its cuts, and the closest point where *all* cuts are at most `-s`
is better than that of any one. By duality that point belongs to one mixture of the cuts, the one that is farthest away,
and the mixture stands for both of its cuts when the next one comes (aggregation: Kiwiel 1985; Lemaréchal, Nemirovskii
and Nesterov 1995). So a step costs one run, and its memory is one gradient.

Aim. Between two cuts the margin lies above both. A margin that is a parabola along the way exceeds the cuts where they
meet by a quarter of its excess over the first cut where the second was made. That excess is known, so the next image
is aimed that much lower, and most often it is across the boundary, by little: two runs find at least 95 % of the
answers of ordinary networks.

Rounding. The answer is 8-bit, and on that grid the closest point is `round(clip(x_0 - lambda g))`: rounding is part of
the step, so that it cannot undo the step.

Beyond. `service.inference.strength` goes on from the answer, for a client that wants an image farther across.

Measurement. A candidate is classified by the path that serves predictions, and counts as reached only if its class is
certified (margin above `4 logit_error`), because its class is then the same in any batch.

Axes: N batch, M images in progress, C channels, H and W of the image as sent, K classes, D = C H W.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import numpy as np

from service.certificate import Radii
from service.inference.candidates import Candidates, Measured
from service.inference.closest import (
    LEVELS,
    bounded,
    closest_levels_in_doubles,
    l2_distance,
    mix,
    moved,
    multiplier,
    rows_dot,
)
from service.shapes import Float64, Int64, UInt8

# Chosen on test images of the shipped models; docs/counterfactuals.md has the results.
# Most runs of one image: ordinary networks need two to four, detectors under a global maximum one run each.
_MAX_STEPS = 48
# Steps without a lower margin that end a search.
_MOST_MISSES = 12
# Aim beyond the first cut, in units of the first margin.
_FIRST_AIM = 0.04
# Aim beyond a cut made elsewhere than at the first image, in the same units; doubled after each step that did not lower
# the margin.
_NEXT_AIM = 0.02
# Aim beyond a mixture, in units of the last excess of the margin: more than the quarter of a parabola, so that nearly
# all images get across.
_EXCESS = 0.42
# Limit of that aim, in units of the first margin.
_MOST_EXCESS = 0.06
# Added to that aim, in the same units.
_AIM = 0.003
# An answer across the boundary by less than this fraction of its distance ends the search.
_ACROSS = 0.1
# Least relative gain of distance for which the search continues after an answer farther across.
_WORTHWHILE = 0.02
# Runs without an answer after which the search continues from each image that lowers the margin, not from the first
# image: along a kinked path the mixture forgets cuts that it would need.
_MOVE_ON_AFTER = 4
# Relative error of the fall in the first step.
_FIRST_ERROR = 1e-2


@dataclass(frozen=True)
class Counterfactual:
    """The image found for one image of a batch, as measured."""

    pixels_CHW: UInt8[np.ndarray, "C H W"]
    """The image that the client receives; posted back, it gets `class_id`."""
    class_id: int
    distance: float
    """L2 distance between the image as sent and `pixels_CHW / 255`, in [0, 1] pixel units; see `l2_distance`."""
    reached: bool
    """Whether the target class (without a target: another class) was reached."""
    steps: int = 0
    """Gradients computed."""
    nearest_distance: float | None = None
    """Distance of the nearest one found; null for the nearest one itself, see `service.inference.strength`."""


@runtime_checkable
class Differentiable(Protocol):
    """A classifier as the search sees it: pixels of the image as sent, in [0, 1]."""

    def classify(self, image_NCHW: Float64[np.ndarray, "N C H W"]) -> tuple[Float64[np.ndarray, "N K"], Radii]:
        """Return logits and radii, by the path that serves predictions."""
        ...

    def margin_gradient(
        self, image_NCHW: Float64[np.ndarray, "N C H W"], weights_NK: Float64[np.ndarray, "N K"]
    ) -> tuple[Float64[np.ndarray, "N K"], Float64[np.ndarray, "N C H W"]]:
        """Return logits, and the gradient of `sum_k weights[k] logits[k]` with respect to the image."""
        ...


def find_counterfactuals(
    model: Differentiable,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    class_id_N: Int64[np.ndarray, " N"],
    runner_up_N: Int64[np.ndarray, " N"],
    radius_N: Float64[np.ndarray, " N"],
    n_classes: int,
    target_N: Int64[np.ndarray, " N"],
    logit_error: float = 0.0,
) -> list[Counterfactual]:
    """Return the nearest images found that `model` assigns another class than `class_id_N`, or exactly `target_N`.

    Args:
        model: classifies and differentiates; called with batches of at most a few times N images.
        image_NCHW: pixels in [0, 1].
        class_id_N: predicted classes, each of which differs from its target.
        runner_up_N: class to descend towards first where there is no target.
        radius_N: certified radii; no answer is nearer. Where nothing is reached, the answer is the image with
            the lowest margin left among those at least that far. Only if the radius exceeds the distance to
            every image tried, the farthest corner of the box included, is the answer that corner.
        n_classes: K.
        target_N: target classes; -1 for any other class.
        logit_error: bound of the error of a computed logit; the search aims at margins of less than minus four times
            that, since an answer has to be certain of its class.
    """
    if len(image_NCHW) == 0:
        return []
    candidates = Candidates(model.classify, image_NCHW, class_id_N, target_N, radius_N)
    search = _Search(model, candidates, runner_up_N, n_classes, LEVELS * 4.0 * logit_error)
    search.descend()
    candidates.settle(search.first_slope_ND)
    pixels_NCHW, found_class_N, reached_N = candidates.best()
    return [
        Counterfactual(pixels_CHW, class_id, distance, reached, steps)
        for pixels_CHW, class_id, distance, reached, steps in zip(
            pixels_NCHW,
            found_class_N.tolist(),
            l2_distance(image_NCHW, pixels_NCHW).tolist(),
            reached_N.tolist(),
            search.steps_N.tolist(),
            strict=True,
        )
    ]


class _Search:
    """Descent of one batch; images leave the work as they finish.

    Logits are in units of 1 / 255, as pixels are, so that gradients are those of the model. A margin is counted from
    the one at which the other class is certain.
    """

    def __init__(
        self, model: Differentiable, candidates: Candidates, runner_up_N: np.ndarray, n_classes: int, slack: float
    ) -> None:
        """Start at the images as sent.

        Args:
            model: see `find_counterfactuals`.
            candidates: of these images.
            runner_up_N: see `find_counterfactuals`.
            n_classes: K.
            slack: margin of the other class at which it is certain, in units of 1 / 255.
        """
        self.model = model
        self.slack = slack
        self.candidates = candidates
        self.n_classes = n_classes
        target_N = candidates.target_N
        n_images = len(target_N)
        start_ND = candidates.image_NCHW.reshape(n_images, -1) * LEVELS
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
            falling_M=candidates.class_id_N,
            rising_M=np.where(target_N < 0, runner_up_N, target_N),
        )
        self.steps_N = np.zeros(n_images, np.int64)
        self.first_slope_ND = self.live.slope_MD
        """Gradient at the images as sent: the last way down for images without a candidate."""

    def descend(self) -> None:
        """Step until no further step is worthwhile: all unfinished images at once, one run for each step."""
        self._first_step()
        for step in range(1, _MAX_STEPS):
            if len(self.live.index_M) == 0:
                return
            self._step(may_move_on=step + 1 >= _MOVE_ON_AFTER)

    def _first_step(self) -> None:
        """Move to the closest point beyond the first cut; most often it is not across, so it is not classified."""
        live = self.live
        margin_M, gradient_MD, _ = self._run(self.candidates.image_NCHW)
        live.scale_M = np.abs(margin_M) + np.finfo(np.float32).tiny
        live.lowest_M = margin_M
        live.slope_MD, live.value_M, live.rival_M = gradient_MD, margin_M, live.rising_M
        self.first_slope_ND = gradient_MD
        need_M = margin_M + _FIRST_AIM * live.scale_M
        with np.errstate(divide="ignore", invalid="ignore"):
            guess_M = np.nan_to_num(need_M / rows_dot(gradient_MD, gradient_MD), posinf=0.0, neginf=0.0)
        lambda_M, _ = multiplier(live.centre_MD, gradient_MD, need_M, guess_M, _FIRST_ERROR)
        live.at_MD = moved(live.centre_MD, gradient_MD, lambda_M)

    def _step(self, may_move_on: bool) -> None:
        """Run at the iterate, mix its cut with the last mixture, and measure the closest image beyond the mixture."""
        live = self.live
        margin_M, gradient_MD, logits_MK = self._run(self.candidates.images(live.at_MD))
        last_MD = live.at_MD
        move_MD = live.at_MD - live.centre_MD
        new_fall_M, old_fall_M = -rows_dot(gradient_MD, move_MD), -rows_dot(live.slope_MD, move_MD)
        cut_M = margin_M + new_fall_M
        mixed_M = live.rival_M == live.rising_M
        # With a target the margin is the greatest of several, and the greatest exceeds the mixture.
        highest_M = LEVELS * self.candidates.margins(live.index_M, logits_MK).margin_L + self.slack
        excess_M = np.where(self.candidates.target_N[live.index_M] < 0, margin_M, highest_M) - (
            live.value_M - old_fall_M
        )
        aim_M = np.where(
            mixed_M,
            np.clip(_EXCESS * excess_M, 0.0, _MOST_EXCESS * live.scale_M) + _AIM * live.scale_M,
            _NEXT_AIM * live.scale_M * 2.0**live.misses_M,
        )
        free_MD = (live.at_MD > 0.0) & (live.at_MD < LEVELS)
        share_M, lambda_M = mix(
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
        live.at_MD = closest_levels_in_doubles(live.centre_MD, slope_MD, live.value_M + aim_M, lambda_M)

        before_M = self.candidates.found_distance_N[live.index_M]
        measured = self.candidates.measure(live.index_M, live.at_MD, live.start_MD)
        live.falling_M, live.rising_M = measured.falling_L, measured.rising_L
        margin_M = LEVELS * measured.margin_L + self.slack
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

    def _centre(self, measured: Measured, margin_M: np.ndarray, may_move_on: bool) -> None:
        """Set the centre of the next step: the first image, or on long ways the iterate with the least margin."""
        live = self.live
        missing_M = np.isinf(self.candidates.found_distance_N[live.index_M])
        lower_M = margin_M < live.lowest_M
        live.lowest_M = np.minimum(live.lowest_M, margin_M)
        if may_move_on:
            live.misses_M += missing_M & ~lower_M
            moves_M = missing_M & lower_M
            live.centre_MD = np.where(moves_M[:, None], live.at_MD, live.centre_MD)
            live.rival_M = np.where(moves_M, -1, live.rival_M)
        # After an answer found from elsewhere: back to the first image, with the way to the answer as its cut.
        back_M = measured.better_L & (live.centre_MD != live.start_MD).any(axis=1)
        if back_M.any():
            way_BD = live.at_MD[back_M] - live.start_MD[back_M]
            # A secant from the first margin to that of the answer.
            steepness_B = (live.scale_M - margin_M)[back_M] / rows_dot(way_BD, way_BD)
            live.slope_MD[back_M] = -steepness_B[:, None] * way_BD
            live.value_M[back_M] = live.scale_M[back_M]
            live.rival_M = np.where(back_M, live.rising_M, live.rival_M)
            live.centre_MD = np.where(back_M[:, None], live.start_MD, live.centre_MD)

    def _run(self, image_MCHW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return margin (M) and gradient (M x D) of the pair, in units of 1 / 255, and logits (M x K) at images."""
        live = self.live
        row_M = np.arange(len(live.index_M))
        weights_MK = np.zeros((len(row_M), self.n_classes))
        weights_MK[row_M, live.falling_M] = 1.0
        weights_MK[row_M, live.rising_M] = -1.0
        logits_MK, gradient_MCHW = self.model.margin_gradient(image_MCHW, weights_MK)
        self.steps_N[live.index_M] += 1
        gradient_MD = gradient_MCHW.reshape(len(row_M), -1)
        odd_M = ~np.isfinite(rows_dot(gradient_MD, gradient_MD))
        if odd_M.any():
            # The gradient graph carries no proof; a pixel whose entry is not a number does not move.
            gradient_MD = np.where(odd_M[:, None], bounded(gradient_MD), gradient_MD)
        margin_M = LEVELS * np.nan_to_num((weights_MK * logits_MK).sum(axis=1)) + self.slack
        return margin_M, gradient_MD, logits_MK


@dataclass
class _Live:
    """The images in progress."""

    index_M: np.ndarray
    """Their places in the batch."""
    start_MD: np.ndarray
    """The image as sent, in units of 1 / 255; not rounded."""
    centre_MD: np.ndarray
    """The image to which the next step finds the closest point."""
    at_MD: np.ndarray
    """The iterate."""
    slope_MD: np.ndarray
    """The mixture of cuts is `value + <slope, x - centre>`."""
    value_M: np.ndarray
    rival_M: np.ndarray
    """The class whose logit is in the mixture; -1 without a mixture."""
    scale_M: np.ndarray
    """|margin| at the start."""
    lowest_M: np.ndarray
    """Least margin so far."""
    misses_M: np.ndarray
    """Steps that did not lower the margin."""
    falling_M: np.ndarray
    """Class i of the margin `f_i - f_j`, whose logit falls."""
    rising_M: np.ndarray

    def keep(self, unfinished_M: np.ndarray) -> None:
        """Drop all other images."""
        if not unfinished_M.all():
            for field in fields(self):
                setattr(self, field.name, getattr(self, field.name)[unfinished_M])
