"""`report.html`: one page about an artefact, without scripts and other files, after its training or an evaluation.

All figures on the page come from the classifier as it is served. Axes: N images, G chosen ones, T training images,
C channels, H height, W width.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from jaxtyping import Float64, UInt64

from models.data.labelled import DataSet
from models.evaluation import drawings, sections
from models.evaluation.card_results import epsilons_of
from models.evaluation.cautions import cautions
from models.evaluation.details import Answers, details, worst_mistakes
from models.evaluation.figures import Mistake, Panel
from models.evaluation.images import ImageSet, pixel_keys
from models.evaluation.novelty import is_novelty_model, novelty_figures
from models.evaluation.report import gallery_images, panels_of
from models.export import environment
from models.paths import FOLDER
from models.training.history import EpochFigures
from service import __version__
from service.artefact.card import Card
from service.artefact.files import MODEL_FILE, write_atomically
from service.evidence.document import claims, document, facts, items, table
from service.evidence.intervals import clopper_pearson
from service.inference.classifier import Classifier, Prediction

log = logging.getLogger(__name__)

PAGE_FILE = "report.html"
HISTORY_FILE = Path("report") / "history.json"
"""Figures of each epoch, in the folder of the artefact: a later evaluation draws them again."""
TRAINING_FILE = Path("report") / "training-images.npy"
"""`images.pixel_keys` of the images of the training part, by which a later evaluation recognises them."""
EXAMPLES = 5
"""Images with counterfactual and gradient."""
BATCH = 250
_TIMED = 30
"""Answers that are timed."""


@dataclass(frozen=True)
class Measurement:
    """Everything that the page shows."""

    classifier: Classifier
    images: ImageSet
    answers: Answers
    figures: Mapping[str, Any]
    """Of `details.details`."""
    panels: Sequence[Panel]
    history: Sequence[EpochFigures]
    chosen: str | None = None
    """How the network was chosen among those of the training, as a sentence; default: from the card."""
    data: Path | None = None
    """Folder of the data set, for the commands."""
    attacks: Sequence[Mapping[str, Any]] = ()
    """Entries of the attacks, as in the card."""


def write_report_page(
    folder: Path,
    data_set: DataSet,
    history: Sequence[EpochFigures],
    *,
    data: Path | None = None,
    chosen: str | None = None,
) -> Path | None:
    """Write `report.html` of an artefact that was just trained; return its path, or null if it cannot be written.

    Args:
        folder: of the artefact.
        data_set: its test images are measured; training and held-out images are in the history, and the artefact keeps
            64 bits of each to recognise it by.
        history: figures of each epoch, see `Trained.history`.
        data: folder of the data set, for the commands on the page.
        chosen: how the network was chosen among those of the training, as a sentence; default: from the card.

    Raises:
        ArtefactError: the artefact is damaged or has no proof.
    """
    classifier = Classifier.load(folder, "cpu", torch.get_num_threads())
    images = ImageSet(data_set.test, str(classifier.card.data.get("name", folder.name)), of_the_card=True)
    # In batches: a test set in float64 may be larger than the memory.
    predictions = [
        one
        for start in range(0, len(images.images), BATCH)
        for one in classifier.predict(_pixels(images, range(start, min(start + BATCH, len(images.images)))))
    ]
    answers = Answers(
        classifier.labels,
        images.images.labels_N.numpy(),
        np.array([prediction.class_id for prediction in predictions], np.int64),
        np.array([prediction.radius for prediction in predictions]),
    )
    figures = details(answers, classifier.card, epsilons_of(classifier.card), same_images=True)
    if is_novelty_model(classifier):
        figures["novelty"] = novelty_figures(classifier, data_set.test, {}, epsilons_of(classifier.card))
    panels = _examples(classifier, images, predictions, answers)
    measured = Measurement(classifier, images, answers, figures, panels, history, chosen, data)
    path = folder / PAGE_FILE
    try:
        (folder / HISTORY_FILE).parent.mkdir(exist_ok=True)
        (folder / HISTORY_FILE).write_text(json.dumps([one.as_json() for one in history], indent=1) + "\n")
        write_atomically(folder / TRAINING_FILE, lambda file: np.save(file, np.unique(pixel_keys(data_set.train))))
        write_page(path, measured, folder)
    except OSError as error:
        log.warning("the report %s cannot be written (%s); the artefact is complete", path, error.strerror or error)
        return None
    return path


def write_page(path: Path, measured: Measurement, folder: Path) -> None:
    """Write the page whole or not at all.

    Args:
        path: of the page.
        measured: its content.
        folder: of the artefact.
    """
    content = render(measured, folder).encode()
    write_atomically(path, lambda file: file.write(content))


def read_history(folder: Path) -> list[EpochFigures]:
    """Return the figures of each epoch that the training left in an artefact; empty where there are no such figures."""
    try:
        return [EpochFigures.from_json(one) for one in json.loads((folder / HISTORY_FILE).read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): the page has no curves of the training", folder / HISTORY_FILE, error)
        return []


def read_training_keys(folder: Path) -> UInt64[np.ndarray, " T"] | None:
    """Return `pixel_keys` of the training images that the training left in an artefact; null where they are missing."""
    try:
        # Opened here: np.load does not close a file whose content is damaged.
        with (folder / TRAINING_FILE).open("rb") as file:
            keys = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s cannot be read (%s): training images are not recognised", folder / TRAINING_FILE, error)
        return None
    return keys if isinstance(keys, np.ndarray) and keys.dtype == np.uint64 and keys.ndim == 1 else None


def render(measured: Measurement, folder: Path) -> str:
    """Return the page.

    Args:
        measured: its content.
        folder: of the artefact.
    """
    classifier, answers, figures = measured.classifier, measured.answers, measured.figures
    epsilons = epsilons_of(classifier.card)
    warned = cautions(classifier.card, answers, figures, measured.history)
    if measured.images.trained_on:
        warned.insert(0, f"{measured.images.trained_on} of these images were trained on: the figures are too good.")
    notes = measured.images.notes
    rows = figures["against_the_card"]
    parts = [
        ("In words", _summary(measured)),
        ("About these images", f"<ul>{items(notes)}</ul>" if notes else ""),
        ("Warnings", f'<ul class="warnings">{items(warned)}</ul>' if warned else ""),
        ("Against the card", "" if measured.images.of_the_card else sections.card_table(rows)),
        ("Training", sections.curves_of_training(measured.history) if measured.history else ""),
        ("Certified accuracy", sections.curve_over_radius(answers, epsilons)),
        ("Novelty", sections.novelty_section(figures["novelty"]) if "novelty" in figures else ""),
        ("Confusions", sections.confusion_matrix(figures["confusion"])),
        ("Classes", sections.class_table(figures["classes"])),
        ("Worst mistakes", _mistakes(measured)),
        ("Reliability of radii", _reliability(figures)),
        ("Counterfactuals and gradients", _examples_text(measured)),
        ("Attacks", _attacks(measured.attacks)),
        ("Cost of serving", _cost(classifier, _pixels(measured.images, [0]), folder)),
        ("Next steps", _next_steps(measured, folder)),
        ("Origin", _origin(classifier)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{text}</section>\n" for title, text in parts if text)
    kind = "Report on" if measured.images.of_the_card else "Other images, measured on"
    return document(
        f"{classifier.name}: report",
        f"<header><h1>{kind} {escape(classifier.name)}</h1>"
        f'<p class="dim">{escape(_which(measured))}. Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by lipcert '
        f'{__version__}.</p></header>{claims(_boxes(answers, epsilons))}\n{body}<p class="dim digest">model.onnx '
        f"{classifier.digest}</p>",
        drawings.STYLE + sections.STYLE,
    )


def _examples(
    classifier: Classifier, images: ImageSet, predictions: Sequence[Prediction], answers: Answers
) -> list[Panel]:
    chosen = gallery_images(answers, EXAMPLES)
    image_GCHW, some = _pixels(images, chosen), [predictions[n] for n in chosen]
    found = classifier.counterfactual(image_GCHW, some, [None] * len(chosen))
    return panels_of(classifier, image_GCHW, some, found, answers.radius_N[chosen])


def _pixels(images: ImageSet, chosen: Sequence[int]) -> Float64[np.ndarray, "G C H W"]:
    return images.images.at(torch.tensor(chosen, dtype=torch.int64)).pixels(torch.float64).numpy()


def _which(measured: Measurement) -> str:
    n, images = len(measured.answers.label_N), measured.images
    return f"{n} test images of {images.name}" if images.of_the_card else f"{n} images of {images.name}"


def _boxes(answers: Answers, epsilons: Sequence[float]) -> list[tuple[str, str]]:
    n, right = len(answers.label_N), int(answers.right_N.sum())
    low, high = clopper_pearson(right, n)
    wanted = [epsilon for epsilon in epsilons if answers.certified(epsilon)][:3] or list(epsilons[:1])
    return [
        (f"{right / n:.1%}", f"accuracy: {right} of {n}; 95 % interval {low:.1%} to {high:.1%}"),
        *((f"{answers.certified(e) / n:.1%}", f"right, and proved within {e:g} ({sections.UNIT})") for e in wanted),
        (f"{np.median(answers.radius_N):.3f}", "median certified radius"),
    ]


def _summary(measured: Measurement) -> str:
    card, answers = measured.classifier.card, measured.answers
    n, right, labels = len(answers.label_N), int(answers.right_N.sum()), measured.classifier.labels
    shown = ", ".join(labels[:12]) + (f" and {len(labels) - 12} more" if len(labels) > 12 else "")
    epsilons = epsilons_of(card)
    proved = "; ".join(f"{answers.certified(epsilon) / n:.1%} within {epsilon:g}" for epsilon in epsilons)
    training = [f"{card.data['n_train']} images trained the network"] if card.data.get("n_train") else []
    if measured.images.of_the_card:
        training += [measured.chosen or _chosen(card), "The test images were used for the figures alone"]
    else:
        training += ["The images on this page are other ones than those of the card, whose figures are unchanged"]
    proof = (
        f"For part of them it is proved, not measured, that no change of the image within a radius ({sections.UNIT}) "
        f"changes the class: right and proved are {proved} of all {n} images. "
        if epsilons
        else ""
    )
    return (
        f"<p>{escape(measured.classifier.name)} tells {len(labels)} classes apart: {escape(shown)}. It classifies "
        f"{right} of {n} images right ({right / n:.2%}). {proof}</p><p>{escape('. '.join(training))}.</p>"
    )


def _chosen(card: Card) -> str:
    held_out = card.data.get("n_validation") or 0
    if held_out and (card.recipe.get("schedule") or {}).get("keep") == "best":
        return f"The network is that of the epoch that certified most of {held_out} held-out images"
    watched = f"; {held_out} more were held out to watch it" if held_out else ", and no image was used to choose it"
    return f"The network is that of the last epoch{watched}"


def _mistakes(measured: Measurement) -> str:
    answers, names = measured.answers, measured.images.files
    wrong = int((~answers.right_N).sum())
    if not wrong:
        return "<p>No image is classified wrong.</p>"
    worst = worst_mistakes(answers)
    gallery = [
        (
            Mistake(
                image_CHW,
                answers.labels[answers.label_N[n]],
                answers.labels[answers.class_N[n]],
                float(answers.radius_N[n]),
            ),
            "" if names is None else names[n],
        )
        for n, image_CHW in zip(worst, _pixels(measured.images, worst), strict=True)
    ]
    return (
        f"<p>{wrong} images are classified wrong. Those with the largest radius come first: the model is furthest from "
        "another answer there. Look for wrong labels, too.</p>" + sections.mistake_gallery(gallery)
    )


def _reliability(figures: Mapping[str, Any]) -> str:
    return (
        "<p>Images in groups of equal size, from the smallest radii to the largest. Where accuracy rises with the "
        "radius, a small radius is a reason to let a person look.</p>"
        + sections.reliability_table(figures["reliability"])
    )


def _examples_text(measured: Measurement) -> str:
    if not measured.panels:
        return ""
    return (
        "<p>Image; the nearest image found with another class; their difference around mid-grey; size of the gradient "
        "of the margin, bright where a change moves the answer most.</p>" + sections.example_rows(measured.panels)
    )


def _attacks(attacks: Sequence[Mapping[str, Any]]) -> str:
    if not attacks:
        return ""
    rows = [
        (
            attack["name"],
            attack["library"],
            f"{attack['flipped_at_any_distance']} of {attack['n']}",
            "-" if attack["median_distance"] is None else f"{attack['median_distance']:.3f}",
            f"{attack['median_radius']:.3f}",
        )
        for attack in attacks
    ]
    head = ["attack", "library", "flipped", "median distance", "median radius"]
    return (
        "<p>All rows are about the same images. No attack found another class inside a certified radius.</p>"
        f'<div class="scroll">{table(head, rows, (2, 3, 4), narrow=True)}</div>'
    )


def _cost(classifier: Classifier, image_NCHW: np.ndarray, folder: Path) -> str:
    model = folder / MODEL_FILE
    parameters = sum(int(np.prod(one.dims)) for one in onnx.load(model).graph.initializer)
    machine = environment(0.0)
    answer, both = _milliseconds(classifier, image_NCHW)
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    shape = " x ".join(map(str, classifier.input_shape))
    rows = [
        ("model.onnx", f"{model.stat().st_size / 1e6:.2f} MB, {parameters:,} parameters"),
        ("image", f"{shape} (channels x height x width)"),
        ("class and radius of one image", f"{answer:.2f} ms"),
        ("class, radius and counterfactual", f"{both:.1f} ms"),
        ("measured", f"now, without HTTP: {machine['cpu']}, {classifier.provider}, {threads}"),
    ]
    return facts(rows)


def _milliseconds(classifier: Classifier, image_NCHW: np.ndarray) -> tuple[float, float]:
    """Return the median time of an answer, and the time of one with a counterfactual."""
    times: list[float] = []
    predictions = classifier.predict(image_NCHW)
    for _ in range(_TIMED):
        started = time.perf_counter()
        predictions = classifier.predict(image_NCHW)
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    classifier.counterfactual(image_NCHW, predictions, [None])
    answer = float(np.median(times))
    return 1e3 * answer, 1e3 * (answer + time.perf_counter() - started)


def _next_steps(measured: Measurement, folder: Path) -> str:
    card, name = measured.classifier.card, measured.classifier.name
    data = "DATA" if measured.data is None else str(measured.data)
    out = shlex.quote(str(folder.parent))
    steps = [
        ("Serve it", f"LIPCERT_MODELS={out} LIPCERT_DEFAULT_MODEL={shlex.quote(name)} lipcert serve"),
        (
            "Measure it on other images of the same classes",
            f"lipcert evaluate {shlex.quote(str(folder))} --data OTHER_FOLDER",
        ),
    ]
    if measured.images.of_the_card and not measured.attacks:
        attack = f"lipcert evaluate {shlex.quote(str(folder))} --data {shlex.quote(data)} --attack-seconds 600"
        steps.append(("Attack it for ten minutes", attack))
    schedule = card.recipe.get("schedule") or {}
    if schedule.get("epochs") and card.recipe.get("name"):
        count, of_folder = schedule.get("steps"), card.data.get("dataset") == FOLDER
        images = shlex.quote(data) if of_folder else f"{card.recipe['name']} --data {shlex.quote(data)}"
        twice = f"--set schedule.steps={2 * count}" if count else f"--epochs {2 * schedule['epochs']}"
        longer = f"lipcert train {images} --out OTHER_OUT {twice}"
        steps.append(("Train it twice as long, with the other options of this training", longer))
    return "".join(f"<h3>{title}</h3><pre>{escape(command)}</pre>" for title, command in steps)


def _origin(classifier: Classifier) -> str:
    card = classifier.card
    made = card.environment
    schedule, network = (card.recipe.get(key) or {} for key in ("schedule", "network"))
    rows = [
        ("data", f"{card.data.get('name', 'not stated')}; {card.data.get('source') or 'source not stated'}"),
        ("licence", card.licence or "not stated"),
        ("network", ", ".join(f"{key} {json.dumps(value)}" for key, value in network.items()) or "not stated"),
        ("loss", ", ".join(f"{key} {value}" for key, value in card.loss.items()) or "not stated"),
        ("schedule", ", ".join(f"{key} {value}" for key, value in schedule.items()) or "not stated"),
        ("seed, code", f"{card.seed}, {card.code_version}"),
        (
            "training",
            ", ".join(
                str(made[key]) + unit
                for key, unit in (("cpu", ""), ("gpu", ""), ("devices", ""), ("wall_time_s", " s"))
                if made.get(key) is not None
            )
            or "not stated",
        ),
    ]
    return facts(rows)
