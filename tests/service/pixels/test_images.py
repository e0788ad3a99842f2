from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import struct
import zlib
from fractions import Fraction
from math import floor
from typing import Literal

import numpy as np
import pytest
from encoding import encode, npy
from garbage import uncollected
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from thorough import often
from tiff_files import tiff

from service.errors import (
    ArrayError,
    ChannelsError,
    ImageFormatError,
    ImageTooLargeError,
    InputError,
    NotAnImageError,
    PixelRangeError,
)
from service.pixels.arrays import decode_array, decode_array_batch
from service.pixels.images import decode_image, encode_png, image_digest, to_unit

LIMIT = 10_000
SHAPE = (1, 4, 5)
RGB_SHAPE = (3, 4, 5)
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
"""First row and column, then steps between rows and columns, of each pass."""


def png_of(depth: int, colour_type: int, rows: list[bytes], width: int, extra: bytes = b"") -> bytes:
    """A PNG written chunk by chunk: depths and chunks that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def transparency(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + b"tRNS" + data + struct.pack(">I", zlib.crc32(b"tRNS" + data))


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "GIF"])
def test_lossless_grey_formats_are_read_exactly(grey_HW: np.ndarray, image_format: str) -> None:
    assert np.array_equal(decode_image(encode(grey_HW, image_format), LIMIT)[0], grey_HW)


@pytest.mark.parametrize(
    ("image_format", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("PNG", {"interlace": 1})]
)
def test_lossless_colour_formats_are_read_exactly(
    colour_HWC: np.ndarray, image_format: str, options: dict[str, object]
) -> None:
    pixels_CHW = decode_image(encode(colour_HWC, image_format, **options), LIMIT)
    assert np.array_equal(np.moveaxis(pixels_CHW, 0, -1), colour_HWC)


def test_jpeg_is_read_as_its_decoded_pixels(grey_HW: np.ndarray) -> None:
    data = encode(grey_HW, "JPEG")
    assert np.array_equal(decode_image(data, LIMIT)[0], np.asarray(Image.open(io.BytesIO(data))))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.data())
def test_the_digest_is_about_shape_and_values(channels: int, height: int, width: int, data: st.DataObject) -> None:
    size = channels * height * width
    values = data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))
    content = f"{channels}x{height}x{width}\n".encode() + struct.pack(f"<{size}d", *values)
    image_CHW = np.array(values).reshape(channels, height, width)
    assert image_digest(image_CHW) == f"sha256:{hashlib.sha256(content).hexdigest()}"
    backwards_WHC = np.ascontiguousarray(image_CHW.T)
    assert image_digest(backwards_WHC.T) == image_digest(image_CHW)


def test_images_of_other_shapes_have_other_digests() -> None:
    zeros = np.zeros(12)
    shapes = [(1, 3, 4), (1, 4, 3), (3, 1, 4), (3, 4, 1), (1, 1, 12), (1, 12, 1), (12, 1, 1)]
    assert len({image_digest(zeros.reshape(shape)) for shape in shapes}) == len(shapes)


@given(st.integers(0, 255))
def test_a_pixel_is_its_value_over_255(value: int) -> None:
    assert to_unit(np.array([value], np.uint8))[0] == value / 255


def test_encoding_and_decoding_gives_the_same_pixels(grey_HW: np.ndarray, colour_HWC: np.ndarray) -> None:
    for pixels_CHW in (grey_HW[None], np.moveaxis(colour_HWC, -1, 0)):
        assert np.array_equal(decode_image(encode_png(pixels_CHW), LIMIT), pixels_CHW)


def test_one_bit_png_is_black_and_white() -> None:
    bits = np.array([[0, 1, 1, 0], [1, 0, 1, 0]], bool)
    assert np.array_equal(decode_image(encode(bits), LIMIT)[0], bits * np.uint8(255))


@pytest.mark.parametrize(("depth", "row", "expected"), [(2, 0b00011011, [0, 85, 170, 255]), (4, 0x0F, [0, 255])])
def test_grey_of_few_bits_is_scaled_to_its_exact_value(depth: int, row: int, expected: list[int]) -> None:
    data = png_of(depth, 0, [bytes([row])], len(expected))
    assert decode_image(data, LIMIT)[0, 0].tolist() == expected


def test_grey_stored_as_rgb_is_rgb(grey_HW: np.ndarray) -> None:
    pixels_CHW = decode_image(encode(np.repeat(grey_HW[..., None], 3, axis=2)), LIMIT)
    assert np.array_equal(pixels_CHW, np.repeat(grey_HW[None], 3, axis=0))


def palette_image(levels_HW: np.ndarray, palette: list[int]) -> Image.Image:
    image = Image.fromarray(levels_HW).convert("P")
    image.putpalette(palette)
    return image


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "GIF"])
def test_a_palette_of_greys_is_grey(grey_HW: np.ndarray, image_format: str) -> None:
    image = palette_image(255 - grey_HW, [255 - index // 3 for index in range(768)])
    assert np.array_equal(decode_image(encode(image, image_format), LIMIT), grey_HW[None])


def test_one_colour_in_the_palette_makes_it_rgb_even_where_no_pixel_has_it() -> None:
    levels_HW = np.array([[1, 2, 3], [3, 2, 1]], np.uint8)
    for colour, channels in (([9, 9, 9], 1), ([9, 9, 8], 3), ([9, 8, 9], 3), ([8, 9, 9], 3)):
        image = palette_image(levels_HW, [*colour, 10, 10, 10, 20, 20, 20, 30, 30, 30])
        assert np.array_equal(decode_image(encode(image), LIMIT), np.repeat(10 * levels_HW[None], channels, axis=0))


def test_a_palette_of_colours_is_looked_up(colour_HWC: np.ndarray) -> None:
    image = Image.fromarray(colour_HWC).quantize(64)
    expected_HWC = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.moveaxis(decode_image(encode(image), LIMIT), 0, -1), expected_HWC)


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("RGB", 3)])
@pytest.mark.parametrize("value", [0, 100, 255])
def test_the_mode_of_the_file_and_never_its_values_decides_the_channels(mode: str, channels: int, value: int) -> None:
    assert len(decode_image(encode(Image.new("L", (5, 4), value).convert(mode)), LIMIT)) == channels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_without_loss(grey_HW: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: grey_HW,
        2: grey_HW[:, ::-1],
        3: grey_HW[::-1, ::-1],
        4: grey_HW[::-1],
        5: grey_HW.T,
        6: np.rot90(grey_HW, -1),
        7: grey_HW[::-1, ::-1].T,
        8: np.rot90(grey_HW),
    }
    assert np.array_equal(decode_image(encode(grey_HW, exif=exif), LIMIT)[0], turned[orientation])


ALPHA = {
    "grey with alpha": lambda: encode(Image.new("LA", (5, 4), (7, 254))),
    "colour with alpha": lambda: encode(Image.new("RGBA", (5, 4), (1, 2, 3, 254))),
    "16-bit grey with alpha": lambda: png_of(16, 4, [b"\1\2\xff\xfe"], 1),
    "16-bit colour with alpha": lambda: png_of(16, 6, [b"\1\2\3\4\5\6\xff\xfe"], 1),
    "webp with alpha": lambda: encode(Image.new("RGBA", (5, 4), (1, 2, 3, 9)), "WEBP", lossless=True),
    "transparent palette entry": lambda: encode(Image.new("P", (5, 4)), transparency=0),
    "transparent grey": lambda: png_of(8, 0, [b"\1\2"], 2, transparency(b"\0\1")),
    "transparent colour": lambda: png_of(8, 2, [b"\1\2\3"], 1, transparency(b"\0\1\0\2\0\3")),
    "transparent gif": lambda: encode(Image.new("P", (5, 4)), "GIF", transparency=0),
}


@pytest.mark.parametrize("kind", ALPHA)
def test_any_transparency_is_refused_without_a_background(kind: str) -> None:
    with pytest.raises(ImageFormatError, match=r"background=#rrggbb .* flatten"):
        decode_image(ALPHA[kind](), LIMIT)
    for background in ("#404040", "404040"):
        assert decode_image(ALPHA[kind](), LIMIT, background=background).shape[0] in (1, 3)


@pytest.mark.parametrize(("depth", "row"), [(8, b"\1\2"), (16, b"\0\1\0\2"), (1, b"\x40")])
def test_a_transparent_colour_behind_the_pixels_is_refused(depth: int, row: bytes) -> None:
    data = png_of(depth, 0, [row], 2)
    end = data.index(b"IEND") - 4
    with pytest.raises(NotAnImageError, match="damaged"):
        decode_image(data[:end] + transparency(b"\0\1") + data[end:], LIMIT, background="#000000")


OPAQUE = {
    "grey with alpha": lambda: (encode(Image.new("LA", (5, 4), (7, 255))), [7]),
    "colour with alpha": lambda: (encode(Image.new("RGBA", (5, 4), (1, 2, 3, 255))), [1, 2, 3]),
    "16-bit grey with alpha": lambda: (png_of(16, 4, [b"\1\2\xff\xff"] * 4, 1), [0x102 / 65535]),
    "an unused transparent colour": lambda: (png_of(8, 0, [b"\1"] * 4, 1, transparency(b"\0\2")), [1]),
    "an unused transparent entry": lambda: (encode(Image.new("P", (5, 4)), "GIF", transparency=1), None),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_alpha_that_hides_everything_behind_it_is_dropped(kind: str) -> None:
    data, values = OPAQUE[kind]()
    pixels_CHW = decode_image(data, LIMIT)
    if values is not None:
        assert pixels_CHW[:, 0, 0].tolist() == values
    assert np.array_equal(decode_image(data, LIMIT, background="#ff0000"), pixels_CHW)


def composite(value: int, alpha: int, behind: int, most: int) -> int:
    """The nearest integer, in exact arithmetic."""
    exact = Fraction(alpha * value + (most - alpha) * behind, most)
    return floor(exact + Fraction(1, 2))


@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_each_value_and_alpha_is_composited_to_the_nearest_integer(level: int) -> None:
    value_HW, alpha_HW = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.dstack([value_HW, alpha_HW]).astype(np.uint8))
    expected = [[composite(v, a, level, 255) for v in range(256)] for a in range(256)]
    background = f"#{level:02x}{level:02x}{level:02x}"
    assert decode_image(encode(image), 256 * 256, background=background)[0].tolist() == expected
    webp = encode(image.convert("RGBA"), "WEBP", lossless=True, exact=True)
    for channel in decode_image(webp, 256 * 256, background=background):
        assert channel.tolist() == expected


def test_16_bits_are_composited_in_16_bits() -> None:
    random = np.random.default_rng(3)
    samples_HWS = random.integers(0, 65536, (30, 20, 4)).astype(np.uint16)
    samples_HWS[0] = [[65535, 0, 65534, alpha] for alpha in range(65516, 65536)]
    data = png_of(16, 6, [row.astype(">u2").tobytes() for row in samples_HWS], 20)
    expected = [
        [[composite(int(v), int(a), b, 65535) / 65535 for v, a in zip(row[:, c], row[:, 3], strict=True)]
         for row in samples_HWS]
        for c, b in enumerate((0, 257, 65535))
    ]  # fmt: skip
    assert decode_image(data, LIMIT, background="#0001ff").tolist() == expected


def test_a_grey_transparent_image_needs_a_grey_background() -> None:
    with pytest.raises(ImageFormatError, match="name a grey one"):
        decode_image(ALPHA["grey with alpha"](), LIMIT, background="#ff0000")


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("colour_type", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_of_a_png_are_read_exactly(colour_type: int, samples: int, interlaced: int, orientation: int) -> None:
    values_HWS = np.random.default_rng(samples).integers(0, 65536, (7, 5, samples)).astype(np.uint16)
    if colour_type >= 4:
        values_HWS[..., -1] = 65535
    exif = Image.Exif()
    exif[0x0112] = orientation
    starts = ADAM7 if interlaced else [(0, 0, 1, 1)]
    rows = [
        b"\0" + row.astype(">u2").tobytes()
        for top, left, down, right in starts
        for row in values_HWS[top::down, left::right]
        if row.size
    ]
    data = png_of_chunks(
        (b"IHDR", struct.pack(">IIBBBBB", 5, 7, 16, colour_type, 0, 0, interlaced)),
        (b"eXIf", exif.tobytes()[6:]),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    )
    pixels_CHW = decode_image(data, LIMIT)
    colours_CHW = np.moveaxis(values_HWS, -1, 0)[: 1 if samples < 3 else 3] / 65535.0
    assert pixels_CHW.dtype == np.float64
    assert np.array_equal(pixels_CHW, np.rot90(colours_CHW, -1, (1, 2)) if orientation == 6 else colours_CHW)
    for length in range(1, len(data)):
        with pytest.raises(NotAnImageError):
            decode_image(data[:length], LIMIT)


def test_a_level_of_8_bits_is_the_same_pixel_in_16_bits() -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(
        decode_image(encode(levels * 257), LIMIT), to_unit(decode_image(encode(levels.astype(np.uint8)), LIMIT))
    )


@pytest.mark.parametrize("brand", [b"avif", b"avis"])
def test_a_file_of_a_phone_that_is_not_read_is_named(brand: bytes) -> None:
    with pytest.raises(NotAnImageError, match=r"AVIF .* save it as JPEG"):
        decode_image(b"\0\0\0\x18ftyp" + brand + bytes(40), LIMIT)


DEEP = {
    "palette-less bmp of 5 bits": lambda: bmp_of_16_bits(),
    "a transparent colour of 16 bits": lambda: png_of(16, 0, [b"\1\2"], 1, transparency(b"\1\2")),
    "a transparent colour of 1 bit": lambda: png_of(1, 0, [b"\x80"], 1, transparency(b"\0\1")),
}


def bmp_of_16_bits() -> bytes:
    pixels = bytes(2 * 4 * 2)
    header = struct.pack("<IiiHHIIiiII", 40, 4, 2, 1, 16, 0, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels


@pytest.mark.parametrize("kind", DEEP)
def test_depths_without_a_single_meaning_are_refused(kind: str) -> None:
    with pytest.raises(ImageFormatError, match="8 bits"):
        decode_image(DEEP[kind](), LIMIT, background="#000000")


def test_cmyk_is_refused() -> None:
    with pytest.raises(ImageFormatError, match="CMYK"):
        decode_image(encode(Image.new("CMYK", (5, 4)), "JPEG"), LIMIT)


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused(image_format: str) -> None:
    frames = [Image.new("RGB", (5, 4), (level, 0, 0)) for level in (0, 200)]
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageFormatError, match="several images"):
        decode_image(data, LIMIT)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_file_that_lost_its_end_is_refused_wherever_it_was_cut(colour_HWC: np.ndarray, image_format: str) -> None:
    image = Image.fromarray(colour_HWC)
    data = encode(image.quantize(16) if image_format == "GIF" else image, image_format)
    decode_image(data, LIMIT)
    # The last byte of the BMP fills its last row up to a multiple of four; no pixel is in it.
    for length in range(1, len(data) - (image_format == "BMP")):
        with pytest.raises(NotAnImageError, match=r"truncated|not an image"):
            decode_image(data[:length], LIMIT)


def test_a_png_with_a_damaged_checksum_is_refused(grey_HW: np.ndarray) -> None:
    data = bytearray(encode(grey_HW))
    data[data.index(b"IDAT") + 8] ^= 1
    with pytest.raises(NotAnImageError, match="damaged"):
        decode_image(bytes(data), LIMIT)


def interlaced() -> bytes:
    """An interlaced grey PNG of 7 x 5: Adam7, written pass by pass."""
    grey_HW = np.random.default_rng(4).integers(0, 256, (7, 5), dtype=np.uint8)
    rows = [
        b"\0" + row.tobytes() for top, left, down, right in ADAM7 for row in grey_HW[top::down, left::right] if row.size
    ]
    file = png_of_chunks(
        (b"IHDR", struct.pack(">IIBBBBB", 5, 7, 8, 0, 0, 0, 1)),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    )
    assert (decode_image(file, LIMIT)[0] == grey_HW).all()
    return file


def png_of_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def pillow_verifies(data: bytes) -> bool:
    """Whether Pillow opens, verifies and decodes the file, and it has an end."""
    try:
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()
        Image.open(io.BytesIO(data), formats=["PNG"]).load()
    except Exception:
        return False
    return b"IEND\xaeB`\x82" in data


def is_read(data: bytes) -> bool:
    try:
        decode_image(data, LIMIT)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("kind", ["grey", "RGB", "palette", "interlaced", "with text and EXIF"])
def test_no_damage_to_a_png_that_pillow_sees_is_overlooked(
    grey_HW: np.ndarray, colour_HWC: np.ndarray, kind: str
) -> None:
    files = {
        "grey": lambda: encode(grey_HW),
        "RGB": lambda: encode(colour_HWC),
        "palette": lambda: encode(Image.fromarray(colour_HWC).quantize(8)),
        "interlaced": interlaced,
        "with text and EXIF": lambda: encode(grey_HW, pnginfo=noted(), exif=turned()),
    }
    file = files[kind]()
    assert is_read(file)
    cut = [file[:length] for length in range(len(file))]
    flipped = [
        file[:at] + bytes([file[at] ^ change]) + file[at + 1 :]
        for at in range(len(file))
        for change in (0x01, 0x20, 0xFF)
    ]
    overlooked = [damaged for damaged in cut + flipped if is_read(damaged) and not pillow_verifies(damaged)]
    assert not overlooked
    assert not any(is_read(damaged) for damaged in cut)


def noted() -> PngInfo:
    text = PngInfo()
    text.add_text("Comment", "a digit")
    return text


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@settings(deadline=None)
@given(channels=st.sampled_from([1, 3]), height=st.integers(1, 6), width=st.integers(1, 6), data=st.data())
def test_a_png_without_optional_chunks_has_the_pixels_that_pillow_reads(
    channels: int, height: int, width: int, data: st.DataObject
) -> None:
    row_bytes = width * channels
    rows = data.draw(st.lists(st.binary(min_size=row_bytes, max_size=row_bytes), min_size=height, max_size=height))
    filters = data.draw(st.lists(st.integers(0, 5), min_size=height, max_size=height))  # there is no filter 5
    file = png_of_chunks(
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, channels - 1, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(bytes([kind]) + row for kind, row in zip(filters, rows, strict=True)))),
        (b"IEND", b""),
    )
    assert is_read(file) == (5 not in filters)
    if 5 not in filters:
        pixels = np.asarray(Image.open(io.BytesIO(file))).reshape(height, width, channels)
        assert np.array_equal(decode_image(file, LIMIT), np.moveaxis(pixels, -1, 0))


@pytest.mark.parametrize("end", [(b"IEND", b"abc"), (b"I\0\0D", b""), (b"1234", b"")])
def test_chunks_that_are_whole_and_make_no_png_are_refused(end: tuple[bytes, bytes]) -> None:
    header = (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixels = (b"IDAT", zlib.compress(b"\0\7"))
    assert is_read(png_of_chunks(header, pixels, (b"IEND", b"")))
    assert not is_read(png_of_chunks(header, pixels, end, *([] if end[0] == b"IEND" else [(b"IEND", b"")])))


@pytest.mark.parametrize("size", [101, 12_000, 20_000])
def test_a_header_that_declares_too_many_pixels_is_refused_before_decoding(size: int) -> None:
    """12,000 x 12,000 is where Pillow warns, 20,000 x 20,000 where it raises."""
    chunk = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    with pytest.raises(ImageTooLargeError, match="10000 pixels"):
        decode_image(header + b"\0\0\0\0IDAT\x35\xaf\x06\x1e", LIMIT)


MAGIC = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF"]


@settings(max_examples=often(50, 200), deadline=None)
@given(st.binary(max_size=200), st.sampled_from(MAGIC))
def test_no_bytes_raise_anything_but_an_input_error(data: bytes, magic: bytes) -> None:
    for decode in (
        lambda: decode_image(magic + data, LIMIT),
        lambda: decode_array(b"\x93NUMPY" + data, SHAPE, LIMIT),
    ):
        with contextlib.suppress(InputError):
            decode()


@settings(max_examples=often(50, 200), deadline=None)
@given(st.data())
def test_one_flipped_byte_raises_nothing_but_an_input_error(data: st.DataObject) -> None:
    image_format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]))
    file = bytearray(encode(Image.new("RGB", (5, 4), (1, 2, 3)), image_format))
    file[data.draw(st.integers(0, len(file) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(InputError):
        decode_image(bytes(file), LIMIT)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
def test_float_arrays_are_taken_exactly(dtype: str) -> None:
    values_CHW = np.random.default_rng(3).random(SHAPE).astype(dtype)
    pixels_CHW = decode_array(npy(values_CHW), SHAPE, LIMIT)
    assert pixels_CHW.dtype == np.float64
    assert np.array_equal(pixels_CHW, values_CHW.astype(np.float64))


def test_uint8_arrays_are_divided_by_255(grey_HW: np.ndarray) -> None:
    assert np.array_equal(decode_array(npy(grey_HW), SHAPE, LIMIT)[0], grey_HW / 255.0)


@pytest.mark.parametrize("shape", [(1, 4, 5), (4, 5, 1), (4, 5)])
def test_a_grey_array_has_its_channel_first_last_or_not_at_all(grey_HW: np.ndarray, shape: tuple[int, ...]) -> None:
    assert np.array_equal(decode_array(npy(grey_HW.reshape(shape)), SHAPE, LIMIT)[0], grey_HW / 255.0)


def test_a_colour_array_has_its_channels_first_or_last(colour_HWC: np.ndarray) -> None:
    expected_CHW = np.moveaxis(colour_HWC, -1, 0) / 255.0
    for array in (colour_HWC, np.moveaxis(colour_HWC, -1, 0), np.asfortranarray(colour_HWC)):
        assert np.array_equal(decode_array(npy(array), RGB_SHAPE, LIMIT), expected_CHW)


def test_a_shape_with_two_readings_is_read_as_the_models_or_refused() -> None:
    array = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert np.array_equal(decode_array(npy(array), (3, 4, 3), LIMIT), array / 255.0)
    assert np.array_equal(decode_array(npy(array), (3, 3, 4), LIMIT), np.moveaxis(array, -1, 0) / 255.0)
    with pytest.raises(ArrayError, match="first or last"):
        decode_array(npy(array), (3, 8, 8), LIMIT)


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 4, 5, 1), (2, 4, 5)])
def test_a_batch_has_one_axis_more(shape: tuple[int, ...]) -> None:
    array = np.arange(40, dtype=np.uint8)
    pixels_NCHW = decode_array_batch(npy(array.reshape(shape)), SHAPE, LIMIT, 8)
    assert np.array_equal(pixels_NCHW, array.reshape(2, 1, 4, 5) / 255.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-300, np.nextafter(1.0, 2.0), 255.0])
def test_a_value_outside_the_unit_interval_is_refused_with_its_place(value: float) -> None:
    array = np.zeros(SHAPE)
    array[0, 2, 3] = value
    with pytest.raises(PixelRangeError, match=r"\(0, 2, 3\) is .* expected in \[0, 1\]"):
        decode_array(npy(array), SHAPE, LIMIT)


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint16", "bool", "complex64", "longdouble", "S3", "U2", "M8[s]"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(ArrayError, match="expected uint8"):
        decode_array(npy(np.zeros((4, 5), dtype)), SHAPE, LIMIT)


def test_structured_dtypes_are_refused() -> None:
    with pytest.raises(ArrayError, match="expected uint8"):
        decode_array(npy(np.zeros((4, 5), [("a", "f8"), ("b", "f8")])), SHAPE, LIMIT)


def test_pickled_objects_are_refused_and_never_loaded() -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("the pickle was loaded",))

    with pytest.raises(ArrayError, match="pickled"):
        decode_array(npy(np.array([Trap()], object), allow_pickle=True), SHAPE, LIMIT)


@pytest.mark.parametrize("shape", [(4,), (), (1, 1, 1, 4, 5)])
def test_wrong_numbers_of_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArrayError, match="expected"):
        decode_array(npy(np.zeros(shape)), SHAPE, LIMIT)


def test_wrong_numbers_of_channels_are_refused() -> None:
    with pytest.raises(ChannelsError, match="takes 1 channel"):
        decode_array(npy(np.zeros((4, 5, 3))), SHAPE, LIMIT)


def header_of(shape: str, descr: str = "<f8") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "header",
    [
        header_of("(1, 100000, 100000)"),
        header_of("(9223372036854775807, 9223372036854775807)"),
        header_of("(-1, 4, 5)"),
        header_of("(0, 4, 5)"),
        header_of("(True, 4, 5)"),
        header_of("(1, 4, 5", "<f8"),
        header_of("(" + "1, " * 70 + "4, 5)"),
        header_of("(" * 3000 + ")" * 3000),
        header_of("(1, 4, 5)", "<q9"),
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY",
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(header: bytes) -> None:
    with pytest.raises(ArrayError):
        decode_array(header + bytes(160), SHAPE, LIMIT)


@pytest.mark.parametrize("lengths", ["(1, 4, 5,)", "(4,5)", "(0x1, 4, 5)"])
def test_a_header_of_another_writer_is_read(lengths: str) -> None:
    text = f'{{"shape": {lengths}, "fortran_order": False, "descr": "<f8"}}\n'.encode()
    values = np.random.default_rng(5).random(SHAPE)
    for header in (b"\x01\x00" + struct.pack("<H", len(text)), b"\x02\x00" + struct.pack("<I", len(text))):
        assert np.array_equal(decode_array(b"\x93NUMPY" + header + text + values.tobytes(), SHAPE, LIMIT), values)


@pytest.mark.parametrize("dtype", ["|u1", "<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_leaves_no_garbage(dtype: str, order: Literal["C", "F"]) -> None:
    files = [npy(np.zeros(shape, dtype, order)) for shape in ((4, 5), (1, 4, 5), (99, 100, 1))]
    with uncollected():
        for file in files:
            decode_array(file, SHAPE, LIMIT)
        assert gc.collect() == 0


@pytest.mark.parametrize("change", [-1, 1])
def test_bytes_missing_or_left_over_are_refused(change: int) -> None:
    data = npy(np.zeros(SHAPE))
    with pytest.raises(ArrayError, match=r"160 bytes, and 1(59|61) bytes follow"):
        decode_array(data[:-1] if change < 0 else data + b"\0", SHAPE, LIMIT)


def test_a_photograph_that_is_too_large_names_the_limit_to_set_and_its_memory() -> None:
    data = encode(Image.new("L", (400, 300)), "JPEG")
    with pytest.raises(ImageTooLargeError, match=r"LIPCERT_MAX_PIXELS to 120000, where .* some 8 MB of memory"):
        decode_image(data, LIMIT)
    header = tiff(np.zeros((1, 4, 1), np.uint8), tags={256: [10_000], 257: [9_000], 278: [9_000]})
    with pytest.raises(ImageTooLargeError, match=r"raise LIPCERT_MAX_PIXELS\)$"):
        decode_image(header, LIMIT)
