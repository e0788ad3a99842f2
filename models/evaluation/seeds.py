"""Trainings of one recipe with several seeds: their figures in the card of the artefact, and the spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from models.evaluation.images import EvaluationError
from models.evaluation.tables import percent
from models.recipes import ImageRecipe
from service.artefact.card import Card, SeedRun, read_card, write_card
from service.artefact.files import MODEL_FILE


def add_seeds(folder: Path, runs: Sequence[Path]) -> str:
    """Write the figures of trainings with other seeds to the card of an artefact; return the spread as a table.

    Args:
        folder: of the artefact.
        runs: folders that `train` wrote for the same recipe and the same images; they replace those of the card.

    Raises:
        ArtefactError: a card cannot be read.
        EvaluationError: a run has another recipe, other images or no seed of its own; nothing is written.
    """
    card = read_card(folder)
    recipe, stated = _recipe_of(card, folder), [_run_of(card, folder)]
    for run in runs:
        other = read_card(run)
        if _recipe_of(other, run) != recipe:
            raise EvaluationError(f"{run} has another recipe than {folder}: train it with the recipe in that card")
        differing = [key for key in card.data.keys() & other.data.keys() if card.data[key] != other.data[key]]
        if differing:
            raise EvaluationError(f"{run} has other images than {folder} ({', '.join(sorted(differing))} in `data`)")
        stated.append(_run_of(other, run))
    seeds = [one.seed for one in stated]
    if len(set(seeds)) < len(seeds):
        raise EvaluationError(f"the seeds {', '.join(map(str, seeds))} repeat: train each run with another --seed")
    write_card(folder, card.model_copy(update={"seeds": stated[1:]}))
    return _table(stated)


def _recipe_of(card: Card, folder: Path) -> ImageRecipe:
    try:
        return ImageRecipe.model_validate(card.recipe)
    except ValidationError:
        raise EvaluationError(
            f"the recipe in the card of {folder} is not one of this version of lipcert: train the artefact again"
        ) from None


def _run_of(card: Card, folder: Path) -> SeedRun:
    if card.seed is None or card.accuracy is None:
        raise EvaluationError(f"the card of {folder} states no seed or no accuracy: name folders that `train` wrote")
    return SeedRun(
        seed=card.seed,
        model=card.graphs[MODEL_FILE],
        code_version=card.code_version,
        accuracy=card.accuracy,
        certified_accuracy=card.certified_accuracy,
    )


def _table(runs: Sequence[SeedRun]) -> str:
    columns = [
        {"clean": run.accuracy, **{f"certified at {one.epsilon:g}": one.value for one in run.certified_accuracy}}
        for run in runs
    ]
    head = f"| | {' | '.join(f'seed {run.seed}' for run in runs)} | smallest to largest |"
    lines = [head, "|---" * (len(runs) + 2) + "|"]
    for name in columns[0]:
        values = [column[name] for column in columns if name in column]
        cells = [name, *map(percent, values), f"{percent(min(values))} to {percent(max(values))}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
