"""Images of a caller as bodies of requests; numpy and Pillow are used where the caller uses them."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

Image: TypeAlias = "str | os.PathLike[str] | bytes | np.ndarray[Any, np.dtype[Any]] | PIL.Image.Image"
"""Path of an image or npy file, its bytes, an array (uint8, or float in [0, 1]; C x H x W, H x W x C or H x W), or an
image of Pillow."""

NPY = "application/x-npy"
_NPY_MAGIC = b"\x93NUMPY"
_MEDIA_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8": "image/jpeg",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
    b"II": "image/tiff",
    b"MM": "image/tiff",
}


@dataclass(frozen=True)
class Encoded:
    """An image as the body of a request."""

    content: bytes
    """An image file or an npy file."""
    media_type: str

    kind: bytes = b""
    """The header of an npy file, which states shape and type; empty for an image file."""


def encode(image: Image) -> Encoded:
    """Return an image as the body of a request; nothing is decoded or changed.

    Raises:
        OSError: a file cannot be read.
        TypeError: the object is no image.
        ValueError: an image of Pillow is no PNG file, or an array holds objects.
    """
    if isinstance(image, str | os.PathLike):
        return _file(Path(image).read_bytes())
    if isinstance(image, bytes | bytearray | memoryview):
        return _file(bytes(image))
    file = io.BytesIO()
    if "numpy" in sys.modules:
        import numpy as np

        if isinstance(image, np.ndarray):
            np.save(file, image, allow_pickle=False)
            return _file(file.getvalue())
    if "PIL.Image" in sys.modules:
        import PIL.Image

        if isinstance(image, PIL.Image.Image):
            try:
                image.save(file, "PNG")
            except OSError as error:
                raise ValueError(f"an image of mode {image.mode} cannot be sent: convert it to L or RGB") from error
            return _file(file.getvalue())
    raise TypeError(f"an image is a path, bytes, a numpy array or an image of Pillow, not {type(image).__name__}")


def stacked(images: list[Encoded]) -> bytes:
    """Return arrays of one shape and type as one npy file with a leading batch axis."""
    import numpy as np

    file = io.BytesIO()
    np.save(file, np.stack([np.load(io.BytesIO(image.content)) for image in images]), allow_pickle=False)
    return file.getvalue()


def _file(content: bytes) -> Encoded:
    if content.startswith(_NPY_MAGIC):
        return Encoded(content, NPY, content[: content.find(b"\n") + 1])
    # The service reads the bytes; the media type is for those between.
    return Encoded(
        content, next((kind for magic, kind in _MEDIA_TYPES.items() if content.startswith(magic)), "image/gif")
    )
