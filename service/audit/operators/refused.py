"""Operators that the server may have a rule for and the audit has not, each with the reason."""

_KERNEL = "the error of its kernel is an assumption of the server, which the audit does not make"
_JUMPS = "it jumps and has no Lipschitz constant"
_SQUARES = "squares and roots have a Lipschitz constant together only; ReduceL2 is read here"

REFUSED: dict[str, str] = {
    "Celu": _KERNEL,
    "Elu": _KERNEL,
    "Erf": _KERNEL,
    "HardSigmoid": _KERNEL,
    "HardSwish": _KERNEL,
    "LogSoftmax": _KERNEL,
    "LpPool": _SQUARES,
    "Pow": _SQUARES,
    "ReduceSumSquare": _SQUARES,
    "Resize": "its coordinates are computed in floating point",
    "Selu": _KERNEL,
    "Sigmoid": _KERNEL,
    "Sign": _JUMPS,
    "Softmax": _KERNEL,
    "Softplus": _KERNEL,
    "Softsign": _KERNEL,
    "Sqrt": _SQUARES,
    "Tanh": _KERNEL,
    "ThresholdedRelu": _JUMPS,
}
"""Reason why an operator has no rule."""


def refusal(operator: str) -> str:
    """Return the reason why a node is not audited, in words of a verdict."""
    reason = REFUSED.get(operator)
    return "no rule for this operator" if reason is None else f"no rule for this operator: {reason}"
