"""Checks of an answer against itself, the image that was sent and the card; the network is not evaluated."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from fractions import Fraction

from service.audit.balls import NotAuditableError
from service.audit.findings import Finding, as_json, failed, undecided
from service.audit.images import SentImage, read_held
from service.audit.preprocessing import conversion_between
from service.audit.records import Answer, Artefact, ClassLabel, Counterfactual, Waypoint

# Rounding of the radius: nine roundings of margin, surplus and quotient, each of at most 2**-52, and underflow.
_RADIUS_ROUNDING = Fraction(1, 2**48)
_UNDERFLOW = Fraction(1, 2**1070)
# Rounding of a distance besides that of its sum: differences, squares, root, quotient.
_DISTANCE_ROUNDINGS = 8
# Rounding of a pixel times 255, which decides where two 8-bit values are equally near.
_HALF_ROUNDING = Fraction(1, 2**40)


def against_itself(answer: Answer) -> Iterator[Finding]:
    """Yield the members of an answer that contradict others."""
    certificate, logits = answer.certificate, answer.logits
    known = range(len(logits))
    if answer.class_id not in known:
        yield failed(f"class_id: {answer.class_id}, and the answer has logits of classes 0 to {len(logits) - 1}")
    finite = [logit for logit in logits if logit is not None]
    if len(finite) == len(logits) and answer.class_id in known:
        first = finite.index(max(finite))
        if answer.class_id != first:
            yield failed(f"class_id: {answer.class_id}, and logit {first} of the answer is the first of the largest")
    runner_up = certificate.runner_up.class_id
    if runner_up not in known or runner_up == answer.class_id:
        yield failed(f"runner_up: {runner_up} is not another class of the answer")
    elif answer.class_id in known:
        yield from _radius(answer, logits[answer.class_id], logits[runner_up])
    if certificate.norm != "l2":
        yield undecided(f"norm: {certificate.norm!r} is not audited, l2 is")
    if certificate.certified != (certificate.radius > 0.0):
        yield failed(f"certified: {as_json(certificate.certified)} with a radius of {certificate.radius!r}")
    exact = 255 * Fraction(certificate.radius)
    above = math.nextafter(certificate.radius_255, math.inf)
    if Fraction(certificate.radius_255) > exact or (math.isfinite(above) and Fraction(above) <= exact):
        yield failed(f"radius_255: {certificate.radius_255!r} is not 255 times {certificate.radius!r}, rounded down")
    epsilon = certificate.epsilon
    robust = None if epsilon is None else certificate.certified and epsilon <= certificate.radius
    if certificate.robust_at_epsilon is not robust:
        yield failed(
            f"robust_at_epsilon: {as_json(certificate.robust_at_epsilon)}, expected {as_json(robust)} with epsilon "
            f"{as_json(epsilon)} and radius {certificate.radius!r}"
        )


def _radius(answer: Answer, logit: float | None, rival: float | None) -> Iterator[Finding]:
    """Compare the radius with `(f_i - f_j - 4 E) / K_ij` of the answer's own terms, in rational numbers.

    The service rounds each step down, so that the radius is at most the exact quotient, and little less.
    """
    certificate = answer.certificate
    if any(reference.class_id == certificate.runner_up.class_id for reference in certificate.references or []):
        return  # The logits that give it are those of the reference image.
    bound, error = certificate.lipschitz_bound, certificate.logit_error
    if logit is None or rival is None or bound is None or error is None:
        if certificate.radius > 0.0:
            yield failed("radius: above 0, while a logit, lipschitz_bound or logit_error is null")
        return
    margin, error_part = Fraction(logit) - Fraction(rival), 4 * Fraction(error)
    surplus = margin - error_part
    rounding = _RADIUS_ROUNDING * (abs(margin) + error_part) + _UNDERFLOW
    largest = Fraction(sys.float_info.max)
    if bound > 0.0:
        most = max(surplus / Fraction(bound), Fraction(0))
        least = min((surplus - rounding) / Fraction(bound) - _UNDERFLOW, largest)
    else:
        # The margin is the same for every image: it is positive at any distance, or nowhere.
        most = largest if surplus > 0 else Fraction(0)
        least = largest if surplus > rounding else Fraction(0)
    radius = Fraction(certificate.radius)
    if not least <= radius <= most:
        yield failed(
            f"radius: {certificate.radius!r}, and logits, lipschitz_bound and logit_error of the answer give "
            f"{_decimal(most)}"
        )


def _decimal(value: Fraction) -> str:
    return repr(float(min(value, Fraction(sys.float_info.max))))


def against_image(answer: Answer, sent: SentImage) -> Iterator[Finding]:
    """Yield the contradictions between the image that an answer names and the file."""
    if answer.image is None:
        yield undecided(
            "image: the answer does not name its image, as those of earlier versions; the other checks are about the "
            "file that was given"
        )
        return
    if answer.image.digest != sent.digest:
        yield failed(f"image.digest: {answer.image.digest}, the pixels of the file have {sent.digest}")
    if answer.image.shape != sent.shape:
        yield failed(f"image.shape: {answer.image.shape}, the file has {sent.shape} (channels, height, width)")


def against_card(answer: Answer, artefact: Artefact, sent: SentImage) -> Iterator[Finding]:
    """Yield the contradictions between an answer and the card of the artefact that answered.

    Args:
        answer: the answer.
        artefact: the artefact whose `model.onnx` the answer names.
        sent: the image.
    """
    if artefact.stated_digest != artefact.digest:
        yield undecided(
            f"model.onnx: the card states the digest {artefact.stated_digest}, the file has {artefact.digest}; the "
            "artefact has been changed"
        )
    if "card_digest" in answer.model_fields_set and answer.card_digest != artefact.card_digest:
        yield undecided(
            f"card_digest: the answer is of {answer.card_digest}, card.json has {artefact.card_digest}; name the "
            "artefact that answered, with its card as it was"
        )
    if not artefact.is_named(answer.model):
        yield failed(f"model: {answer.model!r}, the artefact is {artefact.name!r}")
    if len(answer.logits) != len(artefact.labels):
        yield failed(f"logits: the answer has {len(answer.logits)}, the card has {len(artefact.labels)} labels")
    yield from _label("", answer, artefact.labels)
    yield from _label("runner_up.", answer.certificate.runner_up, artefact.labels)
    if answer.counterfactual is not None:
        yield from _label("counterfactual.", answer.counterfactual, artefact.labels)
        for n, waypoint in enumerate(answer.counterfactual.path or []):
            yield from _label(f"counterfactual.path.{n}.", waypoint, artefact.labels)
    if answer.image is None:
        return
    resized = sent.shape[1:] != artefact.input_shape[1:]
    if answer.image.resized != resized:
        yield failed(f"image.resized: {as_json(answer.image.resized)}, expected {as_json(resized)}")
    try:
        conversion = conversion_between(sent.shape[0], artefact.input_shape[0])
    except NotAuditableError:
        return  # The derivation reports it.
    if answer.image.conversion != conversion:
        yield failed(f"image.conversion: {as_json(answer.image.conversion)}, expected {as_json(conversion)}")


def _label(prefix: str, named: ClassLabel, labels: list[str]) -> Iterator[Finding]:
    if not 0 <= named.class_id < len(labels):
        yield failed(f"{prefix}class_id: {named.class_id}, the card has classes 0 to {len(labels) - 1}")
    elif named.label != labels[named.class_id]:
        yield failed(
            f"{prefix}label: {named.label!r}, class {named.class_id} of the card is {labels[named.class_id]!r}"
        )


def counterfactual_image(found: Counterfactual, sent: SentImage) -> SentImage | Finding:
    """Return the image of a counterfactual, or the reason why it is not one of the shape that was sent."""
    return _held_image("counterfactual", found, sent)


def _held_image(name: str, found: Counterfactual | Waypoint, sent: SentImage) -> SentImage | Finding:
    try:
        image = read_held(found.image, _media_type(sent))
    except ValueError as error:
        return failed(f"{name}.image: {error}")
    if image.shape != sent.shape:
        return failed(f"{name}.image: its shape is {image.shape}, an image of {sent.shape} was sent")
    return image


def path_images(found: Counterfactual, sent: SentImage) -> tuple[dict[int, SentImage], list[Finding]]:
    """Return the images of the path to a counterfactual by place, and the findings that need no network.

    Args:
        found: the counterfactual.
        sent: the image that was sent.
    """
    findings: list[Finding] = []
    images: dict[int, SentImage] = {}
    path = found.path or []
    for n, waypoint in enumerate(path):
        name = f"counterfactual.path.{n}"
        image = _held_image(name, waypoint, sent)
        if isinstance(image, Finding):
            findings.append(image)
            continue
        images[n] = image
        findings += _distance(name, waypoint, sent, image)
        if n == 0 and not _is_nearest(image, sent):
            findings.append(failed(f"{name}: is not the image that was sent, rounded to 8 bits"))
    if path and path[-1].image != found.image:
        findings.append(failed("counterfactual.path: its last image is not the counterfactual"))
    return images, findings


def _is_nearest(image: SentImage, sent: SentImage) -> bool:
    """Return whether no 8-bit value is nearer to a pixel as sent than that of the image."""
    half = Fraction(image.denominator * sent.denominator, 2 * 255) * (1 + _HALF_ROUNDING)
    pairs = zip(image.numerators, sent.numerators, strict=True)
    return all(abs(a * sent.denominator - b * image.denominator) <= half for a, b in pairs)


def _distance(name: str, found: Counterfactual | Waypoint, sent: SentImage, image: SentImage) -> Iterator[Finding]:
    square = Fraction(*sent.squared_distance(image))
    # The service sums in any order and rounds the root.
    rounding = Fraction(3 * (len(sent.numerators) + _DISTANCE_ROUNDINGS), 2**53)
    if abs(Fraction(found.distance) ** 2 - square) > rounding * square:
        yield failed(f"{name}.distance: {found.distance!r}, the images are {float(square) ** 0.5!r} apart")
    if found.media_type != _media_type(sent):
        yield failed(f"{name}.media_type: {found.media_type!r}, expected {_media_type(sent)!r}")


def _media_type(sent: SentImage) -> str:
    """Return the type of the files that an answer holds: PNG has grey and RGB alone."""
    return "image/png" if sent.shape[0] in (1, 3) else "application/x-npy"


def against_counterfactual(
    answer: Answer, found: Counterfactual, sent: SentImage, image: SentImage
) -> Iterator[Finding]:
    """Yield the contradictions between a counterfactual and the image that was sent.

    Args:
        answer: the answer.
        found: its counterfactual.
        sent: the image that was sent.
        image: the image of the counterfactual.
    """
    yield from _distance("counterfactual", found, sent, image)
    square = Fraction(*sent.squared_distance(image))
    if found.nearest_distance is not None and found.nearest_distance < answer.certificate.radius:
        yield failed(
            f"counterfactual.nearest_distance: {found.nearest_distance!r} lies within the radius "
            f"{answer.certificate.radius!r}"
        )
    if found.nearest_distance is not None and found.nearest_distance > found.distance:
        yield failed(f"counterfactual.nearest_distance: {found.nearest_distance!r}, farther than the counterfactual")
    another = found.class_id != answer.class_id
    if another and square < Fraction(answer.certificate.radius) ** 2:
        yield failed(
            f"counterfactual: an image of class {found.class_id} at the distance {float(square) ** 0.5!r} lies within "
            f"the radius {answer.certificate.radius!r}"
        )
    if found.reached and not another:
        yield failed(f"counterfactual.reached: true, and it has the class {answer.class_id} of the image")
    elif another and not found.reached:
        yield undecided(
            "counterfactual.reached: false with another class; a target explains it, and answers do not name theirs"
        )
