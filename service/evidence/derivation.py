"""The derivation in the words of the record: nodes with theorem and source, claims about norms, statements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from service.artefact.card import Card
from service.certificate import Certificate, NodeReport
from service.certificate.norms import spectral_norm_bound
from service.certificate.rules.table import RULES
from service.evidence.intervals import clopper_pearson
from service.evidence.record import Node, NormCertificate, OperatingDomain, Statement
from service.network.operators import Constant, Operator

Proof = Literal["fast", "best"]

_PAGE = "docs/soundness.md, Lipschitz bounds"


def nodes(operators: Sequence[Operator], certificate: Certificate) -> list[Node]:
    """Return every node with its bounds, theorem and source.

    Args:
        operators: of the network that was proved, in the order of evaluation.
        certificate: of that network.
    """
    return [
        Node(
            node=report.node,
            operator=operator.kind,
            lipschitz_bound=report.lipschitz_bound,
            error=report.error,
            theorem=report.theorem,
            source=_source(operator.kind),
        )
        for operator, report in _reported(operators, certificate.nodes)
    ]


def norm_certificates(operators: Sequence[Operator]) -> list[NormCertificate]:
    """Return the claims about the weights of matrix products, in the order of evaluation."""
    claims: list[NormCertificate] = []
    for operator in operators:
        if operator.kind in ("Gemm", "MatMul"):
            for position, operand in enumerate(operator.operands[:2]):
                if isinstance(operand, Constant) and operand.array.ndim == 2:
                    weight = operand.array.astype(np.float64)
                    # In the layout of the certifier: another one would sum in another order, to another last digit.
                    turned = position == 0 or (operator.kind == "Gemm" and operator.integer("transB"))
                    bound = spectral_norm_bound(weight.T if turned else weight)
                    claims.append(NormCertificate(node=operator.label, norm_bound=bound))
    return claims


def operating_domain(card: Card) -> OperatingDomain:
    """Return the shares of the card with confidence intervals."""
    data = card.data
    n_test = _count((card.evaluation or {}).get("n")) or _count(data.get("n_test"))
    shares: list[tuple[float | None, Proof | None, float, int | None]] = []
    if card.accuracy is not None:
        n_certified = card.certified_accuracy[0].n if card.certified_accuracy else None
        shares.append((None, None, card.accuracy, n_test or n_certified))
    for one in card.certified_accuracy:
        shares.append((one.epsilon, "fast", one.value, one.n))
        if one.with_references is not None:
            shares.append((one.epsilon, "best", one.with_references, one.n))
    statements: list[Statement] = []
    missing: list[str] = []
    for epsilon, proof, share, n in shares:
        title = "accuracy" if epsilon is None else f"certified accuracy at {epsilon:g}"
        title += ", with reference images" if proof == "best" else ""
        if n is None or abs(round(share * n) / n - share) > 1e-9:
            missing.append(f"{title}: the card states {share!r} of {n} images, which is no count")
        else:
            statements.append(_statement(epsilon, proof, round(share * n), n))
    origin = ", ".join(str(data[name]) for name in ("name", "source") if data.get(name)) or "the card names no data set"
    return OperatingDomain(data=origin, confidence=0.95, statements=statements, without_interval=missing)


def _statement(epsilon: float | None, proof: Proof | None, successes: int, n: int) -> Statement:
    low, high = clopper_pearson(successes, n)
    event = "is classified right"
    if epsilon is not None:
        event += f", with a class that is proved for every image closer than {epsilon:.6g} in L2"
    if proof == "best":
        event += ", at reference images (`proof=best`),"
    return Statement(
        epsilon=epsilon,
        proof=proof,
        successes=successes,
        n=n,
        share=successes / n,
        low=low,
        high=high,
        statement=f"An image drawn like the {n} test images, independently of them, {event} with a probability between "
        f"{math.floor(low * 1e4) / 1e4:.4f} and {math.ceil(high * 1e4) / 1e4:.4f} (95 % confidence, Clopper-Pearson; "
        f"{successes} of {n}).",
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _reported(operators: Sequence[Operator], reports: Sequence[NodeReport]) -> Iterator[tuple[Operator, NodeReport]]:
    """Pair the reports with their operators: an operator whose result has no bound of its own has no report."""
    remaining = iter(operators)
    for report in reports:
        yield next(operator for operator in remaining if operator.label == report.node), report


def _source(kind: str) -> str:
    entry = RULES.get(kind)
    if entry is None:
        return f"{_PAGE}: {kind}"
    module = entry.apply.__module__.replace(".", "/")
    return f"{_PAGE}: {kind}; {module}.py, {entry.apply.__name__}"
