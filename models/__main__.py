"""Command line of training and evaluation: `python -m models train RECIPE --data DIR --out DIR`.

`python -m models convert ARTEFACT --data DIR --out DIR --precision float32`: write an artefact in another precision.

Exit status: 0 done; 1 the training or the measurement cannot be done, with the reason on stderr; 2 the command is not
valid; 130 interrupted, and the same command (`train`: with `--resume`) continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.arguments import DEFAULT_BLOCK, parser_of
from models.logs import log_to_stderr
from models.paths import FOLDER, dataset_of, missing_artefact, missing_images
from models.recipes import ImageRecipe, RecipeError, known_recipes, recipe_by_name

if TYPE_CHECKING:
    from models.data.folders import Folder
    from service.runtime.provider import Provider

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells: 128 + SIGINT."""


def main(arguments: Sequence[str] | None = None, program: str = "python -m models") -> int:
    """Run a command; return its exit status."""
    parser = parser_of(program)
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        parser.print_help()
        return 2
    chosen = parser.parse_args(words)
    log_to_stderr()
    try:
        if "artefact" in chosen and (fault := _missing(chosen.artefact, chosen.data)):
            return _failed(fault)
        return _COMMANDS[chosen.command](chosen)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("models", "service"):
            raise
        extras = "cpu,train,evaluate" if chosen.command == "evaluate" else "cpu,train"
        extras += ",ray" if error.name == "ray" else ""
        return _failed(
            f"`{chosen.command}` needs {error.name}, which is not installed: `pip install 'lipcert[{extras}]'` "
            "(in a checkout: `make train`) installs it"
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def _missing(artefact: Path, data: Path | None) -> str | None:
    return missing_artefact(artefact) or (data and missing_images(data, dataset_of(artefact)))


def _train(chosen: argparse.Namespace) -> int:
    if chosen.blocks is not None and chosen.precision != "float32":
        return _failed("--blocks is an option of --precision float32")
    epochs = [] if chosen.epochs is None else [f"schedule.epochs={chosen.epochs}"]
    overrides = [*chosen.overrides, *epochs]
    of_folder = chosen.recipe == FOLDER or (chosen.recipe not in known_recipes() and Path(chosen.recipe).is_dir())
    try:
        named = None if of_folder else recipe_by_name(chosen.recipe, overrides)
        if named is not None and chosen.budget is not None:
            raise RecipeError("--budget is for a folder of images; for a recipe choose --epochs")
        if chosen.nodes > 1 and chosen.budget is not None:
            raise RecipeError("--budget is timed on one machine: with --nodes choose --set schedule.steps=N")
    except RecipeError as error:
        return _failed(error)
    if chosen.recipe == FOLDER and (fault := missing_images(chosen.data, FOLDER)):
        return _failed(fault)
    if isinstance(named, ImageRecipe) and (fault := missing_images(chosen.data, named.dataset)):
        return _failed(fault)
    # Imported here: torch takes seconds to load, which --help must not.
    from models.data.labelled import DataError
    from models.export import ExportRefusedError
    from models.precision import PrecisionError
    from models.runs import run_recipe
    from models.training.errors import Interrupted, TrainingError
    from models.training.nodes import read_nodes
    from service.artefact.card import ArtefactError
    from service.certificate import UnsupportedModelError

    try:
        nodes = read_nodes(chosen.nodes, chosen.node_timeout)
        recipe, folder = _planned(chosen, overrides) if named is None else (named, None)
        summary = run_recipe(
            recipe,
            data=chosen.data,
            folder=folder,
            out=chosen.out,
            resume=chosen.resume,
            seed=chosen.seed,
            threads=chosen.threads,
            device_name=chosen.device,
            devices=chosen.devices,
            nodes=nodes,
            tensorboard=chosen.tensorboard,
            block=(chosen.blocks or DEFAULT_BLOCK) if chosen.precision == "float32" else None,
        )
    except Interrupted as interruption:
        sys.stderr.write(f"{interruption}\n")
        return INTERRUPTED
    except (
        RecipeError,
        DataError,
        TrainingError,
        ExportRefusedError,
        PrecisionError,
        ArtefactError,
        UnsupportedModelError,
    ) as error:
        return _failed(error)
    sys.stdout.write(f"{summary}\n")
    if nodes.is_first and isinstance(recipe, ImageRecipe) and recipe.calibration_images:
        return _write_calibration(chosen.out / recipe.name, chosen.data, "auto", chosen.threads or 1)
    return 0


def _planned(chosen: argparse.Namespace, overrides: Sequence[str]) -> tuple[ImageRecipe, Folder]:
    """Return the recipe of a folder of images, and the folder; from here on `chosen.data` is the folder."""
    from models.planning import folder_name, plan_or_resume

    if chosen.recipe != FOLDER:
        chosen.data = Path(chosen.recipe)
        overrides = [f"name={folder_name(chosen.data)}", *overrides]
    return plan_or_resume(
        chosen.data,
        overrides,
        checkpoints=chosen.out / ".checkpoints",
        resume=chosen.resume,
        device_name=chosen.device,
        threads=chosen.threads,
        budget_s=chosen.budget,
    )


def _evaluate(chosen: argparse.Namespace) -> int:
    from models.data.labelled import DataError
    from models.evaluation.guards import evaluate_guard
    from models.evaluation.measure import EvaluationError, EvaluationInterrupted
    from models.evaluation.measure import evaluate as evaluate_artefact
    from service.artefact.card import ArtefactError

    if chosen.novelty_only and chosen.ray is not None:
        return _failed("--novelty-only takes seconds in one process: leave --ray out")
    try:
        if chosen.novelty_only:
            sys.stdout.write(
                evaluate_guard(
                    chosen.artefact, chosen.data, chosen.novel, provider=chosen.provider, threads=chosen.threads
                )
            )
            return 0
        report = evaluate_artefact(
            chosen.artefact,
            chosen.data,
            attacks=chosen.attacks,
            n_attack=chosen.n_attack,
            attack_seconds=chosen.attack_seconds,
            limit=chosen.limit,
            provider=chosen.provider,
            threads=chosen.threads,
            out=chosen.out,
            novel=chosen.novel,
            ray=chosen.ray,
        )
    except EvaluationInterrupted as interruption:
        sys.stderr.write(f"{interruption}\n")
        return INTERRUPTED
    except (ArtefactError, DataError, EvaluationError) as error:
        return _failed(error)
    sys.stdout.write(f"{report}\n")
    return 0


def _convert(chosen: argparse.Namespace) -> int:
    from models.data.labelled import DataError
    from models.evaluation.measure import EvaluationError
    from models.evaluation.precision import convert
    from service.artefact.card import ArtefactError

    try:
        table = convert(chosen.artefact, chosen.data, chosen.out, chosen.blocks or DEFAULT_BLOCK)
    except (ArtefactError, DataError, EvaluationError) as error:
        return _failed(error)
    sys.stdout.write(f"{table}\n")
    return 0


def _seeds(chosen: argparse.Namespace) -> int:
    if fault := next(filter(None, map(missing_artefact, chosen.runs)), None):
        return _failed(fault)
    from models.evaluation.images import EvaluationError
    from models.evaluation.seeds import add_seeds
    from service.artefact.card import ArtefactError

    try:
        table = add_seeds(chosen.artefact, chosen.runs)
    except (ArtefactError, EvaluationError) as error:
        return _failed(error)
    sys.stdout.write(f"{table}\n")
    return 0


def _calibrate(chosen: argparse.Namespace) -> int:
    return _write_calibration(chosen.artefact, chosen.data, chosen.provider, chosen.threads)


def _write_calibration(artefact: Path, data: Path, provider: Provider, threads: int) -> int:
    from models.data.labelled import DataError
    from models.evaluation.calibration import calibrate
    from models.evaluation.measure import EvaluationError
    from service.artefact.card import ArtefactError

    try:
        report = calibrate(artefact, data, provider=provider, threads=threads)
    except (ArtefactError, DataError, EvaluationError) as error:
        return _failed(error)
    sys.stdout.write(f"{report}\n")
    return 0


def _failed(reason: object) -> int:
    sys.stderr.write(f"error: {reason}\n")
    return 1


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "calibrate": _calibrate,
    "evaluate": _evaluate,
    "convert": _convert,
    "seeds": _seeds,
}


if __name__ == "__main__":
    sys.exit(main())
