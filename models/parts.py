"""Parts of recipes as frozen data: network, schedule, augmentation, generated negatives.

Importing this module loads no torch.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Change = Literal["patches", "blend", "invert", "paste", "erase", "turn", "warp"]
"""Changes of known images that make them novel, see `models.training.negatives`."""
Parametrisation = Literal["cayley", "stiefel"]
"""Of orthogonal matrices, see `models.nets.layers.linear.OrthogonalMatrix`."""


class Frozen(BaseModel):
    """Data that cannot be changed; an unknown field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Augment(Frozen):
    """Ranges of the random affine map, mirroring and cropping, see `models.data.augmentation.augment`."""

    rotation_degrees: float = Field(default=0.0, ge=0)
    scale: float = Field(default=0.0, ge=0, lt=1)
    shear: float = Field(default=0.0, ge=0)
    shift_pixels: float = Field(default=0.0, ge=0)
    flip: bool = False
    """Mirror every second image, left to right; not for digits and letters."""
    flip_vertical: bool = False
    """Mirror every second image, top to bottom."""
    transpose: bool = False
    """Exchange rows and columns of every second image, which must be square."""
    crop_padding: int = Field(default=0, ge=0)
    """Mirrored pixels added on every side before the image is cut out at a random place."""


class Schedule(Frozen):
    """One-cycle learning rates of Adam and of the descent on `stiefel` matrices."""

    epochs: int = Field(ge=1)
    steps: int | None = Field(default=None, ge=3)
    """Optimiser steps of all epochs together: few images are passed through several times an epoch, of many only a part
    is; default: each epoch is one pass."""
    batch_size: int = Field(default=512, ge=1)
    learning_rate: float = Field(default=4e-3, gt=0)
    """Highest rate of Adam, which trains all but the `stiefel` matrices."""
    rotation_rate: float = Field(default=0.03, gt=0)
    """Highest rate of `models.training.optimisers.StiefelMuon`, which turns the `stiefel` matrices; radians a step."""
    warm_up: float = Field(default=0.2, gt=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay a step of the exponential moving average of the weights, which is then evaluated and exported; default: no
    average."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """`bf16-mixed`: the products of the body in bfloat16, in training alone. Weights, head, loss, evaluation and export
    are unaffected."""
    keep: Literal["last", "best"] = "last"
    """Which epoch is exported: the last; or the one that certifies most held-out images at the largest of the epsilons
    that the set can reach (needs `validation_images`)."""
    patience: int | None = Field(default=None, ge=1)
    """With `keep=best`: epochs without a better one after which half of those that are left are skipped."""


class Stage(Frozen):
    """Orthogonal convolutions at one resolution, each followed by GroupSort2."""

    channels: int = Field(ge=2)
    blocks: int = Field(default=1, ge=1)
    window: int = Field(default=2, ge=1)
    """Side of the windows that first move into the channels (space-to-depth); 1 leaves the resolution as it is."""


class Network(Frozen):
    """A dense stack, after an optional convolutional stem."""

    stem: tuple[Stage, ...] = ()
    """Stages of the stem; an empty list is no stem."""
    pool: Literal["none", "max", "l2"] = "none"
    """Reduction of each channel after the stem: all its pixels; their maximum, which finds a small object anywhere; or
    their Euclidean norm."""
    widths: tuple[int, ...]
    """Features of each dense layer before the head."""
    activation: Literal["groupsort2", "fullsort"] = "groupsort2"
    """Of the dense layers; a stem always uses GroupSort2."""
    parametrisation: Parametrisation = "cayley"
    """Of all orthogonal matrices."""

    @property
    def multiple(self) -> int:
        """Number of which height and width of an image must be multiples."""
        return math.prod(stage.window for stage in self.stem)

    @model_validator(mode="after")
    def _pools_a_stem(self) -> Self:
        if self.pool != "none" and not self.stem:
            raise ValueError(f"pool={self.pool} pools the channels of a stem: set network.stem, or network.pool=none")
        return self


class Negatives(Frozen):
    """Images of the class novel, as many in each step as known ones: starts, and walks from them to the boundary."""

    noise: float = Field(default=0.5, ge=0, le=1)
    """Share of the starts that are noise; the others are changed known images."""
    changes: tuple[Change, ...] = ("patches", "blend", "invert", "paste", "erase")
    """Changes of known images, equally often; empty: all starts are noise."""
    steps: int = Field(default=4, ge=0)
    """Newton-Raphson steps of a walk; 0: the starts as they are."""
    reach: float = Field(default=1.0, gt=0, le=1)
    """Largest part of the way to the boundary that one step goes; each walk draws its own, uniformly below."""
