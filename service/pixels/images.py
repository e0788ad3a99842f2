"""Decoding of image files to pixels, and encoding; images that cannot be read losslessly are refused.

The certificate refers to decoded pixels, so an encoded image must have a single interpretation: 8- or 16-bit grey or
RGB values, as stored. There is no reduction of bit depth. Lossless steps are applied: palettes are looked up, 1-, 2-
and 4-bit grey is scaled to its exact 8-bit value, and EXIF orientation is applied. Colour profiles and gamma chunks do
not change the values.

Transparency has a meaning over a background alone, which the caller names: a sample v with alpha a over the background
b is `(a v + (m - a) b) / m`, rounded to the nearest integer (no tie is possible, since m is odd), where m is 255, or
65535 for 16 bits, and b in 16 bits is 257 times its 8-bit value. Alpha that is m everywhere is dropped.

The storage format of the file determines its channels, never their values and never the model: a grey file (Pillow's
modes `1` and `L`) has 1 channel, an RGB file (mode `RGB`, to which YCbCr decodes) has 3, even if R = G = B everywhere.
A palette (mode `P`) has 1 channel if all of its colours are grey, whether pixels use them or not, else 3. Where the
model takes the other number, `service.pixels.preprocessing` converts as part of the certified map: the radius refers to
the channels that were sent.

Units: uint8 value v is v / 255 in float64, and a 16-bit value v / 65535. Axes: N images, C channels, H height, W width,
S samples of a pixel, the last of which may be alpha.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from service.errors import (
    Base64Error,
    EmptyBodyError,
    ImageFormatError,
    ImageSizeError,
    ImageTooLargeError,
    InputError,
    NotAnImageError,
)
from service.pixels.heif import HeifPicture, is_heif, open_heif
from service.pixels.integrity import check_bmp, check_gif, check_jpeg, check_png, with_other_padding
from service.pixels.structure import check_structure, webp_size
from service.pixels.tiff import TiffHeader, is_tiff, read_header, read_pixels
from service.shapes import Float64, UInt8, UInt16

_DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""The enabled decoders; the other decoders of Pillow are not exposed to untrusted bytes."""
FORMATS = (*_DECODERS, "TIFF")
"""The formats of image files."""
_SEND = f"send a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
_NPY_MAGIC = b"\x93NUMPY"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_START = _PNG_SIGNATURE + b"\0\0\0\rIHDR"
_PNG_SIZE = struct.Struct(">II")
# Depth, colour type, compression, filter and interlacing of a PNG header, and Pillow's mode.
_PLAIN_PNG = {b"\x08\0\0\0\0": "L", b"\x08\2\0\0\0": "RGB"}
# Pillow decodes as many bytes at a time.
_PLAIN_BYTES = 64 * 1024
PLAIN_PIXELS = 4096
"""Pixels up to which a plain PNG file is decoded in the process of the server, in at most 0.2 ms."""
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_WHITE_SPACE = re.compile(r"\s")
_HASHED_AT_ONCE = 64 * 1024
_GREY_MODES = frozenset({"1", "L"})
_READ_MODES = _GREY_MODES | {"P", "RGB", "LA", "RGBA"}
_DEEP_MODES = frozenset({"I;16B", "RGB;16B", "LA;16B", "RGBA;16B"})
"""Raw modes of 16-bit PNG files."""
Pixels = UInt8[np.ndarray, "C H W"] | Float64[np.ndarray, "C H W"]
"""Values 0..255 of an 8-bit image, or 16-bit values in [0, 1]."""


def to_unit(
    pixels: UInt8[np.ndarray, "*shape"],
) -> Float64[np.ndarray, "*shape"]:
    """Return pixel values 0..255 as float64 in [0, 1], each `v / 255` correctly rounded."""
    return np.divide(pixels, 255.0, dtype=np.float64)


def unit(pixels: np.ndarray) -> Float64[np.ndarray, "*shape"]:
    """Return pixels in [0, 1] of an array that is 8-bit or in [0, 1]."""
    return to_unit(pixels) if pixels.dtype == np.uint8 else pixels


def unit_images(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays of images, 8-bit or in [0, 1], as one array in [0, 1]; 8-bit arrays are converted together."""
    if len(pixels) == 1:
        return unit(pixels[0])
    if all(pixels_NCHW.dtype == np.uint8 for pixels_NCHW in pixels):
        # numpy releases the GIL for each array of more than 500 values that it copies, and then waits for it; joining
        # bytes does not.
        joined = b"".join([np.ascontiguousarray(pixels_NCHW).data for pixels_NCHW in pixels])
        return to_unit(np.frombuffer(joined, np.uint8).reshape(-1, *pixels[0].shape[1:]))
    return np.concatenate([unit(one) for one in pixels])


def image_digest(image_CHW: Float64[np.ndarray, "C H W"]) -> str:
    """Return `sha256:<hex>` of an image with pixels in [0, 1], which identifies the image of an archived answer.

    The hash covers the ASCII line `CxHxW`, one newline, and the pixels as little-endian float64 in C order; equal
    values have equal digests, independent of the file or array that contained them.
    """
    channels, height, width = image_CHW.shape
    digest = hashlib.sha256(f"{channels}x{height}x{width}\n".encode("ascii"))
    pixels = np.ascontiguousarray(image_CHW, dtype="<f8").data.cast("B")
    if len(pixels) > _HASHED_AT_ONCE:
        digest.update(pixels)
    else:
        # hashlib releases the GIL for more than 2047 bytes and then waits for it: for a small image the wait takes
        # longer than the hash.
        for start in range(0, len(pixels), 2047):
            digest.update(pixels[start : start + 2047])
    return f"sha256:{digest.hexdigest()}"


def image_digests(image_NCHW: Float64[np.ndarray, "N C H W"]) -> list[str]:
    """Return `image_digest` of each image, in less time where no other thread waits for the GIL."""
    begun = hashlib.sha256("{}x{}x{}\n".format(*image_NCHW.shape[1:]).encode("ascii"))
    digests: list[str] = []
    for image_CHW in np.ascontiguousarray(image_NCHW, dtype="<f8"):
        digest = begun.copy()
        digest.update(image_CHW)
        digests.append(f"sha256:{digest.hexdigest()}")
    return digests


def encode_png(pixels_CHW: UInt8[np.ndarray, "C H W"]) -> bytes:
    """Return the PNG file of a grey (C = 1) or RGB (C = 3) image; decoding it returns the same values."""
    picture = pixels_CHW[0] if pixels_CHW.shape[0] == 1 else np.moveaxis(pixels_CHW, 0, -1)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, format="PNG")
    return file.getvalue()


def decode_base64(text: str) -> bytes:
    """Return the bytes of standard base64 (RFC 4648 section 4: one line, padded, no `data:` prefix).

    Raises:
        EmptyBodyError: the text is empty.
        Base64Error: the text is not standard base64; the message states the difference.
    """
    if not text:
        raise EmptyBodyError(f"the image is an empty string; {_SEND}, encoded as base64")
    expected = "expected the bytes of an image file as standard base64 (RFC 4648: A-Z a-z 0-9 + /, padded with =)"
    if text[:5].lower() == "data:":
        raise Base64Error(f"{expected}; this is a data: URI, send only the part after its comma")
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        pass
    if _WHITE_SPACE.search(text):
        raise Base64Error(f"{expected}; this contains white space, send it as one line (base64 -w0 FILE)")
    if "-" in text or "_" in text:
        raise Base64Error(f"{expected}; this is the URL-safe alphabet, replace - by + and _ by /")
    raise Base64Error(f"{expected}; this is not base64 or is truncated")


def decode_image(
    data: bytes,
    max_pixels: int,
    used_pixels: int = 0,
    size_HW: tuple[int, int] | None = None,
    background: str | None = None,
) -> Pixels:
    """Return the pixels of an encoded image: 1 channel (grey) or 3 (RGB), as the file stores them.

    Args:
        data: a file in one of `FORMATS`; the bytes determine the format, not a name or media type.
        max_pixels: limit of the number of pixels, checked before they are decoded.
        used_pixels: pixels of other images of the same request, which count towards the limit.
        size_HW: height and width that the image must have, compared before pixels are decoded; default: any.
        background: colour behind a transparent image, `#rrggbb`; default: such an image is refused.

    Raises:
        EmptyBodyError: `data` is empty.
        NotAnImageError: no decoder recognises the bytes, or they are truncated or damaged.
        ImageTooLargeError: more than `max_pixels`.
        ImageSizeError: the image has another size than `size_HW`.
        ImageFormatError: transparency without a background, another depth, CMYK, several frames, or too many parts.
    """
    most_pixels = max_pixels - used_pixels
    if size_HW is not None:
        most_pixels = min(most_pixels, max(PLAIN_PIXELS, size_HW[0] * size_HW[1]))
    picture = _plain_png(data, most_pixels)
    if picture is not None:
        return _pixels(picture)
    check_structure(data)
    kind = "HEIC" if is_heif(data) else "TIFF"
    try:
        if kind == "HEIC":
            opened = open_heif(data)
        else:
            opened = read_header(data) if is_tiff(data) else _open(data, max_pixels, used_pixels)
        size = opened.size if isinstance(opened, ImageFile.ImageFile) else (opened.width, opened.height)
        _check_pixels(*size, max_pixels, used_pixels)
        # The orientation, which is not known yet, may swap the sides.
        if size_HW is not None and sorted(size_HW) != sorted(size):
            raise ImageSizeError(size[1], size[0], *size_HW)
        if isinstance(opened, TiffHeader):
            samples_SHW = np.moveaxis(read_pixels(data, opened), -1, 0)
            is_transparent = opened.alpha is not None
        elif isinstance(opened, HeifPicture):
            samples_SHW, is_transparent = opened.samples(), opened.has_alpha
        else:
            kind = str(opened.format)
            _refuse_lossy(opened)
            is_transparent = opened.has_transparency_data
            samples_SHW = _load(opened, data)
            if opened.has_transparency_data != is_transparent:
                raise ValueError("the transparent colour is stated behind the pixels")
    except (InputError, MemoryError):
        raise
    except Exception:
        # As in `_open`, the errors of the decoders have no common type.
        raise NotAnImageError(
            f"the {kind} file is truncated or damaged, not every pixel can be read; send the whole file"
        ) from None
    samples_SHW = np.ascontiguousarray(_flattened(samples_SHW, background) if is_transparent else samples_SHW)
    return samples_SHW if samples_SHW.dtype == np.uint8 else np.divide(samples_SHW, 65535.0, dtype=np.float64)


def decode_plain(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "C H W"] | None:
    """Return the result of `decode_image` for a small PNG file as `is_plain` describes it; null for any other file.

    Only zlib, and Pillow's reversal of the filters of a PNG, see the bytes.
    """
    picture = _plain_png(data, min(max_pixels, PLAIN_PIXELS))
    if picture is None:
        return None
    width, height = picture.size
    values = np.frombuffer(picture.tobytes(), np.uint8)
    if picture.mode == "L":
        return values.reshape(1, height, width)
    return np.ascontiguousarray(np.moveaxis(values.reshape(height, width, 3), -1, 0))


def is_plain(data: bytes) -> bool:
    """Return whether the header declares a PNG file of one IDAT chunk, 8-bit grey or RGB, that is small."""
    return _plain_mode(data, PLAIN_PIXELS) is not None


def _pixels(picture: Image.Image) -> UInt8[np.ndarray, "C H W"]:
    if picture.mode in _GREY_MODES:
        grey = picture if picture.mode == "L" else picture.convert("L")
        width, height = grey.size
        return np.frombuffer(grey.tobytes(), np.uint8).reshape(1, height, width)
    channels = 1 if picture.mode == "P" and _has_grey_palette(picture) else 3
    return np.ascontiguousarray(np.moveaxis(np.asarray(picture.convert("RGB"))[..., :channels], -1, 0))


def _samples(picture: Image.Image) -> UInt8[np.ndarray, "S H W"]:
    """Return the values of a transparent image of 8 bits: grey or RGB, and alpha."""
    is_grey = picture.mode in _GREY_MODES or (picture.mode == "P" and _has_grey_palette(picture))
    samples_SHW = np.moveaxis(np.asarray(picture if picture.mode == "LA" else picture.convert("RGBA")), -1, 0)
    return samples_SHW[[0, 3]] if is_grey else samples_SHW


def _deep_samples(picture: ImageFile.ImageFile, data: bytes, raw_mode: str) -> UInt16[np.ndarray, "S H W"]:
    """Return the values of a 16-bit PNG file, of which Pillow gives the upper or the lower bytes."""
    if raw_mode == "I;16B":
        return np.asarray(_upright(picture), np.uint16)[np.newaxis]
    if raw_mode == "LA;16B":
        # As long as four samples of 8 bits.
        samples_HW4 = np.asarray(_upright(_with_raw_mode(picture, "RGBA")))
        return np.moveaxis(np.ascontiguousarray(samples_HW4).view(">u2").astype(np.uint16), -1, 0)
    samples_HWS = np.asarray(_upright(picture)).astype(np.uint16)
    samples_HWS <<= 8
    samples_HWS |= np.asarray(_upright(_with_raw_mode(PngImageFile(io.BytesIO(data)), f"{raw_mode[:-1]}L")))
    return np.moveaxis(samples_HWS, -1, 0)


def _with_raw_mode(picture: ImageFile.ImageFile, raw_mode: str) -> Image.Image:
    picture.tile = [tile._replace(args=raw_mode) for tile in picture.tile]
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    # The orientation is metadata; searching it takes as long as decoding a small image.
    return ImageOps.exif_transpose(picture) if picture.info else picture


def _flattened(samples_SHW: np.ndarray, background: str | None) -> np.ndarray:
    """Return the channels over a background; see the beginning of this module.

    Args:
        samples_SHW: uint8 or uint16, alpha last.
        background: `#rrggbb`, if there is one.

    Raises:
        ImageFormatError: the image is not opaque, and there is no background or it is not grey as the image.
    """
    *channels, alpha_HW = samples_SHW
    most = np.iinfo(alpha_HW.dtype).max
    if (alpha_HW == most).all():
        return samples_SHW[:-1]
    if background is None:
        raise ImageFormatError(
            "the image has transparency (an alpha channel or a transparent colour), and its background is unknown; "
            "name it with background=#rrggbb (in a query %23rrggbb or rrggbb), or flatten it onto a background first "
            "and send it without alpha"
        )
    levels = [level * (most // 255) for level in bytes.fromhex(background.removeprefix("#"))]
    if len(channels) == 1 and len(set(levels)) > 1:
        raise ImageFormatError(
            f"the image is grey and transparent, and the background {background} is not grey; name a grey one such as "
            "#ffffff, or save the image as RGB"
        )
    # The products and their sum are at most most^2, and the type has room for most^2 + most / 2.
    wide = np.uint16 if most == 255 else np.uint32
    alpha_HW = alpha_HW.astype(wide)
    flat_CHW = np.empty((len(channels), *alpha_HW.shape), samples_SHW.dtype)
    for flat_HW, channel_HW, level in zip(flat_CHW, channels, levels[: len(channels)], strict=True):
        flat_HW[...] = (alpha_HW * channel_HW + (most - alpha_HW) * wide(level) + wide(most // 2)) // wide(most)
    return flat_CHW


def _plain_mode(data: bytes, most_pixels: int) -> str | None:
    mode = _PLAIN_PNG.get(data[24:29])
    if mode is None or len(data) > _PLAIN_BYTES or not data.startswith(_PNG_START):
        return None
    width, height = _PNG_SIZE.unpack_from(data, 16)
    is_single = data[37:41] == b"IDAT" and int.from_bytes(data[33:37], "big") == len(data) - 57
    return mode if is_single and 0 < width * height <= most_pixels else None


def _plain_png(data: bytes, most_pixels: int) -> Image.Image | None:
    """Return the image of a small PNG file with the chunks IHDR, one IDAT and IEND, 8-bit grey or RGB, not interlaced.

    The result of `_open` and `_load` in half the time; null for any other file, and for one that they refuse.
    """
    mode = _plain_mode(data, most_pixels)
    if mode is None:
        return None
    try:
        check_png(data)
        return Image.frombytes(mode, _PNG_SIZE.unpack_from(data, 16), data[41:-16], "zip", mode)
    except Exception:
        return None


def _has_grey_palette(picture: Image.Image) -> bool:
    red_P, green_P, blue_P = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3).T
    return np.array_equal(red_P, green_P) and np.array_equal(red_P, blue_P)


def _open(data: bytes, max_pixels: int, used_pixels: int) -> ImageFile.ImageFile:
    """Read the header only; the canvas of a WebP file is checked against the limit before its decoder allocates it."""
    if not data:
        raise EmptyBodyError(f"the image is empty; {_SEND}")
    if data.startswith(_NPY_MAGIC):
        raise NotAnImageError(
            "this is a numpy array, no image file; send it as the body of a request with Content-Type application/x-npy"
        )
    declared = webp_size(data)
    if declared is not None:
        _check_pixels(*declared, max_pixels, used_pixels)
    try:
        if data.startswith(_PNG_SIGNATURE):
            # The result of `Image.open`, in two thirds of the time.
            picture = PngImageFile(io.BytesIO(data))
        elif data.startswith(_JPEG_SIGNATURE):
            # `Image.open` would take a photograph with an embedded preview (CIPA DC-007, MPF) for several images.
            picture = JpegImageFile(io.BytesIO(data))
        else:
            picture = Image.open(io.BytesIO(data), formats=_DECODERS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLargeError("its header declares a huge image", max_pixels) from None
    except MemoryError:
        raise
    except Exception:
        # Decoders raise many types of error on hostile bytes: OSError, SyntaxError, struct.error, KeyError...
        raise NotAnImageError(
            f"the bytes are not an image in a supported format ({', '.join(FORMATS)}), or its header is damaged; "
            f"{_SEND}"
        ) from None
    return picture


def _check_pixels(width: int, height: int, max_pixels: int, used_pixels: int) -> None:
    if width * height + used_pixels > max_pixels:
        # Pillow opens no larger ones.
        needed = width * height + used_pixels
        may_be_set = needed if needed <= (Image.MAX_IMAGE_PIXELS or 0) else None
        before = f" after {used_pixels} pixels of the images before it" if used_pixels else ""
        raise ImageTooLargeError(f"it is {width} x {height} = {width * height} pixels{before}", max_pixels, may_be_set)


def _refuse_lossy(picture: Image.Image) -> None:
    """Refuse, from the header, an image without a single interpretation as 8- or 16-bit grey or RGB."""
    mode = picture.mode
    if getattr(picture, "is_animated", False):
        raise ImageFormatError("the file contains several images (an animation or a burst); send one of them")
    if mode == "CMYK":
        raise ImageFormatError(
            "the image is CMYK, and its conversion to RGB or grey requires a colour profile; convert it first and send "
            "RGB or grey"
        )
    # Pillow silently reduces 16-bit RGB and 5-bit BMP to 8 bits; only the raw mode of the tile shows it.
    raw_mode = _raw_mode(picture)
    is_deep = raw_mode in _DEEP_MODES
    if not is_deep and (mode.startswith(("I", "F")) or ";16" in raw_mode or ";15" in raw_mode):
        raise ImageFormatError(
            "the image does not have 8 bits per channel, or 16 in a PNG or TIFF file, so reading it would lose "
            "precision; save it with 8 bits per channel, or send the values in [0, 1] as a float npy array "
            "(application/x-npy)"
        )
    if not is_deep and mode not in _READ_MODES:
        raise ImageFormatError(f"the image has mode {mode}; send 8-bit grey or RGB")
    key = picture.info.get("transparency")
    # Pillow compares the colour of a PNG file with values that are scaled to 8 bits.
    if key is not None and mode != "P" and (is_deep or raw_mode in ("1", "L;2", "L;4") or np.max(key) > 255):
        raise ImageFormatError(
            "the image has a transparent colour and not 8 bits; flatten it onto a background first and send it without "
            "transparency"
        )


def _raw_mode(picture: Image.Image) -> str:
    return "".join([str(tile[3]) for tile in getattr(picture, "tile", [])])


def _load(picture: ImageFile.ImageFile, data: bytes) -> UInt8[np.ndarray, "S H W"] | UInt16[np.ndarray, "S H W"]:
    """Decode every sample; raise if data is missing, even if all pixels can be decoded."""
    palette: int | None = None
    if picture.format == "PNG":
        palette = check_png(data)
        if (raw_mode := _raw_mode(picture)) in _DEEP_MODES:
            return _deep_samples(picture, data, raw_mode)
    elif picture.format == "JPEG":
        check_jpeg(data)
    elif picture.format == "GIF":
        palette = check_gif(data)
    elif picture.format == "BMP":
        palette = check_bmp(data)
    picture.load()
    # A palette that is a ramp of greys is no palette to Pillow: the pixels are the entries all the same.
    if palette is not None and picture.mode in ("P", "L") and np.asarray(picture).max() >= palette:
        raise ValueError("a pixel has no colour in the palette")
    if picture.format == "WEBP" and (other := with_other_padding(data)) is not None:
        with Image.open(io.BytesIO(other), formats=["WEBP"]) as padded:
            if padded.tobytes() != picture.tobytes():
                raise ValueError("the image data is too short")
    is_transparent = picture.has_transparency_data
    upright = _upright(picture)
    return _samples(upright) if is_transparent else _pixels(upright)
