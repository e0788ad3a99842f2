"""A training from recipe to result, one function for each kind of recipe: data, network, training, export."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models.data.datasets import load_dataset
from models.data.folders import Folder
from models.data.labelled import DataSet, LabelledImages
from models.evaluation.page import write_report_page
from models.export import code_version, emit_graph, environment, export_artefact, prove
from models.nets.layers.convolution import CHANNEL_ORDER
from models.nets.networks import LipschitzNetwork, build_network, outputs_for
from models.recipes import AnyRecipe, ImageRecipe, SquaresRecipe, TwoMoonsRecipe
from models.toys import (
    MOONS_SHAPE,
    learned_squares_distance,
    plot_moons,
    squares_sampler,
    true_squares_distance,
    two_moons,
)
from models.training.batches import (
    Batch,
    BatchSource,
    ImageBatches,
    SampledBatches,
    calibration_split,
    generator_for,
)
from models.training.errors import TrainingError
from models.training.loop import Run, Trained
from models.training.negatives import NegativeImages
from models.training.nodes import ALONE, Nodes
from models.training.objective import objective_of
from models.training.processes import fit_on

log = logging.getLogger(__name__)

FEWEST_STEPS = 4
"""Fewest batches of one pass over the images; a data set that gives fewer is cut into smaller ones."""
UNBALANCED = 1.5
"""Ratio of the largest class to the smallest above which `class_weights=auto` balances the classes."""
MOONS_TEST_POINTS = 400
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


@dataclass(frozen=True)
class _Options:
    """Options of the command line that are not part of the recipe."""

    data: Path
    out: Path
    resume: bool
    seed: int
    threads: int | None
    device: torch.device
    devices: int
    nodes: Nodes
    tensorboard: bool
    block: int | None
    folder: Folder | None


def run_recipe(
    recipe: AnyRecipe,
    *,
    data: Path,
    out: Path,
    resume: bool,
    seed: int,
    threads: int | None,
    device_name: str,
    devices: int = 1,
    nodes: Nodes = ALONE,
    tensorboard: bool = True,
    block: int | None = None,
    folder: Folder | None = None,
) -> str:
    """Train a recipe, write the results to `out / recipe.name` and return a summary for the terminal.

    Args:
        recipe: with all overrides applied.
        data: folder of the data set.
        out: folder of results and checkpoints.
        resume: continue from the last checkpoint.
        seed: of initial weights, order and augmentation.
        threads: CPU threads of each process; default: all.
        device_name: `auto`, `cpu` or `cuda`.
        devices: number of processes on each node, each with its share of every batch.
        nodes: that train together; the first alone writes results.
        tensorboard: write curves beside the checkpoints.
        block: export in float32, with blocks of this many columns; default: in float64.
        folder: result of `models.data.folders.scan_folder` for `data`, so that it is not read again.

    Raises:
        DataError, TrainingError, Interrupted, ExportRefusedError, PrecisionError, UnsupportedModelError: see their
            modules.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    device = device_named(device_name)
    _warn_without_bfloat16(recipe, device)
    options = _Options(data, out, resume, seed, threads, device, devices, nodes, tensorboard, block, folder)
    _refuse_unwritable(out)
    if block is not None and not isinstance(recipe, ImageRecipe):
        raise TrainingError(f"{recipe.name} is a toy problem, whose network is not exported: leave --precision out")
    match recipe:
        case ImageRecipe():
            return _train_images(recipe, options)
        case TwoMoonsRecipe():
            return _train_moons(recipe, options)
        case SquaresRecipe():
            return _train_squares(recipe, options)


def _train_images(recipe: ImageRecipe, options: _Options) -> str:
    multiple = recipe.network.multiple
    data = load_dataset(recipe, options.data, multiple=multiple, folder=options.folder)
    train, validation = _training_images(recipe, data, options.seed)
    input_shape = _input_shape(data, multiple)
    if recipe.augment is not None and recipe.augment.transpose and input_shape[1] != input_shape[2]:
        raise TrainingError(
            f"augment.transpose exchanges rows and columns, but the images are {input_shape[1]} x {input_shape[2]}: "
            "leave it out, or choose a square image_size"
        )
    outputs = outputs_for(len(data.labels))
    counts = train.counts(len(data.labels))
    weights = None if recipe.one_class else class_weights(recipe, counts)
    recipe, batches = _batches(recipe, train, options.seed, weights)
    run = replace(
        _run(recipe, options, batches),
        epsilons=recipe.epsilons,
        validation=validation,
        negatives=None if recipe.negatives is None else NegativeImages(recipe.negatives, options.seed),
    )
    if "digest" in data.card:
        run = replace(run, identity={**run.identity, "data": data.card["digest"]})
    network = build_network(recipe.network, input_shape, outputs)
    # A network that the server cannot certify is refused before the training, not hours later.
    prove(network, emit_graph(network), recipe.lipschitz_constant)
    trained = _fit(network, run, options)
    if not options.nodes.is_first:
        return _trained_for_first(options)
    folder = options.out / recipe.name
    card = {
        **data.card,
        "n_train": len(train),
        "n_validation": 0 if validation is None else len(validation),
        **({"n_calibration": recipe.calibration_images} if recipe.calibration_images else {}),
        "counts": {**data.card["counts"], "train": {k: n for k, n in zip(data.labels, counts, strict=True) if n}},
    }
    if weights is not None:
        card["class_weights"] = dict(zip(data.labels, weights, strict=True))
    try:
        measured = export_artefact(
            trained.network.cpu(),
            folder,
            labels=list(data.labels),
            lipschitz_constant=recipe.lipschitz_constant,
            test=data.test,
            epsilons=recipe.epsilons,
            data=card,
            recipe=recipe.model_dump(mode="json"),
            seed=options.seed,
            wall_time_s=trained.seconds,
            devices=_devices(options),
            block=options.block,
        )
    except OSError as error:
        raise TrainingError(
            f"the artefact {folder} cannot be written ({error.strerror}); the checkpoints are in {run.checkpoints}: "
            "make room or repair the folder, then run the same command with --resume"
        ) from error
    page = write_report_page(folder, data, trained.history, data=options.data)
    if page is not None:
        log.info("report: %s", page)
    certified = ", ".join(f"{v:.2%} at {e:g}" for e, v in measured.certified_accuracy.items())
    return f"{folder}: accuracy {measured.accuracy:.2%}, certified {certified} (n = {measured.n}, proved radius)"


def class_weights(recipe: ImageRecipe, counts: Sequence[int]) -> list[float] | None:
    """Return how often an image of each class appears in an epoch, `n / (K n_k)` in the mean; absent: once each.

    Raises:
        TrainingError: a class has no image.
    """
    if min(counts) == 0:
        raise TrainingError(f"a class has no image to train on (images of each class: {counts}): use more images")
    unbalanced = max(counts) > UNBALANCED * min(counts)
    if recipe.class_weights == "none" or (recipe.class_weights == "auto" and not unbalanced):
        return None
    return [sum(counts) / (len(counts) * count) for count in counts]


def _training_images(recipe: ImageRecipe, data: DataSet, seed: int) -> tuple[LabelledImages, LabelledImages | None]:
    train, validation = data.train, None
    least = len(train.labels_N.unique())
    wanted = recipe.calibration_images + recipe.validation_images + (recipe.train_images or least)
    if wanted > len(train):
        held_out = f"calibration_images={recipe.calibration_images}, " if recipe.calibration_images else ""
        raise TrainingError(
            f"{held_out}validation_images={recipe.validation_images} and "
            f"train_images={recipe.train_images or 'all'} need {wanted} images at least, the training set has "
            f"{len(train)}: ask for fewer"
        )
    if recipe.calibration_images:
        _, train = calibration_split(train, recipe.calibration_images, seed)
    if recipe.validation_images:
        validation, train = train.stratified(recipe.validation_images, generator_for(seed, 4))
    if recipe.train_images is not None:
        train, _ = train.stratified(recipe.train_images, generator_for(seed, 5))
    return train, validation


def _batches(
    recipe: ImageRecipe, train: LabelledImages, seed: int, weights: Sequence[float] | None
) -> tuple[ImageRecipe, ImageBatches]:
    """Return the recipe, with smaller batches where there are too few images for `FEWEST_STEPS`, and the batches."""
    schedule = recipe.schedule
    fitting = max(1, len(train) // FEWEST_STEPS)
    if schedule.batch_size > fitting:
        log.warning(
            "%d images: schedule.batch_size is %d instead of %d, for %d steps a pass",
            len(train),
            fitting,
            schedule.batch_size,
            len(train) // fitting,
        )
        schedule = schedule.model_copy(update={"batch_size": fitting})
        recipe = recipe.model_copy(update={"schedule": schedule})
    steps = None if schedule.steps is None else max(1, round(schedule.steps / schedule.epochs))
    return recipe, ImageBatches(train, schedule.batch_size, seed, recipe.augment, weights, steps)


def _input_shape(data: DataSet, multiple: int) -> tuple[int, int, int]:
    channels, height, width = data.train.images_NCHW.shape[1:]
    refuse_incomplete_windows(height, width, multiple)
    return channels, height, width


def refuse_incomplete_windows(height: int, width: int, multiple: int) -> None:
    """Refuse images that do not consist of whole windows of the network.

    Args:
        height: of the images, in pixels.
        width: likewise.
        multiple: of which both must be multiples.

    Raises:
        TrainingError: they are not.
    """
    if height % multiple or width % multiple:
        raise TrainingError(
            f"the images are {height} x {width}, but the stages of network.stem cut them into windows of {multiple}: "
            f"choose image_size as a multiple of {multiple}, or another stem"
        )


def _train_moons(recipe: TwoMoonsRecipe, options: _Options) -> str:
    sample = partial(_sample_moons, recipe.noise)
    batches = SampledBatches(sample, recipe.schedule.batch_size, recipe.steps_per_epoch, options.seed)
    network = build_network(recipe.network, MOONS_SHAPE, 1)
    trained = _fit(network, _run(recipe, options, batches), options)
    if not options.nodes.is_first:
        return _trained_for_first(options)
    network = trained.network.cpu()
    points, labels = sample(MOONS_TEST_POINTS, generator_for(options.seed, 3))
    plots = plot_moons(network, (points, labels), options.out / recipe.name)
    with torch.no_grad():
        accuracy = ((network(points)[:, 0] > 0) == (labels == 0)).double().mean().item()
    _write_metrics(recipe, options, {"accuracy": accuracy, "n": MOONS_TEST_POINTS}, trained.seconds)
    return f"accuracy {accuracy:.2%} on {MOONS_TEST_POINTS} fresh points; {', '.join(map(str, plots))}"


def _train_squares(recipe: SquaresRecipe, options: _Options) -> str:
    size, side = recipe.image_size, recipe.square_size
    batches = SampledBatches(
        partial(_sample_squares, size, side), recipe.schedule.batch_size, recipe.steps_per_epoch, options.seed
    )
    run = replace(_run(recipe, options, batches), classifies=False)
    trained = _fit(build_network(recipe.network, (1, size, size), 1), run, options)
    if not options.nodes.is_first:
        return _trained_for_first(options)
    true, learned = true_squares_distance(size, side), learned_squares_distance(trained.network, size, side)
    error = abs(learned - true) / true
    metrics = {"true_distance": true, "learned_distance": learned, "relative_error": error}
    _write_metrics(recipe, options, metrics, trained.seconds)
    if error > recipe.tolerance:
        raise TrainingError(
            f"the learned distance {learned:.4f} is {error:.2%} from the true {true:.4f}, the recipe allows "
            f"{recipe.tolerance:.2%}: train longer (--epochs)"
        )
    return f"W1 true {true:.4f}, learned {learned:.4f}, relative error {error:.4%}"


# Functions of the module, so that batches can be pickled for other processes.
def _sample_moons(noise: float, size: int, generator: torch.Generator) -> Batch:
    return two_moons(size, noise, generator)


def _sample_squares(image_size: int, square_size: int, size: int, generator: torch.Generator) -> Batch:
    return squares_sampler(image_size, square_size)(size, generator)


def _fit(network: LipschitzNetwork, run: Run, options: _Options) -> Trained:
    return fit_on(
        network, run, devices=options.devices, nodes=options.nodes, threads=options.threads, resume=options.resume
    )


def _trained_for_first(options: _Options) -> str:
    return f"node {options.nodes.rank} of {options.nodes.count}: trained; node 0 writes the results"


def _identity(recipe: AnyRecipe, options: _Options) -> dict[str, Any]:
    identity: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "seed": options.seed}
    # Weights of another order of channels would be read as if they were of this one.
    return identity | {"channel_order": CHANNEL_ORDER} if recipe.network.stem else identity


def _run(recipe: AnyRecipe, options: _Options, batches: BatchSource) -> Run:
    # Beside the artefacts but hidden: a server that is pointed at `out` must not take it for one.
    checkpoints = options.out / ".checkpoints" / recipe.name
    return Run(
        batches=batches,
        objective=objective_of(recipe.loss),
        reference_radius=recipe.loss.reference_radius,
        schedule=recipe.schedule,
        checkpoints=checkpoints,
        identity=_identity(recipe, options),
        device=options.device,
        curves=checkpoints / "tensorboard" if options.tensorboard else None,
        version=code_version(),
    )


def _refuse_unwritable(out: Path) -> None:
    """Refuse a folder that cannot be written to before the training, not after the first epoch."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        raise TrainingError(f"{out} cannot be written to ({error.strerror}): name another folder with --out") from error


def device_named(name: str) -> torch.device:
    """Return a device of torch by `auto`, `cpu` or `cuda`.

    Raises:
        TrainingError: there is no CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "--device cuda: torch finds no CUDA device; install a CUDA build of torch, or use --device cpu"
        )
    return torch.device(name)


def _warn_without_bfloat16(recipe: AnyRecipe, device: torch.device) -> None:
    if recipe.schedule.precision != "bf16-mixed":
        return
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        has_it = any(capabilities.get(name) for name in _BFLOAT16_INSTRUCTIONS)
    if not has_it:
        log.warning(
            "this %s has no instructions for bfloat16: schedule.precision=bf16-mixed works, but 32-true is faster",
            "GPU" if device.type == "cuda" else "processor",
        )


def _devices(options: _Options) -> str:
    nodes = f"{options.nodes.count} nodes x " if options.nodes.count > 1 else ""
    return f"{nodes}{options.devices} x {options.device.type}"


def _write_metrics(recipe: AnyRecipe, options: _Options, metrics: dict[str, Any], wall_time_s: float) -> None:
    folder = options.out / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    origin = {"code_version": code_version(), "environment": environment(wall_time_s, _devices(options))}
    content = {**metrics, **_identity(recipe, options), **origin}
    (folder / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")
