"""The trial with own images: tiny sets of each kind, one epoch of the network that ours is compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.own_images.__main__ import pixels_of, shape_of_files
from benchmarks.own_images.cnn import accuracies, fit
from benchmarks.own_images.sets import PHOTOGRAPHS, TEXTURES, Sources, make_set

SHAPES = {
    "malaria": (1, 50, 50),
    "textures": (3, 128, 128),
    "textures-broken": (3, 128, 128),
    "castings": (3, 224, 224),
    "shapes": (3, 72, 96),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Noise instead of cells and photographs."""
    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("parasitized", "uninfected"):
            (folder / part / label).mkdir(parents=True)
            for n in range(4):
                noise = rng.integers(0, 256, (50, 50), np.uint8)
                Image.fromarray(noise).save(folder / part / label / f"{n}.png")
    for name in PHOTOGRAPHS.values():
        Image.fromarray(rng.integers(0, 256, (512, 512), np.uint8)).save(folder / name)
    return Sources(folder, folder, 0.01)


@pytest.mark.parametrize("name", SHAPES)
def test_a_set_is_a_folder_that_the_trainer_reads(name: str, sources: Sources, tmp_path: Path) -> None:
    folder = make_set(name, tmp_path, sources)
    channels, *size = SHAPES[name]
    assert shape_of_files(folder) == tuple(size)
    data = pixels_of(folder, SHAPES[name])
    assert data.train.images_NCHW.shape[1:] == (channels, *size)
    assert min(data.train.counts(len(data.labels))) > 0
    assert min(data.test.counts(len(data.labels))) > 0


def test_sets_are_the_same_each_time_and_independent_of_each_other(sources: Sources, tmp_path: Path) -> None:
    first, second = (make_set("shapes", tmp_path / name, sources) for name in ("a", "b"))
    files = [file.relative_to(first) for file in sorted(first.rglob("*.png"))]
    assert files == [file.relative_to(second) for file in sorted(second.rglob("*.png"))]
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_the_broken_files_are_the_only_difference(sources: Sources, tmp_path: Path) -> None:
    whole, broken = (make_set(name, tmp_path, sources) for name in ("textures", "textures-broken"))
    files = {file.relative_to(whole) for file in whole.rglob("*.*")}
    added = {file.relative_to(broken) for file in broken.rglob("*.*")} - files
    assert len(added) == len(TEXTURES) + 3
    assert {file.parts[0] for file in added} == {"train"}
    assert len(pixels_of(whole, (1, 8, 8)).train) == len(pixels_of(broken, (1, 8, 8)).train)


def test_the_ordinary_network_learns_what_is_bright(sources: Sources, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label, level in (("bright", 200), ("dark", 50)):
            (tmp_path / part / label).mkdir(parents=True)
            for n in range(16):
                # Files of one content are one image.
                Image.new("L", (8, 8), level + n).save(tmp_path / part / label / f"{n}.png")
    score = fit(pixels_of(tmp_path, None), epochs=8)
    assert (score.accuracy, score.balanced_accuracy, score.epochs) == (1.0, 1.0, 8)


def test_balanced_accuracy_weighs_classes_the_same() -> None:
    assert accuracies(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])) == (0.75, 0.5)
