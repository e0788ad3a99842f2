"""Other images of the classes of a model: all of them are read as the service reads them, or named in a message."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.data.folders import load_folder
from models.data.resizing import decode_file, fit_image
from models.evaluation.images import EvaluationError, ImageSet, holds_classes, other_images, pixel_keys
from models.recipes import DataOptions

LABELS = ["cat", "dog"]
SHAPE = (1, 6, 8)


def write(folder: Path, counts: dict[str, int], shape: tuple[int, ...] = (9, 7, 3), seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for label, count in counts.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            Image.fromarray(random.integers(0, 256, shape).astype(np.uint8)).save(folder / label / f"{n}.png")
    return folder


def read(folder: Path, trained_on: dict[str, Any] | None = None) -> ImageSet:
    return other_images(folder, LABELS, SHAPE, trained_on or {})


def test_every_image_is_converted_as_the_trainer_does(tmp_path: Path) -> None:
    folder = write(tmp_path / "clinic", {"dog": 3, "cat": 2})
    found = read(folder)
    assert found.files == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/2.png")
    assert found.images.labels_N.tolist() == [0, 0, 1, 1, 1]
    for file, pixels in zip(found.files, found.images.images_NCHW.numpy(), strict=True):
        expected = fit_image(decode_file((folder / file).read_bytes()), 1, (6, 8))
        assert np.array_equal(pixels, expected)
    assert not found.of_the_card
    assert found.name == "clinic"


def test_test_folder_is_measured_and_the_rest_is_said(tmp_path: Path) -> None:
    write(tmp_path / "test", {"cat": 1, "dog": 1})
    write(tmp_path / "train", {"cat": 3, "dog": 3})
    found = read(tmp_path)
    assert len(found.images) == 2
    assert "/test; not measured: train" in found.notes[0]


def test_missing_class_is_said(tmp_path: Path) -> None:
    (write(tmp_path, {"cat": 2}) / "dog").mkdir()
    assert "No image of dog: nothing is known about this class here." in read(tmp_path).notes
    shutil.rmtree(tmp_path / "dog")
    assert len(read(tmp_path).images) == 2


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"cat": 1, "horse": 1, "cow": 1}, "no class of this model: cow, horse; its classes are cat, dog"),
        ({"train": 0}, "has the folders train and no test"),
        ({}, "has no folder of a class"),
        ({"cat": 0}, "are empty"),
    ],
)
def test_folder_that_is_no_set_of_these_classes_is_refused(
    tmp_path: Path, counts: dict[str, int], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        read(write(tmp_path, counts))


def test_folder_that_does_not_exist_or_is_nested_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be listed"):
        read(tmp_path / "no")
    write(tmp_path / "cat", {"small": 1})
    with pytest.raises(EvaluationError, match=r"small is a folder inside of the class cat"):
        read(tmp_path)


def test_file_that_the_service_refuses_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "cat" / "note.txt").write_text("no image")
    (note,) = (note for note in read(tmp_path).notes if "left out" in note)
    assert "1 of 5 files" in note
    assert "cat/note.txt: the bytes are not an image" in note
    for path in tmp_path.glob("*/*.png"):
        path.unlink()
    with pytest.raises(EvaluationError, match=r"1 files below .* can be used"):
        read(tmp_path)


def test_copies_and_other_shares_of_classes_are_said(tmp_path: Path) -> None:
    write(tmp_path, {"cat": 3, "dog": 1})
    shutil.copyfile(tmp_path / "cat" / "0.png", tmp_path / "cat" / "copy.png")
    notes = read(tmp_path, {"counts": {"test": {"cat": 10, "dog": 10}}}).notes
    assert any("1 images are copies" in note for note in notes)
    assert any("cat 80%, there 50%" in note for note in notes)
    assert not any("shares" in note for note in read(tmp_path, {"counts": {"test": {"cat": 75, "dog": 25}}}).notes)


def test_known_lists_of_training_and_test_images_are_recognised(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / part, {"cat": 2, "dog": 2}, seed=len(part))
    options = DataOptions(dataset="image-folder", classes=("cat", "dog"))
    digests = load_folder(tmp_path, options).card["digest"]
    assert "the network was trained on them" in read(tmp_path / "train", {"digest": digests}).notes[-1]
    assert "the test images of the card" in read(tmp_path / "test", {"digest": digests}).notes[-1]
    write(tmp_path / "other", {"cat": 1})
    assert "no digests of single files" in read(tmp_path / "other", {"digest": digests}).notes[-1]
    assert "no digest of training images" in read(tmp_path / "other").notes[-1]


def test_training_images_are_counted_under_any_name_and_format(tmp_path: Path) -> None:
    folder = write(tmp_path / "clinic", {"cat": 3, "dog": 2})
    keys = pixel_keys(read(folder).images)[:2]
    Image.open(folder / "cat" / "0.png").save(folder / "dog" / "renamed.bmp")
    found = other_images(folder, LABELS, SHAPE, {"name": "clinic"}, keys)
    assert found.trained_on == 3
    assert "3 of 6 images have exactly the pixels of an image that was trained on" in found.notes[-1]
    assert "the figures are too good" in found.notes[-1]
    assert "would not be recognised" in other_images(folder, LABELS, SHAPE, {}, keys[:0]).notes[-1]
    assert "may hold training images" in read(folder, {"name": "clinic"}).notes[-1]


def test_chosen_images_keep_their_files(tmp_path: Path) -> None:
    found = read(write(tmp_path, {"cat": 2, "dog": 2})).at(np.array([1, 3]))
    assert found.files == ("cat/1.png", "dog/1.png")
    assert found.images.labels_N.tolist() == [0, 1]
    lines = "".join(
        sorted(
            f"{path.parent.name}/{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
            for path in tmp_path.glob("*/*.png")
        )
    )
    assert found.digest == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def test_folder_holds_classes_directly_or_in_test(tmp_path: Path) -> None:
    assert not holds_classes(tmp_path, LABELS)
    (tmp_path / "test" / "dog").mkdir(parents=True)
    assert holds_classes(tmp_path, LABELS)
    assert holds_classes(tmp_path / "test", LABELS)
