"""One digit known, nine novel: `python benchmarks/one_class.py --data DIR [--epochs N] [--write]`.

Trains the recipe `one-class` for each digit of MNIST in turn, writes the artefact, loads it as the server does, and
measures AUROC and certified AUROC on the test set, whose other digits are novel; no image of them was trained on.
Beside it stands the distance to the nearest training image, which is 1-Lipschitz too and needs all of them. `--write`
replaces the table of `docs/novelty.md`. One digit takes less than a minute of one core.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.data.datasets import load_dataset  # noqa: E402
from models.data.labelled import DataSet, LabelledImages  # noqa: E402
from models.evaluation.novelty import Scores, auroc, certified_auroc, scores_of  # noqa: E402
from models.export import code_version, environment  # noqa: E402
from models.recipes import ImageRecipe, recipe_by_name  # noqa: E402
from models.runs import run_recipe  # noqa: E402
from service.inference.classifier import Classifier  # noqa: E402

PAGE = ROOT / "docs" / "novelty.md"
EPSILONS = (8 / 255, 16 / 255, 36 / 255, 72 / 255, 1.0)
DIGITS = tuple("0123456789")
Row = tuple[float, ...]


def nearest_distance(data: DataSet) -> Scores:
    """Return minus the distance of each test image to the nearest training image: exact, so without an error."""
    train_TD = _flat(data.train).astype(np.float32)
    square_T = (train_TD**2).sum(1)
    distances: list[np.ndarray] = []
    for part_ND in np.array_split(_flat(data.test).astype(np.float32), 20):
        square_NT = (part_ND**2).sum(1)[:, None] + square_T - 2 * part_ND @ train_TD.T
        distances.append(np.sqrt(square_NT.min(1).clip(0)))
    f_N = -np.concatenate(distances).astype(np.float64)
    return Scores(f_N, np.abs(f_N), np.ones_like(f_N), np.zeros_like(f_N))


def _flat(images: LabelledImages) -> np.ndarray:
    return images.images_NCHW.numpy().reshape(len(images), -1) / 255.0


def figures(scores: Scores, data: DataSet) -> Row:
    """Return AUROC, and certified AUROC at each epsilon."""
    novel_N = data.test.labels_N.numpy() == 1
    known, novel = (
        Scores(scores.f_N[at], scores.radius_N[at], scores.lipschitz_N[at], scores.error_N[at])
        for at in (~novel_N, novel_N)
    )
    return auroc(known, novel), *(certified_auroc(known, novel, epsilon) for epsilon in EPSILONS)


def measure(digit: str, folder: Path, epochs: int | None) -> tuple[Row, Row, float]:
    """Return the figures of network and nearest distance, and the processor time of training and export, in seconds.

    Args:
        digit: that is known.
        folder: of the data set.
        epochs: of the training; null for those of the recipe.
    """
    changes = [f'classes=["{digit}"]', *([] if epochs is None else [f"schedule.epochs={epochs}"])]
    recipe = recipe_by_name("one-class", changes)
    assert isinstance(recipe, ImageRecipe)
    data = load_dataset(recipe, folder)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        run_recipe(
            recipe, data=folder, out=Path(out), resume=False, seed=0, threads=1, device_name="cpu", tensorboard=False
        )
        seconds = time.process_time() - started
        classifier = Classifier.load(Path(out) / recipe.name, "cpu", 1)
        scores = scores_of(classifier, list(data.test.images_NCHW.numpy()))
    return figures(scores, data), figures(nearest_distance(data), data), seconds


def table(found: dict[str, tuple[Row, Row, float]]) -> str:
    """Return the Markdown table, with the mean over the digits and the way it was made."""
    head = ["known digit", "AUROC", *(f"at {epsilon:.4g}" for epsilon in EPSILONS), "nearest image: AUROC", "at 0.1412"]
    rows = [(digit, [*mine, nearest[0], nearest[3]]) for digit, (mine, nearest, _) in found.items()]
    rows.append(("**mean**", np.mean([values for _, values in rows], axis=0).tolist()))
    seconds = sum(seconds for _, _, seconds in found.values())
    made = environment(seconds)
    lines = [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {name} | {' | '.join(f'{value:.2%}' for value in values)} |" for name, values in rows),
        "",
        f"MNIST test set, n = 10,000; seed 0; training, export and report take {seconds:.0f} s of processor "
        f"time together ({made['cpu']}, torch {made['torch']}), code {code_version()}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="One digit known, nine novel.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="default: those of the recipe")
    parser.add_argument("--digits", nargs="+", choices=DIGITS, default=DIGITS, help="default: all ten")
    parser.add_argument("--write", action="store_true", help=f"replace the table of {PAGE.name}")
    chosen = parser.parse_args()
    found: dict[str, tuple[Row, Row, float]] = {}
    for digit in chosen.digits:
        found[digit] = measure(digit, chosen.data, chosen.epochs)
        sys.stderr.write(f"{digit}: {found[digit]}\n")
    text = table(found)
    sys.stdout.write(f"{text}\n")
    if chosen.write:
        pattern = r"(<!-- one-class: written by benchmarks/one_class.py -->\n).*?(\n<!-- /one-class -->)"
        page = re.sub(pattern, lambda block: block[1] + text + block[2], PAGE.read_text("utf-8"), flags=re.DOTALL)
        PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
