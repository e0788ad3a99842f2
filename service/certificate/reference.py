"""The radius proved at a reference image: another image of the box, from which the box itself blocks the way back.

**Theorem.** Let x and z be images of the box [0, 1]^d, `s = z - x`, and

    c(s) = ||s||^2 + 2 sum_p max(s_p, 0) x_p + 2 sum_p max(-s_p, 0) (1 - x_p).

Every image x' of the box with `||x' - x|| <= rho` has `||x' - z||^2 <= rho^2 + c(s)`. So if q is proved at z to be a
radius of the margin `f_i - f_j` (see `pair_radii`), then that margin is positive, exactly and as computed, at every
image of the box within rho of x, for every rho with `rho^2 + c(s) < q^2`.

*Proof.* `||x' - z||^2 = ||x' - x||^2 - 2 s . (x' - x) + ||s||^2`. Where `s_p > 0`, `-s_p (x'_p - x_p) <= s_p x_p`,
since `x'_p >= 0`; where `s_p < 0`, `-s_p (x'_p - x_p) <= |s_p| (1 - x_p)`, since `x'_p <= 1`. So x' is nearer to z
than q.

Each pair of classes may have a reference image of its own, and the largest radius of several counts; `z = x` gives
`c = 0`, the radius without a reference image.

Axes: N images, K classes, C H W image as sent.
"""

from __future__ import annotations

import numpy as np

from service.certificate.radius import pair_radii
from service.certificate.rounding import SMALLEST_NORMAL, gamma_up
from service.shapes import Float64, Int64


def reference_cost(
    image_NCHW: Float64[np.ndarray, "N C H W"], reference_NCHW: Float64[np.ndarray, "N C H W"]
) -> Float64[np.ndarray, " N"]:
    """Return `c(z - x)`, rounded up.

    A pixel contributes `(z - x) (z + x)` where `z > x`, and `(x - z) ((1 - z) + (1 - x))` where `z < x`: products of
    numbers that are not negative, so that roundings are relative errors of the sum, in any order of summation.

    Args:
        image_NCHW: x, pixels in [0, 1].
        reference_NCHW: z, pixels in [0, 1].
    """
    rising = reference_NCHW > image_NCHW
    way = np.abs(reference_NCHW - image_NCHW)
    room = np.where(rising, reference_NCHW + image_NCHW, (1.0 - reference_NCHW) + (1.0 - image_NCHW))
    cost_N = np.einsum("nchw,nchw->n", way, room)
    n_pixels = image_NCHW[0].size if len(image_NCHW) else 0
    # Relative: the difference, the sum of two roundings, the product, the additions. Absolute: products that underflow.
    cost_N = np.nextafter(cost_N * (1.0 + gamma_up(n_pixels + 8)), np.inf)
    return np.where((way > 0.0).any(axis=(1, 2, 3)), np.nextafter(cost_N + n_pixels * SMALLEST_NORMAL, np.inf), 0.0)


def reference_radii(
    logits_NK: Float64[np.ndarray, "N K"],
    class_id_N: Int64[np.ndarray, " N"],
    cost_N: Float64[np.ndarray, " N"],
    bounds_NK: Float64[np.ndarray, "N K"],
    logit_error: float,
) -> Float64[np.ndarray, "N K"]:
    """Return `sqrt(q^2 - c)`, rounded down, for each pair of classes: a radius at x that is proved at z.

    Minus infinity where nothing is proved; infinite for j = i.

    Args:
        logits_NK: computed logits of the reference images z.
        class_id_N: i, the class of the images x that were sent, whatever the class of z.
        cost_N: of `reference_cost`.
        bounds_NK: `K_ij` of i and every class, about images of the shape that was sent.
        logit_error: `E`.
    """
    finite_N = np.all(np.isfinite(logits_NK), axis=1)
    at_reference_NK = pair_radii(np.where(finite_N[:, None], logits_NK, 0.0), class_id_N, bounds_NK, logit_error)
    # The square of the largest float is infinite, and rounded down it is the largest float.
    with np.errstate(over="ignore", invalid="ignore"):
        square_NK = np.nextafter(at_reference_NK * at_reference_NK, -np.inf)
        left_NK = np.nextafter(square_NK - cost_N[:, None], -np.inf)
        radius_NK = np.nextafter(np.sqrt(left_NK), -np.inf)
    radius_NK[~((at_reference_NK > 0.0) & (left_NK > 0.0))] = -np.inf
    radius_NK[~finite_N] = -np.inf
    radius_NK[np.arange(len(logits_NK)), class_id_N] = np.inf
    return radius_NK
