"""Distances between float64 images as exact rationals, compared with radii as exact rationals."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def squared_distance(image: np.ndarray, other: np.ndarray) -> Fraction:
    """`||image - other||_2^2`, exactly."""
    pairs = [
        (p.as_integer_ratio(), q.as_integer_ratio())
        for p, q in zip(_moved(image, other), _moved(other, image), strict=True)
    ]
    # Denominators of floats are powers of two, so the largest is a common one.
    common = max((denominator for pair in pairs for _, denominator in pair), default=1)
    return Fraction(sum((p * (common // b) - q * (common // d)) ** 2 for (p, b), (q, d) in pairs), common**2)


def inside(image: np.ndarray, other: np.ndarray, radius: float) -> bool:
    """Whether `||image - other||_2 < radius`, decided without rounding."""
    return squared_distance(image, other) < Fraction(radius) ** 2


def ratio(image: np.ndarray, other: np.ndarray, radius: float) -> float:
    """`||image - other|| / radius`, rounded at the end only; infinite for radius 0."""
    return math.sqrt(squared_distance(image, other) / Fraction(radius) ** 2) if radius > 0 else math.inf


def just_inside(image: np.ndarray, other: np.ndarray, radius: float) -> np.ndarray:
    """A valid image on the segment from `image` to `other`, as near to distance `radius` as rounding lets it, inside.

    `other` itself where that is inside already.
    """
    if inside(image, other, radius):
        return other
    length = math.sqrt(squared_distance(image, other))
    # Pixels are rounded to multiples of 2^-53 or finer.
    spare = 2.0**-50 + 2.0**-56 / radius
    while True:
        found = np.clip(image + (radius * (1.0 - spare) / length) * (other - image), 0.0, 1.0)
        if inside(image, found, radius):
            return found
        spare *= 4.0


def _moved(image: np.ndarray, other: np.ndarray) -> list[float]:
    """The pixels in which both differ."""
    return image.ravel()[image.ravel() != other.ravel()].tolist()
