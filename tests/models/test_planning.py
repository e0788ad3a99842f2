"""The recipe of a folder of images follows from the images, the time and the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models import memory, planning
from models.data.folders import scan_folder
from models.planning import folder_name, plan, plan_or_resume
from models.recipes import DataOptions, ImageRecipe, RecipeError
from models.sizing import network_for
from models.training.errors import TrainingError

CPU = torch.device("cpu")


def write(folder: Path, classes: dict[str, int], size: tuple[int, int] = (12, 10), mode: str = "L") -> Path:
    """Write images that all differ."""
    for k, (label, count) in enumerate(classes.items()):
        (folder / label).mkdir(parents=True)
        for n in range(count):
            colour = (100 * k + n % 100) if mode == "L" else (100 * k, n % 256, n // 256)
            image = Image.new(mode, size, colour)
            if size != (1, 1):
                image.putpixel((n % size[0], 0), 255 if mode == "L" else (255, 255, 255))
            image.save(folder / label / f"{n}.png")
    return folder


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of a step in each precision, as if they had been measured."""
    seconds = {"32-true": 0.1, "bf16-mixed": 0.2}

    def measured(recipe: ImageRecipe, *_others: Any) -> float:
        return seconds[recipe.schedule.precision]

    monkeypatch.setattr(planning, "seconds_a_step", measured)
    return seconds


def planned(folder: Path, *overrides: str, budget_s: float | None = None) -> ImageRecipe:
    found = scan_folder(folder, DataOptions(dataset="image-folder"))
    return plan(found, overrides, device=CPU, budget_s=budget_s)


def test_a_small_set_gets_steps_a_validation_part_and_its_own_size(tmp_path: Path, timed: dict[str, float]) -> None:
    recipe = planned(write(tmp_path, {"a": 60, "b": 40}))
    assert recipe.image_size == (10, 12)
    assert recipe.channels == 1
    # 80 of the 100 images train or choose: 12 choose.
    assert recipe.validation_images == 12
    assert recipe.schedule.batch_size == 17
    assert recipe.schedule.steps == planning.STEPS
    assert recipe.schedule.learning_rate == 3e-3
    assert recipe.schedule.keep == "best"


def test_the_faster_precision_is_taken_and_float32_where_they_are_alike(
    tmp_path: Path, timed: dict[str, float]
) -> None:
    folder = write(tmp_path, {"a": 30, "b": 30})
    assert planned(folder).schedule.precision == "32-true"
    timed["bf16-mixed"] = 0.095
    assert planned(folder).schedule.precision == "32-true"
    timed["bf16-mixed"] = 0.05
    assert planned(folder).schedule.precision == "bf16-mixed"
    assert planned(folder, "schedule.precision=32-true").schedule.precision == "32-true"


def test_rates_grow_with_the_root_of_the_batch(tmp_path: Path, timed: dict[str, float]) -> None:
    schedule = planned(write(tmp_path, {"a": 400, "b": 400})).schedule
    assert schedule.batch_size == 128
    assert schedule.learning_rate == pytest.approx(2 * 3e-3)
    assert schedule.rotation_rate == pytest.approx(2 * 0.015)


def test_what_is_asked_for_stays(tmp_path: Path, timed: dict[str, float]) -> None:
    recipe = planned(
        write(tmp_path, {"a": 30, "b": 30}),
        "image_size=8",
        "network.pool=none",
        "network.widths=[8]",
        "schedule.batch_size=5",
        "validation_images=3",
        "schedule.epochs=2",
    )
    assert (recipe.image_size, recipe.network.pool, recipe.network.widths) == (8, "none", (8,))
    assert (recipe.schedule.batch_size, recipe.validation_images, recipe.schedule.steps) == (5, 3, None)
    with pytest.raises(RecipeError, match="no field of this recipe"):
        planned(tmp_path, "nonsense.size=3")


def test_a_budget_decides_the_steps_and_one_that_is_too_short_says_what_it_takes(
    tmp_path: Path, timed: dict[str, float]
) -> None:
    folder = write(tmp_path, {"a": 30, "b": 30})
    steps = planned(folder, budget_s=60).schedule.steps
    assert steps is not None
    assert steps * 0.1 == pytest.approx(60 * planning.TRAINING_SHARE)
    with pytest.raises(TrainingError, match=r"a budget of 5 s is 37 steps .*: give --budget 14s or more, 4m for all"):
        planned(folder, budget_s=5)


def test_large_images_are_made_smaller_and_cut_into_whole_windows(tmp_path: Path, timed: dict[str, float]) -> None:
    recipe = planned(write(tmp_path, {"a": 4, "b": 4}, (450, 300), "RGB"))
    assert recipe.image_size == (148, 224)
    assert recipe.network.multiple == 4
    # Too few images to hold some out.
    assert recipe.validation_images == 0
    assert recipe.schedule.keep == "last"


def test_images_of_one_pixel_get_a_network_without_convolutions(tmp_path: Path, timed: dict[str, float]) -> None:
    assert network_for(1).stem == ()
    assert planned(write(tmp_path, {"a": 30, "b": 30}, (1, 1))).image_size == (1, 1)


def test_batches_fit_into_the_memory(tmp_path: Path, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, {"a": 100, "b": 100})
    # 4 layers of 64 channels on 120 pixels, six copies of four bytes: 0.74 MB an image.
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 8 * 737_280 // 4096 * 4}
    monkeypatch.setattr(memory.os, "sysconf", pages.__getitem__)
    assert planned(folder).schedule.batch_size == 8


def test_a_resumed_run_gets_the_recipe_it_began_with(tmp_path: Path, timed: dict[str, float]) -> None:
    folder, checkpoints = write(tmp_path / "my images", {"a": 30, "b": 30}), tmp_path / "out"
    overrides = [f"name={folder_name(folder)}", "loss.min_margin=0.2"]
    first, _ = plan_or_resume(folder, overrides, checkpoints=checkpoints, resume=True, budget_s=60)
    identity = json.dumps({"recipe": first.model_dump(mode="json"), "seed": 0})
    (checkpoints / "my-images").mkdir(parents=True)
    torch.save({"identity": identity}, checkpoints / "my-images" / "last.pt")
    timed["bf16-mixed"] = 0.01
    again, _ = plan_or_resume(folder, overrides, checkpoints=checkpoints, resume=True)
    assert first == again
    other, _ = plan_or_resume(folder, [*overrides, "loss.alpha=3"], checkpoints=checkpoints, resume=True)
    assert other == first.model_copy(update={"loss": first.loss.model_copy(update={"alpha": 3.0})})
    (checkpoints / "my-images" / "last.pt").write_bytes(b"half of it")
    with pytest.raises(TrainingError, match="cannot be read"):
        plan_or_resume(folder, overrides, checkpoints=checkpoints, resume=True)


@pytest.mark.parametrize(("name", "expected"), [("my images!", "my-images"), ("été", "t"), ("x" * 250, "x" * 100)])
def test_an_artefact_is_named_after_its_folder(tmp_path: Path, name: str, expected: str) -> None:
    assert folder_name(tmp_path / name) == expected
    assert folder_name(tmp_path / name / "..") == folder_name(tmp_path)
    assert folder_name(Path("/")) == "images"
