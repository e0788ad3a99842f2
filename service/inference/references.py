"""The search for reference images, at which larger radii are proved; `service.certificate.reference` has the theorem.

A pair of classes with the linear margin `m + <g, z - x>` and the Lipschitz bound K has the radius `rho` with
`rho^2 = t^2 - c(z - x)` and `t = (m + <g, z - x> - 4 E) / K`. It is greatest at

    z = clip(x - t g / K, 0, 1) + t g / K:

the part of the step `-t g / K` that the box clips off is put back at its start. t is the root of a function that falls
with t, found by Newton's method. The margin of a network falls behind its linearisation, so a step goes only a part of
the way, two parts are measured, and the gradient is computed again at the better one. The certified radius is that of
the pair with the smallest radius, so a step belongs to that pair, and the search ends when that pair gains little.

Reference images of an 8-bit image are 8-bit. Pixels that do not move keep their values, so rounding costs little.

Axes: N batch, M images in progress, P parts of a step, K classes, C H W image as sent, D = C H W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from service.certificate import Certificate, pair_radii, reference_cost, reference_radii
from service.inference.closest import LEVELS, bounded, rows_dot
from service.inference.counterfactual import Differentiable
from service.pixels.images import to_unit
from service.shapes import Bool, Float64, Int64, UInt8

# Chosen on 1,000 training images of `mnist` and of `fashion-mnist-robust`.
_MAX_STEPS = 6
# The same where a radius is wanted and nearly reached.
_MAX_PATIENT_STEPS = 24
_NEARLY = 0.9
# Parts of the way to the best image of the linear margin.
_PARTS = np.array([0.7, 0.35])
# The next step of a pair goes at most this many times as far as the last one.
_GROWTH = 1.5
# Relative gain of the pair with the smallest radius below which a search ends.
_WORTHWHILE = 1e-2
_PATIENT = 1e-4
# Pairs of one image in one step: the one with the smallest radius, and others with at most this many times its radius.
_PAIRS = 2
_NEAR = 1.05
_NEWTON_STEPS = 10
_NEWTON_ERROR = 1e-6
# Largest slope of the function whose root is t: gradients are about K, and rounding may not turn its sign.
_FLATTEST = -1e-3
_LONGEST = 1e6


@dataclass(frozen=True)
class Reference:
    """An image at which the radius of one pair of classes is proved."""

    class_id: int
    """The rival: the other class of the pair is the predicted one."""
    pixels_CHW: UInt8[np.ndarray, "C H W"] | Float64[np.ndarray, "C H W"]
    """8-bit if the image as sent is, otherwise in [0, 1]."""


@dataclass(frozen=True)
class Proof:
    """The radius of one image and the reference images at which it is proved."""

    radius: float
    """L2, in [0, 1] pixel units, rounded down; at least the radius without reference images."""
    runner_up: int
    """The class that decides the radius."""
    lipschitz_bound: float
    """`K_ij` of the predicted class and the runner-up."""
    references: tuple[Reference, ...]
    """One for each class whose radius at the image as sent is below `radius`, by class."""
    steps: int
    """Gradients computed."""


class Provable(Differentiable, Protocol):
    """A classifier as the search sees it."""

    @property
    def certificate(self) -> Certificate:
        """About images as sent."""
        ...


def find_references(
    model: Provable,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    class_id_N: Int64[np.ndarray, " N"],
    logits_NK: Float64[np.ndarray, "N K"],
    epsilon_N: Float64[np.ndarray, " N"],
    largest_N: Bool[np.ndarray, " N"],
) -> list[Proof]:
    """Return the largest radius found for each image, with its proof.

    Args:
        model: classifies and differentiates.
        image_NCHW: pixels in [0, 1].
        class_id_N: predicted classes.
        logits_NK: as computed; an image with a radius of 0 has no reference images.
        epsilon_N: radii that are wanted, or 0: the search takes more steps where little is missing.
        largest_N: whether the search goes on for the largest radius when epsilon is reached.
    """
    search = _Search(model, image_NCHW, class_id_N, logits_NK, epsilon_N)
    search.run(largest_N)
    return search.proofs()


class _Search:
    """Ascent of one batch; images leave the work as they finish."""

    def __init__(
        self,
        model: Provable,
        image_NCHW: np.ndarray,
        class_id_N: np.ndarray,
        logits_NK: np.ndarray,
        epsilon_N: np.ndarray,
    ) -> None:
        certificate = model.certificate
        self.model = model
        self.shape = image_NCHW.shape[1:]
        self.start_ND = image_NCHW.reshape(len(image_NCHW), -1)
        self.class_id_N = class_id_N
        self.epsilon_N = epsilon_N
        self.bounds_NK = certificate.margin_bounds_KK[class_id_N]
        self.certificate = certificate
        finite_NK = np.where(np.all(np.isfinite(logits_NK), axis=1)[:, None], logits_NK, 0.0)
        self.sent_NK = pair_radii(finite_NK, class_id_N, self.bounds_NK, certificate.logit_error)
        """Radius of each pair, proved at the image as sent."""
        self.radius_NK = self.sent_NK.copy()
        """The largest proved radius of each pair."""
        self.references: list[dict[int, np.ndarray]] = [{} for _ in image_NCHW]
        """Pixels (D) at which that radius is proved, by rival; none where that is the image as sent."""
        self.settled_NK = np.zeros(logits_NK.shape, np.bool_)
        """Pairs that gained little in their last step."""
        self.reach_NK = np.ones_like(logits_NK)
        """Share of a step that is tried."""
        self.steps_N = np.zeros(len(image_NCHW), np.int64)
        self.is_8bit_N = (to_unit(np.rint(self.start_ND * LEVELS).astype(np.uint8)) == self.start_ND).all(axis=1)

    def run(self, largest_N: np.ndarray) -> None:
        """Step until no further step is worthwhile: all unfinished images at once, one gradient for each step."""
        for step in range(_MAX_PATIENT_STEPS):
            radius_N = self.radius_NK.min(axis=1)
            short_N = (radius_N < self.epsilon_N) & (radius_N >= _NEARLY * self.epsilon_N)
            live_N = largest_N | (radius_N < self.epsilon_N)
            index_M, rival_M = self._pairs(live_N & (short_N | (step < _MAX_STEPS)))
            if len(index_M) == 0:
                return
            before_M = self.radius_NK[index_M, rival_M]
            self._step(index_M, rival_M)
            gain_M = self.radius_NK[index_M, rival_M] / before_M - 1.0
            self.settled_NK[index_M, rival_M] = gain_M <= np.where(short_N[index_M], _PATIENT, _WORTHWHILE)

    def _pairs(self, live_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return image and rival of the pairs of the next step: those that decide a radius, and those close behind."""
        order_NP = np.argsort(self.radius_NK, axis=1, kind="stable")[:, :_PAIRS]
        radius_NP = np.take_along_axis(self.radius_NK, order_NP, axis=1)
        settled_NP = np.take_along_axis(self.settled_NK, order_NP, axis=1)
        least_N = radius_NP[:, 0]
        farthest = np.sqrt(self.start_ND.shape[1])
        live_N = live_N & (least_N > 0.0) & (least_N < farthest) & ~settled_NP[:, 0]
        with np.errstate(over="ignore"):
            # Of pairs whose margins never change.
            near_NP = radius_NP <= least_N[:, None] * _NEAR
        index_M, place_M = np.nonzero(live_N[:, None] & near_NP & ~settled_NP)
        return index_M, order_NP[index_M, place_M]

    def proofs(self) -> list[Proof]:
        """Return the result for each image."""
        runner_up_N = self.radius_NK.argmin(axis=1)
        row_N = np.arange(len(runner_up_N))
        radius_N = np.maximum(self.radius_NK[row_N, runner_up_N], 0.0)
        return [
            Proof(
                radius=radius,
                runner_up=runner_up,
                lipschitz_bound=float(self.bounds_NK[n, runner_up]),
                references=tuple(
                    Reference(int(k), self._pixels(n, self.references[n][int(k)]))
                    for k in np.flatnonzero((self.sent_NK[n] < radius) & (radius > 0.0))
                ),
                steps=steps,
            )
            for n, (radius, runner_up, steps) in enumerate(
                zip(radius_N.tolist(), runner_up_N.tolist(), self.steps_N.tolist(), strict=True)
            )
        ]

    def _step(self, live_M: np.ndarray, rival_M: np.ndarray) -> None:
        """Measure parts of the way to the best image of the linear margin, and record the radii proved there."""
        sent_MD = self.start_ND[live_M]
        at_MD = np.stack(
            [self.references[n].get(k, self.start_ND[n]) for n, k in zip(live_M, rival_M.tolist(), strict=True)]
        )
        best_MD = self._best_of_linear(live_M, rival_M, sent_MD, at_MD)
        share_MP = self.reach_NK[live_M, rival_M][:, None] * _PARTS
        tried_MPD = at_MD[:, None] + share_MP[:, :, None] * (best_MD - at_MD)[:, None]
        np.clip(tried_MPD, 0.0, 1.0, out=tried_MPD)
        rounded_M = self.is_8bit_N[live_M]
        tried_MPD[rounded_M] = to_unit(np.rint(tried_MPD[rounded_M] * LEVELS).astype(np.uint8))
        radius_MPK = self._measure(live_M, sent_MD, tried_MPD)
        row_M = np.arange(len(live_M))
        best_M = radius_MPK[row_M, :, rival_M].argmax(axis=1)
        self.reach_NK[live_M, rival_M] = np.minimum(share_MP[row_M, best_M] * _GROWTH, 1.0)
        for m, part, k in np.argwhere(radius_MPK > self.radius_NK[live_M][:, None]).tolist():
            if radius_MPK[m, part, k] > self.radius_NK[live_M[m], k]:
                self.radius_NK[live_M[m], k] = radius_MPK[m, part, k]
                self.references[live_M[m]][k] = tried_MPD[m, part].copy()

    def _best_of_linear(
        self, live_M: np.ndarray, rival_M: np.ndarray, sent_MD: np.ndarray, at_MD: np.ndarray
    ) -> np.ndarray:
        """Return the best reference image if the margin was linear, as it is at the last one."""
        row_M = np.arange(len(live_M))
        weights_MK = np.zeros((len(live_M), self.bounds_NK.shape[1]))
        weights_MK[row_M, self.class_id_N[live_M]] = 1.0
        weights_MK[row_M, rival_M] = -1.0
        logits_MK, gradient_MCHW = self.model.margin_gradient(at_MD.reshape(-1, *self.shape), weights_MK)
        self.steps_N[live_M] += 1
        bound_M = self.bounds_NK[live_M, rival_M]
        slope_MD = bounded(gradient_MCHW.reshape(len(live_M), -1)) / bound_M[:, None]
        margin_M = np.nan_to_num((weights_MK * logits_MK).sum(axis=1))
        value_M = (margin_M - 4.0 * self.certificate.logit_error) / bound_M + rows_dot(slope_MD, sent_MD - at_MD)
        return best_of_linear(sent_MD, slope_MD, value_M)

    def _measure(self, live_M: np.ndarray, sent_MD: np.ndarray, tried_MPD: np.ndarray) -> np.ndarray:
        """Return the radius of each pair that is proved at each image."""
        parts = tried_MPD.shape[1]
        tried_NCHW = tried_MPD.reshape(-1, *self.shape)
        logits_NK, _ = self.model.classify(tried_NCHW)
        radius_NK = reference_radii(
            logits_NK,
            np.repeat(self.class_id_N[live_M], parts),
            reference_cost(np.repeat(sent_MD, parts, axis=0).reshape(tried_NCHW.shape), tried_NCHW),
            np.repeat(self.bounds_NK[live_M], parts, axis=0),
            self.certificate.logit_error,
        )
        return radius_NK.reshape(len(live_M), parts, -1)

    def _pixels(self, n: int, pixels_D: np.ndarray) -> np.ndarray:
        pixels_CHW = pixels_D.reshape(self.shape)
        return np.rint(pixels_CHW * LEVELS).astype(np.uint8) if self.is_8bit_N[n] else pixels_CHW


def best_of_linear(
    sent_MD: Float64[np.ndarray, "M D"], slope_MD: Float64[np.ndarray, "M D"], value_M: Float64[np.ndarray, " M"]
) -> Float64[np.ndarray, "M D"]:
    """Return the reference images with the largest radius for pairs with a linear margin.

    Args:
        sent_MD: x, pixels in [0, 1].
        slope_MD: gradient of the margin, over K; of norm 1 at most, up to rounding.
        value_M: the margin less `4 E` at x, over K.
    """
    step_M = np.maximum(value_M, 0.0)
    best_MD = sent_MD
    for _ in range(_NEWTON_STEPS):
        step_MD = slope_MD * step_M[:, None]
        low_MD, high_MD = step_MD > sent_MD, step_MD < sent_MD - 1.0
        # Not by adding the step again: unmoved pixels keep their bits.
        back_MD = np.where(low_MD, step_MD, np.where(high_MD, 1.0 + step_MD, sent_MD))
        best_MD = np.clip(back_MD, 0.0, 1.0)
        missing_M = value_M + rows_dot(slope_MD, best_MD - sent_MD) - step_M
        wrong_M = np.abs(missing_M) > _NEWTON_ERROR * step_M
        if not wrong_M.any():
            break
        # Pixels that move with t: clipped on the way down, and not yet at the other end of the box.
        moving_MD = (low_MD | high_MD) & (back_MD == best_MD)
        fall_M = np.minimum(rows_dot(slope_MD * moving_MD, slope_MD) - 1.0, _FLATTEST)
        step_M = np.where(wrong_M, np.clip(step_M - missing_M / fall_M, 0.0, _LONGEST), step_M)
    return best_MD
