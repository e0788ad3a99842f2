"""Evaluation of an artefact as it is served: the classifier and the counterfactual search of the server, on a test set.

All figures go into `card.json` and into a report beside it (JSON, Markdown, PNG), with n, hardware and versions. The
number of counterfactuals nearer than the certified radius must be 0; an attack that succeeds inside the radius is an
error, and no report is written. Finished parts are stored (`models.evaluation.partial`) until the report is complete:
an interrupted run continues where it stopped.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from models.data.datasets import load_dataset, options_of
from models.data.labelled import DataError, LabelledImages
from models.evaluation import attacks as attacking
from models.evaluation.attacks import AttackResult, AttacksMissingError, CertificateRefutedError
from models.evaluation.partial import Arrays, PartialResults, digest_of
from models.evaluation.report import draw_figures, markdown_report
from models.evaluation.summary import Measured, summarise, summarise_attacks
from models.export import code_version, environment
from service.artefact.card import Card, CertifiedAccuracy, read_card, write_card
from service.inference.classifier import Classifier, Prediction
from service.inference.counterfactual import Counterfactual
from service.runtime.engine import ProviderError
from service.runtime.provider import Provider

log = logging.getLogger(__name__)

BATCH = 250
CURVE = tuple(round(0.1 * step, 1) for step in range(1, 21))
"""Radii of the certified-accuracy curve, L2, pixels in [0, 1]."""
N_ATTACK = 1000
"""Default number of attacked images, or all where there are fewer."""
REPORT_FOLDER = "report"
PARTIAL_FOLDER = ".partial"
EVIDENCE_FILE = "refuted.npz"


class EvaluationError(Exception):
    """The artefact cannot be evaluated on this data; the message states the cure."""


class EvaluationInterrupted(Exception):
    """The evaluation was interrupted by Ctrl-C; the message says how to continue."""


def evaluate(
    artefact: Path,
    data: Path,
    *,
    attacks: bool = True,
    n_attack: int | None = None,
    limit: int | None = None,
    provider: Provider = "auto",
    threads: int = 1,
    out: Path | None = None,
) -> str:
    """Measure the artefact, write report and card, and return the report.

    Args:
        artefact: folder of the artefact; its card names the data set.
        data: folder of the data set.
        attacks: run `models.evaluation.attacks`; otherwise earlier results stay in the card.
        n_attack: number of attacked images, evenly spaced in the test set; default: `N_ATTACK`, or all of fewer.
        limit: number of images to use, evenly spaced; the card is then not changed. Default: all.
        provider: execution provider, as in the server.
        threads: threads of ONNX Runtime.
        out: folder of the report and of partial results; default: `report` in the artefact.

    Returns:
        The report as Markdown.

    Raises:
        EvaluationError: the card fits no data set or another one, there are fewer images than requested, the provider
            or a library is not available, the report cannot be written, or an attack refutes a certificate.
        EvaluationInterrupted: by Ctrl-C; the next call continues.
        ArtefactError, DataError: see their modules.
    """
    started = time.monotonic()
    if attacks:
        try:
            attacking.require_libraries()
        except AttacksMissingError as error:
            raise EvaluationError(str(error)) from error
    try:
        classifier = Classifier.load(artefact, provider, threads)
    except ProviderError as error:
        raise EvaluationError(str(error)) from error
    image_NCHW, label_N = _test_images(classifier, data)
    chosen_N = evenly_spaced(len(image_NCHW) if limit is None else limit, len(image_NCHW), "--limit")
    image_NCHW, label_N = image_NCHW[chosen_N], label_N[chosen_N]
    attacked_M = evenly_spaced(
        min(N_ATTACK, len(image_NCHW)) if n_attack is None else n_attack, len(image_NCHW), "--n-attack"
    )
    folder = out if out is not None else artefact / REPORT_FOLDER
    cache = PartialResults(folder / PARTIAL_FOLDER)
    if cache.count():
        log.info(
            "%d partial results in %s; those of this artefact, data and code are used", cache.count(), cache.folder
        )
    with _resumable(cache, folder):
        settings = {"provider": classifier.provider, "code": _code_digest(), "environment": _versions()}
        measured = _measure(classifier, image_NCHW, label_N, cache, settings)
        attacked: list[AttackResult] = []
        if attacks:
            attacked = attacking.run_attacks(classifier, image_NCHW[attacked_M], cache=cache, settings=settings)
            attacked.append(attacking.union(attacked))
        wanted = _recipe_epsilons(classifier.card)
        epsilons = sorted({*wanted, *CURVE})
        results = {
            **summarise(measured, epsilons),
            **(summarise_attacks(measured, attacked_M, attacked[-1], epsilons) if attacked else {}),
            "provider": classifier.provider,
            "digest": classifier.digest,
            "code_version": code_version(),
            "environment": environment(time.monotonic() - started),
        }
        entries = [result.as_card_entry() for result in attacked]
        folder.mkdir(parents=True, exist_ok=True)
        draw_figures(classifier, measured, attacked_M, attacked, wanted, folder)
        (folder / "evaluation.json").write_text(json.dumps({**results, "attacks": entries}, indent=2) + "\n")
        data_name = str(classifier.card.data.get("name", "The"))
        text = markdown_report(classifier.name, data_name, results, attacked, wanted)
        (folder / "evaluation.md").write_text(text)
        if limit is None:
            _update_card(artefact, results, entries, classifier.digest)
    cache.discard()
    return text


@contextmanager
def _resumable(cache: PartialResults, folder: Path) -> Generator[None]:
    """Convert interruption, refutation and write errors to errors that say how to continue."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise EvaluationInterrupted(
            f"interrupted: {cache.count()} parts are stored in {cache.folder}. Run the same command again to continue "
            "there; delete that folder to start again"
        ) from error
    except CertificateRefutedError as error:
        evidence = folder / EVIDENCE_FILE
        attacking.save_evidence(error, evidence)
        raise EvaluationError(
            f"REFUTED: {error}. The certificate of this artefact does not hold as it is served here: take it out of "
            f"service and report this with {evidence}, which holds both images. No report was written"
        ) from error
    except OSError as error:
        raise EvaluationError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}): free some space or correct the "
            "permissions, or name another folder with --out; run the same command again to continue"
        ) from error


def _measure(
    classifier: Classifier,
    image_NCHW: np.ndarray,
    label_N: np.ndarray,
    cache: PartialResults,
    settings: Mapping[str, Any],
) -> Measured:
    predictions: list[Prediction] = []
    counterfactuals: list[Counterfactual] = []
    posted_back: list[np.ndarray] = []
    with tqdm(total=len(image_NCHW), desc="counterfactuals", unit="image") as bar:
        for start in range(0, len(image_NCHW), BATCH):
            part_NCHW = image_NCHW[start : start + BATCH]
            key = {
                **settings,
                "model": classifier.digest,
                "images": digest_of(part_NCHW),
                "measured": "counterfactuals",
            }
            stored = cache.part(key, lambda part_NCHW=part_NCHW: search_counterfactuals(classifier, part_NCHW))
            # Predictions take no time, so they are repeated rather than stored.
            predictions.extend(classifier.predict(part_NCHW))
            counterfactuals.extend(
                Counterfactual(pixels_CHW, int(class_id), float(distance), bool(reached), int(steps))
                for pixels_CHW, class_id, distance, reached, steps in zip(
                    *(stored[name] for name in ("pixels", "class_id", "distance", "reached", "steps")), strict=True
                )
            )
            posted_back.append(stored["posted_back"])
            bar.update(len(part_NCHW))
    return Measured(image_NCHW, label_N, predictions, counterfactuals, np.concatenate(posted_back))


def search_counterfactuals(classifier: Classifier, image_NCHW: np.ndarray) -> Arrays:
    """Return the counterfactuals of a part of the test set, and the class of each when it is sent as an image."""
    answers = classifier.counterfactual(image_NCHW, classifier.predict(image_NCHW), [None] * len(image_NCHW))
    return {
        "pixels": np.array([answer.pixels_CHW for answer in answers]),
        "class_id": np.array([answer.class_id for answer in answers]),
        "distance": np.array([answer.distance for answer in answers]),
        "reached": np.array([answer.reached for answer in answers]),
        "steps": np.array([answer.steps for answer in answers]),
        # One by one, as a client posts them: the class may not depend on the batch.
        "posted_back": np.array(
            [classifier.predict(answer.pixels_CHW[None] / 255)[0].class_id for answer in answers], np.int64
        ),
    }


def evenly_spaced(wanted: int, available: int, option: str) -> np.ndarray:
    """Return `wanted` indices below `available`, evenly spaced: a test set may be sorted by class.

    Args:
        wanted: number of images.
        available: number of images in the test set.
        option: that asks for them, for the message.

    Raises:
        EvaluationError: `wanted` is above `available`.
    """
    if wanted > available:
        raise EvaluationError(f"{option} {wanted} asks for more than the {available} images there are: give fewer")
    return np.arange(wanted) * available // wanted


def sources() -> list[Path]:
    """Return the source files that determine the results: partial results of other code are not used."""
    root = Path(__file__).parents[2]
    return sorted([*(root / "service").rglob("*.py"), *Path(__file__).parent.glob("*.py")])


def _code_digest() -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in sources())).hexdigest()


def _versions() -> dict[str, Any]:
    made = environment(0.0)
    return {name: made[name] for name in ("torch", "onnxruntime", "numpy")}


def _test_images(classifier: Classifier, data: Path) -> tuple[np.ndarray, np.ndarray]:
    found = labelled_images(classifier, data, "test")
    return found.pixels(torch.float64).numpy(), found.labels_N.numpy()


def labelled_images(classifier: Classifier, data: Path, part: Literal["train", "test"]) -> LabelledImages:
    """Return the training or the test set that the card of a model names.

    Args:
        classifier: as it is served.
        data: folder of the data set.
        part: which of both.

    Raises:
        EvaluationError: the images are not those of the card, or the model does not take them.
        DataError: the files are missing or unusable.
    """
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
    found = load_dataset(options, data, test_only=part == "test")
    stated, actual = (block.get("digest", {}).get(part) for block in (card.data, found.card))
    if stated != actual:
        raise EvaluationError(
            f"the {part} images under {data} are not those that {classifier.name} was measured on (digest {actual}, "
            f"the card states {stated}), and some may have been trained on: give the folder as it was, or train again"
        )
    images = found.test if part == "test" else found.train
    shape = tuple(images.images_NCHW.shape[1:])
    if shape != classifier.input_shape:
        raise EvaluationError(
            f"{classifier.name} takes images of shape {classifier.input_shape}, those of {found.card['name']} have "
            f"{shape}; correct data.options in the card, or train again"
        )
    return images


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
    else:
        # Results of earlier attacks on the same graph: the digest in a card cannot change.
        earlier = card.evaluation or {}
        changes["evaluation"] = {
            **{key: earlier[key] for key in ("robust_accuracy", "tightness") if key in earlier},
            **results,
        }
    write_card(folder, Card.model_validate({**card.model_dump(), **changes}))
