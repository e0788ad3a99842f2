"""Images as near to a radius as float64 pixels allow, and their exact distance in units of it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from service.pixels.distances import is_inside, squared_distance


def ratio(image: np.ndarray, other: np.ndarray, radius: float) -> float:
    """Return `||image - other|| / radius`, rounded at the end only; infinite for radius 0.

    Args:
        image: centre of the ball.
        other: the image in question.
        radius: of the ball, L2, pixels in [0, 1].
    """
    return math.sqrt(squared_distance(image, other) / Fraction(radius) ** 2) if radius > 0 else math.inf


def just_inside(image: np.ndarray, other: np.ndarray, radius: float) -> np.ndarray:
    """Return the last valid image inside the radius on the segment from `image` to `other`; `other` if that is inside.

    The image itself where a radius is too small for another one on the segment.

    Args:
        image: centre of the ball.
        other: end of the segment.
        radius: of the ball, L2, pixels in [0, 1].
    """
    if is_inside(image, other, radius):
        return other
    length = math.sqrt(squared_distance(image, other))
    # Pixels are rounded to multiples of 2^-53 or finer.
    spare = 2.0**-50 + 2.0**-56 / radius
    while spare < 1.0:
        found = np.clip(image + (radius * (1.0 - spare) / length) * (other - image), 0.0, 1.0)
        if is_inside(image, found, radius):
            return found
        spare *= 4.0
    return image
