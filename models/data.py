"""MNIST from its four idx files, checked against the published checksums, and a small affine augmentation.

The files are looked for in DIR and in DIR/mnist, raw or gzip-compressed; where they are missing they are
downloaded to DIR/mnist. What counts is the md5 of the uncompressed content, so a repacked archive is fine and
a wrong one is refused. The data is by LeCun, Cortes and Burges, licence CC BY-SA 3.0.

Axes: N images, H height, W width.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

log = logging.getLogger(__name__)

MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""File name -> md5 of its uncompressed content."""

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
"""Public addresses that hold `<name>.gz`, tried in order."""

MNIST_CARD = {
    "name": "MNIST",
    "source": "LeCun, Cortes, Burges: The MNIST database of handwritten digits",
    "licence": "CC BY-SA 3.0",
    "md5": MNIST_MD5,
}

DOWNLOAD_RETRIES = 2
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801


class DataError(Exception):
    """The data set cannot be used; the message says what to do."""


@dataclass(frozen=True)
class LabelledImages:
    """Images as their 8-bit pixels, and class numbers."""

    images_NHW: UInt8[Tensor, "N H W"]
    labels_N: Int64[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.labels_N)

    def pixels(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N 1 H W"]:
        """Pixels divided by 255, with a channel axis."""
        return self.images_NHW[:, None].to(dtype) / 255

    def only(self, digits: Sequence[int]) -> LabelledImages:
        """Keep the given classes and number them in the given order."""
        renumbered = torch.full_like(self.labels_N, -1)
        for number, digit in enumerate(digits):
            renumbered[self.labels_N == digit] = number
        kept = renumbered >= 0
        return LabelledImages(self.images_NHW[kept], renumbered[kept])


def load_mnist(
    directory: Path,
    *,
    md5: dict[str, str] = MNIST_MD5,
    mirrors: Sequence[str] = MNIST_MIRRORS,
) -> tuple[LabelledImages, LabelledImages]:
    """Read the training and the test set, downloading files that are missing.

    Args:
        directory: holds the four idx files, raw or `.gz`, directly or in its folder `mnist`.
        md5: expected checksum of each file's uncompressed content.
        mirrors: addresses to download from.

    Raises:
        DataError: a file is missing and cannot be downloaded, has the wrong content, or is no idx file.
    """
    content = {name: _checked(directory, name, md5[name], mirrors) for name in md5}
    train_images, train_labels, test_images, test_labels = content
    return (
        read_labelled_images(content[train_images], content[train_labels], "training set"),
        read_labelled_images(content[test_images], content[test_labels], "test set"),
    )


def read_labelled_images(images: bytes, labels: bytes, what: str) -> LabelledImages:
    """Parse a pair of idx files.

    Raises:
        DataError: wrong magic number, wrong length, or another number of labels than of images.
    """
    images_NHW = _read_idx(images, IMAGES_MAGIC, 3, f"images of the {what}")
    labels_N = _read_idx(labels, LABELS_MAGIC, 1, f"labels of the {what}")
    if len(images_NHW) != len(labels_N):
        raise DataError(
            f"the {what} has {len(images_NHW)} images but {len(labels_N)} labels: "
            "the two files are not of the same set; replace both"
        )
    return LabelledImages(torch.from_numpy(images_NHW), torch.from_numpy(labels_N.astype(np.int64)))


@dataclass(frozen=True)
class Augmentation:
    """Ranges of a random affine map, each drawn uniformly and symmetrically."""

    rotation_degrees: float = 10.0
    scale: float = 0.1
    shear: float = 0.1
    shift_pixels: float = 1.5


def augment(
    image_NCHW: Float[Tensor, "N C H W"], ranges: Augmentation, generator: torch.Generator
) -> Float[Tensor, "N C H W"]:
    """Rotate, scale, shear and shift each image by its own random map; bilinear, zero outside.

    The random numbers come from `generator` alone (on the CPU): equal seeds, equal batches on any device.
    """
    N, _, H, W = image_NCHW.shape
    angle, scale, shear, dx, dy = (2 * torch.rand(5, N, generator=generator) - 1).unbind()
    angle = angle * math.radians(ranges.rotation_degrees)
    scale = 1 + scale * ranges.scale
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    # affine_grid measures in halves of the image: 2 / W is one pixel.
    top = torch.stack([cosine, -sine + shear * ranges.shear, dx * ranges.shift_pixels * 2 / W], dim=1)
    bottom = torch.stack([sine, cosine, dy * ranges.shift_pixels * 2 / H], dim=1)
    theta = torch.stack([top, bottom], dim=1).to(image_NCHW)
    grid = F.affine_grid(theta, list(image_NCHW.shape), align_corners=False)
    return F.grid_sample(image_NCHW, grid, align_corners=False)


def _checked(directory: Path, name: str, md5: str, mirrors: Sequence[str]) -> bytes:
    path = _find(directory, name)
    downloaded = path is None
    if path is None:
        path = _download(directory / "mnist", name, mirrors)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it, it is downloaded again") from error
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != md5:
        if downloaded:
            path.unlink()
        raise DataError(
            f"{path} has md5 {actual} (uncompressed), expected {md5}: it is damaged or another data set; "
            "delete it to have it downloaded again"
        )
    return content


def _find(directory: Path, name: str) -> Path | None:
    candidates = [folder / f"{name}{suffix}" for folder in (directory, directory / "mnist") for suffix in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def _download(folder: Path, name: str, mirrors: Sequence[str]) -> Path:
    failures: list[str] = []
    for mirror in mirrors:
        # The checksum of the uncompressed content is what is published, so it is checked after decompression.
        fetcher = pooch.create(
            path=folder, base_url=mirror, registry={f"{name}.gz": None}, retry_if_failed=DOWNLOAD_RETRIES
        )
        try:
            log.info("downloading %s.gz", name)
            return Path(fetcher.fetch(f"{name}.gz"))
        except Exception as error:  # requests, urllib3 and the socket each raise their own
            failures.append(f"{mirror}: {type(error).__name__}")
    raise DataError(
        f"{name} is neither in {folder.parent} nor in {folder}, and it could not be downloaded "
        f"({'; '.join(failures) or 'no mirror given'}): put {name}.gz there, or connect to the network"
    )


def _read_idx(content: bytes, magic: int, dimensions: int, what: str) -> UInt8[np.ndarray, ...]:
    header = 4 * (1 + dimensions)
    if len(content) < header:
        raise DataError(f"the {what} are {len(content)} bytes, too short for an idx file: replace the file")
    found, *shape = struct.unpack(f">{1 + dimensions}I", content[:header])
    if found != magic:
        raise DataError(f"the {what} start with {found:#x}, an idx file of this kind with {magic:#x}: replace the file")
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"the {what} hold {len(content) - header} bytes, their header promises {math.prod(shape)}: "
            "the file is truncated or damaged; replace it"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
