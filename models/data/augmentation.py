"""Random changes of training images that do not change their class: small affine maps, mirroring, cropping.

The random numbers come from a generator on the CPU: equal seeds give equal batches on any device.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped

from models.recipes import Augment

Symmetry = Literal["flip", "flip_vertical", "transpose"]
SYMMETRIES: tuple[Symmetry, ...] = ("flip", "flip_vertical", "transpose")


def moved(image_NCHW: Shaped[torch.Tensor, "N C H W"], symmetry: Symmetry) -> Shaped[torch.Tensor, "N C A B"]:
    """Return the images mirrored left to right, top to bottom, or with rows and columns exchanged.

    Args:
        image_NCHW: of any type.
        symmetry: name of the field of `Augment`.
    """
    if symmetry == "transpose":
        return image_NCHW.transpose(2, 3)
    return image_NCHW.flip(3 if symmetry == "flip" else 2)


def augment(
    image_NCHW: Float[torch.Tensor, "N C H W"], ranges: Augment, generator: torch.Generator
) -> Float[torch.Tensor, "N C H W"]:
    """Return the images, each after its own random affine map, mirroring and crop.

    Args:
        image_NCHW: pixels in [0, 1].
        ranges: of the changes; a range of 0 disables its change.
        generator: on the CPU.
    """
    if ranges.rotation_degrees or ranges.scale or ranges.shear or ranges.shift_pixels:
        image_NCHW = _affine(image_NCHW, ranges, generator)
    for symmetry in SYMMETRIES:
        if getattr(ranges, symmetry):
            chosen_N = torch.rand(len(image_NCHW), generator=generator) < 0.5
            moved_NCHW = moved(image_NCHW, symmetry)
            image_NCHW = torch.where(chosen_N.to(image_NCHW.device)[:, None, None, None], moved_NCHW, image_NCHW)
    if ranges.crop_padding:
        image_NCHW = _crop(image_NCHW, ranges.crop_padding, generator)
    return image_NCHW


def _affine(image_NCHW: torch.Tensor, ranges: Augment, generator: torch.Generator) -> torch.Tensor:
    """Rotate, scale, shear and shift, each uniform and symmetric in its range; bilinear, zero outside."""
    N, _, H, W = image_NCHW.shape
    angle, scale, shear, dx, dy = (2 * torch.rand(5, N, generator=generator) - 1).unbind()
    angle = angle * math.radians(ranges.rotation_degrees)
    scale = 1 + scale * ranges.scale
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    # affine_grid measures in halves of the image: 2 / W is one pixel.
    top = torch.stack([cosine, -sine + shear * ranges.shear, dx * ranges.shift_pixels * 2 / W], dim=1)
    bottom = torch.stack([sine, cosine, dy * ranges.shift_pixels * 2 / H], dim=1)
    theta = torch.stack([top, bottom], dim=1).to(image_NCHW)
    grid = F.affine_grid(theta, list(image_NCHW.shape), align_corners=False)
    return F.grid_sample(image_NCHW, grid, align_corners=False)


def _crop(image_NCHW: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random window, of the size of the image, of the image padded by its mirrored border."""
    N, C, H, W = image_NCHW.shape
    padding_H, padding_W = min(padding, H - 1), min(padding, W - 1)
    padded = F.pad(image_NCHW, (padding_W, padding_W, padding_H, padding_H), mode="reflect")
    top_N = torch.randint(2 * padding_H + 1, (N,), generator=generator)
    left_N = torch.randint(2 * padding_W + 1, (N,), generator=generator)
    rows_NH = (top_N[:, None] + torch.arange(H)).to(image_NCHW.device)
    columns_NW = (left_N[:, None] + torch.arange(W)).to(image_NCHW.device)
    image_N, channel_C = torch.arange(N, device=image_NCHW.device), torch.arange(C, device=image_NCHW.device)
    return padded[
        image_N[:, None, None, None],
        channel_C[None, :, None, None],
        rows_NH[:, None, :, None],
        columns_NW[:, None, None, :],
    ]
