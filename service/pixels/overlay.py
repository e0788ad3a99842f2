"""Signed maps drawn over images, for people."""

from __future__ import annotations

import numpy as np

from service.shapes import Float32, Float64, UInt8

_RISE, _FALL = np.array([[220.0], [30.0], [30.0]]), np.array([[30.0], [60.0], [220.0]])


def draw_over(
    image_CHW: Float64[np.ndarray, "C H W"], map_CHW: Float32[np.ndarray, "C H W"]
) -> UInt8[np.ndarray, "3 H W"]:
    """Return the grey image with its map over it: red where the sum over the channels is positive, blue where negative.

    The entry with the largest absolute value hides the image, others in proportion.

    Args:
        image_CHW: pixels in [0, 1].
        map_CHW: finite numbers in any unit.
    """
    sum_HW = map_CHW.sum(axis=0, dtype=np.float64)
    strongest = np.abs(sum_HW).max()
    share_HW = sum_HW / strongest if strongest > 0.0 else sum_HW
    hidden_S = np.abs(share_HW).ravel()
    grey_S = 255.0 * image_CHW.mean(axis=0).ravel()
    colour_3S = np.where(share_HW.ravel() > 0.0, _RISE, _FALL)
    mixed_3S = (1.0 - hidden_S) * grey_S + hidden_S * colour_3S
    return np.rint(mixed_3S).astype(np.uint8).reshape(3, *sum_HW.shape)
