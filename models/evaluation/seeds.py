"""Trainings of one recipe with several seeds: their figures in the card of the artefact, and the spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from models.evaluation.images import EvaluationError
from models.recipes import ImageRecipe
from service.artefact.card import Card, SeedRun, read_card, write_card


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
    others = [read_card(run) for run in runs]
    for run, other in zip(runs, others, strict=True):
        _check_alike(card, folder, other, run)
    cards = [card, *others]
    seeds = [one.seed for one in cards]
    if len(set(seeds)) < len(seeds):
        raise EvaluationError(f"the seeds {', '.join(map(str, seeds))} repeat: train each run with another --seed")
    write_card(folder, card.model_copy(update={"seeds": [_run_of(other) for other in others]}))
    return _table(cards)


def _check_alike(card: Card, folder: Path, other: Card, run: Path) -> None:
    if _recipe_of(card, folder) != _recipe_of(other, run):
        raise EvaluationError(f"{run} has another recipe than {folder}: train it with the recipe in that card")
    differing = [key for key in card.data.keys() & other.data.keys() if card.data[key] != other.data[key]]
    if differing:
        raise EvaluationError(f"{run} has other images than {folder} ({', '.join(sorted(differing))} in `data`)")
    for one, place in ((card, folder), (other, run)):
        if one.seed is None or one.accuracy is None:
            raise EvaluationError(f"the card of {place} states no seed or no accuracy: name folders that `train` wrote")


def _recipe_of(card: Card, folder: Path) -> ImageRecipe:
    try:
        return ImageRecipe.model_validate(card.recipe)
    except ValidationError:
        raise EvaluationError(
            f"the recipe in the card of {folder} is not one of this version of lipcert: train the artefact again"
        ) from None


def _run_of(card: Card) -> SeedRun:
    return SeedRun.model_validate(
        {
            "seed": card.seed,
            "model": card.graphs["model.onnx"],
            "code_version": card.code_version,
            "accuracy": card.accuracy,
            "certified_accuracy": [entry.model_dump() for entry in card.certified_accuracy],
        }
    )


def _table(cards: Sequence[Card]) -> str:
    columns = [{"clean": card.accuracy or 0.0} for card in cards]
    for column, card in zip(columns, cards, strict=True):
        column |= {f"certified at {entry.epsilon:g}": entry.value for entry in card.certified_accuracy}
    head = f"| | {' | '.join(f'seed {card.seed}' for card in cards)} | smallest to largest |"
    lines = [head, "|---" * (len(cards) + 2) + "|"]
    for name in columns[0]:
        values = [column[name] for column in columns if name in column]
        cells = " | ".join(f"{value:.2%}" for value in values)
        lines.append(f"| {name} | {cells} | {min(values):.2%} to {max(values):.2%} |")
    return "\n".join(lines)
