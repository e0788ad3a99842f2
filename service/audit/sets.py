"""Checks of a certified set and of a decision: from exact logits, the audit's own bounds and the card's calibration.

**Theorem.** Let E and `K_kj` be the audit's bounds. A class whose exact score `min over j of (f_k - f_j) / K_kj` is
above `q - epsilon` by more than rounding and other bounds can take belongs to the set, and one that is below it by more
than they can give does not. *Proof.* Computed margins are off by at most 2 E, and the service's bounds are at least the
audit's and at most `LARGER` times as large, which moves a quotient towards 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from flint import arb

from service.audit.derivation import Derivation
from service.audit.findings import Finding, as_json, failed, undecided
from service.audit.records import Answer, Artefact

LARGER = 1.001
"""Factor up to which a bound of the service may be above the audit's; norms are within 1e-4 of the true ones."""


_FAR = arb(1e300)


@dataclass(frozen=True)
class _Score:
    """Ends of the interval of scores that the service may compute."""

    low: arb
    high: arb


def against_card_calibration(answer: Answer, artefact: Artefact) -> Iterator[Finding]:
    """Yield the contradictions between a set, a decision, the answer and the card; the network is not evaluated."""
    if (answer.coverage is None) != (answer.set is None):
        yield failed(f"set: {'null' if answer.set is None else 'given'} with coverage {as_json(answer.coverage)}")
    if (answer.max_error is None) != (answer.decision is None):
        yield failed(f"decision: {as_json(answer.decision)} with max_error {as_json(answer.max_error)}")
    for name, share in (("coverage", answer.coverage), ("max_error", answer.max_error)):
        if share is not None and not 0.0 < share < 1.0:
            yield failed(f"{name}: {share!r} is not between 0 and 1")
    if answer.coverage is not None or answer.max_error is not None:
        yield from _calibration(artefact)
    if answer.decision not in (None, "accept", "abstain"):
        yield failed(f"decision: {answer.decision!r}, expected accept or abstain")
    if answer.coverage is not None and _quantile(artefact, answer.coverage) is None:
        yield failed(f"coverage: {answer.coverage!r}, which the calibration of the card does not have")
    if answer.max_error is not None and _threshold(artefact, answer.max_error) is None:
        yield failed(f"max_error: {answer.max_error!r}, which the calibration of the card does not have")
    if answer.set is None:
        return
    classes = [entry.class_id for entry in answer.set]
    if classes != sorted(set(classes)):
        yield failed(f"set: the classes {classes} do not rise")
    if answer.class_id not in classes:
        yield failed(f"set: the predicted class {answer.class_id} is missing")
    for entry in answer.set:
        if not 0 <= entry.class_id < len(artefact.labels):
            yield failed(f"set: class {entry.class_id}, the card has classes 0 to {len(artefact.labels) - 1}")
        elif entry.label != artefact.labels[entry.class_id]:
            yield failed(f"set: label {entry.label!r}, class {entry.class_id} is {artefact.labels[entry.class_id]!r}")


def _calibration(artefact: Artefact) -> Iterator[Finding]:
    """Yield the reasons why the server would not answer from the calibration of this card."""
    calibration = artefact.calibration
    if calibration is None:
        return
    if calibration.model != artefact.digest:
        yield undecided(f"calibration: it is about {calibration.model}, model.onnx has {artefact.digest}")
    coverages = [entry.coverage for entry in calibration.quantiles]
    if coverages != sorted(set(coverages)):
        yield undecided("calibration: the coverages of its quantiles do not rise")
    if any((calibration.n + 1) * (1 - Fraction(repr(coverage))) < 1 for coverage in coverages):
        yield undecided(f"calibration: {calibration.n} images are too few for its largest coverage")


def against_scores(answer: Answer, artefact: Artefact, derivation: Derivation) -> Iterator[Finding]:
    """Yield the classes that are wrongly in a set or not, and a decision that the radius contradicts.

    Args:
        answer: the answer, about an image of the model's own size and channels.
        artefact: with the calibration.
        derivation: of the model; its first image is the one that was sent.
    """
    logits = derivation.logits[0]
    quantile = None if answer.coverage is None else _quantile(artefact, answer.coverage)
    if answer.set is not None and quantile is not None:
        epsilon = arb(0.0 if answer.certificate.epsilon is None else answer.certificate.epsilon)
        present = {entry.class_id for entry in answer.set}
        for k in range(len(logits)):
            score = _score(derivation, logits, k, arb(0))
            if k not in present and score.low + epsilon > quantile:
                yield failed(f"set: class {k} is missing, its exact score is {float(score.low):.10g}")
            if k in present and k != answer.class_id and score.high + epsilon < quantile:
                yield failed(f"set: class {k} does not belong to it, its exact score is {float(score.high):.10g}")
    threshold = None if answer.max_error is None else _threshold(artefact, answer.max_error)
    if answer.decision is None or threshold is None or not 0 <= answer.class_id < len(logits):
        return
    stated = answer.certificate.logit_error
    radius = _score(derivation, logits, answer.class_id, 4 * arb(0.0 if stated is None else stated))
    if answer.decision == "accept" and radius.high < threshold and threshold > 0:
        yield failed(f"decision: accept, and the radius {float(radius.high):.10g} is below {threshold!r}")
    if answer.decision == "abstain" and (radius.low > threshold or threshold == 0):
        yield failed(f"decision: abstain, and the radius {float(radius.low):.10g} is above {threshold!r}")


def _score(derivation: Derivation, logits: Sequence[arb], k: int, taken: arb) -> _Score:
    """Return the score of class k, of which `taken` is subtracted from each margin."""
    blur = 2 * derivation.logit_error
    lows: list[arb] = []
    highs: list[arb] = []
    for j, logit in enumerate(logits):
        bound = derivation.margin_bounds[k][j]
        if j == k:
            continue
        if not bound > 0:
            # The margin is the same for every image: it excludes the class at any distance, or at none.
            margin = logits[k] - logit - taken
            lows.append(_FAR if margin > blur else -_FAR)
            highs.append(-_FAR if margin < -blur else _FAR)
            continue
        least = (logits[k] - logit - taken - blur) / bound
        most = (logits[k] - logit - taken + blur) / bound
        # A larger bound moves a quotient towards 0; the last of the digits are rounding of the service.
        lows.append((least.min(least / LARGER) - arb(1e-12)).lower())
        highs.append((most.max(most / LARGER) + arb(1e-12)).upper())
    low, high = lows[0], highs[0]
    for one, other in zip(lows, highs, strict=True):
        low, high = low.min(one), high.min(other)
    return _Score(low.lower(), high.upper())


def _quantile(artefact: Artefact, coverage: float) -> float | None:
    listed = artefact.calibration.quantiles if artefact.calibration else []
    return next((entry.quantile for entry in listed if entry.coverage >= coverage), None)


def _threshold(artefact: Artefact, max_error: float) -> float | None:
    listed = artefact.calibration.thresholds if artefact.calibration else []
    return min((entry.radius for entry in listed if entry.error_bound <= max_error), default=None)
