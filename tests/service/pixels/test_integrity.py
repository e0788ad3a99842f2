"""A file whose data is incomplete is refused in every format, and no whole file is."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from encoding import encode
from PIL import Image

from service.errors import ImageFormatError, InputError, NotAnImageError
from service.pixels.images import decode_image

LIMIT = 100_000
EOI = b"\xff\xd9"


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels == 3 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def is_read(data: bytes) -> bool:
    try:
        decode_image(data, LIMIT)
    except InputError:
        return False
    return True


def segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment; that of SOS includes its entropy-coded data."""
    at = 2
    while jpeg[at : at + 2] != EOI:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] == 0xDA:
            while not (jpeg[end] == 0xFF and jpeg[end + 1] not in (0x00, *range(0xD0, 0xD8))):
                end += 1
        yield jpeg[at + 1], at, end
        at = end


def scans(jpeg: bytes) -> list[tuple[int, int]]:
    return [(start, end) for marker, start, end in segments(jpeg) if marker == 0xDA]


JPEG_OPTIONS = {
    "baseline": {},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "restart markers in each block": {"restart_marker_blocks": 1},
    "restart markers in each row": {"restart_marker_rows": 1},
    "progressive with restart markers": {"progressive": True, "restart_marker_blocks": 2},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "best quality": {"quality": 100},
    "worst quality": {"quality": 1},
    "RGB": {"keep_rgb": True},
    "comment": {"comment": b"\xff\xd9 is no end here"},
    "colour profile": {"icc_profile": bytes(range(256)) * 300},
}


@pytest.mark.parametrize("options", JPEG_OPTIONS.values(), ids=JPEG_OPTIONS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (17, 33), (40, 30)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_whole_jpeg_is_read_as_pillow_reads_it(
    options: dict[str, object], height: int, width: int, channels: int
) -> None:
    for pixels in (noise(height, width, channels), np.full_like(noise(height, width, channels), 255)):
        data = encode(pixels, "JPEG", **options)
        expected = np.asarray(Image.open(io.BytesIO(data))).reshape(height, width, channels)
        for behind in (b"", b"\0", b"trailing bytes", data):
            assert np.array_equal(np.moveaxis(decode_image(data + behind, LIMIT), 0, -1), expected)


@pytest.mark.parametrize("options", JPEG_OPTIONS.values(), ids=JPEG_OPTIONS)
def test_a_jpeg_whose_scans_are_cut_before_an_end_marker_is_refused(options: dict[str, object]) -> None:
    data = encode(noise(17, 33), "JPEG", **options)
    first = scans(data)[0][0]
    assert not [length for length in range(first, len(data) - 2) if is_read(data[:length] + EOI)]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_a_scan_that_is_cut_alone_is_refused(options: dict[str, object]) -> None:
    data = encode(noise(17, 33), "JPEG", **options)
    for _, end in scans(data):
        for missing in (1, 2, 7):
            with pytest.raises(NotAnImageError, match="truncated or damaged"):
                decode_image(data[: end - missing] + data[end:], LIMIT)


def test_a_progressive_jpeg_without_one_of_its_scans_is_refused() -> None:
    data = encode(noise(17, 33), "JPEG", progressive=True)
    found = scans(data)
    assert len(found) == 10
    for start, end in found:
        assert not is_read(data[:start] + data[end:])


def of_separate_scans(components: int) -> bytes:
    """A baseline JPEG with a scan for each of three components, of which so many are there."""
    planes = [encode(noise(16, 16, 1, seed), "JPEG") for seed in range(3)]
    (frame,) = [(start, end) for marker, start, end in segments(planes[0]) if marker == 0xC0]
    header = bytearray(planes[0][: frame[0]])
    header += b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 16, 16, 3)
    header += b"".join(bytes([component, 0x11, 0]) for component in (1, 2, 3))
    header += b"".join(
        planes[0][start:end] for marker, start, end in segments(planes[0]) if marker == 0xC4 and start > frame[0]
    )
    for component, plane in enumerate(planes[:components], 1):
        ((start, end),) = scans(plane)
        header += plane[start : start + 5] + bytes([component]) + plane[start + 6 : end]
    return bytes(header) + EOI


def test_a_baseline_jpeg_without_the_scan_of_a_component_is_refused() -> None:
    assert [is_read(of_separate_scans(components)) for components in (1, 2, 3)] == [False, False, True]


def test_a_jpeg_without_one_of_its_restart_intervals_is_refused() -> None:
    data = encode(noise(33, 33), "JPEG", restart_marker_blocks=1)
    markers = [at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] in range(0xD0, 0xD8)]
    assert len(markers) == 8
    for start, end in itertools.pairwise(markers):
        assert not is_read(data[:start] + data[end:])


def test_a_jpeg_whose_header_declares_more_rows_is_refused() -> None:
    for options in ({}, {"progressive": True}):
        data = bytearray(encode(noise(16, 16), "JPEG", **options))
        (at,) = [start for marker, start, _ in segments(bytes(data)) if marker in (0xC0, 0xC2)]
        data[at + 5 : at + 7] = struct.pack(">H", 17)
        assert not is_read(bytes(data))


def test_bytes_that_no_decoder_needs_do_not_matter() -> None:
    data = encode(noise(17, 33), "JPEG")
    _, end = scans(data)[0]
    start = scans(data)[0][0]
    expected = decode_image(data, LIMIT)
    for other in (
        data[:end] + bytes(20) + data[end:],  # padding behind the last scan, as some cameras write it
        data[:end] + b"\xff\xff\xff" + data[end:],  # fill bytes before a marker (T.81, B.1.1.2)
        data[:2] + b"\xff\xfe\0\x08\xff\xd9\xff\xda\0\0" + data[2:],  # markers in a comment
        data[:start] + b"\0\0\xff" + data[start:],
    ):
        assert np.array_equal(decode_image(other, LIMIT), expected)


def test_scan_parameters_that_sequential_files_do_not_use_are_ignored() -> None:
    data = bytearray(encode(noise(17, 33), "JPEG"))
    start, _ = scans(bytes(data))[0]
    expected = decode_image(bytes(data), LIMIT)
    at = start + 5 + 2 * data[start + 4]
    data[at : at + 3] = b"\0\0\0"
    assert np.array_equal(decode_image(bytes(data), LIMIT), expected)


@pytest.mark.parametrize("frame", [0xC3, 0xC9, 0xCA])
def test_a_coding_that_hides_missing_data_is_refused_with_a_cure(frame: int) -> None:
    data = bytearray(encode(noise(16, 16, 1), "JPEG"))
    (at,) = [start for marker, start, _ in segments(bytes(data)) if marker == 0xC0]
    data[at + 1] = frame
    with pytest.raises(ImageFormatError, match="save it as a baseline or progressive JPEG"):
        decode_image(bytes(data), LIMIT)


def test_sampling_factors_that_cannot_be_checked_are_refused_with_a_cure() -> None:
    """3 x 1 blocks of the first component in each unit, all of them flat."""
    data = bytearray(encode(np.full((8, 24), 128, np.uint8), "JPEG"))
    (frame,) = [(start, end) for marker, start, end in segments(bytes(data)) if marker == 0xC0]
    (scan,) = scans(bytes(data))
    block = "00" + "1010"  # difference 0, end of block: code tables of T.81, annex K.3
    bits = 5 * block
    entropy = int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8), "big")
    other = data[: frame[0]] + b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 8, 24, 3)
    other += b"\x01\x31\x00\x02\x11\x00\x03\x11\x00" + data[frame[1] : scan[0]]
    other += b"\xff\xda\x00\x0c\x03\x01\x00\x02\x00\x03\x00\x00\x3f\x00" + entropy + EOI
    assert np.asarray(Image.open(io.BytesIO(bytes(other)))).shape == (8, 24, 3)
    with pytest.raises(ImageFormatError, match="unusual sampling factors; save it with 4:4:4"):
        decode_image(bytes(other), LIMIT)


@pytest.mark.parametrize("count", [2, 3])
def test_a_jpeg_with_previews_in_an_mpf_segment_is_its_first_picture(count: int) -> None:
    pixels, preview = noise(24, 32), noise(6, 8)
    pictures = [Image.fromarray(pixels), *[Image.fromarray(preview)] * (count - 1)]
    file = io.BytesIO()
    pictures[0].save(file, "MPO", save_all=True, append_images=pictures[1:])
    with Image.open(io.BytesIO(file.getvalue())) as several:
        assert several.format == "MPO"
        assert several.n_frames == count
    found = decode_image(file.getvalue(), LIMIT)
    assert np.array_equal(found, decode_image(encode(pixels, "JPEG"), LIMIT))
    # The damage of the first picture counts, although a whole one follows.
    data = file.getvalue()
    _, end = scans(data)[0]
    assert not is_read(data[: end - 50] + data[end:])


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(content)) + content


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_a_photograph_with_the_segments_of_a_phone_is_its_first_picture(options: dict[str, object]) -> None:
    pixels = noise(24, 32)
    plain, gain_map = encode(pixels, "JPEG", **options), encode(noise(6, 8, 1), "JPEG")
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a phone", 1
    # A thumbnail inside of the metadata has markers of its own.
    thumbnail = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0") + gain_map
    entries = struct.pack("<HHI4sHHIIHHII", 0xB000, 7, 4, b"0100", 0xB001, 4, 1, 2, 0xB002, 7, 32, 50)
    places = struct.pack("<IIIHHIIIHH", 0x030000, len(plain), 0, 0, 0, 0, len(gain_map), len(plain), 0, 0)
    mpf = b"MPF\0II*\0\x08\0\0\0\x03\0" + entries + bytes(4) + places
    segments_of_phones = [
        segment(0xE1, thumbnail),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta hdrgm:Version='1.0'/>"),
        segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(500)),
        segment(0xE2, mpf),
        segment(0xE4, bytes([0xFF, 0xD8, 0xFF, 0xD9, 0xFF, 0xDA] * 30)),
        segment(0xEA, b"AROT\0\0" + bytes(100)),
        segment(0xEB, b"JP\0\1" + bytes(60)),
    ]
    photograph = plain[:2] + b"".join(segments_of_phones) + plain[2:]
    behind = [b"", gain_map, gain_map + b"\0\0\1\x0a\x0e\0\0\0Image_UTC_Data1700000000000SEFHh\0\0\0\1\0\0\0SEFT"]
    behind.append(b"\0\0\0\x18ftypmp42" + bytes(300))
    for rest in behind:
        assert np.array_equal(decode_image(photograph + rest, LIMIT), decode_image(plain, LIMIT))
        _, end = scans(photograph)[0]
        assert not is_read(photograph[: end - 9] + photograph[end:] + rest)


def png_with_rows(pixels: np.ndarray, stream: bytes, interlaced: int = 0) -> bytes:
    """A PNG that declares the size of `pixels` and holds the compressed `stream`."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, interlaced)
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_without_some_of_its_rows_is_refused(channels: int) -> None:
    pixels = noise(12, 7, channels)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    assert is_read(png_with_rows(pixels, zlib.compress(rows)))
    assert is_read(png_with_rows(pixels, zlib.compress(rows + b"more rows")))
    per_row = len(rows) // 12
    for length in (*range(0, len(rows), per_row), len(rows) - 1):
        assert not is_read(png_with_rows(pixels, zlib.compress(rows[:length])))


def test_an_interlaced_png_without_some_of_its_passes_is_refused() -> None:
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    for height, width in itertools.product((1, 2, 3, 5, 9), repeat=2):
        pixels = noise(height, width, 1)
        rows = [
            b"\0" + row.tobytes()
            for top, left, down, right in passes
            for row in pixels[top::down, left::right]
            if row.size
        ]
        whole = png_with_rows(pixels, zlib.compress(b"".join(rows)), interlaced=1)
        assert np.array_equal(decode_image(whole, LIMIT)[0], pixels)
        for length in range(len(rows)):
            assert not is_read(png_with_rows(pixels, zlib.compress(b"".join(rows[:length])), interlaced=1))


def test_a_png_whose_compressed_rows_lost_their_end_is_refused() -> None:
    pixels = noise(12, 7, 1)
    stream = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    assert not [cut for cut in range(1, len(stream)) if is_read(png_with_rows(pixels, stream[:-cut]))]
    assert is_read(png_with_rows(pixels, stream + b"behind the stream"))


def test_a_png_that_decompresses_to_gigabytes_takes_no_more_memory_than_its_pixels() -> None:
    pixels = np.zeros((12, 7), np.uint8)
    stream = zlib.compressobj(9)
    bomb = b"".join(stream.compress(bytes(2**20)) for _ in range(64)) + stream.flush()
    assert np.array_equal(decode_image(png_with_rows(pixels, bomb), LIMIT)[0], pixels)


def gif(pixels: np.ndarray) -> bytes:
    return encode(Image.fromarray(pixels).quantize(16), "GIF")


def test_a_gif_with_trailing_bytes_is_read_and_one_without_its_trailer_is_not() -> None:
    data = gif(noise(30, 40))
    assert data.endswith(b"\0;")
    for behind in (b"\0\0", b";", b"trailing bytes", data):
        assert is_read(data + behind)
    for end in (b"", b";", b"\0;"):
        assert not [length for length in range(14, len(data) - 3) if is_read(data[:length] + end)]


def test_a_gif_with_fewer_rows_than_its_header_declares_is_refused() -> None:
    data = bytearray(gif(noise(30, 40)))
    at = data.index(b",\0\0\0\0\x28\0\x1e\0")
    data[8:10] = data[at + 7 : at + 9] = struct.pack("<H", 31)
    assert not is_read(bytes(data))


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"quality": 30, "method": 0}], ids=str)
def test_a_webp_whose_image_data_is_cut_and_whose_sizes_fit_is_refused_or_has_all_pixels(
    options: dict[str, object],
) -> None:
    refused = 0
    for size, seed in itertools.product((9, 16, 31), range(6)):
        data = encode(noise(size, size + 3, seed=seed) // (1 + seed), "WEBP", **options)
        pixels = decode_image(data, LIMIT)
        for behind in (b"\0", b"trailing bytes"):
            assert np.array_equal(decode_image(data + behind, LIMIT), pixels)
        for cut in range(1, 16):
            body = data[12:-cut]
            body = body[:4] + struct.pack("<I", len(body) - 8) + body[8:] + b"\0" * (len(body) % 2)
            shorter = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
            try:
                assert np.array_equal(decode_image(shorter, LIMIT), pixels)
            except InputError:
                refused += 1
    assert refused > 150


def test_a_bmp_without_some_of_its_rows_is_refused() -> None:
    data = bytearray(encode(noise(5, 4), "BMP"))
    assert is_read(bytes(data) + b"trailing bytes")
    data[22:26] = struct.pack("<i", 6)
    assert not is_read(bytes(data))


def test_a_run_length_bmp_without_some_of_its_rows_is_refused() -> None:
    width, height = 10, 6
    rows = [bytes([width, 7 * row]) + b"\0\0" for row in range(height)]

    def bmp(body: bytes) -> bytes:
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
        palette = b"".join(bytes([grey, grey, grey, 0]) for grey in range(256))
        offset = 14 + len(header) + len(palette)
        return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + palette + body

    end = b"\0\1"
    assert decode_image(bmp(b"".join(rows) + end), LIMIT)[0, :, 0].tolist() == [35, 28, 21, 14, 7, 0]
    for count in range(height):
        assert not is_read(bmp(b"".join(rows[:count]) + end))
        assert not is_read(bmp(b"".join(rows[:count])))
