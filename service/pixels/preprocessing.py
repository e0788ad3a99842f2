"""The map from the image that was sent to the model's input: linear, in exact rationals, with proved norm and rounding
error.

The radius refers to the image that was *sent*, so the conversion of its channels and size is part of the certified
map. The map is defined in rationals, so that it can be rebuilt from this text alone:

* **conversion** of the channels: RGB to grey is `299/1000 R + 587/1000 G + 114/1000 B` (luma of ITU-R BT.601); grey to
  RGB is three copies;
* **resize** of each channel: `R_h x R_w^T` with the triangle filter (bilinear, widened where it shrinks) along each
  axis, see `triangle_filter`.

Both act on different axes, so the exact map does not depend on their order, and its norm is the product of their norms
(Kronecker product). The computation uses the cheaper order: to grey before the resize, to RGB after it. Finally every
pixel is clipped to [0, 1]; the values of the exact map are averages of pixels, so clipping does not change it, and
moves no computed value away from the exact one.

Axes: N batch, C channels, H and W of the image that was sent; D channels, A and B (height, width) of the model's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from service.certificate import spectral_norm_bound
from service.certificate.rounding import (
    FLOAT64,
    SMALLEST_NORMAL,
    add_up,
    div_up,
    gamma_up,
    mul_up,
    sqrt_up,
)
from service.shapes import Float64

Conversion = Literal["rgb_to_grey", "grey_to_rgb"]
Shape = tuple[int, int, int]

GREY_THOUSANDTHS = (299, 587, 114)
"""Shares of R, G and B in a grey value, exact."""

_RED, _GREEN, _BLUE = (share / 1000 for share in GREY_THOUSANDTHS)
_NORMS: dict[Conversion | None, float] = {
    None: 1.0,
    "rgb_to_grey": div_up(sqrt_up(float(sum(share * share for share in GREY_THOUSANDTHS))), 1000.0),
    "grey_to_rgb": sqrt_up(3.0),
}
"""Upper bounds of the L2 norms: `sqrt(0.299^2 + 0.587^2 + 0.114^2)`, 0.67 up to rounding, and `sqrt(3)`."""

LONGEST_SIDE = 8192
"""Longest side that is resized, in pixels: the filters are dense, and a file of few bytes can declare any side."""

# Clients choose the shapes, so the cache is bounded; a filter of 28 x 8192 takes 2 MB.
_CACHED_SHAPES = 32


@dataclass(frozen=True)
class Preprocessing:
    """The map from images of one shape to the model's input, with the constants that the certificate needs."""

    conversion: Conversion | None
    rows_AH: Float64[np.ndarray, "A H"] | None
    """Filter along the height, correctly rounded entries; absent where the heights are equal."""
    columns_BW: Float64[np.ndarray, "B W"] | None
    """Filter along the width."""
    norm: float
    """Upper bound of the L2 norm of the exact map."""
    pixel_error: float
    """Upper bound of |computed - exact| for each pixel of the result; see `_pixel_error`."""
    error_l2: float
    """Upper bound of the L2 distance between computed and exact result."""

    def __call__(self, image_NCHW: Float64[np.ndarray, "N C H W"]) -> Float64[np.ndarray, "N D A B"]:
        """Return the model's input, pixels in [0, 1] as those of `image_NCHW`."""
        pixels = image_NCHW
        if self.conversion == "rgb_to_grey":
            pixels = _RED * pixels[:, 0:1] + _GREEN * pixels[:, 1:2] + _BLUE * pixels[:, 2:3]
        if self.rows_AH is not None:
            pixels = self.rows_AH @ pixels
        if self.columns_BW is not None:
            pixels = pixels @ self.columns_BW.T
        pixels = np.clip(pixels, 0.0, 1.0)
        return np.repeat(pixels, 3, axis=1) if self.conversion == "grey_to_rgb" else pixels

    def adjoint(self, gradient_NDAB: Float64[np.ndarray, "N D A B"]) -> Float64[np.ndarray, "N C H W"]:
        """Return the gradient with respect to the image that was sent, from the gradient with respect to the result.

        Clipping acts on rounding errors only and is omitted.
        """
        gradient = gradient_NDAB
        if self.conversion == "grey_to_rgb":
            gradient = gradient.sum(axis=1, keepdims=True)
        if self.rows_AH is not None:
            gradient = self.rows_AH.T @ gradient
        if self.columns_BW is not None:
            gradient = gradient @ self.columns_BW
        if self.conversion == "rgb_to_grey":
            gradient = np.concatenate([_RED * gradient, _GREEN * gradient, _BLUE * gradient], axis=1)
        return gradient


def conversion_between(sent_channels: int, model_channels: int) -> Conversion | None:
    """Return the conversion of the channels of an image, if it differs from the identity.

    Raises:
        ValueError: the numbers of channels are neither equal nor 1 and 3.
    """
    if sent_channels == model_channels:
        return None
    if (sent_channels, model_channels) == (3, 1):
        return "rgb_to_grey"
    if (sent_channels, model_channels) == (1, 3):
        return "grey_to_rgb"
    raise ValueError(f"there is no conversion of {sent_channels} channels to {model_channels}")


@lru_cache(maxsize=_CACHED_SHAPES)
def preprocessing_between(sent_CHW: Shape, model_DAB: Shape) -> Preprocessing:
    """Return the map between images of two shapes, sides in pixels and at least 1.

    Raises:
        ValueError: there is no conversion between these numbers of channels, or a side to resize is longer than
            `LONGEST_SIDE`.
    """
    conversion = conversion_between(sent_CHW[0], model_DAB[0])
    (height, to_height), (width, to_width) = zip(sent_CHW[1:], model_DAB[1:], strict=True)
    rows_AH = None if height == to_height else triangle_filter(height, to_height)
    columns_BW = None if width == to_width else triangle_filter(width, to_width)
    pixel_error = _pixel_error(conversion, rows_AH, columns_BW)
    return Preprocessing(
        conversion=conversion,
        rows_AH=rows_AH,
        columns_BW=columns_BW,
        norm=mul_up(_NORMS[conversion], _filter_norm(rows_AH), _filter_norm(columns_BW)),
        pixel_error=pixel_error,
        error_l2=mul_up(pixel_error, sqrt_up(float(model_DAB[0] * to_height * to_width))),
    )


def triangle_filter(n_in: int, n_out: int) -> Float64[np.ndarray, "n_out n_in"]:
    """Return the matrix of one-dimensional bilinear resampling, read-only.

    Each entry is the float64 nearest to the exact rational.

    With `scale = n_in / n_out` and `width = max(scale, 1)`, the exact weight of input k for output j is
    `max(0, 1 - |(j + 1/2) scale - (k + 1/2)| / width)`, divided by the sum of its row: pixel centres lie at
    half-integers, and where the image shrinks, the triangle is widened by that factor, so that every pixel contributes
    (antialiasing).

    Multiplied by `2 max(n_in, n_out)`, the weight is the integer `max(0, 2 max(n_in, n_out) - |(2j + 1) n_in - (2k + 1)
    n_out|)`. For sides of at most `LONGEST_SIDE` such integers and their sums are far below 2^53, hence exact in
    float64, and one division of two of them rounds the entry correctly.

    Raises:
        ValueError: a side is not in 1..`LONGEST_SIDE`.
    """
    if not (1 <= n_in <= LONGEST_SIDE and 1 <= n_out <= LONGEST_SIDE):
        raise ValueError(f"a side of {n_in} pixels cannot be resized to {n_out}; sides are 1 to {LONGEST_SIDE} pixels")
    centre_out = (2 * np.arange(n_out, dtype=np.int64) + 1) * n_in
    centre_in = (2 * np.arange(n_in, dtype=np.int64) + 1) * n_out
    share = np.maximum(0, 2 * max(n_in, n_out) - np.abs(centre_out[:, None] - centre_in))
    weights = share / share.sum(axis=1, keepdims=True)
    weights.setflags(write=False)
    return weights


def _filter_norm(weights_MN: Float64[np.ndarray, "M N"] | None) -> float:
    """Return an upper bound of the L2 norm of the exact filter whose rounded entries are `weights_MN`.

    The error of a correctly rounded entry is at most u times the entry, and no entry is negative, so the norm of the
    difference of both matrices is at most u times the norm of the rounded one.
    """
    if weights_MN is None:
        return 1.0
    return mul_up(spectral_norm_bound(weights_MN), add_up(1.0, FLOAT64.unit_roundoff))


def _pixel_error(
    conversion: Conversion | None,
    rows_AH: Float64[np.ndarray, "A H"] | None,
    columns_BW: Float64[np.ndarray, "B W"] | None,
) -> float:
    """Return a bound of the error of each pixel of the result, for any order of summation.

    The exact pixel is a sum of non-negative products. Each product is computed with at most n factors `1 + d`,
    `|d| <= u`: one from the pixel v / 255 itself, one from each rounded coefficient, and n_k from a sum of n_k products
    (Higham 2002, lemmas 3.1 and 3.3). So the error of the computed pixel is at most `gamma_n` times the exact pixel,
    which is at most 1. Each operation that underflows adds less than the smallest normal number, and the weights of
    later operations sum to 1.
    """
    roundings, operations = 1, 1
    for terms in (
        3 if conversion == "rgb_to_grey" else 0,
        0 if rows_AH is None else rows_AH.shape[1],
        0 if columns_BW is None else columns_BW.shape[1],
    ):
        roundings += terms + 1 if terms else 0
        operations += 2 * terms
    # The factor 2 covers the rounding of the later weights.
    return add_up(gamma_up(roundings), mul_up(2.0 * operations, SMALLEST_NORMAL))
