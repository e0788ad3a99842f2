"""Checks of the decision of a novelty model in an answer.

Theorem: `service.audit.verdict` with the two logits `(f, -f)`: class 0 is known, class 1 novel.
"""

from __future__ import annotations

from collections.abc import Iterator

from flint import arb

from service.audit.comparison import Derived, decimal, proved_radius, rounded_down
from service.audit.findings import Finding, as_json, failed, undecided
from service.audit.records import Artefact, Novelty

_LABELS = ["known", "novel"]


def novelty_against_itself(found: Novelty) -> Iterator[Finding]:
    """Yield the members of a decision that contradict others."""
    if found.certified != (found.radius > 0.0):
        yield failed(f"novelty.certified: {as_json(found.certified)} with a radius of {found.radius!r}")
    if found.score is None:
        if found.certified:
            yield failed("novelty.score: null, and the decision is certified")
    elif found.novel != (found.score < 0.0):
        yield failed(f"novelty.novel: {as_json(found.novel)} with a score of {found.score!r}")


def novelty_against_artefact(found: Novelty, artefact: Artefact) -> Iterator[Finding]:
    """Yield the contradictions between a decision and the files of the novelty model.

    Args:
        found: the decision.
        artefact: the artefact that is said to have made it.
    """
    if artefact.digest != found.digest:
        yield undecided(
            f"novelty.digest: the answer is of {found.digest}, model.onnx has {artefact.digest}; name the novelty "
            "model that answered"
        )
    if not artefact.is_named(found.model):
        yield failed(f"novelty.model: {found.model!r}, the artefact is {artefact.name!r}")
    if artefact.labels != _LABELS:
        yield failed(f"novelty.model: the card has the labels {', '.join(artefact.labels[:5])}, expected known, novel")


def novelty_against_derivation(found: Novelty, derived: Derived) -> Iterator[Finding]:
    """Yield the members of a decision that the derivation contradicts or leaves open.

    Args:
        found: the decision.
        derived: of the novelty model, for the image that was sent; two logits.
    """
    f, error = derived.derivation.logits[0][0], derived.derivation.logit_error
    if found.score is None or not abs(arb(found.score) - f) <= error:
        yield failed(
            f"novelty.score: {as_json(found.score)}, the exact network gives {decimal(f)} and rounding moves it by at "
            f"most {decimal(error)}"
        )
    if found.certified:
        proved = proved_radius(derived, int(found.novel))
        if proved is not None and not arb(found.radius) <= proved:
            yield undecided(
                f"novelty.radius: the answer states {found.radius!r}, the audit proves {rounded_down(proved)!r}"
            )
