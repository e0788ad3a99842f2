"""Labelled images that an artefact is measured on: those of its card, or a folder of other images of its classes.

A folder of other images is `DIR/<class>/*`, or `DIR/test/<class>/*`. Files are decoded and resized as the service does
with `resize=true`, rounded to 8 bits, as those of the card are.

Axes: N images, T training images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt64
from tqdm import tqdm

from models.data.folders import PARTS, entries, list_digest
from models.data.labelled import DataError, LabelledImages
from models.data.resizing import decode_file, fit_image
from service.errors import InputError

log = logging.getLogger(__name__)

REFUSED_NAMED = 10
"""Files that a message names."""
OTHER_SHARE = 0.1
"""Difference in the share of a class that a note states."""


class EvaluationError(Exception):
    """The artefact cannot be evaluated on this data; the message states the cure."""


class NotTheCardsImagesError(EvaluationError):
    """The images are not those that the card of the artefact is about."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size, with their source."""

    images: LabelledImages
    name: str
    """Of the data set or the folder."""
    of_the_card: bool
    """Whether the figures of the card are about these images."""
    files: tuple[str, ...] | None = None
    """`class/file` of each image; null where the images come from no folder that was read here."""
    digest: str | None = None
    """sha256 of the sorted lines `class/file sha256`, as in the card; null for the images of the card."""
    notes: tuple[str, ...] = ()
    """Sentences for the report."""
    trained_on: int | None = None
    """Number of images with the pixels of a training image, of the whole folder; null where that is not known."""

    def at(self, chosen_N: np.ndarray) -> ImageSet:
        """Return the images at the chosen indices."""
        files = None if self.files is None else tuple(self.files[n] for n in chosen_N.tolist())
        images = self.images.at(torch.from_numpy(chosen_N))
        return replace(self, images=images, files=files)

    def as_json(self, folder: Path) -> dict[str, Any]:
        """Return the description for a report.

        Args:
            folder: that the user named; a report has its last name alone, since artefacts are passed on.
        """
        return {
            "of_the_card": self.of_the_card,
            "name": self.name,
            "folder": folder.resolve().name,
            "n": len(self.images),
            "digest": self.digest,
            "n_trained_on": self.trained_on,
            "notes": list(self.notes),
        }


def evenly_spaced(wanted: int, available: int, option: str) -> np.ndarray:
    """Return `wanted` indices below `available`, evenly spaced: a test set may be sorted by class.

    Args:
        wanted: number of images.
        available: number of images in the test set.
        option: that asks for them, for the message.

    Raises:
        EvaluationError: `wanted` is above `available`.
    """
    if wanted > available:
        raise EvaluationError(f"{option} {wanted} asks for more than the {available} images there are: give fewer")
    return np.arange(wanted) * available // wanted


def holds_classes(directory: Path, labels: Sequence[str]) -> bool:
    """Return whether a folder, or its `test`, has a folder with the name of a class."""
    return any((directory / part / label).is_dir() for part in ("", "test") for label in labels)


def other_images(
    directory: Path,
    labels: Sequence[str],
    shape: tuple[int, int, int],
    trained_on: Mapping[str, Any],
    training_keys: UInt64[np.ndarray, " T"] | None = None,
) -> ImageSet:
    """Return all images of a folder of classes, converted to the input of a model.

    Files that the service would refuse are left out and named in the notes, and so is a class without images.

    Args:
        directory: holds one folder for each class, or a folder `test` that does.
        labels: of the model, in class order.
        shape: (C, H, W) of the input of the model.
        trained_on: the block `data` of the card.
        training_keys: `pixel_keys` of the training images; null where they are not known.

    Raises:
        EvaluationError: there is no such folder, a folder is no class of the model, or no image can be used.
    """
    root, notes = _root(directory, labels)
    listing = _listing(root, labels)
    pixels: list[np.ndarray] = []
    files: list[str] = []
    digests: list[str] = []
    numbers: list[int] = []
    refused: list[str] = []
    channels, *size = shape
    for label, path in tqdm(listing, desc="reading images", unit="image", leave=False, disable=None):
        try:
            content = path.read_bytes()
            fitted = fit_image(decode_file(content), channels, (size[0], size[1]))
        except (InputError, OSError, ValueError) as error:
            refused.append(f"{label}/{path.name}: {error}")
            continue
        pixels.append(fitted)
        numbers.append(labels.index(label))
        files.append(f"{label}/{path.name}")
        digests.append(hashlib.sha256(content).hexdigest())
    if refused:
        shown = "; ".join([*refused[:REFUSED_NAMED], *(["..."] if len(refused) > REFUSED_NAMED else [])])
        if not pixels:
            raise EvaluationError(f"none of the {len(refused)} files below {root} can be used: {shown}")
        notes.append(f"{len(refused)} of {len(listing)} files are left out, which the service refuses: {shown}.")
    missing = [label for k, label in enumerate(labels) if k not in set(numbers)]
    if missing:
        notes.append(f"No image of {', '.join(missing)}: nothing is known about {_these(missing)} here.")
    copies = len(digests) - len(set(digests))
    if copies:
        notes.append(f"{copies} images are copies of others of this folder, byte by byte.")
    shares = _other_shares(labels, numbers, (trained_on.get("counts") or {}).get("test") or {})
    if shares:
        notes.append(shares)
    digest = list_digest(zip(files, digests, strict=True))
    images = LabelledImages(torch.from_numpy(np.stack(pixels)), torch.tensor(numbers, dtype=torch.int64))
    known = None if training_keys is None else int(np.isin(pixel_keys(images), training_keys).sum())
    notes.append(known_about_training(digest, trained_on, len(images), known))
    if known is None and _name(directory) == trained_on.get("name"):
        notes.append("The folder has the name of the data set of the card: it may hold training images.")
    for note in notes:
        log.info("%s", note)
    return ImageSet(images, _name(directory), False, tuple(files), digest, tuple(notes), known)


def pixel_keys(images: LabelledImages) -> UInt64[np.ndarray, " N"]:
    """Return 64 bits of the sha256 of the converted pixels of each image, which recognise it under any file name."""
    return np.array(
        [
            int.from_bytes(hashlib.sha256(pixels_CHW.tobytes()).digest()[:8], "little")
            for pixels_CHW in images.images_NCHW.numpy()
        ],
        np.uint64,
    )


def known_about_training(digest: str, trained_on: Mapping[str, Any], n: int, known: int | None) -> str:
    """Return a sentence on whether the network was trained on these images.

    Args:
        digest: of the file list of these images.
        trained_on: the block `data` of the card.
        n: number of these images.
        known: how many have the pixels of an image of the training; null where these are not known.
    """
    stated = trained_on.get("digest") or {}
    if digest == stated.get("train"):
        return (
            "These are the training images of the card: the network was trained on them, and the figures are too good."
        )
    if digest == stated.get("test"):
        return "These are the test images of the card, which were not trained on."
    if known is not None:
        effect = "the figures are too good" if known else "a changed copy of one would not be recognised"
        return (
            f"{known} of {n} images have exactly the pixels of an image that was trained on, or held out of the "
            f"training to choose or calibrate by; {effect}."
        )
    if stated:
        return (
            "Whether some of these images were trained on is not known: the card states the digest of the whole list "
            "of training images, which is another one, and no digests of single files."
        )
    return "Whether some of these images were trained on is not known: the card states no digest of training images."


def _other_shares(labels: Sequence[str], numbers: Sequence[int], counts: Mapping[str, int]) -> str | None:
    """Return a sentence where the share of a class differs by more than ten points from that of the card's test set."""
    total = sum(counts.values())
    if not total or set(counts) != set(labels):
        return None
    here = [numbers.count(k) / len(numbers) for k in range(len(labels))]
    moved = [k for k, label in enumerate(labels) if abs(here[k] - counts[label] / total) > OTHER_SHARE]
    if not moved:
        return None
    shown = ", ".join(
        f"{labels[k]} {here[k]:.0%}, there {counts[labels[k]] / total:.0%}" for k in moved[:REFUSED_NAMED]
    )
    return (
        f"The classes have other shares than in the test set of the card ({shown}): accuracy moves with them, the "
        "recall of a class does not."
    )


def _root(directory: Path, labels: Sequence[str]) -> tuple[Path, list[str]]:
    names = {path.name for path in _entries(directory) if path.is_dir()}
    if not names or not names <= PARTS or names & set(labels):
        return directory, []
    if "test" not in names:
        raise EvaluationError(
            f"{directory} has the folders {', '.join(sorted(names))} and no test: name the one to measure, for example "
            f"--data {directory / sorted(names)[0]}"
        )
    others = sorted(names - {"test"})
    unused = f"; not measured: {', '.join(others)}" if others else ""
    return directory / "test", [f"The images are those of {directory.name}/test{unused}."]


def _listing(root: Path, labels: Sequence[str]) -> list[tuple[str, Path]]:
    """Return class and path of every file."""
    classes = {path.name: path for path in _entries(root) if path.is_dir()}
    shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
    unknown = sorted(set(classes) - set(labels))
    if unknown:
        raise EvaluationError(
            f"{root} has folders that are no class of this model: {', '.join(unknown)}; its classes are {shown}. "
            "Rename the folders, or move others away"
        )
    if not classes:
        raise EvaluationError(f"{root} has no folder of a class: put the images into folders named {shown}")
    listing: list[tuple[str, Path]] = []
    for label in labels:
        inside = _entries(classes[label]) if label in classes else []
        nested = next((entry for entry in inside if entry.is_dir()), None)
        if nested is not None:
            raise EvaluationError(
                f"{nested} is a folder inside of the class {label}: put its images directly into {classes[label]}"
            )
        listing += [(label, entry) for entry in inside]
    if not listing:
        raise EvaluationError(f"the folders of {root} are empty: put images into them")
    return listing


def _entries(directory: Path) -> list[Path]:
    try:
        return entries(directory)
    except DataError as error:
        raise EvaluationError(str(error)) from error


def _name(directory: Path) -> str:
    return directory.resolve().name or "images"


def _these(labels: Sequence[str]) -> str:
    return "this class" if len(labels) == 1 else "these classes"
