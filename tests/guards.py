"""A model of the tests of novelty, with a guard that has an input of another size."""

from __future__ import annotations

from pathlib import Path

import builders
from client import HEIGHT, WIDTH

from service.artefact.card import NOVELTY_LABELS, read_card, write_artefact, write_card

GUARD_SHAPE = (1, 6, 7)


def write_guarded(folder: Path, named: str | None = "guard", labels: tuple[str, ...] = NOVELTY_LABELS) -> None:
    """Write the models `guarded`, whose card names a novelty model, and `guard` to a folder of models.

    Args:
        folder: of models.
        named: novelty model in the card; null for no such member.
        labels: of the guard.
    """
    builders.write(folder / "guarded", builders.random_groupsort(2, (1, HEIGHT, WIDTH), 4), "guarded")
    card = read_card(folder / "guarded")
    write_card(folder / "guarded", card.model_copy(update={"novelty_model": named}))
    graphs = builders.random_groupsort(5, GUARD_SHAPE, 1)
    card = builders.card_for(graphs, "guard").model_copy(update={"labels": list(labels)})
    write_artefact(folder / "guard", card, graphs.model)
