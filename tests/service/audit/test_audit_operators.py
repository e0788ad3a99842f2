"""Every operator that the server certifies has a rule of the audit, or a stated reason in the verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from audit_cases import derived, rational
from random_graphs import GraphBuilder

from service.audit.balls import NotAuditableError
from service.audit.moves import MOVES
from service.audit.operators import RULES
from service.audit.operators.refused import REFUSED
from service.certificate.rules.table import RULES as SERVER

READ = {*RULES, *MOVES, "Shape"}


def test_the_operators_of_the_server_are_read_or_refused_with_a_reason() -> None:
    assert SERVER.keys() - READ == REFUSED.keys()
    assert not READ & REFUSED.keys()


INPUTS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Resize": ([None, np.array([1.0, 1.0, 2.0], np.float32)], {}),
}
"""Operands besides the image, and attributes, of operators that need some."""


@pytest.mark.parametrize("operator", REFUSED)
def test_the_verdict_states_the_reason_of_a_refused_operator(operator: str) -> None:
    b = GraphBuilder(np.random.default_rng(0))
    operands, attributes = INPUTS.get(operator, ([], {}))
    names = ["" if value is None else b.constant(value) for value in operands]
    x = b.one(operator, "image", *names, **attributes)
    b.nodes[-1].name = "culprit"
    with pytest.raises(NotAuditableError) as caught:
        derived(b.model((2, 6), b.one("Flatten", x, axis=1), 12), np.arange(12).reshape(2, 6))
    assert caught.value.reasons == (f"{operator} 'culprit': no rule for this operator: {REFUSED[operator]}",)


def logits(operator: str, *operands: Any, **attributes: Any) -> list[float]:
    """The exact result of an operator on the images (51, 102) and (204, 153), in one tensor."""
    b = GraphBuilder(np.random.default_rng(0))
    names = [value if isinstance(value, str) else b.constant(value) for value in operands]
    x = b.one("Flatten", b.one(operator, *names, **attributes), axis=1)
    return [float(rational(ball.mid())) for ball in derived(b.model((2, 2), x, 1), PIXELS).logits[0]]


PIXELS = np.array([[51, 102], [204, 153]])


@pytest.mark.parametrize(
    ("operator", "operands", "expected"),
    [
        ("Tile", ["image", np.array([1, 1, 2])], [0.2, 0.4, 0.2, 0.4, 0.8, 0.6, 0.8, 0.6]),
        ("Expand", ["image", np.array([1, 2, 2])], [0.2, 0.4, 0.8, 0.6]),
        ("Sum", ["image", "image"], [0.4, 0.8, 1.6, 1.2]),
        ("Sum", ["image", np.array([[[0.5, -1.0]]])], [0.7, -0.6, 1.3, -0.4]),
        ("Mean", ["image", np.array([[[1.0, 0.0]]])], [0.6, 0.2, 0.9, 0.3]),
        ("Mean", ["image"], [0.2, 0.4, 0.8, 0.6]),
        ("Sum", ["image", "image", "image"], [0.6, 1.2, 2.4, 1.8]),
        ("Mean", ["image", "image", "image"], [0.2, 0.4, 0.8, 0.6]),
        ("Max", ["image", "image", "image"], [0.2, 0.4, 0.8, 0.6]),
        ("Pow", ["image", np.array(2.0)], [0.04, 0.16, 0.64, 0.36]),
        ("ReduceSumSquare", ["image", np.array([2])], [0.2, 1.0]),
        ("Mul", ["image", "image"], [0.04, 0.16, 0.64, 0.36]),
        ("PRelu", ["image", np.array([[0.5], [2.0]])], [0.2, 0.4, 0.8, 0.6]),
        ("Where", [np.array([[[True, False]]]), "image", "image"], [0.2, 0.4, 0.8, 0.6]),
    ],
)
def test_operators_compute_as_the_specification_says(operator: str, operands: list[Any], expected: list[float]) -> None:
    assert logits(operator, *operands) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("operator", "operands", "reason"),
    [
        ("Tile", ["image", np.array([2, 1, 1])], "it mixes the images of a batch"),
        ("Tile", ["image", np.array([1, 0, 1])], "repeats [1, 0, 1] of 3 axes"),
        ("Expand", ["image", np.array([2, 1, 1, 1])], "it mixes the images of a batch"),
        ("Sum", ["image", "image", np.ones((1, 2, 2))], "operand 2 must depend on the image"),
        ("Sqrt", ["image"], "the root of a number that is no sum of squares has no Lipschitz constant"),
        ("Sign", ["image"], "it jumps and has no Lipschitz constant"),
        ("Pow", ["image", np.array(3.0)], "a power of 3.0: 1, 2, and 1/2 of a sum of squares are read here"),
        ("Pow", ["image", np.array(0.5)], "the root of a number that is no sum of squares"),
        ("Where", [np.array([[[True]], [[False]]]), "image", "image"], "a mask with its own batch axis"),
        ("Where", [np.array(True), "image", np.zeros((1, 2, 2))], "operand 2 must depend on the image"),
    ],
)
def test_operands_that_are_not_read_have_a_reason(operator: str, operands: list[Any], reason: str) -> None:
    with pytest.raises(NotAuditableError) as caught:
        logits(operator, *operands)
    assert reason in str(caught.value)


def test_slopes_of_both_signs_are_bounded_together() -> None:
    b = GraphBuilder(np.random.default_rng(0))
    shifted = b.one("Sub", "image", b.constant(np.array([[[0.5, 0.5], [0.5, 0.5]]])))
    x = b.one("Flatten", b.one("PRelu", shifted, b.constant(np.array([[-3.0], [0.25]]))), axis=1)
    derivation = derived(b.model((2, 2), x, 4), PIXELS)
    assert [float(ball) for ball in derivation.logits[0]] == pytest.approx([0.9, 0.3, 0.3, 0.1], abs=1e-15)
    assert float(derivation.margin_bounds[0][1]) == pytest.approx(3 * 2**0.5)
