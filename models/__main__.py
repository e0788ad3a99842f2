"""Command line of training and evaluation: `python -m models train RECIPE --data DIR --out DIR`.

`python -m models convert ARTEFACT --data DIR --out DIR --precision float32`: write an artefact in another precision.

Exit status: 0 done; 1 the training or the measurement cannot be done, with the reason on stderr; 2 the command is not
valid; 130 interrupted, and the same command (`train`: with `--resume`) continues.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.logs import log_to_stderr
from models.paths import FOLDER, dataset_of, missing_artefact, missing_images
from models.recipes import RECIPES, ImageRecipe, RecipeError, known_recipes, recipe_by_name

if TYPE_CHECKING:
    from models.data.folders import Folder
    from service.runtime.provider import Provider

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells: 128 + SIGINT."""
DEFAULT_BLOCK = 64
"""Columns of a block in float32: fewer keep more radius and take more time, see docs/precision.md."""
PROVIDERS = ("auto", "cpu", "cuda")


def main(arguments: Sequence[str] | None = None, program: str = "python -m models") -> int:
    """Run a command; return its exit status."""
    parser = _parser(program)
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        parser.print_help()
        return 2
    chosen = parser.parse_args(words)
    log_to_stderr()
    try:
        if "artefact" in chosen and (fault := _missing(chosen.artefact, chosen.data)):
            return _failed(fault)
        return chosen.run(chosen)
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


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Train and evaluate 1-Lipschitz classifiers.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    train = "Train a recipe; export and measure the artefact, or draw and measure the toy problem."
    _describe_train(commands.add_parser("train", help=train, description=train, allow_abbrev=False))
    calibrate = "Compute the calibration of certified sets and decisions on held-out images; write it to the card."
    _describe_calibrate(commands.add_parser("calibrate", help=calibrate, description=calibrate, allow_abbrev=False))
    evaluate = (
        "Measure an artefact as it is served; write its report and its card. After Ctrl-C the same command continues."
    )
    _describe_evaluate(commands.add_parser("evaluate", help=evaluate, description=evaluate, allow_abbrev=False))
    convert = "Write an artefact in float32, its dense layers in blocks; compare radii and time with the original."
    _describe_convert(commands.add_parser("convert", help=convert, description=convert, allow_abbrev=False))
    seeds = "Write the figures of trainings with other seeds to the card of an artefact; print their spread."
    _describe_seeds(commands.add_parser("seeds", help=seeds, description=seeds, allow_abbrev=False))
    return parser


def _describe_train(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a folder of images, with one folder for each class or with train/ and test/ of such, whose recipe is "
        f"decided from the images; or one of: {', '.join(sorted(RECIPES))}",
    )
    train.add_argument(
        "--out",
        type=Path,
        default=Path("artefacts"),
        metavar="DIR",
        help="results go to DIR/NAME, checkpoints to DIR/.checkpoints/NAME (default: %(default)s)",
    )
    train.add_argument(
        "--budget",
        type=_duration,
        metavar="TIME",
        help="time of the whole run on a folder of images, e.g. 90s, 10m, 2h: trains the best model that fits",
    )
    train.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder of the data set (default: %(default)s)",
    )
    train.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    train.add_argument("--epochs", type=_positive, metavar="N", help="epochs; default: those of the recipe")
    train.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of initial weights, order and augmentation (default: %(default)s)",
    )
    train.add_argument("--threads", type=_positive, metavar="N", help="CPU threads of each process; default: all")
    train.add_argument("--device", choices=PROVIDERS, default="auto", help="auto: CUDA where available (default: auto)")
    train.add_argument(
        "--devices",
        type=_positive,
        default=1,
        metavar="N",
        help="GPUs, or processes on the CPU, of each machine that share each batch (default: %(default)s)",
    )
    train.add_argument(
        "--nodes",
        type=_positive,
        default=1,
        metavar="M",
        help="machines that train together, each with this command and MASTER_ADDR, MASTER_PORT and NODE_RANK in its "
        "environment (default: %(default)s)",
    )
    train.add_argument(
        "--node-timeout",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="end when another machine is silent for S seconds (default: %(default)g)",
    )
    train.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write curves to DIR/.checkpoints/RECIPE/tensorboard (default: yes)",
    )
    train.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one field of the recipe, e.g. loss.min_margin=2; may be repeated",
    )
    train.add_argument(
        "--precision", choices=("float64", "float32"), default="float64", help="of the artefact (default: %(default)s)"
    )
    _add_blocks(train)
    train.set_defaults(run=_train)


def _describe_calibrate(calibrate: argparse.ArgumentParser) -> None:
    _describe_artefact(calibrate)
    calibrate.set_defaults(run=_calibrate)


def _describe_artefact(command: argparse.ArgumentParser, data: str = "") -> None:
    _describe_model_and_data(command, "folder of the model", data)
    command.add_argument(
        "--provider", choices=PROVIDERS, default="auto", help="auto: CUDA where available (default: auto)"
    )
    command.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="threads of ONNX Runtime (default: %(default)s)"
    )


def _describe_model_and_data(command: argparse.ArgumentParser, text: str, data: str = "") -> None:
    command.add_argument("artefact", type=Path, metavar="ARTEFACT", help=text)
    command.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help=f"folder of the data set in the card, as given to `train`{data} (default: %(default)s)",
    )


def _describe_evaluate(evaluate: argparse.ArgumentParser) -> None:
    _describe_artefact(evaluate, ", or of other images: one folder for each class")
    evaluate.add_argument(
        "--attacks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="attack with foolbox and ART, inside the radius and beyond (default: yes)",
    )
    evaluate.add_argument(
        "--n-attack",
        type=_positive,
        metavar="N",
        help="images to attack, evenly spaced; default: 1000, or all if fewer",
    )
    evaluate.add_argument(
        "--attack-seconds",
        type=_seconds,
        metavar="S",
        help="start no further attack after S seconds; the report states how many images were attacked",
    )
    evaluate.add_argument(
        "--limit", type=_positive, metavar="N", help="images to measure, evenly spaced; the card is not changed"
    )
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the report; default: ARTEFACT/report, of other images ARTEFACT/report-NAME",
    )
    evaluate.add_argument(
        "--novel",
        action="append",
        default=[],
        metavar="SET",
        help="of a novelty model: a folder of novel images, or a published set as NAME, in the folder of --data, "
        "or DIR/NAME, e.g. fashion-mnist; may be repeated",
    )
    evaluate.add_argument(
        "--novelty-only",
        action="store_true",
        help="of a novelty model: measure the novelty alone, in seconds, and write it to the card",
    )
    evaluate.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="measure and attack on a Ray cluster, with the artefact at one path on all nodes; local: on all CPUs of "
        "this machine (extra `ray`)",
    )
    evaluate.set_defaults(run=_evaluate)


def _describe_convert(convert: argparse.ArgumentParser) -> None:
    _describe_model_and_data(convert, "folder of the model, in float64")
    convert.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of models; written: DIR/NAME-float32"
    )
    convert.add_argument("--precision", choices=("float32",), default="float32", help="of the new artefact")
    _add_blocks(convert)
    convert.set_defaults(run=_convert)


def _describe_seeds(seeds: argparse.ArgumentParser) -> None:
    seeds.add_argument("artefact", type=Path, metavar="ARTEFACT", help="folder of the model")
    seeds.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder of an artefact of the same recipe, trained with another --seed",
    )
    seeds.set_defaults(run=_seeds, data=None)


def _add_blocks(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--blocks",
        type=_positive,
        metavar="N",
        help=f"in float32: the most columns of one matrix product (default: {DEFAULT_BLOCK})",
    )


def _missing(artefact: Path, data: Path | None) -> str | None:
    return missing_artefact(artefact) or (data and missing_images(data, dataset_of(artefact)))


def _duration(text: str) -> float:
    """Return seconds of a text like 90s, 10m, 2h."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        seconds = float(number) * unit if unit else 0.0
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write seconds, minutes or hours, like 90s, 10m or 2h")
    return seconds


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time in seconds, above 0")
    return seconds


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


if __name__ == "__main__":
    sys.exit(main())
