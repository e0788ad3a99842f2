"""Cost and distance of counterfactuals: `python benchmarks/counterfactuals.py --data DIR [MODEL ...]`.

Searches on evenly spaced test images of the models in `--models`, without and with a random target, in batches of 16,
and counts runs of both graphs. Then times the search beside as many runs of the gradient graph alone, alternating, in
batches of 1, 8 and 16, one thread. `--write` replaces the tables of `docs/counterfactuals.md`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "counterfactuals.md"
BATCHES = (1, 8, 16)
REPETITIONS = 5

sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.soundness.document import write_measured  # noqa: E402
from models.data.datasets import load_dataset, options_of  # noqa: E402
from models.export import code_version, environment  # noqa: E402
from service.certificate import Radii  # noqa: E402
from service.inference.classifier import Classifier, View  # noqa: E402
from service.inference.counterfactual import Counterfactual, find_counterfactuals  # noqa: E402


@dataclass(frozen=True)
class Questions:
    """Images, their predictions and the requested targets."""

    image_NCHW: np.ndarray
    radii: Radii
    target_N: np.ndarray
    n_classes: int

    def part(self, rows: slice) -> Questions:
        """Return the questions of some rows."""
        part = Radii(**{field.name: getattr(self.radii, field.name)[rows] for field in fields(Radii)})
        return Questions(self.image_NCHW[rows], part, self.target_N[rows], self.n_classes)

    def search(self, model: View | Counted, batch: int) -> list[Counterfactual]:
        """Return the counterfactuals of all images, searched in batches."""
        answers: list[Counterfactual] = []
        for start in range(0, len(self.image_NCHW), batch):
            part = self.part(slice(start, start + batch))
            answers += find_counterfactuals(
                model,
                part.image_NCHW,
                part.radii.class_id_N,
                part.radii.runner_up_N,
                part.radii.radius_N,
                part.n_classes,
                part.target_N,
            )
        return answers


class Counted:
    """A view that counts images and the time they take."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.forwards = 0
        self.inside_s = 0.0

    def classify(self, image_NCHW: np.ndarray) -> tuple[np.ndarray, Radii]:
        """See `View`."""
        started = time.perf_counter()
        answer = self.view.classify(image_NCHW)
        self.inside_s += time.perf_counter() - started
        self.forwards += len(image_NCHW)
        return answer

    def margin_gradient(self, image_NCHW: np.ndarray, weights_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `View`."""
        started = time.perf_counter()
        answer = self.view.margin_gradient(image_NCHW, weights_NK)
        self.inside_s += time.perf_counter() - started
        return answer


def main() -> None:
    """Measure, print, and on request write."""
    arguments = _arguments()
    names = arguments.model or sorted(folder.parent.name for folder in arguments.models.glob("*/card.json"))
    quality, times = [], []
    for name in names:
        classifier = Classifier.load(arguments.models / name, "cpu", threads=1)
        view = classifier.view(classifier.input_shape)
        image_NCHW = _test_images(classifier, arguments.data, arguments.images)
        for targeted in (False, True) if len(classifier.labels) > 2 else (False,):
            quality.append(_quality(name, view, _questions(classifier, view, image_NCHW, targeted), targeted))
            print(quality[-1], flush=True)
        times.append(_times(name, view, _questions(classifier, view, image_NCHW[: arguments.timed], False)))
        print(times[-1], flush=True)
    made = environment(0.0)
    text = "\n".join(
        [
            "| model | target | n | reached | mean distance | distance / radius, median | mean runs | 95 % "
            "| forwards |",
            "|---|---|---|---|---|---|---|---|---|",
            *quality,
            "",
            "| model | "
            + " | ".join(f"speed over raw, batch {batch}" for batch in BATCHES)
            + " | outside the graphs |",
            "|---|" + "---|" * (len(BATCHES) + 1),
            *times,
            "",
            f"{made['cpu']}, one thread; Python {made['python']}, numpy {made['numpy']}, ONNX Runtime "
            f"{made['onnxruntime']}; times on {arguments.timed} images, median of {REPETITIONS}; code "
            f"{code_version()}.",
        ]
    )
    print(text)
    if arguments.write:
        write_measured(DOCUMENT, text)


def _quality(name: str, view: View, questions: Questions, targeted: bool) -> str:
    counted = Counted(view)
    answers = questions.search(counted, 16)
    n = len(answers)
    reached_N = np.array([answer.reached for answer in answers])
    distance_N = np.array([answer.distance for answer in answers])
    steps_N = np.array([answer.steps for answer in answers])
    ratio_N = distance_N / np.maximum(questions.radii.radius_N, 1e-12)
    cells = [
        name,
        "random" if targeted else "none",
        n,
        f"{reached_N.mean():.2%}",
        f"{distance_N[reached_N].mean():.3f}",
        f"{np.median(ratio_N[reached_N]):.3f}",
        f"{steps_N.mean():.2f}",
        f"{np.percentile(steps_N, 95):.0f}",
        f"{counted.forwards / n:.2f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _times(name: str, view: View, questions: Questions) -> str:
    """Speed: time of the runs of the gradient graph alone over that of the search that needs as many."""
    image_NCHW, n_images = questions.image_NCHW, len(questions.image_NCHW)
    weights_NK = np.zeros((n_images, 1 if view.single_output else questions.n_classes))
    weights_NK[:, 0] = 1.0
    speeds: list[str] = []
    outside = 0.0
    for batch in BATCHES:
        quotients: list[float] = []
        shares: list[float] = []
        for _ in range(REPETITIONS):
            counted = Counted(view)
            started = time.perf_counter()
            answers = questions.search(counted, batch)
            search_s = time.perf_counter() - started
            shares.append(1.0 - counted.inside_s / search_s)
            started = time.perf_counter()
            for start in range(0, n_images, batch):
                rows = slice(start, start + batch)
                view.transport.run(
                    ("logits", "gradient"), {"image": image_NCHW[rows], "margin_weights": weights_NK[rows]}
                )
            raw_s = (time.perf_counter() - started) * sum(answer.steps for answer in answers) / n_images
            quotients.append(raw_s / search_s)
        speeds.append(f"{statistics.median(quotients):.2f}")
        outside = statistics.median(shares)
    return f"| {name} | {' | '.join(speeds)} | {outside:.0%} |"


def _questions(classifier: Classifier, view: View, image_NCHW: np.ndarray, targeted: bool) -> Questions:
    _, radii = view.classify(image_NCHW)
    n_images, n_classes = len(image_NCHW), len(classifier.labels)
    other_N = np.random.default_rng(0).integers(1, n_classes, n_images)
    target_N = (radii.class_id_N + other_N) % n_classes if targeted else np.full(n_images, -1)
    return Questions(image_NCHW, radii, target_N, n_classes)


def _test_images(classifier: Classifier, data: Path, n_images: int) -> np.ndarray:
    folder = data / classifier.name if (data / classifier.name).is_dir() else data
    found = load_dataset(options_of(classifier.card.data, list(classifier.labels)), folder, test_only=True).test
    spread = np.linspace(0, len(found) - 1, min(n_images, len(found))).astype(np.int64)
    return found.at(torch.from_numpy(spread)).pixels(torch.float64).numpy()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="names; all in --models by default")
    parser.add_argument("--models", type=Path, default=ROOT / "models" / "zoo")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets; DIR/MODEL is preferred")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--timed", type=int, default=48)
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
