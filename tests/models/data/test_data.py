"""idx files are read as published or refused with what to do; the augmentation is small and reproducible."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from models.data import published as data
from models.data.augmentation import augment
from models.data.datasets import load_dataset, options_of
from models.data.labelled import DataError, LabelledImages
from models.data.published import (
    CIFAR10,
    CIFAR10_ARCHIVE,
    FASHION_MNIST,
    MNIST,
    Published,
    load_cifar10,
    load_idx,
    read_labelled_images,
)
from models.recipes import Augment, DataOptions

NAMES = tuple(MNIST.sha256)
AUGMENT = Augment(rotation_degrees=10, scale=0.1, shear=0.1, shift_pixels=1.5, flip=True, crop_padding=2)


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


def published(files: dict[str, bytes], *mirrors: str, like: Published = MNIST) -> Published:
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return replace(like, sha256=sha256, mirrors=mirrors)


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
    train, test = load_idx(tmp_path, published(files))
    assert (len(train), len(test)) == (20, 10)
    assert test.labels_N.tolist() == list(range(10))
    expected = np.frombuffer(files[NAMES[0]], np.uint8, offset=16).reshape(20, 1, 28, 28) / 255
    np.testing.assert_array_equal(train.pixels(torch.float64).numpy(), expected)


def test_wrong_content_is_refused_and_the_file_is_kept(tmp_path: Path) -> None:
    files = small_set()
    write(tmp_path, files, compressed=True)
    with pytest.raises(DataError, match=r"sha256 .* expected .*delete it"):
        load_idx(tmp_path, replace(MNIST, mirrors=()))
    assert (tmp_path / f"{NAMES[0]}.gz").exists()


def test_damaged_archive_is_refused(tmp_path: Path) -> None:
    files = small_set()
    write(tmp_path, files, compressed=True)
    path = tmp_path / f"{NAMES[2]}.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        load_idx(tmp_path, published(files))


def test_missing_files_without_a_network_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DOWNLOAD_RETRIES", 0)
    # Port 9 (discard) of this machine: refused at once.
    with pytest.raises(DataError, match=rf"put {NAMES[0]}\.gz there, or connect"):
        load_idx(tmp_path, replace(MNIST, mirrors=("http://127.0.0.1:9/",)))


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
    train, _ = load_idx(tmp_path / "data", published(files, f"{address}nothing-here/", address))
    assert len(train) == 20
    assert (tmp_path / "data" / "mnist" / f"{NAMES[0]}.gz").is_file()


def test_download_of_wrong_content_is_removed(tmp_path: Path, mirror: tuple[Path, str]) -> None:
    folder, address = mirror
    write(folder, small_set(), compressed=True)
    with pytest.raises(DataError, match="sha256"):
        load_idx(tmp_path / "data", replace(MNIST, mirrors=(address,)))
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
    assert torch.equal(chosen.images_NCHW, images.images_NCHW[[0, 8]])


def test_augmentation_of_equal_seeds_is_equal_and_stays_in_the_range_of_pixels() -> None:
    images = torch.rand(16, 1, 28, 28)
    first, second = (augment(images, AUGMENT, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, images)
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6


def test_augmentation_of_zero_range_changes_nothing() -> None:
    images = torch.rand(4, 1, 28, 28)
    assert torch.equal(augment(images, Augment(), torch.Generator().manual_seed(0)), images)


def test_shift_is_measured_in_pixels() -> None:
    image = torch.zeros(200, 1, 9, 9)
    image[:, :, 4, 4] = 1.0
    moved = augment(image, Augment(shift_pixels=2.0), torch.Generator().manual_seed(0))
    place = torch.arange(9.0)
    centre = (moved.sum((1, 2)) * place).sum(1) / moved.sum((1, 2, 3))
    assert (centre - 4).abs().max() <= 2 + 1e-4
    assert (centre - 4).abs().max() > 1.5


def test_a_mirrored_image_is_the_image_or_its_mirror_image() -> None:
    images = torch.rand(40, 3, 5, 6)
    found = augment(images, Augment(flip=True), torch.Generator().manual_seed(0))
    mirrored = [torch.equal(one, other.flip(2)) for one, other in zip(found, images, strict=True)]
    same = [torch.equal(one, other) for one, other in zip(found, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 5 < sum(mirrored) < 35


def test_a_crop_is_a_window_of_the_padded_image_and_windows_differ() -> None:
    image = torch.rand(1, 3, 6, 5).expand(60, 3, 6, 5)
    padded = torch.nn.functional.pad(image[:1], (2, 2, 2, 2), mode="reflect")[0]
    windows = [padded[:, top : top + 6, left : left + 5] for top in range(5) for left in range(5)]
    found = augment(image, Augment(crop_padding=2), torch.Generator().manual_seed(0))
    places = [next(n for n, window in enumerate(windows) if torch.equal(window, one)) for one in found]
    assert len(set(places)) > 12


def test_set_with_the_same_file_names_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, garments = small_set(), {name: content[:-1] + b"\0" for name, content in small_set().items()}
    first, second = published(digits), published(garments, like=FASHION_MNIST)
    monkeypatch.setattr(data, "_IDX_SETS", (first, second))
    write(tmp_path, digits, compressed=False)
    write(tmp_path / "fashion-mnist", garments, compressed=True)
    assert not torch.equal(load_idx(tmp_path, first)[1].images_NCHW, load_idx(tmp_path, second)[1].images_NCHW)
    with pytest.raises(DataError, match=f"{NAMES[0]}.gz is neither in"):
        load_idx(tmp_path, replace(second, folder="elsewhere"))


def test_label_file_of_another_set_is_refused(tmp_path: Path) -> None:
    files = small_set() | {NAMES[1]: idx(np.arange(19))}
    write(tmp_path, files, compressed=False)
    with pytest.raises(DataError, match=r"training set has 20 images but 19 labels.*replace both"):
        load_idx(tmp_path, published(files))


class _CutShort(_Quiet):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"the connection ends here")
        self.close_connection = True


def test_interrupted_download_leaves_no_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DOWNLOAD_RETRIES", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _CutShort)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.raises(DataError, match=r"could not be downloaded .*put .*gz there"):
            load_idx(tmp_path, replace(MNIST, mirrors=(f"http://127.0.0.1:{server.server_address[1]}/",)))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def small_cifar() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    return {
        name: pickle.dumps(
            {b"data": random.integers(0, 256, (10, 3072), np.uint8), b"labels": list(range(10))}, protocol=3
        )
        for name in CIFAR10.sha256
    }


def archive_of(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("where", [".", "cifar-10-batches-py", "archive", "archive in its folder"])
def test_cifar10_is_found_unpacked_or_packed(tmp_path: Path, where: str) -> None:
    files = small_cifar()
    folder = tmp_path / ("cifar-10-batches-py" if where in ("cifar-10-batches-py", "archive in its folder") else ".")
    folder.mkdir(exist_ok=True)
    for name, content in ({CIFAR10_ARCHIVE: archive_of(files)} if "archive" in where else files).items():
        (folder / name).write_bytes(content)
    train, test = load_cifar10(tmp_path, published(files, like=CIFAR10))
    assert train.images_NCHW.shape == (50, 3, 32, 32)
    assert test.labels_N.tolist() == list(range(10))
    # Stored are planes of red, green and blue, each row by row.
    first = pickle.loads(files["data_batch_1"], encoding="bytes")[b"data"][0]
    assert train.images_NCHW[0, 1, 2, 3] == first[1024 + 2 * 32 + 3]


def test_cifar10_is_downloaded_where_it_is_missing(tmp_path: Path, mirror: tuple[Path, str]) -> None:
    folder, address = mirror
    files = small_cifar()
    (folder / CIFAR10_ARCHIVE).write_bytes(archive_of(files))
    assert len(load_cifar10(tmp_path / "data", published(files, address, like=CIFAR10))[0]) == 50


def test_cifar10_with_a_file_missing_damaged_or_dangerous_is_refused(tmp_path: Path) -> None:
    files = small_cifar()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    known = published(files, like=CIFAR10)
    (tmp_path / "data_batch_3").write_bytes(files["data_batch_3"][:-9])
    with pytest.raises(DataError, match=r"data_batch_3 has sha256 .* expected .*delete"):
        load_cifar10(tmp_path, known)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"has no data_batch_3: copy"):
        load_cifar10(tmp_path, known)
    harmful = files | {"data_batch_3": pickle.dumps(print)}
    (tmp_path / "data_batch_3").write_bytes(harmful["data_batch_3"])
    with pytest.raises(DataError, match=r"builtins\.print is no part"):
        load_cifar10(tmp_path, published(harmful, like=CIFAR10))


def test_damaged_archive_of_cifar10_is_refused(tmp_path: Path) -> None:
    (tmp_path / CIFAR10_ARCHIVE).write_bytes(archive_of(small_cifar())[:2000])
    with pytest.raises(DataError, match=rf"{CIFAR10_ARCHIVE} cannot be read .*delete it"):
        load_cifar10(tmp_path, published(small_cifar(), like=CIFAR10))


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(DataError, match=r"is a file: name a folder with --data"):
        load_dataset(DataOptions(dataset="mnist"), tmp_path / "data")


def test_card_block_leads_back_to_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = small_set()
    write(tmp_path, files, compressed=True)
    monkeypatch.setattr("models.data.datasets.PUBLISHED", {"mnist": published(files)})
    found = load_dataset(DataOptions(dataset="mnist", classes=("7", "2")), tmp_path)
    assert found.labels == ("7", "2")
    assert found.test.labels_N.tolist() == [1, 0]
    assert found.card["counts"] == {"train": {"7": 2, "2": 2}, "test": {"7": 1, "2": 1}}
    assert (found.card["name"], found.card["licence"]) == ("MNIST", "CC BY-SA 3.0")
    again = load_dataset(options_of(found.card, ["7", "2"]), tmp_path)
    assert torch.equal(again.test.images_NCHW, found.test.images_NCHW)
    assert again.card == found.card


def test_card_of_the_shipped_models_from_before_other_sets_means_mnist() -> None:
    assert options_of({"name": "MNIST"}, ["0", "8"]) == DataOptions(dataset="mnist", classes=("0", "8"))


def test_class_that_a_published_set_does_not_have_is_answered_with_those_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"MNIST has no class ten: choose of 0, 1"):
        load_dataset(DataOptions(dataset="mnist", classes=("0", "ten")), tmp_path)


def test_stratified_split_takes_of_each_class_its_share() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    images = LabelledImages(torch.arange(100, dtype=torch.uint8)[:, None, None, None], labels)
    held_out, rest = images.stratified(20, torch.Generator().manual_seed(0))
    assert held_out.counts(3) == [12, 6, 2]
    numbers = [set(part.images_NCHW.flatten().tolist()) for part in (held_out, rest)]
    assert numbers[0] | numbers[1] == set(range(100))
    assert numbers[0] & numbers[1] == set()
