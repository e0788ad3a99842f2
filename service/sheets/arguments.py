"""The options of `lipcert predict`; imports nothing large, because `--help` does not either."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

DESCRIPTION = """Classify image files and folders, through a running server or in this process, with a certified radius.
Prints a table, or writes --csv, --jsonl or --parquet. There is one row for each file; a file that cannot be answered is
a line on stderr and a row with its error."""
STATUSES = """Exit status: 0 every file is answered; 1 every file is answered, and at least one answer is an abstention
or has a radius below --min-radius; 2 a file is not answered, or the command is not valid; 130 interrupted."""


def describe(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.epilog = STATUSES
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="FILE|FOLDER|GLOB",
        help="image files or npy arrays; folders, with all files below them, sorted, without clutter of archives and "
        "file systems; or patterns such as 'scans/**/*.png'",
    )
    parser.add_argument("--server", metavar="URL", help="of a running service; default: classify in this process")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="folder of the artefact; with --server, the name of one of its models; default: the default model",
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds the API key for --server")
    parser.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="PEM authorities that sign the server's certificate"
    )
    describe_options(parser)
    parser.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="1 to 3: distance of the counterfactual over the nearest; default: 1",
    )
    parser.add_argument(
        "--path",
        type=int,
        metavar="N",
        help="2 to 16: images on the way to the counterfactual, in the answers of --jsonl",
    )
    parser.add_argument(
        "--saliency", action="store_true", help="gradient of the deciding margin, in the answers of --jsonl"
    )
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the counterfactuals there, as PNG files")
    parser.add_argument("--min-radius", type=_radius, metavar="R", help="exit with status 1 if a radius is smaller")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--csv", type=Path, metavar="OUT", help="write a CSV file")
    output.add_argument("--jsonl", type=Path, metavar="OUT", help="write one JSON object on each line, with the answer")
    output.add_argument("--parquet", type=Path, metavar="OUT", help="write a Parquet file; needs pyarrow")


def describe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of requests that every table of answers has columns for."""
    parser.add_argument("--counterfactual", action="store_true", help="find the nearest image of another class")
    parser.add_argument(
        "--novelty", action="store_true", help="ask the novelty model whether an image is unlike those of the training"
    )
    parser.add_argument(
        "--proof", choices=["fast", "best"], help="best: prove a larger radius at reference images; default: fast"
    )
    parser.add_argument("--epsilon", type=_radius, metavar="R", help="required L2 radius, pixels in [0, 1]")
    parser.add_argument("--resize", action="store_true", help="accept images of another size than the model's")
    parser.add_argument(
        "--background", type=_colour, metavar="#RRGGBB", help="composite transparent images onto this colour"
    )


def _colour(text: str) -> str:
    if not re.fullmatch("#?[0-9a-fA-F]{6}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a colour #rrggbb in hexadecimal, such as '#ffffff'")
    return text


def _radius(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return number
