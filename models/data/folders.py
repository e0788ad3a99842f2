"""Any folder of images, one folder for each class, as a data set; what cannot be used is refused before training.

`DIR/<class>/*`, of which a share is held out as the test set, or `DIR/train/<class>/*` and `DIR/test/<class>/*`. The
classes are the names of the folders, sorted. All images get one number of channels and one size by
the map that the service applies with `resize=true`, see `models.preprocessing`.

The held-out images are chosen by the sha256 of their content, so that the choice depends neither on names nor on the
order of the listing, another image moves no other one across, and copies of an image fall on the same side.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from models.data.labelled import DataError, DataSet, LabelledImages
from models.preprocessing import DESCRIPTION, FORMATS, UnusableImageError, decode_image, fit_image
from models.recipes import DataOptions

log = logging.getLogger(__name__)

LARGEST_DEFAULT_SIDE = 64
KEPT_BYTES = 2**30
"""Decoded images are kept in memory up to this much, and decoded a second time beyond it."""
FAULTS_NAMED = 10
_CLUTTER = frozenset({"Thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class _Picture:
    """A file that can be used."""

    path: Path
    label: str
    part: str
    """`train`, `test`, or `all` where the folder has no test set."""
    digest: str
    """sha256 of the content."""
    shape: tuple[int, int, int]
    pixels: np.ndarray | None
    """None where there are too many to keep."""


def load_folder(directory: Path, options: DataOptions, *, multiple: int = 1, test_only: bool = False) -> DataSet:
    """Read and check every file, then resize.

    Args:
        directory: holds the folders of the classes, or `train` and `test`.
        options: what becomes of them; what is None is decided here, and stands in the card.
        multiple: a size that is decided here is a multiple of it.
        test_only: for evaluation: a `test` folder is all that is read, and size and channels must be decided.

    Raises:
        DataError: the folder does not hold at least two classes of usable images; the message names file and cure.
    """
    parts = _parts(directory)
    if test_only and "test" in parts:
        parts = {"test": parts["test"]}
    files = {part: _files_of_classes(folder, options.classes) for part, folder in parts.items()}
    labels = options.classes or tuple(sorted(next(iter(files.values()))))
    _refuse_different_classes(parts, files)
    pictures, skipped = _usable(files, options)
    for part in files:
        _refuse_empty_classes(parts[part], labels, Counter(p.label for p in pictures if p.part == part), skipped)
    channels = options.channels or max(picture.shape[0] for picture in pictures)
    size = _size(options, pictures, multiple)
    decided = options.model_copy(update={"classes": labels, "channels": channels, "image_size": size})
    # By their digests: the first so many images of a part are then a fair sample of all classes.
    pictures = sorted((p for part in _split(pictures, labels, decided) for p in part), key=lambda p: (p.digest, p.path))
    images = {
        part: _pixels([p for p in pictures if p.part == part], labels, channels, size) for part in ("train", "test")
    }
    card = _card(directory, pictures, decided, "all" in files, skipped)
    return DataSet(images["train"], images["test"], labels, card)


def _parts(directory: Path) -> dict[str, Path]:
    """`train` and `test` where there is a folder `train` of folders, else everything as `all`."""
    if not directory.exists():
        raise DataError(f"{directory} does not exist: name the folder of the images with --data")
    if not directory.is_dir():
        raise DataError(f"{directory} is a file: name the folder that holds one folder for each class with --data")
    names = {path.name for path in _folders(directory)}
    if not {"train", "test"} & names or not names <= {"train", "test", "val", "valid", "validation"}:
        return {"all": directory}
    if "train" not in names:
        raise DataError(
            f"{directory} has a folder test and no folder train: add one, or move the classes into {directory}"
        )
    for unused in sorted(names - {"train", "test"}):
        log.warning(
            "%s is not used: held-out images are taken from train (--set validation_images=N)", directory / unused
        )
    return (
        {part: directory / part for part in ("train", "test") if part in names}
        if "test" in names
        else {"all": directory / "train"}
    )


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(p for p in directory.iterdir() if not p.name.startswith(".") and p.name not in _CLUTTER)
    except OSError as error:
        raise DataError(f"{directory} cannot be listed ({error.strerror}): make it readable") from error


def _folders(directory: Path) -> list[Path]:
    return [path for path in _entries(directory) if path.is_dir()]


def _files_of_classes(folder: Path, wanted: Sequence[str] | None) -> dict[str, list[Path]]:
    classes = {path.name: path for path in _folders(folder)}
    if wanted is not None:
        missing = [label for label in wanted if label not in classes]
        if missing:
            raise DataError(
                f"{folder} has no class {', '.join(missing)}: its folders are {', '.join(classes) or 'none'}; "
                "correct --set classes"
            )
        classes = {label: classes[label] for label in wanted}
    if not classes:
        raise DataError(f"{folder} has no folders in it: put the images of each class into a folder of its own")
    if len(classes) == 1:
        raise DataError(
            f"{folder} has one class, {next(iter(classes))}: a classifier needs two folders or more; if the classes "
            f"are inside of it, use --data {folder / next(iter(classes))}"
        )
    files: dict[str, list[Path]] = {}
    for label, path in classes.items():
        entries = _entries(path)
        nested = next((entry for entry in entries if entry.is_dir()), None)
        if nested is not None:
            raise DataError(
                f"{nested} is a folder inside of the class {label}: put its images directly into {path}, or name "
                f"{path} with --data if that is the data set"
            )
        if not entries:
            raise DataError(f"the class {label} is empty: put images into {path}, or remove it")
        files[label] = entries
    return files


def _refuse_different_classes(parts: Mapping[str, Path], files: Mapping[str, Mapping[str, Sequence[Path]]]) -> None:
    if "train" not in files or "test" not in files:
        return
    train, test = set(files["train"]), set(files["test"])
    if train != test:
        only = [
            f"only in {parts[part]}: {', '.join(sorted(found))}"
            for part, found in (("train", train - test), ("test", test - train))
            if found
        ]
        raise DataError(f"train and test have different classes ({'; '.join(only)}): give both the same folders")


def _usable(files: Mapping[str, Mapping[str, Sequence[Path]]], options: DataOptions) -> tuple[list[_Picture], int]:
    listing = [(part, label, path) for part, classes in files.items() for label in classes for path in classes[label]]
    pictures: list[_Picture] = []
    faults: list[str] = []
    kept = 0
    for part, label, path in tqdm(listing, desc="checking images", unit="image", leave=False, disable=None):
        content = _content(path)
        try:
            pixels = decode_image(content)
        except UnusableImageError as error:
            faults.append(f"{path}: {error}")
            continue
        kept += pixels.size
        pictures.append(
            _Picture(
                path,
                label,
                part,
                hashlib.sha256(content).hexdigest(),
                (pixels.shape[0], pixels.shape[1], pixels.shape[2]),
                pixels if kept <= KEPT_BYTES else None,
            )
        )
    if faults:
        shown = "\n  ".join([*faults[:FAULTS_NAMED], *(["..."] if len(faults) > FAULTS_NAMED else [])])
        if not options.skip_broken:
            raise DataError(
                f"{len(faults)} of {len(listing)} files cannot be used:\n  {shown}\nMend or remove them, or leave them "
                f"out with --set skip_broken=true; the service reads {', '.join(FORMATS)}"
            )
        log.warning("%d of %d files are left out:\n  %s", len(faults), len(listing), shown)
    return pictures, len(faults)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it readable, or remove it") from error


def _refuse_empty_classes(folder: Path, labels: Sequence[str], counts: Mapping[str, int], skipped: int) -> None:
    for label in labels:
        if not counts.get(label):
            raise DataError(
                f"the class {label} has no usable image left ({skipped} files were left out): put images into "
                f"{folder / label}, or remove it"
            )


def _size(options: DataOptions, pictures: Sequence[_Picture], multiple: int) -> tuple[int, int]:
    """Height and width: as asked for, or the medians, made smaller together where one is above the largest default."""
    if isinstance(options.image_size, int):
        return options.image_size, options.image_size
    if options.image_size is not None:
        return options.image_size
    height, width = (statistics.median(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    scale = min(1.0, LARGEST_DEFAULT_SIDE / max(height, width))
    height, width = (max(multiple, math.floor(side * scale / multiple) * multiple) for side in (height, width))
    return height, width


def _split(
    pictures: Sequence[_Picture], labels: Sequence[str], options: DataOptions
) -> tuple[list[_Picture], list[_Picture]]:
    train, test = ([p for p in pictures if p.part == part] for part in ("train", "test"))
    for label in labels:
        members = [p for p in pictures if p.part == "all" and p.label == label]
        if members:
            held_out = _held_out(label, members, options)
            test += [replace(p, part="test") for p in members if p.digest in held_out]
            train += [replace(p, part="train") for p in members if p.digest not in held_out]
    return train, test


def _held_out(label: str, members: Sequence[_Picture], options: DataOptions) -> set[str]:
    """Contents of the test images of a class: the share whose salted digests come first, at least one and not all."""
    copies = Counter(picture.digest for picture in members)
    if len(copies) < 2:
        raise DataError(
            f"the class {label} has one image ({members[0].path}), and one has to be held out for the test: add "
            "images, or make folders train and test"
        )
    order = sorted(copies, key=lambda digest: hashlib.sha256(f"{options.split_seed}:{digest}".encode()).digest())
    wanted, chosen, taken = max(1, round(options.test_share * len(members))), set[str](), 0
    for digest in order[:-1]:
        if taken >= wanted:
            break
        chosen.add(digest)
        taken += copies[digest]
    return chosen


def _pixels(
    pictures: Sequence[_Picture], labels: Sequence[str], channels: int, size: tuple[int, int]
) -> LabelledImages:
    images_NCHW = torch.empty((len(pictures), channels, *size), dtype=torch.uint8)
    for n, picture in enumerate(tqdm(pictures, desc="resizing", unit="image", leave=False, disable=None)):
        pixels = picture.pixels if picture.pixels is not None else decode_image(_content(picture.path))
        images_NCHW[n] = torch.from_numpy(fit_image(pixels, channels, size))
    number = {label: k for k, label in enumerate(labels)}
    return LabelledImages(images_NCHW, torch.tensor([number[p.label] for p in pictures], dtype=torch.int64))


def _card(
    directory: Path, pictures: Sequence[_Picture], options: DataOptions, is_split: bool, skipped: int
) -> dict[str, Any]:
    parts = {part: [p for p in pictures if p.part == part] for part in ("train", "test")}
    shared = {p.digest for p in parts["train"]} & {p.digest for p in parts["test"]}
    if shared:
        some = next(p for p in parts["test"] if p.digest in shared)
        log.warning(
            "%d images are in train and in test, e.g. %s: the test figures are too good", len(shared), some.path
        )
    return {
        "name": directory.resolve().name,
        "source": options.source or "a folder of images",
        "licence": options.licence,
        "digest": {part: _digest(found) for part, found in parts.items() if found},
        "split": {"test_share": options.test_share, "seed": options.split_seed} if is_split else None,
        "n_left_out": skipped,
        "n_in_train_and_test": len(shared),
        "preprocessing": DESCRIPTION,
        "options": options.model_dump(mode="json"),
    }


def _digest(pictures: Sequence[_Picture]) -> str:
    """sha256 of the sorted lines `class/file sha256` of a part."""
    return f"sha256:{hashlib.sha256(''.join(sorted(_lines(pictures))).encode()).hexdigest()}"


def _lines(pictures: Sequence[_Picture]) -> Iterator[str]:
    return (f"{picture.label}/{picture.path.name} {picture.digest}\n" for picture in pictures)
