"""Checks of an answer against the numbers that are derived from the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from flint import arb

from service.audit.balls import root
from service.audit.derivation import Derivation
from service.audit.findings import Finding, as_json, failed, undecided
from service.audit.records import Answer, Counterfactual

# Relative difference of two quotients that are taken for equal when the runner-up is compared.
_SAME_QUOTIENT = 1e-6


def against_derivation(answer: Answer, derivation: Derivation, pixels: int) -> Iterator[Finding]:
    """Yield the members of an answer that the derivation contradicts or leaves open.

    Args:
        answer: the answer; members that contradict each other are reported elsewhere.
        derivation: of the model that answered; its first image is the one that was sent, its second the counterfactual.
        pixels: number of pixels of the image that was sent.
    """
    certificate, exact = answer.certificate, derivation.logits[0]
    yield from _logits(answer.logits, exact, derivation.logit_error)
    if certificate.logit_error is None or not arb(certificate.logit_error) >= derivation.logit_error:
        yield _unproved("logit_error", certificate.logit_error, decimal(derivation.logit_error))
    if not 0 <= answer.class_id < len(exact):
        return
    yield from _class(answer.class_id, exact, derivation.logit_error)
    if certificate.norm == "l2":
        proved = proved_radius(derivation, answer.class_id, pixels)
        if proved is not None and not arb(certificate.radius) <= proved:
            yield _unproved("radius", certificate.radius, repr(rounded_down(proved)))
    runner_up = certificate.runner_up.class_id
    if 0 <= runner_up < len(exact) and runner_up != answer.class_id:
        bound = derivation.margin_bounds[answer.class_id][runner_up]
        if certificate.lipschitz_bound is None or not arb(certificate.lipschitz_bound) >= bound:
            yield _unproved("lipschitz_bound", certificate.lipschitz_bound, decimal(bound))
        yield from _runner_up(answer, derivation, runner_up)
    if answer.counterfactual is not None and len(derivation.logits) > 1:
        yield from _counterfactual(answer.counterfactual, derivation.logits[1], derivation.logit_error)


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


def _runner_up(answer: Answer, derivation: Derivation, runner_up: int) -> Iterator[Finding]:
    """Compare the runner-up with the class of the smallest `(f_i - f_j - 4 E) / K_ij` by the audit's own bounds."""
    exact, bounds = derivation.logits[0], derivation.margin_bounds[answer.class_id]
    stated = answer.certificate.logit_error
    # Error terms of the answer and of the audit differ, and so do their logits.
    blur = 8 * derivation.logit_error + 4 * arb(0.0 if stated is None else stated)

    def quotient(j: int, blur: arb) -> arb:
        surplus = exact[answer.class_id] - exact[j] + blur
        return surplus / bounds[j] if bounds[j] > 0 else surplus * arb("inf")

    own = quotient(runner_up, -blur)
    for j in range(len(exact)):
        if j in (answer.class_id, runner_up):
            continue
        other = quotient(j, blur)
        if other + abs(other) * _SAME_QUOTIENT < own:
            yield undecided(f"runner_up: class {runner_up}, by the audit's bounds class {j} decides the radius")
            return


def _counterfactual(found: Counterfactual, exact: Sequence[arb], error: arb) -> Iterator[Finding]:
    """The image gets its class when it is posted back if the exact margins are above `2 E`."""
    if not 0 <= found.class_id < len(exact):
        return
    margins = [exact[found.class_id] - logit for k, logit in enumerate(exact) if k != found.class_id]
    if any(margin < -2 * error for margin in margins):
        yield failed(f"counterfactual.class_id: {found.class_id}, the exact network gives its image another class")
    elif not all(margin > 2 * error for margin in margins):
        yield undecided(f"counterfactual.class_id: {found.class_id}, and rounding decides the class of its image")


def proved_radius(derivation: Derivation, class_id: int, pixels: int) -> arb | None:
    """Return the proved radius of a class, an exact number; absent where it contains every valid image.

    Two images of the box are at most its diagonal apart, the root of the number of pixels.

    Args:
        derivation: its first image is the one that was sent.
        class_id: class of that image.
        pixels: number of its pixels.
    """
    logits, error = derivation.logits[0], derivation.logit_error
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


def proof(answer: Answer, derivation: Derivation, pixels: int) -> str:
    """Return the report of an answer that holds, in one line.

    Args:
        answer: an answer without a finding.
        derivation: of the model that answered.
        pixels: number of pixels of the image that was sent.
    """
    certificate = answer.certificate
    bound = derivation.margin_bounds[answer.class_id][certificate.runner_up.class_id]
    radius = proved_radius(derivation, answer.class_id, pixels)
    proved = "every valid image" if radius is None else repr(rounded_down(radius))
    parts = [
        f'class {answer.class_id} ("{answer.label}"), radius {certificate.radius!r} proved (audit: {proved}; Lipschitz '
        f"bound {decimal(bound)}, answer {as_json(certificate.lipschitz_bound)}; logit error "
        f"{decimal(derivation.logit_error)}, answer {as_json(certificate.logit_error)})"
    ]
    found = answer.counterfactual
    if found is not None:
        parts.append(
            f'counterfactual class {found.class_id} ("{found.label}") at distance {found.distance!r} confirmed'
        )
    if unknown := list(answer.unknown()):
        parts.append(f"not audited: {', '.join(unknown)}")
    return "; ".join(parts)


def rounded_down(value: arb) -> float:
    """Return a float64 that is not above an exact number."""
    found = float(value)
    return found if arb(found) <= value else math.nextafter(found, -math.inf)


def decimal(value: arb) -> str:
    """Return the centre of a ball with ten digits."""
    return f"{float(value):.10g}"
