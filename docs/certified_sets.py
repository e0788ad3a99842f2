"""Certified sets of the shipped models: `python -m docs.certified_sets --data DIR [MODEL ...]`.

For each model five random splits of the test set: one half calibrates, on the other coverage and size are measured,
with the score of the service and with two others, each robust by its own Lipschitz constant: the logit `f_k`, and its
distance to the largest, `f_k - max f`. Then an attack on the sets that the service answers: it changes images of the
half that did not calibrate the card by less than epsilon, to push the true class out. `--write` replaces the tables of
docs/certified-sets.md.

Axes: N images, K classes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.soundness.data import classifiers, data_folder
from benchmarks.soundness.document import write_measured
from models.evaluation.calibration import REPORTED, Scored, score
from models.evaluation.measure import labelled_images
from models.export import code_version, environment
from service.certificate import Certificate
from service.certificate.sets import conformal_quantile, lower_scores
from service.inference.classifier import Classifier, View
from service.inference.sets import sets_of
from service.network.operators import Constant
from service.network.reader import read
from service.pixels.distances import is_inside

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "certified-sets.md"
SPLITS = 5
STEPS = 12
INSIDE = 1 - 1e-9
"""Share of epsilon up to which images are changed."""


@dataclass(frozen=True)
class Asked:
    """Options of a request."""

    coverage: float
    epsilon: float
    max_error: float | None = None


@dataclass(frozen=True)
class Method:
    """A score and the change of it that a change of the image by 1 can cause, for each class."""

    score_NK: np.ndarray
    constant_K: np.ndarray

    def sets(self, chosen: np.ndarray, quantile: float, epsilon: float, largest_N: np.ndarray) -> np.ndarray:
        """Return the sets of the chosen images; the largest logit is in each."""
        member_NK = self.score_NK[chosen] + epsilon * self.constant_K >= quantile
        member_NK[np.arange(len(chosen)), largest_N] = True
        return member_NK


def head_constants(model_bytes: bytes, certificate: Certificate) -> np.ndarray:
    """Return the Lipschitz constant of each logit: that of the last tensor times the norm of its row of the head."""
    if certificate.n_outputs == 1:
        return np.full(2, certificate.lipschitz_bound)
    matrices = [
        operand.array
        for operator in read(model_bytes).operators
        for operand in operator.operands
        if isinstance(operand, Constant) and operand.array.ndim == 2
    ]
    row_KM = matrices[-1] if len(matrices[-1]) == len(certificate.margin_bounds_KK) else matrices[-1].T
    other = ~np.eye(len(row_KM), dtype=bool)
    distance_KK = np.linalg.norm(row_KM[:, None] - row_KM, axis=2)
    body = (certificate.margin_bounds_KK[other] / distance_KK[other]).max()
    return body * np.linalg.norm(row_KM, axis=1)


def methods(scored: Scored, certificate: Certificate, logit_K: np.ndarray) -> tuple[Method, ...]:
    """Return the score of the service, the logit, and the distance to the largest logit."""
    own_NK = lower_scores(scored.logits_NK, certificate.margin_bounds_KK, certificate.logit_error)
    off_diagonal_KK = certificate.margin_bounds_KK * ~np.eye(len(logit_K), dtype=bool)
    return (
        Method(own_NK, np.ones(len(logit_K))),
        Method(scored.logits_NK, logit_K),
        Method(scored.logits_NK - scored.logits_NK.max(axis=1, keepdims=True), off_diagonal_KK.max(axis=1)),
    )


def split_rows(name: str, scored: Scored, compared: tuple[Method, ...], epsilons: list[float]) -> Iterator[str]:
    """Yield the rows of the table: coverage, its least of the splits, and mean size by method."""
    n = len(scored.label_N)
    largest_N = np.argmax(scored.logits_NK, axis=1)
    for coverage in REPORTED:
        for epsilon in epsilons:
            held, sizes = np.zeros((SPLITS, len(compared))), np.zeros((SPLITS, len(compared)))
            for split in range(SPLITS):
                order_N = np.random.default_rng(split).permutation(n)
                half, rest = order_N[: n // 2], order_N[n // 2 :]
                for m, method in enumerate(compared):
                    true_N = method.score_NK[half, scored.label_N[half]]
                    member_NK = method.sets(rest, conformal_quantile(true_N, coverage), epsilon, largest_N[rest])
                    held[split, m] = member_NK[np.arange(len(rest)), scored.label_N[rest]].mean()
                    sizes[split, m] = member_NK.sum(axis=1).mean()
            cells = [f"{held[:, m].mean():.1%} ({held[:, m].min():.1%})" for m in range(len(compared))]
            means = [f"{size:.2f}" for size in sizes.mean(axis=0)]
            least = min(means, key=float)
            means = [f"**{size}**" if size == least else size for size in means]
            yield f"| {name} | {coverage:.0%} | {epsilon:.3g} | {' | '.join((*means, *cells))} |"


def attacked(view: View, image_NCHW: np.ndarray, label_N: np.ndarray, epsilon: float) -> Iterator[np.ndarray]:
    """Yield images within epsilon on which the score of the true class is pushed down.

    The steps follow the gradient of the margin that decides the score of the true class, clipped to the box and to the
    ball; the last yield is the counterfactual of the service, pulled inside the ball.
    """
    bounds_KK = view.certificate.margin_bounds_KK
    rows = np.arange(len(image_NCHW))
    point_NCHW = image_NCHW.copy()
    for step in range(STEPS):
        logits_NK, _ = view.classify(point_NCHW)
        quotient_NK = (logits_NK[rows, label_N][:, None] - logits_NK) / np.maximum(bounds_KK[label_N], 1e-300)
        quotient_NK[rows, label_N] = np.inf
        weights_NK = np.zeros_like(logits_NK)
        weights_NK[rows, label_N] = -1.0
        weights_NK[rows, quotient_NK.argmin(axis=1)] += 1.0
        _, gradient_NCHW = view.margin_gradient(point_NCHW, weights_NK)
        length_N = np.sqrt((gradient_NCHW**2).sum(axis=(1, 2, 3), keepdims=True))
        # The first step goes to the sphere, the others improve on it.
        size = epsilon if step == 0 else epsilon * 2.0 / STEPS
        point_NCHW = np.clip(point_NCHW + size * gradient_NCHW / np.maximum(length_N, 1e-300), 0.0, 1.0)
        point_NCHW = pulled_inside(image_NCHW, point_NCHW, epsilon)
        yield point_NCHW


def pulled_inside(image_NCHW: np.ndarray, other_NCHW: np.ndarray, epsilon: float) -> np.ndarray:
    """Return the images of the segment that lie within epsilon, below it by a billionth."""
    way_NCHW = other_NCHW - image_NCHW
    length_N = np.sqrt((way_NCHW**2).sum(axis=(1, 2, 3), keepdims=True))
    share_N = np.minimum(1.0, INSIDE * epsilon / np.maximum(length_N, 1e-300))
    return np.clip(image_NCHW + share_N * way_NCHW, 0.0, 1.0)


@dataclass(frozen=True)
class Attacked:
    """Result of an attack."""

    n: int
    clean: float
    """Share of unchanged images whose set holds the true class."""
    under_attack: float
    """Share of images for which no change was found that pushes the true class out."""
    refuted: int
    """Images whose own score reaches the quantile, so that no change below epsilon may push the class out."""


def attack(
    classifier: Classifier, image_NCHW: np.ndarray, label_N: np.ndarray, epsilon: float, coverages: Sequence[float]
) -> list[Attacked]:
    """Attack the sets that the service answers; return the result for each coverage.

    Args:
        classifier: as it is served, calibrated.
        image_NCHW: images that did not calibrate it.
        label_N: their true classes.
        epsilon: bound of the changes, L2, pixels in [0, 1]; above 0.
        coverages: of the sets.
    """
    view = classifier.view(classifier.input_shape)
    certificate, rows = classifier.certificate, np.arange(len(image_NCHW))
    calibration = classifier.card.calibration
    assert calibration is not None

    def holds(logits_NK: np.ndarray) -> np.ndarray:
        """Whether the set of each image holds the true class, by coverage."""
        found = [sets_of(classifier, Asked(c, epsilon), logits_NK, classifier.input_shape) for c in coverages]
        return np.array([member_NK[rows, label_N] for member_NK in found if member_NK is not None])

    logits_NK, _ = view.classify(image_NCHW)
    own_N = lower_scores(logits_NK, certificate.margin_bounds_KK, certificate.logit_error)[rows, label_N]
    clean_QN = holds(logits_NK)
    kept_QN = clean_QN.copy()
    found = classifier.counterfactual(image_NCHW, classifier.predict(image_NCHW), [None] * len(image_NCHW))
    counterfactual_NCHW = np.array([answer.pixels_CHW / 255 for answer in found])
    tried = [pulled_inside(image_NCHW, counterfactual_NCHW, epsilon)]
    for points_NCHW in itertools.chain(tried, attacked(view, image_NCHW, label_N, epsilon)):
        inside_N = np.array([is_inside(a, b, epsilon) for a, b in zip(image_NCHW, points_NCHW, strict=True)])
        kept_QN &= holds(view.classify(points_NCHW)[0]) | ~inside_N
    results: list[Attacked] = []
    for coverage, clean_N, kept_N in zip(coverages, clean_QN, kept_QN, strict=True):
        quantile = next(entry.quantile for entry in calibration.quantiles if entry.coverage >= coverage)
        refuted = int(((own_N >= quantile) & ~kept_N).sum())
        results.append(Attacked(len(rows), float(clean_N.mean()), float(kept_N.mean()), refuted))
    return results


def attack_rows(
    classifier: Classifier, image_NCHW: np.ndarray, label_N: np.ndarray, epsilons: list[float]
) -> Iterator[str]:
    """Yield the rows of the table of attacks."""
    for epsilon in epsilons:
        results = attack(classifier, image_NCHW, label_N, epsilon, REPORTED)
        for coverage, found in zip(REPORTED, results, strict=True):
            yield (
                f"| {classifier.name} | {coverage:.0%} | {epsilon:.3g} | {found.n} | {found.clean:.1%} | "
                f"{found.under_attack:.1%} | {found.refuted} |"
            )


def main() -> None:
    """Measure, print, and on request write."""
    arguments = _arguments()
    names = arguments.model or classifiers(arguments.models)
    splits: list[str] = []
    attacks: list[str] = []
    for name in names:
        classifier = Classifier.load(arguments.models / name, "cpu", arguments.threads)
        epsilons = [0.0, *(float(epsilon) for epsilon in classifier.card.recipe["epsilons"])]
        images = labelled_images(classifier, data_folder(classifier, arguments.data), "test")
        scored = score(classifier, images)
        logit_K = head_constants((arguments.models / name / "model.onnx").read_bytes(), classifier.certificate)
        for row in split_rows(name, scored, methods(scored, classifier.certificate, logit_K), epsilons):
            splits.append(row)
            sys.stdout.write(f"{row}\n")
        odd_N = np.arange(1, len(images), 2)
        chosen_N = odd_N[np.linspace(0, len(odd_N) - 1, min(arguments.attacked, len(odd_N))).astype(np.int64)]
        part = images.at(torch.from_numpy(chosen_N))
        pixels_NCHW = part.pixels(torch.float64).numpy()
        for row in attack_rows(classifier, pixels_NCHW, part.labels_N.numpy(), epsilons[1:]):
            attacks.append(row)
            sys.stdout.write(f"{row}\n")
    made = environment(0.0)
    text = "\n".join(
        [
            "| model | coverage | epsilon | mean size | logit | distance to largest | coverage found | logit | "
            "distance to largest |",
            "|---|---|---|---|---|---|---|---|---|",
            *splits,
            "",
            "| model | coverage | epsilon | n | held | held under attack | refuted |",
            "|---|---|---|---|---|---|---|",
            *attacks,
            "",
            f"{made['cpu']}; Python {made['python']}, numpy {made['numpy']}, ONNX Runtime {made['onnxruntime']}; code "
            f"{code_version()}.",
        ]
    )
    if arguments.write:
        write_measured(DOCUMENT, text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="names; all in --models by default")
    parser.add_argument("--models", type=Path, default=ROOT / "models" / "zoo")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets; DIR/MODEL is preferred")
    parser.add_argument("--attacked", type=int, default=200, help="images to attack (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
