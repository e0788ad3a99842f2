"""Reading of TIFF files: the values that are stored, or a refusal.

The subset of TIFF 6.0 (Adobe, 1992) in which a value has one meaning: one image of unsigned grey or RGB, 8 or 16 bits,
in strips or tiles that are stored as they are or coded by LZW, Deflate or PackBits. Pillow is not asked: libtiff
estimates lengths that are missing, and Pillow halves the bits of RGB and misreads planes of 16 bits (13.0).

Axes: H height, W width, S samples of a pixel, the last of which may be alpha.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from service.errors import ImageFormatError
from service.shapes import Int64, UInt8, UInt16

_ORDERS = {b"II": "<", b"MM": ">"}
_CLASSIC, _BIG = 42, 43
_TYPES = {1: "u1", 3: "u2", 4: "u4"}
"""Types of the entries that matter here: BYTE, SHORT and LONG."""
_MOST_ENTRIES = 1000
_MOST_STRIPS = 65536
_MOST_PADDED, _PADDED_PIXELS = 16, 2**22
"""Pixels of all tiles, in units of those of the image, and beside these: small images have tiles of a usual size."""

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _CODING, _PHOTOMETRIC, _FILL = 254, 256, 257, 258, 259, 262, 266
_OFFSETS, _ORIENTATION, _SAMPLES, _ROWS, _COUNTS, _PLANES = 273, 274, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_ROWS, _TILE_OFFSETS, _TILE_COUNTS, _EXTRA, _FORMAT = 317, 322, 323, 324, 325, 338, 339
_TILES = (_TILE_WIDTH, _TILE_ROWS, _TILE_OFFSETS, _TILE_COUNTS)
_DEFAULTS = {
    _SUBFILE: 0,
    _BITS: 1,
    _CODING: 1,
    _FILL: 1,
    _ORIENTATION: 1,
    _SAMPLES: 1,
    _ROWS: 2**32 - 1,
    _PLANES: 1,
    _PREDICTOR: 1,
    _FORMAT: 1,
}
_NEEDED = (_WIDTH, _HEIGHT, _PHOTOMETRIC)
_TAGS = (*_NEEDED, *_DEFAULTS, _OFFSETS, _COUNTS, *_TILES, _EXTRA)
_WHITE_IS_ZERO, _RGB = 0, 2
_COLOURS = {_WHITE_IS_ZERO: 1, 1: 1, _RGB: 3}
_OTHER_COLOURS = {3: "a palette", 5: "CMYK", 6: "YCbCr", 8: "CIE L*a*b*"}
_ASSOCIATED, _UNASSOCIATED = 1, 2
_CURE = "save it as grey or RGB of 8 or 16 bits, without compression or with LZW, or as PNG"


def is_tiff(data: bytes) -> bool:
    """Return whether a file begins as a TIFF or BigTIFF file."""
    order = _ORDERS.get(data[:2])
    return order is not None and _number(data, order, 2, 2) in (_CLASSIC, _BIG)


@dataclass(frozen=True)
class TiffHeader:
    """How the pixels of a TIFF file are stored."""

    height: int
    width: int
    order: str
    """Byte order, `<` or `>`."""
    bits: int
    """8 or 16."""
    colours: int
    """1 or 3."""
    alpha: int | None
    """Kind of the alpha sample, if there is one: 1 premultiplied, 2 not."""
    is_inverted: bool
    """Whether 0 is white."""
    orientation: int
    """1 to 8, as in EXIF."""
    coding: int
    has_differences: bool
    """Whether a row holds the differences between neighbours."""
    is_planar: bool
    """Whether each sample has strips of its own."""
    is_tiled: bool
    """Whether strips are tiles, which are all of one size, also where they reach beyond the image."""
    rows: int
    """Rows of a strip; the last may have less."""
    columns: int
    """Columns of a strip."""
    strips: tuple[tuple[int, int], ...]
    """Begin and end of each strip, in bytes."""

    @property
    def samples(self) -> int:
        """Samples of a pixel."""
        return self.colours + (self.alpha is not None)


def read_header(data: bytes) -> TiffHeader:
    """Return how the pixels are stored; raise for a file whose values would have no single meaning.

    Raises:
        ImageFormatError: several images, or another coding, depth or kind of colour.
        ValueError: the entries are damaged, contradict each other or lead out of the file.
    """
    order = _ORDERS[data[:2]]
    if _number(data, order, 2, 2) == _BIG:
        raise ImageFormatError(f"the file is a BigTIFF; save it as a classic TIFF ({_CURE})")
    tags, following, end = _entries(data, order)
    if following or tags[_SUBFILE] != (0,):
        raise ImageFormatError("the TIFF file contains several images, or a page or preview of one; send one image")
    colours, bits, alpha = _pixel(tags)
    coding = _one(tags, _CODING)
    if coding not in _DECODERS or _one(tags, _FILL) != 1:
        raise ImageFormatError(f"the TIFF file has compression {coding}, or its bits in another order; {_CURE}")
    predictor = _one(tags, _PREDICTOR)
    if predictor not in (1, 2) or (predictor == 2 and coding not in _PREDICTED):
        raise ImageFormatError(f"the TIFF file has predictor {predictor} with compression {coding}; {_CURE}")
    height, width, planes = _one(tags, _HEIGHT), _one(tags, _WIDTH), _one(tags, _PLANES)
    is_tiled = any(tag in tags for tag in _TILES)
    rows, columns = _tile(tags, width * height) if is_tiled else (min(_one(tags, _ROWS), height), width)
    if not (height and width and rows and columns and planes in (1, 2)):
        raise ValueError("a size is zero, or the planes have no order")
    is_planar = planes == 2 and colours + (alpha is not None) > 1
    count = -(-height // rows) * -(-width // columns) * (colours + (alpha is not None) if is_planar else 1)
    return TiffHeader(
        height=height,
        width=width,
        order=order,
        bits=bits,
        colours=colours,
        alpha=alpha,
        is_inverted=_one(tags, _PHOTOMETRIC) == _WHITE_IS_ZERO,
        orientation=_one(tags, _ORIENTATION),
        coding=coding,
        has_differences=predictor == 2,
        is_planar=is_planar,
        is_tiled=is_tiled,
        rows=rows,
        columns=columns,
        strips=_strips(tags, is_tiled, count, len(data), end),
    )


def read_pixels(data: bytes, header: TiffHeader) -> UInt8[np.ndarray, "H W S"] | UInt16[np.ndarray, "H W S"]:
    """Return the values, turned as the orientation says; black is 0.

    Args:
        data: the whole file.
        header: of `read_header`.

    Raises:
        ValueError, zlib.error: a strip holds too little, or its checksum does not match.
    """
    parts = header.samples if header.is_planar else 1
    kind = np.dtype(f"{header.order}u{header.bits // 8}")
    shape = parts, header.height, header.width, header.samples // parts
    values_PHWS = np.empty(shape, kind.newbyteorder("="))
    row = header.columns * shape[-1] * kind.itemsize
    decode = _DECODERS[header.coding]
    across = -(-header.width // header.columns)
    for index, (begin, end) in enumerate(header.strips):
        part, place = divmod(index, len(header.strips) // parts)
        top, left = place // across * header.rows, place % across * header.columns
        region_HWS = values_PHWS[part, top : top + header.rows, left : left + header.columns]
        rows = header.rows if header.is_tiled else len(region_HWS)
        stored = np.frombuffer(decode(data[begin:end], rows * row, header.rows * row), kind)
        # A tile may reach beyond the image.
        region_HWS[...] = stored.reshape(rows, header.columns, -1)[: len(region_HWS), : region_HWS.shape[1]]
        if header.has_differences:
            np.add.accumulate(region_HWS, axis=1, dtype=region_HWS.dtype, out=region_HWS)
    values_HWS = np.moveaxis(values_PHWS[..., 0], 0, -1) if header.is_planar else values_PHWS[0]
    if header.is_inverted:
        np.invert(values_HWS[..., :1], out=values_HWS[..., :1])
    if header.alpha == _ASSOCIATED and (values_HWS[..., -1] != np.iinfo(values_HWS.dtype).max).any():
        raise ImageFormatError(
            "the colours of the TIFF file are premultiplied by its alpha channel; flatten it onto a background first "
            "and send it without alpha, or save it with straight alpha"
        )
    return _turned(values_HWS, header.orientation)


def _number(data: bytes, order: str, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little" if order == "<" else "big")


def _entries(data: bytes, order: str) -> tuple[dict[int, tuple[int, ...]], int, tuple[int, int]]:
    """Return the values of the first directory by tag, the offset of the next, and the bytes that it takes."""
    begin = _number(data, order, 4, 4)
    count = _number(data, order, begin, 2)
    end = begin + 2 + 12 * count
    if begin < 8 or not 0 < count <= _MOST_ENTRIES or end + 4 > len(data):
        raise ValueError("the directory is not in the file")
    tags = {tag: (value,) for tag, value in _DEFAULTS.items()}
    seen: set[int] = set()
    for at in range(begin + 2, end, 12):
        tag, kind, length = (_number(data, order, at + skip, size) for skip, size in ((0, 2), (2, 2), (4, 4)))
        if tag not in _TAGS:
            continue
        if tag in seen or kind not in _TYPES or not length:
            raise ValueError(f"entry {tag} is repeated, empty or of type {kind}")
        seen.add(tag)
        dtype = np.dtype(f"{order}{_TYPES[kind]}")
        size = length * dtype.itemsize
        where = at + 8 if size <= 4 else _number(data, order, at + 8, 4)
        if where + size > len(data) or length > 4 * _MOST_STRIPS:
            raise ValueError(f"entry {tag} leads out of the file")
        tags[tag] = tuple(np.frombuffer(data, dtype, length, where).tolist())
    if not seen.issuperset(_NEEDED):
        raise ValueError("the file states no size or no kind of colour")
    return tags, _number(data, order, end, 4), (begin, end + 4)


def _one(tags: dict[int, tuple[int, ...]], tag: int) -> int:
    """Return the value of an entry whose values are all the same."""
    if len(set(tags[tag])) != 1:
        raise ValueError(f"entry {tag} has several values")
    return tags[tag][0]


def _pixel(tags: dict[int, tuple[int, ...]]) -> tuple[int, int, int | None]:
    """Return the number of colours, the bits of a sample and the kind of the alpha sample."""
    photometric, samples, extra = _one(tags, _PHOTOMETRIC), _one(tags, _SAMPLES), tags.get(_EXTRA, ())
    if photometric not in _COLOURS:
        colour = _OTHER_COLOURS.get(photometric, f"photometric interpretation {photometric}")
        raise ImageFormatError(f"the colours of the TIFF file are {colour}; {_CURE}")
    colours = _COLOURS[photometric]
    if set(tags[_BITS]) not in ({8}, {16}) or set(tags[_FORMAT]) != {1}:
        raise ImageFormatError(
            "the TIFF file does not have 8 bits per channel, or 16, as unsigned integers; save it so, or send the "
            "values in [0, 1] as a float npy array (application/x-npy)"
        )
    if samples != colours and (samples != colours + 1 or extra not in ((_ASSOCIATED,), (_UNASSOCIATED,))):
        raise ImageFormatError(
            f"the TIFF file has {samples} samples per pixel, of which {len(extra)} are extra, and one of alpha at most "
            f"is read; {_CURE}"
        )
    if any(len(tags[tag]) not in (1, samples) for tag in (_BITS, _FORMAT)) or (samples == colours and extra):
        raise ValueError("the number of samples is contradicted")
    return colours, tags[_BITS][0], extra[0] if extra else None


def _tile(tags: dict[int, tuple[int, ...]], pixels: int) -> tuple[int, int]:
    """Return the rows and columns of a tile."""
    if not all(tag in tags for tag in _TILES) or _OFFSETS in tags or _COUNTS in tags:
        raise ValueError("the tiles are not described, or there are strips besides")
    width, height, rows, columns = (_one(tags, tag) for tag in (_WIDTH, _HEIGHT, _TILE_ROWS, _TILE_WIDTH))
    if (
        rows
        and columns
        and -(-width // columns) * columns * -(-height // rows) * rows > (_MOST_PADDED * pixels + _PADDED_PIXELS)
    ):
        raise ImageFormatError("the tiles of the TIFF file are far larger than its image; save it in strips, or as PNG")
    return rows, columns


def _strips(
    tags: dict[int, tuple[int, ...]], is_tiled: bool, count: int, n_bytes: int, directory: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """Return begin and end of each strip or tile; no two of them share a byte."""
    places, sizes = (_TILE_OFFSETS, _TILE_COUNTS) if is_tiled else (_OFFSETS, _COUNTS)
    offsets, lengths = tags.get(places, ()), tags.get(sizes, ())
    if count > _MOST_STRIPS:
        raise ImageFormatError(f"the TIFF file has more than {_MOST_STRIPS} strips or tiles; save it again")
    if not len(offsets) == len(lengths) == count:
        raise ValueError(f"there are {len(offsets)} strips with {len(lengths)} lengths, expected {count}")
    strips = tuple((offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
    at = 8
    for begin, end in sorted((*strips, directory)):
        if begin < at or end == begin:
            raise ValueError("a strip is missing, or lies inside of another or of the header")
        at = end
    if at > n_bytes:
        raise ValueError("a strip ends behind the file")
    return strips


# Each of these returns the first `least` bytes of a strip, which holds just these, or is padded to as many rows as the
# others and holds `most`. Other lengths contradict the size of the image.
def _stored(data: bytes, least: int, most: int) -> bytes:
    if len(data) not in (least, most):
        raise ValueError(f"a strip has {len(data)} of {least} bytes")
    return data[:least]


def _inflate(data: bytes, least: int, most: int) -> bytes:
    """Decode Deflate (RFC 1950)."""
    stream = zlib.decompressobj()
    found = stream.decompress(data, most + 1)
    if not (len(found) in (least, most) and stream.eof):
        raise ValueError(f"a strip has {len(found)} of {least} bytes, or its checksum is missing")
    return found[:least]


def _unpack_bits(data: bytes, least: int, most: int) -> bytes:
    """Decode PackBits (TIFF 6.0, section 9)."""
    pieces: list[bytes] = []
    at = found = 0
    while at < len(data) and found <= most:
        count = data[at]
        if count < 128:
            piece = data[at + 1 : at + 2 + count]
            at += 2 + count
        else:
            # 128 is no operation.
            piece = data[at + 1 : at + 2] * (257 - count) if count > 128 else b""
            at += 2 if count > 128 else 1
        found += len(piece)
        pieces.append(piece)
    if at > len(data) or found not in (least, most):
        raise ValueError("a run does not end with its strip")
    return b"".join(pieces)[:least]


# 257 is the end.
_CLEAR, _FIRST = 256, 258
_MOST_CODES = 3839
# Codes between two clearings: the table grows by an entry with each, and the width of a code with the table.
_WIDTHS = np.repeat([9, 10, 11, 12], [254, 512, 1024, _MOST_CODES - 1790])
_ENDS = np.cumsum(_WIDTHS)
_MOST_BYTES = int(_ENDS[-1]) // 8 + 4


def _unpack_lzw(data: bytes, least: int, most: int) -> bytes:
    """Decode LZW (TIFF 6.0, section 13)."""
    pieces: list[bytes] = []
    at, found, stop = 9, 0, _CLEAR
    if _number(data, ">", 0, 2) >> 7 != _CLEAR:
        raise ValueError("a strip does not begin with an empty table")
    while stop == _CLEAR and found <= most:
        width_C = _WIDTHS[: np.searchsorted(_ENDS, 8 * len(data) - at, "right")]
        start_C = at % 8 + _ENDS[: len(width_C)] - width_C
        # A code is read from three bytes, of which the last ones may lie behind the end.
        content = np.frombuffer(data[at // 8 : at // 8 + _MOST_BYTES] + b"\0\0", np.uint8).astype(np.int64)
        words = content[:-2] << 16 | content[1:-1] << 8 | content[2:]
        code_C = words[start_C >> 3] >> (24 - (start_C & 7) - width_C) & (1 << width_C) - 1
        stops = np.flatnonzero(code_C >> 1 == _CLEAR >> 1)
        if not len(stops):
            raise ValueError("the strip has no end, or a table is not cleared")
        stop, at = int(code_C[stops[0]]), at + int(_ENDS[stops[0]])
        pieces.append(_strings(code_C[: stops[0]]))
        found += len(pieces[-1])
    if found not in (least, most):
        raise ValueError(f"a strip has {found} of {least} bytes")
    return b"".join(pieces)[:least]


def _strings(code_C: Int64[np.ndarray, " C"]) -> bytes:
    """Return the bytes that the codes between two clearings encode.

    Entry k of the table is the string of code k and the first byte of the string of code k + 1. The strings are walked
    from their last byte to their first, all at the same time.
    """
    entry_C = code_C - _FIRST
    if (entry_C >= np.arange(len(entry_C))).any():
        raise ValueError("a code stands for nothing yet")
    length_C, first_C = np.ones_like(code_C), code_C.copy()
    walking = np.flatnonzero(entry_C >= 0)
    at = entry_C[walking]
    while len(walking):
        length_C[walking] += 1
        first_C[walking] = code_C[at]
        goes_on = entry_C[at] >= 0
        walking, at = walking[goes_on], entry_C[at[goes_on]]
    place = np.cumsum(length_C)
    string = np.empty(place[-1] if len(place) else 0, np.uint8)
    at = np.arange(len(code_C))
    while len(at):
        place = place - 1
        entry = entry_C[at]
        goes_on = entry >= 0
        string[place] = np.where(goes_on, first_C[np.maximum(entry, -1) + 1], code_C[at])
        at, place = entry[goes_on], place[goes_on]
    return string.tobytes()


_PREDICTED = (5, 8, 32946)
_DECODERS: dict[int, Callable[[bytes, int, int], bytes]] = {
    1: _stored,
    5: _unpack_lzw,
    8: _inflate,
    32946: _inflate,
    32773: _unpack_bits,
}


def _turned(values_HWS: np.ndarray, orientation: int) -> np.ndarray:
    """Return the image as it is to be seen; an orientation that TIFF does not define changes nothing."""
    if orientation in (5, 6, 7, 8):
        values_HWS = values_HWS.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values_HWS = values_HWS[::-1]
    if orientation in (2, 3, 6, 7):
        values_HWS = values_HWS[:, ::-1]
    return values_HWS
