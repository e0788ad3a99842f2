"""Confidence intervals of a share: Clopper and Pearson, Biometrika 26, 1934."""

from __future__ import annotations

from flint import arb, ctx

_HALVINGS = 40
_DIGITS = 96


def clopper_pearson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, of which `n` draws had `successes`; its ends are rounded outwards.

    At the low end p, P(X >= successes) is at most 2.5 %, at the high one P(X <= successes); X is binomial. Both tails
    are regularised incomplete beta functions, enclosed by balls, so that an end is never inside the exact interval.

    Raises:
        ValueError: `successes` is not a number of 0 to `n`.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes in {n} draws")
    return _low(successes, n), 1.0 - _low(n - successes, n)


def _low(successes: int, n: int) -> float:
    """Return the largest p of the search with P(X >= successes) <= 2.5 %; a multiple of 2**-40, so `1 - p` is exact."""
    if successes == 0:
        return 0.0
    digits, ctx.prec = ctx.prec, _DIGITS
    try:
        low, high = 0, 2**_HALVINGS
        while high - low > 1:
            middle = (low + high) // 2
            tail = (arb(middle) / 2**_HALVINGS).beta_lower(successes, n - successes + 1, regularized=True)
            low, high = (middle, high) if tail <= arb(1) / 40 else (low, middle)
        return low / 2**_HALVINGS
    finally:
        ctx.prec = digits
