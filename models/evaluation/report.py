"""The report of an evaluation: Markdown tables, and the figures beside them.

Axes: G images of a gallery, M attacked images, N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from models.evaluation import figures
from models.evaluation.attacks import AttackResult
from models.evaluation.details import Answers, worst_mistakes
from models.evaluation.images import ImageSet
from models.evaluation.novelty import novelty_cells, novelty_text
from models.evaluation.summary import Measured, answers_of, attacked_images
from models.evaluation.tables import detail_lines, table_lines
from service.inference.classifier import Classifier, Prediction
from service.inference.counterfactual import Counterfactual

GALLERY_IMAGES = 10
MISTAKES = "mistakes"
"""Title of the picture that stands in its own section."""
FAST, BEST = "fast", "with reference images"
"""Names of the two radii in tables."""


def markdown_report(
    name: str,
    images: ImageSet,
    results: Mapping[str, Any],
    pictures: Mapping[str, str],
    epsilons: Sequence[float],
) -> str:
    """Return the report: tables, and links to the figures.

    Args:
        name: of the artefact.
        images: that were measured.
        results: of `summarise`, `summarise_attacks` and `details.details`, with environment, provider, digest, code
            version and the entries of `attacks`.
        pictures: of `draw_figures`.
        epsilons: L2 radii of the tables, pixels in [0, 1].
    """
    found, made = results["counterfactuals"], results["environment"]
    certified = {entry["epsilon"]: entry for entry in results["certified_accuracy"]}
    best = results["with_references"]
    both = [
        *(
            (
                f"certified accuracy at {epsilon:g}",
                f"{certified[epsilon]['value']:.2%}",
                f"{certified[epsilon]['with_references']:.2%}",
            )
            for epsilon in epsilons
        ),
        ("median radius", f"{results['median_radius']:.4f}", f"{best['median_radius']:.4f}"),
        (
            "counterfactuals of another class nearer than the radius",
            str(found["nearer_than_radius"]),
            str(found["nearer_than_radius_with_references"]),
        ),
        (
            "median radius / distance of the counterfactual",
            f"{found['median_radius_over_distance']:.3f}",
            f"{best['median_radius_over_distance']:.3f}",
        ),
        ("mean gradient passes of the proof", "0", f"{best['mean_gradient_passes']:.2f}"),
    ]
    rows = [
        ("clean accuracy", f"{results['accuracy']:.2%}"),
        ("counterfactuals that reach another class", f"{found['reached']:.2%}"),
        ("counterfactuals with another class when posted back", str(found["other_class_when_posted_back"])),
        ("median counterfactual distance", f"{found['median_distance']:.4f}"),
        ("mean gradient steps of a counterfactual", f"{found['mean_steps']:.2f}"),
    ]
    lines = [
        *_heading(name, images),
        f"{_source(images)}, n = {results['n']}; L2, pixels in [0, 1]; radii are proved bounds. Served by "
        f"{results['provider']} (ONNX Runtime {made['onnxruntime']}, numpy {made['numpy']}) on {made['cpu']}; model "
        f"{results['digest']}, code {results['code_version']}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {quantity} | {value} |" for quantity, value in rows),
        "",
        "Two radii: proved at the image as sent (`proof=fast`), and at reference images, too (`proof=best`). The "
        "second alone uses that pixels end at 0 and 1. Its certified accuracy is that of answers with this `epsilon`; "
        "the other rows are about the largest radius found.",
        "",
        f"| | {FAST} | {BEST} |",
        "|---|---|---|",
        *(f"| {quantity} | {value} | {larger} |" for quantity, value, larger in both),
    ]
    if results["attacks"]:
        lines += _attack_table(results["attacks"], results.get("same_images"), results.get("attack_budget"))
    if results["attacks"] and "robust_accuracy" in results:
        lines += _shares_and_tightness(results, epsilons)
    if "novelty" in results:
        head, rows = novelty_cells(results["novelty"])
        lines += ["", "## Novelty", "", novelty_text(results["novelty"]), ""]
        lines += table_lines(head, rows)
    lines += detail_lines(results, pictures.get(MISTAKES))
    for title, file in pictures.items():
        if title != MISTAKES:
            lines += ["", f"![{title}]({file})"]
    return "\n".join([*lines, ""])


def _heading(name: str, images: ImageSet) -> list[str]:
    if images.of_the_card:
        return [f"# Evaluation of `{name}`", ""]
    return [
        f"# Evaluation of `{name}` on other images: {images.name}",
        "",
        "**These are other images than those of the card**, whose figures and files are not changed. "
        + " ".join(images.notes),
        "",
    ]


def _source(images: ImageSet) -> str:
    return f"{images.name} test set" if images.of_the_card else f"Images of {images.name}"


def _attack_table(
    attacks: Sequence[Mapping[str, Any]], same: Mapping[str, Any] | None, budget: Mapping[str, Any] | None
) -> list[str]:
    names = {attack["name"] for attack in attacks}
    compared = "with_references" in attacks[-1]
    sample = f"n = {attacks[-1]['n']}{', evenly spaced in the test set' if 'union' in names else ''}"
    refutation = (
        "strictly inside the radius with reference images (compared in exact rational arithmetic)"
        if compared
        else f"inside {attacks[-1]['inside']:g} of the fast radius; they were run before there was a larger one"
    )
    notes = [
        "Distances are those of the nearest image of another class that was found.",
        *(["FGSM and PGD ascend the margin."] if "FGSM" in names else []),
        *(
            ["AutoAttack is APGD (cross-entropy and, of three classes or more, logit ratio) and Square."]
            if "AutoAttack" in names
            else []
        ),
    ]
    if budget is not None:
        notes.append(
            f"Attacked: {budget['attacked']} of {budget['asked']} images, in {budget['used_s']:.0f} s of the "
            f"{budget['seconds']:g} s of --attack-seconds."
        )
    if same is not None:
        notes.append("The last row is the counterfactual search on the same images.")
    titles = ["attack", "library", "flipped", "median distance"]
    for name in (FAST, BEST) if compared else (FAST,):
        titles += [f"median radius, {name}", "radius / distance"]
    return [
        "",
        f"Attacks on the served graphs, {sample}. None found an image of another class {refutation}. {' '.join(notes)}",
        "",
        *table_lines(titles, [_attack_row(one, compared=compared) for one in (*attacks, same) if one is not None]),
    ]


def _attack_row(attack: Mapping[str, Any], *, compared: bool) -> list[str]:
    return [
        attack["name"],
        attack["library"],
        f"{attack['flipped_at_any_distance']} of {attack['n']}",
        _number(attack["median_distance"]),
        *(
            _number(radii.get(name))
            for radii in ((attack, attack["with_references"]) if compared else (attack,))
            for name in ("median_radius", "median_radius_over_distance")
        ),
    ]


def _shares_and_tightness(results: Mapping[str, Any], epsilons: Sequence[float]) -> list[str]:
    tight = results["tightness"]
    shares = {entry["epsilon"]: entry for entry in results["robust_accuracy"]}
    return [
        "",
        "Of the attacked images:",
        "",
        f"| epsilon | certified, {FAST} | certified, {BEST} | robust under all attacks | neither proved nor flipped |",
        "|---|---|---|---|---|",
        *(
            f"| {epsilon:g} | {share['certified']:.2%} | {_percent(share.get('certified_with_references'))} | "
            f"{share['under_attack']:.2%} | "
            f"{share['under_attack'] - share.get('certified_with_references', share['certified']):.2%} |"
            for epsilon, share in ((epsilon, shares[epsilon]) for epsilon in epsilons if epsilon in shares)
        ),
        "",
        f"Tightness, radius / distance of the nearest attack, n = {tight['n']}:",
        "",
        *(
            f"* {name}: median {_number(one['median'])}"
            + "".join(f"; {float(share):.0%} {value:.3f}" for share, value in one["quantiles"].items())
            for name, one in ((FAST, tight), (BEST, tight.get("with_references")))
            if one is not None
        ),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def draw_figures(
    classifier: Classifier,
    measured: Measured,
    attacked_M: np.ndarray,
    attacks: Sequence[AttackResult],
    earlier: Sequence[Mapping[str, Any]],
    epsilons: Sequence[float],
    folder: Path,
) -> dict[str, str]:
    """Write the figures of the report, as PNG files, to a folder; return file names by title.

    Args:
        classifier: as it is served.
        measured: answers about the test set.
        attacked_M: indices of the attacked images, of earlier attacks where there are no others.
        attacks: results of the attacks, their union last; empty without attacks.
        earlier: `robust_accuracy` of an earlier evaluation, drawn where there are no attacks.
        epsilons: L2 radii to be marked, pixels in [0, 1].
        folder: of the report.
    """
    answers = answers_of(classifier.labels, measured)
    proved = figures.Proved(measured.right_N, measured.radius_N, measured.proved.radius_N)
    known = attacked_images(measured, attacked_M, attacks[-1]) if attacks else None
    before = _earlier_attacks(measured, attacked_M, earlier) if earlier else None
    figures.plot_certified_accuracy(proved, known or before, epsilons, folder / "certified_accuracy.png")
    figures.plot_radii(proved, folder / "radii.png")
    if known is not None:
        figures.plot_tightness(known, folder / "tightness.png")
    wrong = worst_mistakes(answers)
    if wrong:
        figures.plot_mistakes(
            [
                figures.Mistake(
                    measured.image_NCHW[n],
                    answers.labels[answers.label_N[n]],
                    answers.labels[answers.class_N[n]],
                    float(answers.radius_N[n]),
                )
                for n in wrong
            ],
            folder / "mistakes.png",
        )
    panels = panels_of_measured(classifier, measured, GALLERY_IMAGES)
    figures.plot_counterfactuals(panels, folder / "counterfactuals.png")
    figures.plot_saliency(panels, folder / "saliency.png")
    return {
        "certified accuracy and robust accuracy": "certified_accuracy.png",
        "certified radii": "radii.png",
        # Without attacks the figure of an earlier evaluation stays, as its results do.
        **(
            {"tightness": "tightness.png"}
            if known is not None or (earlier and (folder / "tightness.png").exists())
            else {}
        ),
        **({MISTAKES: "mistakes.png"} if wrong else {}),
        "counterfactuals": "counterfactuals.png",
        "saliency": "saliency.png",
    }


def _earlier_attacks(
    measured: Measured, attacked_M: np.ndarray, shares: Sequence[Mapping[str, Any]]
) -> figures.EarlierAttacks:
    return figures.EarlierAttacks(
        right_N=measured.right_N[attacked_M],
        radius_N=measured.radius_N[attacked_M],
        best_N=measured.proved.largest_N[attacked_M],
        epsilon_E=np.array([entry["epsilon"] for entry in shares]),
        share_E=np.array([entry["under_attack"] for entry in shares]),
    )


def panels_of_measured(classifier: Classifier, measured: Measured, most: int) -> list[figures.Panel]:
    """Return the columns of a gallery: one right answer for each class in turn.

    Args:
        classifier: as it is served.
        measured: answers about the images.
        most: number of columns.
    """
    chosen = gallery_images(answers_of(classifier.labels, measured), most)
    return panels_of(
        classifier,
        measured.image_NCHW[chosen],
        [measured.predictions[n] for n in chosen],
        [measured.counterfactuals[n] for n in chosen],
        measured.proved.radius_N[chosen],
    )


def panels_of(
    classifier: Classifier,
    image_GCHW: Float64[np.ndarray, "G C H W"],
    predictions: Sequence[Prediction],
    counterfactuals: Sequence[Counterfactual],
    best_G: Float64[np.ndarray, " G"],
) -> list[figures.Panel]:
    """Return the columns of a gallery, with the gradient of each margin.

    Args:
        classifier: as it is served.
        image_GCHW: pixels in [0, 1].
        predictions: of the images.
        counterfactuals: of the images.
        best_G: their largest proved radii.
    """
    weights_GK = np.zeros((len(predictions), len(classifier.labels)))
    for row, prediction in enumerate(predictions):
        weights_GK[row, prediction.class_id] = 1.0
        weights_GK[row, prediction.runner_up] = -1.0
    _, gradient_GCHW = classifier.margin_gradient(image_GCHW, weights_GK)
    return [
        figures.Panel(
            image_CHW=image_GCHW[row],
            label=classifier.labels[prediction.class_id],
            radius=prediction.radius,
            best=float(best_G[row]),
            other_CHW=answer.pixels_CHW / 255,
            other_label=classifier.labels[answer.class_id],
            distance=answer.distance,
            gradient_CHW=gradient_GCHW[row],
            runner_up=classifier.labels[prediction.runner_up],
        )
        for row, (prediction, answer) in enumerate(zip(predictions, counterfactuals, strict=True))
    ]


def gallery_images(answers: Answers, most: int) -> list[int]:
    """Return the indices of right answers, one for each class in turn; of any answers where all are wrong."""
    queues = [list(np.flatnonzero(answers.right_N & (answers.class_N == k))) for k in range(len(answers.labels))]
    chosen: list[int] = []
    while len(chosen) < most and any(queues):
        chosen.extend(int(queue.pop(0)) for queue in queues if queue)
    return chosen[:most] or list(range(min(most, len(answers.class_N))))
