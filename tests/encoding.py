"""Image and array files made in memory, for tests."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray | Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """An image file of the pixels."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    """What numpy.save writes."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()
