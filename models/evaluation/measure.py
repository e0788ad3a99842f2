"""Evaluation of an artefact as it is served: the classifier and the counterfactual search of the server, on a test set.

All figures go into `card.json` and into a report beside it (JSON, Markdown, PNG), with n, hardware and versions. The
number of counterfactuals nearer than the certified radius must be 0; an attack or a counterfactual of another class
inside the radius with reference images, the larger of the two radii, is an error, and no report is written. Finished
parts are stored (`models.evaluation.partial`) until the report is complete: an interrupted run continues where it
stopped.

Axes: N images, T training images, C channels, H height, W width.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt64
from tqdm import tqdm

from models.data.datasets import load_dataset, options_of
from models.data.labelled import DataError, LabelledImages
from models.evaluation import attacks as attacking
from models.evaluation.attacks import AttackResult, AttacksMissingError, CertificateRefutedError
from models.evaluation.budget import attack_within
from models.evaluation.card_results import earlier_attacks, epsilons_of, update_card
from models.evaluation.cluster import runner_for
from models.evaluation.details import details
from models.evaluation.images import (
    EvaluationError,
    ImageSet,
    NotTheCardsImagesError,
    evenly_spaced,
    holds_classes,
    other_images,
)
from models.evaluation.novelty import is_novelty_model, novel_images, novelty_figures
from models.evaluation.page import EXAMPLES, PAGE_FILE, Measurement, read_history, read_training_keys, write_page
from models.evaluation.partial import Arrays, PartialResults, code_digest, digest_of
from models.evaluation.report import draw_figures, markdown_report, panels_of_measured
from models.evaluation.summary import (
    Measured,
    ReferenceProofs,
    answers_of,
    counterfactuals_of_attacked,
    inside_largest_radius,
    summarise,
    summarise_attacks,
)
from models.evaluation.tasks import Runner, Task, library_versions
from models.evaluation.tasks import measured as measured_parts
from models.export import code_version, environment
from models.paths import FOLDER
from service.artefact.card import NOVELTY_LABELS
from service.inference.classifier import Classifier, Prediction, with_references
from service.inference.counterfactual import Counterfactual
from service.inference.references import find_references
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


class EvaluationInterrupted(Exception):
    """The evaluation was interrupted by Ctrl-C; the message says how to continue."""


def evaluate(
    artefact: Path,
    data: Path,
    *,
    attacks: bool = True,
    n_attack: int | None = None,
    attack_seconds: float | None = None,
    limit: int | None = None,
    provider: Provider = "auto",
    threads: int = 1,
    out: Path | None = None,
    novel: Sequence[str] = (),
    ray: str | None = None,
) -> str:
    """Measure the artefact, write report and card, and return the report.

    A folder whose images are not those of the card is measured as other images of the same classes: all of them, with
    a report of their own, and the card stays as it is.

    Args:
        artefact: folder of the artefact; its card names the data set.
        data: folder of the data set, or of other images of its classes.
        attacks: run `models.evaluation.attacks`; otherwise earlier results stay in the card.
        n_attack: number of attacked images, evenly spaced in the test set; default: `N_ATTACK`, or all of fewer.
        attack_seconds: time after which no further attack starts, see `models.evaluation.budget`; default: no limit.
        limit: number of images to use, evenly spaced; the card is then not changed. Default: all.
        provider: execution provider, as in the server.
        threads: threads of ONNX Runtime in each process.
        out: folder of the report and of partial results; default: `report` in the artefact, of other images
            `report-NAME` with the name of their folder.
        novel: of a novelty model: further sets of novel images, see `models.evaluation.novelty.novel_images`.
        ray: address of a Ray cluster that measures and attacks, or `local`; default: this process.

    Returns:
        The report as Markdown.

    Raises:
        EvaluationError: the images have other classes, there are fewer than requested, the provider or a library is
            not available, the report cannot be written, or an attack refutes a certificate.
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
    if novel and not is_novelty_model(classifier):
        raise EvaluationError(f"--novel is about novelty models, and {classifier.name} has other classes")
    strange = novel_images(novel, data)
    found = image_set(classifier, data, read_training_keys(artefact))
    found = found.at(evenly_spaced(len(found.images) if limit is None else limit, len(found.images), "--limit"))
    image_NCHW, label_N = found.images.pixels(torch.float64).numpy(), found.images.labels_N.numpy()
    attacked_M = evenly_spaced(
        min(N_ATTACK, len(image_NCHW)) if n_attack is None else n_attack, len(image_NCHW), "--n-attack"
    )
    folder = _report_folder(artefact, found, out)
    cache = PartialResults(folder / PARTIAL_FOLDER)
    if cache.count():
        log.info(
            "%d partial results in %s; those of this artefact, data and code are used", cache.count(), cache.folder
        )
    with _resumable(cache, folder), runner_for(classifier, artefact, threads, ray) as runner:
        settings = {"provider": classifier.provider, "code": code_digest(), "environment": library_versions()}
        wanted = epsilons_of(classifier.card)
        measured = _measure(classifier, image_NCHW, label_N, wanted, cache, settings, runner)
        _refuse_refuted(measured)
        attacked: list[AttackResult] = []
        epsilons = sorted({*wanted, *CURVE})
        results: dict[str, Any] = {}
        if attacks:
            asked = len(attacked_M)
            best_M = measured.proved.largest_N[attacked_M]
            done = attack_within(
                classifier,
                image_NCHW[attacked_M],
                best_M,
                attack_seconds,
                cache=cache,
                settings=settings,
                runner=runner,
            )
            attacked_M = attacked_M[done.index_M]
            attacked = [*done.results, attacking.union(done.results)]
            results = summarise_attacks(measured, attacked_M, attacked[-1], epsilons)
            if attack_seconds is not None:
                results["attack_budget"] = {
                    "seconds": attack_seconds,
                    "used_s": done.seconds,
                    "asked": asked,
                    "attacked": len(attacked_M),
                    "images": attacked_M.tolist(),
                }
        elif limit is None and found.of_the_card:
            results, attacked_M = earlier_attacks(classifier.card, measured)
        earlier = [] if attacked else results.get("robust_accuracy", [])
        entries = [result.as_card_entry() for result in attacked] or results.pop("attacks", [])
        if entries and len(attacked_M):
            results["same_images"] = counterfactuals_of_attacked(measured, attacked_M)
        if is_novelty_model(classifier):
            results["novelty"] = novelty_figures(classifier, found.images, strange, wanted)
        results |= {
            **summarise(measured, epsilons),
            "provider": classifier.provider,
            "digest": classifier.digest,
            "code_version": code_version(),
            "environment": environment(time.monotonic() - started),
        }
        folder.mkdir(parents=True, exist_ok=True)
        pictures = draw_figures(classifier, measured, attacked_M, attacked, earlier, wanted, folder)
        report = {
            **results,
            "attacks": entries,
            "images": found.as_json(data),
            **_details(classifier, found, measured, wanted, limited=limit is not None),
        }
        (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        text = markdown_report(classifier.name, found, report, pictures, wanted)
        (folder / "evaluation.md").write_text(text)
        is_main = found.of_the_card and limit is None and out is None
        write_page(
            (artefact if is_main else folder) / PAGE_FILE,
            Measurement(
                classifier=classifier,
                images=found,
                answers=answers_of(classifier.labels, measured),
                figures=report,
                panels=panels_of_measured(classifier, measured, EXAMPLES),
                history=read_history(artefact) if found.of_the_card else (),
                data=data,
                attacks=[*entries, *([results["same_images"]] if "same_images" in results else [])],
            ),
            artefact,
        )
        if limit is None and found.of_the_card:
            update_card(artefact, results, entries, classifier.digest)
    cache.discard()
    return text


def image_set(classifier: Classifier, data: Path, training_keys: UInt64[np.ndarray, " T"] | None = None) -> ImageSet:
    """Return the test images of the card, or those of a folder of other images of its classes.

    Args:
        classifier: as it is served.
        data: folder of the data set, or of other images.
        training_keys: `images.pixel_keys` of the training images; default: not known.

    Raises:
        EvaluationError: the folder has other classes, or no image that can be used.
        DataError: the images of the card are missing or unusable, and the folder holds no classes of the model.
    """
    card, labels = classifier.card, list(classifier.labels)
    try:
        return ImageSet(labelled_images(classifier, data, "test"), str(card.data.get("name", "The")), of_the_card=True)
    except (DataError, NotTheCardsImagesError) as error:
        is_folder = data.is_dir() and card.data.get("dataset") == FOLDER
        if not is_folder and not holds_classes(data, labels):
            raise
        log.info(
            "not the images of the card (%s): all images of %s are measured, and the card stays as it is", error, data
        )
    return other_images(data, labels, classifier.input_shape, card.data, training_keys)


def _details(
    classifier: Classifier, found: ImageSet, measured: Measured, epsilons: Sequence[float], *, limited: bool
) -> dict[str, Any]:
    answers = answers_of(classifier.labels, measured)
    figures = details(answers, classifier.card, epsilons, same_images=found.of_the_card and not limited)
    if found.files is not None:
        for mistake in figures["mistakes"]["worst"]:
            mistake["file"] = found.files[mistake["index"]]
    return figures


def _report_folder(artefact: Path, found: ImageSet, out: Path | None) -> Path:
    """Return the folder of the report; that of the card is not for other images."""
    of_the_card = artefact / REPORT_FOLDER
    if found.of_the_card:
        return of_the_card if out is None else out
    if out is not None and out.resolve() == of_the_card.resolve():
        raise EvaluationError(
            f"{out} is the folder of the report on the images of the card, and {found.name} has others: name another "
            "folder with --out"
        )
    return artefact / f"{REPORT_FOLDER}-{found.name}" if out is None else out


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
    epsilons: Sequence[float],
    cache: PartialResults,
    settings: Mapping[str, Any],
    runner: Runner,
) -> Measured:
    predictions: list[Prediction] = []
    counterfactuals: list[Counterfactual] = []
    posted_back: list[np.ndarray] = []
    proofs: list[Arrays] = []
    parts = [image_NCHW[start : start + BATCH] for start in range(0, len(image_NCHW), BATCH)]
    tasks: list[Task] = []
    for part_NCHW in parts:
        key = {**settings, "model": classifier.digest, "images": digest_of(part_NCHW)}
        tasks.append(Task({**key, "measured": "counterfactuals"}, search_counterfactuals, (part_NCHW,)))
        key = {**key, "measured": "references", "epsilons": list(epsilons)}
        tasks.append(Task(key, prove_with_references, (part_NCHW, epsilons)))
    found = measured_parts(tasks, runner, cache)
    with tqdm(total=len(image_NCHW), desc="counterfactuals and radii", unit="image") as bar:
        for part_NCHW in parts:
            stored = next(found)
            proofs.append(next(found))
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
    proved = ReferenceProofs(
        radius_N=np.concatenate([part["radius"] for part in proofs]),
        steps_N=np.concatenate([part["steps"] for part in proofs]),
        radius_at_epsilon={
            epsilon: np.concatenate([part["radius_at_epsilon"][e] for part in proofs])
            for e, epsilon in enumerate(epsilons)
        },
    )
    return Measured(image_NCHW, label_N, predictions, counterfactuals, np.concatenate(posted_back), proved)


def prove_with_references(classifier: Classifier, image_NCHW: np.ndarray, epsilons: Sequence[float]) -> Arrays:
    """Return the radii of a part of the test set with reference images, as a client gets them.

    Arrays: `radius` and `steps` (gradient passes) of the search for the largest radius, `radius_at_epsilon` (E, N) of
    searches that end at epsilon.

    Args:
        classifier: as it is served.
        image_NCHW: pixels in [0, 1].
        epsilons: L2 radii that are wanted.
    """
    view, predictions, n = classifier.view(image_NCHW.shape[1:]), classifier.predict(image_NCHW), len(image_NCHW)
    largest = find_references(
        view,
        image_NCHW,
        class_id_N=np.array([prediction.class_id for prediction in predictions], np.int64),
        logits_NK=np.array([prediction.logits_K for prediction in predictions]),
        epsilon_N=np.zeros(n),
        largest_N=np.ones(n, np.bool_),
    )
    return {
        "radius": np.array([proof.radius for proof in largest]),
        "steps": np.array([proof.steps for proof in largest], np.int64),
        "radius_at_epsilon": np.array(
            [
                [
                    prediction.radius
                    for prediction in with_references(view, image_NCHW, predictions, [epsilon] * n, [False] * n)
                ]
                for epsilon in epsilons
            ]
        ).reshape(len(epsilons), n),
    }


def _refuse_refuted(measured: Measured) -> None:
    """Raise `CertificateRefutedError` if a counterfactual of another class is inside the largest proved radius."""
    for n in inside_largest_radius(measured)[:1].tolist():
        raise CertificateRefutedError(
            "the search for counterfactuals",
            measured.image_NCHW[n],
            measured.counterfactuals[n].pixels_CHW / 255,
            measured.predictions[n].class_id,
            measured.counterfactuals[n].class_id,
            float(measured.proved.largest_N[n]),
        )


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


def labelled_images(classifier: Classifier, data: Path, part: Literal["train", "test"]) -> LabelledImages:
    """Return the training or the test set that the card of a model names.

    Args:
        classifier: as it is served.
        data: folder of the data set.
        part: which of both.

    Raises:
        NotTheCardsImagesError: the images are not those of the card, or it does not say which it is about.
        EvaluationError: the model does not take the images, or has other classes than the card.
        DataError: the files are missing or unusable.
    """
    card = classifier.card
    try:
        options = options_of(card.data, list(classifier.labels))
    except DataError as error:
        raise NotTheCardsImagesError(f"{classifier.name}: {error}") from error
    if (NOVELTY_LABELS if options.one_class else options.classes) != tuple(classifier.labels):
        raise EvaluationError(
            f"{classifier.name} has the classes {', '.join(classifier.labels)}, its data.options "
            f"{', '.join(options.classes or ['all'])}; correct the card, or train again"
        )
    found = load_dataset(options, data, test_only=part == "test")
    stated, actual = (block.get("digest", {}).get(part) for block in (card.data, found.card))
    if stated != actual:
        raise NotTheCardsImagesError(
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
