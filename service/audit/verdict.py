"""Whether a kept answer holds: every check, and what is said about it.

**Theorem.** Let f be the exact network of the bytes, E a bound of |computed - exact logit| over all images of the box,
and `K_ij` a Lipschitz bound of `f_i - f_j` as a function of the image that was sent. If `f_i(x) > f_j(x)` for all
j != i, and `r <= (f_i(x) - f_j(x) - 2 E) / K_ij` for all of them, then every image x' of the box with
`||x' - x|| < r` has class i, in exact arithmetic and as the service computes it. *Proof.* The computed margin at x' is
at least the exact one less `2 E`, which is at least `f_i(x) - f_j(x) - K_ij ||x' - x|| - 2 E > 0`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import prod
from pathlib import Path

from flint import arb, ctx

from service.audit.derivation import Derivation, derive
from service.audit.exact import NotAuditableError, root
from service.audit.preprocessing import conversion_between, see
from service.audit.records import KeptAnswer, KeptArtefact, SentImage, read_answer, read_artefact, read_image

DIGITS = (192, 768)
"""Bits of the balls; the next where those before do not decide the class."""


class Conclusion(Enum):
    """The three verdicts, in the words of the report."""

    HOLDS = "holds"
    """Every check succeeded."""
    DOES_NOT_HOLD = "does not hold"
    """At least one member of the answer contradicts the derivation, the files or another member."""
    UNDECIDED = "undecided"
    """No check failed, and at least one could not be decided."""


@dataclass(frozen=True)
class Verdict:
    """The result of an audit with its reasons."""

    proof: str
    """What was proved, in one line, where nothing else was found."""
    failed: tuple[str, ...] = ()
    """A reason for each check that failed."""
    undecided: tuple[str, ...] = ()
    """A reason for each check that could not be decided."""

    @property
    def conclusion(self) -> Conclusion:
        """A failed check outweighs an undecided one."""
        if self.failed:
            return Conclusion.DOES_NOT_HOLD
        return Conclusion.UNDECIDED if self.undecided else Conclusion.HOLDS

    @property
    def lines(self) -> tuple[str, ...]:
        """One line for each reason, or one with the proof; each begins with its conclusion."""
        reasons = [
            *((Conclusion.DOES_NOT_HOLD, reason) for reason in self.failed),
            *((Conclusion.UNDECIDED, reason) for reason in self.undecided),
        ] or [(Conclusion.HOLDS, self.proof)]
        return tuple(f"{conclusion.value}: {reason}" for conclusion, reason in reasons)


def audit(answer_file: Path, image_file: Path, artefact_folder: Path) -> Verdict:
    """Check one archived answer against the image that was sent and the artefact that answered.

    Raises:
        KeptError: a file is missing or is not what it should be; the message says what to do.
    """
    answer = read_answer(answer_file)
    artefact = read_artefact(artefact_folder)
    image = read_image(image_file, answer.image, artefact.input_shape)
    reasons = [*_identity(answer, artefact), *_own_terms(answer, artefact), *_sent(answer, artefact, image)]
    if artefact.found["model.onnx"] != answer.digest:
        # Whatever is derived from these bytes says nothing about the answer.
        unchecked = "class, logits and radius: not checked, because model.onnx is not the graph that answered"
        return Verdict("", tuple(reasons), (unchecked,))
    try:
        derivation, decided = _derived(answer, artefact, image)
    except NotAuditableError as error:
        return Verdict("", tuple(reasons), (f"class, logits and radius: {error}",))
    radius = _radius(derivation, answer.class_id, prod(image.shape)) if decided else arb(0)
    reasons += [*_numbers(answer, derivation, decided), *_radii(answer, radius)]
    if reasons:
        return Verdict("", tuple(reasons))
    return Verdict(_praise(answer, derivation, radius, decided))


# --- what needs no arithmetic -----------------------------------------------------------------------------------------


def _identity(answer: KeptAnswer, artefact: KeptArtefact) -> Iterator[str]:
    """Answer, card and files speak of the same model."""
    if artefact.found["model.onnx"] != answer.digest:
        yield f"digest: the answer names {answer.digest}, model.onnx has {artefact.found['model.onnx']}"
    for file, stated in artefact.stated.items():
        if stated != artefact.found[file]:
            yield f"{file}: the card states the digest {stated}, the file has {artefact.found[file]}"
    if answer.model != artefact.name:
        yield f"model: the answer is of {answer.model!r}, the artefact is {artefact.name!r}"


def _own_terms(answer: KeptAnswer, artefact: KeptArtefact) -> Iterator[str]:
    """The answer does not contradict itself or the card."""
    labels = artefact.labels
    if len(answer.logits) != len(labels):
        yield f"logits: the answer has {len(answer.logits)}, the card has {len(labels)} labels"
    if not 0 <= answer.class_id < len(labels):
        yield f"class: {answer.class_id} is none of the classes 0 to {len(labels) - 1}"
    elif answer.label != labels[answer.class_id]:
        expected = labels[answer.class_id]
        yield f"label: the answer has {answer.label!r}, class {answer.class_id} of the card is {expected!r}"
    if not 0 <= answer.runner_up_id < len(labels) or answer.runner_up_id == answer.class_id:
        yield f"runner-up: {answer.runner_up_id} is no other class of the model"
    elif answer.runner_up_label != labels[answer.runner_up_id]:
        expected = labels[answer.runner_up_id]
        yield f"runner-up: the answer has {answer.runner_up_label!r}, class {answer.runner_up_id} is {expected!r}"
    if answer.norm != "l2":
        yield f"norm: {answer.norm!r}; l2 is audited"
    if answer.certified != (answer.radius > 0.0):
        yield f"certified: {_json(answer.certified)} with a radius of {answer.radius!r}"
    if Fraction(answer.radius_255) > 255 * Fraction(answer.radius):
        yield f"radius_255: {answer.radius_255!r} is more than 255 times the radius {answer.radius!r}"
    robust = None if answer.epsilon is None else answer.certified and answer.epsilon <= answer.radius
    if answer.robust_at_epsilon is not robust:
        yield (
            f"robust_at_epsilon: {_json(answer.robust_at_epsilon)}, expected {_json(robust)} with epsilon "
            f"{_json(answer.epsilon)} and radius {answer.radius!r}"
        )


def _json(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else repr(value)


def _sent(answer: KeptAnswer, artefact: KeptArtefact, image: SentImage) -> Iterator[str]:
    """The image is the one that the answer names."""
    kept = answer.image
    if kept is None:
        return
    if kept.digest != image.digest:
        yield f"image: the answer names {kept.digest}, the pixels of the file have {image.digest}"
    if kept.shape != image.shape:
        yield f"image: the answer states the shape {kept.shape}, the file has {image.shape} (channels, height, width)"
    resized = image.shape[1:] != artefact.input_shape[1:]
    if kept.resized != resized:
        yield f"image: resized is {_json(kept.resized)}, expected {_json(resized)}"
    try:
        conversion = conversion_between(image.shape[0], artefact.input_shape[0])
    except NotAuditableError:
        return  # The derivation says so.
    if kept.conversion != conversion:
        yield f"image: conversion is {_json(kept.conversion)}, expected {_json(conversion)}"


# --- what is derived --------------------------------------------------------------------------------------------------


def _derived(answer: KeptAnswer, artefact: KeptArtefact, image: SentImage) -> tuple[Derivation, bool]:
    """The derivation, and whether it decides which logit is the largest."""
    if answer.image is None and image.shape[0] != artefact.input_shape[0]:
        raise NotAuditableError(
            f"the image has {image.shape[0]} channels, the model takes {artefact.input_shape[0]}, and the answer "
            "records no conversion"
        )
    derivation = None
    for digits in DIGITS:
        ctx.prec = digits
        sight = see(image, artefact.input_shape, digits)
        derivation = derive(artefact.model_bytes, sight, artefact.input_shape, digits)
        if len(derivation.logits) != len(artefact.labels):
            raise NotAuditableError(
                f"the graph tells {len(derivation.logits)} classes, the card {len(artefact.labels)}"
            )
        if _largest(derivation.logits) is not None:
            return derivation, True
    assert derivation is not None
    return derivation, False


def _largest(logits: list[arb]) -> int | None:
    """The class whose logit is certainly larger than every other."""
    for i, left in enumerate(logits):
        if all(left > right for j, right in enumerate(logits) if j != i):
            return i
    return None


def _numbers(answer: KeptAnswer, derivation: Derivation, decided: bool) -> Iterator[str]:
    """Class and logits."""
    logits, error = derivation.logits, derivation.logit_error
    largest = _largest(logits)
    if decided and largest != answer.class_id:
        yield f"class: the answer has {answer.class_id}, the exact network gives class {largest}"
    known = 0 <= answer.class_id < len(logits)
    if not decided and known and any(logits[answer.class_id] < other for other in _others(answer, logits)):
        yield f"class: the answer has {answer.class_id}, and the exact network gives another class a larger logit"
    for k, (stated, exact) in enumerate(zip(answer.logits, logits, strict=False)):
        if stated is None:
            yield f"logits: logit {k} is null, the exact network gives {_decimal(exact)}"
        elif not abs(arb(stated) - exact) <= error:
            yield (
                f"logits: logit {k} is {stated!r}, the exact network gives {_decimal(exact)} and rounding moves it "
                f"by {_decimal(error)} at most"
            )


def _others(answer: KeptAnswer, logits: list[arb]) -> list[arb]:
    return [logit for k, logit in enumerate(logits) if k != answer.class_id]


def _radius(derivation: Derivation, class_id: int, pixels: int) -> arb | None:
    """The proved radius of a class, an exact number; None where it holds every valid image.

    No two images of the box are further apart than its diagonal, the root of the number of pixels.
    """
    logits, error = derivation.logits, derivation.logit_error
    if not 0 <= class_id < len(logits):
        return arb(0)
    found: arb | None = None
    for j, logit in enumerate(logits):
        if j == class_id:
            continue
        surplus = (logits[class_id] - logit - 2 * error).lower()
        bound = derivation.margin_bounds[class_id][j]
        if not surplus > 0:
            return arb(0)
        if bound > 0:
            ratio = (surplus / bound).lower()
            found = ratio if found is None or ratio < found else found
    return None if found is not None and found > root(arb(pixels)) else found


def _radii(answer: KeptAnswer, radius: arb | None) -> Iterator[str]:
    if radius is not None and not arb(answer.radius) <= radius:
        yield f"radius: the answer states {answer.radius!r}, the audit proves {_down(radius)!r}"


def _praise(answer: KeptAnswer, derivation: Derivation, radius: arb | None, decided: bool) -> str:
    named = f'class {answer.class_id} ("{answer.label}")'
    left = "; its counterfactual is not part of the audit" if answer.counterfactual else ""
    if not decided:
        return f"radius 0, which promises nothing; the class is not decided, {named} ties with another{left}"
    bound = derivation.margin_bounds[answer.class_id][answer.runner_up_id]
    proved = "every valid image" if radius is None else repr(_down(radius))
    return (
        f"{named}, radius {answer.radius!r} proved (audit: {proved}; Lipschitz bound {_decimal(bound)}, answer "
        f"{_json(answer.lipschitz_bound)}; logit error {_decimal(derivation.logit_error)}, answer "
        f"{_json(answer.logit_error)}){left}"
    )


def _down(value: arb) -> float:
    """A float64 that is not above an exact number."""
    found = float(value)
    return found if arb(found) <= value else math.nextafter(found, -math.inf)


def _decimal(value: arb) -> str:
    return f"{float(value):.10g}"
