"""HEIC files are read by libheif, or refused: where data is missing, and without the library."""

from __future__ import annotations

import base64
import importlib.util
import io
import struct
from typing import Any

import numpy as np
import pillow_heif
import pytest
from client import Client
from PIL import Image

from service.errors import ImageFormatError, ImageSizeError, ImageTooLargeError, NotAnImageError
from service.pixels.images import decode_image

LIMIT = 200_000
RANDOM = np.random.default_rng(3)
COLOUR = np.kron(RANDOM.integers(0, 256, (6, 5, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
EXACT = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}
"""Options of the encoder that keep every value."""


def heic(pixels: np.ndarray | Image.Image, mode: str | None = None, more: Any = None, **options: Any) -> bytes:
    """A HEIC file of the pixels; `more` is a second picture behind it."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    pictures = pillow_heif.from_pillow(image)
    if more is not None:
        pictures.add_from_pillow(Image.fromarray(more))
    file = io.BytesIO()
    pictures.save(file, **options)
    return file.getvalue()


LOSSLESS = heic(COLOUR, **EXACT)
GRID = heic(np.tile(COLOUR, (3, 3, 1)), quality=80, tile_size=64)
ALPHA = np.dstack([COLOUR, np.where(COLOUR[..., :1] > 127, 255, 0).astype(np.uint8)])


def test_values_of_a_lossless_file_are_read() -> None:
    assert np.array_equal(decode_image(LOSSLESS, LIMIT), np.moveaxis(COLOUR, -1, 0))
    assert decode_image(heic(COLOUR[..., 0], quality=90), LIMIT).shape == (1, 96, 80)
    assert decode_image(GRID, LIMIT).shape == (3, 288, 240)


def test_the_values_are_those_of_libheif_each_time() -> None:
    data = heic(COLOUR, quality=60)
    expected = np.moveaxis(np.asarray(pillow_heif.open_heif(io.BytesIO(data))), -1, 0)
    for _ in range(2):
        assert np.array_equal(decode_image(data, LIMIT), expected)


def test_the_primary_picture_counts() -> None:
    other = np.full_like(COLOUR, 9)
    assert np.array_equal(decode_image(heic(COLOUR, more=other, primary_index=0, **EXACT), LIMIT)[0], COLOUR[..., 0])
    assert (decode_image(heic(COLOUR, more=other, primary_index=1, **EXACT), LIMIT) == 9).all()


def test_the_picture_is_turned_as_the_file_says() -> None:
    image = Image.fromarray(COLOUR)
    image.getexif()[0x0112] = 5
    data = heic(image, **EXACT)
    at, mirror = data.index(b"irot") + 4, data.index(b"imir") + 4

    def turned(quarters: int, axis: int) -> np.ndarray:
        data_of = changed(changed(data, at, bytes([quarters])), mirror, bytes([axis]))
        return np.moveaxis(decode_image(data_of, LIMIT), 0, -1)

    # Anticlockwise, and then mirrored, from left to right where the axis is 0: EXIF does not turn it once more.
    upright = turned(0, 0)[:, ::-1]
    assert {upright.shape, COLOUR.shape} == {(80, 96, 3), (96, 80, 3)}
    for quarters in range(4):
        assert np.array_equal(turned(quarters, 0), np.rot90(upright, quarters)[:, ::-1])
        assert np.array_equal(turned(quarters, 1), np.rot90(upright, quarters)[::-1])


def test_alpha_has_a_meaning_over_a_background() -> None:
    data = heic(ALPHA, **EXACT)
    with pytest.raises(ImageFormatError, match="background=#rrggbb"):
        decode_image(data, LIMIT)
    clear = ALPHA[..., 3:] == 0
    expected = np.where(clear, np.array([1, 2, 3], np.uint8), COLOUR)
    assert np.array_equal(decode_image(data, LIMIT, background="#010203"), np.moveaxis(expected, -1, 0))
    opaque = ALPHA.copy()
    opaque[..., 3] = 255
    assert np.array_equal(decode_image(heic(opaque, **EXACT), LIMIT), np.moveaxis(COLOUR, -1, 0))
    grey = heic(np.ascontiguousarray(ALPHA[..., [0, 3]]), "LA", quality=90)
    assert decode_image(grey, LIMIT, background="#808080").shape == (1, 96, 80)


def test_more_than_8_bits_are_refused() -> None:
    deep = Image.frombytes("I;16", (8, 8), bytes(128))
    with pytest.raises(ImageFormatError, match="10 bits per channel, and 8 are read"):
        decode_image(heic(deep), LIMIT)


def test_sizes_are_compared_before_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.pixels.heif.HeifPicture.samples", lambda _: pytest.fail("the file was decoded"))
    with pytest.raises(ImageSizeError, match="is 96 x 80"):
        decode_image(LOSSLESS, LIMIT, size_HW=(28, 28))
    with pytest.raises(ImageTooLargeError, match="80 x 96"):
        decode_image(LOSSLESS, 80 * 96 - 1)


@pytest.mark.parametrize("data", [LOSSLESS, GRID, heic(ALPHA, quality=80)], ids=["one item", "tiles", "alpha"])
def test_a_file_that_was_cut_is_refused_wherever_it_was_cut(data: bytes) -> None:
    for length in (*range(12, 900, 7), *range(900, len(data), max(1, len(data) // 60)), len(data) - 1):
        with pytest.raises(NotAnImageError, match="HEIC file is truncated or damaged"):
            decode_image(data[:length], LIMIT)
    assert decode_image(data + b"behind the file", LIMIT, background="#000000").size


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


ILOC = LOSSLESS.index(b"iloc") + 4
TILES = GRID.index(b"iref")
DAMAGED = {
    "no place of the data": changed(LOSSLESS, ILOC - 4, b"free"),
    "no description": changed(LOSSLESS, LOSSLESS.index(b"meta"), b"free"),
    "items beyond the box": changed(LOSSLESS, ILOC + 6, b"\xff\xff"),
    "data before the file": changed(LOSSLESS, ILOC + 4, b"\x00\x00"),
    "a tile that does not exist": changed(GRID, TILES + 22, b"\x00\xee"),
    "no primary picture": changed(LOSSLESS, LOSSLESS.index(b"pitm") + 8, b"\x00\x77"),
    "nothing but a brand": b"\0\0\0\x18ftypheic" + bytes(12),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused(kind: str) -> None:
    with pytest.raises(NotAnImageError, match="HEIC file is truncated or damaged"):
        decode_image(DAMAGED[kind], LIMIT)


def test_flipped_bits_give_an_image_or_a_refusal() -> None:
    data = heic(COLOUR, quality=80)
    for bit in range(0, 8 * len(data), 37):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = decode_image(bytes(flipped), LIMIT)
        except (NotAnImageError, ImageFormatError, ImageTooLargeError):
            continue
        assert found.dtype == np.uint8


def test_files_of_many_parts_are_refused() -> None:
    boxes = b"\0\0\0\x18ftypheic" + bytes(12) + struct.pack(">I4s", 8, b"free") * 2000
    with pytest.raises(ImageFormatError, match="more than 1000 boxes"):
        decode_image(boxes, LIMIT)
    iloc = struct.pack(">IHH", 0x01000000, 0x4400, 1) + struct.pack(">HHHH", 1, 0, 0, 65535) + bytes(8 * 65535)
    inside = bytes(4) + struct.pack(">I4s", len(iloc) + 8, b"iloc") + iloc
    with pytest.raises(ImageFormatError, match="more than 16384 parts"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(12) + struct.pack(">I4s", len(inside) + 8, b"meta") + inside, LIMIT)


def test_without_the_library_the_refusal_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotAnImageError, match=r"HEIC .* save it as JPEG or PNG .* install the extra heic"):
        decode_image(LOSSLESS, LIMIT)
    with pytest.raises(NotAnImageError, match=r"AVIF .* save it as JPEG"):
        decode_image(b"\0\0\0\x1cftypavif\0\0\0\0mif1avif" + bytes(40), LIMIT)


def test_the_server_reads_a_file_of_a_phone(client: Client) -> None:
    size = np.kron(RANDOM.integers(0, 256, (1, 1), np.uint8), np.ones((64, 64), np.uint8))
    answer = client.post("/predict?resize=true", content=heic(size, quality=90), headers={"Content-Type": "image/heic"})
    # Beyond the limit of pixels of this server.
    assert answer.status_code == 413
    small = heic(size[:8, :10], quality=90)
    asked = {"image": base64.b64encode(small).decode(), "resize": True}
    assert client.post("/predict", json=asked).json()["image"]["shape"] == [1, 8, 10]
