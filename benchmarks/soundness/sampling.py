"""Samples of balls around images that lie just in front of the boundary, where rounding decides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.soundness.boundary import Search, View, l2_norms, naive_radius
from benchmarks.soundness.exact import just_inside
from service.pixels.distances import is_inside


@dataclass(frozen=True)
class Sampled:
    """Results at points inside of balls around images just in front of the boundary."""

    images: int
    points: int
    flips: int
    """Points strictly inside the radius with another class; must be 0."""
    naive_images: int
    naive_broken: int
    """Images with a point strictly inside the radius without the rounding error that has another class."""


# Computed margins of the images that `near_boundary` makes, in units of E. A radius is positive above 4.
_CERTIFIED_MARGINS = (4.0 + 1e-7, 4.001, 4.1, 6.0, 100.0)
_NAIVE_MARGINS = (1e-4, 1e-3, 1e-2, 0.1)


def near_boundary(view: View, found: Search, rng: np.random.Generator, samples: int = 48) -> Sampled:
    """Return results for images whose margin is a small multiple of `logit_error`.

    Rounding decides there: the images are taken from the segment between an image and the point found from it, then the
    ball of the certified radius (and that of the radius without error, of images with smaller margins) is sampled along
    the gradient, along its signs and in random directions, on its surface and inside.
    """
    keep_N = found.found_N
    image_NCHW, point_NCHW, class_N = found.image_NCHW[keep_N], found.point_NCHW[keep_N], found.class_N[keep_N]
    if len(image_NCHW) == 0:
        return Sampled(0, 0, 0, 0, 0)
    error = view.certificate(image_NCHW).logit_error
    images = points = flips = naive_images = naive_broken = 0
    for factor in (*_CERTIFIED_MARGINS, *_NAIVE_MARGINS):
        near_NCHW = _with_margin(view, image_NCHW, point_NCHW, class_N, factor * error)
        _, radii = view.classify(near_NCHW)
        naive = factor in _NAIVE_MARGINS
        radius_N = naive_radius(view, near_NCHW) if naive else view.largest(near_NCHW)
        usable = np.flatnonzero((radii.class_id_N == class_N) & (radius_N > 0))
        if len(usable) == 0:
            continue
        near, radius, kind = near_NCHW[usable], radius_N[usable], class_N[usable]
        broken = np.zeros(len(usable), bool)
        for candidate in _in_ball(view, near, radius, kind, rng, samples):
            flipped = np.flatnonzero((view.classes(candidate) != kind) & ~broken)
            for n in flipped.tolist():
                if is_inside(near[n], candidate[n], float(radius[n])):
                    broken[n] = True
                    flips += not naive
        if not naive:
            last = np.stack(
                [just_inside(a, b, float(r)) for a, b, r in zip(near, point_NCHW[usable], radius, strict=True)]
            )
            flips += int((view.classes_in_batches(last) != kind).any(axis=0).sum())
        images += 0 if naive else len(usable)
        points += 0 if naive else len(usable) * (samples + 1)
        naive_images += len(usable) if naive else 0
        naive_broken += int(broken.sum()) if naive else 0
    return Sampled(images, points, flips, naive_images, naive_broken)


def _with_margin(
    view: View, image_NCHW: np.ndarray, point_NCHW: np.ndarray, class_N: np.ndarray, margin: float
) -> np.ndarray:
    """The last image on each segment, as far as bisection sees, whose computed margin is above `margin`."""
    low_N, high_N = np.zeros(len(image_NCHW)), np.ones(len(image_NCHW))
    row_N = np.arange(len(image_NCHW))
    for _ in range(60):
        middle_N = 0.5 * (low_N + high_N)
        tried = np.clip(image_NCHW + middle_N[:, None, None, None] * (point_NCHW - image_NCHW), 0.0, 1.0)
        logits_NK = view.classify(tried)[0].copy()
        own_N = logits_NK[row_N, class_N]
        logits_NK[row_N, class_N] = -np.inf
        above_N = own_N - logits_NK.max(axis=1) > margin
        low_N, high_N = np.where(above_N, middle_N, low_N), np.where(above_N, high_N, middle_N)
    return np.clip(image_NCHW + low_N[:, None, None, None] * (point_NCHW - image_NCHW), 0.0, 1.0)


def _in_ball(
    view: View,
    image_NCHW: np.ndarray,
    radius_N: np.ndarray,
    class_N: np.ndarray,
    rng: np.random.Generator,
    samples: int,
) -> list[np.ndarray]:
    logits_NK, _ = view.classify(image_NCHW)
    row_N = np.arange(len(image_NCHW))
    weights_NK = np.zeros_like(logits_NK)
    weights_NK[row_N, class_N] = 1.0
    logits_NK = logits_NK.copy()
    logits_NK[row_N, class_N] = -np.inf
    weights_NK[row_N, logits_NK.argmax(axis=1)] = -1.0
    _, gradient = view.margin_gradient(image_NCHW, weights_NK)
    gradient = -np.nan_to_num(gradient)
    gradient /= np.maximum(l2_norms(gradient), 1e-300)[:, None, None, None]
    found = []
    for s in range(samples):
        noise = rng.standard_normal(image_NCHW.shape)
        noise /= l2_norms(noise)[:, None, None, None]
        direction = gradient + (0.0, 0.1, 0.5, 2.0)[s % 4] * noise
        if s % 8 == 7:
            direction = np.sign(gradient) * (rng.random(image_NCHW.shape) < 0.5)
        direction /= np.maximum(l2_norms(direction), 1e-300)[:, None, None, None]
        length_N = radius_N * (1.0 - 2.0**-45 if s % 3 == 0 else rng.uniform(0.3, 1.0))
        found.append(np.clip(image_NCHW + length_N[:, None, None, None] * direction, 0.0, 1.0))
    return found
