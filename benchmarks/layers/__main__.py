"""Compare parametrisations: `python -m benchmarks.layers --data DIR [--out DIR] [--write] [NAME ...]`.

Every row that is not in the folder yet is trained, proved and measured, one thread, and kept as
`NAME.SEED.EPOCHS.json`; `--write` then puts the tables into `docs/layers.md`. Needs lipcert with its extra `train` and
the libraries of `benchmarks/libraries/requirements.txt` in one environment: `make layers DATA=DIR`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.layers.tables import section
from benchmarks.layers.training import BUDGETS, Row, images_of, measured, step_seconds
from benchmarks.soundness import document
from models.export import code_version

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "layers.md"
TIMES = "times.json"
PACKAGES = ("torch", "deel-torchlip", "orthogonium")


def say(text: str) -> None:
    """Progress."""
    print(text, flush=True)


def kept(folder: Path) -> list[dict[str, Any]]:
    """What was measured so far: `row` and the `code` that measured it."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.*.*.json"))]


def rows_of(folder: Path) -> list[Row]:
    """The rows measured so far."""
    return [Row(**content["row"]) for content in kept(folder)]


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these rows")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("build/layers"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="another one shows how much of a difference is chance")
    parser.add_argument("--epochs", type=int, help="others than the budget's, at the rates that are known already")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/layers.md")
    arguments = parser.parse_args()
    known = {method.name for budget in BUDGETS.values() for method in budget.methods}
    if unknown := set(arguments.names) - known:
        raise SystemExit(f"no row {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch|deel|orthogonium")
    logging.disable(logging.WARNING)
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    # Before anything is written: the document is part of the tree.
    code = code_version()
    for budget in BUDGETS.values():
        for method in budget.methods:
            epochs = arguments.epochs or budget.epochs
            file = folder / f"{method.name}.{arguments.seed}.{epochs}.json"
            if file.exists() or (arguments.names and method.name not in arguments.names):
                continue
            like = next((row for row in rows_of(folder) if row.method == method.name), None)
            row = measured(method, budget, arguments.data, arguments.seed, epochs, say, like)
            say(f"{row}")
            content = {"code": code, "row": dataclasses.asdict(row)}
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    times = folder / TIMES
    if not times.exists():
        found: dict[str, dict[str, float]] = {}
        for budget in BUDGETS.values():
            images, _, _ = images_of(budget, arguments.data)
            steps = len(images) // budget.batch_size
            seconds = step_seconds(budget, images)
            found[budget.name] = {name: steps * statistics.median(taken) for name, taken in seconds.items()}
        times.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        say(times.read_text(encoding="utf-8"))
    if arguments.write:
        made: dict[str, dict[str, Any]] = json.loads(times.read_text(encoding="utf-8"))
        versions = ", ".join(f"{package} {metadata.version(package).partition('+')[0]}" for package in PACKAGES)
        text = section(list(BUDGETS.values()), rows_of(folder), made)
        ran = document.provenance("make layers DATA=DIR", code)
        trained_by = ", ".join(sorted({content["code"] for content in kept(folder)}))
        note = f"{ran} {versions}; one thread. Rows were trained by code {trained_by}."
        document.write_section("layers", "layers", f"{text}\n\n{note}", DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
