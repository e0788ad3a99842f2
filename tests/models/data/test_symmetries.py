"""Symmetries are found in images, and used as changes of training images."""

from __future__ import annotations

import pytest
import torch

from models.data.augmentation import SYMMETRIES, Symmetry, augment, moved
from models.data.labelled import LabelledImages
from models.data.symmetries import symmetries_of
from models.recipes import Augment


def blobs(count: int, side: tuple[int, int] = (9, 9)) -> LabelledImages:
    """Two kinds of bright spots at any place: all symmetries."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 30, (count, 1, *side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    for n in range(count):
        y, x = (int(torch.randint(0, s - 2, (1,), generator=generator)) for s in side)
        images[n, 0, y : y + 2, x : x + 2] = 120 + 120 * int(labels[n])
    return LabelledImages(images, labels)


def half_lit(images: LabelledImages, *, left: bool) -> LabelledImages:
    """The same, with light that falls from one side."""
    lit = images.images_NCHW.clone()
    slope = torch.linspace(100, 0, lit.shape[3 if left else 2]).to(torch.uint8)
    return LabelledImages(lit // 2 + (slope if left else slope[:, None]), images.labels_N)


def test_symmetries_are_those_of_the_images() -> None:
    assert symmetries_of(blobs(200)) == list(SYMMETRIES)
    assert symmetries_of(half_lit(blobs(200), left=True)) == ["flip_vertical"]
    assert symmetries_of(half_lit(blobs(200), left=False)) == ["flip"]


def test_classes_that_mirroring_exchanges_are_not_mirrored() -> None:
    images = blobs(200)
    pixels = images.images_NCHW.clone()
    for n, label in enumerate(images.labels_N.tolist()):
        pixels[n, 0, :, 0 if label else -1] = 255
    assert symmetries_of(LabelledImages(pixels, images.labels_N)) == ["flip_vertical"]


def test_rows_and_columns_of_oblong_images_are_not_exchanged() -> None:
    assert symmetries_of(blobs(200, (9, 12))) == ["flip", "flip_vertical"]


def test_few_images_say_nothing() -> None:
    assert symmetries_of(blobs(19)) == []
    one_each = blobs(60)
    assert symmetries_of(LabelledImages(one_each.images_NCHW, torch.arange(60))) == []


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_half_of_the_training_images_are_moved(symmetry: Symmetry) -> None:
    images = blobs(300).pixels()
    changed = augment(images, Augment(**{symmetry: True}), torch.Generator().manual_seed(1))
    there = moved(images, symmetry)
    is_moved = torch.tensor([torch.equal(a, b) for a, b in zip(changed, there, strict=True)])
    is_kept = torch.tensor([torch.equal(a, b) for a, b in zip(changed, images, strict=True)])
    assert bool((is_moved | is_kept).all())
    assert 110 < int(is_moved.sum()) < 190
    assert torch.equal(moved(there, symmetry), images)
