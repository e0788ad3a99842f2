"""The one formula for the certified radius.

Axes: N batch, K classes.
"""

from dataclasses import dataclass

import numpy as np

from service.certificate.margins import Margins, are_bounds
from service.shapes import Bool, Float64, Int64


@dataclass(frozen=True)
class Radii:
    """Classes and certified radii of a batch of images."""

    class_id_N: Int64[np.ndarray, " N"]
    """The predicted class: the largest logit, the first of equals."""
    radius_N: Float64[np.ndarray, " N"]
    """L2, in [0, 1] pixel units, rounded down; 0 where nothing is certified."""
    certified_N: Bool[np.ndarray, " N"]
    """Whether the radius is positive."""
    runner_up_N: Int64[np.ndarray, " N"]
    """The class that decides the radius: the smallest `(f_i - f_j - 4 E) / K_ij`."""
    lipschitz_bound_N: Float64[np.ndarray, " N"]
    """`K_ij` of the predicted class and the runner-up."""


def two_class_logits(logits_N1: Float64[np.ndarray, "N 1"]) -> Float64[np.ndarray, "N 2"]:
    """Return the logits `(f, -f)` of a binary model with the single output `f`: class 0 is `f > 0`. Exact."""
    return np.concatenate([logits_N1, -logits_N1], axis=1)


def certified_radius(
    logits_NK: Float64[np.ndarray, "N K"],
    margin_bounds_KK: Margins,
    logit_error: float,
) -> Radii:
    """Return `min over j != i of (f_i - f_j - 4 E) / K_ij`, rounded down, never below 0.

    Theorem. Let `K_ij` bound the L2 Lipschitz constant of the exact `f_i - f_j`, and `E` bound
    `|computed logit - exact logit|` for every valid image. If the computed logits at `x` give class `i` and
    `||x' - x||_2 < radius`, then the exact and every computed margin `f_i - f_j` at `x'` are positive.
    Proof. Computed margin at x' >= exact margin at x' - 2E >= exact margin at x - 2E - K_ij ||x' - x||
    >= computed margin at x - 4E - K_ij ||x' - x|| > 0.

    A tie, a logit that is not finite, or a margin of at most `4 E` gives radius 0 and `certified` false. The
    subtractions and the division are each rounded down.

    Args:
        logits_NK: computed logits; K >= 2 (see `two_class_logits`).
        margin_bounds_KK: `K_ij`, upper bounds, finite and non-negative; the diagonal is not read.
        logit_error: `E`, finite and non-negative.

    Raises:
        ValueError: shapes do not match, K < 2, or a bound is negative or not finite.
    """
    n_images, n_classes = logits_NK.shape
    if n_classes < 2:
        raise ValueError("certified_radius needs two classes or more; use two_class_logits for a single output")
    if margin_bounds_KK.shape != (n_classes, n_classes):
        raise ValueError(f"margin_bounds has shape {margin_bounds_KK.shape}, expected {(n_classes, n_classes)}")
    if not are_bounds(margin_bounds_KK):
        raise ValueError("margin_bounds must be finite and non-negative")
    if not (np.isfinite(logit_error) and logit_error >= 0):
        raise ValueError(f"logit_error must be finite and non-negative, got {logit_error}")

    row_N = np.arange(n_images)
    finite_N = np.all(np.isfinite(logits_NK), axis=1)
    safe_NK = np.where(finite_N[:, None], logits_NK, 0.0)
    class_id_N = np.argmax(safe_NK, axis=1)
    bounds_NK = margin_bounds_KK[class_id_N]
    radius_NK = pair_radii(safe_NK, class_id_N, bounds_NK, logit_error)
    runner_up_N = np.argmin(radius_NK, axis=1)
    radius_N = np.where(finite_N, np.maximum(radius_NK[row_N, runner_up_N], 0.0), 0.0)
    return Radii(
        class_id_N=class_id_N.astype(np.int64),
        radius_N=radius_N,
        certified_N=radius_N > 0.0,
        runner_up_N=runner_up_N.astype(np.int64),
        lipschitz_bound_N=bounds_NK[row_N, runner_up_N],
    )


def pair_radii(
    logits_NK: Float64[np.ndarray, "N K"],
    class_id_N: Int64[np.ndarray, " N"],
    bounds_NK: Float64[np.ndarray, "N K"],
    logit_error: float,
) -> Float64[np.ndarray, "N K"]:
    """Return `(f_i - f_j - 4 E) / K_ij` of the class i of each image and every class j, rounded down.

    Negative where nothing is proved; infinite for j = i.

    Args:
        logits_NK: computed logits, finite.
        class_id_N: i.
        bounds_NK: `K_ij` of i and every class.
        logit_error: `E`, as in `certified_radius`.
    """
    row_N = np.arange(len(logits_NK))
    with np.errstate(over="ignore"):
        margin_NK = np.nextafter(logits_NK[row_N, class_id_N][:, None] - logits_NK, -np.inf)
    surplus_NK = np.nextafter(margin_NK - 4.0 * logit_error, -np.inf)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # K_ij = 0 means that the margin never changes: positive stays positive at any distance.
        radius_NK = np.where(
            bounds_NK > 0.0,
            np.nextafter(surplus_NK / bounds_NK, -np.inf),
            np.where(surplus_NK > 0.0, np.finfo(np.float64).max, -np.inf),
        )
    radius_NK[row_N, class_id_N] = np.inf
    return radius_NK
