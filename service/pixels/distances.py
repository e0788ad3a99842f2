"""L2 distances between images, compared with radii in exact rational arithmetic.

A rounded distance may find a counterexample that is not there. Images are float64 arrays of one shape, pixels in
[0, 1]; radii and distances are in the same unit.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

_RELATIVE_ERROR = 1e-9
"""Above the relative error of `distance`."""


def distance(image: np.ndarray, other: np.ndarray) -> float:
    """Return `||image - other||_2` up to a few units in the last place: each difference is rounded, no sum is."""
    difference = (image - other).ravel()
    return math.sqrt(math.fsum((difference * difference).tolist()))


def squared_distance(image: np.ndarray, other: np.ndarray) -> Fraction:
    """Return `||image - other||_2^2`, exact."""
    differs = image.ravel() != other.ravel()
    pairs = [
        (p.as_integer_ratio(), q.as_integer_ratio())
        for p, q in zip(image.ravel()[differs].tolist(), other.ravel()[differs].tolist(), strict=True)
    ]
    # Denominators of floats are powers of two, so the largest is a common one.
    common = max((denominator for pair in pairs for _, denominator in pair), default=1)
    return Fraction(sum((p * (common // b) - q * (common // d)) ** 2 for (p, b), (q, d) in pairs), common**2)


def is_inside(image: np.ndarray, other: np.ndarray, radius: float) -> bool:
    """Return whether `||image - other||_2 < radius`, decided without rounding.

    Args:
        image: centre of the ball.
        other: the image in question.
        radius: of the open ball.
    """
    if distance(image, other) > radius * (1.0 + _RELATIVE_ERROR):
        return False
    return squared_distance(image, other) < Fraction(radius) ** 2
