"""What an artefact is worth, measured as it is served: the same classifier and counterfactual search, on the
test set.

Every number goes into `card.json` and into a report beside it (JSON, Markdown, two plots), with n, hardware
and versions. Two of them must be 0: counterfactuals nearer than the certified radius, and attacks that
succeed inside it.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float64, Int64
from tqdm import tqdm

from models.attacks import INSIDE, AttackResult, run_attacks
from models.data import DataError
from models.datasets import load_dataset, options_of
from models.export import code_version, environment
from service.artefact import Card, CertifiedAccuracy, read_card, write_card
from service.classifier import Classifier, Prediction
from service.counterfactual import Counterfactual
from service.engine import Provider, ProviderError

matplotlib.use("Agg")
from matplotlib import pyplot

log = logging.getLogger(__name__)

BATCH = 250
CURVE = tuple(round(0.1 * step, 1) for step in range(1, 21))
"""Radii of the certified-accuracy curve, L2, pixels in [0, 1]."""
GALLERY_IMAGES = 10
REPORT_FOLDER = "report"


class EvaluationError(Exception):
    """The artefact cannot be evaluated on this data; the message says what to do."""


@dataclass(frozen=True)
class Measured:
    """Answers about the whole test set."""

    image_NCHW: Float64[np.ndarray, "N C H W"]
    label_N: Int64[np.ndarray, " N"]
    predictions: list[Prediction]
    counterfactuals: list[Counterfactual]
    posted_back_N: Int64[np.ndarray, " N"]
    """Class of each counterfactual when it is sent as an image of its own."""


def evaluate(
    artefact: Path,
    data: Path,
    *,
    attacks: bool = True,
    n_attack: int = 1000,
    limit: int | None = None,
    provider: Provider = "auto",
    threads: int = 1,
    out: Path | None = None,
) -> str:
    """Measure the artefact, write report and card.

    Args:
        artefact: folder of the artefact; its card says which data set it is about.
        data: folder of the data set.
        attacks: whether to run `models.attacks`; without, the card keeps the results it has.
        n_attack: attack the first so many images of the test set.
        limit: use only the first so many images; the card is then left alone.
        provider: execution provider, as in the server.
        threads: threads of ONNX Runtime.
        out: folder of the report; `report` in the artefact by default.

    Returns:
        The report as Markdown.

    Raises:
        EvaluationError: the card fits no data set or another one, or the provider cannot be had.
        ArtefactError, DataError: see their modules.
    """
    started = time.monotonic()
    try:
        classifier = Classifier.load(artefact, provider, threads)
    except ProviderError as error:
        raise EvaluationError(str(error)) from error
    image_NCHW, label_N = _test_images(classifier, data)
    if limit is not None:
        image_NCHW, label_N = image_NCHW[:limit], label_N[:limit]
    measured = _measure(classifier, image_NCHW, label_N)
    attacked = run_attacks(classifier, image_NCHW[:n_attack]) if attacks else []
    epsilons = sorted({*_recipe_epsilons(classifier.card), *CURVE})
    results = {
        **summarise(measured, epsilons),
        "provider": classifier.provider,
        "digest": classifier.digest,
        "code_version": code_version(),
        "environment": environment(time.monotonic() - started),
    }
    folder = out if out is not None else artefact / REPORT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    entries = [result.as_card_entry() for result in attacked]
    (folder / "evaluation.json").write_text(json.dumps({**results, "attacks": entries}, indent=2) + "\n")
    data_name = str(classifier.card.data.get("name", "The"))
    text = as_markdown(classifier.name, data_name, results, attacked, _recipe_epsilons(classifier.card))
    (folder / "evaluation.md").write_text(text)
    _plot_curve(results, folder / "certified_accuracy.png")
    _plot_gallery(classifier.labels, measured, folder / "counterfactuals.png")
    if limit is None:
        _update_card(artefact, results, entries, classifier.digest)
    return text


def summarise(measured: Measured, epsilons: Sequence[float]) -> dict[str, Any]:
    """The figures of a test set; shares are of all its images."""
    radius_N = np.array([prediction.radius for prediction in measured.predictions])
    class_N = np.array([prediction.class_id for prediction in measured.predictions])
    distance_N = np.array([answer.distance for answer in measured.counterfactuals])
    reached_N = np.array([answer.reached for answer in measured.counterfactuals])
    answer_class_N = np.array([answer.class_id for answer in measured.counterfactuals])
    steps_N = np.array([answer.steps for answer in measured.counterfactuals])
    right_N = class_N == measured.label_N
    return {
        "n": len(radius_N),
        "accuracy": float(right_N.mean()),
        "certified_accuracy": [{"epsilon": e, "value": float((right_N & (radius_N > e)).mean())} for e in epsilons],
        "median_radius": float(np.median(radius_N)),
        "abstentions": int((radius_N == 0).sum()),
        "counterfactuals": {
            "n": len(distance_N),
            "reached": float(reached_N.mean()),
            "nearer_than_radius": count_nearer_than_radius(measured),
            "other_class_when_posted_back": int((measured.posted_back_N != answer_class_N).sum()),
            "median_distance": float(np.median(distance_N)),
            "median_radius_over_distance": float(np.median(radius_N / distance_N)),
            "mean_steps": float(steps_N.mean()),
        },
    }


def count_nearer_than_radius(measured: Measured) -> int:
    """Count counterfactuals whose distance is below the radius, in exact arithmetic: squares of integers /
    255^2."""
    count = 0
    for image_CHW, prediction, answer in zip(
        measured.image_NCHW, measured.predictions, measured.counterfactuals, strict=True
    ):
        difference = np.rint(image_CHW * 255).astype(np.int64) - answer.pixels_CHW
        square = Fraction(int((difference * difference).sum()), 255 * 255)
        count += square < Fraction(prediction.radius) ** 2 or answer.distance < prediction.radius
    return count


def _measure(classifier: Classifier, image_NCHW: np.ndarray, label_N: np.ndarray) -> Measured:
    predictions: list[Prediction] = []
    counterfactuals: list[Counterfactual] = []
    for start in tqdm(range(0, len(image_NCHW), BATCH), desc="counterfactuals", unit="batch"):
        part = image_NCHW[start : start + BATCH]
        predicted = classifier.predict(part)
        predictions.extend(predicted)
        counterfactuals.extend(classifier.counterfactual(part, predicted, None))
    posted_back = [
        classifier.predict(answer.pixels_CHW[None] / 255)[0].class_id
        for answer in tqdm(counterfactuals, desc="posting back", unit="image")
    ]
    return Measured(image_NCHW, label_N, predictions, counterfactuals, np.array(posted_back))


def _test_images(classifier: Classifier, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """The test set that the card names, as the network takes it."""
    card = classifier.card
    try:
        options = options_of(card.data, list(classifier.labels))
    except DataError as error:
        raise EvaluationError(f"{classifier.name}: {error}") from error
    if options.classes != tuple(classifier.labels):
        raise EvaluationError(
            f"{classifier.name} has the classes {', '.join(classifier.labels)}, its data.options "
            f"{', '.join(options.classes or ['all'])}; correct the card, or train again"
        )
    found = load_dataset(options, data, test_only=True)
    stated, actual = (block.get("digest", {}).get("test") for block in (card.data, found.card))
    if stated != actual:
        raise EvaluationError(
            f"the test images under {data} are not those that {classifier.name} was measured on (digest {actual}, the "
            f"card states {stated}), and some may have been trained on: give the folder as it was, or train again"
        )
    image_NCHW = found.test.pixels(torch.float64).numpy()
    if image_NCHW.shape[1:] != classifier.input_shape:
        raise EvaluationError(
            f"{classifier.name} takes images of shape {classifier.input_shape}, those of {found.card['name']} have "
            f"{image_NCHW.shape[1:]}; correct data.options in the card, or train again"
        )
    return image_NCHW, found.test.labels_N.numpy()


def _recipe_epsilons(card: Card) -> list[float]:
    return [
        float(epsilon) for epsilon in card.recipe.get("epsilons", [entry.epsilon for entry in card.certified_accuracy])
    ]


def _update_card(folder: Path, results: dict[str, Any], attacks: list[dict[str, Any]], digest: str) -> None:
    card = read_card(folder)
    if card.graphs["model.onnx"] != digest:
        raise EvaluationError(f"{folder} changed while it was evaluated; evaluate it again")
    wanted = _recipe_epsilons(card)
    changes: dict[str, Any] = {
        "accuracy": results["accuracy"],
        "certified_accuracy": [
            CertifiedAccuracy(epsilon=entry["epsilon"], value=entry["value"], n=results["n"]).model_dump()
            for entry in results["certified_accuracy"]
            if entry["epsilon"] in wanted
        ],
        "evaluation": results,
    }
    if attacks:
        changes["attacks"] = attacks
    write_card(folder, Card.model_validate({**card.model_dump(), **changes}))


def as_markdown(
    name: str,
    data_name: str,
    results: dict[str, Any],
    attacks: Sequence[AttackResult],
    epsilons: Sequence[float],
) -> str:
    """The report as two tables."""
    found, made = results["counterfactuals"], results["environment"]
    value = {entry["epsilon"]: entry["value"] for entry in results["certified_accuracy"]}
    rows = [
        ("clean accuracy", f"{results['accuracy']:.2%}"),
        *((f"certified accuracy at {epsilon:g}", f"{value[epsilon]:.2%}") for epsilon in epsilons),
        ("median radius", f"{results['median_radius']:.4f}"),
        ("counterfactuals that reach another class", f"{found['reached']:.2%}"),
        ("counterfactuals nearer than the radius", str(found["nearer_than_radius"])),
        ("counterfactuals with another class when posted back", str(found["other_class_when_posted_back"])),
        ("median counterfactual distance", f"{found['median_distance']:.4f}"),
        ("median radius / distance", f"{found['median_radius_over_distance']:.3f}"),
        ("mean gradient steps", f"{found['mean_steps']:.2f}"),
    ]
    lines = [
        f"# Evaluation of `{name}`",
        "",
        f"{data_name} test set, n = {results['n']}; L2, pixels in [0, 1]; radii are proved bounds. Served by "
        f"{results['provider']} (ONNX Runtime {made['onnxruntime']}, numpy {made['numpy']}) on {made['cpu']}; model "
        f"{results['digest']}, code {results['code_version']}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {figure} |" for what, figure in rows),
    ]
    if attacks:
        lines += [
            "",
            f"Attacks inside {INSIDE} of the radius, on the served graphs:",
            "",
            "| attack | library | n | successes | flipped at any distance | median distance | median radius |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {attack.name} | {attack.library} | {attack.n} | {attack.successes} | {attack.flipped} | "
                f"{'-' if attack.median_distance is None else format(attack.median_distance, '.4f')} | "
                f"{attack.median_radius:.4f} |"
                for attack in attacks
            ),
        ]
    return "\n".join(
        [*lines, "", "![certified accuracy](certified_accuracy.png)", "", "![counterfactuals](counterfactuals.png)", ""]
    )


def _plot_curve(results: dict[str, Any], path: Path) -> None:
    curve = [(0.0, results["accuracy"])] + [
        (entry["epsilon"], entry["value"]) for entry in results["certified_accuracy"]
    ]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([epsilon for epsilon, _ in curve], [100 * share for _, share in curve], marker=".")
    axes.set(
        xlabel="epsilon (L2, pixels in [0, 1])", ylabel=f"certified accuracy, % of n = {results['n']}", ylim=(0, 100)
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_gallery(labels: Sequence[str], measured: Measured, path: Path) -> None:
    """For each class in turn a right answer: the image, the signed difference, the counterfactual."""
    chosen = _gallery_images(len(labels), measured)
    figure, axes = pyplot.subplots(
        3, len(chosen), figsize=(1.35 * len(chosen), 4.6), layout="constrained", squeeze=False
    )
    for column, n in enumerate(chosen):
        prediction, answer = measured.predictions[n], measured.counterfactuals[n]
        image_HWC = np.moveaxis(measured.image_NCHW[n], 0, -1)
        other_HWC = np.moveaxis(answer.pixels_CHW / 255, 0, -1)
        difference_HW = (other_HWC - image_HWC).mean(axis=2)
        top, middle, bottom = axes[:, column]
        top.imshow(image_HWC.squeeze(), cmap="gray", vmin=0, vmax=1)
        middle.imshow(difference_HW, cmap="RdBu_r", vmin=-0.6, vmax=0.6)
        bottom.imshow(other_HWC.squeeze(), cmap="gray", vmin=0, vmax=1)
        top.set_title(f"{labels[prediction.class_id]}\nradius {prediction.radius:.2f}", fontsize=8)
        bottom.set_title(f"{labels[answer.class_id]}\ndistance {answer.distance:.2f}", fontsize=8)
    for panel in axes.ravel():
        panel.axis("off")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _gallery_images(n_classes: int, measured: Measured) -> list[int]:
    class_N = np.array([prediction.class_id for prediction in measured.predictions])
    right_N = class_N == measured.label_N
    queues = [list(np.flatnonzero(right_N & (class_N == k))) for k in range(n_classes)]
    chosen: list[int] = []
    while len(chosen) < GALLERY_IMAGES and any(queues):
        chosen.extend(int(queue.pop(0)) for queue in queues if queue)
    return chosen[:GALLERY_IMAGES] or list(range(min(GALLERY_IMAGES, len(class_N))))
