"""A recipe for a folder of images, decided from the images, the time and the machine before the first step."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from models.data.folders import Folder, scan_folder
from models.data.symmetries import symmetries_of
from models.nets.networks import build_network
from models.recipes import ImageRecipe, Network, Stage, recipe_by_name
from models.runs import device_named
from models.training.errors import TrainingError
from models.training.memory import keep_freed_memory
from models.training.objective import objective_of
from models.training.progress import format_duration

log = logging.getLogger(__name__)

LONGEST_SIDE = 224
"""Longest side of the images, in pixels, if none is asked for."""
COMPARED = (400, 32)
"""Images in which symmetries are looked for, and their longest side in pixels."""
SMALLEST_SIDE = 6
"""Longest side, in pixels, from which on a network has convolutions."""
VALIDATION_SHARE = 0.15
"""Share of the training images that is held out to choose by."""
FEWEST_IMAGES = 20
"""Training images from which on some are held out."""
BATCH = 32
"""Images of a step."""
STEPS = 1500
"""Optimiser steps of a small set."""
PASSES = 12
"""Passes over the images of a large one."""
FEWEST_STEPS = 100
"""Steps below which a training is not worth its time."""
TRAINING_SHARE = 0.75
"""Of a budget; the rest is for reading images, validation, export and the measurement of the test set."""
MEMORY_SHARE = 0.25
"""Of the memory of the machine, for the activations of a step."""
COPIES = 6
"""Tensors that a convolution and its activation keep for the gradient, each the size of the layer, roughly."""
FASTER = 1.1
"""Factor by which bfloat16 has to be faster than float32."""


def network_for(longest: int) -> Network:
    """Return a network that finds what tells the classes apart anywhere in an image.

    Args:
        longest: side of the images, in pixels; large ones are cut into windows first, which loses nothing.
    """
    if longest < SMALLEST_SIDE:
        return Network(widths=(64, 64), parametrisation="stiefel")
    window = 1 if longest <= 64 else 2 if longest <= 128 else 4
    return Network(
        stem=(Stage(channels=64, blocks=4, window=window),), pool="max", widths=(64,), parametrisation="stiefel"
    )


def folder_name(directory: Path) -> str:
    """Return a name for the artefact of a folder of images."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("-._")[:100] or "images"


def plan_once(
    directory: Path,
    overrides: Sequence[str],
    *,
    checkpoints: Path,
    resume: bool,
    device_name: str = "auto",
    threads: int | None = None,
    budget_s: float | None = None,
) -> tuple[ImageRecipe, Folder]:
    """Return the recipe of a folder, and the folder; a run that is resumed gets the recipe that it began with.

    Args:
        directory: of the images.
        overrides: `key=value`.
        checkpoints: folder of the checkpoints of all runs; the recipe is kept there.
        resume: whether an earlier run is continued.
        device_name: `auto`, `cpu` or `cuda`.
        threads: CPU threads; default: all.
        budget_s: seconds for the whole run.

    Raises:
        DataError, RecipeError, TrainingError: see `scan_folder`, `plan`; the earlier run had other settings.
    """
    asked = recipe_by_name("image-folder", overrides)
    assert isinstance(asked, ImageRecipe)
    kept, settings = (
        checkpoints / asked.name / "plan.json",
        [*overrides, *([] if budget_s is None else [f"{budget_s:g} s"])],
    )
    folder = scan_folder(directory, asked)
    if resume and kept.exists():
        content = json.loads(kept.read_text())
        if content["settings"] != settings:
            raise TrainingError(
                f"the earlier run had other settings ({' '.join(content['settings']) or 'none'}): repeat them, or "
                "choose another --out"
            )
        return ImageRecipe.model_validate(content["recipe"]), folder
    if threads is not None:
        torch.set_num_threads(threads)
    recipe = plan(folder, overrides, device=device_named(device_name), budget_s=budget_s)
    if not kept.with_name("last.pt").exists():
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(
                json.dumps({"settings": settings, "recipe": recipe.model_dump(mode="json")}, indent=2) + "\n"
            )
        except OSError as error:
            raise TrainingError(
                f"{kept} cannot be written ({error.strerror}): name another folder with --out"
            ) from error
    return recipe, folder


def plan(
    folder: Folder, overrides: Sequence[str], *, device: torch.device, budget_s: float | None = None
) -> ImageRecipe:
    """Return the recipe `image-folder` adapted to a folder; what `overrides` state stays as it is.

    Size, network, batches and held-out images follow from the images; precision and number of steps from steps that
    are timed here. The choices are logged.

    Args:
        folder: the images.
        overrides: `key=value`, see `models.recipes.recipe_by_name`.
        device: that trains.
        budget_s: seconds for the whole run; default: as many steps as the images need.

    Raises:
        RecipeError: an override does not fit.
        TrainingError: the budget is too short; the message says what it would take.
    """
    chosen: dict[str, Any] = {
        "channels": folder.options.channels,
        "network": network_for(max(folder.size_within(LONGEST_SIDE))).model_dump(mode="json"),
    }
    recipe = _recipe(chosen, overrides)
    chosen["image_size"] = folder.size_within(LONGEST_SIDE, recipe.network.multiple)
    images = len(folder.parts()["train"])
    if images >= FEWEST_IMAGES:
        chosen["validation_images"] = max(len(folder.labels), round(VALIDATION_SHARE * images))
        chosen["schedule.keep"] = "best"
    recipe = _recipe(chosen, overrides)
    symmetries = symmetries_of(folder.sample(*COMPARED))
    chosen |= {f"augment.{symmetry}": True for symmetry in symmetries}
    images -= recipe.validation_images + recipe.calibration_images
    chosen["schedule.batch_size"] = max(1, min(BATCH, images // 4, _largest_batch(recipe)))
    seconds = {p: _seconds_a_step({**chosen, "schedule.precision": p}, overrides, folder, device) for p in _PRECISIONS}
    full, half = (seconds[p] for p in _PRECISIONS)
    chosen["schedule.precision"] = _PRECISIONS[full > FASTER * half]
    recipe = _recipe(chosen, overrides)
    each = seconds[recipe.schedule.precision]
    wanted = max(STEPS, PASSES * images // recipe.schedule.batch_size)
    if not any(override.startswith("schedule.epochs=") for override in overrides):
        chosen["schedule.steps"] = wanted if budget_s is None else _affordable(wanted, each, budget_s)
        recipe = _recipe(chosen, overrides)
    steps = recipe.schedule.steps or recipe.schedule.epochs * (images // recipe.schedule.batch_size)
    log.info("the images look alike when they are mirrored or turned: %s", ", ".join(symmetries) or "no")
    stages = [f"{s.blocks} convolutions of {s.channels} channels, windows of {s.window}" for s in recipe.network.stem]
    log.info(
        "%d classes of %d x %d pixels, %d channels; %d images to train on, %d to choose by",
        len(folder.labels),
        *_shape(recipe)[1:],
        recipe.channels,
        images,
        recipe.validation_images,
    )
    log.info(
        "network: %s; pool %s; dense %s",
        "; ".join(stages),
        recipe.network.pool,
        ", ".join(map(str, recipe.network.widths)),
    )
    log.info(
        "%d steps of %d images in %s (%.0f ms a step, %s), about %s with all that follows",
        steps,
        recipe.schedule.batch_size,
        recipe.schedule.precision,
        1e3 * each,
        ", ".join(f"{1e3 * s:.0f} in {p}" for p, s in seconds.items()),
        format_duration(steps * each / TRAINING_SHARE),
    )
    return recipe


_PRECISIONS = ("32-true", "bf16-mixed")


def _recipe(chosen: Mapping[str, Any], overrides: Sequence[str]) -> ImageRecipe:
    planned = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    recipe = recipe_by_name("image-folder", [*planned, *overrides])
    assert isinstance(recipe, ImageRecipe)
    return recipe


def _shape(recipe: ImageRecipe) -> tuple[int, int, int]:
    size = recipe.image_size
    assert size is not None
    assert recipe.channels is not None
    return (recipe.channels, *((size, size) if isinstance(size, int) else size))


def _largest_batch(recipe: ImageRecipe) -> int:
    """Return the images whose activations fit into the share of the memory."""
    _, height, width = _shape(recipe)
    numbers = 0
    for stage in recipe.network.stem:
        height, width = height // stage.window, width // stage.window
        numbers += stage.blocks * stage.channels * height * width
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, int(MEMORY_SHARE * memory / (4 * COPIES * max(numbers, 1))))


def _seconds_a_step(chosen: Mapping[str, Any], overrides: Sequence[str], folder: Folder, device: torch.device) -> float:
    """Return the time of a step on random pixels, the shorter of two after a first."""
    keep_freed_memory()
    recipe = _recipe(chosen, overrides)
    classes = len(folder.labels)
    with torch.random.fork_rng():
        network = build_network(recipe.network, _shape(recipe), 1 if classes == 2 else classes).to(device)
    objective = objective_of(recipe.loss)
    images = torch.rand(recipe.schedule.batch_size, *_shape(recipe), device=device)
    labels = torch.arange(len(images), device=device) % classes
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.schedule.precision == "bf16-mixed"):
            features = network.body(images)
        loss = objective(network, network.head(features.float()), labels)
        loss.backward()
        loss.item()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _affordable(wanted: int, each: float, budget_s: float) -> int:
    steps = int(TRAINING_SHARE * budget_s / each)
    if steps < FEWEST_STEPS:
        needed, good = (format_duration(n * each / TRAINING_SHARE) for n in (FEWEST_STEPS, wanted))
        raise TrainingError(
            f"a budget of {format_duration(budget_s)} is {steps} steps of {1e3 * each:.0f} ms: give --budget {needed} "
            f"or more, {good} for all {wanted} steps that these images deserve, or smaller images (--set image_size=64)"
        )
    return steps
