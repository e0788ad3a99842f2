"""Images to attack: the first ones of the MNIST test set, as the service receives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from models.data.published import load_mnist
from service.artefact.card import read_card


def test_images(artefact: Path, data: Path, n: int) -> np.ndarray:
    """The first n test images of the artefact's digits, N x 1 x 28 x 28 in [0, 1]; n = 0 for all."""
    _, test = load_mnist(data)
    images_NCHW = test.only([int(label) for label in read_card(artefact).labels]).images_NCHW.numpy()
    return images_NCHW[: n or None] / 255


def in_another_shape(image_N1HW: np.ndarray, channels: int, height: int, width: int, seed: int) -> np.ndarray:
    """The images resampled to another size, as 8-bit files of that size hold them, and tinted for three channels."""
    tint = np.random.default_rng(seed).uniform(0.5, 1.0, (len(image_N1HW), 3))
    resized = []
    for n, (image_HW,) in enumerate(image_N1HW):
        grey = Image.fromarray(np.rint(255 * image_HW).astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        pixels_CHW = np.asarray(grey)[None].astype(np.float64)
        resized.append(np.rint(pixels_CHW * tint[n, :, None, None]) if channels == 3 else pixels_CHW)
    return np.stack(resized) / 255
