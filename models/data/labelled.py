"""Images with labels, and a data set of them.

Axes: N images, C channels (1 grey, 3 RGB), H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor


class DataError(Exception):
    """The data set cannot be used; the message states the cure."""


@dataclass(frozen=True)
class LabelledImages:
    """8-bit images and their class numbers."""

    images_NCHW: UInt8[Tensor, "N C H W"]
    labels_N: Int64[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.labels_N)

    def pixels(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N C H W"]:
        """Return the pixels divided by 255."""
        return self.images_NCHW.to(dtype) / 255

    def at(self, chosen: Tensor | slice) -> LabelledImages:
        """Return the images at the chosen indices, in their order."""
        return LabelledImages(self.images_NCHW[chosen], self.labels_N[chosen])

    def only(self, classes: Sequence[int]) -> LabelledImages:
        """Return the images of the given classes, numbered in the given order."""
        renumbered = torch.full_like(self.labels_N, -1)
        for number, wanted in enumerate(classes):
            renumbered[self.labels_N == wanted] = number
        return LabelledImages(self.images_NCHW, renumbered).at(renumbered >= 0)

    def counts(self, classes: int) -> list[int]:
        """Return the number of images of each class."""
        return torch.bincount(self.labels_N, minlength=classes).tolist()

    def stratified(self, size: int, generator: torch.Generator) -> tuple[LabelledImages, LabelledImages]:
        """Return a random sample with each class in proportion, and the other images; both in the original order."""
        place_N = torch.empty(len(self), dtype=torch.float64)
        for label in self.labels_N.unique().tolist():
            members = (self.labels_N == label).nonzero()[:, 0]
            order = torch.randperm(len(members), generator=generator)
            place_N[members[order]] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[place_N.argsort(stable=True)[:size]] = True
        return self.at(chosen), self.at(~chosen)


@dataclass(frozen=True)
class DataSet:
    """Training and test set with the names of their classes, and their description for the card."""

    train: LabelledImages
    test: LabelledImages
    labels: tuple[str, ...]
    card: dict[str, Any] = field(default_factory=dict)
