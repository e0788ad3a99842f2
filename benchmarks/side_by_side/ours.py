"""Train lipcert's recipes in no more than the authors' time: `python -m benchmarks.side_by_side.ours --help`.

What counts are processor seconds with one thread: on a machine of its own they are the seconds of the clock, on a
shared one both sides still get the same. Theirs are those of the training loop alone; ours are those of the whole
command `python -m models train`, with its start, its checkpoints, its proof and its measurement of the test set. A run
of one epoch and one of two tell how many fit; where they did not fit after all, fewer are trained anew.

Reads `AUTHORS/NAME/run.json`, writes the artefacts `OUT/RECIPE` and `OUT/RECIPE.run.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from models.export import code_version
from models.recipes import recipe_by_name
from service.artefact import read_card

OPPONENTS = {
    "mnist-0-8": "mnist-0-8-notebook",
    "fashion-mnist-accurate": "fashion-mnist-notebook",
    "fashion-mnist-robust": "fashion-mnist-notebook",
}
"""Recipe -> whose time it gets."""
TRIAL_EPOCHS = 1
SPARE = 0.94
"""Share of the time that is planned for: the speed of a machine varies."""


class Used:
    """What one command took."""

    def __init__(self, command: list[str]) -> None:
        started = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command[1:])} ended with status {os.waitstatus_to_exitcode(status)}")
        self.seconds = time.perf_counter() - started
        self.processor_seconds = usage.ru_utime + usage.ru_stime


def train(recipe: str, data: Path, out: Path, epochs: int) -> Used:
    """Run the trainer as a user does, on one thread."""
    shutil.rmtree(out / ".checkpoints" / recipe, ignore_errors=True)
    command = [sys.executable, "-m", "models", "train", recipe, "--data", str(data), "--out", str(out)]
    return Used([*command, "--threads", "1", "--device", "cpu", "--set", f"schedule.epochs={epochs}"])


def epochs_within(budget: float, short: float, long: float) -> int:
    """How many epochs fit, if commands of `TRIAL_EPOCHS` and twice as many took `short` and `long` seconds.

    Raises:
        ValueError: not even one fits.
    """
    of_one = max((long - short) / TRIAL_EPOCHS, 1e-9)
    fixed = max(short - TRIAL_EPOCHS * of_one, 0.0)
    epochs = int((SPARE * budget - fixed) / of_one)
    if epochs < 1:
        raise ValueError(f"an epoch takes {of_one:.1f} s and the rest {fixed:.1f} s: not one fits into {budget:.1f} s")
    return epochs


def alike(recipe: str) -> str:
    """What the time of an epoch depends on; the loss is no matter."""
    fields = recipe_by_name(recipe).model_dump(mode="json")
    return json.dumps([fields[name] for name in ("dataset", "classes", "network", "schedule", "augment")])


def run(recipe: str, authors: Path, data: Path, out: Path, known: dict[str, list[float]]) -> dict[str, Any]:
    """Measure, unless a recipe like it is among the `known`, choose the number of epochs, train."""
    opponent = json.loads((authors / OPPONENTS[recipe] / "run.json").read_text(encoding="utf-8"))
    budget = float(opponent["processor_seconds"])
    if (kind := alike(recipe)) not in known:
        lengths = (TRIAL_EPOCHS, 2 * TRIAL_EPOCHS)
        known[kind] = [train(recipe, data, out / ".trial", epochs).processor_seconds for epochs in lengths]
    epochs = epochs_within(budget, *known[kind])
    while (used := train(recipe, data, out, epochs)).processor_seconds > budget:
        print(f"{recipe}: {epochs} epochs took {used.processor_seconds:.1f} s of {budget:.1f} s", flush=True)
        epochs = min(epochs - 1, int(epochs * SPARE * budget / used.processor_seconds))
    card = read_card(out / recipe)
    return {
        "name": recipe,
        "code_version": code_version(),
        "epochs": epochs,
        "seconds": card.environment["wall_time_s"],
        "command_seconds": used.seconds,
        "processor_seconds": used.processor_seconds,
        "budget": budget,
        "trials": known[kind],
        "environment": card.environment,
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(OPPONENTS)}; all by default")
    parser.add_argument("--authors", type=Path, required=True, metavar="DIR", help="what authors.py wrote")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    known: dict[str, list[float]] = {}
    for recipe in arguments.recipes or list(OPPONENTS):
        record = run(recipe, arguments.authors, arguments.data, arguments.out, known)
        (arguments.out / f"{recipe}.run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main())
