"""Reference images of an answer: images of the box at which its radius is proved against one class each.

**Theorem.** Let x be the image that was sent and z one of the box. Every image x' of the box with `||x' - x|| <= r` has
`||x' - z||^2 <= r^2 + c`, where c is the sum over pixels of `(z - x) (z + x)` where `z > x`, and of
`(x - z) (2 - x - z)` where `z < x`. *Proof.* The left side is `sum (x' - x)^2 + 2 (x' - x) (x - z) + (x - z)^2`. The
middle term is at most `2 x (z - x)` where `z > x`, since `x' >= 0`, and at most `2 (1 - x) (x - z)` where `z < x`,
since `x' <= 1`; with the last term these are the sums above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from flint import arb, fmpq

from service.audit.balls import smaller
from service.audit.findings import Finding, as_json, failed
from service.audit.images import SentImage, read_held
from service.audit.records import Answer, Reference

PROOFS = ("fast", "best")


@dataclass(frozen=True)
class HeldReference:
    """A reference image of an answer, decoded."""

    image: SentImage
    cost: Fraction
    """c of the theorem, exact."""


@dataclass(frozen=True)
class Point:
    """An image at which a radius may be proved against a class."""

    logits: Sequence[arb]
    """Exact, enclosed."""
    cost: Fraction
    """c of the theorem; 0 at the image that was sent."""

    def radius(self, margin: arb, bound: arb) -> arb | None:
        """Return the lower end of `sqrt((margin / bound)^2 - c)`; null where it is infinite.

        Args:
            margin: of the two classes at this image, less a bound of the rounding.
            bound: Lipschitz bound of the margin.
        """
        if not margin > 0:
            return arb(0)
        if not bound > 0:
            return None
        square = (margin / bound) ** 2 - arb(fmpq(self.cost.numerator, self.cost.denominator))
        return (square.sqrt() if self.cost else margin / bound).lower() if square > 0 else arb(0)


def farther(left: arb | None, right: arb | None) -> arb | None:
    """Return the larger of two radii; null is infinite."""
    if left is None or right is None:
        return None
    return right if left < right else left


def nearer(left: arb | None, right: arb | None) -> arb | None:
    """Return the smaller of two radii; null is infinite."""
    if left is None or right is None:
        return right if left is None else left
    return smaller(left, right)


def reference_images(answer: Answer, sent: SentImage) -> tuple[dict[int, HeldReference], list[Finding]]:
    """Return the reference images by class, and the reasons why others cannot be those of an answer.

    Args:
        answer: the answer.
        sent: the image that was sent.
    """
    found: dict[int, HeldReference] = {}
    findings: list[Finding] = []
    kind, references = answer.certificate.proof, answer.certificate.references
    if kind is None and references is None:
        return found, findings
    if kind not in PROOFS:
        findings.append(failed(f"proof: {as_json(kind)}, expected one of {', '.join(PROOFS)}"))
    if references is None or (references and kind != "best"):
        findings.append(failed(f"references: {len(references or [])} of them, with the proof {as_json(kind)}"))
    for n, reference in enumerate(references or []):
        image = _image(answer, reference, sent, found)
        if isinstance(image, str):
            findings.append(failed(f"references.{n}.{image}"))
        else:
            found[reference.class_id] = HeldReference(image, cost(sent, image))
    return found, findings


def _image(
    answer: Answer, reference: Reference, sent: SentImage, found: Mapping[int, HeldReference]
) -> SentImage | str:
    """Return a reference image, or the reason why it is none."""
    if not 0 <= reference.class_id < len(answer.logits) or reference.class_id == answer.class_id:
        return f"class_id: {reference.class_id} is not another class of the answer"
    if reference.class_id in found:
        return f"class_id: class {reference.class_id} has two reference images"
    try:
        image = read_held(reference.image, reference.media_type)
    except ValueError as error:
        return f"image: {error}"
    if image.shape != sent.shape:
        return f"image: its shape is {image.shape}, an image of {sent.shape} was sent"
    if image.digest != reference.digest:
        return f"digest: {reference.digest}, the pixels of the image have {image.digest}"
    return image


def cost(sent: SentImage, reference: SentImage) -> Fraction:
    """Return c of the theorem.

    Args:
        sent: x.
        reference: z, of the same shape.
    """
    one = sent.denominator * reference.denominator
    total = 0
    for a, b in zip(sent.numerators, reference.numerators, strict=True):
        x, z = a * reference.denominator, b * sent.denominator
        total += (z - x) * (z + x) if z > x else (x - z) * (2 * one - x - z)
    return Fraction(total, one * one)
