"""Generated images of a one-class training: noise and changed known images, walked to the boundary of the known ones.

A walk follows the gradient of f from a start with f < 0 towards f = 0, where the loss learns most: the complementary
distribution of Béthune, Novello, Coiffier, Boissin, Serrurier, Vincenot, Troya-Galvis, Robust one-class classification
with signed distance function using 1-Lipschitz neural networks, ICML 2023, section 3. There all starts are noise; the
changed known images are ours: they differ from known images in their arrangement alone, which noise never does.

Equal weights, seed, epoch and step give equal images. Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.parts import Change, Negatives
from models.training.batches import Batch, generator_for

KNOWN, NOVEL = 0, 1
"""Class numbers: f > 0 is class 0."""
_STREAM = 7
"""Of the random numbers, beside those of `models.training.batches`."""
_SIDES = (1, 2, 4, 7, 14, 28, 56)
"""Sides of the grids from which noise is enlarged, up to the side of the image."""
_LEAST_GRADIENT = 1e-6


@dataclass(frozen=True)
class NegativeImages:
    """Source of the novel images of each step."""

    negatives: Negatives
    seed: int

    def joined(self, network: nn.Module, known_NCHW: Float[Tensor, "N C H W"], epoch: int, step: int) -> Batch:
        """Return the known images of a step and as many novel ones, with their class numbers.

        Args:
            network: image -> f, one output.
            known_NCHW: pixels in [0, 1].
            epoch: counted from 0.
            step: within the epoch, counted from 0.
        """
        generator = generator_for(self.seed, _STREAM, epoch, step)
        reach_N = self.negatives.reach * torch.rand(len(known_NCHW), generator=generator).to(known_NCHW)
        novel_NCHW = starts(known_NCHW, self.negatives, generator)
        novel_NCHW = walked(network, novel_NCHW, reach_N, self.negatives.steps)
        labels_N = torch.full((2 * len(known_NCHW),), NOVEL, device=known_NCHW.device)
        labels_N[: len(known_NCHW)] = KNOWN
        return torch.cat([known_NCHW, novel_NCHW]), labels_N


def walked(
    network: nn.Module, start_NCHW: Float[Tensor, "N C H W"], reach_N: Float[Tensor, " N"], steps: int
) -> Float[Tensor, "N C H W"]:
    """Return the ends of walks towards f = 0 in the box [0, 1], each Newton-Raphson step `-reach f grad / ||grad||^2`.

    An image with f >= 0 stays: the network takes it for known, and nothing is harder.

    Args:
        network: image -> f, one output.
        start_NCHW: pixels in [0, 1].
        reach_N: part of each step that is gone.
        steps: number of steps.
    """
    images_NCHW = start_NCHW.detach()
    for _ in range(steps):
        images_NCHW.requires_grad_()
        f_N = network(images_NCHW)[:, 0].float()
        (gradient_NCHW,) = torch.autograd.grad(f_N.sum(), images_NCHW)
        square_N = gradient_NCHW.flatten(1).square().sum(1).clamp(min=_LEAST_GRADIENT)
        length_N = reach_N * f_N.detach().clamp(max=0) / square_N
        images_NCHW = (images_NCHW.detach() - length_N[:, None, None, None] * gradient_NCHW).clamp(0, 1)
    return images_NCHW


def starts(
    known_NCHW: Float[Tensor, "N C H W"], negatives: Negatives, generator: torch.Generator
) -> Float[Tensor, "N C H W"]:
    """Return the starts of the walks: noise, and known images each with one change.

    Args:
        known_NCHW: pixels in [0, 1].
        negatives: shares and changes.
        generator: on the CPU.
    """
    N = len(known_NCHW)
    changed = N - round(negatives.noise * N) if negatives.changes else 0
    known_NCHW = known_NCHW[torch.randperm(N, generator=generator).to(known_NCHW.device)]
    parts = [_noise(known_NCHW[changed:], generator)]
    for c, change in enumerate(negatives.changes):
        start, stop = (changed * part // len(negatives.changes) for part in (c, c + 1))
        if start < stop:
            parts.append(CHANGES[change](known_NCHW[start:stop], generator))
    return torch.cat(parts)


def _noise(like_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise with random grain, brightness and contrast; of every second image smooth blobs on one brightness."""
    N, C, H, W = like_NCHW.shape
    sides = [side for side in _SIDES if side < min(H, W)]
    noise_NCHW, mask_N1HW = torch.rand((N, C, H, W), generator=generator), torch.ones(N, 1, H, W)
    grain_N = torch.randint(len(sides) + 1, (2, N), generator=generator)
    for g, side in enumerate(sides):
        for part, (channels, mode) in enumerate(((C, "nearest"), (1, "bicubic"))):
            chosen_M = (grain_N[part] == g).nonzero()[:, 0]
            if len(chosen_M):
                coarse = torch.rand((len(chosen_M), channels, side, side), generator=generator)
                (noise_NCHW, mask_N1HW)[part][chosen_M] = F.interpolate(coarse, size=(H, W), mode=mode)
    low_N, high_N, level_N, share_N = torch.rand((4, N, 1, 1, 1), generator=generator)
    # Half of the images span all of [0, 1], and half of the backgrounds are black.
    low_N, high_N = torch.where(share_N < 0.5, 0.0, low_N), torch.where(share_N < 0.5, 1.0, high_N)
    level_N = level_N * (torch.rand((N, 1, 1, 1), generator=generator) < 0.5)
    is_blob_N = torch.rand((N, 1, 1, 1), generator=generator) < 0.5
    covered = mask_N1HW > 0.3 + 0.5 * torch.rand((N, 1, 1, 1), generator=generator)
    noise_NCHW = low_N + (high_N - low_N) * noise_NCHW
    return torch.where(is_blob_N & ~covered, level_N, noise_NCHW).to(like_NCHW)


def _patches(image_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images with their patches, 2 x 2 to 7 x 7 of one size, in a random order; a rest stays in place."""
    N, _, H, W = image_NCHW.shape
    made_NCHW = image_NCHW.clone()
    cells_N = torch.randint(2, 8, (N,), generator=generator)
    for cells in range(2, 8):
        chosen_M, h, w = (cells_N == cells).nonzero()[:, 0].to(image_NCHW.device), H // cells, W // cells
        if len(chosen_M) and h and w:
            inside = image_NCHW[chosen_M, :, : h * cells, : w * cells]
            patches = inside.unfold(2, h, h).unfold(3, w, w).flatten(2, 3)
            order_MP = torch.rand((len(chosen_M), cells**2), generator=generator).argsort(1).to(image_NCHW.device)
            moved = patches.take_along_dim(order_MP[:, None, :, None, None], dim=2).unflatten(2, (cells, cells))
            made_NCHW[chosen_M, :, : h * cells, : w * cells] = moved.transpose(3, 4).reshape(inside.shape)
    return made_NCHW


def _blend(image_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return means of two images, or their maximum."""
    other_NCHW = image_NCHW.roll(1, 0)
    maximum_N = torch.rand(len(image_NCHW), generator=generator).to(image_NCHW.device) < 0.5
    mean_NCHW = (image_NCHW + other_NCHW) / 2
    return torch.where(maximum_N[:, None, None, None], torch.maximum(image_NCHW, other_NCHW), mean_NCHW)


def _invert(image_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images with black and white exchanged, some of them with less contrast."""
    contrast_N = torch.rand(len(image_NCHW), generator=generator).to(image_NCHW)[:, None, None, None]
    return 1 - image_NCHW * (0.25 + 0.75 * contrast_N)


def _rectangle(image_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return a mask, N x 1 x H x W, of a rectangle with a quarter to three quarters of each side."""
    N, _, H, W = image_NCHW.shape
    inside: list[Tensor] = []
    for side in (H, W):
        size_N = (side * (0.25 + 0.5 * torch.rand(N, generator=generator))).ceil()
        low_N = ((side + 1 - size_N) * torch.rand(N, generator=generator)).floor()
        place_S = torch.arange(side)
        inside.append((place_S >= low_N[:, None]) & (place_S < (low_N + size_N)[:, None]))
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(image_NCHW.device)


def _paste(image_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images with a rectangle of another image."""
    return torch.where(_rectangle(image_NCHW, generator), image_NCHW.roll(1, 0), image_NCHW)


def _erase(image_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images with a rectangle of one brightness, every second time black."""
    N = len(image_NCHW)
    level_N = torch.rand(N, generator=generator) * (torch.rand(N, generator=generator) < 0.5)
    return torch.where(_rectangle(image_NCHW, generator), level_N.to(image_NCHW)[:, None, None, None], image_NCHW)


def _turn(image_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images mirrored or turned by a half, for images with an upright position."""
    kind_N = torch.randint(3, (len(image_NCHW),), generator=generator).to(image_NCHW.device)[:, None, None, None]
    mirrored, upside_down = image_NCHW.flip(3), image_NCHW.flip(2)
    turned = image_NCHW.flip(2, 3)
    return torch.where(kind_N == 0, mirrored, torch.where(kind_N == 1, upside_down, turned))


def _warp(image_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images after a strong random affine map and a smooth random displacement; zero outside."""
    N, _, H, W = image_NCHW.shape
    identity = torch.eye(2, 3).expand(N, 2, 3)
    theta = identity + 0.5 * (2 * torch.rand((N, 2, 3), generator=generator) - 1)
    field = 0.35 * (2 * torch.rand((N, 2, 4, 4), generator=generator) - 1)
    smooth = F.interpolate(field, size=(H, W), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(theta, [N, 1, H, W], align_corners=False) + smooth
    return F.grid_sample(image_NCHW, grid.to(image_NCHW), align_corners=False)


CHANGES: dict[Change, Callable[[Tensor, torch.Generator], Tensor]] = {
    "patches": _patches,
    "blend": _blend,
    "invert": _invert,
    "paste": _paste,
    "erase": _erase,
    "turn": _turn,
    "warp": _warp,
}
