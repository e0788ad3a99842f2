"""The report of an evaluation: Markdown tables, and the figures beside them.

Axes: G images of a gallery, M attacked images, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.evaluation import figures
from models.evaluation.attacks import AttackResult
from models.evaluation.summary import Measured, attacked_images
from service.inference.classifier import Classifier

GALLERY_IMAGES = 10


def markdown_report(
    name: str,
    data_name: str,
    results: dict[str, Any],
    attacks: Sequence[AttackResult],
    epsilons: Sequence[float],
) -> str:
    """Return the report: tables, and links to the figures.

    Args:
        name: of the artefact.
        data_name: of the data set.
        results: of `summarise` and `summarise_attacks`, with environment, provider, digest and code version.
        attacks: results of the attacks, their union last; empty without attacks.
        epsilons: L2 radii of the tables, pixels in [0, 1].
    """
    found, made = results["counterfactuals"], results["environment"]
    certified = {entry["epsilon"]: entry["value"] for entry in results["certified_accuracy"]}
    rows = [
        ("clean accuracy", f"{results['accuracy']:.2%}"),
        *((f"certified accuracy at {epsilon:g}", f"{certified[epsilon]:.2%}") for epsilon in epsilons),
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
        *(f"| {quantity} | {value} |" for quantity, value in rows),
    ]
    pictures = [
        ("certified accuracy and robust accuracy", "certified_accuracy.png"),
        ("certified radii", "radii.png"),
        *([("tightness", "tightness.png")] if attacks else []),
        ("counterfactuals", "counterfactuals.png"),
        ("saliency", "saliency.png"),
    ]
    if attacks:
        lines += _attack_tables(results, attacks, epsilons)
    for title, file in pictures:
        lines += ["", f"![{title}]({file})"]
    return "\n".join([*lines, ""])


def _attack_tables(results: dict[str, Any], attacks: Sequence[AttackResult], epsilons: Sequence[float]) -> list[str]:
    n = len(attacks[-1].distance_N)
    tight = results["tightness"]
    shares = {entry["epsilon"]: entry for entry in results["robust_accuracy"]}
    return [
        "",
        f"Attacks on the served graphs, n = {n}, evenly spaced in the test set. None found an image of another class "
        "strictly inside the certified radius (compared in exact rational arithmetic). Distances are those of the "
        "nearest image of another class that was found; FGSM and PGD ascend the margin; AutoAttack is APGD "
        "(cross-entropy and, of three classes or more, logit ratio) and Square.",
        "",
        "| attack | library | flipped | median distance | median radius | median radius / distance |",
        "|---|---|---|---|---|---|",
        *(
            f"| {attack.name} | {attack.library} | {attack.flipped} of {len(attack.distance_N)} | "
            f"{_number(attack.median_distance)} | {_number(float(np.median(attack.radius_N)))} | "
            f"{_number(attack.median_radius_over_distance)} |"
            for attack in attacks
        ),
        "",
        "Of the attacked images:",
        "",
        "| epsilon | certified | robust under all attacks | neither proved nor flipped |",
        "|---|---|---|---|",
        *(
            f"| {epsilon:g} | {shares[epsilon]['certified']:.2%} | {shares[epsilon]['under_attack']:.2%} | "
            f"{shares[epsilon]['under_attack'] - shares[epsilon]['certified']:.2%} |"
            for epsilon in epsilons
        ),
        "",
        f"Tightness, radius / distance of the nearest attack, n = {tight['n']}: median {_number(tight['median'])}; "
        + "; ".join(f"{float(share):.0%} {value:.3f}" for share, value in tight["quantiles"].items())
        + ".",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def draw_figures(
    classifier: Classifier,
    measured: Measured,
    attacked_M: np.ndarray,
    attacks: Sequence[AttackResult],
    epsilons: Sequence[float],
    folder: Path,
) -> None:
    """Write the figures of the report, as PNG files, to a folder.

    Args:
        classifier: as it is served.
        measured: answers about the test set.
        attacked_M: indices of the attacked images.
        attacks: results of the attacks, their union last; empty without attacks.
        epsilons: L2 radii to be marked, pixels in [0, 1].
        folder: of the report.
    """
    radius_N = np.array([prediction.radius for prediction in measured.predictions])
    right_N = np.array([prediction.class_id for prediction in measured.predictions]) == measured.label_N
    known = attacked_images(measured, attacked_M, attacks[-1]) if attacks else None
    figures.plot_certified_accuracy(right_N, radius_N, known, epsilons, folder / "certified_accuracy.png")
    figures.plot_radii(right_N, radius_N, folder / "radii.png")
    if known is not None:
        figures.plot_tightness(known, folder / "tightness.png")
    panels = _panels(classifier, measured)
    figures.plot_counterfactuals(panels, folder / "counterfactuals.png")
    figures.plot_saliency(panels, folder / "saliency.png")


def _panels(classifier: Classifier, measured: Measured) -> list[figures.Panel]:
    """Return one right answer for each class in turn."""
    chosen_G = _gallery_images(len(classifier.labels), measured)
    weights_GK = np.zeros((len(chosen_G), len(classifier.labels)))
    for row, n in enumerate(chosen_G):
        weights_GK[row, measured.predictions[n].class_id] = 1.0
        weights_GK[row, measured.predictions[n].runner_up] = -1.0
    _, gradient_GCHW = classifier.margin_gradient(measured.image_NCHW[chosen_G], weights_GK)
    return [
        figures.Panel(
            image_CHW=measured.image_NCHW[n],
            label=classifier.labels[measured.predictions[n].class_id],
            radius=measured.predictions[n].radius,
            other_CHW=measured.counterfactuals[n].pixels_CHW / 255,
            other_label=classifier.labels[measured.counterfactuals[n].class_id],
            distance=measured.counterfactuals[n].distance,
            gradient_CHW=gradient_GCHW[row],
            runner_up=classifier.labels[measured.predictions[n].runner_up],
        )
        for row, n in enumerate(chosen_G)
    ]


def _gallery_images(n_classes: int, measured: Measured) -> list[int]:
    class_N = np.array([prediction.class_id for prediction in measured.predictions])
    right_N = class_N == measured.label_N
    queues = [list(np.flatnonzero(right_N & (class_N == k))) for k in range(n_classes)]
    chosen: list[int] = []
    while len(chosen) < GALLERY_IMAGES and any(queues):
        chosen.extend(int(queue.pop(0)) for queue in queues if queue)
    return chosen[:GALLERY_IMAGES] or list(range(min(GALLERY_IMAGES, len(class_N))))
