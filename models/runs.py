"""One function for each kind of recipe: data, network, training, and what is written at the end."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.data import MNIST_CARD, Augmentation, LabelledImages, load_mnist
from models.export import code_version, environment, export_artefact
from models.networks import LipschitzNetwork, convolutional_network, dense_network
from models.recipes import AnyRecipe, MnistRecipe, Network, SquaresRecipe, TwoMoonsRecipe
from models.toys import (
    MOONS_SHAPE,
    learned_squares_distance,
    plot_moons,
    squares_sampler,
    true_squares_distance,
    two_moons,
)
from models.training import (
    Batch,
    BatchSource,
    ImageBatches,
    Run,
    SampledBatches,
    TrainingError,
    fit,
    generator_for,
    objective_of,
)

log = logging.getLogger(__name__)

MNIST_SHAPE = (1, 28, 28)
MOONS_DRAWN = 400


@dataclass(frozen=True)
class _Setting:
    """What the command line adds to a recipe."""

    data: Path
    out: Path
    resume: bool
    seed: int
    device: torch.device


def run_recipe(
    recipe: AnyRecipe,
    *,
    data: Path,
    out: Path,
    resume: bool,
    seed: int,
    threads: int | None,
    device_name: str,
) -> str:
    """Train `recipe` and write its results to `out / recipe.name`.

    Returns:
        A summary for the terminal.

    Raises:
        DataError, TrainingError, Interrupted, ExportRefusedError, UnsupportedGraphError: see their modules.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    setting = _Setting(data, out, resume, seed, _device(device_name))
    match recipe:
        case MnistRecipe():
            return _train_digits(recipe, setting)
        case TwoMoonsRecipe():
            return _train_moons(recipe, setting)
        case SquaresRecipe():
            return _train_squares(recipe, setting)


def _train_digits(recipe: MnistRecipe, setting: _Setting) -> str:
    train, test = load_mnist(setting.data)
    train, test = train.only(recipe.digits), test.only(recipe.digits)
    train, validation = _split(train, recipe.validation_images)
    augmentation = Augmentation(**recipe.augment.model_dump()) if recipe.augment is not None else None
    outputs = 1 if len(recipe.digits) == 2 else len(recipe.digits)
    run = replace(
        _run(recipe, setting, ImageBatches(train, recipe.schedule.batch_size, setting.seed, augmentation)),
        epsilons=recipe.epsilons,
        validation=validation,
    )
    trained = fit(build_network(recipe.network, MNIST_SHAPE, outputs), run, resume=setting.resume)
    folder = setting.out / recipe.name
    measured = export_artefact(
        trained.network.cpu(),
        folder,
        labels=[str(digit) for digit in recipe.digits],
        lipschitz_constant=recipe.lipschitz_constant,
        test=test,
        epsilons=recipe.epsilons,
        data={**MNIST_CARD, "n_train": len(train), "n_test": len(test)},
        recipe=recipe.model_dump(mode="json"),
        seed=setting.seed,
        wall_time_s=trained.seconds,
    )
    certified = ", ".join(f"{v:.2%} at {e:g}" for e, v in measured.certified_accuracy.items())
    return f"{folder}: accuracy {measured.accuracy:.2%}, certified {certified} (n = {measured.n}, proved radius)"


def _train_moons(recipe: TwoMoonsRecipe, setting: _Setting) -> str:
    def sample(size: int, generator: torch.Generator) -> Batch:
        return two_moons(size, recipe.noise, generator)

    batches = SampledBatches(sample, recipe.schedule.batch_size, recipe.steps_per_epoch, setting.seed)
    network = build_network(recipe.network, MOONS_SHAPE, 1)
    trained = fit(network, _run(recipe, setting, batches), resume=setting.resume)
    network = trained.network.cpu()
    points, labels = sample(MOONS_DRAWN, generator_for(setting.seed, 3))
    plots = plot_moons(network, (points, labels), setting.out / recipe.name)
    with torch.no_grad():
        accuracy = ((network(points)[:, 0] > 0) == (labels == 0)).double().mean().item()
    _write_metrics(recipe, setting, {"accuracy": accuracy, "n": MOONS_DRAWN}, trained.seconds)
    return f"accuracy {accuracy:.2%} on {MOONS_DRAWN} fresh points; {', '.join(map(str, plots))}"


def _train_squares(recipe: SquaresRecipe, setting: _Setting) -> str:
    size, side = recipe.image_size, recipe.square_size
    sample = squares_sampler(size, side)
    batches = SampledBatches(sample, recipe.schedule.batch_size, recipe.steps_per_epoch, setting.seed)
    run = replace(_run(recipe, setting, batches), classifies=False)
    trained = fit(build_network(recipe.network, (1, size, size), 1), run, resume=setting.resume)
    true, learned = true_squares_distance(size, side), learned_squares_distance(trained.network, size, side)
    error = abs(learned - true) / true
    metrics = {"true_distance": true, "learned_distance": learned, "relative_error": error}
    _write_metrics(recipe, setting, metrics, trained.seconds)
    if error > recipe.tolerance:
        raise TrainingError(
            f"the learned distance {learned:.4f} is {error:.2%} from the true {true:.4f}, allowed is "
            f"{recipe.tolerance:.2%}: train longer (--epochs)"
        )
    return f"W1 true {true:.4f}, learned {learned:.4f}, relative error {error:.4%}"


def _identity(recipe: AnyRecipe, setting: _Setting) -> dict[str, Any]:
    return {"recipe": recipe.model_dump(mode="json"), "seed": setting.seed}


def _run(recipe: AnyRecipe, setting: _Setting, batches: BatchSource) -> Run:
    return Run(
        batches=batches,
        objective=objective_of(recipe.loss),
        schedule=recipe.schedule,
        # Beside the artefacts but hidden: a server that is pointed at `out` must not take it for one.
        checkpoints=setting.out / ".checkpoints" / recipe.name,
        identity=_identity(recipe, setting),
        device=setting.device,
    )


def build_network(network: Network, input_shape: tuple[int, int, int], outputs: int) -> LipschitzNetwork:
    """Assemble the network that a recipe describes; initial weights come from torch's global generator."""
    if network.stem_channels:
        return convolutional_network(
            input_shape,
            network.stem_channels,
            network.stem_blocks,
            network.widths,
            outputs,
            parametrisation=network.parametrisation,
        )
    return dense_network(
        input_shape,
        network.widths,
        outputs,
        activation=network.activation,
        parametrisation=network.parametrisation,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "--device cuda: torch sees no CUDA device; install a CUDA build of torch, or use --device cpu"
        )
    return torch.device(name)


def _split(train: LabelledImages, held_out: int) -> tuple[LabelledImages, LabelledImages | None]:
    if held_out == 0:
        return train, None
    if held_out >= len(train):
        raise TrainingError(f"validation_images={held_out} leaves nothing of {len(train)} images to train on")
    cut = len(train) - held_out
    return (
        LabelledImages(train.images_NHW[:cut], train.labels_N[:cut]),
        LabelledImages(train.images_NHW[cut:], train.labels_N[cut:]),
    )


def _write_metrics(recipe: AnyRecipe, setting: _Setting, metrics: dict[str, Any], wall_time_s: float) -> None:
    folder = setting.out / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    origin = {"code_version": code_version(), "environment": environment(wall_time_s)}
    content = {**metrics, **_identity(recipe, setting), **origin}
    (folder / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")
