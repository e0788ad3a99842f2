"""Sample images of shipped models, from their test sets: `python -m docs.samples ARTEFACT --data DIR`.

Writes `samples/NUMBER-CLASS.png` in the artefact (`service.artefact.samples`), and replaces those that are there: the
first images of each class in the test set, ten of ten classes and eight of two, whatever the model answers.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np

from models.data.datasets import load_dataset, options_of
from service.artefact.card import read_card
from service.artefact.samples import SAMPLES_FOLDER
from service.pixels.images import encode_png


def write_samples(artefact: Path, data: Path) -> None:
    """Write the samples of an artefact."""
    card = read_card(artefact)
    images = load_dataset(options_of(card.data, card.labels), data, test_only=True).test
    n_classes = len(card.labels)
    each = max(1, 8 // n_classes)
    folder = artefact / SAMPLES_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    chosen = [np.flatnonzero(images.labels_N.numpy() == k)[:each] for k in range(n_classes)]
    in_turn = [(k, chosen[k][turn]) for turn in range(each) for k in range(n_classes)]
    for number, (k, index) in enumerate(in_turn):
        (folder / f"{number}-{k}.png").write_bytes(encode_png(images.images_NCHW[index].numpy()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write sample images of an artefact.")
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    write_samples(arguments.artefact, arguments.data)
