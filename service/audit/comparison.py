"""Checks of an answer against the numbers that are derived from the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from flint import arb

from service.audit.balls import root
from service.audit.derivation import Derivation
from service.audit.findings import Conclusion, Finding, as_json, failed, undecided
from service.audit.records import Answer, ClassLabel, Waypoint
from service.audit.references import Point, farther, nearer

# Relative difference of two quotients that are taken for equal when the runner-up is compared.
_SAME_QUOTIENT = 1e-6
# Rounding of a radius at a reference image, relative to it: of a difference of squares, unless nearly nothing is left.
_ROUNDING = arb(1e-6)


@dataclass(frozen=True)
class Derived:
    """The proved numbers about one answer."""

    derivation: Derivation
    """Of the model that answered; its first image is the one that was sent."""
    pixels: int
    """Of that image."""
    counterfactual: Sequence[arb] | None
    """Exact logits."""
    waypoints: Mapping[int, Sequence[arb]]
    """Exact logits of the images of the path, by place."""
    references: Mapping[int, Point]
    """By class."""
    not_audited: Sequence[str] = ()
    """Members of the answer that no check covers."""

    def points(self, rival: int) -> list[Point]:
        """Return the images at which a radius may be proved against a class."""
        sent = Point(self.derivation.logits[0], Fraction(0))
        return [sent, self.references[rival]] if rival in self.references else [sent]

    def radius(self, class_id: int, rival: int, taken: arb) -> arb | None:
        """Return the largest radius of a pair of classes, an exact number; null where the margin never changes.

        Args:
            class_id: of the image that was sent.
            rival: the other class.
            taken: bound of the rounding in a margin.
        """
        bound = self.derivation.margin_bounds[class_id][rival]
        found: arb | None = arb(0)
        for point in self.points(rival):
            found = farther(found, point.radius(point.logits[class_id] - point.logits[rival] - taken, bound))
        return found


def against_derivation(answer: Answer, derived: Derived) -> Iterator[Finding]:
    """Yield the members of an answer that the derivation contradicts or leaves open.

    Args:
        answer: the answer; members that contradict each other are reported elsewhere.
        derived: the derivation of its terms.
    """
    derivation = derived.derivation
    certificate, exact = answer.certificate, derivation.logits[0]
    yield from _logits(answer.logits, exact, derivation.logit_error)
    if certificate.logit_error is None or not arb(certificate.logit_error) >= derivation.logit_error:
        yield _unproved("logit_error", certificate.logit_error, decimal(derivation.logit_error))
    if not 0 <= answer.class_id < len(exact):
        return
    yield from _class(answer.class_id, exact, derivation.logit_error)
    if certificate.norm == "l2":
        proved = proved_radius(derived, answer.class_id)
        if proved is not None and not arb(certificate.radius) <= proved:
            yield _unproved("radius", certificate.radius, repr(rounded_down(proved)))
    runner_up = certificate.runner_up.class_id
    if 0 <= runner_up < len(exact) and runner_up != answer.class_id:
        bound = derivation.margin_bounds[answer.class_id][runner_up]
        if certificate.lipschitz_bound is None or not arb(certificate.lipschitz_bound) >= bound:
            yield _unproved("lipschitz_bound", certificate.lipschitz_bound, decimal(bound))
        yield from _runner_up(answer, derived, runner_up)
    if answer.counterfactual is not None and derived.counterfactual is not None:
        yield from _held_class("counterfactual", answer.counterfactual, derived.counterfactual, derivation.logit_error)
        path = answer.counterfactual.path or []
        for n, logits in derived.waypoints.items():
            yield from _waypoint(f"counterfactual.path.{n}", path[n], logits, derivation)


def _unproved(member: str, stated: float | None, proved: str) -> Finding:
    return undecided(f"{member}: the answer states {as_json(stated)}, the audit proves {proved}")


def _logits(stated: Sequence[float | None], exact: Sequence[arb], error: arb) -> Iterator[Finding]:
    for k, (logit, ball) in enumerate(zip(stated, exact, strict=False)):
        if logit is None:
            yield failed(f"logits: logit {k} is null, the exact network gives {decimal(ball)}")
        elif not abs(arb(logit) - ball) <= error:
            yield failed(
                f"logits: logit {k} is {logit!r}, the exact network gives {decimal(ball)} and rounding moves it by at "
                f"most {decimal(error)}"
            )


def _class(class_id: int, exact: Sequence[arb], error: arb) -> Iterator[Finding]:
    """Compare the class with the exact logits; a difference of up to `2 E` is decided by rounding."""
    rivals = [(logit, k) for k, logit in enumerate(exact) if k != class_id and not exact[class_id] > logit]
    if not rivals:
        return
    ahead = [(logit, k) for logit, k in rivals if logit - exact[class_id] > 2 * error]
    logit, rival = (ahead or rivals)[0]
    difference = decimal(logit - exact[class_id])
    if ahead:
        yield failed(f"class_id: {class_id}, the exact network gives class {rival} a logit larger by {difference}")
    else:
        yield undecided(
            f"class_id: {class_id}, the exact logit of class {rival} is not smaller (difference {difference}), and "
            f"rounding moves their difference by up to {decimal(2 * error)}"
        )


def _runner_up(answer: Answer, derived: Derived, runner_up: int) -> Iterator[Finding]:
    """Compare the runner-up with the class of the smallest radius by the audit's own bounds."""
    stated = answer.certificate.logit_error
    # Error terms of the answer and of the audit differ, and so do their logits.
    blur = 8 * derived.derivation.logit_error + 4 * arb(0.0 if stated is None else stated)
    own = derived.radius(answer.class_id, runner_up, blur)
    for j in range(len(derived.derivation.logits[0])):
        if j in (answer.class_id, runner_up):
            continue
        other = derived.radius(answer.class_id, j, -blur)
        if other is not None and (own is None or other * (1 + arb(_SAME_QUOTIENT)) < own):
            yield undecided(f"runner_up: class {runner_up}, by the audit's bounds class {j} decides the radius")
            return
    if runner_up in derived.references:
        yield from _radius_at_reference(answer, derived, runner_up)


def _radius_at_reference(answer: Answer, derived: Derived, runner_up: int) -> Iterator[Finding]:
    """Compare the radius with that of the answer's own terms at the reference image of the runner-up."""
    certificate, point = answer.certificate, derived.references[runner_up]
    if certificate.lipschitz_bound is None or certificate.logit_error is None:
        yield failed("radius: above 0, while lipschitz_bound or logit_error is null")
        return
    margin = point.logits[answer.class_id] - point.logits[runner_up] - 4 * arb(certificate.logit_error)
    # The service computed that margin, with rounding errors, and rounded the rest down.
    blur = 2 * derived.derivation.logit_error
    least, most = (point.radius(margin + sign * blur, arb(certificate.lipschitz_bound)) for sign in (-1, 1))
    radius = arb(certificate.radius)
    if (least is None or radius < least * (1 - _ROUNDING)) or (most is not None and radius > most):
        yield failed(
            f"radius: {certificate.radius!r}, and the reference image of class {runner_up}, lipschitz_bound and "
            f"logit_error of the answer give {'more' if most is None else decimal(most)}"
        )


def _waypoint(name: str, found: Waypoint, exact: Sequence[arb], derivation: Derivation) -> Iterator[Finding]:
    """A radius of 0 promises nothing, so that rounding may decide the class."""
    for finding in _held_class(name, found, exact, derivation.logit_error):
        if found.radius > 0.0 or finding.conclusion is Conclusion.DOES_NOT_HOLD:
            yield finding
    if not 0 <= found.class_id < len(exact):
        return
    rivals = [exact[found.class_id] - logit for k, logit in enumerate(exact) if k != found.class_id]
    error = 2 * derivation.logit_error
    if found.margin is None or not any(abs(arb(found.margin) - margin) <= error for margin in rivals):
        yield failed(f"{name}.margin: {as_json(found.margin)}, the exact network gives it to no other class")
    point, proved = Point(exact, Fraction(0)), None
    for j, bound in enumerate(derivation.margin_bounds[found.class_id]):
        if j != found.class_id:
            surplus = exact[found.class_id] - exact[j] - error
            proved = nearer(proved, point.radius(surplus, bound))
    if proved is not None and not arb(found.radius) <= proved:
        yield _unproved(f"{name}.radius", found.radius, repr(rounded_down(proved)))


def _held_class(name: str, found: ClassLabel, exact: Sequence[arb], error: arb) -> Iterator[Finding]:
    """The image gets its class when it is posted back if the exact margins are above `2 E`."""
    if not 0 <= found.class_id < len(exact):
        return
    margins = [exact[found.class_id] - logit for k, logit in enumerate(exact) if k != found.class_id]
    if any(margin < -2 * error for margin in margins):
        yield failed(f"{name}.class_id: {found.class_id}, the exact network gives its image another class")
    elif not all(margin > 2 * error for margin in margins):
        yield undecided(f"{name}.class_id: {found.class_id}, and rounding decides the class of its image")


def proved_radius(derived: Derived, class_id: int) -> arb | None:
    """Return the proved radius of a class, an exact number; absent where it contains every valid image.

    Two images of the box are at most its diagonal apart, the root of the number of pixels.

    Args:
        derived: the derivation of an answer's terms.
        class_id: class of the image that was sent.
    """
    taken = 2 * derived.derivation.logit_error
    found: arb | None = None
    for j in range(len(derived.derivation.logits[0])):
        if j != class_id:
            found = nearer(found, derived.radius(class_id, j, taken))
    return None if found is not None and found > root(arb(derived.pixels)) else found


def proof(answer: Answer, derived: Derived) -> str:
    """Return the report of an answer that holds, in one line.

    Args:
        answer: an answer without a finding.
        derived: the derivation of its terms.
    """
    certificate, derivation = answer.certificate, derived.derivation
    bound = derivation.margin_bounds[answer.class_id][certificate.runner_up.class_id]
    radius = proved_radius(derived, answer.class_id)
    proved = "every valid image" if radius is None else repr(rounded_down(radius))
    parts = [
        f'class {answer.class_id} ("{answer.label}"), radius {certificate.radius!r} proved (audit: {proved}; Lipschitz '
        f"bound {decimal(bound)}, answer {as_json(certificate.lipschitz_bound)}; logit error "
        f"{decimal(derivation.logit_error)}, answer {as_json(certificate.logit_error)})"
    ]
    if certificate.references:
        parts.append(f"{len(certificate.references)} reference images confirmed")
    found = answer.counterfactual
    if found is not None:
        parts.append(
            f'counterfactual class {found.class_id} ("{found.label}") at distance {found.distance!r} confirmed'
        )
    if derived.waypoints:
        parts.append(f"{len(derived.waypoints)} images of its path confirmed")
    if "card_digest" not in answer.model_fields_set:
        parts.append("its labels are those of the card that was named: answers of its version name none")
    if unknown := [*answer.unknown(), *derived.not_audited]:
        parts.append(f"not audited: {', '.join(unknown)}")
    return "; ".join(parts)


def rounded_down(value: arb) -> float:
    """Return a float64 that is not above an exact number."""
    found = float(value)
    return found if arb(found) <= value else math.nextafter(found, -math.inf)


def decimal(value: arb) -> str:
    """Return the centre of a ball with ten digits."""
    return f"{float(value):.10g}"
