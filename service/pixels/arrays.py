"""Decoding of npy arrays to pixels in [0, 1], and the check of their range."""

from __future__ import annotations

import io
import re
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np

from service.errors import (
    ArrayError,
    BatchTooLargeError,
    ChannelsError,
    EmptyBodyError,
    ImageTooLargeError,
    PixelRangeError,
)
from service.pixels.images import to_unit
from service.shapes import Float64, Num

# A header is parsed as a Python literal; numpy.save writes 128 bytes.
_MOST_HEADER = 1024
# numpy 1 makes no array with more; numpy 2 raises beyond 64.
_MOST_AXES = 32
_LENGTH = rb"[1-9]\d{0,17}"
_OF_NUMPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>]f[248]|\|u1)', 'fortran_order': (False|True), "
    rb"'shape': \((%b,(?: %b(?:, %b){0,3})?)\), \} {0,128}\n" % (_LENGTH, _LENGTH, _LENGTH),
    re.DOTALL,
)
"""The header of numpy.save for an array of pixels."""


@runtime_checkable
class Readable(Protocol):
    """A file that is read from its start."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes."""
        ...


def decode_array(data: bytes, input_shape_CHW: tuple[int, int, int], max_pixels: int) -> Float64[np.ndarray, "C H W"]:
    """Return the pixels in [0, 1] of an npy array: C x H x W, H x W x C, or H x W for a model with one channel.

    The number of channels of the model distinguishes C from H and W. If the first and the last axis have that length,
    the layout with the model's height and width is used, and if that does not decide, the array is refused.

    Args:
        data: the npy file.
        input_shape_CHW: the images that the model accepts.
        max_pixels: limit of the number of pixels.

    Raises:
        EmptyBodyError, ArrayError, ChannelsError, PixelRangeError, ImageTooLargeError
    """
    array, shape = _read_npy(data, max_pixels, input_shape_CHW[0])
    channels = input_shape_CHW[0]
    if len(shape) == 4:
        raise ArrayError(
            f"the array has 4 axes {shape}, a batch; send it to /predict/batch, or send one image of shape "
            f"{_shapes(input_shape_CHW)}"
        )
    if len(shape) == 2 and channels == 1:
        pixels_CHW = array[np.newaxis]
    elif len(shape) == 3:
        pixels_CHW = _channels_first(array, 0, input_shape_CHW)
    else:
        raise ArrayError(f"the array has shape {shape}; expected {_shapes(input_shape_CHW)}")
    return unit_range(pixels_CHW)


def decode_array_batch(
    data: bytes, input_shape_CHW: tuple[int, int, int], max_pixels: int, max_batch: int
) -> Float64[np.ndarray, "N C H W"]:
    """Return the pixels in [0, 1] of an npy batch: N x C x H x W, N x H x W x C, or N x H x W where C is 1.

    Args:
        data: the npy file.
        input_shape_CHW: the images that the model accepts.
        max_pixels: limit of the number of pixels of all images together.
        max_batch: limit of the number of images.

    Raises:
        EmptyBodyError, ArrayError, ChannelsError, PixelRangeError, ImageTooLargeError, BatchTooLargeError
    """
    array, _ = _read_npy(data, max_pixels, input_shape_CHW[0])
    pixels_NCHW = batch_of(array, input_shape_CHW)
    if len(pixels_NCHW) > max_batch:
        raise BatchTooLargeError(len(pixels_NCHW), max_batch)
    return unit_range(pixels_NCHW)


def batch_of(array: Num[np.ndarray, "*shape"], input_shape_CHW: tuple[int, int, int]) -> Num[np.ndarray, "N C H W"]:
    """Return a batch with its channels before height and width, see `decode_array_batch`.

    Raises:
        ArrayError, ChannelsError
    """
    if array.ndim == 3 and input_shape_CHW[0] == 1:
        return array[:, np.newaxis]
    if array.ndim == 4:
        return _channels_first(array, 1, input_shape_CHW)
    raise ArrayError(
        f"the array has shape {array.shape}; expected a batch, N images of shape {_shapes(input_shape_CHW)}"
    )


def _shapes(input_shape_CHW: tuple[int, int, int]) -> str:
    channels, height, width = input_shape_CHW
    shapes = [(channels, height, width), (height, width, channels)] + ([(height, width)] if channels == 1 else [])
    return " or ".join(str(shape) for shape in shapes)


def _read_npy(data: bytes, max_pixels: int, channels: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the array as a view of `data`, without a copy: a header cannot make the server allocate memory."""
    if not data:
        raise EmptyBodyError("the body is empty; send a file of numpy.save")
    shape, fortran_order, dtype, start = _header_of(data)
    declared, sent = prod(shape) * dtype.itemsize, len(data) - start
    if declared != sent:
        raise ArrayError(
            f"the header declares shape {shape} of {dtype.name}, {declared} bytes, and {sent} bytes follow "
            "it; send the whole file and nothing after it"
        )
    if prod(shape) // channels > max_pixels:
        raise ImageTooLargeError(f"it has {prod(shape) // channels} pixels", max_pixels)
    flat = np.frombuffer(data, dtype, offset=start)
    return (flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)), shape


def _header_of(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return the result of `read_header`, and the offset of the values.

    numpy parses a literal, which leaves functions in cycles: 1 KiB a request until garbage is collected, which is rare.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    found = _OF_NUMPY.fullmatch(data, 0, start)
    if found is None or found.end() != start:
        file = io.BytesIO(data)
        return *read_header(file), file.tell()
    dtype, order, lengths = found.groups()
    shape = tuple(int(length) for length in lengths.split(b",") if length)
    return shape, order == b"True", np.dtype(dtype.decode("ascii")), start


def read_header(file: Readable) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether the order is Fortran's, and type of an npy file; its values follow.

    Raises:
        ArrayError: the file is no npy file, or has values that are no pixels.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read(file, max_header_size=_MOST_HEADER)
    except Exception:
        # The header is parsed as a Python literal: hostile ones raise ValueError, SyntaxError, MemoryError...
        raise ArrayError(
            "the body is not an npy file, or its header is damaged; send a file of "
            "numpy.save(file, array, allow_pickle=False)"
        ) from None
    if dtype.hasobject:
        raise ArrayError(
            "the array contains pickled Python objects, which are never loaded; send uint8 or float values"
        )
    if not (dtype.kind == "u" and dtype.itemsize == 1) and not (dtype.kind == "f" and dtype.itemsize <= 8):
        raise ArrayError(
            f"the array has dtype {dtype.name}; expected uint8 (0..255), or float16, float32 or float64 in [0, 1]"
        )
    if len(shape) > _MOST_AXES:
        raise ArrayError(f"the array has {len(shape)} axes; expected one image, or a batch with one axis more")
    if not shape or any(type(length) is not int or length < 1 for length in shape):
        raise ArrayError(f"the array has shape {shape}; expected at least one value along every axis")
    return shape, fortran_order, dtype


def _channels_first(array: np.ndarray, axis: int, input_shape_CHW: tuple[int, int, int]) -> np.ndarray:
    """Return the array with the channels at `axis`: there or last, as the shape determines."""
    channels, *size = input_shape_CHW
    shape = array.shape[axis:]
    first, last = shape[0] == channels, shape[-1] == channels
    if first and last:
        first_fits, last_fits = list(shape[1:]) == size, list(shape[:-1]) == size
        if first_fits == last_fits and array.shape[axis] * array.shape[-1] != 1:
            raise ArrayError(
                f"the shape {array.shape} may have the channels first or last, and the size of the model does not "
                f"decide; send {_shapes(input_shape_CHW)}"
            )
        last = last_fits
        first = not last
    if first:
        return array
    if last:
        return np.moveaxis(array, -1, axis)
    raise ChannelsError(
        f"the array has shape {array.shape} and the model takes {channels} channel{'s' * (channels > 1)}; "
        f"send {_shapes(input_shape_CHW)}"
    )


def unit_range(pixels: Num[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """Return float64 in [0, 1], exactly the given values; uint8 as `to_unit`.

    Raises:
        PixelRangeError: a value is NaN, infinite or outside [0, 1]; the message gives its index.
    """
    if pixels.dtype.kind == "u":
        return to_unit(pixels)
    values = np.ascontiguousarray(pixels, dtype=np.float64)
    # NaN is outside, since every comparison with it is false.
    inside = (values >= 0.0) & (values <= 1.0)
    if not inside.all():
        where = tuple(int(index) for index in np.unravel_index(np.argmin(inside), inside.shape))
        raise PixelRangeError(
            f"the value at {where} is {float(values[where])!r}; floats are expected in [0, 1] (divide "
            "0..255 by 255, or send uint8)"
        )
    return values
