"""Description of the images that a one-class training generates, as frozen data.

Importing this module loads no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Change = Literal["patches", "blend", "invert", "paste", "erase", "turn", "warp"]
"""Changes of known images that make them novel, see `models.training.negatives`."""


class Negatives(BaseModel):
    """Images of the class novel, as many in each step as known ones: starts, and walks from them to the boundary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    noise: float = Field(default=0.25, ge=0, le=1)
    """Share of the starts that are noise; the others are changed known images."""
    changes: tuple[Change, ...] = ("patches", "blend", "invert", "paste", "erase")
    """Changes of known images, equally often; empty: all starts are noise."""
    steps: int = Field(default=4, ge=0)
    """Newton-Raphson steps of a walk; 0: the starts as they are."""
    reach: float = Field(default=1.0, gt=0, le=1)
    """Largest part of the way to the boundary that one step goes; each walk draws its own, uniformly below."""
