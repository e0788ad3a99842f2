"""TODO: models/data/labelled.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor


class DataError(Exception):
    """The data set cannot be used; the message says what to do."""


@dataclass(frozen=True)
class LabelledImages:
    """Images as their 8-bit pixels, and class numbers."""

    images_NCHW: UInt8[Tensor, "N C H W"]
    labels_N: Int64[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.labels_N)

    def pixels(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N C H W"]:
        """Pixels divided by 255."""
        return self.images_NCHW.to(dtype) / 255

    def at(self, chosen: Tensor | slice) -> LabelledImages:
        """The images at these places, in this order."""
        return LabelledImages(self.images_NCHW[chosen], self.labels_N[chosen])

    def only(self, classes: Sequence[int]) -> LabelledImages:
        """Keep the given classes and number them in the given order."""
        renumbered = torch.full_like(self.labels_N, -1)
        for number, wanted in enumerate(classes):
            renumbered[self.labels_N == wanted] = number
        kept = renumbered >= 0
        return LabelledImages(self.images_NCHW[kept], renumbered[kept])

    def counts(self, classes: int) -> list[int]:
        """Number of images of each class."""
        return torch.bincount(self.labels_N, minlength=classes).tolist()

    def stratified(self, share: int, generator: torch.Generator) -> tuple[LabelledImages, LabelledImages]:
        """Split at random into `share` images, of each class in proportion, and the rest; both in the old order."""
        place_N = torch.empty(len(self), dtype=torch.float64)
        for label in self.labels_N.unique().tolist():
            members = (self.labels_N == label).nonzero()[:, 0]
            order = torch.randperm(len(members), generator=generator)
            place_N[members[order]] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[place_N.argsort(stable=True)[:share]] = True
        return self.at(chosen), self.at(~chosen)


@dataclass(frozen=True)
class DataSet:
    """Training and test set with the names of their classes, and what the card says of them."""

    train: LabelledImages
    test: LabelledImages
    labels: tuple[str, ...]
    card: dict[str, Any] = field(default_factory=dict)
