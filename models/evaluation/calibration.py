"""Calibration of an artefact: the block of its card from which certified sets and decisions are answered.

The calibration images are those that the recipe held out of the training (`calibration_images`), or every second image
of the test set. Coverage and error are then reported on the other test images.

Axes: N images, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64

from models.data.labelled import LabelledImages
from models.evaluation.measure import BATCH, EvaluationError, labelled_images
from models.training.batches import calibration_split
from service.artefact.card import AcceptanceThreshold, Calibration, Card, ConformalQuantile
from service.artefact.files import CARD_FILE, read_file, write_atomically
from service.certificate import Certificate, certified_radius
from service.certificate.sets import (
    acceptance_thresholds,
    certified_set,
    conformal_quantile,
    lower_scores,
    order_statistic,
    share_bound,
)
from service.inference.classifier import Classifier
from service.runtime.provider import Provider, ProviderError

COVERAGES = (
    *(0.5, 0.6, 0.7, 0.75, 0.8, 0.85),
    *(0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99),
    *(0.995, 0.998, 0.999, 0.9995, 0.9999),
)
"""Coverages of the card, as far as the number of images supports them."""
SHARES = tuple(
    Fraction(half_percents, 200)
    for half_percents in (10, 20, 40, 60, 80, 100, 120, 140, 160, 170, 180, 185, 190, 194, 196, 198, 200)
)
"""Shares of the calibration images that the thresholds accept; fixed, since all their bounds hold together."""
CONFIDENCE = 0.95
REPORTED = (0.9, 0.95, 0.99)
REPORTED_ERRORS = (0.01, 0.02, 0.05)
_FEWEST = 20


@dataclass(frozen=True)
class Scored:
    """Logits of labelled images."""

    logits_NK: Float64[np.ndarray, "N K"]
    label_N: Int64[np.ndarray, " N"]

    def at(self, chosen: np.ndarray | slice) -> Scored:
        """Return the images at the chosen indices."""
        return Scored(self.logits_NK[chosen], self.label_N[chosen])

    def radii(self, certificate: Certificate) -> tuple[np.ndarray, np.ndarray]:
        """Return the certified radius of each image, and whether its class is wrong."""
        radii = certified_radius(self.logits_NK, certificate.margin_bounds_KK, certificate.logit_error)
        return radii.radius_N, radii.class_id_N != self.label_N

    def true_scores(self, certificate: Certificate) -> np.ndarray:
        """Return the calibration score of the true class of each image."""
        scores_NK = lower_scores(self.logits_NK, certificate.margin_bounds_KK, certificate.logit_error)
        return scores_NK[np.arange(len(self.label_N)), self.label_N]


def calibrate(artefact: Path, data: Path, *, provider: Provider = "auto", threads: int = 1) -> str:
    """Write the calibration of an artefact to its card, all else as it is; return coverage and errors as Markdown.

    Args:
        artefact: folder of the artefact; its card names the data set.
        data: folder of the data set.
        provider: execution provider, as in the server.
        threads: threads of ONNX Runtime.

    Raises:
        EvaluationError: the card fits no data set or another one, there are too few images, or the provider is not
            available.
        ArtefactError, DataError: see their modules.
    """
    try:
        classifier = Classifier.load(artefact, provider, threads)
    except ProviderError as error:
        raise EvaluationError(str(error)) from error
    card = classifier.card
    test = score(classifier, labelled_images(classifier, data, "test"))
    size, name = int(card.recipe.get("calibration_images", 0)), str(card.data.get("name", "its data set"))
    if size:
        train = labelled_images(classifier, data, "train")
        part, _ = calibration_split(train, size, card.seed or 0)
        held_out, rest = score(classifier, part), test
        source = f"{size} images of the {name} training set, drawn at random and held out of the training"
    else:
        held_out, rest = test.at(slice(0, None, 2)), test.at(slice(1, None, 2))
        source = (
            f"every second image of the {name} test set, from the first on; the model was never trained on it, and its "
            "coverage is measured on the other half"
        )
    block = calibration_of(classifier.certificate, held_out, classifier.digest, source)
    _replace_block(artefact, block)
    return _report(classifier, block, rest)


def score(classifier: Classifier, images: LabelledImages) -> Scored:
    """Return the logits of images as the server computes them.

    Args:
        classifier: as it is served.
        images: of the shape that the model takes.
    """
    logits = [
        classifier.classify(images.at(slice(start, start + BATCH)).pixels(torch.float64).numpy())[0]
        for start in range(0, len(images), BATCH)
    ]
    return Scored(np.concatenate(logits), images.labels_N.numpy())


def calibration_of(certificate: Certificate, held_out: Scored, digest: str, source: str) -> Calibration:
    """Return the block of a card.

    Args:
        certificate: of the model, for images of its own size.
        held_out: calibration images; the model was not trained on them.
        digest: of `model.onnx`.
        source: the images in words.

    Raises:
        EvaluationError: there are too few images.
    """
    n = len(held_out.label_N)
    if n < _FEWEST:
        raise EvaluationError(f"{n} calibration images are too few: give {_FEWEST} at least")
    scores_N = held_out.true_scores(certificate)
    return Calibration(
        model=digest,
        n=n,
        source=source,
        quantiles=[
            ConformalQuantile(coverage=coverage, quantile=conformal_quantile(scores_N, coverage))
            for coverage in COVERAGES
            if order_statistic(n, coverage) >= 1
        ],
        confidence=CONFIDENCE,
        thresholds=_thresholds(*held_out.radii(certificate)),
    )


def _thresholds(radius_N: np.ndarray, wrong_N: np.ndarray) -> list[AcceptanceThreshold]:
    # A union bound over all thresholds, so that a request may choose any of them.
    significance = (1.0 - CONFIDENCE) / len(SHARES)
    found: dict[float, AcceptanceThreshold] = {}
    for threshold in acceptance_thresholds(radius_N, SHARES):
        accepted_N = radius_N >= threshold
        accepted, errors = int(accepted_N.sum()), int(wrong_N[accepted_N].sum())
        if accepted:
            found[threshold] = AcceptanceThreshold(
                radius=threshold,
                accepted=accepted,
                errors=errors,
                error_bound=share_bound(errors, accepted, significance),
            )
    return list(found.values())


def _replace_block(folder: Path, block: Calibration) -> None:
    """Write the block to the card; every other member stays as it is written, those of older versions too."""
    path = folder / CARD_FILE
    written = json.loads(read_file(path))
    members: dict[str, object] = {}
    for name, value in written.items():
        if name == "accuracy":
            members["calibration"] = None
        if name != "calibration":
            members[name] = value
    members["calibration"] = block.model_dump(mode="json")
    Card.model_validate(members)
    content = (json.dumps(members, indent=2, ensure_ascii=False) + "\n").encode()
    write_atomically(path, lambda file: file.write(content))


def _report(classifier: Classifier, block: Calibration, rest: Scored) -> str:
    certificate = classifier.certificate
    epsilons = [0.0, *(float(epsilon) for epsilon in classifier.card.recipe.get("epsilons", ()))]
    lines = [
        f"{classifier.name}: {block.n} calibration images ({block.source}); measured on {len(rest.label_N)} other "
        "test images, none changed.",
        "",
        "| coverage | epsilon | measured | mean classes |",
        "|---|---|---|---|",
    ]
    for entry in block.quantiles:
        for epsilon in epsilons if entry.coverage in REPORTED else ():
            member_NK = certified_set(rest.logits_NK, entry.quantile, epsilon, certificate.margin_bounds_KK)
            held = member_NK[np.arange(len(member_NK)), rest.label_N].mean()
            size = member_NK.sum(axis=1).mean()
            lines.append(f"| {entry.coverage:g} | {epsilon:g} | {held:.2%} | {size:.2f} |")
    return "\n".join([*lines, "", *_decision_lines(block.thresholds, *rest.radii(certificate))])


def _decision_lines(thresholds: Sequence[AcceptanceThreshold], radius_N: np.ndarray, wrong_N: np.ndarray) -> list[str]:
    lines = ["| largest error | threshold | accepted | errors among them |", "|---|---|---|---|"]
    for most in REPORTED_ERRORS:
        reached = [entry.radius for entry in thresholds if entry.error_bound <= most]
        if not reached:
            lines.append(f"| {most:g} | not available | | |")
            continue
        accepted_N = radius_N >= min(reached)
        share = wrong_N[accepted_N].mean() if accepted_N.any() else 0.0
        lines.append(f"| {most:g} | {min(reached):.4f} | {accepted_N.mean():.2%} | {share:.2%} |")
    return lines
