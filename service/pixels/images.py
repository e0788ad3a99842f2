"""Bytes to pixels, and back; what cannot be read without loss is refused here.

The promise of the service is about decoded pixels, so an encoded image has to have one reading only: 8-bit
grey or RGB values, as stored. Nothing is guessed: no alpha blending, no bit depth reduction. What loses nothing is
done: palettes are looked up, 1-, 2- and 4-bit grey is scaled to its exact 8-bit value, and EXIF orientation is
applied. Colour profiles and gamma chunks do not change the values.

How the file stores its pixels decides its channels, never their values and never the model: a grey file (Pillow's
modes `1` and `L`) is 1 channel, an RGB file (mode `RGB`, to which YCbCr decodes) is 3, even if R = G = B everywhere. A
palette (mode `P`) is 1 channel if all of its colours are grey, whether pixels use them or not, else 3. Where the model
takes the other, `service.pixels.preprocessing` converts as part of the certified map: the radius is about the
channels that were sent.

Units: uint8 value v is v / 255 in float64. Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from service.errors import (
    Base64Error,
    EmptyBodyError,
    ImageFormatError,
    ImageTooLargeError,
    NotAnImageError,
)
from service.shapes import Float64, UInt8

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Decoders that are used; the others of Pillow are not offered to bytes from outside."""

_SEND = f"send a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
_NPY_MAGIC = b"\x93NUMPY"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HASHED_AT_ONCE = 64 * 1024
_PNG_LENGTH = struct.Struct(">I")
_GREY_MODES = frozenset({"1", "L"})
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})


def to_unit(
    pixels: UInt8[np.ndarray, "*shape"],
) -> Float64[np.ndarray, "*shape"]:
    """Pixel values 0..255 as float64 in [0, 1], each `v / 255` correctly rounded."""
    return np.divide(pixels, 255.0, dtype=np.float64)


def image_digest(image_CHW: Float64[np.ndarray, "C H W"]) -> str:
    """`sha256:<hex>` of an image with pixels in [0, 1]: what an answer that is kept calls its image.

    Hashed are the ASCII line `CxHxW`, one newline, and the pixels as little-endian float64 in C order; the same
    values give the same digest, whatever file or array they came in.
    """
    channels, height, width = image_CHW.shape
    digest = hashlib.sha256(f"{channels}x{height}x{width}\n".encode("ascii"))
    pixels = np.ascontiguousarray(image_CHW, dtype="<f8").data.cast("B")
    if len(pixels) > _HASHED_AT_ONCE:
        digest.update(pixels)
    else:
        # hashlib lets other threads run while it hashes more than 2047 bytes, and waits for its turn afterwards: for a
        # small image that takes longer than hashing it.
        for start in range(0, len(pixels), 2047):
            digest.update(pixels[start : start + 2047])
    return f"sha256:{digest.hexdigest()}"


def encode_png(pixels_CHW: UInt8[np.ndarray, "C H W"]) -> bytes:
    """PNG file of a grey (C = 1) or RGB (C = 3) image; decoding it gives the same values back."""
    picture = pixels_CHW[0] if pixels_CHW.shape[0] == 1 else np.moveaxis(pixels_CHW, 0, -1)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, format="PNG")
    return file.getvalue()


def decode_base64(text: str) -> bytes:
    """Bytes of standard base64 (RFC 4648 section 4: one line, padded, no `data:` prefix).

    Raises:
        EmptyBodyError: the text is empty.
        Base64Error: the text is anything else than base64; the message says what is wrong with it.
    """
    if not text:
        raise EmptyBodyError(f"the image is an empty string; {_SEND}, encoded as base64")
    expected = "expected the bytes of an image file as standard base64 (RFC 4648: A-Z a-z 0-9 + /, padded with =)"
    if text[:5].lower() == "data:":
        raise Base64Error(f"{expected}; this is a data: URI, send only what comes after its comma")
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        pass
    if any(character.isspace() for character in text):
        raise Base64Error(f"{expected}; this has white space in it, send it as one line (base64 -w0 FILE)")
    if "-" in text or "_" in text:
        raise Base64Error(f"{expected}; this is the URL-safe alphabet, replace - by + and _ by /")
    raise Base64Error(f"{expected}; this is not base64 or is cut short")


def decode_image(data: bytes, max_pixels: int, used_pixels: int = 0) -> UInt8[np.ndarray, "C H W"]:
    """Pixels of an encoded image: 1 channel (grey) or 3 (RGB), as the file stores them.

    Args:
        data: a file in one of `FORMATS`; the bytes decide, not a name or media type.
        max_pixels: refuse images with more pixels than this, before they are decoded.
        used_pixels: what other images of the same request have taken of it.

    Raises:
        EmptyBodyError: there are no bytes.
        NotAnImageError: no decoder recognises the bytes, or they are truncated or damaged.
        ImageTooLargeError: more than `max_pixels`.
        ImageFormatError: alpha, 16 bits, CMYK, or several frames.
    """
    picture = _open(data, max_pixels, used_pixels)
    _refuse_lossy(picture)
    picture = _load(picture, data)
    if picture.mode in _GREY_MODES:
        grey = picture if picture.mode == "L" else picture.convert("L")
        return np.frombuffer(grey.tobytes(), np.uint8).reshape(1, grey.height, grey.width)
    channels = 1 if picture.mode == "P" and _has_grey_palette(picture) else 3
    return np.ascontiguousarray(np.moveaxis(np.asarray(picture.convert("RGB"))[..., :channels], -1, 0))


def _has_grey_palette(picture: Image.Image) -> bool:
    red_P, green_P, blue_P = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3).T
    return np.array_equal(red_P, green_P) and np.array_equal(red_P, blue_P)


def _open(data: bytes, max_pixels: int, used_pixels: int) -> Image.Image:
    """Read the header only, and hold it against the limit: a small file can declare a huge picture."""
    if not data:
        raise EmptyBodyError(f"the image is empty; {_SEND}")
    if data.startswith(_NPY_MAGIC):
        raise NotAnImageError(
            "this is a numpy array, not an image file; send it as the body of a request with Content-Type "
            "application/x-npy"
        )
    try:
        if data.startswith(_PNG_SIGNATURE):
            # What `Image.open` would find out, in two thirds of the time.
            picture = PngImageFile(io.BytesIO(data))
        else:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLargeError("its header declares a huge picture", max_pixels) from None
    except Exception:
        # Decoders meet hostile bytes with many types of error: OSError, SyntaxError, struct.error,
        # KeyError...
        raise NotAnImageError(
            f"the bytes are not an image that this server reads ({', '.join(FORMATS)}), or its header is "
            f"damaged; {_SEND}"
        ) from None
    pixels = picture.width * picture.height
    if pixels + used_pixels > max_pixels:
        before = f" after {used_pixels} of the images before it" if used_pixels else ""
        raise ImageTooLargeError(f"it is {picture.width} x {picture.height} = {pixels} pixels{before}", max_pixels)
    return picture


def _refuse_lossy(picture: Image.Image) -> None:
    """Refuse from the header what has no single reading as 8-bit grey or RGB."""
    if getattr(picture, "is_animated", False):
        raise ImageFormatError("the file holds several pictures (an animation or a burst); send one of them")
    if picture.mode in _ALPHA_MODES or picture.has_transparency_data:
        raise ImageFormatError(
            "the image has transparency (an alpha channel or a transparent colour), and what lies behind it "
            "is not known; flatten it onto a background first and send it without alpha"
        )
    if picture.mode == "CMYK":
        raise ImageFormatError(
            "the image is CMYK, and turning it into RGB or grey needs a colour profile; convert it first and "
            "send RGB or grey"
        )
    # Pillow reduces 16-bit RGB and 5-bit BMP to 8 bits in silence; only the raw mode of the tile tells.
    raw_modes = [str(tile[3]) for tile in getattr(picture, "tile", [])]
    deep = picture.mode.startswith(("I", "F")) or any(";16" in raw or ";15" in raw for raw in raw_modes)
    if deep:
        raise ImageFormatError(
            "the image does not have 8 bits per channel, so it would lose precision here; save it with 8 "
            "bits per channel, or send the values in [0, 1] as a float npy array (application/x-npy)"
        )
    if picture.mode not in (*_GREY_MODES, "P", "RGB"):
        raise ImageFormatError(f"the image has mode {picture.mode}; send 8-bit grey or RGB")


def _load(picture: Image.Image, data: bytes) -> Image.Image:
    """Decode every pixel; a file that ends early is refused even where all its pixels could be guessed."""
    try:
        if picture.format == "PNG":
            _check_png(data)
        if picture.format == "GIF" and not data.rstrip(b"\0").endswith(b";"):
            raise EOFError("no GIF trailer")
        picture.load()
        # An orientation is metadata; looking for it takes as long as decoding a small image.
        return ImageOps.exif_transpose(picture) if picture.info else picture
    except Exception:
        # See _open: the decoders' errors have no common type.
        raise NotAnImageError(
            f"the {picture.format} file is truncated or damaged, not every pixel can be read; send the whole file"
        ) from None


def _check_png(data: bytes) -> None:
    """Raise unless the chunks of a PNG file are whole, checksums included, up to IEND: decoding stops at the last row.

    The layout is that of the PNG specification (third edition, section 5): 8 bytes of signature, then chunks of length,
    type (four letters), data and CRC-32 of type and data; IEND has no data.
    """
    view = memoryview(data)
    start = 8
    while True:
        (length,) = _PNG_LENGTH.unpack_from(view, start)
        end = start + 8 + length
        if zlib.crc32(view[start + 4 : end]) != _PNG_LENGTH.unpack_from(view, end)[0]:
            raise ValueError(f"the checksum of the chunk at byte {start} does not match")
        kind = view[start + 4 : start + 8].tobytes()
        if not kind.isalpha():
            raise ValueError(f"the chunk at byte {start} has a type that is not four letters")
        if kind == b"IEND":
            if length:
                raise ValueError("the last chunk is not empty")
            return
        start = end + 4
