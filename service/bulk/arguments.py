"""The options of `lipcert certify-images`; imports nothing large, because `--help` does not either."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.sheets.arguments import describe_options

DESCRIPTION = """Certify image collections of any size. Writes a folder of Parquet files: every input is one row, in
`answers` or in `errors`. A run that ended early continues when the same command is given again."""
STATUSES = """Exit status: 0 every input is answered; 1 the run is complete, and some inputs are in `errors`; 2 the run
is not complete, or the command is not valid; 130 interrupted."""
ROWS, SEARCHED_ROWS = 4096, 256


def describe(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.epilog = STATUSES
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="image files, .npy, .npz, .parquet and .tar (WebDataset) files, folders with all files below them, "
        "patterns, .txt files with one of these on each line; all of them also as URLs of fsspec, as s3://bucket/folder",
    )
    parser.add_argument("--model", metavar="DIR", help="folder of the artefact; default: the default model")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DEST", help="folder of the results, new or to go on"
    )
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="column of images in Parquet files: bytes of image files, a struct with `bytes` and `path`, or lists of "
        "pixels of fixed size; default: the only such column",
    )
    describe_options(parser)
    parser.add_argument("--coverage", type=float, metavar="P", help="write the certified set with this coverage")
    parser.add_argument("--max-error", type=float, metavar="E", help="write the decision with at most this error")
    parser.add_argument(
        "--processes", type=_count, metavar="N", help="processes on this machine; default: one for each CPU"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="run on this Ray cluster; `local` starts one here")
    parser.add_argument(
        "--part-rows",
        type=_count,
        metavar="N",
        help=f"inputs of a part of the results; default: {ROWS}, with --counterfactual {SEARCHED_ROWS}",
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)
