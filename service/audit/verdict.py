"""Whether an archived answer holds: every check, and the report.

**Theorem.** Let f be the exact network of the bytes, E a bound of |computed - exact logit| over all images of the box,
and `K_ij` a Lipschitz bound of `f_i - f_j` as a function of the image that was sent. If `f_i(x) > f_j(x)` for all
j != i, and `r <= (f_i(x) - f_j(x) - 2 E) / K_ij` for all of them, then every image x' of the box with
`||x' - x|| < r` has class i, in exact arithmetic and as the service computes it. *Proof.* The computed margin at x' is
at least the exact one less `2 E`, which is at least `f_i(x) - f_j(x) - K_ij ||x' - x|| - 2 E > 0`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from flint import ctx

from service.audit.balls import NotAuditableError
from service.audit.comparison import Derived, against_derivation, proof
from service.audit.derivation import Derivation, derive
from service.audit.findings import Conclusion, Finding, one_line, undecided
from service.audit.images import SentImage, read_image
from service.audit.novelty import novelty_against_artefact, novelty_against_derivation, novelty_against_itself
from service.audit.preprocessing import preprocess
from service.audit.records import Answer, Artefact, read_answer, read_artefact
from service.audit.references import Point, reference_images
from service.audit.sets import against_card_calibration, against_scores
from service.audit.statements import (
    against_card,
    against_counterfactual,
    against_image,
    against_itself,
    counterfactual_image,
    path_images,
)
from service.errors import KeptError

DIGITS = (192, 768)
"""Bits of the balls; the next where those before do not decide the class."""


@dataclass(frozen=True)
class Verdict:
    """The result of an audit with its reasons."""

    proof: str
    """The proof in one line; empty unless the answer holds."""
    failed: tuple[str, ...] = ()
    """A reason for each check that failed."""
    undecided: tuple[str, ...] = ()
    """A reason for each check that could not be decided."""

    @property
    def conclusion(self) -> Conclusion:
        """The verdict; a failed check outweighs an undecided one."""
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
        return tuple(f"{conclusion.value}: {one_line(reason)}" for conclusion, reason in reasons)


def audit(answer_file: Path, image_file: Path, artefact_folder: Path, novelty_folder: Path | None = None) -> Verdict:
    """Check an archived answer against the image that was sent and the artefact that answered.

    Args:
        answer_file: the JSON answer of POST /predict.
        image_file: the image file or npy array that was sent.
        artefact_folder: holds `model.onnx` and `card.json`.
        novelty_folder: likewise, of the novelty model that the answer names; default: `novelty` is checked against
            itself alone, and the report says so.

    Raises:
        KeptError: a file is missing or not valid, or the answer has no novelty and a novelty model is given; the
            message says what to do.
    """
    answer = read_answer(answer_file)
    artefact = read_artefact(artefact_folder)
    shape, background = (answer.image.shape, answer.image.background) if answer.image else (None, None)
    sent = read_image(image_file, shape, artefact.input_shape[0], background)
    findings = [*against_itself(answer), *against_image(answer, sent), *_novelty(answer, sent, novelty_folder)]
    references, doubts = reference_images(answer, sent)
    findings += doubts
    images, shown = [sent], False
    waypoints: dict[int, SentImage] = {}
    if answer.counterfactual is not None:
        image = counterfactual_image(answer.counterfactual, sent)
        if isinstance(image, Finding):
            findings.append(image)
        else:
            images.append(image)
            shown = True
            findings += against_counterfactual(answer, answer.counterfactual, sent, image)
        waypoints, doubts = path_images(answer.counterfactual, sent)
        findings += doubts
    if artefact.digest != answer.digest:
        # Whatever is derived from these bytes says nothing about the answer.
        findings.append(
            undecided(
                f"digest: the answer is of {answer.digest}, model.onnx has {artefact.digest}; name the artefact that "
                "answered"
            )
        )
        return _verdict(findings)
    findings += against_card(answer, artefact, sent)
    findings += against_card_calibration(answer, artefact)
    held = list(references.items())
    n_before = len(images)
    images += waypoints.values()
    try:
        derivation = _derivation(answer, artefact, [*images, *(reference.image for _, reference in held)])
    except NotAuditableError as error:
        return _verdict([*findings, *(undecided(f"class, logits and radius: {reason}") for reason in error.reasons)])
    at_references = derivation.logits[len(images) :]
    derived = Derived(
        derivation,
        pixels=prod(sent.shape),
        counterfactual=derivation.logits[1] if shown else None,
        waypoints=dict(zip(waypoints, derivation.logits[n_before:], strict=False)),
        references={
            class_id: Point(logits, reference.cost)
            for (class_id, reference), logits in zip(held, at_references, strict=True)
        },
        not_audited=[
            *([] if sent.shape == artefact.input_shape else _of_calibration(answer)),
            *(["novelty (--novelty-model)"] if answer.novelty and novelty_folder is None else []),
        ],
    )
    findings += against_derivation(answer, derived)
    if sent.shape == artefact.input_shape:
        findings += against_scores(answer, artefact, derivation)
    return _verdict(findings) if findings else Verdict(proof(answer, derived))


def _novelty(answer: Answer, sent: SentImage, folder: Path | None) -> list[Finding]:
    """Return the findings about `novelty`; of its model as far as that is given."""
    found = answer.novelty
    if found is None:
        if folder is not None:
            raise KeptError("the answer has no novelty, and a novelty model is named; leave --novelty-model out")
        return []
    findings = list(novelty_against_itself(found))
    if folder is None:
        return findings
    artefact = read_artefact(folder)
    findings += novelty_against_artefact(found, artefact)
    if artefact.digest != found.digest:
        return findings
    try:
        derivation = _derivation(answer, artefact, [sent])
    except NotAuditableError as error:
        return [*findings, *(undecided(f"novelty: {reason}") for reason in error.reasons)]
    return [*findings, *novelty_against_derivation(found, Derived(derivation, prod(sent.shape), None, {}, {}))]


def _of_calibration(answer: Answer) -> list[str]:
    """Return the members that are checked for images of the model's own shape alone."""
    return [name for name in ("set", "decision") if getattr(answer, name) is not None]


def _verdict(findings: Sequence[Finding]) -> Verdict:
    def reasons(conclusion: Conclusion) -> tuple[str, ...]:
        return tuple(finding.reason for finding in findings if finding.conclusion is conclusion)

    return Verdict("", reasons(Conclusion.DOES_NOT_HOLD), reasons(Conclusion.UNDECIDED))


def _derivation(answer: Answer, artefact: Artefact, images: Sequence[SentImage]) -> Derivation:
    """Derive with the precision that decides the largest logit, or with the highest."""
    sent_channels, channels = images[0].shape[0], artefact.input_shape[0]
    if answer.image is None and sent_channels != channels:
        raise NotAuditableError(
            f"the image has {sent_channels} channels, the model takes {channels}, and the answer records no conversion"
        )
    derivation = None
    for digits in DIGITS:
        ctx.prec = digits
        inputs = [preprocess(image, artefact.input_shape) for image in images]
        derivation = derive(artefact.model_bytes, inputs, artefact.input_shape, digits)
        logits = derivation.logits[0]
        if len(logits) != len(artefact.labels):
            raise NotAuditableError(f"the graph has {len(logits)} classes, the card {len(artefact.labels)}")
        if any(all(left > right for j, right in enumerate(logits) if j != i) for i, left in enumerate(logits)):
            break
    assert derivation is not None
    return derivation
