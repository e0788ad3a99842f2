"""Operators that the server may have a rule for and the audit has not, each with the reason."""

REFUSED: dict[str, str] = {
    "Resize": "its coordinates are computed in floating point, and the pixels that it picks depend on their rounding",
    "ThresholdedRelu": "it jumps at its threshold and has no Lipschitz constant",
}
"""Reason why an operator has no rule."""


def refusal(operator: str) -> str:
    """Return the reason why a node is not audited, in words of a verdict."""
    reason = REFUSED.get(operator)
    return "no rule for this operator" if reason is None else f"no rule for this operator: {reason}"
