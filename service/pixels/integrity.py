"""Integrity of image files: decoders silently fill in missing pixels, so missing data is detected here.

There is one function for each format whose decoder does so. Data behind the end of a whole file is accepted.
"""

from __future__ import annotations

import struct
import zlib

import simplejpeg

from service.errors import ImageFormatError
from service.pixels.structure import JPEG_END_OF_SCAN, JPEG_MARKER, gif_colour_table_size

_UINT32_BE = struct.Struct(">I")
_UINT16_BE = struct.Struct(">H")
_PNG_HEADER = struct.Struct(">IIBBBBB")
_UINT32_LE = struct.Struct("<I")

_SAMPLES_OF_PNG_COLOUR = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# First column and row, then steps between columns and rows, of each pass of Adam7.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

_SOI, _EOI, _SOS, _DHT, _DQT, _DRI, _TEM = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD, 0x01
_SOF_SEQUENTIAL, _SOF_PROGRESSIVE = (0xC0, 0xC1), 0xC2
# Lossless, hierarchical and arithmetic-coded files; C4, C8 and CC are no frame headers.
_SOF_OTHERS = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_ALL_COEFFICIENTS = (1 << 64) - 1
_BEHIND_THE_IMAGE = "extraneous bytes before marker 0xd9"
_UNKNOWN_SAMPLING = "subsampling"


def check_png(data: bytes) -> None:
    """Raise unless the chunks of a PNG file are whole up to IEND and contain every row.

    Pillow stops at the last row or at the end of the compressed data, whichever comes first.

    The layout is that of the PNG specification (third edition, section 5): 8 bytes of signature, then chunks of length,
    type (four letters), data and CRC-32 of type and data; IEND has no data.

    Raises:
        ValueError: a checksum is wrong, a chunk has no valid type, or rows are missing.
        struct.error: the file ends before IEND.
        zlib.error: the compressed rows are damaged.
    """
    view = memoryview(data)
    compressed: list[memoryview] = []
    start = 8
    while True:
        (length,) = _UINT32_BE.unpack_from(data, start)
        end = start + 8 + length
        if zlib.crc32(view[start + 4 : end]) != _UINT32_BE.unpack_from(data, end)[0]:
            raise ValueError(f"the checksum of the chunk at byte {start} does not match")
        kind = data[start + 4 : start + 8]
        if kind == b"IDAT":
            compressed.append(view[start + 8 : end])
        elif not kind.isalpha():
            raise ValueError(f"the chunk at byte {start} has a type that is not four letters")
        elif kind == b"IEND":
            if length:
                raise ValueError("the last chunk is not empty")
            break
        start = end + 4
    if data[12:16] != b"IHDR":
        raise ValueError("the first chunk is not IHDR")
    width, height, depth, colour, _, _, interlaced = _PNG_HEADER.unpack_from(data, 16)
    bits = depth * _SAMPLES_OF_PNG_COLOUR[colour]
    expected = height * (1 + (width * bits + 7) // 8)
    if interlaced:
        sizes = [(-((x - width) // dx), -((y - height) // dy)) for x, y, dx, dy in _ADAM7]
        expected = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
    stream = zlib.decompressobj()
    # A stream may decompress to any size: one byte more than expected tells whether there are more.
    found = len(stream.decompress(compressed[0] if len(compressed) == 1 else b"".join(compressed), expected + 1))
    if found < expected or not (stream.eof or found > expected):
        raise ValueError(f"the rows have {found} of {expected} bytes, or their checksum is missing")


def check_jpeg(data: bytes) -> None:
    """Raise unless a JPEG file that a decoder has read holds every coefficient up to its EOI marker.

    Where a scan ends early, libjpeg takes zeros for the rest and warns; Pillow does not pass the warning on. The scans
    are therefore decoded a second time, at an eighth of the size, by a decoder that does. It reports its first warning
    only, so segments that may cause harmless ones (metadata) are left out. Scans that are missing as a whole cause no
    warning: each bit of each coefficient must be in a scan (ITU-T T.81, annexes F.1 and G.1).

    Args:
        data: the whole file, from its SOI marker.

    Raises:
        ImageFormatError: the coding is neither sequential nor progressive with Huffman codes (in arithmetic coding,
            trailing zeros may be omitted: T.81, annex D.1.8), or the second decoder does not support the sampling.
        ValueError: data is missing or damaged.
    """
    segments = [b"\xff\xd8"]
    progressive = False
    missing: dict[int, int] = {}
    """Component -> coefficients, as a bit mask, that have not been sent to their last bit."""
    at = 2
    while True:
        marker, at = _next_marker(data, at)
        if marker == _EOI:
            break
        if marker == _TEM or 0xD0 <= marker <= _SOI:
            continue
        (length,) = _UINT16_BE.unpack_from(data, at)
        segment, at = data[at - 2 : at + length], at + length
        if marker in _SOF_OTHERS:
            raise ImageFormatError(
                "the JPEG file is lossless, hierarchical or arithmetic-coded, and missing data in it cannot be "
                "detected; save it as a baseline or progressive JPEG, or as PNG"
            )
        if marker in _SOF_SEQUENTIAL or marker == _SOF_PROGRESSIVE:
            progressive = marker == _SOF_PROGRESSIVE
            missing = {segment[10 + 3 * index]: _ALL_COEFFICIENTS for index in range(segment[9])}
        elif marker == _SOS:
            after_components = 5 + 2 * segment[4]
            # Some cameras write other values into the scans of sequential files, where these alone have a meaning.
            first, last, bits = segment[after_components : after_components + 3] if progressive else (0, 63, 0)
            if bits & 0x0F == 0:
                for component in segment[5:after_components:2]:
                    missing[component] &= ~(((2 << last) - 1) & -(1 << first))
            end = JPEG_END_OF_SCAN.search(data, at)
            if end is None:
                raise ValueError("the last scan has no end")
            segments += [segment[:after_components] + bytes((first, last, bits)), data[at : end.start()]]
            at = end.start()
        elif marker not in (_DHT, _DQT, _DRI):
            continue
        if marker != _SOS:
            segments.append(segment)
    if not missing or any(missing.values()):
        raise ValueError(f"coefficients are missing: {missing}")
    try:
        simplejpeg.decode_jpeg(b"".join([*segments, b"\xff\xd9"]), "GRAY", min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        if _UNKNOWN_SAMPLING in str(error):
            raise ImageFormatError(
                "the JPEG file has unusual sampling factors; save it with 4:4:4, 4:2:2 or 4:2:0, or as PNG"
            ) from None
        if _BEHIND_THE_IMAGE not in str(error):
            raise


def _next_marker(data: bytes, at: int) -> tuple[int, int]:
    found = JPEG_MARKER.search(data, at)
    if found is None:
        raise ValueError("there is no EOI marker")
    return data[found.end() - 1], found.end()


def check_gif(data: bytes) -> None:
    """Raise unless the blocks of a GIF file lead to its trailer (GIF89a specification); Pillow counts the pixels.

    Raises:
        IndexError: the file ends before its trailer.
    """
    at = 13 + gif_colour_table_size(data[10])
    while data[at] != 0x3B:
        kind = data[at]
        if kind == 0x2C:
            at += 11 + gif_colour_table_size(data[at + 9])
        elif kind == 0x21:
            at += 2
        else:
            # Between blocks, decoders skip bytes that do not begin a block.
            at += 1
            continue
        while data[at]:
            at += 1 + data[at]
        at += 1


def with_other_padding(data: bytes) -> bytes | None:
    """Return a WebP file with another byte of padding behind its image data, if it has such a byte.

    RIFF pads a chunk of odd size with one byte. libwebp decodes that byte where the image data is too short: then the
    pixels of the two files differ.
    """
    at = 12
    while True:
        (size,) = _UINT32_LE.unpack_from(data, at + 4)
        if data[at : at + 4] in (b"VP8 ", b"VP8L"):
            break
        at += 8 + size + size % 2
    padding = at + 8 + size
    return data[:padding] + bytes([data[padding] ^ 0xFF]) + data[padding + 1 :] if size % 2 else None
