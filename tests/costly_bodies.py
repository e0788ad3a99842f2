"""Requests that cost a server much more than they cost their client, each for a model of 1 x 28 x 28 (`mnist`).

`COSTLY` maps a name to path, media type and a function that makes the body. Each is a kind of its own: a list that is
long, an object of many names, a text in a place of numbers, a file of many small parts, a picture that unpacks to much
more than it has bytes.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from encoding import encode, npy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

MIB = 2**20
JSON, FORM, NPY = "application/json", "multipart/form-data; boundary=X", "application/x-npy"
INFER, PREDICT_V1 = "/v2/models/mnist/infer", "/v1/models/mnist:predict"


class Costly(NamedTuple):
    """A request: path, media type, its body when it is called, and further headers."""

    path: str
    media_type: str
    body: Callable[[], bytes]
    headers: Mapping[str, str] = {}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, colour: int = 0, depth: int = 8, stream: bytes | None = None) -> bytes:
    """A PNG file with further chunks before its pixels, which are black."""
    samples = 3 if colour == 2 else 1
    if stream is None:
        packer = zlib.compressobj(9)
        row = bytes(1 + (width * samples * depth + 7) // 8)
        stream = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def tiff(coding: int, strip: bytes, height: int = 28, width: int = 28) -> bytes:
    """A grey TIFF file of one strip."""
    values = {256: width, 257: height, 258: 8, 259: coding, 262: 1, 273: 8, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    directory = struct.pack("<H", len(values)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


def bits_of_9(*codes: int) -> bytes:
    """Eight codes of LZW in nine bytes."""
    return int("".join(f"{code:09b}" for code in codes), 2).to_bytes(9, "big")


def inflated(size: int) -> bytes:
    """A zlib stream of some kilobytes that has `size` bytes."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(size // MIB)) + packer.flush()


def jpeg(width: int = 28, height: int = 28, **options: Any) -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(pixels, "JPEG", **options)


def scans(count: int, width: int, height: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(Image.new("RGB", (width, height), (9, 99, 199)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def segments(marker: int, payload: bytes, count: int) -> bytes:
    """A JPEG with many segments before its first."""
    data = jpeg()
    return data[:2] + (bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload) * count + data[2:]


def gif(extra: bytes = b"", width: int = 28, height: int = 28) -> bytes:
    data = encode(Image.new("L", (width, height), 7), "GIF")
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    return data[:at] + extra + data[at:]


def webp(*chunks: tuple[bytes, bytes], flags: int = 0) -> bytes:
    """An extended WebP file with further chunks before its picture."""
    simple = encode(Image.new("RGB", (28, 28), (1, 2, 3)), "WEBP", lossless=True)[12:]
    extended = b"VP8X" + struct.pack("<I", 10) + bytes((flags, 0, 0, 0)) + (27).to_bytes(3, "little") * 2
    parts = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    body = b"WEBP" + extended + parts + simple
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif(entries: int, length: int) -> bytes:
    """A TIFF directory whose entries all name the same bytes."""
    directory = b"".join(struct.pack("<HHII", 1 + number, 7, length, 8) for number in range(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", entries) + directory + bytes(4)


def bmp_of_runs(width: int, height: int) -> bytes:
    body = b"\1\7" * width * height + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    palette = bytes(1024)
    return b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(body), 0, 0, 14 + 40 + 1024) + header + palette + body


def form(image: bytes, *parts: bytes) -> bytes:
    head = b'--X\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    return b"".join(parts) + head + image + b"\r\n--X--\r\n"


def infer(data: str, shape: Sequence[int] = (1, 1, 28, 28), datatype: str = "FP64", more: str = "") -> bytes:
    tensor = f'{{"name":"image","shape":{list(shape)},"datatype":"{datatype}","data":{data}}}'
    return f'{{"inputs":[{tensor}]{more}}}'.encode()


def npy_header(text: bytes) -> bytes:
    return b"\x93NUMPY\x02\0" + struct.pack("<I", len(text)) + text


def in_json(image: bytes, **options: Any) -> bytes:
    return json.dumps({"image": base64.b64encode(image).decode(), **options}).encode()


DIGIT = png(28, 28)
NESTED_TEXT = '["' + '","'.join(["a" * 400] + ["b"] * 783) + '"]'
_PREDICT: dict[str, tuple[str, Callable[[], bytes]]] = {
    # JSON
    "repeated name at the end of 20,000": (
        JSON,
        lambda: b"{" + b",".join(b'"n%d":1' % n for n in range(20_000)) + b',"n0":1}',
    ),
    "300,000 names": (JSON, lambda: b"{" + b",".join(b'"n%d":1' % n for n in range(300_000)) + b"}"),
    "image is a list of zeros": (JSON, lambda: b'{"image":[' + b"0," * 500_000 + b"0]}"),
    "image is a list of lists": (JSON, lambda: b'{"image":[' + b"[]," * 2_000_000 + b"0]}"),
    "image is a list of objects": (JSON, lambda: b'{"image":[' + b"{}," * 2_000_000 + b"0]}"),
    "image is a list of texts": (JSON, lambda: b'{"image":[' + b'"",' * 2_000_000 + b"0]}"),
    "open brackets": (JSON, lambda: b"[" * 8 * MIB),
    "open objects": (JSON, lambda: b'{"a":' * MIB),
    "an integer of 16 million digits": (JSON, lambda: b'{"epsilon":' + b"1" * 15_900_000 + b"}"),
    "a fraction of 16 million digits": (JSON, lambda: b'{"epsilon":0.' + b"1" * 15_900_000 + b"}"),
    "integers of 4,300 digits": (JSON, lambda: b'{"image":[' + (b"1" * 4300 + b",") * 250 + b"1]}"),
    "integers of 4,300 digits, many": (JSON, lambda: b'{"image":[' + (b"1" * 4300 + b",") * 3600 + b"1]}"),
    "a name of 15 MB": (JSON, lambda: b'{"' + b"n" * 15 * MIB + b'":1}'),
    "a model of 15 MB": (JSON, lambda: in_json(DIGIT, model="m" * 15 * MIB)),
    "a target of 15 MB": (JSON, lambda: in_json(DIGIT, counterfactual=True, target="ä" * 2 * MIB)),
    "escapes": (JSON, lambda: b'{"image":"' + b"\\u0041" * 2_600_000 + b'"}'),
    "surrogates": (JSON, lambda: b'{"image":"' + b"\\ud83d" * 2_600_000 + b'"}'),
    "escaped quotes": (JSON, lambda: b'{"image":"' + b'\\"' * 7 * MIB + b'"}'),
    "not UTF-8 at the end": (JSON, lambda: b'{"image":"' + "é".encode() * 7 * MIB + b'\xff"}'),
    "white space": (JSON, lambda: b'{"image":' + b" " * 15 * MIB + b'"x"}'),
    "base64 with white space at its end": (JSON, lambda: b'{"image":"' + b"A" * 15 * MIB + b' "}'),
    "base64 of the wrong alphabet": (JSON, lambda: b'{"image":"' + b"A" * 15 * MIB + b'-"}'),
    "base64 of nothing": (JSON, lambda: b'{"image":"' + b"A" * 15 * MIB + b'"}'),
    "a picture of scans in base64": (JSON, lambda: in_json(scans(1000, 1000, 1000))),
    "options beside a large picture": (JSON, lambda: in_json(jpeg(1400, 1400), resize=True)),
    # TIFF
    "a table that is cleared at once": ("image/tiff", lambda: tiff(5, bits_of_9(*[256] * 8) * (MIB + MIB // 2))),
    "a table that is cleared after each byte": (
        "image/tiff?resize=true",
        lambda: tiff(5, bits_of_9(*[256, 7] * 4) * (MIB + MIB // 2), 1448, 1448),
    ),
    "runs that are none": ("image/tiff", lambda: tiff(32773, b"\x80" * 15 * MIB)),
    "runs of one byte": ("image/tiff?resize=true", lambda: tiff(32773, b"\0\7" * 7 * MIB, 1448, 1448)),
    "a strip that inflates to 100 MB": ("image/tiff", lambda: tiff(8, inflated(100 * MIB))),
    "65,535 entries": ("image/tiff", lambda: b"II*\0\x08\0\0\0\xff\xff" + bytes(12 * 65_535 + 4)),
    # Forms
    "carriage returns": (FORM, lambda: form(b"\r" * 15 * MIB)),
    "half boundaries": (FORM, lambda: form(b"\r\n--" * 3_900_000)),
    "a header of 15 MB": (FORM, lambda: b"--X\r\nContent-Disposition: " + b"a" * 15 * MIB + b"\r\n\r\nx\r\n--X--\r\n"),
    "header parameters": (FORM, lambda: b"--X\r\nContent-Disposition: form-data" + b"; a=b" * 3 * MIB + b"\r\n\r\n"),
    "headers of a part": (FORM, lambda: b"--X\r\n" + b"a: b\r\n" * 2_600_000 + b"\r\nx\r\n--X--\r\n"),
    "parts": (FORM, lambda: b'--X\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n' * 200_000),
    "a field name of 15 MB": (
        FORM,
        lambda: b'--X\r\nContent-Disposition: form-data; name="' + b"n" * 15 * MIB + b'"\r\n\r\nx\r\n--X--\r\n',
    ),
    "a field of 15 MB": (
        FORM,
        lambda: form(DIGIT, b'--X\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"m" * 15 * MIB + b"\r\n"),
    ),
    "preamble": (FORM, lambda: b"\r\n" * 7 * MIB + form(DIGIT)),
    # npy
    "nested header": (NPY, lambda: npy_header(b"(" * 9000)),
    "signs": (NPY, lambda: npy_header(b"-" * 9000 + b"1")),
    "an npy header of 15 MB": (NPY, lambda: npy_header(b" " * 15 * MIB)),
    "a shape of 4,000 axes": (
        NPY,
        lambda: npy_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (" + b"1," * 4000 + b")}") + bytes(8),
    ),
    "a shape of 10,000 digits": (
        NPY,
        lambda: npy_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (0x" + b"f" * 900 + b",)}") + bytes(8),
    ),
    "structured types": (
        NPY,
        lambda: npy_header(b"{'descr': '" + b"f8," * 300 + b"', 'fortran_order': False, 'shape': (1,)}"),
    ),
    "not a number everywhere": (NPY, lambda: npy(np.full((1, 1024, 1024), np.nan))),
    "floats of half a megapixel": (NPY, lambda: npy(np.zeros((724, 724)))),
    "half floats": (NPY, lambda: npy(np.full((1400, 1400), 2.0, np.float16))),
    # PNG
    "black square of two megapixels": ("image/png", lambda: png(1400, 1400)),
    "coloured square of two megapixels": ("image/png?resize=true", lambda: png(1400, 1400, colour=2)),
    "one bit of two megapixels": ("image/png?resize=true", lambda: png(1448, 1448, depth=1)),
    "a strip": ("image/png?resize=true", lambda: png(2_000_000, 1)),
    "a wider header": ("image/png", lambda: png(2**31 - 1, 1, stream=b"")),
    "empty chunks": ("image/png", lambda: png(28, 28, chunk(b"teSt", b"") * 1_300_000)),
    "small chunks": ("image/png", lambda: png(28, 28, chunk(b"teSt", bytes(600)) * 25_000)),
    "empty texts": ("image/png", lambda: png(28, 28, chunk(b"tEXt", b"k\0") * 1_100_000)),
    "texts of 900 bytes": ("image/png", lambda: png(28, 28, chunk(b"tEXt", b"k\0" + b"v" * 900) * 17_000)),
    "zTXt bomb": ("image/png", lambda: png(28, 28, chunk(b"zTXt", b"k\0\0" + inflated(200 * MIB)))),
    "zTXt bombs": ("image/png", lambda: png(28, 28, chunk(b"zTXt", b"k\0\0" + inflated(MIB)) * 900)),
    "iTXt bombs": ("image/png", lambda: png(28, 28, chunk(b"iTXt", b"k\0\1\0\0\0" + inflated(MIB)) * 900)),
    "iCCP bomb": ("image/png", lambda: png(28, 28, chunk(b"iCCP", b"k\0\0" + inflated(200 * MIB)))),
    "iCCP bombs": ("image/png", lambda: png(28, 28, chunk(b"iCCP", b"k\0\0" + inflated(MIB)) * 900)),
    "pixels of a gigabyte": ("image/png", lambda: png(28, 28, stream=inflated(200 * MIB))),
    "EXIF directory": ("image/png", lambda: png(28, 28, chunk(b"eXIf", exif(60_000, 700_000)[6:]))),
    "many pieces of pixels": (
        "image/png",
        lambda: png(28, 28, stream=b"").replace(chunk(b"IDAT", b""), chunk(b"IDAT", b"") * 1_300_000),
    ),
    "frames of an animated PNG": (
        "image/png",
        lambda: encode(
            Image.new("L", (28, 28)),
            save_all=True,
            append_images=[Image.new("L", (28, 28), n % 255) for n in range(300)],
        ),
    ),
    "XMP of a megabyte": ("image/png", lambda: png(28, 28, noted("XML:com.adobe.xmp", "tiff:Orientation" * 60_000))),
    # JPEG
    "1,000 scans of a small picture": ("image/jpeg", lambda: scans(1000, 28, 28)),
    "1,000 scans of a megapixel": ("image/jpeg", lambda: scans(1000, 1000, 1000)),
    "90 scans of two megapixels": ("image/jpeg?resize=true", lambda: scans(80, 1440, 1440)),
    "500,000 scans": ("image/jpeg", lambda: scans(500_000, 28, 28)),
    "large noise": ("image/jpeg?resize=true", lambda: jpeg(1440, 1440, quality=98)),
    "large progressive noise": ("image/jpeg?resize=true", lambda: jpeg(1440, 1440, quality=98, progressive=True)),
    "restart markers everywhere": ("image/jpeg?resize=true", lambda: jpeg(1440, 1440, restart_marker_blocks=1)),
    "empty comments": ("image/jpeg", lambda: segments(0xFE, b"", 3_900_000)),
    "long comments": ("image/jpeg", lambda: segments(0xFE, bytes(65_000), 240)),
    "EXIF segments": ("image/jpeg", lambda: segments(0xE1, exif(5000, 60_000), 240)),
    "colour profiles": ("image/jpeg", lambda: segments(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(60_000), 250)),
    "Photoshop resources": (
        "image/jpeg",
        lambda: segments(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000, 240),
    ),
    "Huffman tables": ("image/jpeg", lambda: segments(0xC4, b"\0\1" + bytes(16), 700_000)),
    "quantisation tables": ("image/jpeg", lambda: segments(0xDB, b"\0" + b"\1" * 64, 220_000)),
    "fill bytes": ("image/jpeg", lambda: jpeg()[:2] + b"\xff" * 15 * MIB + jpeg()[2:]),
    "65,500 x 30 pixels": ("image/jpeg?resize=true", lambda: jpeg(65_500, 30)),
    # GIF
    "comments of a GIF": ("image/gif", lambda: gif(b"\x21\xfe\1a\0" * 3_000_000)),
    "one comment of many blocks": ("image/gif", lambda: gif(b"\x21\xfe" + (b"\xff" + b"c" * 255) * 60_000 + b"\0")),
    "blocks of one byte": ("image/gif", lambda: gif(b"\x21\xff" + b"\1x" * 7_000_000 + b"\0")),
    "frames of a GIF": ("image/gif", lambda: gif()[:-1] + gif()[gif().index(b",\0\0\0\0") : -1] * 100_000 + b";"),
    "bytes between blocks": ("image/gif", lambda: gif(b"\1" * 15 * MIB)),
    "a canvas of 65,535 squared": ("image/gif", lambda: b"GIF89a\xff\xff\xff\xff" + gif()[10:]),
    "a GIF of two megapixels": ("image/gif?resize=true", lambda: gif(b"", 1440, 1440)),
    # WebP
    "a canvas of 16,384 squared": (
        "image/webp",
        lambda: webp().replace((27).to_bytes(3, "little") * 2, b"\xff\x3f\0" * 2),
    ),
    "empty chunks of a WebP": ("image/webp", lambda: webp(*[(b"TEST", b"")] * 1_500_000)),
    "colour profile of 15 MB": ("image/webp", lambda: webp((b"ICCP", bytes(15 * MIB)), flags=32)),
    "EXIF of a WebP": ("image/webp", lambda: webp((b"EXIF", exif(60_000, 700_000)), flags=8)),
    "noise of two megapixels": (
        "image/webp?resize=true",
        lambda: encode(
            np.random.default_rng(1).integers(0, 256, (1440, 1440, 3), dtype=np.uint8),
            "WEBP",
            lossless=True,
            quality=0,
            method=0,
        ),
    ),
    # BMP
    "runs of one pixel": ("image/bmp?resize=true", lambda: bmp_of_runs(1400, 1400)),
    "a negative size": (
        "image/bmp",
        lambda: (
            b"BM"
            + struct.pack("<IHHI", 54, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, 2**30, -(2**30), 1, 24, 0, 0, 0, 0, 0, 0)
        ),
    ),
    "a palette of four billion colours": (
        "image/bmp",
        lambda: (
            b"BM"
            + struct.pack("<IHHI", 54, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, 28, 28, 1, 8, 0, 0, 0, 0, 2**32 - 1, 0)
        ),
    ),
    # Others
    "bytes of no format": ("image/png", lambda: b"\0" * 15 * MIB),
    "noise": ("image/png", lambda: np.random.default_rng(1).bytes(15 * MIB)),
    "a query of 60,000 bytes": ("image/png?" + "&".join(f"a{n}=1" for n in range(7000)), lambda: DIGIT),
    "a long name in the query": ("image/png?" + "n" * 50_000 + "=1", lambda: DIGIT),
    "a media type of 50,000 bytes": ("text/" + "x" * 50_000, lambda: DIGIT),
}


def noted(name: str, value: str) -> bytes:
    note = PngInfo()
    note.add_itxt(name, value, zip=True)
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG", pnginfo=note)
    data = file.getvalue()
    at = data.index(b"iTXt") - 4
    return data[at : at + 12 + int.from_bytes(data[at : at + 4], "big")]


_BATCH: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a batch of zeros": (JSON, lambda: b'{"images":[' + b"0," * 500_000 + b"0]}"),
    "a batch of 200,000 texts": (JSON, lambda: b'{"images":[' + b'"",' * 200_000 + b'""]}'),
    "a batch of 256 empty texts": (JSON, lambda: b'{"images":[' + b'"",' * 255 + b'""]}'),
    "a batch of 20 pictures of scans": (
        JSON,
        lambda: json.dumps({"images": [base64.b64encode(scans(50, 300, 300)).decode()] * 20, "resize": True}).encode(),
    ),
    "a batch of 250 bombs": (
        JSON,
        lambda: json.dumps(
            {"images": [base64.b64encode(png(28, 28, stream=inflated(20 * MIB))).decode()] * 250}
        ).encode(),
    ),
    "a batch of 250 texts of a megabyte": (
        JSON,
        lambda: json.dumps(
            {"images": [base64.b64encode(png(28, 28, chunk(b"zTXt", b"k\0\0" + inflated(MIB)) * 9)).decode()] * 250}
        ).encode(),
    ),
    "a batch that is not a number": (NPY, lambda: npy(np.full((200, 1, 28, 28), np.nan))),
}
_INFER: dict[str, Callable[[], bytes]] = {
    "data of texts": lambda: infer(NESTED_TEXT),
    "data of long texts": lambda: infer('["' + "a" * 100_000 + '"' + ',"b"' * 783 + "]"),
    "data of zeros": lambda: infer("[" + "0," * 7_900_000 + "0]"),
    "data of two million zeros": lambda: infer("[" + "0," * 2_000_000 + "0]"),
    "data of two million zeros that fit": lambda: infer(
        "[" + "0.5," * 1_959_999 + "0]", (1, 1, 1400, 1400), more=',"parameters":{"resize":true}'
    ),
    "data of lists": lambda: infer("[" + "[]," * 2_000_000 + "0]"),
    "data of rows of one": lambda: infer("[" + "[0]," * 500_000 + "[0]]"),
    "data of objects": lambda: infer("[" + "{}," * 500_000 + "0]"),
    "data of truths": lambda: infer("[" + "true," * 783 + "true]"),
    "data of huge integers": lambda: infer("[" + ("1" * 4000 + ",") * 3000 + "1]"),
    "a shape of a million": lambda: infer("[0]", [1] * 1_000_000),
    "a shape beyond every machine": lambda: infer("[0]", (1, 1, 2**62, 2**62)),
    "outputs": lambda: infer("[0]", more=',"outputs":[' + '{"name":"logits"},' * 190 + '{"name":"logits"}]'),
    "190 KB of outputs": lambda: infer("[0]", more=',"outputs":[' + '{"name":"logits"},' * 9000 + '{"name":"x"}]'),
    "parameters": lambda: infer("[0]", more=',"parameters":{' + ",".join(f'"p{n}":1' for n in range(100_000)) + "}"),
    "an id of 15 MB": lambda: infer("[" + "0," * 783 + "0]", more=',"id":"' + "i" * 15 * MIB + '"'),
}


def in_bytes(size: int, shape: Sequence[int] = (1, 1, 28, 28), more: str = "") -> bytes:
    """The JSON object of a request whose tensor of `size` bytes follows it."""
    parameters = f'{{"binary_data_size":{size}{more}}}'
    tensor = f'{{"name":"image","shape":{list(shape)},"datatype":"FP64","parameters":{parameters}}}'
    return f'{{"inputs":[{tensor}]}}'.encode()


def zipped(size: int) -> bytes:
    """A gzip stream of some kilobytes that has `size` bytes, whole mebibytes."""
    packer, crc = zlib.compressobj(9, wbits=-15), 0
    # After a full flush nothing refers to earlier bytes: the same piece can follow itself.
    piece = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(size // MIB):
        crc = zlib.crc32(bytes(MIB), crc)
    head = b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"
    return head + piece * (size // MIB) + packer.flush() + struct.pack("<LL", crc, size)


def blocks(literals: int) -> bytes:
    """A zlib stream of the length of a body, of blocks with a code of their own and `literals` bytes."""
    bits = "0" + "01" + "00000" + "00000" + "0111"
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    bits += "".join("100" if symbol in (1, 18) else "000" for symbol in order)
    # 255 lengths of zero (138 and 117), and three of one.
    bits += "1" + f"{127:07b}"[::-1] + "1" + f"{106:07b}"[::-1] + "000" + "0" * literals + "1"
    eight = bits * 8
    packed = int(eight[::-1], 2).to_bytes(len(eight) // 8, "little")
    return b"\x78\x9c" + packed * (15 * MIB // len(packed))


_TENSORS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a tensor beyond every machine": (lambda: in_bytes(2**62, (1, 1, 2**31 - 1, 2**31 - 1)).ljust(200), "200"),
    "a tensor that is not a number": (
        lambda: in_bytes(8 * 256 * 784, (256, 1, 28, 28)).ljust(200) + b"\xff" * 8 * 256 * 784,
        "200",
    ),
    "15 MB of a tensor that are not declared": (lambda: in_bytes(6272).ljust(200) + bytes(15 * MIB), "200"),
    "an object of 15 MB before a tensor": (lambda: in_bytes(8).ljust(15 * MIB) + bytes(8), str(15 * MIB)),
    "a parameter of 15 MB": (lambda: in_bytes(8, more=',"x":"' + "x" * 15 * MIB + '"'), str(15 * MIB)),
    "a parameter of lists": (lambda: in_bytes(8, more=',"x":' + "[" * 200 + "]" * 200).ljust(8000), "8000"),
    "names of a megabyte": (
        lambda: infer("[0]", more=',"outputs":[' + ",".join(['{"name":"' + "n" * MIB + '"}'] * 10) + "]").ljust(
            11 * MIB
        ),
        str(11 * MIB),
    ),
    "a length of 4,000 digits": (lambda: in_bytes(6272) + bytes(6272), "9" * 4000),
}
_INSTANCES: dict[str, Callable[[], bytes]] = {
    "instances of zeros": lambda: b'{"instances":[' + b"0," * 1_900_000 + b"0]}",
    "instances of one number": lambda: b'{"instances":[' + b"[[[0]]]," * 250 + b"[[[0]]]]}",
    "an instance of pixels of one": lambda: b'{"instances":[[' + b"[[0]]," * 1_900_000 + b"[[0]]]]}",
    "instances of lists of none": lambda: b'{"instances":[' + b"[]," * 2_000_000 + b"[]]}",
    "instances in instances": lambda: b'{"instances":' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}",
    "instances of texts": lambda: b'{"instances":' + NESTED_TEXT.encode() + b"}",
    "instances of files of a megabyte": lambda: json.dumps(
        {
            "instances": [{"b64": base64.b64encode(png(28, 28, chunk(b"zTXt", b"k\0\0" + inflated(MIB)) * 9)).decode()}]
            * 250
        }
    ).encode(),
    "names of an instance": lambda: b'{"instances":[{' + b",".join(b'"n%d":1' % n for n in range(200_000)) + b"}]}",
}
_ZIPPED: dict[str, tuple[str, str, Callable[[], bytes], str]] = {
    "a gzip bomb": ("/predict", "image/png", lambda: zipped(1024 * MIB), "gzip"),
    "a gzip bomb of JSON": (INFER, JSON, lambda: zipped(1024 * MIB), "gzip"),
    "a gzip stream of the limit": ("/predict", "image/png", lambda: zipped(15 * MIB), "gzip"),
    "gzip of noise": ("/predict", "image/png", lambda: gzip.compress(np.random.default_rng(1).bytes(15 * MIB)), "gzip"),
    "deflate of empty blocks": ("/predict", NPY, lambda: b"\x78\x9c" + b"\0\0\0\xff\xff" * 3_000_000, "deflate"),
    "deflate of codes": (PREDICT_V1, JSON, lambda: blocks(0), "deflate"),
    "deflate of codes and a few bytes": (PREDICT_V1, JSON, lambda: blocks(16), "deflate"),
    "gzip of zeros in JSON": (INFER, JSON, lambda: gzip.compress(infer("[" + "0," * 7_900_000 + "0]")), "gzip"),
}
COSTLY: dict[str, Costly] = {
    **{
        name: Costly("/predict" + ("?" + kind.partition("?")[2] if "?" in kind else ""), kind.partition("?")[0], body)
        for name, (kind, body) in _PREDICT.items()
    },
    **{name: Costly("/predict/batch", kind, body) for name, (kind, body) in _BATCH.items()},
    **{name: Costly(INFER, JSON, body) for name, body in _INFER.items()},
    **{
        name: Costly(INFER, JSON, body, {"Inference-Header-Content-Length": length})
        for name, (body, length) in _TENSORS.items()
    },
    **{name: Costly(PREDICT_V1, JSON, body) for name, body in _INSTANCES.items()},
    **{
        name: Costly(path, kind, body, {"Content-Encoding": coding})
        for name, (path, kind, body, coding) in _ZIPPED.items()
    },
}
