"""A recipe for a folder of images, decided from the images, the time and the machine before the first step."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from models.data.folders import Folder, scan_folder
from models.data.symmetries import symmetries_of
from models.recipes import ImageRecipe, recipe_by_name
from models.runs import device_named, refuse_incomplete_windows
from models.sizing import image_shape, largest_batch, network_for, seconds_a_step
from models.training.checkpoints import saved_identity
from models.training.errors import TrainingError
from models.training.progress import format_duration

log = logging.getLogger(__name__)

LONGEST_SIDE = 224
"""Longest side of the images, in pixels, unless another is asked for."""
COMPARED = (400, 32)
"""Images in which symmetries are looked for, and their longest side in pixels."""
LARGEST_SHIFT = 4
"""Pixels by which training images are moved at most: the side of the largest windows, in which places differ."""
VALIDATION_SHARE = 0.15
"""Share of the training images that is held out to choose by."""
FEWEST_IMAGES = 20
"""Training images from which on some are held out."""
BATCHES = ((64, 128), (LONGEST_SIDE, 64))
"""Images of a step by the longest side of the images, in pixels: as many small ones take no more time."""
RATES_FOR = 32
"""Images of a step that the learning rates of the recipe are for; they grow with the root of the number."""
STEPS = 1500
"""Optimiser steps of a small set."""
PASSES = 12
"""Passes over the images of a large one."""
FEWEST_STEPS = 100
"""Steps below which a training is not worth its time."""
TRAINING_SHARE = 0.75
"""Of a budget; the rest is for reading images, validation, export and the measurement of the test set."""
FASTER = 1.1
"""Factor by which bfloat16 has to be faster than float32."""


def folder_name(directory: Path) -> str:
    """Return a name for the artefact of a folder of images."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("-._")[:100] or "images"


def plan_or_resume(
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
        overrides: `key=value`; those that contradict the earlier run are refused when its checkpoint is read.
        checkpoints: folder of the checkpoints of all runs.
        resume: whether an earlier run is continued.
        device_name: `auto`, `cpu` or `cuda`.
        threads: CPU threads; default: all.
        budget_s: seconds for the whole run; of no meaning for a run that is resumed.

    Raises:
        DataError, RecipeError, TrainingError: see `scan_folder`, `plan` and `saved_identity`.
    """
    asked = _recipe({}, overrides)
    folder = scan_folder(directory, asked.data_options())
    earlier = saved_identity(checkpoints / asked.name) if resume else None
    if earlier is not None:
        return _recipe(earlier["recipe"], overrides), folder
    if threads is not None:
        torch.set_num_threads(threads)
    return plan(folder, overrides, device=device_named(device_name), budget_s=budget_s), folder


def plan(
    folder: Folder, overrides: Sequence[str], *, device: torch.device, budget_s: float | None = None
) -> ImageRecipe:
    """Return the recipe `image-folder` adapted to a folder; fields in `overrides` stay as they are.

    Size, network, batches and held-out images follow from the images; precision and number of steps from steps that
    are timed here. The choices are logged.

    Args:
        folder: the images.
        overrides: `key=value`, see `models.recipes.recipe_by_name`.
        device: that trains.
        budget_s: seconds for the whole run; default: as many steps as the images need.

    Raises:
        RecipeError: an override does not fit.
        TrainingError: the budget is too short; the message states the time needed.
    """
    chosen: dict[str, Any] = {
        "channels": folder.options.channels,
        "network": network_for(max(folder.size_within(LONGEST_SIDE))).model_dump(mode="json"),
    }
    recipe = _recipe(chosen, overrides)
    chosen["image_size"] = folder.size_within(LONGEST_SIDE, recipe.network.multiple)
    images = len(folder.parts["train"])
    if images >= FEWEST_IMAGES:
        chosen["validation_images"] = max(len(folder.labels), round(VALIDATION_SHARE * images))
        chosen["schedule.keep"] = "best"
    recipe = _recipe(chosen, overrides)
    _, height, width = image_shape(recipe)
    refuse_incomplete_windows(height, width, recipe.network.multiple)
    chosen["augment.crop_padding"] = min(LARGEST_SHIFT, max(height, width) // 16)
    symmetries = [s for s in symmetries_of(folder.sample(*COMPARED)) if s != "transpose" or height == width]
    chosen |= {f"augment.{symmetry}": True for symmetry in symmetries}
    images -= recipe.validation_images + recipe.calibration_images
    batch = next((batch for side, batch in BATCHES if max(height, width) <= side), RATES_FOR)
    chosen["schedule.batch_size"] = batch = max(1, min(batch, images // 4, largest_batch(recipe)))
    for rate in ("learning_rate", "rotation_rate"):
        chosen[f"schedule.{rate}"] = getattr(recipe.schedule, rate) * math.sqrt(max(1.0, batch / RATES_FOR))
    classes = len(folder.labels)
    # One that is asked for is the only one.
    timed = {
        r.schedule.precision: r for r in (_recipe({**chosen, "schedule.precision": p}, overrides) for p in _PRECISIONS)
    }
    seconds = {precision: seconds_a_step(recipe, classes, device) for precision, recipe in timed.items()}
    full, half = (seconds.get(p, math.inf) for p in _PRECISIONS)
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
        height,
        width,
        recipe.channels,
        images,
        recipe.validation_images,
    )
    log.info(
        "network: %s; dense %s",
        "; ".join([*stages, f"pool {recipe.network.pool}"] if stages else ["no convolutions"]),
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


def _as_option(seconds: float) -> str:
    """Return a time as `--budget` takes it, rounded up."""
    return f"{math.ceil(seconds)}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"


def _affordable(wanted: int, each: float, budget_s: float) -> int:
    steps = int(TRAINING_SHARE * budget_s / each)
    if steps < FEWEST_STEPS:
        needed, good = (_as_option(n * each / TRAINING_SHARE) for n in (FEWEST_STEPS, wanted))
        raise TrainingError(
            f"a budget of {format_duration(budget_s)} is {steps} steps of {1e3 * each:.0f} ms: give --budget {needed} "
            f"or more, {good} for all {wanted} steps that these images deserve, or smaller images (--set image_size=64)"
        )
    return steps
