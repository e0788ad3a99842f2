"""The published data sets MNIST, Fashion-MNIST and CIFAR-10, verified by their checksums.

The files of a set are searched in DIR/<set> and in DIR; missing files are downloaded to DIR/<set>. The sha256 of the
uncompressed content is compared, so a repacked archive is accepted and a wrong one is refused.

Axes: N images, C channels (1 grey, 3 RGB), H height, W width.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import math
import pickle
import struct
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import torch
from jaxtyping import UInt8

from models.data.labelled import DataError, LabelledImages

log = logging.getLogger(__name__)

DOWNLOAD_RETRIES = 2
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801


@dataclass(frozen=True)
class Published:
    """A published data set: its files, checksums and addresses."""

    folder: str
    """Folder in DIR for its files."""
    labels: tuple[str, ...]
    sha256: dict[str, str]
    """File name -> sha256 of its uncompressed content."""
    mirrors: tuple[str, ...]
    """Public addresses, tried in order."""
    name: str
    source: str
    licence: str

    @property
    def card(self) -> dict[str, Any]:
        """The description of the data set in the card of an artefact."""
        return {"name": self.name, "source": self.source, "licence": self.licence, "sha256": self.sha256}


MNIST = Published(
    folder="mnist",
    labels=tuple("0123456789"),
    sha256={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    name="MNIST",
    source="LeCun, Cortes, Burges: The MNIST database of handwritten digits",
    licence="CC BY-SA 3.0",
)

FASHION_MNIST = Published(
    folder="fashion-mnist",
    labels=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    sha256={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    name="Fashion-MNIST",
    source="Xiao, Rasul, Vollgraf: Fashion-MNIST, a novel image dataset for benchmarking machine learning algorithms",
    licence="MIT",
)

CIFAR10 = Published(
    folder="cifar-10-batches-py",
    labels=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    sha256={
        "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
        "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
        "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
        "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
        "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
        "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
    },
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    name="CIFAR-10",
    source="Krizhevsky: Learning multiple layers of features from tiny images, 2009",
    licence="none stated; published for research",
)
CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"

_IDX_SETS = (MNIST, FASHION_MNIST)


def load_mnist(directory: Path) -> tuple[LabelledImages, LabelledImages]:
    """Return the training and the test set of MNIST, see `load_idx`."""
    return load_idx(directory, MNIST)


def load_idx(directory: Path, published: Published) -> tuple[LabelledImages, LabelledImages]:
    """Return training and test set from four idx files, raw or `.gz`; missing files are downloaded.

    Raises:
        DataError: a file is missing and cannot be downloaded, has the wrong content, or is no idx file.
    """
    content = {name: _checked_idx(directory, name, published) for name in published.sha256}
    train_images, train_labels, test_images, test_labels = content
    return (
        read_labelled_images(content[train_images], content[train_labels], "training set"),
        read_labelled_images(content[test_images], content[test_labels], "test set"),
    )


def load_cifar10(directory: Path, published: Published = CIFAR10) -> tuple[LabelledImages, LabelledImages]:
    """Return training and test set from the Python version, unpacked or archived; a missing archive is downloaded.

    Raises:
        DataError: the archive cannot be downloaded, or a file is missing or has the wrong content.
    """
    content = _cifar10_content(directory, published)
    for name, expected in published.sha256.items():
        actual = _sha256(content[name])
        if actual != expected:
            raise DataError(
                f"{directory}: {published.folder}/{name} has sha256 {actual}, expected {expected}: it is damaged or "
                f"another data set; delete {published.folder} and {CIFAR10_ARCHIVE} to have them downloaded again"
            )
    *train, test = (_read_cifar10(content[name]) for name in published.sha256)
    return (
        LabelledImages(torch.cat([t.images_NCHW for t in train]), torch.cat([t.labels_N for t in train])),
        test,
    )


def read_labelled_images(images: bytes, labels: bytes, name: str) -> LabelledImages:
    """Return the images of a pair of idx files.

    Args:
        images: content of the file of images.
        labels: content of the file of labels.
        name: of the pair, for messages.

    Raises:
        DataError: wrong magic number, wrong length, or another number of labels than of images.
    """
    images_NHW = _read_idx(images, IMAGES_MAGIC, 3, f"images of the {name}")
    labels_N = _read_idx(labels, LABELS_MAGIC, 1, f"labels of the {name}")
    if len(images_NHW) != len(labels_N):
        raise DataError(
            f"the {name} has {len(images_NHW)} images but {len(labels_N)} labels: "
            "the two files are not of the same set; replace both"
        )
    return LabelledImages(torch.from_numpy(images_NHW)[:, None], torch.from_numpy(labels_N.astype(np.int64)))


def _checked_idx(directory: Path, name: str, published: Published) -> bytes:
    """Return the first file with the right checksum; a file of the same name that belongs to another set is skipped."""
    expected = published.sha256[name]
    sisters = {other.sha256[name] for other in _IDX_SETS if name in other.sha256} - {expected}
    for path in _candidates(directory, published.folder, name):
        content = _read(path)
        actual = _sha256(content)
        if actual == expected:
            return content
        if actual not in sisters:
            raise DataError(
                f"{path} has sha256 {actual} (uncompressed), expected {expected}: it is damaged or another data set; "
                "delete it to have it downloaded again"
            )
    path = _download(directory / published.folder, f"{name}.gz", published.mirrors)
    try:
        content = _read(path)
    except DataError:
        path.unlink()
        raise
    actual = _sha256(content)
    if actual != expected:
        path.unlink()
        raise DataError(
            f"the file downloaded as {path} has sha256 {actual} (uncompressed), expected {expected}, and was removed: "
            "run the command again, or put the right file there"
        )
    return content


def _candidates(directory: Path, folder: str, name: str) -> list[Path]:
    paths = [place / f"{name}{suffix}" for place in (directory / folder, directory) for suffix in ("", ".gz")]
    return [path for path in paths if path.is_file()]


def _read(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except PermissionError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it, it is downloaded again") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(folder: Path, name: str, mirrors: Sequence[str]) -> Path:
    failures: list[str] = []
    for mirror in mirrors:
        # The published checksum is that of the uncompressed content, so it is checked after decompression.
        fetcher = pooch.create(path=folder, base_url=mirror, registry={name: None}, retry_if_failed=DOWNLOAD_RETRIES)
        try:
            log.info("downloading %s", name)
            return Path(fetcher.fetch(name))
        except PermissionError as error:
            raise DataError(
                f"{folder} cannot be written to ({error.strerror}): name another folder with --data"
            ) from error
        except Exception as error:  # requests, urllib3 and the socket each raise their own
            failures.append(f"{mirror}: {type(error).__name__}")
    raise DataError(
        f"{name} is neither in {folder.parent} nor in {folder}, and it could not be downloaded "
        f"({'; '.join(failures) or 'no mirror given'}): put {name} there, or connect to the network"
    )


def _read_idx(content: bytes, magic: int, dimensions: int, name: str) -> UInt8[np.ndarray, ...]:
    header = 4 * (1 + dimensions)
    if len(content) < header:
        raise DataError(f"the {name} are {len(content)} bytes, too short for an idx file: replace the file")
    found, *shape = struct.unpack(f">{1 + dimensions}I", content[:header])
    if found != magic:
        raise DataError(f"the {name} start with {found:#x}, an idx file of this kind with {magic:#x}: replace the file")
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"the {name} hold {len(content) - header} bytes, their header promises {math.prod(shape)}: "
            "the file is truncated or damaged; replace it"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _cifar10_content(directory: Path, published: Published) -> dict[str, bytes]:
    for folder in (directory / published.folder, directory):
        present = [name for name in published.sha256 if (folder / name).is_file()]
        if len(present) == len(published.sha256):
            return {name: _read(folder / name) for name in published.sha256}
        if present:
            missing = ", ".join(sorted(set(published.sha256) - set(present)))
            raise DataError(f"{folder} has no {missing}: copy them there, or delete the others to have all downloaded")
    places = [place / CIFAR10_ARCHIVE for place in (directory / published.folder, directory)]
    archive = next((path for path in places if path.is_file()), None)
    downloaded = archive is None
    if archive is None:
        archive = _download(directory / published.folder, CIFAR10_ARCHIVE, published.mirrors)
    try:
        with tarfile.open(archive) as members:
            files = {name: members.extractfile(f"{published.folder}/{name}") for name in published.sha256}
            return {name: file.read() for name, file in files.items() if file is not None}
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        if downloaded:
            archive.unlink()
        raise DataError(f"{archive} cannot be read ({error}): delete it, it is downloaded again") from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickler that allows the parts of an array only: the files are pickles."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name.split(".")[0] == "numpy" and global_name in self._ALLOWED:
            return {"ndarray": np.ndarray, "dtype": np.dtype}.get(global_name, _reconstruct)
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no part of a data set")


def _reconstruct(subtype: Any, shape: tuple[int, ...], _typecode: bytes) -> np.ndarray:
    return np.ndarray.__new__(subtype, shape, np.int8)


def _read_cifar10(content: bytes) -> LabelledImages:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        images_NCHW = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        labels_N = np.asarray(batch[b"labels"], np.int64)
    except (pickle.UnpicklingError, KeyError, ValueError, TypeError, EOFError) as error:
        raise DataError(f"a batch of CIFAR-10 cannot be read ({error}): replace the files") from error
    if len(images_NCHW) != len(labels_N):
        raise DataError(f"a batch of CIFAR-10 has {len(images_NCHW)} images but {len(labels_N)} labels: replace it")
    return LabelledImages(torch.from_numpy(images_NCHW.copy()), torch.from_numpy(labels_N))
