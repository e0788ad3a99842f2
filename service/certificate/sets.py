"""Certified sets: the classes that hold the truth with a stated probability, even if an image is changed below epsilon.

**Theorem.** Let f be the exact network, E its logit error, `t_k(x) = min over j != k of (f_k - f_j - 2 E)(x) / K_kj`, y
the true class of x, and q at most the m-th smallest of `t_y` over n calibration images, `1 <= m <= (n + 1) (1 - c)`. If
these images and x are exchangeable, then with probability c at least every image x' with `||x' - x|| <= epsilon` has
`t_y(x') + epsilon >= q`.

*Proof.* If `t_y(x) < q`, then fewer than m calibration scores are at most `t_y(x)`. Of n + 1 scores, at most m can have
fewer than m others that are at most as large, so by exchangeability this has a probability of at most `m / (n + 1)`,
and that is at most `1 - c`. Otherwise `t_y(x') >= t_y(x) - epsilon >= q - epsilon`: each quotient is 1-Lipschitz, and
so is their minimum.

In floating point a calibration score is `(f_k - f_j - 4 E) / K_kj` of computed logits, rounded down, which is at most
t_k; a class stays by `(f_k - f_j) / K_kj` of computed logits, rounded up, which is at least t_k. Exact scores alone are
exchanged, so the theorem holds in whatever batches either was computed.

Split conformal prediction: Vovk, Gammerman, Shafer, *Algorithmic Learning in a Random World*, 2005. Sets that hold for
changed images by a Lipschitz bound, with other scores: Massena et al., *Efficient Robust Conformal Prediction via
Lipschitz-Bounded Networks*, 2025. Bounds of a share: Clopper, Pearson, Biometrika 26, 1934.

Axes: N images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from service.certificate.margins import Margins
from service.certificate.radius import pair_radii
from service.certificate.rounding import SMALLEST_NORMAL, up
from service.shapes import Bool, Float64

_LARGEST = float(np.finfo(np.float64).max)
_BISECTIONS = 60
# The tail is a sum of at most n terms, each of some ten roundings and a sum of n logarithms.
_TAIL_ERROR = 1e-9


def lower_scores(
    logits_NK: Float64[np.ndarray, "N K"], margin_bounds_KK: Margins, logit_error: float
) -> Float64[np.ndarray, "N K"]:
    """Return `min over j != k of (f_k - f_j - 4 E) / K_kj`, rounded down: at most t_k, for calibration.

    Args:
        logits_NK: as computed; an image whose logits are not finite has the lowest score.
        margin_bounds_KK: `K_kj`.
        logit_error: E.
    """
    finite_N = np.all(np.isfinite(logits_NK), axis=1)
    safe_NK = np.where(finite_N[:, None], logits_NK, 0.0)
    scores_NK = np.empty_like(safe_NK)
    for k in range(safe_NK.shape[1]):
        class_id_N = np.full(len(safe_NK), k)
        scores_NK[:, k] = pair_radii(safe_NK, class_id_N, margin_bounds_KK[class_id_N], logit_error).min(axis=1)
    return np.where(finite_N[:, None], np.maximum(scores_NK, -_LARGEST), -_LARGEST)


def upper_scores(
    logits_NK: Float64[np.ndarray, "N K"], margin_bounds_KK: Margins, excess: float = 0.0
) -> Float64[np.ndarray, "N K"]:
    """Return `min over j != k of (f_k - f_j + excess) / K_kj`, rounded up: at least t_k, for an answer.

    Args:
        logits_NK: as computed; infinite scores where they are not finite.
        margin_bounds_KK: `K_kj`.
        excess: `2 (E' - E)`, where the error of these logits is E' and that of calibration E.
    """
    n_images, n_classes = logits_NK.shape
    finite_N = np.all(np.isfinite(logits_NK), axis=1)
    safe_NK = np.where(finite_N[:, None], logits_NK, 0.0)
    scores_NK = np.full((n_images, n_classes), np.inf)
    for k in range(n_classes):
        with np.errstate(over="ignore"):
            margin_NK = np.nextafter(safe_NK[:, k : k + 1] - safe_NK, np.inf)
            if excess:
                margin_NK = np.nextafter(margin_NK + excess, np.inf)
        bound_K = margin_bounds_KK[np.array([k])][0]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # K_kj = 0 means that the margin never changes: it excludes a class at any distance, or at none.
            quotient_NK = np.where(
                bound_K > 0.0, np.nextafter(margin_NK / bound_K, np.inf), np.where(margin_NK > 0.0, np.inf, -np.inf)
            )
        quotient_NK[:, k] = np.inf
        scores_NK[:, k] = quotient_NK.min(axis=1)
    return np.where(finite_N[:, None], scores_NK, np.inf)


def certified_set(
    logits_NK: Float64[np.ndarray, "N K"],
    quantile: float,
    reach: float,
    margin_bounds_KK: Margins,
    excess: float = 0.0,
) -> Bool[np.ndarray, "N K"]:
    """Return which classes are in the set of each image: `t_k + epsilon >= q` may hold, or the logit is the largest.

    Args:
        logits_NK: as computed.
        quantile: q.
        reach: epsilon as the input of the model sees it, at least that; not negative.
        margin_bounds_KK: `K_kj` about the input of the model.
        excess: of `upper_scores`.
    """
    stays_NK = np.nextafter(upper_scores(logits_NK, margin_bounds_KK, excess) + reach, np.inf) >= quantile
    # A logit that is not finite leaves all classes in.
    safe_NK = np.where(np.isfinite(logits_NK), logits_NK, 0.0)
    stays_NK[np.arange(len(logits_NK)), np.argmax(safe_NK, axis=1)] = True
    return stays_NK


def order_statistic(n: int, coverage: float) -> int:
    """Return m: a conformal quantile is the m-th smallest of n scores; 0 where n is too small for this coverage.

    Args:
        n: number of calibration scores.
        coverage: c, as the decimal number that is written.
    """
    return math.floor((n + 1) * (1 - Fraction(repr(coverage))))


def conformal_quantile(scores_N: Float64[np.ndarray, " N"], coverage: float) -> float:
    """Return the conformal quantile of calibration scores: the `floor((n + 1) (1 - c))`-th smallest.

    Args:
        scores_N: of the true classes.
        coverage: c, above 0 and below 1.

    Raises:
        ValueError: there are too few scores for this coverage.
    """
    m = order_statistic(len(scores_N), coverage)
    if not 1 <= m <= len(scores_N):
        raise ValueError(f"a coverage of {coverage} is not available from {len(scores_N)} calibration images")
    return float(np.partition(scores_N, m - 1)[m - 1])


def share_bound(errors: int, n: int, significance: float) -> float:
    """Return the upper Clopper-Pearson bound of a share: `P(X <= errors) <= significance` at it; X is binomial.

    Args:
        errors: that were counted.
        n: draws, 0 or more.
        significance: probability that the bound is too small, at most.

    Raises:
        ValueError: `errors` is not a number of 0 to n.
    """
    if not 0 <= errors <= n:
        raise ValueError(f"{errors} errors in {n} draws")
    if errors == n:
        return 1.0
    steps = np.arange(1, errors + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((n - steps + 1) / steps))])
    counts = np.arange(errors + 1)

    def tail(p: float) -> float:
        return float(np.exp(log_choose + counts * math.log(p) + (n - counts) * math.log1p(-p)).sum())

    low, high = errors / n, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (
            (low, middle) if middle > 0.0 and tail(middle) * (1.0 + _TAIL_ERROR) <= significance else (middle, high)
        )
    return min(1.0, up(high))


def acceptance_thresholds(radius_N: Float64[np.ndarray, " N"], shares: Sequence[Fraction]) -> list[float]:
    """Return radii from which images are accepted: of n calibration images the stated shares, at most.

    A threshold is the radius next above an order statistic at a fixed rank, so that, given its value, the accepted
    images are independent draws from those it accepts. The share 1 gives 0, which accepts every image.

    Args:
        radius_N: certified radii of the predicted classes, not negative.
        shares: above 0, at most 1.
    """
    falling_N = np.sort(radius_N)[::-1]
    ranks = [math.floor(share * len(falling_N)) for share in shares]
    return [up(float(falling_N[rank])) if rank < len(falling_N) else 0.0 for rank in ranks]


def scaled_up(epsilon: float, norm: float) -> float:
    """Return `epsilon * norm`, rounded up.

    Args:
        epsilon: L2, not negative.
        norm: of the map from the image that was sent to the input of the model.
    """
    if norm == 1.0 or epsilon == 0.0:
        return epsilon
    return up(up(epsilon * norm) + SMALLEST_NORMAL)
