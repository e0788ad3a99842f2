"""Images to attack: test images of the shipped models, as the service receives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.data.datasets import options_of
from models.evaluation.measure import labelled_images
from service.artefact.card import NOVELTY_LABELS, read_card
from service.inference.classifier import Classifier

_FOLDERS = {"cifar10": "cifar-10-batches-py"}


def classifiers(zoo: Path) -> list[str]:
    """Return the names of the artefacts with two classes or more; the others are novelty models."""
    return sorted(
        card.parent.name for card in zoo.glob("*/card.json") if tuple(read_card(card.parent).labels) != NOVELTY_LABELS
    )


def data_folder(classifier: Classifier, data: Path) -> Path:
    """Return the folder of the data set of a model, below a folder of data sets or that itself."""
    dataset = options_of(classifier.card.data, list(classifier.labels)).dataset
    names = (classifier.name, str(classifier.card.data["name"]), dataset, _FOLDERS.get(dataset, dataset))
    return next((data / name for name in names if (data / name).is_dir()), data)


def test_images(classifier: Classifier, data: Path, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return images in [0, 1], N x C x H x W, and labels of the test set of a model.

    Args:
        classifier: a shipped model.
        data: its data set, or a folder of data sets.
        most: of these images, evenly spaced; None for all.
    """
    found = labelled_images(classifier, data_folder(classifier, data), "test")
    count = min(most or len(found), len(found))
    chosen = found.at(torch.arange(count) * len(found) // count)
    return chosen.pixels(torch.float64).numpy(), chosen.labels_N.numpy()


def in_another_shape(image_NCHW: np.ndarray, channels: int, height: int, width: int, seed: int) -> np.ndarray:
    """Return the images resampled to another size, as 8-bit files hold them; grey becomes a tint."""
    tint_NC = np.random.default_rng(seed).uniform(0.5, 1.0, (len(image_NCHW), 3))
    resized = []
    for image_CHW, tint_C in zip(image_NCHW, tint_NC, strict=True):
        files = [Image.fromarray(np.rint(255 * channel_HW).astype(np.uint8)) for channel_HW in image_CHW]
        pixels_CHW = np.stack([file.resize((width, height), Image.Resampling.BICUBIC) for file in files]).astype(float)
        resized.append(np.rint(pixels_CHW * tint_C[:, None, None]) if channels > len(image_CHW) else pixels_CHW)
    return np.stack(resized) / 255
