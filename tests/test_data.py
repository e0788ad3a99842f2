"""idx files are read as published or refused with what to do; the augmentation is small and reproducible."""

import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from models import data
from models.data import MNIST_MD5, Augmentation, DataError, augment, load_mnist, read_labelled_images

NAMES = tuple(MNIST_MD5)


def idx(array: np.ndarray) -> bytes:
    magic = 0x803 if array.ndim == 3 else 0x801
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def small_set() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    contents = [
        idx(random.integers(0, 256, (20, 28, 28))),
        idx(np.arange(20) % 10),
        idx(random.integers(0, 256, (10, 28, 28))),
        idx(np.arange(10)),
    ]
    return dict(zip(NAMES, contents, strict=True))


def checksums(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in files.items()}


def write(folder: Path, files: dict[str, bytes], *, compressed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("folder", [".", "mnist"])
def test_idx_files_are_found_raw_or_compressed_in_both_folders(tmp_path: Path, compressed: bool, folder: str) -> None:
    files = small_set()
    write(tmp_path / folder, files, compressed=compressed)
    train, test = load_mnist(tmp_path, md5=checksums(files), mirrors=())
    assert (len(train), len(test)) == (20, 10)
    assert test.labels_N.tolist() == list(range(10))
    expected = np.frombuffer(files[NAMES[0]], np.uint8, offset=16).reshape(20, 1, 28, 28) / 255
    np.testing.assert_array_equal(train.pixels(torch.float64).numpy(), expected)


def test_wrong_content_is_refused_and_the_file_is_kept(tmp_path: Path) -> None:
    files = small_set()
    write(tmp_path, files, compressed=True)
    with pytest.raises(DataError, match=r"md5 .* expected .*delete it"):
        load_mnist(tmp_path, mirrors=())
    assert (tmp_path / f"{NAMES[0]}.gz").exists()


def test_damaged_archive_is_refused(tmp_path: Path) -> None:
    files = small_set()
    write(tmp_path, files, compressed=True)
    path = tmp_path / f"{NAMES[2]}.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        load_mnist(tmp_path, md5=checksums(files), mirrors=())


def test_missing_files_without_a_network_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DOWNLOAD_RETRIES", 0)
    # Port 9 (discard) of this machine: refused at once.
    with pytest.raises(DataError, match=rf"put {NAMES[0]}\.gz there, or connect"):
        load_mnist(tmp_path, mirrors=("http://127.0.0.1:9/",))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield folder, f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_missing_files_are_downloaded_from_the_first_mirror_that_answers(
    tmp_path: Path, mirror: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "DOWNLOAD_RETRIES", 0)
    folder, address = mirror
    files = small_set()
    write(folder, files, compressed=True)
    mirrors = (f"{address}nothing-here/", address)
    train, _ = load_mnist(tmp_path / "data", md5=checksums(files), mirrors=mirrors)
    assert len(train) == 20
    assert (tmp_path / "data" / "mnist" / f"{NAMES[0]}.gz").is_file()


def test_download_of_wrong_content_is_removed(tmp_path: Path, mirror: tuple[Path, str]) -> None:
    folder, address = mirror
    write(folder, small_set(), compressed=True)
    with pytest.raises(DataError, match="md5"):
        load_mnist(tmp_path / "data", mirrors=(address,))
    assert not (tmp_path / "data" / "mnist" / f"{NAMES[0]}.gz").exists()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(np.zeros((3, 2, 2))), idx(np.zeros(4)), "3 images but 4 labels"),
        (idx(np.zeros(3)) + bytes(12), idx(np.zeros(3)), "0x801, an idx file of this kind with 0x803"),
        (idx(np.zeros((3, 2, 2)))[:-1], idx(np.zeros(3)), "truncated"),
        (idx(np.zeros((3, 2, 2))), b"\x00\x00", "too short"),
    ],
)
def test_files_that_are_no_pair_of_idx_files_are_refused(images: bytes, labels: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labelled_images(images, labels, "test set")


def test_chosen_digits_are_renumbered_in_the_given_order() -> None:
    images = read_labelled_images(idx(np.arange(40).reshape(10, 2, 2)), idx(np.arange(10)), "test set")
    chosen = images.only((8, 0))
    assert chosen.labels_N.tolist() == [1, 0]
    assert torch.equal(chosen.images_NHW, images.images_NHW[[0, 8]])


def test_augmentation_of_equal_seeds_is_equal_and_stays_in_the_range_of_pixels() -> None:
    images = torch.rand(16, 1, 28, 28)
    first, second = (augment(images, Augmentation(), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, images)
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6


def test_augmentation_of_zero_range_changes_nothing() -> None:
    images = torch.rand(4, 1, 28, 28)
    still = augment(images, Augmentation(0.0, 0.0, 0.0, 0.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)


def test_shift_is_measured_in_pixels() -> None:
    image = torch.zeros(200, 1, 9, 9)
    image[:, :, 4, 4] = 1.0
    moved = augment(image, Augmentation(0.0, 0.0, 0.0, 2.0), torch.Generator().manual_seed(0))
    place = torch.arange(9.0)
    centre = (moved.sum((1, 2)) * place).sum(1) / moved.sum((1, 2, 3))
    assert (centre - 4).abs().max() <= 2 + 1e-4
    assert (centre - 4).abs().max() > 1.5
