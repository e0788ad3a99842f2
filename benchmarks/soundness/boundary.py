"""Search for the nearest image of another class, down to neighbouring floats, on a classifier as it is served.

From each start (the service's own counterfactual, a descent to each of the nearest classes, attacks of a library):

1. *bisection* between the image and the point found, until two adjacent float64 positions differ in class;
2. *walk*: the boundary is replaced by its tangent, the point of the box nearest to the image on it is aimed at, and
   every ray between here and there is tried at shorter lengths than the best; repeated while it helps;
3. bisection again, then *float neighbours*: each pixel moved by a few units in its last place.

Each point found is a valid float64 image to which the service assigns another class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.soundness.exact import just_inside, ratio
from service.certificate import Certificate, Radii
from service.inference.classifier import Classifier, with_references
from service.pixels.distances import is_inside, squared_distance

BATCH_SIZES = (1, 2, 3, 7, 16, 64, 256)
"""Every point that counts is classified in batches of each of these sizes."""
_CHUNK = 512
_BISECTIONS = 70
_BLENDS = (1.0, 0.5, 0.2, 0.05)
_SHORTER = (0.1, 0.02, 0.004, 5e-4, 2e-5, 1e-7)
_SMALLEST_TRUST = 1e-5
_RAY_HALVINGS = 4


@dataclass(frozen=True)
class View:
    """A classifier as images of one shape meet it."""

    classifier: Classifier
    resize: bool = False

    def certificate(self, image_NCHW: np.ndarray) -> Certificate:
        """The certificate of images of this shape."""
        return self.classifier.view(image_NCHW.shape[1:], self.resize).certificate

    def largest(self, image_NCHW: np.ndarray) -> np.ndarray:
        """Radii with reference images."""
        view, count = self.classifier.view(image_NCHW.shape[1:], self.resize), len(image_NCHW)
        proved = with_references(view, image_NCHW, view.predict(image_NCHW), [None] * count, [True] * count)
        return np.array([prediction.radius for prediction in proved])

    def classify(self, image_NCHW: np.ndarray) -> tuple[np.ndarray, Radii]:
        """Logits N x K and radii, in one batch."""
        return self.classifier.classify(image_NCHW, self.resize)

    def classes(self, image_NCHW: np.ndarray) -> np.ndarray:
        """Classes, in batches of at most `_CHUNK`."""
        parts = [self.classify(image_NCHW[k : k + _CHUNK])[1].class_id_N for k in range(0, len(image_NCHW), _CHUNK)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def margin_gradient(self, image_NCHW: np.ndarray, weights_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits, and the gradient of their weighted sum with respect to the image that is sent."""
        parts = [
            self.classifier.margin_gradient(image_NCHW[k : k + _CHUNK], weights_NK[k : k + _CHUNK], self.resize)
            for k in range(0, len(image_NCHW), _CHUNK)
        ]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([gradient for _, gradient in parts])

    def classes_in_batches(self, image_NCHW: np.ndarray) -> np.ndarray:
        """Classes len(BATCH_SIZES) x N: of each image in batches of each size, filled up with the others."""
        return np.stack([self._classes_of(image_NCHW, size) for size in BATCH_SIZES])

    def _classes_of(self, image_NCHW: np.ndarray, size: int) -> np.ndarray:
        n = len(image_NCHW)
        batch_BN = np.arange(math.ceil(n / size) * size).reshape(-1, size) % max(n, 1)
        classes = [self.classify(image_NCHW[batch_N])[1].class_id_N for batch_N in batch_BN]
        return np.concatenate([np.zeros(0, np.int64), *classes])[:n]


@dataclass(frozen=True)
class Effort:
    """How hard to search."""

    rivals: int = 2
    """Nearest classes that are descended to."""
    walk: int = 30
    polish: int = 10
    trials: int = 24
    """Candidates of one round of `polish`."""


THOROUGH, QUICK = Effort(), Effort(rivals=1, walk=12, polish=4, trials=12)
RETRACE = Effort(rivals=0, walk=4, polish=4, trials=12)
"""For points that were found on nearly the same network."""


@dataclass(frozen=True)
class Search:
    """Result of the search from N images."""

    image_NCHW: np.ndarray
    class_N: np.ndarray
    radius_N: np.ndarray
    largest_N: np.ndarray
    """Radii with reference images: no point may lie inside."""
    naive_N: np.ndarray
    """Radii without the rounding error, `min (f_i - f_j) / K_ij`: those of a certificate in real arithmetic."""
    point_NCHW: np.ndarray
    """The nearest points found, or the image itself."""
    found_N: np.ndarray
    """Whether the point gets another class than the image in a batch of some size."""
    pulled_flips: int
    """Points pulled to the inside of the radius that get another class in a batch of some size; must be 0."""

    def first(self, n: int) -> Search:
        """Return the search from the first n images; `pulled_flips` still refers to all."""
        arrays = (self.image_NCHW, self.class_N, self.radius_N, self.largest_N, self.naive_N, self.point_NCHW)
        return Search(*(array[:n] for array in arrays), self.found_N[:n], self.pulled_flips)

    @property
    def violations(self) -> list[int]:
        """Images whose nearest point lies strictly inside the radius."""
        return [
            n
            for n in np.flatnonzero(self.found_N & (self.largest_N > 0)).tolist()
            if is_inside(self.image_NCHW[n], self.point_NCHW[n], float(self.largest_N[n]))
        ]

    @property
    def naive_broken(self) -> int:
        """Images whose nearest point lies strictly inside the radius without the rounding error."""
        return sum(
            is_inside(self.image_NCHW[n], self.point_NCHW[n], float(self.naive_N[n]))
            for n in np.flatnonzero(self.found_N & (self.naive_N > 0)).tolist()
        )

    @property
    def ratios(self) -> np.ndarray:
        """Distance over radius with reference images of each certified image from which a point was found."""
        return np.array(
            [
                ratio(self.image_NCHW[n], self.point_NCHW[n], float(self.largest_N[n]))
                for n in np.flatnonzero(self.found_N & (self.largest_N > 0)).tolist()
            ]
        )


def naive_radius(view: View, image_NCHW: np.ndarray) -> np.ndarray:
    """`min over j of (f_i - f_j) / K_ij` of each image: no rounding error accounted for."""
    logits_NK, radii = view.classify(image_NCHW)
    return np.maximum(_naive_ratios(view.certificate(image_NCHW), logits_NK, radii.class_id_N).min(axis=1), 0.0)


def _naive_ratios(certificate: Certificate, logits_NK: np.ndarray, class_N: np.ndarray) -> np.ndarray:
    row_N = np.arange(len(logits_NK))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_NK = (logits_NK[row_N, class_N][:, None] - logits_NK) / certificate.margin_bounds_KK[class_N]
    ratio_NK[row_N, class_N] = np.inf
    return ratio_NK


def search(
    view: View,
    image_NCHW: np.ndarray,
    rng: np.random.Generator,
    effort: Effort = THOROUGH,
    starts: Sequence[np.ndarray] | None = None,
) -> Search:
    """Look for the nearest image of another class from each of `image_NCHW` (float64, in [0, 1]).

    Args:
        view: the classifier.
        image_NCHW: where to search from.
        rng: of the float neighbours.
        effort: how hard.
        starts: arrays N x C x H x W to start from; default: `own_starts`.
    """
    _, radii = view.classify(image_NCHW)
    class_N = radii.class_id_N
    best_NCHW, best_N = image_NCHW.copy(), np.full(len(image_NCHW), np.inf)
    for start_NCHW in own_starts(view, image_NCHW, effort) if starts is None else starts:
        point_NCHW = np.clip(start_NCHW, 0.0, 1.0)
        flipped_N = view.classes(point_NCHW) != class_N
        index_M = np.flatnonzero(flipped_N)
        if len(index_M) == 0:
            continue
        origin, point, kind = image_NCHW[index_M], point_NCHW[index_M], class_N[index_M]
        point = _walk(view, origin, bisect(view, origin, point, kind, 12), kind, effort.walk // 4)
        distance_M = l2_norms(point - origin)
        nearer_M = distance_M < best_N[index_M]
        best_NCHW[index_M[nearer_M]] = point[nearer_M]
        best_N[index_M[nearer_M]] = distance_M[nearer_M]
    index_M = np.flatnonzero(np.isfinite(best_N))
    if len(index_M):
        origin, kind = image_NCHW[index_M], class_N[index_M]
        point = _walk(view, origin, best_NCHW[index_M], kind, effort.walk)
        point = bisect(view, origin, point, kind, _BISECTIONS)
        best_NCHW[index_M] = _polish(view, origin, point, kind, rng, effort)
    return judge(view, image_NCHW, class_N, radii.radius_N, best_NCHW)


def judge(
    view: View, image_NCHW: np.ndarray, class_N: np.ndarray, radius_N: np.ndarray, point_NCHW: np.ndarray
) -> Search:
    """Classify the points, and the same pulled inside of the largest radius, in batches of all sizes."""
    largest_N = view.largest(image_NCHW)
    pulled_NCHW = np.stack(
        [
            just_inside(image, point, float(radius)) if radius > 0 and (image != point).any() else image
            for image, point, radius in zip(image_NCHW, point_NCHW, largest_N, strict=True)
        ]
    )
    pulled_BN = view.classes_in_batches(pulled_NCHW) != class_N
    return Search(
        image_NCHW=image_NCHW,
        class_N=class_N,
        radius_N=radius_N,
        largest_N=largest_N,
        naive_N=naive_radius(view, image_NCHW),
        point_NCHW=point_NCHW,
        found_N=(view.classes_in_batches(point_NCHW) != class_N).any(axis=0),
        pulled_flips=int((pulled_BN.any(axis=0) & (largest_N > 0)).sum()),
    )


def bisect(
    view: View, image_MCHW: np.ndarray, point_MCHW: np.ndarray, class_M: np.ndarray, halvings: int
) -> np.ndarray:
    """The point of another class nearest to the image on each segment, as far as bisection sees.

    With `_BISECTIONS` halvings the two last positions on the segment are adjacent float64 numbers.
    """
    low_M, high_M = np.zeros(len(image_MCHW)), np.ones(len(image_MCHW))
    delta_MCHW = point_MCHW - image_MCHW
    best_MCHW = point_MCHW.copy()
    for _ in range(halvings):
        middle_M = 0.5 * (low_M + high_M)
        open_M = np.flatnonzero((middle_M > low_M) & (middle_M < high_M))
        if len(open_M) == 0:
            break
        tried = image_MCHW[open_M] + middle_M[open_M, None, None, None] * delta_MCHW[open_M]
        tried = np.clip(tried, 0.0, 1.0)
        flipped = view.classes(tried) != class_M[open_M]
        best_MCHW[open_M[flipped]] = tried[flipped]
        high_M[open_M[flipped]] = middle_M[open_M[flipped]]
        low_M[open_M[~flipped]] = middle_M[open_M[~flipped]]
    return best_MCHW


def _walk(view: View, image_MCHW: np.ndarray, point_MCHW: np.ndarray, class_M: np.ndarray, steps: int) -> np.ndarray:
    """Slide points of another class along the boundary towards their images; the distance only falls."""
    image_MD, point_MD = (array.reshape(len(array), -1) for array in (image_MCHW, point_MCHW.copy()))
    shape = image_MCHW.shape[1:]
    n_classes = len(view.classifier.labels)
    trust_M = np.ones(len(image_MD))
    for _ in range(steps):
        active_A = np.flatnonzero(trust_M > _SMALLEST_TRUST)
        if len(active_A) == 0:
            break
        origin_AD, at_AD = image_MD[active_A], point_MD[active_A]
        other_A = view.classes(at_AD.reshape(-1, *shape))
        row_A = np.arange(len(active_A))
        weights_AK = np.zeros((len(active_A), n_classes))
        weights_AK[row_A, class_M[active_A]] = 1.0
        weights_AK[row_A, other_A] = -1.0
        logits_AK, gradient = view.margin_gradient(at_AD.reshape(-1, *shape), weights_AK)
        gradient_AD = np.nan_to_num(gradient.reshape(len(active_A), -1))
        aim_AD = _closest_in_box(origin_AD, at_AD, gradient_AD, (weights_AK * logits_AK).sum(axis=1))
        distance_A = l2_norms(at_AD - origin_AD)
        candidates, lengths = [], []
        for blend in _BLENDS:
            toward_AD = at_AD + (blend * trust_M[active_A])[:, None] * (aim_AD - at_AD) - origin_AD
            norm_A = np.maximum(l2_norms(toward_AD), 1e-300)
            for shorter in _SHORTER:
                share_A = distance_A * (1.0 - shorter) / norm_A
                candidates.append(np.clip(origin_AD + share_A[:, None] * toward_AD, 0.0, 1.0))
                lengths.append(l2_norms(candidates[-1] - origin_AD))
        candidate_SAD, length_SA = np.stack(candidates), np.stack(lengths)
        class_SA = view.classes(candidate_SAD.reshape(-1, *shape)).reshape(length_SA.shape)
        length_SA = np.where(class_SA != class_M[active_A], length_SA, np.inf)
        best_A = length_SA.argmin(axis=0)
        better_A = length_SA[best_A, row_A] < distance_A
        index = active_A[better_A]
        if len(index):
            moved = candidate_SAD[best_A[better_A], row_A[better_A]].reshape(-1, *shape)
            # Only the last part of the ray is new: a few halvings between 0.9 of it and all of it.
            near = image_MCHW[index] + 0.9 * (moved - image_MCHW[index])
            still = view.classes(near) == class_M[index]
            origin = np.where(still[:, None, None, None], near, image_MCHW[index])
            moved = bisect(view, origin, moved, class_M[index], _RAY_HALVINGS)
            point_MD[index] = moved.reshape(len(index), -1)
        trust_M[active_A[~better_A]] *= 0.1
    return point_MD.reshape(image_MCHW.shape)


def _closest_in_box(
    anchor_MD: np.ndarray, at_MD: np.ndarray, gradient_MD: np.ndarray, margin_M: np.ndarray, steps: int = 40
) -> np.ndarray:
    """The point of [0, 1]^D closest to `anchor` where `margin + <gradient, x - at>` is 0: `clip(anchor - l gradient)`.

    The loss is concave and piecewise linear in l, so Newton's method from 0 ends after finitely many steps.
    """
    need_M = margin_M + np.einsum("md,md->m", gradient_MD, anchor_MD - at_MD)
    multiplier_M = np.zeros(len(anchor_MD))
    for _ in range(steps):
        moved_MD = anchor_MD - multiplier_M[:, None] * gradient_MD
        clipped_MD = np.clip(moved_MD, 0.0, 1.0)
        missing_M = need_M - np.einsum("md,md->m", gradient_MD, anchor_MD - clipped_MD)
        slope_M = np.where(moved_MD == clipped_MD, gradient_MD**2, 0.0).sum(axis=1)
        if not ((missing_M > 1e-15) & (slope_M > 0)).any():
            break
        multiplier_M = multiplier_M + np.where(slope_M > 0, missing_M / np.where(slope_M > 0, slope_M, 1.0), 0.0)
    return np.clip(anchor_MD - multiplier_M[:, None] * gradient_MD, 0.0, 1.0)


def _polish(
    view: View,
    image_MCHW: np.ndarray,
    point_MCHW: np.ndarray,
    class_M: np.ndarray,
    rng: np.random.Generator,
    effort: Effort,
) -> np.ndarray:
    """Float neighbours: random sets of pixels, from one to all, moved by a few units in the last place.

    Most moves are towards the image. A neighbour is taken if it has another class and is nearer, exactly.
    """
    best_MCHW = point_MCHW.copy()
    square_M = [squared_distance(image, point) for image, point in zip(image_MCHW, point_MCHW, strict=True)]
    for _ in range(effort.polish):
        candidate_SMCHW = np.stack([_neighbour(image_MCHW, best_MCHW, rng) for _ in range(effort.trials)])
        length_SM = l2_norms((candidate_SMCHW - image_MCHW).astype(np.longdouble))
        class_SM = view.classes(candidate_SMCHW.reshape(-1, *image_MCHW.shape[1:])).reshape(length_SM.shape)
        length_SM = np.where(class_SM != class_M, length_SM, np.inf)
        for m, s in enumerate(length_SM.argmin(axis=0).tolist()):
            if not np.isfinite(length_SM[s, m]):
                continue
            square = squared_distance(image_MCHW[m], candidate_SMCHW[s, m])
            if square < square_M[m]:
                best_MCHW[m], square_M[m] = candidate_SMCHW[s, m], square
    return best_MCHW


def _neighbour(image_MCHW: np.ndarray, point_MCHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n, d = len(point_MCHW), point_MCHW[0].size
    share = rng.choice([1.0 / d, 4.0 / d, 0.1, 0.5, 1.0])
    towards = rng.random(point_MCHW.shape) < rng.choice([0.55, 0.75, 1.0])
    moved = rng.random(point_MCHW.shape) < share
    if share * d <= 1:
        moved = np.zeros((n, d), bool)
        moved[np.arange(n), rng.integers(0, d, n)] = True
        moved = moved.reshape(point_MCHW.shape)
    target = np.where(towards, image_MCHW, 2.0 * point_MCHW - image_MCHW)
    result = point_MCHW
    for _ in range(int(rng.choice([1, 2, 8]))):
        result = np.where(moved, np.nextafter(result, target), result)
    return np.clip(result, 0.0, 1.0)


def own_starts(view: View, image_NCHW: np.ndarray, effort: Effort) -> list[np.ndarray]:
    """The service's counterfactual, and a descent to each of the nearest classes."""
    predictions = view.classifier.predict(image_NCHW, view.resize)
    answers = view.classifier.counterfactual(image_NCHW, predictions, [None] * len(predictions), view.resize)
    starts = [np.stack([answer.pixels_CHW / 255.0 for answer in answers])]
    logits_NK, radii = view.classify(image_NCHW)
    naive_NK = _naive_ratios(view.certificate(image_NCHW), logits_NK, radii.class_id_N)
    for rival_N in np.argsort(naive_NK, axis=1).T[: min(effort.rivals, logits_NK.shape[1] - 1)]:
        starts.append(_descend(view, image_NCHW, radii.class_id_N, rival_N))
    return starts


def _descend(
    view: View, image_NCHW: np.ndarray, class_N: np.ndarray, rival_N: np.ndarray, steps: int = 6
) -> np.ndarray:
    """Newton-like steps in the box to where the linearised margin to the rival is a little below 0."""
    row_N = np.arange(len(image_NCHW))
    weights_NK = np.zeros((len(image_NCHW), len(view.classifier.labels)))
    weights_NK[row_N, class_N], weights_NK[row_N, rival_N] = 1.0, -1.0
    anchor_ND = image_NCHW.reshape(len(image_NCHW), -1)
    at_ND, spare_N = anchor_ND, None
    for _ in range(steps):
        logits_NK, gradient = view.margin_gradient(at_ND.reshape(image_NCHW.shape), weights_NK)
        margin_N = (weights_NK * logits_NK).sum(axis=1)
        spare_N = 0.01 * np.abs(margin_N) if spare_N is None else spare_N
        at_ND = _closest_in_box(anchor_ND, at_ND, np.nan_to_num(gradient.reshape(len(row_N), -1)), margin_N + spare_N)
    return at_ND.reshape(image_NCHW.shape)


def l2_norms(delta: np.ndarray) -> np.ndarray:
    """Return L2 norms over the pixels in the format of `delta`: they guide the search and decide nothing."""
    return np.sqrt((delta * delta).sum(axis=-1 if delta.ndim == 2 else (-3, -2, -1)))
