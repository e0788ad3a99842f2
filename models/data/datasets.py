"""Loading of a data set from the options of a recipe or of a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from models.data.folders import Folder, scan_folder
from models.data.labelled import DataError, DataSet, LabelledImages
from models.data.published import CIFAR10, FASHION_MNIST, MNIST, Published, load_cifar10, load_idx
from models.recipes import DataOptions
from service.artefact.card import NOVELTY_LABELS

PUBLISHED: dict[str, Published] = {"mnist": MNIST, "fashion-mnist": FASHION_MNIST, "cifar10": CIFAR10}


def load_dataset(
    options: DataOptions,
    directory: Path,
    *,
    multiple: int = 1,
    test_only: bool = False,
    folder: Folder | None = None,
) -> DataSet:
    """Return the images that `options` describe, and a card block from which `options_of` returns the same options.

    Args:
        options: a recipe, or its `DataOptions`.
        directory: of the files; a published set is downloaded to it where it is missing.
        multiple: divides the sides of the images, in pixels, where the options leave them open.
        test_only: the training set is not needed and may be empty.
        folder: result of `scan_folder` for the directory; default: it is read.

    Raises:
        DataError: the files are missing or unusable; the message names file and cure.
    """
    options = options.data_options()
    if options.one_class:
        every = options.model_copy(update={"one_class": False, "classes": None})
        found = load_dataset(every, directory, multiple=multiple, test_only=test_only, folder=folder)
        return _known_and_novel(found, options.classes)
    if options.dataset == "image-folder":
        folder = folder or scan_folder(directory, options, test_only=test_only)
        found = folder.load(options.image_size, multiple)
    else:
        found = _published(options, PUBLISHED[options.dataset], directory)
    counts = {
        part: dict(zip(found.labels, images.counts(len(found.labels)), strict=True))
        for part, images in (("train", found.train), ("test", found.test))
    }
    card = {
        "dataset": options.dataset,
        **found.card,
        "n_train": len(found.train),
        "n_test": len(found.test),
        "counts": counts,
    }
    return DataSet(found.train, found.test, found.labels, card)


def _known_and_novel(data: DataSet, known: Sequence[str] | None) -> DataSet:
    """Return the images of some classes as known and the others of the test set as novel; these are not trained on.

    Raises:
        DataError: the set has no such class.
    """
    known = tuple(known or data.labels)
    unknown = [label for label in known if label not in data.labels]
    if unknown:
        raise DataError(f"no class {', '.join(unknown)}: choose of {', '.join(data.labels)} (--set classes)")
    numbers = torch.tensor([data.labels.index(label) for label in known])
    known_N, test_N = (torch.isin(part.labels_N, numbers) for part in (data.train, data.test))
    train = LabelledImages(data.train.images_NCHW, torch.zeros_like(data.train.labels_N)).at(known_N)
    test = LabelledImages(data.test.images_NCHW, (~test_N).to(torch.int64))
    counts = {
        part: {label: n for label, n in zip(NOVELTY_LABELS, images.counts(2), strict=True) if n}
        for part, images in (("train", train), ("test", test))
    }
    options = {**data.card["options"], "classes": list(known), "one_class": True}
    card = {**data.card, "options": options, "n_train": len(train), "n_test": len(test), "counts": counts}
    return DataSet(train, test, NOVELTY_LABELS, card)


def options_of(data: Mapping[str, Any], labels: list[str]) -> DataOptions:
    """Return the options in the `data` block of a card.

    Raises:
        DataError: the card does not name its data set.
    """
    if "options" not in data and data.get("name") == MNIST.name:
        # Cards older than the support of other data sets.
        return DataOptions(dataset="mnist", classes=tuple(labels))
    try:
        return DataOptions.model_validate(data.get("options"))
    except ValidationError as error:
        raise DataError(
            f"the card does not say which images it is about (data.options: {error.errors()[0]['msg']}): evaluate an "
            "artefact that `python -m models train` wrote, or add the options"
        ) from error


def _published(options: DataOptions, published: Published, directory: Path) -> DataSet:
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory} is a file: name a folder with --data")
    labels = options.classes or published.labels
    unknown = [label for label in labels if label not in published.labels]
    if unknown:
        raise DataError(
            f"{published.name} has no class {', '.join(unknown)}: choose of {', '.join(published.labels)} "
            "(--set classes)"
        )
    load = load_cifar10 if published is CIFAR10 else load_idx
    train, test = load(directory, published)
    numbers = [published.labels.index(label) for label in labels]
    card = {
        **published.card,
        "preprocessing": None,
        "options": options.model_copy(update={"classes": tuple(labels)}).model_dump(mode="json"),
    }
    return DataSet(train.only(numbers), test.only(numbers), tuple(labels), card)
