"""Pictures and tables of docs/choosing-epsilon.md: `python -m docs.choosing_epsilon --data DIR [--sizes DIR ...]`.

Draws images of the shipped models beside changes of exactly the sizes of their tables, and writes what each size is in
grey levels. `--sizes`: artefacts of one set, trained at several sizes of its images; their cards are the second table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.soundness.data import data_folder
from benchmarks.soundness.document import table, write_measured
from models.evaluation.figures import DPI, pyplot
from models.evaluation.measure import labelled_images
from service.inference.classifier import Classifier, counterfactuals
from service.pixels.distances import distance

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "choosing-epsilon.md"
PICTURE = ROOT / "docs" / "images" / "epsilon.png"
DRAWN = {"mnist": (0.3, 1.0, 1.58), "fashion-mnist-robust": (0.25, 0.5, 1.0), "malaria-cells": (0.05, 0.1, 0.25)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the pictures and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sizes", type=Path, nargs="*", default=[], help="artefacts of one set at several sizes")
    given = parser.parse_args(arguments)
    draw(given.data, PICTURE)
    shipped = [row for folder in sorted((ROOT / "models" / "zoo").glob("*/card.json")) for row in rows(folder.parent)]
    text = table(
        ["model", "pixels", "epsilon", "every pixel by, grey levels", "noise that wide, grey levels", "certified, %"],
        shipped,
    )
    if given.sizes:
        sizes = [size_row(folder) for folder in given.sizes]
        text += "\n\n" + table(["pixels", "accuracy, %", "certified, %", "median radius", "... in grey levels"], sizes)
    write_measured(PAGE, text)
    sys.stdout.write(f"{text}\n")


def rows(folder: Path) -> list[list[str]]:
    """Return a row for each epsilon of a card: its size, spread over all pixels, and what is certified there."""
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    shape = [card["input"][axis] for axis in ("channels", "height", "width")]
    levels = 255 / np.sqrt(np.prod(shape))
    return [
        [
            f"`{card['name']}`",
            " x ".join(map(str, shape)),
            f"{one['epsilon']:.4g}",
            f"{one['epsilon'] * levels:.2g}",
            f"{one['epsilon'] * levels * np.sqrt(12):.2g}",
            f"{100 * one['with_references']:.1f}",
        ]
        for one in card["certified_accuracy"]
    ]


def size_row(folder: Path) -> list[str]:
    """Return accuracy and radii of one artefact."""
    card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    shape = [card["input"][axis] for axis in ("channels", "height", "width")]
    certified = ", ".join(f"{100 * one['value']:.1f} at {one['epsilon']:.3g}" for one in card["certified_accuracy"])
    median = card["attacks"][0]["median_radius"]
    return [
        " x ".join(map(str, shape)),
        f"{100 * card['accuracy']:.1f}",
        certified,
        f"{median:.3f}",
        f"{255 * median / np.sqrt(np.prod(shape)):.2f}",
    ]


def draw(data: Path, file: Path) -> None:
    """Draw one image of each model, with noise of each size, and its nearest image of another class."""
    columns = 2 + max(map(len, DRAWN.values()))
    figure, axes = pyplot.subplots(len(DRAWN), columns, figsize=(2.1 * columns, 2.5 * len(DRAWN)))
    for line, (name, epsilons) in zip(axes, DRAWN.items(), strict=True):
        classifier = Classifier.load(ROOT / "models" / "zoo" / name, "cpu", threads=1)
        labels = classifier.labels
        image_1CHW, prediction = _certified_image(classifier, data, epsilons[-1])
        found = counterfactuals(classifier.view(image_1CHW.shape[1:]), image_1CHW, [prediction], [None])[0]
        shown = [(f"{labels[prediction.class_id]}, radius {prediction.radius:.2f}", image_1CHW[0])]
        shown += [(f"noise of {size:g}", _with_noise(image_1CHW, size)) for size in epsilons]
        shown += [(f"{labels[found.class_id]}, at {found.distance:.2f}", found.pixels_CHW / 255.0)]
        for axis, (title, pixels) in zip(line, shown, strict=True):
            axis.imshow(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(file, dpi=DPI // 2)
    pyplot.close(figure)


def _certified_image(classifier: Classifier, data: Path, epsilon: float) -> tuple[np.ndarray, Any]:
    """Return the first image of the test set that is right and certified at epsilon, and its prediction."""
    images = labelled_images(classifier, data_folder(classifier, data), "test")
    for number in range(len(images)):
        one = images.at(slice(number, number + 1))
        pixels = one.pixels(torch.float64).numpy()
        (prediction,) = classifier.predict(pixels)
        if prediction.class_id == int(one.labels_N[0]) and prediction.radius >= epsilon:
            return pixels, prediction
    raise SystemExit(f"no test image of {classifier.name} is certified at {epsilon}")


def _with_noise(image_1CHW: np.ndarray, size: float) -> np.ndarray:
    """Return the image with random noise whose L2 norm, inside the box, is `size`."""
    noise_CHW = np.random.default_rng(0).normal(size=image_1CHW.shape[1:])
    low, high = 0.0, 1e3
    for _ in range(60):
        scale = (low + high) / 2
        changed = np.clip(image_1CHW[0] + scale * noise_CHW, 0, 1)
        near = distance(image_1CHW[0], changed) < size
        low, high = (scale, high) if near else (low, scale)
    return np.clip(image_1CHW[0] + low * noise_CHW, 0, 1)


if __name__ == "__main__":
    main()
