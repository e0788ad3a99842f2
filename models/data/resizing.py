"""Pixels of a data set: decoded and resized as the service does it, in memory or in a temporary file."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import UInt8

from models.data.labelled import DataError
from models.memory import machine_bytes
from service.errors import InputError
from service.pixels.images import Pixels, decode_image, unit
from service.pixels.preprocessing import LONGEST_SIDE, Preprocessing, conversion_between, triangle_filter

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.25
"""Of the memory of the machine, for all images of a part; more lie in a temporary file."""


def decode_file(content: bytes) -> Pixels:
    """Return the pixels of an image file that the service would read and resize: 8-bit, or in [0, 1].

    Raises:
        InputError: the service would refuse the file, or a side is too long to be resized.
    """
    pixels_CHW = decode_image(content, LONGEST_SIDE * LONGEST_SIDE)
    _, height, width = pixels_CHW.shape
    if max(height, width) > LONGEST_SIDE:
        raise InputError(f"the image is {width} x {height} pixels, sides go to {LONGEST_SIDE}; make it smaller")
    return pixels_CHW


def fit_image(pixels_CHW: Pixels, channels: int, size: tuple[int, int]) -> UInt8[np.ndarray, "D A B"]:
    """Return the image as the service passes it to a network of another shape, each value rounded to 8 bits.

    Args:
        pixels_CHW: one channel (grey) or three (RGB), 8-bit or in [0, 1].
        channels: 1 or 3.
        size: height and width, in pixels.
    """
    sent, height, width = pixels_CHW.shape
    if (sent, height, width) == (channels, *size):
        return pixels_CHW if pixels_CHW.dtype == np.uint8 else np.rint(255 * pixels_CHW).astype(np.uint8)
    mapping = Preprocessing(
        conversion=conversion_between(sent, channels),
        rows_AH=None if height == size[0] else _filter(height, size[0]),
        columns_BW=None if width == size[1] else _filter(width, size[1]),
        # No certificate depends on this map. Proving its bounds takes longer than applying it.
        norm=math.inf,
        pixel_error=math.inf,
        error_l2=math.inf,
    )
    return np.rint(255 * mapping(unit(pixels_CHW)[np.newaxis])[0]).astype(np.uint8)


_filter = lru_cache(maxsize=64)(triangle_filter)


def room_for(shape: tuple[int, ...]) -> UInt8[torch.Tensor, "N C H W"]:
    """Return a tensor in memory, or in a temporary file from which images are read as they are needed.

    Args:
        shape: N, C, H, W.

    Raises:
        DataError: the disk has no room for them.
    """
    size = math.prod(shape)
    if size <= MEMORY_SHARE * machine_bytes():
        return torch.empty(shape, dtype=torch.uint8)
    folder = tempfile.gettempdir()
    log.info("%.1f GB of pixels are kept in a temporary file in %s", size / 1e9, folder)
    if shutil.disk_usage(folder).free < size:
        raise DataError(
            f"{size / 1e9:.1f} GB of pixels fit neither into memory nor into {folder}: choose smaller images (--set "
            "image_size=64), or another folder with the variable TMPDIR"
        )
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=shape))
