"""Arguments of the commands of training and evaluation."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from models.recipes import RECIPES

DEFAULT_BLOCK = 64
"""Columns of a block in float32: fewer keep more radius and take more time, see docs/precision.md."""
PROVIDERS = ("auto", "cpu", "cuda")


def parser_of(program: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
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


def _describe_calibrate(calibrate: argparse.ArgumentParser) -> None:
    _describe_artefact(calibrate)


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


def _describe_convert(convert: argparse.ArgumentParser) -> None:
    _describe_model_and_data(convert, "folder of the model, in float64")
    convert.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of models; written: DIR/NAME-float32"
    )
    convert.add_argument("--precision", choices=("float32",), default="float32", help="of the new artefact")
    _add_blocks(convert)


def _describe_seeds(seeds: argparse.ArgumentParser) -> None:
    seeds.add_argument("artefact", type=Path, metavar="ARTEFACT", help="folder of the model")
    seeds.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder of an artefact of the same recipe, trained with another --seed",
    )
    seeds.set_defaults(data=None)


def _add_blocks(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--blocks",
        type=_positive,
        metavar="N",
        help=f"in float32: the most columns of one matrix product (default: {DEFAULT_BLOCK})",
    )


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
