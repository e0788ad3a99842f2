"""Image files and arrays as exact pixels.

Axes: C channels, H height, W width.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.audit.records import read_bytes, sha256
from service.errors import InputError, KeptError
from service.pixels.images import decode_image

Shape = tuple[int, int, int]
"""Channels, height, width."""

_NPY_MAGIC = b"\x93NUMPY"
_SIGNATURES = {"image/png": b"\x89PNG\r\n\x1a\n", "application/x-npy": _NPY_MAGIC}
_MOST_PIXELS = 2**28


@dataclass(frozen=True)
class SentImage:
    """Pixels `numerators / denominator` in [0, 1], exact."""

    shape: Shape
    numerators: list[int]
    """C x H x W, flat."""
    denominator: int
    digest: str
    """`sha256:<hex>`, as the service names an image."""

    def squared_distance(self, other: SentImage) -> tuple[int, int]:
        """Return numerator and denominator of the squared L2 distance to an image of the same shape."""
        pairs = zip(self.numerators, other.numerators, strict=True)
        total = sum((a * other.denominator - b * self.denominator) ** 2 for a, b in pairs)
        return total, (self.denominator * other.denominator) ** 2


def read_image(path: Path, stated: Shape | None, channels: int, background: str | None = None) -> SentImage:
    """Read the pixels of an image file or of an npy array, as they were sent.

    Args:
        path: the file.
        stated: shape in the answer, which tells the axes of an array; absent if the answer names no image.
        channels: of the model, which tell them then.
        background: colour behind a transparent image, as the answer states it.

    Raises:
        KeptError: the file is missing, or is no image that the service reads.
    """
    data = read_bytes(path, "the image file that was sent")
    if data.startswith(_NPY_MAGIC):
        return _exact(_with_axes(_array(str(path), data), stated, channels))
    try:
        pixels_CHW = decode_image(data, max_pixels=_MOST_PIXELS, background=background)
    except InputError as error:
        raise KeptError(f"{path}: {error}") from error
    if stated is None and channels == 1 and len(pixels_CHW) == 3 and (pixels_CHW == pixels_CHW[:1]).all():
        # Before answers named their image, a picture with R = G = B was grey to a grey model.
        pixels_CHW = pixels_CHW[:1]
    return _exact(pixels_CHW)


def read_held(text: str, media_type: str) -> SentImage:
    """Decode an image that an answer holds as base64.

    Args:
        text: base64 of a PNG file or an npy array C x H x W of uint8 or floats.
        media_type: `image/png` or `application/x-npy`.

    Raises:
        ValueError: the text is not base64 of such a file.
    """
    if media_type not in _SIGNATURES:
        raise ValueError(f"its media_type is {media_type!r}, expected one of {', '.join(_SIGNATURES)}")
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
        if not data.startswith(_SIGNATURES[media_type]):
            raise ValueError(f"it is no file of the type {media_type}")
        if media_type == "image/png":
            return _exact(decode_image(data, max_pixels=_MOST_PIXELS))
        return _exact(_array("it", data))
    except (UnicodeEncodeError, binascii.Error) as error:
        raise ValueError("it is not base64") from error
    except (InputError, KeptError) as error:
        raise ValueError(str(error)) from error


def _array(name: str, data: bytes) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # A damaged header raises errors of any type.
        raise KeptError(f"{name}: is not a whole npy file of numbers; name the file that was sent") from error
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[None]
    integers, floats = array.dtype == np.uint8, array.dtype.kind == "f" and array.dtype.itemsize <= 8
    if array.ndim != 3 or not array.size or not (integers or floats):
        raise KeptError(f"{name}: an array {array.shape} of {array.dtype}; uint8 or float images C x H x W were sent")
    if floats:
        array = array.astype(np.float64)
        if not ((array >= 0.0) & (array <= 1.0)).all():
            raise KeptError(f"{name}: a pixel is NaN, infinite or outside [0, 1], where nothing is promised")
    return array


def _with_axes(array: np.ndarray, stated: Shape | None, channels: int) -> np.ndarray:
    """Return C x H x W of an array that may have its channels last."""
    last = np.moveaxis(array, -1, 0)
    if stated is not None:
        return last if array.shape != stated and last.shape == stated else array
    return last if array.shape[0] != channels and last.shape[0] == channels else array


def _exact(pixels_CHW: np.ndarray) -> SentImage:
    channels, height, width = pixels_CHW.shape
    head = f"{channels}x{height}x{width}\n".encode("ascii")
    flat = pixels_CHW.ravel().tolist()
    if pixels_CHW.dtype == np.uint8:
        # Python rounds the quotient of two integers correctly.
        units = np.array([value / 255 for value in range(256)])[pixels_CHW]
        numerators, denominator = flat, 255
    else:
        units = pixels_CHW
        ratios = [value.as_integer_ratio() for value in flat]
        denominator = max(ratio[1] for ratio in ratios)
        numerators = [numerator * (denominator // divisor) for numerator, divisor in ratios]
    content = head + np.ascontiguousarray(units, dtype="<f8").tobytes()
    return SentImage((channels, height, width), numerators, denominator, sha256(content))
