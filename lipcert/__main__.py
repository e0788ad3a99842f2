"""Command line `lipcert COMMAND ...`: each command calls the entry point of the package that owns it.

Exit status: that of the entry point; 2 the command is not valid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

COMMANDS = {
    "serve": "serve models over HTTP, as `python -m service`",
    "ray": "serve in replicas of Ray Serve, as `python -m service ray`",
    "predict": "classify image files and folders, as `python -m service predict`",
    "certify-images": "certify image collections of any size, as `python -m service certify-images`",
    "audit": "audit an archived answer, as `python -m service audit`",
    "evidence": "write the evidence folder of an artefact, as `python -m service evidence`",
    "certify": "prove bounds of an ONNX file, as `python -m service.certificate`",
    "import": "make an artefact of an ONNX file, as `python -m service import`",
    "keys": "make API keys, as `python -m service keys`",
    "train": "train, export and measure a recipe, as `python -m models train`",
    "calibrate": "calibrate certified sets and decisions, as `python -m models calibrate`",
    "evaluate": "measure and attack an artefact, as `python -m models evaluate`",
    "convert": "write an artefact in float32, as `python -m models convert`",
    "seeds": "state the spread over seeds in a card, as `python -m models seeds`",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return _run(words[0], words[1:])
    parser = argparse.ArgumentParser(
        prog="lipcert", description="Image classifiers whose every answer carries a proof.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    if words:
        # Ends here: with the help, or because there is no such command.
        parser.parse_args(words)
    parser.print_help()
    return 2


def _run(command: str, arguments: list[str]) -> int:
    # Imported here: no command loads the libraries of another, and the provers of `serve` start before anything large.
    if command == "certify":
        from service.certificate.__main__ import main as certify

        return certify(arguments, "lipcert certify")
    if command in ("train", "calibrate", "evaluate", "convert", "seeds"):
        from models.__main__ import main as models

        return models([command, *arguments], "lipcert")
    from service.__main__ import main as service

    return service([command, *arguments], "lipcert")


if __name__ == "__main__":
    sys.exit(main())
