"""Networks whose distance to the boundary is known exactly: a wrong radius is noticed.

Layers are affine, square and orthogonal without rounding (`hadamard`), between them pairs are sorted, and the head is
affine. On each piece of such a network the margin of two classes has a gradient of norm `||w_i - w_j||`, which the
certificate bounds: where the piece reaches to the boundary the distance is `margin / ||w_i - w_j||` exactly, a
quotient of rationals once squared.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from builders import Affine, Graphs, dense, load

from benchmarks.soundness.boundary import Effort, Search, View, naive_radius, search
from benchmarks.soundness.graphs import hadamard
from service.inference.classifier import Classifier
from service.pixels.distances import is_inside

_GRID = 2.0**-24
"""Spacing of float32 in [1/2, 1)."""
_LARGEST_BALL = 6.5 * _GRID


@dataclass(frozen=True)
class Network:
    """A network in exact arithmetic and as it is served."""

    hidden: list[Affine]
    head: Affine
    shape: tuple[int, int, int]
    dtype: type
    classifier: Classifier = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "classifier", load(self.graphs()))

    def graphs(self) -> Graphs:
        """Return the network as ONNX graphs."""
        return dense(self.hidden, self.head, self.shape, self.dtype, "Gemm")

    def _sorted(self, pixels_D: list[Fraction]) -> tuple[list[Fraction], list[list[bool]]]:
        """Return the exact input of the head, and for each hidden layer which pairs are in order."""
        orders, value = [], pixels_D
        for weight_MN, bias_M in self.hidden:
            value = _affine(self.dtype, weight_MN, bias_M, value)
            left, right = value[: len(value) // 2], value[len(value) // 2 :]
            orders.append([a >= b for a, b in zip(left, right, strict=True)])
            value = [*map(max, left, right), *map(min, left, right)]
        return value, orders

    def logits(self, pixels_D: list[Fraction]) -> list[Fraction]:
        """Return the exact logits."""
        return _affine(self.dtype, *self.head, self._sorted(pixels_D)[0])

    def gradient(self, pixels_D: list[Fraction], i: int, j: int) -> list[Fraction]:
        """Return the exact gradient of `f_i - f_j` on the piece around an image.

        Args:
            pixels_D: the image.
            i: class.
            j: another class.
        """
        _, orders = self._sorted(pixels_D)
        rows = _exactly(self.dtype, self.head[0])
        flow = [a - b for a, b in zip(rows[i], rows[j], strict=True)]
        for (weight_MN, _), order in zip(reversed(self.hidden), reversed(orders), strict=True):
            high, low = flow[: len(order)], flow[len(order) :]
            swapped = zip(high, low, order, strict=True)
            pairs = [(h, m) if in_order else (m, h) for h, m, in_order in swapped]
            flow = [*(a for a, _ in pairs), *(b for _, b in pairs)]
            columns = zip(*_exactly(self.dtype, weight_MN), strict=True)
            flow = [sum((w * f for w, f in zip(column, flow, strict=True)), Fraction(0)) for column in columns]
        return flow

    def squared_distances(self, image_CHW: np.ndarray, class_id: int) -> list[Fraction]:
        """Squared distances to images in the box that tie `class_id` with another class: one for each class whose
        boundary the piece around the image reaches."""
        pixels = [Fraction(value) for value in image_CHW.ravel().tolist()]
        logits, found = self.logits(pixels), []
        for j in range(len(logits)):
            if j == class_id:
                continue
            margin = logits[class_id] - logits[j]
            gradient = self.gradient(pixels, class_id, j)
            square = sum((g * g for g in gradient), Fraction(0))
            there = [p - margin / square * g for p, g in zip(pixels, gradient, strict=True)]
            at = self.logits(there)
            if all(0 <= p <= 1 for p in there) and at[class_id] == at[j]:
                found.append(margin * margin / square)
        return found


@dataclass
class Known:
    """Results for images of several networks."""

    searches: list[Search] = field(default_factory=list)
    attained: int = 0
    """Distances that are known exactly."""
    beyond: int = 0
    """Radii above such a distance; must be 0."""
    smallest: float = math.inf
    """Smallest exact distance over radius."""
    worst_error: float = 0.0
    """Largest |computed - exact logit|, as a share of `logit_error`."""


def random_network(rng: np.random.Generator, depth: int, size: int, classes: int, dtype: type) -> Network:
    """An isometric network of `depth` hidden layers on `size` pixels, `size` a power of 4 (a square image)."""
    hidden = [(hadamard(size), rng.standard_normal(size)) for _ in range(depth)]
    side = math.isqrt(size)
    head = rng.standard_normal((classes, size))
    # Through the middle of the box, so that boundaries are near.
    middle = _forward(hidden, np.full(size, 0.5))
    return Network(hidden, (head, -head @ middle + 0.1 * rng.standard_normal(classes)), (1, side, side), dtype)


def examine(networks: list[Network], rng: np.random.Generator, images: int, effort: Effort) -> Known:
    """Radii of random images against exact distances, exact logits, and the search."""
    known = Known()
    for network in networks:
        image_NCHW = rng.uniform(0.2, 0.8, (images, *network.shape))
        predictions = network.classifier.predict(image_NCHW)
        largest = View(network.classifier).largest(image_NCHW).tolist()
        for image_CHW, prediction, radius in zip(image_NCHW, predictions, largest, strict=True):
            exact = network.logits([Fraction(value) for value in image_CHW.ravel().tolist()])
            errors = [abs(Fraction(a) - b) for a, b in zip(prediction.logits_K.tolist(), exact, strict=True)]
            known.worst_error = max(known.worst_error, float(max(errors) / Fraction(prediction.logit_error)))
            if not prediction.certified:
                continue
            for square in network.squared_distances(image_CHW, prediction.class_id):
                known.attained += 1
                known.beyond += Fraction(radius) ** 2 > square
                known.smallest = min(known.smallest, math.sqrt(square / Fraction(prediction.radius) ** 2))
        known.searches.append(search(View(network.classifier), image_NCHW, rng, effort))
    return known


@dataclass
class Exhausted:
    """Balls of float32 images of 4 pixels, every image of them classified."""

    images: int = 0
    points: int = 0
    flips: int = 0
    """Images of another class strictly inside of the radius."""
    broken: int = 0
    """Balls that hold such an image."""

    def add(self, other: Exhausted) -> None:
        """Count the balls of `other`, too."""
        self.images += other.images
        self.points += other.points
        self.flips += other.flips
        self.broken += other.broken


def exhaust(network: Network, rng: np.random.Generator, images: int, naive: bool) -> Exhausted:
    """All images that a float32 graph can tell apart in balls of a few float32 steps, on images of 4 pixels.

    A float64 image is rounded to float32 first, so that the images of a ball fall into finitely many classes of equal
    computation; each is represented by its member nearest to the centre. The centres have computed margins just above
    `4 E`, where a small radius is certified; with `naive` just above 0, and the radius is that without rounding errors.
    """
    done, view = Exhausted(), View(network.classifier)
    certificate = network.classifier.certificate
    for _ in range(20 * images):
        if done.images == images:
            break
        image_NCHW = rng.uniform(0.5, 1.0, (2, *network.shape))
        _, radii = view.classify(image_NCHW)
        i, j = radii.class_id_N.tolist()
        if i == j:
            continue
        bound = certificate.margin_bounds_KK[i, j]
        wanted = rng.uniform(1.0, 5.0) * _GRID * bound + (0.0 if naive else 4.0 * certificate.logit_error)
        centre = _on_grid_with_margin(view, image_NCHW, i, wanted)
        _, radii = view.classify(centre[None])
        radius = float((naive_radius(view, centre[None]) if naive else radii.radius_N)[0])
        if radii.class_id_N[0] != i or not 0.0 < radius < _LARGEST_BALL:
            continue
        point_SCHW = ball_of_float32(centre, radius)
        flipped = np.flatnonzero(view.classes(point_SCHW) != i)
        alone = rng.choice(len(point_SCHW), min(64, len(point_SCHW)), replace=False)
        singles = [s for s in alone.tolist() if view.classes(point_SCHW[s : s + 1])[0] != i]
        refuted = sum(is_inside(centre, point_SCHW[s], radius) for s in {*flipped.tolist(), *singles})
        done.images += 1
        done.points += len(point_SCHW)
        done.flips += refuted
        done.broken += refuted > 0
    return done


def ball_of_float32(centre_CHW: np.ndarray, radius: float) -> np.ndarray:
    """For each combination of float32 pixels in reach: the float64 image nearest to the centre that rounds to it.

    The centre holds float32 numbers in [1/2, 1); a few images on the sphere or just outside are returned, too.
    """
    reach = math.ceil(radius / _GRID + 0.5)
    axes = []
    for pixel in centre_CHW.ravel().tolist():
        values = [pixel]
        for step in (k for k in range(-reach, reach + 1) if k):
            cell = pixel + step * _GRID
            middle = cell - math.copysign(_GRID / 2, step)
            nearest = middle if float(np.float32(middle)) == cell else math.nextafter(middle, cell)
            if 0.5 <= cell < 1.0:
                values.append(nearest)
        axes.append(values)
    combinations = np.array(list(itertools.product(*axes)))
    distance_S = np.sqrt(((combinations - centre_CHW.ravel()) ** 2).sum(axis=1))
    return combinations[distance_S < radius * (1 + 1e-9)].reshape(-1, *centre_CHW.shape)


@dataclass(frozen=True)
class Midpoints:
    """Images on the midpoints between float32 numbers: a nudge of one part in 10^16 moves every computed pixel."""

    margin_over_error: float
    certified: bool
    flipped: bool
    """Whether the nudged image has another class."""
    nudge: float
    """L2 distance of the nudged image."""
    naive_radius: float
    inside_radius: bool


def nudge_midpoints(rng: np.random.Generator, share: float, size: int = 784) -> Midpoints:
    """A linear float32 model with two logits `(w x + b, 0)` whose computed margin is about `share` times `E`."""
    weight = rng.standard_normal((1, size)) / math.sqrt(size)
    sign = np.sign(weight.astype(np.float32).astype(np.float64))[0]
    middle = rng.integers(2**23, 2**24 - 1, size) * _GRID + _GRID / 2
    shape = (1, math.isqrt(size), math.isqrt(size))
    image = np.nextafter(middle, np.where(sign > 0, 2.0, 0.0)).reshape(1, *shape)
    nudged = np.nextafter(middle, np.where(sign > 0, 0.0, 2.0)).reshape(1, *shape)
    rows = np.concatenate([weight, np.zeros((1, size))])
    bias, classifier = np.zeros(2), None
    for _ in range(3):
        classifier = load(dense([], (rows, bias), shape, np.float32, "Gemm"))
        (logits_K,) = classifier.classify(image)[0]
        bias[0] += share * classifier.certificate.logit_error - (logits_K[0] - logits_K[1])
    assert classifier is not None
    (before,), (after,) = classifier.predict(image), classifier.predict(nudged)
    flipped = before.class_id != after.class_id
    naive = float(naive_radius(View(classifier), image)[0])
    return Midpoints(
        margin_over_error=float(before.logits_K[0] - before.logits_K[1]) / before.logit_error,
        certified=before.certified,
        flipped=flipped,
        nudge=float(np.linalg.norm(nudged - image)),
        naive_radius=naive,
        inside_radius=flipped and is_inside(image, nudged, before.radius),
    )


def _on_grid_with_margin(view: View, image_NCHW: np.ndarray, class_id: int, wanted: float) -> np.ndarray:
    """The last float32 image found by bisection between two images whose computed margin is above `wanted`."""
    low, high = 0.0, 1.0
    found = image_NCHW[0].astype(np.float32).astype(np.float64)
    for _ in range(40):
        share = 0.5 * (low + high)
        tried = (image_NCHW[0] + share * (image_NCHW[1] - image_NCHW[0])).astype(np.float32).astype(np.float64)
        tried = np.clip(tried, 0.5, 1.0 - _GRID)
        (logits_K,), _ = view.classify(tried[None])
        rest = np.delete(logits_K, class_id)
        if logits_K[class_id] - rest.max() > wanted:
            low, found = share, tried
        else:
            high = share
    return found


def _forward(hidden: list[Affine], value_D: np.ndarray) -> np.ndarray:
    for weight_MN, bias_M in hidden:
        left, right = np.split(weight_MN @ value_D + bias_M, 2)
        value_D = np.concatenate([np.maximum(left, right), np.minimum(left, right)])
    return value_D


def _exactly(dtype: type, array: np.ndarray) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in array.astype(dtype).astype(np.float64).tolist()]


def _affine(dtype: type, weight_MN: np.ndarray, bias_M: np.ndarray, value_N: list[Fraction]) -> list[Fraction]:
    (bias,) = _exactly(dtype, bias_M[None])
    return [
        sum((w * v for w, v in zip(row, value_N, strict=True)), start=b)
        for row, b in zip(_exactly(dtype, weight_MN), bias, strict=True)
    ]
