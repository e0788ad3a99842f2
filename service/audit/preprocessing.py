"""From the image that was sent to the model's input: a linear map in exact rational numbers.

Grey from RGB is `299/1000 R + 587/1000 G + 114/1000 B`, RGB from grey three copies. A resize acts on each axis
alone, with the triangle filter: for n inputs and m outputs, the weight of input k for output j is proportional to
`max(0, 1 - |(j + 1/2) n/m - (k + 1/2)| / max(n/m, 1))`, each row divided by its sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flint import arb, fmpz_mat

from service.audit.balls import NotAuditableError, root, upper
from service.audit.formats import FORMATS
from service.audit.images import SentImage, Shape
from service.audit.maps import ball_weights
from service.audit.norms import spectral_norm

_GREY = (299, 587, 114)
_CONVERSIONS = {(3, 1): "rgb_to_grey", (1, 3): "grey_to_rgb"}


@dataclass(frozen=True)
class ModelInput:
    """An image as the model sees it, with bounds of the map from the image that was sent."""

    pixels: Sequence[arb]
    """Enclosures of the exact pixels, flat."""
    norm: arb
    """Bound of the L2 norm of the linear map."""
    pixel_error: arb
    """Bound of |computed - exact| of each pixel, in float64, for every image of the box."""


def conversion_between(sent: int, wanted: int) -> str | None:
    """Return the conversion of the channels; absent where they are the model's.

    Raises:
        NotAuditableError: there is no such conversion.
    """
    if sent != wanted and (sent, wanted) not in _CONVERSIONS:
        raise NotAuditableError(f"there is no conversion of {sent} channels to the model's {wanted}")
    return _CONVERSIONS.get((sent, wanted))


def preprocess(image: SentImage, wanted: Shape) -> ModelInput:
    """Return the input of a model of images `wanted`.

    Rounding: no weight or pixel is negative, and every pixel of the result is an average of pixels, at most 1. So it is
    off by at most `gamma_n`, n the largest number of roundings of one product, in any order: one of the pixel, two of
    each weight, one of each product, and the additions.

    Args:
        image: the image that was sent.
        wanted: channels, height and width of the model's input.

    Raises:
        NotAuditableError: there is no conversion of the channels.
    """
    channels, height, width = image.shape
    conversion = conversion_between(channels, wanted[0])
    pixels, norm, roundings = image.numerators, arb(1), 1
    denominator = image.denominator
    if conversion == "rgb_to_grey":
        size = height * width
        planes = [pixels[c * size : (c + 1) * size] for c in range(3)]
        pixels = [_GREY[0] * r + _GREY[1] * g + _GREY[2] * b for r, g, b in zip(*planes, strict=True)]
        denominator, channels = denominator * 1000, 1
        norm, roundings = root(arb(sum(w * w for w in _GREY))) / 1000, roundings + 5
    sums = ([1] * wanted[1], [1] * wanted[2])
    if height != wanted[1]:
        rows, sums = _triangle(height, wanted[1]), (_sums(_triangle(height, wanted[1])), sums[1])
        norm, roundings = norm * _norm(rows), roundings + height + 2
        pixels = _along_rows(rows, pixels, channels, height, width)
    if width != wanted[2]:
        columns, sums = _triangle(width, wanted[2]), (sums[0], _sums(_triangle(width, wanted[2])))
        norm, roundings = norm * _norm(columns), roundings + width + 2
        grid = fmpz_mat(channels * wanted[1], width, pixels)
        pixels = [int(v) for v in (grid * fmpz_mat(columns).transpose()).entries()]
    divisors = [denominator * s * t for s in sums[0] for t in sums[1]] * channels
    seen = [arb(v) / d for v, d in zip(pixels, divisors, strict=True)]
    if conversion == "grey_to_rgb":
        seen, norm = seen * 3, norm * root(arb(3))
    doubles = FORMATS[np.float64]
    error = doubles.unit
    if roundings > 1:
        error = doubles.gamma(roundings) + arb(8 * roundings) * doubles.tiny
    return ModelInput(seen, upper(norm), upper(error))


def _triangle(n: int, m: int) -> list[list[int]]:
    """Weights `m x n` of the triangle filter, times `2 max(n, m)`."""
    widest = 2 * max(n, m)
    return [[max(0, widest - abs((2 * j + 1) * n - (2 * k + 1) * m)) for k in range(n)] for j in range(m)]


def _sums(rows: list[list[int]]) -> list[int]:
    return [sum(row) for row in rows]


def _norm(rows: list[list[int]]) -> arb:
    """Spectral norm of the weights, each row divided by its sum."""
    shares = [arb(weight) / total for row, total in zip(rows, _sums(rows), strict=True) for weight in row]
    weights = ball_weights(shares, len(rows))
    return upper(spectral_norm(weights.floats) + weights.error)


def _along_rows(rows: list[list[int]], pixels: list[int], channels: int, height: int, width: int) -> list[int]:
    """The product with every channel, height x width."""
    size, left = height * width, fmpz_mat(rows)
    return [
        int(v)
        for c in range(channels)
        for v in (left * fmpz_mat(height, width, pixels[c * size : (c + 1) * size])).entries()
    ]
