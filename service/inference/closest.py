"""Closest images: exact L2 distances, the projection of an image onto a cut within the box of pixels, and mixtures.

Axes: N or M images, L those that still change, C channels, H and W, D = C H W. Pixels are in units of 1 / 255 where
nothing else is said.
"""

from __future__ import annotations

import numpy as np

from service.shapes import Float64, UInt8

LEVELS = 255.0
# Largest share of the old cut in a mixture: no mixture forgets its newest cut.
_MOST_OLD = 0.95
_NEWTON_STEPS = 12
_NEWTON_ERROR = 1e-3
# Relative steps of lambda: rounding moves the solution by little, except where most moves are below half a level.
_GROWTHS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12, 0.25, 0.5, *(1.0,) * 30)
_BISECTIONS = 6
# Relative width of the bracket of lambda that needs no bisection.
_NARROW = 5e-3
# Aim of a distance that rounding may change, and the least distance that is good enough, as shares of the reach.
_AIM_WITHIN = 0.998
_LEAST_WITHIN = 0.98
_FINE_BISECTIONS = 14
# Largest multiplier. Its product with a gradient entry, and sums of such products over pixels, are finite.
_MOST = 1e150
# Largest entry of a gradient: sums of its squares are finite.
_LARGEST = 1e100


def l2_distance(
    image_NCHW: Float64[np.ndarray, "N C H W"], pixels_NCHW: UInt8[np.ndarray, "N C H W"]
) -> Float64[np.ndarray, " N"]:
    """Return the L2 distances between images in [0, 1] and 8-bit images divided by 255.

    For an image in [0, 1] that is 8-bit too (each pixel is the float64 of some v / 255) the sum of squares is an
    integer below 2^53, exact in any order. Otherwise it is summed in extended precision (64-bit significand or longer
    on x86 and ARM Linux). Either way the result is off by the last rounding to float64 only, so that rounding alone
    never finds a distance below a radius.
    """
    image_ND, pixels_ND = image_NCHW.reshape(len(image_NCHW), -1), pixels_NCHW.reshape(len(pixels_NCHW), -1)
    level_ND = np.rint(image_ND * LEVELS)
    eight_bit_N = (level_ND / LEVELS == image_ND).all(axis=1)
    level_ND -= pixels_ND
    squares_N = rows_dot(level_ND, level_ND).astype(np.longdouble)
    for n in np.flatnonzero(~eight_bit_N):
        real_D = image_ND[n].astype(np.longdouble) * np.longdouble(LEVELS) - pixels_ND[n]
        squares_N[n] = np.sum(real_D * real_D)
    return (np.sqrt(squares_N) / np.longdouble(LEVELS)).astype(np.float64)


def closest_levels(
    anchor_MD: Float64[np.ndarray, "M D"], gradient_MD: Float64[np.ndarray, "M D"], fall_M: Float64[np.ndarray, " M"]
) -> Float64[np.ndarray, "M D"]:
    """Return the 8-bit image closest to `anchor` where a linear function has fallen by `fall`.

    `round(clip(anchor - lambda g))` minimises the Lagrangian `||q - anchor||^2 + 2 lambda <g, q>` over the grid, pixel
    by pixel, and the function never rises with lambda: so the smallest sufficient lambda is found without rounding,
    and raised where rounding lost too much. Where no lambda suffices the result is the corner of the box that is
    farthest downhill.

    Args:
        anchor_MD: pixels in units of 1 / 255.
        gradient_MD: of the linear function.
        fall_M: how far it falls; at least 0.
    """
    return closest_levels_in_doubles(anchor_MD, gradient_MD, fall_M, np.zeros_like(fall_M))


def closest_levels_in_doubles(
    anchor_MD: np.ndarray, gradient_MD: np.ndarray, fall_M: np.ndarray, lambda_M: np.ndarray
) -> np.ndarray:
    """Return `closest_levels`, found from a guess of lambda.

    Args:
        anchor_MD: see `closest_levels`.
        gradient_MD: likewise.
        fall_M: likewise.
        lambda_M: the guess; at least 0.
    """
    # A little more, so that rounding seldom leaves too little.
    more_M = fall_M + _NEWTON_ERROR * np.abs(fall_M)
    lambda_M, corner_M = multiplier(anchor_MD, gradient_MD, more_M, lambda_M, _NEWTON_ERROR)
    level_MD = moved(anchor_MD, gradient_MD, lambda_M)
    np.rint(level_MD, out=level_MD)
    short_M = ~corner_M & (_fall(anchor_MD, gradient_MD, level_MD) < fall_M)
    if short_M.any():
        level_MD[short_M] = _raised(anchor_MD[short_M], gradient_MD[short_M], fall_M[short_M], lambda_M[short_M])
    return level_MD


def lowest_levels(
    start_MD: Float64[np.ndarray, "M D"], slope_MD: Float64[np.ndarray, "M D"], reach_M: Float64[np.ndarray, " M"]
) -> Float64[np.ndarray, "M D"]:
    """Return the 8-bit image within `reach` of `start` where a linear function is lowest, up to rounding.

    It is `round(clip(start - lambda g))`. Without rounding, lambda follows from the pixels that are at their bound:
    starting from none, each step finds those of the next, and the distance never exceeds the reach.

    Args:
        start_MD: pixels in units of 1 / 255.
        slope_MD: gradient of the function.
        reach_M: L2 distance in the same units. Where `start` is not 8-bit, no image may be that near: the result is
            then farther.
    """
    pull_MD = np.abs(slope_MD)
    room_MD = np.where(slope_MD > 0.0, start_MD, LEVELS - start_MD)
    aim_M = _AIM_WITHIN * reach_M
    lambda_M = np.zeros(len(reach_M))
    stuck_M = np.zeros(len(reach_M), np.bool_)
    for _ in range(_NEWTON_STEPS):
        full_MD = pull_MD * lambda_M[:, None] >= room_MD
        left_M = aim_M**2 - np.einsum("md,md,md->m", room_MD, room_MD, full_MD)
        free_M = np.einsum("md,md,md->m", pull_MD, pull_MD, ~full_MD)
        stuck_M = ~(free_M > 0.0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            next_M = np.where(stuck_M, lambda_M, np.minimum(np.sqrt(np.maximum(left_M, 0.0) / free_M), _MOST))
        if (next_M <= lambda_M * (1.0 + _NEWTON_ERROR)).all():
            break
        lambda_M = np.maximum(lambda_M, next_M)
    level_MD = np.rint(moved(start_MD, slope_MD, lambda_M))
    distance_M = _distance(level_MD, start_MD)
    wrong_M = (distance_M > reach_M) | ((distance_M < _LEAST_WITHIN * reach_M) & ~stuck_M)
    if wrong_M.any():
        level_MD[wrong_M] = _bisected(start_MD[wrong_M], slope_MD[wrong_M], reach_M[wrong_M], lambda_M[wrong_M])
    return level_MD


def _bisected(start_LD: np.ndarray, slope_LD: np.ndarray, reach_L: np.ndarray, lambda_L: np.ndarray) -> np.ndarray:
    """Return `lowest_levels` where rounding changes the distance: the rounded distance grows with lambda."""
    with np.errstate(divide="ignore", over="ignore"):
        # Where the pixel with the steepest slope alone has moved that far.
        far_L = np.minimum((reach_L + 1.0) / np.abs(slope_LD).max(axis=1), _MOST)
    low_L, high_L = 0.5 * lambda_L, np.maximum(2.0 * lambda_L, far_L)
    for _ in range(_FINE_BISECTIONS):
        middle_L = 0.5 * (low_L + high_L)
        within_L = _distance(np.rint(moved(start_LD, slope_LD, middle_L)), start_LD) <= reach_L
        low_L, high_L = np.where(within_L, middle_L, low_L), np.where(within_L, high_L, middle_L)
    return np.rint(moved(start_LD, slope_LD, low_L))


def _distance(one_MD: np.ndarray, other_MD: np.ndarray) -> np.ndarray:
    difference_MD = one_MD - other_MD
    return np.sqrt(rows_dot(difference_MD, difference_MD))


def _raised(anchor_LD: np.ndarray, gradient_LD: np.ndarray, fall_L: np.ndarray, lambda_L: np.ndarray) -> np.ndarray:
    """Return `closest_levels` with lambda raised where rounding lost too much: in growing steps, then by bisection."""
    with np.errstate(divide="ignore"):
        # The lambda that moves the image by one level in all.
        unit_L = np.minimum(1.0 / np.sqrt(rows_dot(gradient_LD, gradient_LD)), _MOST)
    low_L, high_L = lambda_L, lambda_L
    short_L = np.ones(len(fall_L), np.bool_)
    level_LD = anchor_LD
    for growth in _GROWTHS:
        low_L = np.where(short_L, high_L, low_L)
        high_L = np.where(short_L, np.minimum(high_L + growth * np.maximum(high_L, unit_L), _MOST), high_L)
        level_LD = np.rint(moved(anchor_LD, gradient_LD, high_L))
        short_L = _fall(anchor_LD, gradient_LD, level_LD) < fall_L
        if not short_L.any():
            break
    if (high_L - low_L <= _NARROW * high_L).all():
        return level_LD
    for _ in range(_BISECTIONS):
        middle_L = 0.5 * (low_L + high_L)
        middle_LD = np.rint(moved(anchor_LD, gradient_LD, middle_L))
        enough_L = _fall(anchor_LD, gradient_LD, middle_LD) >= fall_L
        high_L = np.where(enough_L, middle_L, high_L)
        low_L = np.where(enough_L, low_L, middle_L)
    return np.rint(moved(anchor_LD, gradient_LD, high_L))


def multiplier(
    anchor_MD: np.ndarray, gradient_MD: np.ndarray, fall_M: np.ndarray, lambda_M: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lambda at which `<g, .>` has fallen by `fall`, and where no lambda suffices.

    The fall from `anchor` to `clip(anchor - lambda g)` is concave in lambda and piecewise linear, so Newton's method
    from any guess ends after a few steps.

    Args:
        anchor_MD: see `closest_levels`.
        gradient_MD: likewise.
        fall_M: likewise.
        lambda_M: the guess; at least 0.
        tolerance: relative error of the fall.
    """
    low_MD, high_MD = -anchor_MD, LEVELS - anchor_MD
    line_MD, move_MD = np.empty_like(anchor_MD), np.empty_like(anchor_MD)
    stuck_M = np.zeros(len(fall_M), np.bool_)
    for _ in range(_NEWTON_STEPS):
        np.multiply(gradient_MD, -lambda_M[:, None], out=line_MD)
        np.clip(line_MD, low_MD, high_MD, out=move_MD)
        missing_M = fall_M + rows_dot(gradient_MD, move_MD)
        wrong_M = np.abs(missing_M) > tolerance * np.abs(fall_M)
        if not wrong_M.any():
            break
        # Pixels that are at their bound move no further.
        np.multiply(gradient_MD, line_MD == move_MD, out=move_MD)
        free_M = rows_dot(move_MD, gradient_MD)
        stuck_M = wrong_M & (missing_M > 0.0) & ~(free_M > 0.0)
        if (stuck_M == wrong_M).all():
            break
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            step_M = np.where(free_M > 0.0, missing_M / free_M, -0.5 * lambda_M)
            lambda_M = np.where(wrong_M & ~stuck_M, np.clip(lambda_M + step_M, 0.0, _MOST), lambda_M)
    return lambda_M, stuck_M


def mix(
    old_MD: np.ndarray,
    old_left_M: np.ndarray,
    new_MD: np.ndarray,
    new_left_M: np.ndarray,
    move_MD: np.ndarray,
    free_MD: np.ndarray,
    mixed_M: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of the old cut in the mixture of two cuts, 0 unless `mixed`, and a guess of its lambda.

    Closest to the centre where both linear functions have fallen far enough, from the iterate by the fall that is left,
    is a point of the plane that their gradients span, found from two equations; pixels at their bound stay there.

    Args:
        old_MD: gradient of the old cut.
        old_left_M: fall that is left to it.
        new_MD: gradient of the new cut.
        new_left_M: fall that is left to it.
        move_MD: of the iterate from the centre.
        free_MD: 1 for pixels that are not at their bound.
        mixed_M: which images have two cuts.
    """
    old_free_MD, new_free_MD = old_MD * free_MD, new_MD * free_MD
    old_old_M = rows_dot(old_free_MD, old_free_MD)
    old_new_M = rows_dot(old_free_MD, new_free_MD)
    new_new_M = rows_dot(new_free_MD, new_free_MD)
    # Pixels at their bound have made their contribution; the others are moved again.
    old_need_M = old_left_M - rows_dot(old_free_MD, move_MD)
    new_need_M = new_left_M - rows_dot(new_free_MD, move_MD)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        determinant_M = old_old_M * new_new_M - old_new_M * old_new_M
        old_M = (old_need_M * new_new_M - new_need_M * old_new_M) / determinant_M
        new_M = (new_need_M * old_old_M - old_need_M * old_new_M) / determinant_M
        share_M = np.minimum(np.where(new_M <= 0.0, 1.0, old_M / (old_M + new_M)), _MOST_OLD)
        known_M = mixed_M & np.isfinite(share_M) & (old_M > 0.0)
        lambda_M = np.where(known_M, old_M + np.maximum(new_M, 0.0), new_need_M / new_new_M)
    usable_M = np.isfinite(lambda_M) & (lambda_M > 0.0)
    return np.where(known_M, share_M, 0.0), np.where(usable_M, np.minimum(lambda_M, _MOST), 0.0)


def moved(anchor_MD: np.ndarray, gradient_MD: np.ndarray, lambda_M: np.ndarray) -> np.ndarray:
    """Return `clip(anchor - lambda g)`.

    Args:
        anchor_MD: see `closest_levels`.
        gradient_MD: likewise.
        lambda_M: at least 0.
    """
    moved_MD = gradient_MD * -lambda_M[:, None]
    moved_MD += anchor_MD
    return np.clip(moved_MD, 0.0, LEVELS, out=moved_MD)


def _fall(anchor_MD: np.ndarray, gradient_MD: np.ndarray, moved_MD: np.ndarray) -> np.ndarray:
    return rows_dot(gradient_MD, anchor_MD - moved_MD)


def bounded(gradient_MD: np.ndarray) -> np.ndarray:
    """Return a gradient with 0 for entries that are not numbers, clipped so that squares are finite."""
    return np.clip(np.nan_to_num(gradient_MD), -_LARGEST, _LARGEST)


def rows_dot(left_MD: np.ndarray, right_MD: np.ndarray) -> np.ndarray:
    """Return the inner product of each pair of rows."""
    return np.einsum("md,md->m", left_MD, right_MD)
