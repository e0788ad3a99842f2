"""A folder of images, one folder for each class, as a data set; unusable files are refused before training.

The layout is `DIR/<class>/*`, of which a share is held out as the test set, or `DIR/train/<class>/*` and
`DIR/test/<class>/*`. The classes are the names of the folders, sorted. Files are decoded by the decoder of the service,
and all images get one number of channels and one size by the map that the service applies with `resize=true`, rounded
to 8 bits: the network is trained on the pixels that it is served.

The held-out images are chosen by the sha256 of their content, so the choice depends neither on names nor on the order
of the listing, another image moves no other one across, and copies of an image fall on the same side.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from models.data.labelled import DataError, DataSet, LabelledImages
from models.data.resizing import decode_file, fit_image, room_for
from models.recipes import DataOptions
from service.errors import InputError
from service.pixels.folders import is_clutter
from service.pixels.images import FORMATS, Pixels

log = logging.getLogger(__name__)

LARGEST_DEFAULT_SIDE = 64
"""Longest side of the images, in pixels, if the recipe states no size."""
CACHED_BYTES = 2**30
"""Decoded images that stay in memory, in bytes; the others are decoded a second time."""
FAULTS_NAMED = 10
"""Unusable files that an error message names."""
DESCRIPTION = "RGB to grey: 0.299 R + 0.587 G + 0.114 B; grey to RGB: three copies; resize: triangle filter; 8 bits"
"""The preprocessing, for the card."""
PARTS = frozenset({"train", "test", "val", "valid", "validation"})
"""Folders that are parts of a data set, not classes."""
MOST_CLASSES = 1000
"""Classes of a folder; each pair of them has a constant of its own."""


@dataclass(frozen=True)
class _Picture:
    """A usable file."""

    path: Path
    label: str
    part: str
    """`train`, `test`, or `all` where the folder has no test set."""
    digest: str
    """sha256 of the content."""
    shape: tuple[int, int, int]
    """(C, H, W)."""
    pixels: Pixels | None
    """Absent beyond `CACHED_BYTES`."""


@dataclass(frozen=True)
class Folder:
    """The usable images of a folder, each file checked."""

    directory: Path
    options: DataOptions
    """With the classes and the channels that were found."""
    pictures: tuple[_Picture, ...]
    is_split: bool
    """Whether the test set is held out of the images, where the folder has no such part."""
    skipped: int
    """Files that cannot be used."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        assert self.options.classes is not None
        return self.options.classes

    def median_size(self) -> tuple[float, float]:
        """Return the medians of height and width, in pixels."""
        height, width = (float(statistics.median(picture.shape[axis] for picture in self.pictures)) for axis in (1, 2))
        return height, width

    def size_within(self, longest: int, multiple: int = 1) -> tuple[int, int]:
        """Return the median height and width, scaled down to a longest side, in pixels.

        Args:
            longest: side, in pixels.
            multiple: divides each side, which is rounded down.
        """
        height, width = self.median_size()
        scale = min(1.0, longest / max(height, width))
        return (
            max(multiple, math.floor(height * scale / multiple) * multiple),
            max(multiple, math.floor(width * scale / multiple) * multiple),
        )

    @cached_property
    def parts(self) -> dict[str, list[_Picture]]:
        """The pictures of `train` and `test`, in the order of the digests: the first are a fair sample of all classes.

        Raises:
            DataError: a class has one image, and the test needs another.
        """
        parts = zip(("train", "test"), _split(self.pictures, self.labels, self.options), strict=True)
        return {part: sorted(found, key=lambda picture: (picture.digest, picture.path)) for part, found in parts}

    def sample(self, count: int, longest: int) -> LabelledImages:
        """Return some training images, made small.

        Args:
            count: number of images at most, chosen by their digests.
            longest: side, in pixels.
        """
        assert self.options.channels is not None
        return _pixels(self.parts["train"][:count], self.labels, self.options.channels, self.size_within(longest))

    def load(self, size: int | tuple[int, int] | None, multiple: int = 1) -> DataSet:
        """Return the images, converted and resized.

        Args:
            size: side, or height and width, in pixels; null: the median, at most `LARGEST_DEFAULT_SIDE`.
            multiple: divides each side, in pixels, that is decided here.
        """
        size = size or self.size_within(LARGEST_DEFAULT_SIDE, multiple)
        size = (size, size) if isinstance(size, int) else size
        channels = self.options.channels
        assert channels is not None
        images = {part: _pixels(pictures, self.labels, channels, size) for part, pictures in self.parts.items()}
        options = self.options.model_copy(update={"image_size": size})
        return DataSet(
            images["train"],
            images["test"],
            self.labels,
            _card(self.directory, self.parts, options, self.is_split, self.skipped),
        )


def load_folder(directory: Path, options: DataOptions, *, multiple: int = 1, test_only: bool = False) -> DataSet:
    """Return the images of a folder, each file checked, converted and resized.

    Args:
        directory: contains the folders of the classes, or `train` and `test`.
        options: classes, size, channels and split; a missing value is decided here and recorded in the card.
        multiple: divides each side, in pixels, that is decided here.
        test_only: read the folder `test` only, where there is one (for an evaluation); size and channels must be given.

    Raises:
        DataError: the folder does not contain at least two classes of usable images; the message names file and cure.
    """
    return scan_folder(directory, options, test_only=test_only).load(options.image_size, multiple)


def scan_folder(directory: Path, options: DataOptions, *, test_only: bool = False) -> Folder:
    """Return the usable images of a folder, each file checked.

    Args:
        directory: contains the folders of the classes, or `train` and `test`.
        options: classes, channels and split; the first two are decided here where they are missing.
        test_only: read the folder `test` only, where there is one.

    Raises:
        DataError: the folder does not contain at least two classes of usable images; the message names file and cure.
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
    decided = options.model_copy(update={"classes": labels, "channels": channels})
    return Folder(directory, decided, tuple(pictures), "all" in files, skipped)


def _parts(directory: Path) -> dict[str, Path]:
    """Return the folders of `train` and `test`, or the folder of `all` images where there is no such pair."""
    if not directory.exists():
        raise DataError(f"{directory} does not exist: name the folder of the images with --data")
    if not directory.is_dir():
        raise DataError(f"{directory} is a file: name the folder that holds one folder for each class with --data")
    names = {path.name for path in _folders(directory)}
    if not {"train", "test"} & names or not names <= PARTS:
        return {"all": directory}
    if "train" not in names:
        raise DataError(
            f"{directory} has a folder test and no folder train: add one, or move the classes into {directory}"
        )
    for unused in sorted(names - {"train", "test"}):
        log.warning(
            "%s is not used: validation images are taken from train (--set validation_images=N)", directory / unused
        )
    return (
        {part: directory / part for part in ("train", "test") if part in names}
        if "test" in names
        else {"all": directory / "train"}
    )


def entries(directory: Path) -> list[Path]:
    """Return the entries of a folder, sorted, without the clutter of archives and file systems.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        found = sorted(directory.iterdir())
    except OSError as error:
        raise DataError(f"{directory} cannot be listed ({error.strerror}): make it readable") from error
    kept = [path for path in found if not is_clutter(path.name)]
    if len(kept) < len(found):
        passed = ", ".join(path.name for path in found if path not in set(kept))
        log.info("%s: passed over %s", directory, passed)
    return kept


def _folders(directory: Path) -> list[Path]:
    return [path for path in entries(directory) if path.is_dir()]


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
    if len(classes) > MOST_CLASSES:
        raise DataError(
            f"{folder} has {len(classes)} classes, at most {MOST_CLASSES} are supported: merge some, or choose with "
            "--set classes"
        )
    if not classes:
        raise DataError(f"{folder} has no folders in it: put the images of each class into a folder of its own")
    if len(classes) == 1:
        raise DataError(
            f"{folder} has one class, {next(iter(classes))}: a classifier needs two folders or more; if the classes "
            f"are inside of it, use --data {folder / next(iter(classes))}"
        )
    files: dict[str, list[Path]] = {}
    for label, path in classes.items():
        inside = entries(path)
        nested = next((entry for entry in inside if entry.is_dir()), None)
        if nested is not None:
            raise DataError(
                f"{nested} is a folder inside of the class {label}: put its images directly into {path}, or name "
                f"{path} with --data if that is the data set"
            )
        if not inside:
            raise DataError(f"the class {label} is empty: put images into {path}, or remove it")
        files[label] = inside
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
    """Return the usable files, and the number of the others."""
    listing = [(part, label, path) for part, classes in files.items() for label in classes for path in classes[label]]
    pictures: list[_Picture] = []
    faults: list[str] = []
    decoded = 0
    for part, label, path in tqdm(listing, desc="checking images", unit="image", leave=False, disable=None):
        content = _content(path)
        try:
            pixels = decode_file(content)
        except InputError as error:
            faults.append(f"{path}: {error}")
            continue
        decoded += pixels.nbytes
        pictures.append(
            _Picture(
                path,
                label,
                part,
                hashlib.sha256(content).hexdigest(),
                (pixels.shape[0], pixels.shape[1], pixels.shape[2]),
                pixels if decoded <= CACHED_BYTES else None,
            )
        )
    if faults:
        shown = "\n  ".join([*faults[:FAULTS_NAMED], *(["..."] if len(faults) > FAULTS_NAMED else [])])
        if not options.skip_broken:
            raise DataError(
                f"{len(faults)} of {len(listing)} files cannot be used, since the service would refuse them:\n  "
                f"{shown}\nCorrect or remove them, or leave them out with --set skip_broken=true; supported formats: "
                f"{', '.join(FORMATS)}"
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
    """Return the digests of a class's test images: the share whose salted digests come first, at least one, not all."""
    copies = Counter(picture.digest for picture in members)
    if len(copies) < 2:
        found = "one image" if len(members) == 1 else f"{len(members)} copies of one image"
        raise DataError(
            f"the class {label} has {found} ({members[0].path}), and one image has to be held out for the test: add "
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
    images_NCHW = room_for((len(pictures), channels, *size))
    for n, picture in enumerate(tqdm(pictures, desc="resizing", unit="image", leave=False, disable=None)):
        pixels = picture.pixels if picture.pixels is not None else decode_file(_content(picture.path))
        # A copy, since torch warns of memory that it may not write to.
        images_NCHW[n] = torch.from_numpy(np.array(fit_image(pixels, channels, size)))
    number = {label: k for k, label in enumerate(labels)}
    return LabelledImages(images_NCHW, torch.tensor([number[p.label] for p in pictures], dtype=torch.int64))


def _card(
    directory: Path, parts: Mapping[str, Sequence[_Picture]], options: DataOptions, is_split: bool, skipped: int
) -> dict[str, Any]:
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
        "digest": {
            part: list_digest((f"{picture.label}/{picture.path.name}", picture.digest) for picture in found)
            for part, found in parts.items()
            if found
        },
        "split": {"test_share": options.test_share, "seed": options.split_seed} if is_split else None,
        "n_left_out": skipped,
        "n_in_train_and_test": len(shared),
        "preprocessing": DESCRIPTION,
        "options": options.model_dump(mode="json"),
    }


def list_digest(files: Iterable[tuple[str, str]]) -> str:
    """Return the sha256 of the sorted lines `class/file sha256` of a part.

    Args:
        files: `class/file` and sha256 of its content, of each file.
    """
    lines = sorted(f"{file} {digest}\n" for file, digest in files)
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
