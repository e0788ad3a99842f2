"""TIFF files are read value by value or refused; libtiff and the writer of these files agree with the reader."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from encoding import encode
from PIL import Image
from tiff_files import CODINGS, tiff

from service.errors import ImageFormatError, ImageSizeError, ImageTooLargeError, NotAnImageError
from service.pixels.images import decode_image

LIMIT = 100_000
RANDOM = np.random.default_rng(11)
SMALL = RANDOM.integers(0, 256, (7, 5, 3), np.uint8)
GREY = SMALL[..., :1]
DEEP = RANDOM.integers(0, 65536, (7, 5, 3)).astype(np.uint16)


def units(samples_HWS: np.ndarray) -> np.ndarray:
    pixels_CHW = np.moveaxis(samples_HWS, -1, 0)
    return pixels_CHW if pixels_CHW.dtype == np.uint8 else pixels_CHW / 65535.0


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("values", [GREY, SMALL, DEEP[..., :1], DEEP], ids=["L", "RGB", "L of 16", "RGB of 16"])
def test_every_value_is_read(values: np.ndarray, order: str, coding: int) -> None:
    many = np.concatenate([np.tile(values, (1, 7, 1)), np.tile(values[:1, :1], (120, 35, 1))])
    for predictor in (1, 2) if coding in (5, 8) else (1,):
        for planes in (1, 2):
            for samples_HWS, rows in ((values, 3), (values, 7), (values, 99), (many, 127)):
                data = tiff(samples_HWS, order, coding, rows, predictor, planes)
                for file in (data, data + b"behind the file"):
                    assert np.array_equal(decode_image(file, LIMIT), units(samples_HWS))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("values", [GREY, SMALL, DEEP[..., :1], DEEP], ids=["L", "RGB", "L of 16", "RGB of 16"])
def test_every_value_of_tiles_is_read(values: np.ndarray, order: str, coding: int) -> None:
    for predictor in (1, 2) if coding in (5, 8) else (1,):
        for planes in (1, 2):
            for tile in ((16, 16), (3, 2), (7, 5), (2, 99), (1, 1)):
                data = tiff(values, order, coding, 1, predictor, planes, tile=tile)
                for file in (data, data + b"behind the file"):
                    assert np.array_equal(decode_image(file, LIMIT), units(values))


def test_tiles_are_read_as_libtiff_reads_them() -> None:
    many = RANDOM.integers(0, 256, (70, 45, 3), np.uint8)
    for coding in (1, 5, 8, 32773):
        for predictor in (1, 2) if coding in (5, 8) else (1,):
            data = tiff(many, "<", coding, 1, predictor, tile=(32, 16))
            assert np.array_equal(
                decode_image(data, LIMIT), np.moveaxis(np.asarray(Image.open(io.BytesIO(data))), -1, 0)
            )
            turned = tiff(many, "<", coding, 1, predictor, tile=(32, 16), tags={274: [6]})
            assert np.array_equal(decode_image(turned, LIMIT), np.moveaxis(np.rot90(many, -1), -1, 0))


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits"])
def test_files_of_libtiff_are_read_as_libtiff_reads_them(mode: str, compression: str) -> None:
    pixels = RANDOM.integers(0, 65536, (90, 110)).astype(np.uint16)
    pixels[20:60] = 7
    image = Image.fromarray(pixels) if mode == "I;16" else Image.fromarray((pixels >> 8).astype(np.uint8)).convert(mode)
    for options in ({}, {"tiffinfo": {317: 2}}) if "raw" not in compression and "pack" not in compression else ({},):
        data = encode(image, "TIFF", compression=compression, **options)
        expected = np.asarray(Image.open(io.BytesIO(data))).reshape(90, 110, -1)
        assert np.array_equal(decode_image(data, LIMIT), units(expected))


def test_white_that_is_zero_is_turned_over() -> None:
    for values in (GREY, DEEP[..., :1]):
        data = tiff(values, tags={262: [0]})
        assert np.array_equal(decode_image(data, LIMIT), units(np.invert(values)))
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(tiff(GREY, tags={262: [0]})))),
        decode_image(tiff(GREY, tags={262: [0]}), LIMIT)[0],
    )


@pytest.mark.parametrize("orientation", range(10))
def test_the_orientation_is_applied_as_in_exif(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = decode_image(encode(SMALL, exif=exif), LIMIT)
    assert np.array_equal(decode_image(tiff(SMALL, tags={274: [orientation]}), LIMIT), expected)


@pytest.mark.parametrize("values", [SMALL, DEEP], ids=["8 bits", "16 bits"])
def test_alpha_is_the_extra_sample(values: np.ndarray) -> None:
    opaque = np.concatenate([values, np.full_like(values[..., :1], -1 + 2 ** (8 * values.itemsize))], axis=2)
    for kind in (1, 2):
        assert np.array_equal(decode_image(tiff(opaque, tags={338: [kind]}), LIMIT), units(values))
    clear = opaque.copy()
    clear[..., 3] = 0
    with pytest.raises(ImageFormatError, match="background=#rrggbb"):
        decode_image(tiff(clear), LIMIT)
    assert np.array_equal(
        decode_image(tiff(clear), LIMIT, background="#0080ff"),
        np.broadcast_to(
            np.array([0, 128, 255], np.uint8)[:, None, None]
            if values.itemsize == 1
            else np.array([0, 128 * 257 / 65535, 1.0])[:, None, None],
            (3, 7, 5),
        ),
    )
    with pytest.raises(ImageFormatError, match="premultiplied"):
        decode_image(tiff(clear, tags={338: [1]}), LIMIT, background="#0080ff")


PAGE = Image.new("L", (5, 4))
REFUSED = {
    "several pages": (encode(PAGE, "TIFF", save_all=True, append_images=[PAGE]), "several images"),
    "a loop of directories": (tiff(SMALL, following=8 + SMALL.size + SMALL.size % 2), "several images"),
    "a preview": (tiff(SMALL, tags={254: [1]}), "several images"),
    "BigTIFF": (encode(Image.new("L", (5, 4)), "TIFF", big_tiff=True), "BigTIFF"),
    "a loop in a BigTIFF": (b"II+\0\x08\0\0\0" + struct.pack("<QQQ", 16, 0, 16), "BigTIFF"),
    "CMYK": (encode(Image.new("CMYK", (5, 4)), "TIFF"), "CMYK"),
    "a palette": (encode(Image.new("P", (5, 4)), "TIFF"), "a palette"),
    "YCbCr": (encode(Image.new("YCbCr", (5, 4)), "TIFF"), "YCbCr"),
    "Lab": (encode(Image.new("LAB", (5, 4)), "TIFF"), r"CIE L\*a\*b\*"),
    "JPEG in TIFF": (encode(Image.new("L", (16, 16)), "TIFF", compression="jpeg"), "compression 7"),
    "fax": (encode(Image.new("1", (16, 16)), "TIFF", compression="group4"), "8 bits per channel"),
    "1 bit": (encode(Image.new("1", (5, 4)), "TIFF"), "8 bits per channel"),
    "32 bits": (encode(Image.new("I", (5, 4)), "TIFF"), "8 bits per channel"),
    "floats": (encode(Image.new("F", (5, 4)), "TIFF"), "8 bits per channel"),
    "signed": (tiff(DEEP, tags={339: [2]}), "unsigned"),
    "bits from the right": (tiff(SMALL, tags={266: [2]}), "in another order"),
    "two extra samples": (tiff(SMALL, tags={262: [1], 338: [2, 0]}), "3 samples per pixel"),
    "an unknown extra sample": (tiff(SMALL[..., :2], tags={338: [0]}), "2 samples per pixel"),
    "a predictor of stored values": (tiff(SMALL, tags={317: [2]}), "predictor 2"),
    "a predictor of floats": (tiff(SMALL, coding=5, tags={317: [3]}), "predictor 3"),
    "tiles of absurd size": (tiff(SMALL, tile=(7, 5), tags={322: [2**32 - 16], 323: [2**32 - 16]}), "far larger"),
    "long tiles": (tiff(SMALL, tile=(7, 5), tags={322: [2**30]}), "far larger"),
    "tiles beyond any number": (tiff(GREY, tile=(1, 1), tags={256: [2**16], 257: [2**16]}), "more than 65536 strips"),
    "strips beyond any number": (tiff(GREY, tags={257: [2**31], 278: [1]}), "more than 65536 strips"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_single_meaning_is_refused_with_a_cure(kind: str) -> None:
    data, message = REFUSED[kind]
    with pytest.raises(ImageFormatError, match=message) as caught:
        decode_image(data, LIMIT)
    assert "sa" in str(caught.value).partition(";")[2] or "send" in str(caught.value)


def reduced(which: int, by: int) -> object:
    return lambda values: [value - by * (n == which) for n, value in enumerate(values)]


DAMAGED = {
    **{
        f"{coding}: a strip that ends {cut} bytes early": tiff(SMALL, coding=coding, cut=cut)
        for coding in CODINGS
        for cut in (1 if coding != 32773 else 2, 9)
    },
    **{
        f"{coding}: a length that is too short": tiff(SMALL, coding=coding, lengths=reduced(1, 9))  # type: ignore[arg-type]
        for coding in CODINGS
    },
    **{
        f"{coding}: an empty strip": tiff(SMALL, coding=coding, lengths=lambda found: [0, *found[1:]])
        for coding in CODINGS
    },
    **{
        f"{coding}: {name} that the size leaves out": tiff(SMALL, coding=coding, tags=tags, rows=7)
        for coding in CODINGS
        for name, tags in {"a row": {257: [6]}, "a column": {256: [4]}}.items()
    },
    **{
        f"{coding}: a tile that ends {cut} bytes early": tiff(SMALL, coding=coding, tile=(4, 4), cut=cut)
        for coding in CODINGS
        for cut in (1 if coding != 32773 else 2, 9)
    },
    **{
        f"{coding}: tiles of {name}": tiff(SMALL, coding=coding, tile=(4, 4), tags=tags)
        for coding in CODINGS
        for name, tags in {"fewer rows": {323: [3]}, "more rows": {323: [5]}, "more columns": {322: [5]}}.items()
    },
    "a tile of its rows alone": tiff(SMALL, tile=(7, 5), tags={323: [8]}),
    "a tile too few": tiff(SMALL, tile=(4, 4), offsets=lambda found: found[:3], lengths=lambda found: found[:3]),
    "a tile too many": tiff(SMALL, tile=(4, 4), tags={256: [4]}),
    "a wider image of tiles": tiff(SMALL, tile=(4, 4), tags={256: [9]}),
    "two tiles in one place": tiff(SMALL, tile=(4, 4), offsets=lambda found: [found[0], *found[:3]]),
    "a tile behind the file": tiff(SMALL, tile=(4, 4), offsets=lambda found: [*found[:3], 10_000]),
    "tiles without lengths": tiff(SMALL, tile=(4, 4), tags={325: None}),
    "tiles without rows": tiff(SMALL, tile=(4, 4), tags={323: None}),
    "tiles of no rows": tiff(SMALL, tile=(4, 4), tags={323: [0]}),
    "tiles of no columns": tiff(SMALL, tile=(4, 4), tags={322: [0]}),
    "tiles and strips": tiff(SMALL, tile=(7, 5), tags={273: [8], 279: [SMALL.size]}),
    "a strip at zero": tiff(SMALL, offsets=lambda found: [0, *found[1:]]),
    "two strips in one place": tiff(SMALL, offsets=lambda found: [found[0], found[0], found[2]]),
    "a strip inside of the directory": tiff(SMALL, offsets=lambda found: [*found[:2], found[2] + 4]),
    "a strip behind the file": tiff(SMALL, offsets=lambda found: [*found[:2], 10_000]),
    "a strip that ends behind the file": tiff(SMALL, lengths=lambda found: [*found[:2], 10_000]),
    "a length that takes the next strip": tiff(SMALL, lengths=lambda found: [found[0] + 1, *found[1:]]),
    "a strip too few": tiff(SMALL, offsets=lambda found: found[:2], lengths=lambda found: found[:2]),
    "a strip too many": tiff(SMALL, tags={257: [4]}),
    "a length too few": tiff(SMALL, lengths=lambda found: found[:2]),
    "no lengths": tiff(SMALL, tags={279: None}),
    "no offsets": tiff(SMALL, tags={273: None}),
    "no width": tiff(SMALL, tags={256: None}),
    "no kind of colour": tiff(SMALL, tags={262: None}),
    "more rows than are there": tiff(SMALL, tags={257: [9]}),
    "a wider image": tiff(SMALL, tags={256: [6]}),
    "no rows in a strip": tiff(SMALL, tags={278: [0]}),
    "bits that differ": tiff(SMALL, tags={258: [8, 8]}),
    "no pixels": tiff(SMALL, tags={256: [0]}),
    "no order of planes": tiff(SMALL, tags={284: [3]}),
    "colours and an extra sample": tiff(SMALL, tags={338: [2]}),
    "another byte order": tiff(SMALL, ">").replace(b"MM\0*", b"II*\0"),
    "no directory": b"II*\0\0\0\0\0" + bytes(20),
    "a directory behind the file": b"II*\0\xff\xff\0\0" + bytes(20),
    "nothing but a signature": b"MM\0*",
    "an LZW code without a meaning": tiff(SMALL, coding=5)[:9] + b"\xff\xff\xff" + tiff(SMALL, coding=5)[12:],
    "LZW of the first version": tiff(SMALL, coding=5)[:8] + b"\0\1" + tiff(SMALL, coding=5)[10:],
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_whose_pixels_are_not_all_there_is_refused(kind: str) -> None:
    with pytest.raises(NotAnImageError, match="TIFF file is truncated or damaged"):
        decode_image(DAMAGED[kind], LIMIT)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_file_that_was_cut_is_refused_wherever_it_was_cut(coding: int) -> None:
    for data in (tiff(SMALL, coding=coding), tiff(SMALL, coding=coding, tile=(4, 4))):
        for length in range(1, len(data)):
            with pytest.raises(NotAnImageError):
                decode_image(data[:length], LIMIT)


def test_a_flipped_bit_in_deflate_is_found() -> None:
    data = tiff(SMALL, coding=8, rows=99)
    for bit in range(8 * 8, 8 * (8 + SMALL.size)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = decode_image(bytes(flipped), LIMIT)
        except NotAnImageError:
            continue
        # Bits of the header of the stream that change no value.
        assert np.array_equal(found, units(SMALL))


def test_sizes_are_compared_before_a_strip_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.pixels.images.read_pixels", lambda *_: pytest.fail("the file was decoded"))
    with pytest.raises(ImageSizeError, match="is 7 x 5"):
        decode_image(tiff(SMALL), LIMIT, size_HW=(28, 28))
    with pytest.raises(ImageTooLargeError, match="5 x 7"):
        decode_image(tiff(SMALL), 34)
    with pytest.raises(ImageTooLargeError, match="1000000 x 1000000"):
        decode_image(tiff(SMALL[:1], tags={256: [10**6], 257: [10**6], 278: [10**6]}), LIMIT)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_last_strip_that_is_padded_to_the_rows_of_the_others_is_read(coding: int) -> None:
    nine = np.concatenate([SMALL, SMALL[:2]])
    assert np.array_equal(decode_image(tiff(nine, coding=coding, tags={257: [7]}), LIMIT), units(SMALL))


def test_a_long_repetition_costs_no_more_than_its_strip() -> None:
    for coding in (5, 8):
        data = tiff(np.zeros((300, 300, 3), np.uint8), coding=coding, rows=300)
        assert not decode_image(data, LIMIT).any()
        with pytest.raises(NotAnImageError):
            decode_image(data.replace(struct.pack("<HHII", 257, 4, 1, 300), struct.pack("<HHII", 257, 4, 1, 3)), LIMIT)
