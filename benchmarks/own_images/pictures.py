"""Pixels of the images that are cut out of photographs or drawn.

Images are returned as H x W x 3 with values about [0, 255], neither rounded nor clipped; lengths are in pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

TEXTURE_SIDE = 128
CASTING_SIDE = 224
SCRATCH = (10, 80)
"""Least and greatest brightness of a scratch above the surface, of 255."""
HEIGHT, WIDTH = 72, 96
"""Of the drawn shapes."""


def texture(region_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square of 96 to 160 pixels of a grey region, resized, of random brightness, contrast, tint and noise."""
    side = int(rng.integers(96, 161))
    top, left = (int(rng.integers(0, length - side + 1)) for length in region_HW.shape)
    cut = Image.fromarray(region_HW[top : top + side, left : left + side].astype(np.float32))
    grey_HW = np.asarray(cut.resize((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.BICUBIC))
    grey_HW = (grey_HW - grey_HW.mean()) / grey_HW.std()
    pixels_HW = rng.uniform(90, 165) + rng.uniform(22, 42) * grey_HW
    pixels_HW3 = pixels_HW[..., None] * rng.uniform(0.75, 1.15, 3)
    return pixels_HW3 + rng.normal(0, rng.uniform(1, 7), pixels_HW3.shape)


def _smooth(rng: np.random.Generator, cells: int, side: int) -> np.ndarray:
    """Random values of standard deviation 1 on cells x cells points, interpolated to side x side."""
    coarse = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def casting(rng: np.random.Generator, *, scratched: bool) -> np.ndarray:
    """A grey surface, unevenly lit and noisy, with or without one bright scratch."""
    side = CASTING_SIDE
    rows, columns = np.mgrid[0:side, 0:side] / side - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    light_HW = rng.uniform(90, 150) + rng.uniform(0, 60) * (rows * np.sin(angle) + columns * np.cos(angle))
    surface_HW = light_HW + 5 * _smooth(rng, 8, side) + 4 * _smooth(rng, 56, side)
    if scratched:
        surface_HW = surface_HW + rng.uniform(*SCRATCH) * _scratch(rng, side)
    grey_HW = surface_HW + rng.normal(0, 8, (side, side))
    return np.repeat(grey_HW[..., None], 3, axis=2)


def _scratch(rng: np.random.Generator, side: int) -> np.ndarray:
    """Coverage, in [0, 1], of a line 15 to 60 pixels long and 2 to 3 pixels wide."""
    length, width, angle = rng.uniform(15, 60), rng.uniform(2, 3), rng.uniform(0, np.pi)
    half = length / 2 * np.array([np.cos(angle), np.sin(angle)])
    centre = rng.uniform(40, side - 40, 2)
    fine = Image.new("L", (4 * side, 4 * side))
    ends = [tuple(4 * (centre + sign * half)) for sign in (-1, 1)]
    ImageDraw.Draw(fine).line(ends, fill=255, width=round(4 * width))
    return np.asarray(fine.resize((side, side), Image.Resampling.BOX), dtype=np.float64) / 255


def shape(label: str, rng: np.random.Generator) -> np.ndarray:
    """A shape of random place, size, angle and colour on a background of another colour, four times supersampled."""
    colours = rng.uniform(30, 225, (2, 3))
    while np.abs(colours[0] - colours[1]).sum() < 120:
        colours = rng.uniform(30, 225, (2, 3))
    radius, angle = rng.uniform(12, 26), rng.uniform(0, 2 * np.pi)
    x, y = rng.uniform(radius, WIDTH - radius), rng.uniform(radius, HEIGHT - radius)
    mask = Image.new("L", (4 * WIDTH, 4 * HEIGHT))
    draw = ImageDraw.Draw(mask)

    def corners(radii: list[float]) -> list[tuple[float, float]]:
        turns = angle + 2 * np.pi * np.arange(len(radii)) / len(radii)
        return [(4 * (x + r * np.cos(t)), 4 * (y + r * np.sin(t))) for r, t in zip(radii, turns, strict=True)]

    if label in ("circle", "ring"):
        box = [4 * (x - radius), 4 * (y - radius), 4 * (x + radius), 4 * (y + radius)]
        draw.ellipse(box, fill=255 if label == "circle" else None, outline=255, width=round(1.4 * radius))
    elif label == "cross":
        ends = corners([radius] * 4)
        for k in (0, 1):
            draw.line([ends[k], ends[k + 2]], fill=255, width=round(2.2 * radius))
    else:
        draw.polygon(corners([radius] * (4 if label == "square" else 3)), fill=255)
    shape_HW1 = np.asarray(mask.resize((WIDTH, HEIGHT), Image.Resampling.BOX), dtype=np.float64)[..., None] / 255
    ground_HW3 = colours[0] + 12 * np.stack([_smooth(rng, 6, WIDTH)[:HEIGHT] for _ in range(3)], axis=2)
    return ground_HW3 + shape_HW1 * (colours[1] - colours[0]) + rng.normal(0, 15, (HEIGHT, WIDTH, 3))
