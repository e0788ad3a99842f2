"""Known and novel classes of a data set: no novel image is trained on, and the card gives the same images again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from models.data.datasets import load_dataset, options_of  # noqa: E402
from models.data.labelled import DataError  # noqa: E402
from models.recipes import RECIPES, DataOptions, ImageRecipe, RecipeError, recipe_by_name  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes whose brightness is the class."""
    folder = tmp_path_factory.mktemp("images")
    for part, n in (("train", 5), ("test", 3)):
        for k, label in enumerate("abc"):
            (folder / part / label).mkdir(parents=True)
            for i in range(n):
                pixels = np.full((6, 6), 60 * k + 10 * i + (part == "test"), np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return folder


def options(**others: object) -> DataOptions:
    return DataOptions.model_validate({"dataset": "image-folder", "one_class": True, **others})


def test_known_classes_are_trained_on_and_the_others_are_novel_in_the_test_alone(folder: Path) -> None:
    found = load_dataset(options(classes=["b"]), folder)
    assert found.labels == ("known", "novel")
    assert found.train.labels_N.tolist() == [0] * 5
    assert set(found.train.images_NCHW.unique().tolist()) == {60 + 10 * i for i in range(5)}
    known_N = (found.test.images_NCHW[:, 0, 0, 0] - 1) // 60 == 1
    assert torch.equal(found.test.labels_N == 0, known_N)
    assert found.card["counts"] == {"train": {"known": 5}, "test": {"known": 3, "novel": 6}}


def test_all_classes_are_known_by_default(folder: Path) -> None:
    found = load_dataset(options(), folder)
    assert found.card["options"]["classes"] == ["a", "b", "c"]
    assert found.card["counts"] == {"train": {"known": 15}, "test": {"known": 9}}


def test_the_card_gives_the_same_images_again(folder: Path) -> None:
    found = load_dataset(options(classes=["c", "a"]), folder)
    again = load_dataset(options_of(found.card, list(found.labels)), folder, test_only=True)
    assert torch.equal(found.test.images_NCHW, again.test.images_NCHW)
    assert torch.equal(found.test.labels_N, again.test.labels_N)


def test_a_class_that_the_set_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="no class d: choose of a, b, c"):
        load_dataset(options(classes=["a", "d"]), folder)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("mnist", 'classes=["3"]', "one class needs no classifier"),
        ("mnist", "one_class=true", "one_class and negatives belong together"),
        ("one-class", "negatives=null", "one_class and negatives belong together"),
        ("one-class", "calibration_images=10", "leave keep=last, calibration_images=0"),
        ("one-class", "schedule.keep=best", "leave keep=last"),
        ("one-class", "negatives.noise=2", "negatives.noise"),
        ("one-class", 'negatives.changes=["shuffle"]', "negatives.changes"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(name: str, change: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        recipe_by_name(name, [change])


def test_the_recipes_of_novelty_models_train_one_output_by_hkr() -> None:
    found = [recipe for recipe in RECIPES.values() if isinstance(recipe, ImageRecipe) and recipe.one_class]
    assert {recipe.name for recipe in found} == {"one-class", "mnist-novelty", "image-folder-novelty"}
    assert {recipe.loss.kind for recipe in found} == {"hkr"}
