"""Reading of HEIC files by libheif, where the extra `heic` (pillow-heif) is installed: the primary picture, 8 bits.

HEVC decodes to exact YCbCr values, but the step from there to RGB is that of libheif: another version may round
otherwise. libheif turns the picture as the file says (ISO/IEC 23008-12; EXIF does not count), and fills in tiles whose
data is cut off, so the places of all data are compared with the file first.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from service.errors import ImageFormatError, NotAnImageError
from service.shapes import UInt8

if TYPE_CHECKING:
    from pillow_heif import HeifImage

_FILE = re.compile(rb"....ftyp(?:hei[cfmsx]|hev[cmsx]|mif1|msf1|avi[fs])", re.DOTALL)
_MOST_BOXES = 1000
_MOST_EXTENTS = 16_384
_IN_FILE = 0
"""Construction method of data at a place of the file (ISO/IEC 14496-12, 8.11.3)."""


def is_heif(data: bytes) -> bool:
    """Return whether a file begins as a HEIC or AVIF file."""
    return _FILE.match(data) is not None


class HeifPicture(NamedTuple):
    """The primary picture of a file, not decoded yet."""

    width: int
    height: int
    has_alpha: bool
    image: HeifImage

    def samples(self) -> UInt8[np.ndarray, "S H W"]:
        """Return the decoded values: grey or RGB, and alpha.

        Raises:
            ValueError, RuntimeError, OSError, EOFError, SyntaxError: the file is damaged.
        """
        decoded = np.asarray(self.image)
        samples_SHW = np.moveaxis(decoded.reshape(*decoded.shape[:2], -1), -1, 0)
        if samples_SHW.shape[1:] != (self.height, self.width) or samples_SHW.dtype != np.uint8:
            raise ValueError("the decoded picture is not the one that the file declares")
        # A grey picture with alpha, which libheif gives as RGB, has no subsampling of colours.
        is_grey = len(samples_SHW) == 4 and "chroma" not in self.image.info
        return samples_SHW[[0, 3]] if is_grey else samples_SHW


def open_heif(data: bytes) -> HeifPicture:
    """Return the primary picture of a HEIC file, whose pixels are not decoded yet.

    Raises:
        NotAnImageError: the file is an AVIF file, or the library is not installed.
        ImageFormatError: more than 8 bits, premultiplied alpha, or too many parts.
        ValueError, IndexError, RuntimeError, OSError, EOFError, SyntaxError: the file is damaged.
    """
    brands = data[8 : int.from_bytes(data[:4], "big")]
    if b"avif" in brands or b"avis" in brands:
        raise NotAnImageError("this is an AVIF file, which is not supported; save it as JPEG or PNG and send that")
    if importlib.util.find_spec("pillow_heif") is None:
        raise NotAnImageError(
            "this is a HEIC file, which this server does not read; save it as JPEG or PNG and send that (the operator "
            "can install the extra heic)"
        )
    _check_extents(data)
    import pillow_heif

    options = pillow_heif.options
    # Other threads would escape the limits of a decoding process; other pictures are not asked for.
    options.DECODE_THREADS = 1
    options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
    found = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    image = found[found.primary_index]
    if image.info["bit_depth"] != 8:
        raise ImageFormatError(
            f"the HEIC file has {image.info['bit_depth']} bits per channel, and 8 are read; save it with 8, or as PNG"
        )
    if image.premultiplied_alpha:
        raise ImageFormatError(
            "the colours of the HEIC file are premultiplied by its alpha channel; flatten it onto a background first "
            "and send it without alpha"
        )
    width, height = image.size
    return HeifPicture(width, height, image.has_alpha, image)


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, begin and end of the content of each box (ISO/IEC 14496-12, 4.2)."""
    for _ in range(_MOST_BOXES):
        if at + 8 > end:
            return
        size, kind, begin = _number(data, at, 4), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, begin = _number(data, at + 8, 8), at + 16
        behind = at + size if size else end
        yield kind, begin, behind
        if behind <= at:
            return
        at = behind
    raise ImageFormatError(f"the file has more than {_MOST_BOXES} boxes, far more than programs write; save it again")


def _check_extents(data: bytes) -> None:
    """Raise `ValueError` unless the data of every item is in the file (ISO/IEC 14496-12, 8.11.3)."""
    _, meta, end = next((box for box in _boxes(data, 0, len(data)) if box[0] == b"meta"), (b"", 0, 0))
    _, at, end = next((box for box in _boxes(data, meta + 4, end) if box[0] == b"iloc"), (b"", 0, 0))
    if not 0 < at < end <= len(data):
        raise ValueError("the file does not say where its data is")
    version, sizes = data[at], _number(data, at + 4, 2)
    offset_size, length_size, base_size = (sizes >> shift & 15 for shift in (12, 8, 4))
    index_size = sizes & 15 if version else 0
    wide = 4 if version == 2 else 2
    items, at = _number(data, at + 6, wide), at + 6 + wide
    left = _MOST_EXTENTS
    for _ in range(items):
        method = _number(data, at + wide, 2) & 15 if version else _IN_FILE
        at += wide + (4 if version else 2)
        base, extents = _number(data, at, base_size), _number(data, at + base_size, 2)
        at += base_size + 2
        if at > end:
            raise ValueError("the places of the data are cut off")
        left -= 1 + extents
        if left < 0:
            raise ImageFormatError(
                f"the file has more than {_MOST_EXTENTS} parts, far more than programs write; save it again"
            )
        for _ in range(extents):
            offset = base + _number(data, at + index_size, offset_size)
            length = _number(data, at + index_size + offset_size, length_size)
            at += index_size + offset_size + length_size
            if at > end or (method == _IN_FILE and not 0 < offset + length <= len(data)):
                raise ValueError("data of the picture is not in the file")


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")
