"""Results of an evaluation in the card of an artefact: those of an earlier one are read, new ones written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.evaluation.images import EvaluationError, evenly_spaced
from models.evaluation.summary import Measured
from service.artefact.card import Card, CertifiedAccuracy, read_card, write_card


def epsilons_of(card: Card) -> list[float]:
    """Return the radii at which the recipe of a card asks for certified accuracy."""
    return [
        float(epsilon) for epsilon in card.recipe.get("epsilons", [entry.epsilon for entry in card.certified_accuracy])
    ]


def earlier_attacks(card: Card, measured: Measured) -> tuple[dict[str, Any], np.ndarray]:
    """Return the results of earlier attacks in the card, and the indices of the attacked images.

    They are about its graph, whose digest cannot change, and about evenly spaced images of the same test set, or those
    that the card names; so the shares that are certified with reference images are measured for these images, too.
    """
    found = {
        key: value
        for key, value in (card.evaluation or {}).items()
        if key in ("robust_accuracy", "tightness", "attack_budget")
    }
    shares = found.get("robust_accuracy", [])
    named = (found.get("attack_budget") or {}).get("images")
    attacked_M = (
        np.array(named, np.int64)
        if named is not None
        else evenly_spaced(shares[0]["n"] if shares else 0, len(measured.label_N), "the card")
    )
    right_M, largest_M = measured.right_N[attacked_M], measured.proved.largest_N[attacked_M]
    if shares:
        found["robust_accuracy"] = [
            {**share, "certified_with_references": float((right_M & (largest_M > share["epsilon"])).mean())}
            for share in shares
        ]
    return {**found, "attacks": card.attacks}, attacked_M


def update_card(folder: Path, results: dict[str, Any], attacks: list[dict[str, Any]], digest: str) -> None:
    """Write the results to the card of an artefact.

    Args:
        folder: of the artefact.
        results: of the evaluation.
        attacks: entries of the attacks.
        digest: of the model that was measured.

    Raises:
        EvaluationError: the card is now about another model.
    """
    card = read_card(folder)
    if card.graphs["model.onnx"] != digest:
        raise EvaluationError(f"{folder} changed while it was evaluated; evaluate it again")
    wanted = epsilons_of(card)
    changes = {
        "accuracy": results["accuracy"],
        "certified_accuracy": [
            CertifiedAccuracy(**entry, n=results["n"]).model_dump()
            for entry in results["certified_accuracy"]
            if entry["epsilon"] in wanted
        ],
        "evaluation": results,
        "attacks": attacks,
    }
    write_card(folder, Card.model_validate({**card.model_dump(), **changes}))
