"""What an artefact is worth, measured as it is served: the same classifier and counterfactual search, on the
test set.

Every number goes into `card.json` and into a report beside it (JSON, Markdown, PNG), with n, hardware and versions.
Counterfactuals nearer than the certified radius must be 0 in number; an attack that succeeds inside it is an error, and
no report is written. What is measured is kept in parts (`models.evaluation.partial`) until the report is there, so that
a run that is interrupted goes on where it stopped.

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
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from models.data.datasets import load_dataset, options_of
from models.data.labelled import DataError
from models.evaluation import attacks as attacking
from models.evaluation.attacks import AttackResult, AttacksMissingError, CertificateRefutedError
from models.evaluation.partial import Arrays, PartialResults, digest_of
from models.evaluation.report import as_markdown, draw
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
"""Images that are attacked if nobody says otherwise, or all where there are fewer."""
REPORT_FOLDER = "report"
PARTIAL_FOLDER = ".partial"
EVIDENCE_FILE = "refuted.npz"


class EvaluationError(Exception):
    """The artefact cannot be evaluated on this data; the message says what to do."""


class EvaluationInterrupted(Exception):
    """Ctrl-C; the message says how to go on."""


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
    """Measure the artefact, write report and card.

    Args:
        artefact: folder of the artefact; its card says which data set it is about.
        data: folder of the data set.
        attacks: whether to run `models.evaluation.attacks`; without, the card keeps the results it has.
        n_attack: attack so many images, evenly spaced in the test set; `N_ATTACK` or all by default.
        limit: use only so many images, evenly spaced; the card is then left alone.
        provider: execution provider, as in the server.
        threads: threads of ONNX Runtime.
        out: folder of the report; `report` in the artefact by default. Partial results are kept in it, too.

    Returns:
        The report as Markdown.

    Raises:
        EvaluationError: the card fits no data set or another one, there are fewer images than asked for, the provider
            or a library cannot be had, the report cannot be written, or an attack refutes a certificate.
        EvaluationInterrupted: by Ctrl-C; the next call goes on.
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
    kept_N = _spread(len(image_NCHW) if limit is None else limit, len(image_NCHW), "--limit")
    image_NCHW, label_N = image_NCHW[kept_N], label_N[kept_N]
    attacked_M = _spread(
        min(N_ATTACK, len(image_NCHW)) if n_attack is None else n_attack, len(image_NCHW), "--n-attack"
    )
    folder = out if out is not None else artefact / REPORT_FOLDER
    keep = PartialResults(folder / PARTIAL_FOLDER)
    if keep.count():
        log.info("%d partial results in %s; those of this artefact, data and code are used", keep.count(), keep.folder)
    with _kept(keep, folder):
        settings = {"provider": classifier.provider, "code": _code_digest(), "environment": _versions()}
        measured = _measure(classifier, image_NCHW, label_N, keep, settings)
        attacked: list[AttackResult] = []
        if attacks:
            attacked = attacking.run_attacks(classifier, image_NCHW[attacked_M], keep=keep, settings=settings)
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
        draw(classifier, measured, attacked_M, attacked, wanted, folder)
        (folder / "evaluation.json").write_text(json.dumps({**results, "attacks": entries}, indent=2) + "\n")
        data_name = str(classifier.card.data.get("name", "The"))
        text = as_markdown(classifier.name, data_name, results, attacked, wanted)
        (folder / "evaluation.md").write_text(text)
        if limit is None:
            _update_card(artefact, results, entries, classifier.digest)
    keep.discard()
    return text


@contextmanager
def _kept(keep: PartialResults, folder: Path) -> Generator[None]:
    """Turn what can end a measurement into errors that say how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise EvaluationInterrupted(
            f"interrupted: {keep.count()} parts are kept in {keep.folder}. Run the same command again to go on from "
            "there; delete that folder to start afresh"
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
            "permissions, or name another folder with --out; run the same command again to go on"
        ) from error


def _measure(
    classifier: Classifier,
    image_NCHW: np.ndarray,
    label_N: np.ndarray,
    keep: PartialResults,
    settings: Mapping[str, Any],
) -> Measured:
    predictions: list[Prediction] = []
    counterfactuals: list[Counterfactual] = []
    posted_back: list[np.ndarray] = []
    with tqdm(total=len(image_NCHW), desc="counterfactuals", unit="image") as bar:
        for start in range(0, len(image_NCHW), BATCH):
            part_NCHW = image_NCHW[start : start + BATCH]
            what = {
                **settings,
                "model": classifier.digest,
                "transport": classifier.card.graphs.get("transport.onnx"),
                "images": digest_of(part_NCHW),
                "measured": "counterfactuals",
            }
            kept = keep.part(what, lambda part_NCHW=part_NCHW: _measure_part(classifier, part_NCHW))
            # Predictions are made anew: they take no time, and what is kept need not say what they are.
            predictions.extend(classifier.predict(part_NCHW))
            counterfactuals.extend(
                Counterfactual(pixels_CHW, int(class_id), float(distance), bool(reached), int(steps))
                for pixels_CHW, class_id, distance, reached, steps in zip(
                    kept["pixels"], kept["class_id"], kept["distance"], kept["reached"], kept["steps"], strict=True
                )
            )
            posted_back.append(kept["posted_back"])
            bar.update(len(part_NCHW))
    return Measured(image_NCHW, label_N, predictions, counterfactuals, np.concatenate(posted_back))


def _measure_part(classifier: Classifier, image_NCHW: np.ndarray) -> Arrays:
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


def _spread(wanted: int, available: int, option: str) -> np.ndarray:
    """Indices of so many images, evenly spaced: a test set may be sorted by class."""
    if wanted > available:
        raise EvaluationError(f"{option} {wanted} asks for more than the {available} images there are: give fewer")
    return np.arange(wanted) * available // wanted


def _code_digest() -> str:
    """Of the sources that decide what is measured: partial results of other code are not used."""
    root = Path(__file__).parent.parent
    files = sorted([*(root / "service").rglob("*.py"), Path(__file__), Path(attacking.__file__)])
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _versions() -> dict[str, Any]:
    made = environment(0.0)
    return {name: made[name] for name in ("torch", "onnxruntime", "numpy")}


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
    else:
        # What an earlier call found out by attacks, about the same graph (the digest of a card cannot change).
        earlier = card.evaluation or {}
        changes["evaluation"] = {
            **{key: earlier[key] for key in ("robust_accuracy", "tightness") if key in earlier},
            **results,
        }
    write_card(folder, Card.model_validate({**card.model_dump(), **changes}))
