"""Arguments of `lipcert ray`; no library is loaded for them."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = (
    "`up` starts Ray on this machine, serves the models in replicas of Ray Serve, prints the URL once they are ready, "
    "and ends all of it on Ctrl-C. Settings are those of `lipcert serve`. Exit status: 0 stopped on request; 1 Ray, "
    "the port or a model is not available; 2 a setting or the command is not valid."
)


def describe(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("action", choices=["up"])
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder of artefacts; default: LIPCERT_MODELS")
    parser.add_argument("--replicas", type=_count, default=1, metavar="N", help="number of replicas; default: 1")
    parser.add_argument("--port", type=_port, metavar="P", help="TCP port, 0 for a free one; default: LIPCERT_PORT")


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1024:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to 1024")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port from 0 to 65535")
    return number
