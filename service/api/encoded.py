"""Images of requests, still encoded: files, base64 text and npy arrays, and how each of them is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.errors import BatchTooLargeError, ChannelsError, ImageSizeError, InputError, MixedSizesError
from service.pixels.arrays import decode_array, decode_array_batch
from service.pixels.images import Pixels, decode_base64, decode_image, decode_plain, unit
from service.shapes import Float64, UInt8


@dataclass(frozen=True)
class EncodedImage:
    """An image file, or its base64 text."""

    data: bytes | str

    def decode_plain(self, input_shape_CHW: tuple[int, int, int], max_pixels: int) -> UInt8[np.ndarray, "C H W"] | None:
        """Return the result of `decode` for a small PNG file; null for any other file, see `service.pixels.images`.

        Args:
            input_shape_CHW: the images that the model accepts.
            max_pixels: limit of the number of pixels.

        Raises:
            ChannelsError, Base64Error, EmptyBodyError
        """
        return decode_plain(self._bytes(input_shape_CHW[0]), max_pixels)

    def decode(
        self,
        input_shape_CHW: tuple[int, int, int],
        max_pixels: int,
        resize: bool,
        background: str | None = None,
        used_pixels: int = 0,
    ) -> Pixels:
        """Return pixels in 0..255, or of a 16-bit file in [0, 1], with the channels of the file.

        Args:
            input_shape_CHW: the images that the model accepts.
            max_pixels: limit of all images of the request together.
            resize: whether the image may have another size than the model's.
            background: colour behind a transparent image, if there is one.
            used_pixels: pixels of the images that were decoded before.

        Raises:
            ChannelsError: the model accepts neither grey nor RGB images.
            InputError: see `service.pixels.images`.
        """
        data = self._bytes(input_shape_CHW[0])
        return decode_image(data, max_pixels, used_pixels, None if resize else input_shape_CHW[1:], background)

    def _bytes(self, channels: int) -> bytes:
        if channels not in (1, 3):
            raise ChannelsError(
                f"the model takes {channels} channels and image files have 1 or 3; send a npy array of shape "
                f"({channels}, H, W) as application/x-npy"
            )
        return decode_base64(self.data) if isinstance(self.data, str) else self.data


@dataclass(frozen=True)
class ArrayImage:
    """An npy file; it must have the model's channels, because its shape alone does not tell grey from RGB."""

    data: bytes

    def decode(
        self, input_shape_CHW: tuple[int, int, int], max_pixels: int, resize: bool, background: str | None = None
    ) -> Float64[np.ndarray, "C H W"]:
        """Return pixels in [0, 1].

        Args:
            input_shape_CHW: the images that the model accepts.
            max_pixels: limit of the number of pixels.
            resize: ignored: the classifier checks the size.
            background: ignored: an array has no transparency.

        Raises:
            InputError: see `service.pixels.arrays`.
        """
        del resize, background
        return decode_array(self.data, input_shape_CHW, max_pixels)


@dataclass(frozen=True)
class EncodedBatch:
    """Image files in base64."""

    texts: tuple[str, ...]

    def decode(
        self,
        input_shape_CHW: tuple[int, int, int],
        max_pixels: int,
        max_batch: int,
        resize: bool,
        background: str | None = None,
    ) -> UInt8[np.ndarray, "N C H W"] | Float64[np.ndarray, "N C H W"]:
        """Return pixels in 0..255, or in [0, 1] where a file has 16 bits.

        Args:
            input_shape_CHW: the images that the model accepts.
            max_pixels: limit of all images together.
            max_batch: limit of the number of images.
            resize: whether the images may have another size than the model's.
            background: colour behind transparent images, if there is one.

        Raises:
            BatchTooLargeError: more than `max_batch` images.
            InputError: an image is refused; the message names its index, from 0.
        """
        if len(self.texts) > max_batch:
            raise BatchTooLargeError(len(self.texts), max_batch)
        images: list[np.ndarray] = []
        used = 0
        for index, text in enumerate(self.texts):
            try:
                image = EncodedImage(text).decode(input_shape_CHW, max_pixels, resize, background, used)
                if not resize and image.shape[1:] != input_shape_CHW[1:]:
                    raise ImageSizeError(image.shape[1], image.shape[2], *input_shape_CHW[1:])
                if images and image.shape[1:] != images[0].shape[1:]:
                    raise MixedSizesError(image.shape[1:], images[0].shape[1:])
                if images and image.shape[0] != images[0].shape[0]:
                    raise ChannelsError(
                        f"this image is {_colours(image)} and the first image is {_colours(images[0])}; the images of "
                        "a batch must be all grey or all RGB, send the others separately"
                    )
            except InputError as error:
                raise error.at_index(index) from None
            images.append(image)
            used += image[0].size
        return np.stack(images if len({image.dtype for image in images}) == 1 else [unit(image) for image in images])


def _colours(image_CHW: np.ndarray) -> str:
    return "grey" if len(image_CHW) == 1 else "RGB"


@dataclass(frozen=True)
class ArrayBatch:
    """An npy file with a leading batch axis."""

    data: bytes

    def decode(
        self,
        input_shape_CHW: tuple[int, int, int],
        max_pixels: int,
        max_batch: int,
        resize: bool,
        background: str | None = None,
    ) -> Float64[np.ndarray, "N C H W"]:
        """Return pixels in [0, 1].

        Args:
            input_shape_CHW: the images that the model accepts.
            max_pixels: limit of all images together.
            max_batch: limit of the number of images.
            resize: ignored: the classifier checks the size.
            background: ignored: an array has no transparency.

        Raises:
            InputError: see `service.pixels.arrays`.
        """
        del resize, background
        return decode_array_batch(self.data, input_shape_CHW, max_pixels, max_batch)
