"""Recipes are frozen data; an override fits or is refused. The toy problems reach their known answers."""

import json
import math
from pathlib import Path

import pytest
import torch
from commands import run_command
from pydantic import ValidationError

from models import runs
from models.__main__ import main
from models.nets.layers.convolution import OrthogonalConv2d
from models.nets.networks import build_network
from models.recipes import RECIPES, ImageRecipe, RecipeError, recipe_by_name
from models.toys import centred_square, squares_sampler, true_squares_distance, two_moons
from models.training.errors import Interrupted


def test_the_recipes_of_the_command_line_exist() -> None:
    assert set(RECIPES) == {
        "mnist-0-8",
        "mnist",
        "mnist-accurate",
        "mnist-robust",
        "fashion-mnist-accurate",
        "fashion-mnist-robust",
        "cifar10",
        "cifar10-cpu",
        "image-folder",
        "image-folder-novelty",
        "mnist-novelty",
        "one-class",
        "two-moons",
        "wasserstein-squares",
    }
    assert all(name == recipe.name for name, recipe in RECIPES.items())


def test_another_name_of_a_recipe_changes_only_the_name() -> None:
    alias, name = "fashion-mnist", "fashion-mnist-accurate"
    assert recipe_by_name(alias).name == alias
    assert recipe_by_name(alias, [f"name={name}"]) == RECIPES[name]


@pytest.mark.parametrize("name", ["mnist", "mnist-0-8"])
def test_shipped_classifiers_are_trained_with_an_hkr_loss(name: str) -> None:
    recipe = RECIPES[name]
    assert isinstance(recipe, ImageRecipe)
    assert recipe.loss.kind in {"hkr", "hkr_margin"}
    assert recipe.lipschitz_constant == 1.0


def test_recipes_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RECIPES["mnist"].lipschitz_constant = 2.0  # type: ignore[misc]


def test_overrides_reach_nested_fields_and_leave_the_recipe_alone() -> None:
    changed = recipe_by_name("mnist", ["schedule.epochs=3", "network.widths=[64, 32]", "augment=null"])
    assert isinstance(changed, ImageRecipe)
    assert changed.schedule.epochs == 3
    assert changed.network.widths == (64, 32)
    assert changed.augment is None
    assert RECIPES["mnist"] == recipe_by_name("mnist")


def test_setting_a_field_of_an_absent_group_makes_the_group() -> None:
    changed = recipe_by_name("mnist-0-8", ["augment.shift_pixels=1"])
    assert isinstance(changed, ImageRecipe)
    assert changed.augment is not None
    assert changed.augment.shift_pixels == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.marg=2", "loss.marg: Extra inputs"),
        ("loss.alpha=big", "loss.alpha"),
        ("loss.alpha=-1", "greater than or equal to 0"),
        ("loss.kind=softmax", "loss.kind"),
        ("schedule.epochs=0", "schedule.epochs"),
        ("loss", "key=value"),
        ("name.first=x", "no field of this recipe"),
        ("nothing.here=1", "no field of this recipe"),
        ("name=a b", "name: String should match pattern"),
        ("skip_broken=true", "skip_broken: only dataset=image-folder"),
        ("image_size=32", "image_size: only dataset=image-folder"),
        ("classes=[3]", "one class needs no classifier"),
        ("classes=[3,3]", "classes repeat"),
        ("epsilons=[]", "epsilons"),
        ("dataset=imagenet", "dataset"),
    ],
)
def test_override_that_does_not_fit_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_by_name("mnist", [override])


def test_classes_may_be_written_as_numbers() -> None:
    changed = recipe_by_name("mnist", ["classes=[3, 7]"])
    assert isinstance(changed, ImageRecipe)
    assert changed.classes == ("3", "7")


@pytest.mark.parametrize(
    ("accurate", "robust"), [("mnist-accurate", "mnist-robust"), ("fashion-mnist-accurate", "fashion-mnist-robust")]
)
def test_operating_points_of_a_data_set_measure_the_same(accurate: str, robust: str) -> None:
    one, other = RECIPES[accurate].model_dump(), RECIPES[robust].model_dump()
    held_out = {"validation_images", "calibration_images"}
    different = {key for key in one if one[key] != other[key]}
    assert different - held_out == {"name", "network", "loss", "augment", "schedule"}
    assert one["loss"]["min_margin"] < other["loss"]["min_margin"]


def test_unknown_recipe_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        RecipeError,
        match="mnist, mnist-0-8, mnist-accurate, mnist-novelty, mnist-robust, one-class, two-moons, wasser",
    ):
        recipe_by_name("mnist-1-7")


def test_recipe_builds_the_network_it_describes() -> None:
    recipe = recipe_by_name("mnist", ['network.stem=[{"channels":8,"blocks":2}]', "network.widths=[16]"])
    network = build_network(recipe.network, (1, 28, 28), 10)
    assert sum(isinstance(module, OrthogonalConv2d) for module in network.modules()) == 2
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_true_distance_of_the_squares_is_their_side() -> None:
    assert true_squares_distance(64, 35) == 35.0
    assert centred_square(64, 35).sum() == 35 * 35


def test_squares_come_half_black_and_a_quarter_of_each_sign() -> None:
    images, labels = squares_sampler(8, 3)(64, torch.Generator().manual_seed(0))
    sums = images.sum((1, 2, 3))
    assert [(sums == value).sum().item() for value in (0, 9, -9)] == [32, 16, 16]
    assert torch.equal(labels == 1, sums != 0)


def test_moons_without_noise_lie_on_their_half_circles() -> None:
    points, labels = two_moons(100, 0.0, torch.Generator().manual_seed(0))
    x, y = points[:, 0, 0].unbind(1)
    upper = torch.hypot(x, y)
    lower = torch.hypot(x - 1, y - 0.5)
    torch.testing.assert_close(torch.where(labels == 0, upper, lower), torch.ones(100))
    assert torch.where(labels == 0, y, 0.5 - y).min() >= -1e-6


def test_learned_distance_of_small_squares_is_within_half_a_percent(tmp_path: Path) -> None:
    arguments = ["train", "wasserstein-squares", "--out", str(tmp_path), "--threads", "1", "--epochs", "2"]
    changes = [
        "image_size=12",
        "square_size=7",
        "network.widths=[16,8]",
        "schedule.learning_rate=0.02",
        "steps_per_epoch=60",
    ]
    result = run_command(main, arguments + [part for change in changes for part in ("--set", change)])
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "wasserstein-squares" / "metrics.json").read_text())
    assert metrics["true_distance"] == 7.0
    assert abs(metrics["learned_distance"] - 7.0) <= 0.005 * 7.0
    # A 1-Lipschitz f cannot exceed the distance, up to the rounding of the weights.
    assert metrics["learned_distance"] <= 7.0 * (1 + 1e-6)
    assert math.isclose(metrics["relative_error"], abs(metrics["learned_distance"] - 7) / 7)


def test_distance_that_was_not_learned_fails_the_command(tmp_path: Path) -> None:
    arguments = ["train", "wasserstein-squares", "--out", str(tmp_path), "--threads", "1", "--epochs", "1"]
    changes = ["image_size=12", "square_size=7", "network.widths=[16,8]", "steps_per_epoch=2"]
    result = run_command(main, arguments + [part for change in changes for part in ("--set", change)])
    assert result.exit_code == 1
    assert "train longer" in result.output


def test_two_moons_draws_level_lines_and_transport(tmp_path: Path) -> None:
    arguments = ["train", "two-moons", "--out", str(tmp_path), "--threads", "1", "--epochs", "1"]
    result = run_command(main, [*arguments, "--set", "steps_per_epoch=5"])
    assert result.exit_code == 0, result.output
    for picture in ("levels.png", "transport.png"):
        assert (tmp_path / "two-moons" / picture).read_bytes().startswith(b"\x89PNG")
    assert 0 <= json.loads((tmp_path / "two-moons" / "metrics.json").read_text())["accuracy"] <= 1


def test_interrupted_command_exits_130_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **settings: object) -> str:
        raise Interrupted("stopped; run the same command with --resume to go on")

    monkeypatch.setattr(runs, "run_recipe", interrupted)
    result = run_command(main, ["train", "two-moons", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "--resume" in result.output


def test_error_of_the_command_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    result = run_command(main, ["train", "nonsense", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "error: no recipe 'nonsense'" in result.output
    assert "Traceback" not in result.output
