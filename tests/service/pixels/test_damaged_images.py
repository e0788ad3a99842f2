"""Files whose decoder would invent pixels, and files of too many parts, are refused; their siblings are read."""

from __future__ import annotations

import struct
import zlib

import costly_bodies as bodies
import numpy as np
import pytest
from costly_bodies import chunk
from encoding import encode
from PIL import Image

from service.errors import ImageFormatError, ImageSizeError, ImageTooLargeError, NotAnImageError
from service.pixels.images import PLAIN_PIXELS, decode_image, decode_plain, is_plain
from service.pixels.structure import MOST_SCANS, check_structure, webp_size

LIMIT = 100_000
GREYS = bytes(level for index in range(256) for level in (index, index, index, 0))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def palette_png(indices: bytes, colours: int, depth: int = 8, before: str = "IHDR PLTE IDAT IEND") -> bytes:
    parts = {
        "IHDR": struct.pack(">IIBBBBB", len(indices) * 8 // depth, 1, depth, 3, 0, 0, 0),
        "PLTE": bytes(range(3 * colours)),
        "IDAT": zlib.compress(b"\0" + indices),
        "IEND": b"",
    }
    return png(*((name.encode(), parts.get(name, b"")) for name in before.split()))


def bmp(
    body: bytes, width: int, height: int = 1, bits: int = 8, palette: bytes = GREYS, coding: int = 0, **header: int
) -> bytes:
    begin = header.get("begin", 54 + len(palette))
    used = header.get("used", 0)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, coding, len(body), 0, 0, used, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(palette) + len(body), 0, 0, begin) + info + palette + body


GIF = encode(Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5) * 12), "GIF")
TABLE = 3 << (GIF[10] & 7) + 1
PICTURE = 13 + TABLE


def gif(canvas: tuple[int, int] = (5, 4), corner: tuple[int, int] = (0, 0), table: bytes | None = None) -> bytes:
    """The GIF with another canvas, another place of its picture, or another colour table."""
    flags = GIF[10] if table is None else GIF[10] & 0x70 | (0x80 if table else 0)
    colours = GIF[13:PICTURE] if table is None else table
    head = GIF[:6] + struct.pack("<HH", *canvas) + bytes([flags]) + GIF[11:13]
    return head + colours + b"," + struct.pack("<HH", *corner) + GIF[PICTURE + 5 :]


JPEG = encode(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), "JPEG")
PROGRESSIVE = encode(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), "JPEG", progressive=True)


def tables(jpeg: bytes) -> list[tuple[int, int]]:
    """Start and end of each segment of Huffman tables."""
    found, at = [], 2
    while jpeg[at + 1] != 0xD9:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] == 0xC4:
            found.append((at, end))
        if jpeg[at + 1] == 0xDA:
            while not (jpeg[end] == 0xFF and jpeg[end + 1] not in (0x00, *range(0xD0, 0xD8))):
                end += 1
        at = end
    return found


WHOLE = {
    "palette PNG": palette_png(b"\0\1\0\1", 2),
    "palette PNG of 4 bits": palette_png(b"\x01\x10", 2, 4),
    "palette BMP": bmp(b"\0\1\0\1", 4, palette=GREYS[:8], used=2),
    "BMP of 4 bits": bmp(b"\x01\x10\0\0", 4, bits=4, palette=GREYS[:8], used=2),
    "runs of a BMP": bmp(b"\4\7\0\0\4\7\0\1", 4, 2, coding=1),
    "runs of a BMP without their end": bmp(b"\4\7\0\0\4\7", 4, 2, coding=1),
    "literal runs of a BMP": bmp(b"\0\3\1\2\3\0\1\4\0\0\4\7\0\1", 4, 2, coding=1),
    "runs of a BMP of 4 bits": bmp(b"\4\x77\0\0\0\4\x12\x34\0\1", 4, 2, 4, GREYS[:64], 2),
    "GIF": gif(),
    "GIF with a small canvas": gif((2, 2)),
    "JPEG": JPEG,
    "progressive JPEG": PROGRESSIVE,
}
DAMAGED = {
    "an index beyond the palette of a PNG": palette_png(b"\0\1\2\1", 2),
    "an index of 4 bits beyond the palette": palette_png(b"\x01\x50", 2, 4),
    "a PNG without its palette": palette_png(b"\0\1", 2, before="IHDR IDAT IEND"),
    "a palette behind the pixels": palette_png(b"\0\1", 2, before="IHDR IDAT PLTE IEND"),
    "two palettes": palette_png(b"\0\1", 2, before="IHDR PLTE PLTE IDAT IEND"),
    "two headers": palette_png(b"\0\1", 2, before="IHDR PLTE IHDR IDAT IEND"),
    "an unknown critical chunk": palette_png(b"\0\1", 2, before="IHDR PLTE ABCD IDAT IEND"),
    "an index beyond the palette of a BMP": bmp(b"\0\1\2\1", 4, palette=GREYS[:8], used=2),
    "an index beyond a palette that was cut": bmp(b"\0\1\2\1", 4, palette=GREYS[:8], used=256),
    "pixels inside of the header": bmp(b"\0\1\0\1", 4, begin=20),
    "runs that end a row early": bmp(b"\2\7\0\0\4\7\0\1", 4, 2, coding=1),
    "runs that end a row late": bmp(b"\6\7\0\0\4\7\0\1", 4, 2, coding=1),
    "runs that skip pixels": bmp(b"\2\7\0\2\2\0\4\7\0\1", 4, 2, coding=1),
    "runs of 4 bits that end a row early": bmp(b"\2\x77\0\0\4\x77\0\1", 4, 2, 4, GREYS[:64], 2),
    "runs that end early": bmp(b"\4\7\0\0\2\7\0\1", 4, 2, coding=1),
    "an index beyond the palette of a GIF": gif(table=bytes(6)),
    "a GIF without a palette": gif(table=b""),
    "a GIF that covers a part of its canvas": gif((9, 9)),
    "a GIF that begins inside of its canvas": gif((9, 9), (4, 5)),
    "a GIF that begins beyond its canvas": gif((5, 4), (1, 1)),
    **{f"a JPEG without Huffman table {n}": JPEG[:at] + JPEG[end:] for n, (at, end) in enumerate(tables(JPEG))},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_file_is_read(kind: str) -> None:
    assert decode_image(WHOLE[kind], LIMIT).size


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_with_invented_pixels_is_refused(kind: str) -> None:
    with pytest.raises(NotAnImageError, match="truncated or damaged"):
        decode_image(DAMAGED[kind], LIMIT)


MANY_PARTS = {
    "chunks of a PNG": bodies.COSTLY["empty chunks"],
    "scans": bodies.COSTLY["1,000 scans of a small picture"],
    "segments of a JPEG": bodies.COSTLY["empty comments"],
    "comments of a GIF": bodies.COSTLY["comments of a GIF"],
    "blocks of a GIF": bodies.COSTLY["one comment of many blocks"],
    "bytes between blocks": bodies.COSTLY["bytes between blocks"],
    "chunks of a WebP": bodies.COSTLY["empty chunks of a WebP"],
}


@pytest.mark.parametrize("kind", MANY_PARTS)
def test_a_file_of_too_many_parts_is_refused_before_it_is_opened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.pixels.images._open", lambda *_: pytest.fail("the file was opened"))
    with pytest.raises(ImageFormatError, match=r"more than .*, far more than programs write; save it again"):
        decode_image(MANY_PARTS[kind].body(), LIMIT)


def test_files_of_as_many_parts_as_programs_write_pass() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    for options in ({"progressive": True}, {"restart_marker_blocks": 1}, {"icc_profile": bytes(3_000_000)}):
        check_structure(encode(pixels, "JPEG", **options))
    check_structure(bodies.scans(MOST_SCANS - 10, 16, 16))
    row = chunk(b"IDAT", bytes(8192))
    check_structure(b"\x89PNG\r\n\x1a\n" + row * 2000 + chunk(b"IEND", b""))
    check_structure(encode(Image.fromarray(pixels).quantize(256), "GIF"))
    for data in (b"", b"\xff\xd8", b"GIF89a", b"RIFF", b"\x89PNG", JPEG[:300], GIF[:40]):
        check_structure(data)


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"exif": b"Exif\0\0"}], ids=str)
def test_the_size_of_a_webp_is_read_from_its_header(options: dict[str, object]) -> None:
    assert webp_size(encode(Image.new("RGB", (301, 44)), "WEBP", **options)) == (301, 44)


def test_a_canvas_is_refused_before_its_decoder_allocates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the file was opened"))
    with pytest.raises(ImageTooLargeError, match="16384 x 16384"):
        decode_image(bodies.COSTLY["a canvas of 16,384 squared"].body(), LIMIT)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_the_size_is_compared_before_a_pixel_is_decoded(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.pixels.images._load", lambda *_: pytest.fail("the file was decoded"))
    data = encode(Image.new("L", (80, 90)), image_format)
    with pytest.raises(ImageSizeError, match="is 90 x 80"):
        decode_image(data, LIMIT, size_HW=(28, 28))


def test_an_image_that_is_turned_by_its_orientation_has_the_size_it_is_turned_to() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (8, 5)), "JPEG", exif=exif)
    assert decode_image(data, LIMIT, size_HW=(8, 5)).shape == (3, 8, 5)
    assert decode_image(data, LIMIT, size_HW=(5, 8)).shape == (3, 8, 5)  # refused by the model's view


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (28, 28), (64, 64), (64, 65)])
def test_plain_files_are_decoded_as_any_other(size: tuple[int, int], channels: int) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (*size, channels), np.uint8)
    data = encode(pixels[..., 0] if channels == 1 else pixels)
    found = decode_plain(data, LIMIT)
    assert (found is not None) == is_plain(data) == (size[0] * size[1] <= PLAIN_PIXELS)
    expected = np.moveaxis(pixels, -1, 0)
    assert np.array_equal(decode_image(data, LIMIT), expected)
    # The same file with a chunk that changes nothing takes the other path.
    assert np.array_equal(decode_image(data[:33] + chunk(b"teXt", b"x") + data[33:], LIMIT), expected)
    if found is not None:
        assert np.array_equal(found, expected)
        assert decode_plain(data, size[0] * size[1] - 1) is None
