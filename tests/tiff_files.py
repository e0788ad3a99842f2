"""TIFF files written entry by entry: depths, byte orders and faults that no program writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np


def lzw(data: bytes) -> bytes:
    """LZW as TIFF 6.0 (section 13) describes the encoder."""
    bits: list[str] = []
    table: dict[bytes, int] = {}

    def write(code: int) -> None:
        size = 258 + len(table)
        bits.append(f"{code:0{9 + (size > 511) + (size > 1023) + (size > 2047)}b}")

    write(256)
    string = b""
    for value in data:
        byte = bytes([value])
        if string + byte in table or not string:
            string += byte
            continue
        write(table.get(string, string[0]))
        table[string + byte] = 258 + len(table)
        string = byte
        if len(table) == 4094 - 257:
            bits.append(f"{256:012b}")
            table = {}
    if string:
        write(table.get(string, string[0]))
        table[b"the last entry"] = 0
    write(257)
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def pack_bits(data: bytes) -> bytes:
    """Literal runs of up to 100 bytes, with a repetition and no operation between them."""
    packed = b""
    for at in range(0, len(data), 103):
        piece = data[at : at + 100]
        packed += bytes([len(piece) - 1]) + piece + b"\x80"
        for value in data[at + 100 : at + 103]:
            packed += bytes([0, value])
    return packed


CODINGS: dict[int, Callable[[bytes], bytes]] = {
    1: bytes,
    5: lzw,
    8: zlib.compress,
    32946: zlib.compress,
    32773: pack_bits,
}


def tiles(part_HWS: np.ndarray, rows: int, columns: int) -> list[np.ndarray]:
    """Blocks of one size that cover the samples, row by row; what is beyond them is noise."""
    height, width, samples = part_HWS.shape
    padded = np.random.default_rng(2).integers(
        0, 256, (-(-height // rows) * rows, -(-width // columns) * columns, samples)
    )
    padded = padded.astype(part_HWS.dtype)
    padded[:height, :width] = part_HWS
    return [
        padded[top : top + rows, left : left + columns]
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]


def tiff(
    samples_HWS: np.ndarray,
    order: str = "<",
    coding: int = 1,
    rows: int = 3,
    predictor: int = 1,
    planes: int = 1,
    tags: dict[int, Sequence[int] | None] | None = None,
    lengths: Callable[[list[int]], list[int]] = list,
    offsets: Callable[[list[int]], list[int]] = list,
    following: int = 0,
    cut: int = 0,
    tile: tuple[int, int] | None = None,
) -> bytes:
    """Return the file of uint8 or uint16 samples: header, strips, directory, long values.

    Args:
        samples_HWS: grey or RGB, and straight alpha.
        order: `<` or `>`.
        coding: compression.
        rows: of a strip.
        predictor: 2 stores differences between neighbours.
        planes: 2 stores each sample in strips of its own.
        tags: entries to replace, or to leave out (null).
        lengths: changes the stated lengths of the strips.
        offsets: changes the stated offsets of the strips.
        following: offset of the next directory.
        cut: bytes that the last strip lacks; its stated length is the shorter one.
        tile: rows and columns of tiles, in place of strips; those that reach beyond the image are padded by noise.
    """
    height, width, samples = samples_HWS.shape
    kind = f"{order}u{samples_HWS.itemsize}"
    parts = np.split(samples_HWS, samples, axis=2) if planes == 2 else [samples_HWS]
    strips: list[bytes] = []
    for part in parts:
        for block in [part[top : top + rows] for top in range(0, height, rows)] if tile is None else tiles(part, *tile):
            stored = block.copy()
            if predictor == 2:
                stored[:, 1:] -= block[:, :-1]
            strips.append(CODINGS.get(coding, bytes)(stored.astype(kind).tobytes()))
    strips[-1] = strips[-1][: len(strips[-1]) - cut]
    places = [8 + sum(map(len, strips[:n])) for n in range(len(strips))]
    entries: dict[int, Sequence[int] | None] = {
        256: [width],
        257: [height],
        258: [8 * samples_HWS.itemsize] * samples,
        259: [coding],
        262: [2 if samples > 2 else 1],
        273 if tile is None else 324: offsets(places),
        277: [samples],
        279 if tile is None else 325: lengths([len(strip) for strip in strips]),
        **({278: [rows]} if tile is None else {322: [tile[1]], 323: [tile[0]]}),
        284: [planes],
        317: [predictor],
        **({} if samples in (1, 3) else {338: [2]}),
        **(tags or {}),
    }
    body = b"".join(strips)
    begin = 8 + len(body) + len(body) % 2
    given = sorted((tag, values) for tag, values in entries.items() if values is not None)
    directory, behind = struct.pack(f"{order}H", len(given)), b""
    for tag, values in given:
        content = struct.pack(f"{order}{len(values)}I", *values)
        if len(content) > 4:
            content, behind = (
                struct.pack(f"{order}I", begin + 6 + 12 * len(given) + len(behind)),
                behind + content,
            )
        directory += struct.pack(f"{order}HHI", tag, 4, len(values)) + content
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, begin)
    return head + body + b"\0" * (len(body) % 2) + directory + struct.pack(f"{order}I", following) + behind
