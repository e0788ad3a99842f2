"""Network, memory and time of a training, from the size of its images."""

from __future__ import annotations

import time

import torch

from models.memory import keep_freed_memory, machine_bytes
from models.nets.networks import build_network, outputs_for
from models.recipes import ImageRecipe, Network, Stage
from models.training.objective import objective_of
from models.training.outputs import Outputs

SMALLEST_SIDE = 6
"""Longest side, in pixels, from which on a network has convolutions."""
MEMORY_SHARE = 0.25
"""Of the memory of the machine, for the activations of a step."""
COPIES = 6
"""Tensors that a convolution and its activation keep for the gradient, each the size of the layer, roughly."""


def network_for(longest: int) -> Network:
    """Return a network that finds the difference of the classes anywhere in an image.

    Args:
        longest: side of the images, in pixels; large ones are cut into windows first, which loses nothing.
    """
    if longest < SMALLEST_SIDE:
        return Network(widths=(64, 64), parametrisation="stiefel")
    window = 1 if longest < 24 else 2 if longest <= 128 else 4
    return Network(
        stem=(Stage(channels=64, blocks=4, window=window),), pool="max", widths=(64,), parametrisation="stiefel"
    )


def image_shape(recipe: ImageRecipe) -> tuple[int, int, int]:
    """Return (C, H, W) of the images of a recipe that states size and channels."""
    size = recipe.image_size
    assert size is not None
    assert recipe.channels is not None
    return (recipe.channels, *((size, size) if isinstance(size, int) else size))


def largest_batch(recipe: ImageRecipe) -> int:
    """Return the number of images whose activations fit into the share of the memory.

    Args:
        recipe: with size, channels and network.
    """
    _, height, width = image_shape(recipe)
    numbers = 0
    for stage in recipe.network.stem:
        height, width = height // stage.window, width // stage.window
        numbers += stage.blocks * stage.channels * height * width
    return max(1, int(MEMORY_SHARE * machine_bytes() / (4 * COPIES * max(numbers, 1))))


def seconds_a_step(recipe: ImageRecipe, classes: int, device: torch.device) -> float:
    """Return the time of a step on random pixels, the shorter of two after a first.

    Args:
        recipe: with size, channels and network.
        classes: number of classes.
        device: that trains.
    """
    keep_freed_memory()
    with torch.random.fork_rng():
        network = build_network(recipe.network, image_shape(recipe), outputs_for(classes)).to(device)
    model, objective = Outputs(network, recipe.loss.reference_radius), objective_of(recipe.loss)
    images = torch.rand(recipe.schedule.batch_size, *image_shape(recipe), device=device)
    labels = torch.arange(len(images), device=device) % classes
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.schedule.precision == "bf16-mixed"):
            outputs = model(images, labels)
        loss = objective(network, outputs, labels)
        loss.backward()
        loss.item()
        times.append(time.perf_counter() - started)
    return min(times[1:])
