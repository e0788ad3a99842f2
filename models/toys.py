"""Two problems with a known answer: moons in the plane, and squares with a known Wasserstein distance.

Axes: N batch, D = 2 coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.nets.networks import LipschitzNetwork
from models.training.batches import Batch

MOONS_SHAPE = (1, 1, 2)
"""A point of the plane as an image of two pixels."""
GRID = 200
"""Points of the plot in each direction."""


def two_moons(size: int, noise: float, generator: torch.Generator) -> Batch:
    """Return points `N x 1 x 1 x 2` of two interleaved half-circles of radius 1, and labels: 0 upper, 1 lower moon.

    Args:
        size: number of points.
        noise: standard deviation of the Gaussian noise in each coordinate.
        generator: of the random numbers.
    """
    labels_N = torch.arange(size) % 2
    angle_N = math.pi * torch.rand(size, generator=generator)
    upper = torch.stack([torch.cos(angle_N), torch.sin(angle_N)], dim=1)
    lower = torch.stack([1 - torch.cos(angle_N), 0.5 - torch.sin(angle_N)], dim=1)
    point_ND = torch.where(labels_N[:, None] == 0, upper, lower)
    point_ND = point_ND + noise * torch.randn(size, 2, generator=generator)
    return point_ND[:, None, None, :], labels_N


def potential_and_gradient(
    network: LipschitzNetwork, point_NCHW: Float[Tensor, "N C H W"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N C H W"]]:
    """Return f and its gradient at each point, for a network with one output."""
    variable = point_NCHW.detach().requires_grad_()
    value_N = network(variable)[:, 0]
    (gradient,) = torch.autograd.grad(value_N.sum(), variable)
    return value_N.detach(), gradient


def plot_moons(network: LipschitzNetwork, batch: Batch, folder: Path) -> tuple[Path, Path]:
    """Write `levels.png` (level lines of f) and `transport.png` (points moved to `x - t f grad f`).

    Where f is the distance to the boundary `f = 0`, a point lands on it at t = 1 and beyond it at t = 2.

    Args:
        network: with one output f.
        batch: points and labels of `two_moons`.
        folder: of the plots; created if missing.
    """
    # Loaded here: no other training needs matplotlib, and it takes a second.
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    points, labels = batch
    x_N, y_N = points[:, 0, 0, 0].numpy(), points[:, 0, 0, 1].numpy()
    colours = np.where(labels.numpy() == 0, "tab:blue", "tab:orange")
    axis_x, axis_y = torch.linspace(-1.6, 2.6, GRID), torch.linspace(-1.1, 1.6, GRID)
    grid = torch.stack(torch.meshgrid(axis_x, axis_y, indexing="xy"), dim=-1).reshape(-1, 1, 1, 2)
    with torch.no_grad():
        level_HW = network(grid).reshape(GRID, GRID).numpy()

    levels_path, transport_path = folder / "levels.png", folder / "transport.png"
    figure = Figure(figsize=(7, 4.6))
    axes = figure.subplots()
    lines = axes.contour(axis_x, axis_y, level_HW, levels=15, cmap="coolwarm_r", linewidths=0.8)
    axes.contour(axis_x, axis_y, level_HW, levels=[0.0], colors="black", linewidths=2)
    axes.scatter(x_N, y_N, s=5, c=colours)
    axes.set(title="Level lines of f (black: f = 0)", aspect="equal")
    figure.colorbar(lines)
    figure.savefig(levels_path, dpi=120, bbox_inches="tight")

    value_N, gradient = potential_and_gradient(network, points)
    figure = Figure(figsize=(7, 4.6))
    axes = figure.subplots()
    axes.contour(axis_x, axis_y, level_HW, levels=[0.0], colors="black", linewidths=1)
    axes.scatter(x_N, y_N, s=8, c=colours)
    for t, marker in ((1, "."), (2, "x")):
        moved = (points - t * value_N[:, None, None, None] * gradient)[:, 0, 0].numpy()
        axes.scatter(moved[:, 0], moved[:, 1], s=10, c=colours, marker=marker, alpha=0.6, linewidths=0.8)
        for start, end, colour in zip(np.stack([x_N, y_N], 1), moved, colours, strict=True):
            axes.plot(*zip(start, end, strict=True), color=colour, linewidth=0.3, alpha=0.5)
    axes.set(title="x - t f(x) grad f(x): dots t = 1, crosses t = 2", aspect="equal")
    figure.savefig(transport_path, dpi=120, bbox_inches="tight")
    return levels_path, transport_path


def squares_sampler(image_size: int, square_size: int) -> Callable[[int, torch.Generator], Batch]:
    """Return a sampler of batches, half P (class 0: black), half Q (class 1: a centred square of +1 or -1, equal odds).

    `image_size` and `square_size` are sides in pixels.
    """
    square = centred_square(image_size, square_size)

    def sample(size: int, generator: torch.Generator) -> Batch:
        labels_N = torch.arange(size) % 2
        # Exactly half of Q has each sign, so that the mean over a batch has no noise from the signs.
        sign_N = torch.where(torch.arange(size) % 4 == 1, 1.0, -1.0)
        order = torch.randperm(size, generator=generator)
        images = (labels_N * sign_N)[:, None, None, None] * square
        return images[order], labels_N[order]

    return sample


def centred_square(image_size: int, square_size: int) -> Float[Tensor, "1 S S"]:
    """Return a black image with a square of ones in its middle; both sides in pixels."""
    image = torch.zeros(1, image_size, image_size)
    start = (image_size - square_size) // 2
    image[:, start : start + square_size, start : start + square_size] = 1.0
    return image


def true_squares_distance(image_size: int, square_size: int) -> float:
    """Return W1(P, Q) from its definition, the least mean cost over all couplings.

    P is one point, so there is one coupling, `P x Q`: the mean of `||0 - q||_2` over the two images of Q.
    """
    square = centred_square(image_size, square_size).double()
    costs = [torch.linalg.vector_norm(sign * square).item() for sign in (1.0, -1.0)]
    return sum(costs) / 2


def learned_squares_distance(network: LipschitzNetwork, image_size: int, square_size: int) -> float:
    """Return `E_P f - E_Q f` over the whole support, in float64; a lower bound of W1 for any 1-Lipschitz f.

    Args:
        network: f, with one output.
        image_size: side of the images, in pixels.
        square_size: side of the square, in pixels.
    """
    square = centred_square(image_size, square_size).double()
    images = torch.stack([torch.zeros_like(square), square, -square])
    with torch.no_grad():
        black, plus, minus = network.fold().cpu()(images)[:, 0].tolist()
    return black - (plus + minus) / 2
