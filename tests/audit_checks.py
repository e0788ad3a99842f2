"""Contradictions between a derivation of the audit and its graph, found as those of the certifier are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from audit_cases import derived, rational_pixels
from exact_graphs import BALLS, Program
from graph_checks import Bounds, error_findings, lipschitz_findings, runnable
from random_graphs import Graph, seeded_graph

from service.audit.balls import NotAuditableError
from service.audit.derivation import Derivation
from service.certificate import UnsupportedModelError
from service.network.reader import read
from service.network.writer import write


@dataclass(frozen=True)
class _Audited:
    """Bounds of the audit, as the checks of the certifier take them."""

    margin_bounds_KK: np.ndarray
    logit_error: float
    lipschitz_bound: float = 1e300
    """The audit states none of all logits together."""
    nodes: tuple[Any, ...] = ()


def bounds_of(derivation: Derivation) -> Bounds:
    """Return the bounds of a derivation as floats, rounded upwards."""
    bounds_KK = np.array([[_above(one) for one in row] for row in derivation.margin_bounds])
    audited = _Audited(bounds_KK, _above(derivation.logit_error))
    return Bounds((cast("Any", audited),))


def _above(value: Any) -> float:
    return float(np.nextafter(float(value), np.inf)) if value > 0 else 0.0


def as_written(graph: Graph) -> Graph | None:
    """Return the graph that would be served; null where the network has no reading."""
    try:
        return replace(graph, model=write(read(graph.model)))
    except UnsupportedModelError:
        return None


def contradictions(seed: int, steps: tuple[str, ...], most: int = 6) -> list[str] | None:
    """Return contradictions of the graph of a seed; null where the audit refuses it.

    Args:
        seed: of `seeded_graph`.
        steps: of `random_graphs`.
        most: number of steps.
    """
    graph = as_written(runnable(seeded_graph(seed, steps, most)))
    if graph is None:
        return None
    pixels = np.random.default_rng(seed).integers(0, 256, graph.shape)
    try:
        derivation = derived(graph.model, pixels)
    except NotAuditableError:
        return None
    bounds = bounds_of(derivation)
    exact = Program.parse(graph.model).evaluate(rational_pixels(pixels)[None], BALLS)["logits"][0]
    wrong = [
        f"logit {k}: {ball} and {value}"
        for k, (ball, value) in enumerate(zip(derivation.logits[0], exact, strict=False))
        if not ball.overlaps(value)
    ]
    return [*wrong, *lipschitz_findings(graph, bounds, seed), *error_findings(graph, bounds, seed)]
