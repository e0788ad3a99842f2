"""Measure radii with reference images, and write the table of docs/reference-image.md.

`python docs/reference_image.py [MODEL ...] --data DIR`: DIR/mnist, DIR/fashion-mnist, DIR/malaria-cells,
DIR/cifar-10-batches-py. With models named, their rows are printed alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.soundness.data import classifiers, test_images  # noqa: E402
from benchmarks.soundness.document import write_measured  # noqa: E402
from models.export import code_version, environment  # noqa: E402
from service.inference.classifier import Classifier, Prediction, View, counterfactuals, with_references  # noqa: E402
from service.inference.references import find_references  # noqa: E402

PAGE = ROOT / "docs" / "reference-image.md"
BATCH = 250
HEADER = "| model | epsilon | n | fast | with reference images | passes, largest radius | passes, epsilon named |"
COSTS = "| model | median radius: larger by | gain kept by 8-bit images | one answer over one counterfactual |"


def main() -> None:
    """Measure shipped models; print, and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="names; all by default")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000, help="most images of a test set")
    parser.add_argument("--single", type=int, default=100, help="images that are timed alone")
    arguments = parser.parse_args()
    shares, costs = [], []
    for name in arguments.model or classifiers(ROOT / "models" / "zoo"):
        classifier = Classifier.load(ROOT / "models" / "zoo" / name, "cpu", threads=1)
        image_NCHW, label_N = test_images(classifier, arguments.data, arguments.images)
        view = classifier.view(classifier.input_shape)
        rows, cost = measure(classifier, view, image_NCHW, label_N, arguments.single)
        shares += [f"| `{classifier.name}` | {row}" for row in rows]
        costs.append(f"| `{classifier.name}` | {cost}")
        sys.stdout.write("\n".join([*rows, cost, ""]))
        sys.stdout.flush()
    made = environment(0.0)
    text = "\n".join(
        [
            *(HEADER, "|---" * 7 + "|", *shares, "", COSTS, "|---" * 4 + "|", *costs, ""),
            f"Test sets, one thread of {made['cpu']}, ONNX Runtime {made['onnxruntime']}, numpy {made['numpy']}, code "
            f"{code_version()}; last column: median of the processor times of {arguments.single} images, alternating.",
        ]
    )
    if not arguments.model:
        write_measured(PAGE, text)


def measure(
    classifier: Classifier, view: View, image_NCHW: np.ndarray, label_N: np.ndarray, single: int
) -> tuple[list[str], str]:
    """Return a row for each epsilon of the recipe, and the row of costs.

    Args:
        classifier: a shipped model.
        view: of its images.
        image_NCHW: pixels in [0, 1].
        label_N: true classes.
        single: images that are timed alone.
    """
    parts = [image_NCHW[start : start + BATCH] for start in range(0, len(image_NCHW), BATCH)]
    fast = [prediction for part in parts for prediction in view.predict(part)]
    right_N = np.array([prediction.class_id for prediction in fast]) == label_N
    fast_N = np.array([prediction.radius for prediction in fast])
    largest_N, steps_N = proved(view, image_NCHW, fast, None)
    rows = []
    for epsilon in map(float, classifier.card.recipe["epsilons"]):
        named_N, named_steps_N = proved(view, image_NCHW, fast, epsilon)
        shares = [float((right_N & (radius_N >= epsilon)).mean()) for radius_N in (fast_N, named_N)]
        rows.append(
            f"{epsilon:g} | {len(label_N):,} | {shares[0]:.2%} | {shares[1]:.2%} | {steps_N.mean():.2f} | "
            f"{named_steps_N.mean():.2f} |"
        )
    # Not on the grid of 8-bit values, so that reference images are not rounded.
    moved_NCHW = np.clip(image_NCHW[:1000], 1e-12, 1.0 - 1e-12)
    unrounded_N, _ = proved(view, moved_NCHW, view.predict(moved_NCHW), None)
    gain = float((unrounded_N - fast_N[:1000]).sum())
    kept = f"{(largest_N[:1000] - fast_N[:1000]).sum() / gain:.1%}" if gain > 1e-3 * fast_N[:1000].sum() else "no gain"
    larger = np.median(largest_N / np.maximum(fast_N, 1e-300)) - 1.0
    return rows, f"{larger:.1%} | {kept} | {over_counterfactual(view, image_NCHW[:single], fast[:single]):.2f} |"


def proved(
    view: View, image_NCHW: np.ndarray, fast: list[Prediction], epsilon: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return radii and passes; with `epsilon` the search ends there."""
    found = []
    for start in range(0, len(image_NCHW), BATCH):
        part = fast[start : start + BATCH]
        found += find_references(
            view,
            image_NCHW[start : start + BATCH],
            np.array([prediction.class_id for prediction in part]),
            np.array([prediction.logits_K for prediction in part]),
            np.full(len(part), 0.0 if epsilon is None else epsilon),
            np.full(len(part), epsilon is None),
        )
    return np.array([proof.radius for proof in found]), np.array([proof.steps for proof in found])


def over_counterfactual(view: View, image_NCHW: np.ndarray, fast: list[Prediction]) -> float:
    """Return the processor time of one search for references over that of one counterfactual."""
    quotients = []
    for image_CHW, prediction in zip(image_NCHW, fast, strict=True):
        started = time.process_time()
        with_references(view, image_CHW[None], [prediction], [None], [True])
        middle = time.process_time()
        counterfactuals(view, image_CHW[None], [prediction], [None])
        quotients.append((middle - started) / (time.process_time() - middle))
    return statistics.median(quotients)


if __name__ == "__main__":
    main()
