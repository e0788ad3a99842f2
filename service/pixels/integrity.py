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
_GIF_CANVAS, _GIF_PICTURE = struct.Struct("<HH"), struct.Struct("<HHHHB")
_BMP_BEGIN, _BMP_OLD, _BMP_NEW = struct.Struct("<II"), struct.Struct("<HHHH"), struct.Struct("<iiHHI12xI")
_BMP_OLD_HEADER = 12

_SAMPLES_OF_PNG_COLOUR = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_PALETTE = 3
# First column and row, then steps between columns and rows, of each pass of Adam7.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

_SOI, _EOI, _SOS, _DHT, _DQT, _DRI, _TEM = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD, 0x01
_SOF_SEQUENTIAL, _SOF_PROGRESSIVE = (0xC0, 0xC1), 0xC2
# Lossless, hierarchical and arithmetic-coded files; C4, C8 and CC are no frame headers.
_SOF_OTHERS = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_ALL_COEFFICIENTS = (1 << 64) - 1
_BEHIND_THE_IMAGE = "extraneous bytes before marker 0xd9"
_UNKNOWN_SAMPLING = "subsampling"


def check_png(data: bytes) -> int | None:
    """Return the colours of the palette of a PNG file, if it has one; raise unless all of its data is there.

    The chunks must be whole up to IEND and contain every row.

    Pillow stops at the last row or at the end of the compressed data, whichever comes first.

    The layout is that of the PNG specification (third edition, section 5): 8 bytes of signature, then chunks of length,
    type (four letters), data and CRC-32 of type and data; IEND has no data.

    Raises:
        ValueError: a checksum is wrong, a chunk has no valid type or is repeated, or rows or the palette are missing.
        struct.error: the file ends before IEND.
        zlib.error: the compressed rows are damaged.
    """
    view = memoryview(data)
    compressed: list[memoryview] = []
    palette: int | None = None
    start = 8
    while True:
        (length,) = _UINT32_BE.unpack_from(data, start)
        end = start + 8 + length
        if zlib.crc32(view[start + 4 : end]) != _UINT32_BE.unpack_from(data, end)[0]:
            raise ValueError(f"the checksum of the chunk at byte {start} does not match")
        kind = data[start + 4 : start + 8]
        if kind == b"IDAT":
            compressed.append(view[start + 8 : end])
        elif kind == b"IEND":
            if length:
                raise ValueError("the last chunk is not empty")
            break
        elif kind == b"PLTE":
            if palette is not None or compressed or length % 3:
                raise ValueError(f"the palette at byte {start} is repeated, late or broken")
            palette = length // 3
        elif not kind.isalpha() or (kind[0] < 0x60 and start > 8):
            # A capital letter begins a chunk without which the pixels have no meaning; IHDR is the first.
            raise ValueError(f"the chunk at byte {start} is unknown")
        start = end + 4
    if data[12:16] != b"IHDR":
        raise ValueError("the first chunk is not IHDR")
    width, height, depth, colour, _, _, interlaced = _PNG_HEADER.unpack_from(data, 16)
    if colour != _PNG_PALETTE:
        palette = None
    elif palette is None:
        raise ValueError("the palette is missing")
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
    return palette


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
    tables: set[int] = set()
    """Huffman tables that are defined: class (0 DC, 1 AC) in the upper four bits, number in the lower ones."""
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
            for selected in segment[6:after_components:2]:
                # Decoders take tables of their own where one is missing.
                used = {selected >> 4} if first == 0 and bits < 0x10 else set[int]()
                if not used | ({0x10 | selected & 0x0F} if last else set[int]()) <= tables:
                    raise ValueError("a Huffman table is missing")
            if bits & 0x0F == 0:
                for component in segment[5:after_components:2]:
                    missing[component] &= ~(((2 << last) - 1) & -(1 << first))
            end = JPEG_END_OF_SCAN.search(data, at)
            if end is None:
                raise ValueError("the last scan has no end")
            segments += [segment[:after_components] + bytes((first, last, bits)), data[at : end.start()]]
            at = end.start()
        elif marker == _DHT:
            table = 4
            while table < len(segment):
                tables.add(segment[table])
                table += 17 + sum(segment[table + 1 : table + 17])
        elif marker not in (_DQT, _DRI):
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


def check_gif(data: bytes) -> int:
    """Return the colours of the palette of the first picture of a GIF file; raise unless all of its data is there.

    The blocks must lead to the trailer (GIF89a specification), and the picture must cover the canvas: Pillow fills the
    rest. It counts the pixels itself.

    Raises:
        ValueError: there is no picture, it covers a part of the canvas, or has no palette.
        IndexError: the file ends before its trailer.
    """
    palette = gif_colour_table_size(data[10])
    at = 13 + palette
    pictures = 0
    while data[at] != 0x3B:
        kind = data[at]
        if kind == 0x2C:
            left, top, width, height, flags = _GIF_PICTURE.unpack_from(data, at + 1)
            own = gif_colour_table_size(flags)
            if pictures == 0:
                palette = own or palette
                canvas_width, canvas_height = _GIF_CANVAS.unpack_from(data, 6)
                if left or top or width < canvas_width or height < canvas_height or not palette:
                    raise ValueError("the picture covers a part of its canvas, or has no palette")
            pictures += 1
            at += 11 + own
        elif kind == 0x21:
            at += 2
        else:
            # Between blocks, decoders skip bytes that do not begin a block.
            at += 1
            continue
        while data[at]:
            at += 1 + data[at]
        at += 1
    if not pictures:
        raise ValueError("there is no picture")
    return palette // 3


def check_bmp(data: bytes) -> int | None:
    """Return the colours of the palette of a BMP file, if it has one; raise unless its runs contain every pixel.

    Pillow reads pixels from wherever the header says, also from the header, and fills in pixels that runs leave out.

    Raises:
        ValueError: the pixels begin inside of the header, or runs end a row early or late, or skip pixels.
        IndexError, struct.error: the file ends before that.
    """
    begin, header = _BMP_BEGIN.unpack_from(data, 10)
    is_old = header == _BMP_OLD_HEADER
    if is_old:
        width, height, _, bits = _BMP_OLD.unpack_from(data, 18)
        coding = used = 0
    else:
        width, height, _, bits, coding, used = _BMP_NEW.unpack_from(data, 18)
    if begin == 0:
        begin = len(data)
    if begin < 14 + header:
        raise ValueError("the pixels begin inside of the header")
    if coding in (1, 2):
        _check_runs(data, begin, width, abs(height), coding)
    if bits > 8:
        return None
    return min(used or 1 << bits, (begin - 14 - header) // (3 if is_old else 4))


def _check_runs(data: bytes, at: int, width: int, height: int, coding: int) -> None:
    column = row = 0
    while row < height - 1 or (row < height and column < width):
        count, value = data[at], data[at + 1]
        at += 2
        if count:
            column += count
        elif value == 0:
            if column != width:
                raise ValueError(f"row {row} has {column} of {width} pixels")
            column, row = 0, row + 1
        elif value <= 2:
            raise ValueError(f"row {row} leaves out pixels")
        else:
            column += value
            n_bytes = value if coding == 1 else (value + 1) // 2
            at += n_bytes + n_bytes % 2
        if column > width:
            raise ValueError(f"row {row} has {column} of {width} pixels")


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
