"""Recipes of trainings as frozen data: every number of a run is here or on the command line, and in the card.

`--set key=value` replaces one field (nested fields with dots); a value that does not fit is refused. Importing this
module loads no torch, so that `--help` is fast.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from models.parts import Augment, Frozen, Negatives, Network, Schedule, Stage


class RecipeError(Exception):
    """No such recipe, or an override that does not fit; the message names the choices."""


class Loss(Frozen):
    """Choice among `models.training.losses`, and its parameters.

    `hkr`: two classes with one output, or each class against the rest. `hkr_margin`: on the deciding margin. `kr`: the
    Kantorovich-Rubinstein term alone, whose optimum is the Wasserstein distance. `soft_hkr`, `lse_hkr` and
    `margin_cross_entropy`: smooth in all classes, for two outputs or more (one output counts as two).
    """

    kind: Literal["hkr", "hkr_margin", "kr", "soft_hkr", "lse_hkr", "margin_cross_entropy"]
    alpha: float = Field(default=10.0, ge=0)
    """Weight of the hinge; not used by `kr` and `margin_cross_entropy`."""
    min_margin: float = Field(default=1.0, ge=0)
    """Margin from which an image pays no hinge, or the offset of `margin_cross_entropy`."""
    per_pair_bound: bool = False
    """`hkr_margin` and `margin_cross_entropy`: divide each margin by its constant `K_ij`, so that `min_margin` is a
    radius."""
    accuracy_alpha: float = Field(default=0.0, ge=0)
    accuracy_margin: float = Field(default=0.0, ge=0)
    """`hkr_margin` only: weight and margin of a second hinge near the boundary, for accuracy at small radii."""
    temperature: float = Field(default=0.3, gt=0)
    """Of `soft_hkr`, `lse_hkr` and `margin_cross_entropy`, in the unit of `min_margin`."""
    reference_radius: float | None = Field(default=None, gt=0)
    """`hkr_margin` and `margin_cross_entropy` with `per_pair_bound`: radius that may also be proved at a reference
    image, see `models.training.outputs`; a step takes twice the time. Default: margins at the images alone."""

    @model_validator(mode="after")
    def _reference_margins_are_radii(self) -> Self:
        if self.reference_radius is not None and not (
            self.per_pair_bound and self.kind in ("hkr_margin", "margin_cross_entropy")
        ):
            raise ValueError("reference_radius: set per_pair_bound, and kind=hkr_margin or margin_cross_entropy")
        return self


class Recipe(Frozen):
    """Fields of all recipes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Of the artefact and its folder, and of the model in requests to the service."""
    network: Network
    loss: Loss
    schedule: Schedule
    lipschitz_constant: float = 1.0
    """Declared Lipschitz constant of the body (several classes) or of f (one output); a network with a larger proved
    constant is not exported."""


Label = Annotated[str, Field(min_length=1, coerce_numbers_to_str=True)]
Side = Annotated[int, Field(ge=1, le=1024)]


class DataOptions(Frozen):
    """Choice of the images and their preprocessing; the card states it, so that evaluation uses the same.

    The fields from `image_size` on are for `image-folder` alone.
    """

    dataset: Literal["mnist", "fashion-mnist", "cifar10", "image-folder"]
    classes: tuple[Label, ...] | None = Field(default=None, min_length=1)
    """Labels of the classes to use, in order; default: all. Two classes give one output f, class 0 where f > 0. With
    `one_class` these are known, one or more, and the other classes of the set are novel."""
    one_class: bool = False
    """Two classes, known and novel, in place of those of the set; no novel image of the set is trained on."""
    image_size: Side | tuple[Side, Side] | None = None
    """Side, or height and width, to which all images are resized; default: their median size, at most 64, in whole
    windows of the network's stem."""
    channels: Literal[1, 3] | None = None
    """1 grey, 3 RGB; default: grey if all files are grey, else RGB."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of each class held out as the test set, where the folder has no `test`."""
    split_seed: int = 0
    """Seed of the train/test split."""
    skip_broken: bool = False
    """Leave out files that the service would refuse, instead of stopping; the card states their number."""
    source: str | None = None
    """Where the images come from, for the card."""
    licence: str | None = None
    """Their licence, for the card."""

    def data_options(self) -> DataOptions:
        """Return these fields alone; a recipe has others."""
        return DataOptions.model_validate({key: getattr(self, key) for key in DataOptions.model_fields})

    @model_validator(mode="after")
    def _options_of_a_folder_are_for_a_folder(self) -> Self:
        options = DataOptions.model_fields.keys() - {"dataset", "classes", "one_class"}
        set_here = [key for key in sorted(options) if getattr(self, key) != DataOptions.model_fields[key].default]
        if self.dataset != "image-folder" and set_here:
            raise ValueError(f"{', '.join(set_here)}: only dataset=image-folder has these options")
        return self

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> Self:
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes repeat: {', '.join(self.classes)}")
        if self.classes is not None and len(self.classes) < 2 and not self.one_class:
            raise ValueError("one class needs no classifier: name two classes or more, or take the recipe one-class")
        return self


class ImageRecipe(Recipe, DataOptions):
    """A classifier of images, exported as an artefact."""

    kind: Literal["images"] = "images"
    epsilons: tuple[Annotated[float, Field(ge=0)], ...] = Field(min_length=1)
    """Radii (L2, pixels in [0, 1]) of the reported certified accuracy; the last decides which epoch is best."""
    augment: Augment | None = None
    """Random changes of the training images; default: the images as they are."""
    train_images: int | None = Field(default=None, ge=1)
    """Number of training images, of each class its share, for a trial; default: all."""
    validation_images: int = Field(default=0, ge=0)
    """Number of images held out of the training set, of each class its share, for the figures during training; 0 trains
    on all."""
    calibration_images: int = Field(default=0, ge=0)
    """Number of images held out of the training set, drawn at random, for certified sets and decisions; with 0 half
    of the test set calibrates."""
    class_weights: Literal["auto", "balanced", "none"] = "auto"
    """`balanced`: an image of class k appears `n / (K n_k)` times an epoch in the mean, so that all classes weigh the
    same; `auto`: balanced if the largest class has more than 1.5 times the images of the smallest."""
    negatives: Negatives | None = None
    """Generated images of the class novel, with `one_class` alone."""

    @model_validator(mode="after")
    def _negatives_are_for_one_class(self) -> Self:
        if self.one_class != (self.negatives is not None):
            raise ValueError("one_class and negatives belong together: set both, or neither")
        if self.one_class and (self.calibration_images or self.schedule.keep == "best"):
            raise ValueError(
                "no novel image is held out of a one-class training: leave keep=last, calibration_images=0"
            )
        return self


class TwoMoonsRecipe(Recipe):
    """Two half-circles in the plane; the result is plots of f and of the transport instead of an artefact."""

    kind: Literal["two-moons"] = "two-moons"
    noise: float = 0.05
    """Standard deviation of the Gaussian noise; the half-circles have radius 1."""
    steps_per_epoch: int = 100


class SquaresRecipe(Recipe):
    """An oracle: W1 between a black image and a square of +1 or -1 (equal odds) is the square's side."""

    kind: Literal["wasserstein-squares"] = "wasserstein-squares"
    image_size: int = 64
    """Side of the images, in pixels."""
    square_size: int = 35
    """Side of the square, in pixels."""
    steps_per_epoch: int = 100
    tolerance: float = 0.005
    """Largest relative error of the learned distance; above it the run fails."""


AnyRecipe = ImageRecipe | TwoMoonsRecipe | SquaresRecipe


def _radius_loss(*, min_margin: float, alpha: float, accuracy_alpha: float, accuracy_margin: float) -> Loss:
    """Return hKR on the deciding margin with both margins as radii; sizes and weights choose the operating point."""
    return Loss(
        kind="hkr_margin",
        alpha=alpha,
        min_margin=min_margin,
        per_pair_bound=True,
        accuracy_alpha=accuracy_alpha,
        accuracy_margin=accuracy_margin,
    )


def _cross_entropy(
    *, min_margin: float, temperature: float, per_pair_bound: bool = True, reference_radius: float | None = None
) -> Loss:
    """Return cross-entropy with a margin: unlike a hinge, it bounds the pull of a mislabelled or ambiguous image."""
    return Loss(
        kind="margin_cross_entropy",
        min_margin=min_margin,
        temperature=temperature,
        per_pair_bound=per_pair_bound,
        reference_radius=reference_radius,
    )


def _dense(
    name: str,
    dataset: Literal["mnist", "fashion-mnist"],
    widths: tuple[int, ...],
    loss: Loss,
    augment: Augment | None,
    held_out: int = 0,
    **schedule: Any,
) -> ImageRecipe:
    return ImageRecipe(
        name=name,
        dataset=dataset,
        network=Network(widths=widths, parametrisation="stiefel"),
        loss=loss,
        schedule=_LARGE_BATCHES.model_copy(update=schedule),
        epsilons=(0.3, 1.0, 1.58) if dataset == "mnist" else (0.1, 0.25, 0.5, 1.0),
        augment=augment,
        validation_images=held_out,
        calibration_images=held_out,
    )


def _novelty(
    name: str, dataset: Literal["mnist", "image-folder"], width: int, negatives: Negatives, **schedule: Any
) -> ImageRecipe:
    return ImageRecipe(
        name=name,
        dataset=dataset,
        one_class=True,
        network=Network(widths=(width,) * 3, parametrisation="stiefel"),
        loss=Loss(kind="hkr", alpha=10.0, min_margin=1.0),
        schedule=Schedule(**schedule),
        epsilons=(36 / 255, 72 / 255, 0.5, 1.0),
        negatives=negatives,
    )


_SMALL_AFFINE = Augment(rotation_degrees=6.0, scale=0.06, shear=0.05, shift_pixels=0.8)
_MIRRORED = Augment(scale=0.03, shift_pixels=0.5, flip=True)
_LARGE_BATCHES = Schedule(epochs=20, batch_size=1024, learning_rate=8e-3, rotation_rate=0.06, precision="bf16-mixed")
_CIFAR_EPSILONS = (36 / 255, 72 / 255, 108 / 255)
_COLOUR = Augment(flip=True, crop_padding=3)

RECIPES: dict[str, AnyRecipe] = {
    recipe.name: recipe
    for recipe in (
        ImageRecipe(
            name="mnist-0-8",
            dataset="mnist",
            classes=("0", "8"),
            network=Network(widths=(256, 128, 64), parametrisation="stiefel"),
            loss=Loss(kind="hkr", alpha=100.0, min_margin=1.75),
            schedule=Schedule(epochs=20, batch_size=256),
            epsilons=(0.3, 1.0, 1.58),
        ),
        _dense(
            "mnist",
            "mnist",
            (768,) * 3,
            _radius_loss(min_margin=2.3, alpha=10.0, accuracy_alpha=15.0, accuracy_margin=0.5),
            _SMALL_AFFINE,
            epochs=40,
            precision="32-true",
        ),
        _dense(
            "mnist-accurate",
            "mnist",
            (768,) * 3,
            _cross_entropy(min_margin=0.7, temperature=0.12, per_pair_bound=False),
            _SMALL_AFFINE,
            epochs=12,
            precision="32-true",
        ),
        _dense(
            "fashion-mnist-accurate",
            "fashion-mnist",
            (1024,) * 3,
            _cross_entropy(min_margin=0.45, temperature=0.11, per_pair_bound=False),
            _MIRRORED,
            held_out=2000,
            epochs=20,
            precision="32-true",
        ),
        # At large radii a network is short of capacity, not of images: augmentation costs as much as it gives.
        _dense(
            "mnist-robust",
            "mnist",
            (1024,) * 5,
            _cross_entropy(min_margin=2.4, temperature=0.35, reference_radius=1.8),
            None,
            held_out=2000,
            epochs=40,
        ),
        _dense(
            "fashion-mnist-robust",
            "fashion-mnist",
            (1024,) * 5,
            _cross_entropy(min_margin=2.0, temperature=0.22, reference_radius=1.2),
            None,
            held_out=2000,
            epochs=14,
        ),
        ImageRecipe(
            name="cifar10",
            dataset="cifar10",
            network=Network(
                stem=(Stage(channels=256, blocks=4), Stage(channels=512, blocks=6), Stage(channels=512, blocks=2)),
                widths=(1024, 1024),
                parametrisation="stiefel",
            ),
            loss=_cross_entropy(min_margin=0.5, temperature=0.2, per_pair_bound=False),
            schedule=_LARGE_BATCHES.model_copy(update={"epochs": 150}),
            epsilons=_CIFAR_EPSILONS,
            augment=_COLOUR,
        ),
        ImageRecipe(
            name="cifar10-cpu",
            dataset="cifar10",
            network=Network(
                stem=(Stage(channels=128, blocks=2), Stage(channels=256), Stage(channels=64, window=1)),
                widths=(512,),
                parametrisation="stiefel",
            ),
            loss=_cross_entropy(min_margin=0.5, temperature=0.2, per_pair_bound=False),
            schedule=Schedule(epochs=30, batch_size=512, learning_rate=6e-3, rotation_rate=0.05),
            epsilons=_CIFAR_EPSILONS,
            augment=_COLOUR,
        ),
        ImageRecipe(
            name="image-folder",
            dataset="image-folder",
            network=Network(stem=(Stage(channels=64, blocks=4),), pool="max", widths=(64,), parametrisation="stiefel"),
            loss=_cross_entropy(min_margin=0.1, temperature=0.05),
            schedule=Schedule(epochs=20, batch_size=32, learning_rate=3e-3, rotation_rate=0.015, patience=4),
            epsilons=(0.05, 0.1, 0.25, 0.5, 1.0),
            augment=Augment(crop_padding=1),
        ),
        _novelty("one-class", "mnist", 256, Negatives(noise=0.1, changes=("warp", "paste")), epochs=4, batch_size=128),
        _novelty(
            "mnist-novelty",
            "mnist",
            256,
            Negatives(noise=0.25, changes=("warp", "paste", "patches", "invert")),
            epochs=4,
            batch_size=256,
        ),
        _novelty(
            "image-folder-novelty",
            "image-folder",
            128,
            Negatives(noise=0.4, changes=("warp", "patches", "invert")),
            epochs=8,
            batch_size=64,
        ),
        TwoMoonsRecipe(
            name="two-moons",
            network=Network(widths=(64, 64, 32)),
            loss=Loss(kind="hkr", alpha=50.0, min_margin=0.1),
            schedule=Schedule(epochs=20, batch_size=256),
        ),
        SquaresRecipe(
            name="wasserstein-squares",
            network=Network(widths=(128, 64, 32)),
            loss=Loss(kind="kr"),
            schedule=Schedule(epochs=4, batch_size=64),
        ),
    )
}

ALIASES = {"fashion-mnist": "fashion-mnist-accurate"}
"""Other names of recipes; the artefact gets the name that was asked for."""


def known_recipes() -> list[str]:
    """Return all names of recipes, sorted."""
    return sorted({*RECIPES, *ALIASES})


def recipe_by_name(name: str, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Return a recipe with `key=value` overrides applied.

    Values are read as JSON where they parse as JSON, as text otherwise: `schedule.epochs=8`,
    `network.widths=[64,64]`, `loss.kind=hkr`, `augment=null`.

    Raises:
        RecipeError: unknown recipe or key, or a value that does not fit the field.
    """
    if name not in known_recipes():
        raise RecipeError(
            f"no recipe {name!r} and no such folder: name a folder of images, or one of {', '.join(known_recipes())}"
        )
    recipe = RECIPES[ALIASES.get(name, name)].model_copy(update={"name": name})
    fields = recipe.model_dump(mode="json")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"--set {override!r} is not of the form key=value")
        *parents, last = key.split(".")
        target: Any = fields
        for parent in parents:
            if isinstance(target, dict) and parent in target and target[parent] is None:
                target[parent] = {}
            target = target.get(parent) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise RecipeError(
                f"--set {override!r}: {key!r} is no field of this recipe; its top-level fields are {', '.join(fields)}"
            )
        target[last] = _parse(text)
    try:
        return type(recipe).model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"recipe {name!r} does not accept {' '.join(overrides)}: {problems}") from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
