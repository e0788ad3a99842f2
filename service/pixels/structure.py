"""Structure of image files, read without decoding: files of far more parts than programs write are refused.

A decoder takes some microseconds for each chunk, segment or scan, however little is in it, and a scan of a progressive
JPEG visits every block of the image: a file of some kilobytes can take minutes. Each limit is several times the
most that cameras and programs write. Damaged files pass: the decoders and `service.pixels.integrity` refuse them.
"""

from __future__ import annotations

import re
import struct

from service.errors import ImageFormatError

MOST_SCANS = 100
"""Scans of a JPEG file; a progressive one has 10, and one that was optimised up to some 20."""
MOST_PARTS = 1000
"""Chunks or segments of a file, beside one for each 512 bytes: encoders write image data in pieces of 4 KB and more."""
MOST_TEXT_BLOCKS = 2000
"""Blocks of up to 255 bytes of a GIF file that hold no pixels."""
_BYTES_OF_A_PART = 512
_BYTES_OF_A_GIF_BLOCK = 32
_PNG_CHUNK = struct.Struct(">I4s")
_RIFF_CHUNK = struct.Struct("<4sI")

_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
JPEG_MARKER = re.compile(rb"\xff[\x01-\xfe]")
# Inside entropy-coded data, FF 00 is a byte FF, and restart markers (D0 to D7) belong to the data.
JPEG_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def check_structure(data: bytes) -> None:
    """Raise unless an image file has as few parts as programs write.

    Raises:
        ImageFormatError: too many chunks, segments, scans or blocks; the message names them.
    """
    try:
        if data.startswith(b"\x89PNG"):
            _count_chunks(data)
        elif data.startswith(b"\xff\xd8"):
            _count_segments(data)
        elif data.startswith(b"GIF8"):
            _count_blocks(data)
        elif data.startswith(b"RIFF"):
            _count_riff_chunks(data)
    except (IndexError, struct.error):
        return


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a WebP file, or null for other bytes (RFC 9649): its decoder allocates at once."""
    kind, begin = data[12:16], data[20:30]
    if not data.startswith(b"RIFF") or data[8:12] != b"WEBP" or len(begin) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(begin[4:7], "little"), 1 + int.from_bytes(begin[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(begin[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(begin[6:8], "little") & 0x3FFF, int.from_bytes(begin[8:10], "little") & 0x3FFF


def _refuse(count: int, kind: str) -> ImageFormatError:
    return ImageFormatError(f"the file has more than {count} {kind}, far more than programs write; save it again")


def _count_chunks(data: bytes) -> None:
    """Count the chunks of a PNG file."""
    most = MOST_PARTS + len(data) // _BYTES_OF_A_PART
    at = 8
    for _ in range(most):
        length, kind = _PNG_CHUNK.unpack_from(data, at)
        if kind == b"IEND":
            return
        at += 12 + length
    raise _refuse(most, "chunks")


def _count_riff_chunks(data: bytes) -> None:
    most = MOST_PARTS + len(data) // _BYTES_OF_A_PART
    at, end = 12, 8 + int.from_bytes(data[4:8], "little")
    for _ in range(most):
        if at >= end:
            return
        _, length = _RIFF_CHUNK.unpack_from(data, at)
        at += 8 + length + length % 2
    raise _refuse(most, "chunks")


def _count_segments(data: bytes) -> None:
    at, scans = 2, 0
    most = MOST_PARTS + len(data) // _BYTES_OF_A_PART
    for _ in range(most):
        found = JPEG_MARKER.search(data, at)
        if found is None:
            return
        marker, at = data[found.end() - 1], found.end()
        if marker == _EOI:
            return
        if marker == _TEM or 0xD0 <= marker <= _SOI:
            continue
        at += int.from_bytes(data[at : at + 2], "big")
        if marker == _SOS:
            scans += 1
            if scans > MOST_SCANS:
                raise _refuse(MOST_SCANS, "scans")
            end = JPEG_END_OF_SCAN.search(data, at)
            if end is None:
                return
            at = end.start()
    raise _refuse(most, "segments")


def _count_blocks(data: bytes) -> None:
    most = MOST_PARTS + len(data) // _BYTES_OF_A_GIF_BLOCK
    at = 13 + gif_colour_table_size(data[10])
    texts = kind = 0
    for _ in range(most):
        if kind:
            # A sub-block; one of length 0 is the last.
            texts += kind == 0x21
            if texts > MOST_TEXT_BLOCKS:
                raise _refuse(MOST_TEXT_BLOCKS, "blocks without pixels")
            kind = kind if data[at] else 0
            at += 1 + data[at]
        elif data[at] == 0x3B:
            return
        elif data[at] == 0x2C:
            kind = data[at]
            at += 11 + gif_colour_table_size(data[at + 9])
        elif data[at] == 0x21:
            kind = data[at]
            at += 2
        else:
            at += 1
    raise _refuse(most, "blocks")


def gif_colour_table_size(flags: int) -> int:
    """Return the bytes of the colour table that a byte of flags declares."""
    return 3 << (flags & 0x07) + 1 if flags & 0x80 else 0
