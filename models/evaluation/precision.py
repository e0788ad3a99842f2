"""An artefact in float32, its dense layers in blocks: written with its own card, and measured beside the original.

Axes: N images.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.data.labelled import LabelledImages
from models.evaluation.measure import EvaluationError, epsilons_of, labelled_images
from models.export import ExportRefusedError, converted, described, forward_engine, radii
from models.precision import PrecisionError
from service.artefact.card import Card, CertifiedAccuracy, write_artefact
from service.certificate import UnsupportedModelError
from service.inference.classifier import Classifier
from service.runtime.engine import Engine

SUFFIX = "-float32"
"""Of the name of the converted artefact."""
BATCHES = (1, 32)
"""Images in the batches that are timed."""
ROUNDS = 40
"""Pairs of times, float64 and float32 in turn."""
SECONDS = 0.02
"""Processor time of one of them."""


@dataclass(frozen=True)
class Comparison:
    """Figures of a model in float32 beside those of the same model in float64."""

    name: str
    n: int
    block: int
    logit_error: float
    kept: float
    """Median share of the radius over the images with a radius above 0 in float64."""
    certified: dict[float, tuple[float, float]]
    """Certified accuracy at each epsilon, in float64 and in float32."""
    times: dict[int, float]
    """Processor time in float32, in units of that in float64, for each size of batch."""

    def row(self) -> str:
        """Return the row of the table in docs/precision.md."""
        certified = ", ".join(f"{100 * a:.2f} -> {100 * b:.2f} @ {e:g}" for e, (a, b) in self.certified.items())
        times = " | ".join(f"{self.times[batch]:.2f}" for batch in BATCHES)
        return (
            f"| `{self.name}` | {self.n} | {self.block} | {self.logit_error:.2g} | {100 * self.kept:.2f} % "
            f"| {certified} | {times} |"
        )


TABLE = (
    "| model | n | block | E | radius kept | certified accuracy in % | time, batch of 1 | time, batch of 32 |\n"
    "|---|---|---|---|---|---|---|---|"
)
"""Head of the table."""


def convert(artefact: Path, data: Path, out: Path, block: int) -> str:
    """Write an artefact in float32 to `out`; return a table that compares both on the whole test set.

    Attacks and the evaluation are those of another model, and stay out of the new card.

    Args:
        artefact: folder of the artefact.
        data: folder of the data set that its card names.
        out: folder of models; written: `out / NAME-float32`.
        block: the most columns of a matrix product.

    Raises:
        EvaluationError: the model has no form in float32, its card fits no data set or another one, or the artefact
            cannot be written.
        ArtefactError, DataError: see their modules.
    """
    # One thread: the times are those of one processor.
    torch.set_num_threads(1)
    classifier = Classifier.load(artefact, "cpu", 1)
    if classifier.certificate.precision != "float64":
        raise EvaluationError(f"{artefact} is in float32 already: name the artefact in float64")
    test = labelled_images(classifier, data, "test")
    model_bytes = (artefact / "model.onnx").read_bytes()
    try:
        made, certificate = converted(model_bytes, block)
    except (PrecisionError, UnsupportedModelError, ExportRefusedError) as error:
        raise EvaluationError(f"{artefact}: {error}") from error
    engines = [forward_engine(one, 1) for one in (model_bytes, made)]
    right_N, before_N = radii(engines[0], classifier.certificate, test)
    still_N, after_N = radii(engines[1], certificate, test)
    epsilons = epsilons_of(classifier.card)
    compared = Comparison(
        name=classifier.name,
        n=len(test),
        block=block,
        logit_error=certificate.logit_error,
        kept=float(np.median(after_N[before_N > 0.0] / before_N[before_N > 0.0])),
        certified={
            e: (float((right_N & (before_N > e)).mean()), float((still_N & (after_N > e)).mean())) for e in epsilons
        },
        times={batch: relative_time(engines, test, batch) for batch in BATCHES},
    )
    changes = {
        "name": classifier.name + SUFFIX,
        "recipe": {**classifier.card.recipe, "export": described(block)},
        "accuracy": float(still_N.mean()),
        "certified_accuracy": [
            CertifiedAccuracy(epsilon=e, value=after, n=len(test)) for e, (_, after) in compared.certified.items()
        ],
        "attacks": [],
        "evaluation": None,
    }
    folder = out / (classifier.name + SUFFIX)
    try:
        write_artefact(folder, Card.model_validate({**classifier.card.model_dump(), **changes}), made)
    except OSError as error:
        raise EvaluationError(f"{folder} cannot be written ({error.strerror or error}): name another --out") from error
    return f"{TABLE}\n{compared.row()}"


def relative_time(engines: list[Engine], test: LabelledImages, batch: int) -> float:
    """Return the processor time of the second engine in units of that of the first: the median of `ROUNDS` ratios.

    Args:
        engines: of one thread.
        test: the images.
        batch: images at once.
    """
    images_NCHW = test.at(slice(0, batch)).pixels(torch.float64).numpy()

    def seconds(engine: Engine, repeats: int) -> float:
        started = time.process_time()
        for _ in range(repeats):
            engine.run(("logits",), {"image": images_NCHW})
        return time.process_time() - started

    repeats = [1 + int(SECONDS / max(1e-6, seconds(engine, 5) / 5)) for engine in engines]
    ratios: list[float] = []
    for _ in range(ROUNDS):
        before, after = (seconds(engine, n) / n for engine, n in zip(engines, repeats, strict=True))
        ratios.append(after / before)
    return float(np.median(ratios))
