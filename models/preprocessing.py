"""From an image file to the pixels that a network takes: what the service does with `resize=true`, rounded to 8 bits.

What is trained on is what is served, so the rules are those of `service/pixels/images.py` (which files have one
reading as 8-bit grey or RGB) and the map is that of `service/pixels/preprocessing.py` (luma, triangle filter;
docs/soundness.md). This side may not import the code of the server; `tests/models/data/test_folders.py` holds the two
against each other.

Axes: C, H, W of the file; A, B (height, width) of the result.
"""

from __future__ import annotations

import io
import warnings
from functools import lru_cache

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
LONGEST_SIDE = 8192
"""The service resizes no longer side."""
DESCRIPTION = "RGB to grey: 0.299 R + 0.587 G + 0.114 B; grey to RGB: three copies; resize: triangle filter; 8 bits"

_RED, _GREEN, _BLUE = 299 / 1000, 587 / 1000, 114 / 1000


class UnusableImageError(Exception):
    """The service would refuse this file; the message says why and what to do."""


def decode_image(content: bytes) -> UInt8[np.ndarray, "C H W"]:
    """Pixels of an image file: one channel where it stores grey, else three (RGB).

    Raises:
        UnusableImageError: no image, damaged, or not one 8-bit grey or RGB picture.
    """
    if not content:
        raise UnusableImageError("the file is empty")
    try:
        # An announced size at which Pillow suspects an attack; its mere warning comes at sides that are refused anyway.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # decoders meet damaged headers with many types of error
        raise UnusableImageError(f"no image that the service reads ({', '.join(FORMATS)}): convert it") from error
    _refuse_more_than_one_reading(picture)
    if max(picture.size) > LONGEST_SIDE:
        raise UnusableImageError(
            f"{picture.width} x {picture.height} pixels, sides go to {LONGEST_SIDE}: make it smaller"
        )
    try:
        if picture.format == "PNG":
            # Decoding stops at the last row; this reads on and checks every checksum.
            Image.open(io.BytesIO(content), formats=["PNG"]).verify()
            if b"IEND\xaeB`\x82" not in content:
                raise EOFError("no IEND chunk")
        if picture.format == "GIF" and not content.rstrip(b"\0").endswith(b";"):
            raise EOFError("no GIF trailer")
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except Exception as error:  # as above
        raise UnusableImageError("truncated or damaged, not every pixel can be read: replace it") from error
    if picture.mode in ("1", "L"):
        return np.asarray(picture.convert("L"))[np.newaxis]
    channels = 1 if picture.mode == "P" and _has_grey_palette(picture) else 3
    return np.ascontiguousarray(np.moveaxis(np.asarray(picture.convert("RGB"))[..., :channels], -1, 0))


def fit_image(
    pixels_CHW: UInt8[np.ndarray, "C H W"], channels: int, size: tuple[int, int]
) -> UInt8[np.ndarray, "D A B"]:
    """The image with the given channels (1 or 3) and size (height, width), each value rounded to 8 bits."""
    image = pixels_CHW.astype(np.float64)
    if (len(image), channels) == (3, 1):
        image = _RED * image[0:1] + _GREEN * image[1:2] + _BLUE * image[2:3]
    _, height, width = image.shape
    if height != size[0]:
        image = triangle_filter(height, size[0]) @ image
    if width != size[1]:
        image = image @ triangle_filter(width, size[1]).T
    pixels = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return np.repeat(pixels, 3, axis=0) if len(pixels) < channels else pixels


@lru_cache(maxsize=64)
def triangle_filter(n_in: int, n_out: int) -> Float64[np.ndarray, "n_out n_in"]:
    """Bilinear resampling along one axis, widened where it shrinks; read-only.

    Weight of input k for output j: `max(0, 1 - |(j + 1/2) s - (k + 1/2)| / max(s, 1))`, `s = n_in / n_out`, each row
    divided by its sum.
    """
    scale = n_in / n_out
    distance = np.abs((np.arange(n_out)[:, None] + 0.5) * scale - (np.arange(n_in) + 0.5))
    weights = np.maximum(0.0, 1.0 - distance / max(scale, 1.0))
    weights /= weights.sum(axis=1, keepdims=True)
    weights.setflags(write=False)
    return weights


def _has_grey_palette(picture: Image.Image) -> bool:
    red, green, blue = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3).T
    return np.array_equal(red, green) and np.array_equal(red, blue)


def _refuse_more_than_one_reading(picture: Image.Image) -> None:
    if getattr(picture, "is_animated", False):
        raise UnusableImageError("several pictures in one file (an animation): save the one that counts")
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or picture.has_transparency_data:
        raise UnusableImageError("transparency (an alpha channel or colour): flatten it onto a background")
    if picture.mode == "CMYK":
        raise UnusableImageError("CMYK: convert it to RGB or grey, with its colour profile")
    # Pillow reduces 16-bit RGB and 5-bit BMP to 8 bits in silence; only the raw mode of the tile tells.
    raw_modes = [str(tile[3]) for tile in getattr(picture, "tile", [])]
    if picture.mode.startswith(("I", "F")) or any(";16" in raw or ";15" in raw for raw in raw_modes):
        raise UnusableImageError("not 8 bits per channel: save it with 8 bits")
    if picture.mode not in ("1", "L", "P", "RGB"):
        raise UnusableImageError(f"mode {picture.mode}: save it as 8-bit grey or RGB")
