"""Resizing as a linear map whose norm and rounding error are proved.

With `resize=true` the radius is still about the image that was sent, so the resize is part of the certified
map: bilinear (the triangle filter, widened where it shrinks), as two constant float64 matrices, `y = clip(R_h
x R_w^T, 0, 1)` for each channel. The matrices *are* the definition of the map; that their entries approximate
an ideal filter concerns no proof. Clipping is 1-Lipschitz and exact, so it costs nothing.

Axes: N batch, C channels, H and W of the image that was sent, A and B (height, width) of the one that the
model takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float64

from service.certificate import spectral_norm_bound
from service.certificate.rounding import FLOAT64, SMALLEST_NORMAL, add_up, gamma_up, mul_up, sqrt_up, sum_up

Conversion = Literal["rgb_to_grey", "grey_to_rgb"]


def conversion_between(sent_channels: int, model_channels: int) -> Conversion | None:
    """What is done to the channels of an image; None where they are the model's.

    Raises:
        ValueError: neither equal nor 1 and 3.
    """
    if sent_channels == model_channels:
        return None
    if (sent_channels, model_channels) == (3, 1):
        return "rgb_to_grey"
    if (sent_channels, model_channels) == (1, 3):
        return "grey_to_rgb"
    raise ValueError(f"there is no conversion of {sent_channels} channels to {model_channels}")


# Sizes seen are the client's choice: the cache is bounded, and an entry of 28 x 4096 takes 1 MB.
_CACHED_SIZES = 64


@dataclass(frozen=True)
class Resize:
    """A resize from `H x W` to `A x B`, with what the certificate needs to know about it."""

    rows_AH: Float64[np.ndarray, "A H"]
    columns_BW: Float64[np.ndarray, "B W"]
    norm: float
    """Upper bound of the L2 Lipschitz constant of the map, `||R_h|| ||R_w||`."""
    pixel_error: float
    """Upper bound of |computed - exact| for each pixel of the result; see `_pixel_error`."""

    def __call__(self, image_NCHW: Float64[np.ndarray, "N C H W"]) -> Float64[np.ndarray, "N C A B"]:
        """The resized images, pixels in [0, 1] as those of `image_NCHW`."""
        return np.clip(self.rows_AH @ image_NCHW @ self.columns_BW.T, 0.0, 1.0)

    def adjoint(self, gradient_NCAB: Float64[np.ndarray, "N C A B"]) -> Float64[np.ndarray, "N C H W"]:
        """The gradient with respect to the image that was sent, from that with respect to the resized one.

        Clipping acts on rounding errors only and is left out.
        """
        return self.rows_AH.T @ gradient_NCAB @ self.columns_BW

    def error_l2(self, channels: int) -> float:
        """Upper bound of the L2 distance between computed and exact result, for an image of `channels` in [0,
        1]."""
        pixels = channels * self.rows_AH.shape[0] * self.columns_BW.shape[0]
        return mul_up(self.pixel_error, sqrt_up(float(pixels)))


@lru_cache(maxsize=_CACHED_SIZES)
def resize_map(from_height: int, from_width: int, to_height: int, to_width: int) -> Resize:
    """The resize between two sizes in pixels, each at least 1."""
    rows_AH = triangle_filter(from_height, to_height)
    columns_BW = triangle_filter(from_width, to_width)
    return Resize(
        rows_AH=rows_AH,
        columns_BW=columns_BW,
        norm=mul_up(spectral_norm_bound(rows_AH), spectral_norm_bound(columns_BW)),
        pixel_error=_pixel_error(rows_AH, columns_BW),
    )


def triangle_filter(n_in: int, n_out: int) -> Float64[np.ndarray, "n_out n_in"]:
    """One-dimensional bilinear resampling: non-negative rows that sum to 1 up to rounding; read-only.

    Pixel centres lie at half-integers. Where the image shrinks, the triangle is widened by the factor, so
    that every pixel counts (antialiasing); at the borders its rest is renormalised.
    """
    scale = n_in / n_out
    width = max(scale, 1.0)
    centre_out = (np.arange(n_out) + 0.5) * scale
    centre_in = np.arange(n_in) + 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(centre_out[:, None] - centre_in) / width)
    weights /= weights.sum(axis=1, keepdims=True)
    weights.setflags(write=False)
    return weights


def _pixel_error(rows_AH: Float64[np.ndarray, "A H"], columns_BW: Float64[np.ndarray, "B W"]) -> float:
    """Bound of the error of each pixel of `fl(fl(R_h x) R_w^T)`, for any order of summation.

    Let s and t be the largest row sums of `R_h` and `R_w`, and every pixel of x be in [0, 1]. Then
    `|fl(R_h x) - R_h x| <= gamma_H s` and, with the second product's own error, the result is off by at most
    `s t (gamma_H + gamma_W (1 + gamma_H))` (Higham 2002, section 3.5). A pixel v / 255 of the image is itself
    rounded, by at most u: `s t u` more. Underflow adds less than the smallest normal number for each product.
    """
    height, width = rows_AH.shape[1], columns_BW.shape[1]
    row_sum = max(sum_up(row) for row in rows_AH)
    column_sum = max(sum_up(row) for row in columns_BW)
    gamma_rows, gamma_columns = gamma_up(height), gamma_up(width)
    relative = add_up(gamma_rows, mul_up(gamma_columns, add_up(1.0, gamma_rows)), mul_up(FLOAT64.unit_roundoff, 2.0))
    return add_up(mul_up(row_sum, column_sum, relative), mul_up(4.0 * (height + width), SMALLEST_NORMAL))
