"""Evaluation of a novelty model as a guard alone: seconds, where a whole evaluation takes minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from models.evaluation.card_results import epsilons_of
from models.evaluation.images import EvaluationError
from models.evaluation.measure import image_set
from models.evaluation.novelty import is_novelty_model, novel_images, novelty_cells, novelty_figures, novelty_text
from models.evaluation.tables import table_lines
from models.export import code_version, environment
from service.artefact.card import Card, read_card, write_card
from service.inference.classifier import Classifier
from service.runtime.provider import Provider


def evaluate_guard(
    artefact: Path, data: Path, novel: Sequence[str], *, provider: Provider = "auto", threads: int = 1
) -> str:
    """Measure the novelty on all test images, write it to the card, and return it as Markdown.

    Args:
        artefact: folder of the novelty model.
        data: folder of its data set.
        novel: further sets of novel images, see `novel_images`.
        provider: execution provider, as in the server.
        threads: threads of ONNX Runtime.

    Raises:
        EvaluationError: the model is no novelty model, or the images are not those of its card.
        ArtefactError, DataError, ProviderError: see their modules.
    """
    started = time.monotonic()
    classifier = Classifier.load(artefact, provider, threads)
    if not is_novelty_model(classifier):
        raise EvaluationError(f"{classifier.name} has other classes than known and novel: leave --novelty-only out")
    others, found = novel_images(novel, data), image_set(classifier, data)
    if not found.of_the_card:
        raise EvaluationError(
            f"the images of {data} are not those of the card: name its data set, or others by --novel"
        )
    figures = novelty_figures(classifier, found.images, others, epsilons_of(classifier.card))
    card = read_card(artefact)
    if card.graphs["model.onnx"] != classifier.digest:
        raise EvaluationError(f"{artefact} changed while it was evaluated; evaluate it again")
    made = {"code_version": code_version(), "environment": environment(time.monotonic() - started)}
    evaluation = {**(card.evaluation or {}), "novelty": {**figures, **made}}
    write_card(artefact, Card.model_validate({**card.model_dump(), "evaluation": evaluation}))
    head, rows = novelty_cells(figures)
    table = table_lines(head, rows)
    return "\n".join([f"# Novelty by `{classifier.name}`", "", novelty_text(figures), "", *table, ""])
