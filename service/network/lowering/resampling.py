"""Lowering of Resize and Upsample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from service.network.limits import MOST_AXES, limit_tensor
from service.network.lowering.table import (
    PROBE_BATCH,
    Folded,
    Inputs,
    Known,
    Reading,
    constant_array,
    lowers,
    operand,
    tensor_operand,
)
from service.network.nodes import Node, integers
from service.network.operators import Attribute, Constant, Refusal, Tensor

_COORDINATES = ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners")
_NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
_RESIZE_ATTRIBUTES = (
    *("antialias", "axes", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside"),
    *("extrapolation_value", "keep_aspect_ratio_policy", "mode", "nearest_mode"),
)


@lowers("Resize", versions=(10, 11, 13, 18, 19), attributes=_RESIZE_ATTRIBUTES)
def _resize(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State mode, coordinates and the scales or sizes of the spatial axes."""
    x = tensor_operand(operand(inputs, 0))
    mode = node.text("mode", "nearest", ("nearest", "linear"))
    if node.flag("antialias", 0) or node.flag("exclude_outside", 0):
        raise Refusal("antialias and exclude_outside have no proved rule")
    if node.attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Refusal("keep_aspect_ratio_policy other than stretch; give the sizes themselves")
    if node.version == 10:
        how, rounding = "asymmetric", "floor"
    else:
        how = node.text("coordinate_transformation_mode", "half_pixel", _COORDINATES)
        rounding = node.text("nearest_mode", "round_prefer_floor", _NEAREST)
    place = 1 if node.version == 10 else 2
    scales, sizes = _given(inputs, place), (_given(inputs, 3) if node.version > 10 else None)
    if node.version == 10 and mode == "nearest" and any(1.0 / one % 1.0 for one in _factors(scales) if one < 1.0):
        raise Refusal("nearest pixels of a smaller image, which runtimes of opset 10 choose in two ways; use opset 11")
    return _resampled(reading, node, x, scales, sizes, mode, how, rounding)


@lowers("Upsample", versions=(7, 9), attributes=("mode", "scales"))
def _upsample(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return the Resize with which later opsets replace it."""
    x = tensor_operand(operand(inputs, 0))
    mode = node.text("mode", "nearest", ("nearest", "linear"))
    if node.version >= 9:
        scales = _given(inputs, 1)
    else:
        given = node.attributes.get("scales")
        if not isinstance(given, tuple):
            raise Refusal("it needs scales")
        scales = Folded(np.array(given, np.float32))
    if any(factor < 1.0 for factor in _factors(scales)):
        raise Refusal("Upsample to a smaller size, which the specification rules out; use Resize")
    return _resampled(reading, node, x, scales, None, mode, "asymmetric", "floor")


def _factors(scales: Folded | None) -> list[float]:
    """Return the scales, those that `_resampled` refuses left out."""
    array = np.zeros(0, np.float32) if scales is None else scales.array
    return [factor for factor in array.ravel()[:MOST_AXES].tolist() if factor > 0.0]


def _given(inputs: Inputs, position: int) -> Folded | None:
    """Return an optional operand; exporters state an absent one as an empty tensor."""
    value = operand(inputs, position)
    if value is None:
        return None
    if not isinstance(value, Folded):
        raise Refusal("scales and sizes must be constants")
    return None if value.array.size == 0 else value


def _resampled(
    reading: Reading,
    node: Node,
    x: Tensor,
    scales: Folded | None,
    sizes: Folded | None,
    mode: str,
    how: str,
    rounding: str,
) -> Sequence[Known]:
    """Return the Resize of the spatial axes that change, by scales or sizes.

    Args:
        reading: of this network.
        node: Resize or Upsample.
        x: its input.
        scales: of all axes, or of those in the attribute `axes`.
        sizes: likewise.
        mode: nearest or linear.
        how: coordinate transformation.
        rounding: of coordinates, for nearest.

    Raises:
        Refusal: batch or channels are scaled, or a size is not certain.
    """
    rank = len(x.shape) + 1
    axes = node.listed("axes")
    axes = list(range(rank)) if axes is None else axes
    if any(not -rank <= axis < rank for axis in axes) or len({axis % rank for axis in axes}) != len(axes):
        raise Refusal(f"axes {axes} name one axis twice, or are outside of the {rank} axes")
    axes = [axis % rank for axis in axes]
    if (scales is None) == (sizes is None):
        raise Refusal("it needs either scales or sizes")
    changed: dict[int, tuple[Fraction, int]] = {}
    if scales is not None:
        factors = constant_array(scales, "scales")
        if factors.dtype != np.float32 or factors.size != len(axes):
            raise Refusal("scales must be one float32 for each axis")
        for axis, factor in zip(axes, factors.ravel().tolist(), strict=True):
            if not (math.isfinite(factor) and factor > 0.0):
                raise Refusal(f"a scale of {factor}")
            length = 1 if axis == 0 else x.shape[axis - 1]
            size = math.floor(length * Fraction(factor))
            limit_tensor([size])
            if size != math.floor(float(np.float32(length) * np.float32(factor))) or size < 1:
                raise Refusal(f"{length} pixels scaled by {factor!r} may round to another size; give sizes")
            changed[axis] = (Fraction(factor), size)
    elif sizes is not None:
        numbers = integers(constant_array(sizes, "sizes", batch_allowed=True), "sizes")
        if len(numbers) != len(axes):
            raise Refusal("sizes must be one integer for each axis")
        for axis, size in zip(axes, numbers, strict=True):
            if axis == 0:
                if size != reading.batch or not (sizes.on_batch or reading.batch != PROBE_BATCH):
                    raise Refusal("sizes give the batch axis a length of its own; name the spatial axes with `axes`")
                continue
            if sizes.on_batch and size == reading.batch:
                raise Refusal("sizes depend on the batch size")
            if size < 1:
                raise Refusal(f"a size of {size}")
            changed[axis] = (Fraction(size, x.shape[axis - 1]), size)
    for axis in (0, 1):
        if axis in changed and changed[axis][0] != 1:
            raise Refusal(f"it scales the {'batch' if axis == 0 else 'channel'} axis; the rule covers spatial axes")
    targets = {axis: target for axis, target in changed.items() if axis > 1 and target[0] != 1}
    if not targets:
        return [x]
    shape = [targets[axis][1] if axis in targets else n for axis, n in enumerate(x.shape, start=1)]
    stated: dict[str, Attribute] = {"coordinate_transformation_mode": how, "mode": mode, "axes": tuple(targets)}
    if mode == "nearest":
        stated["nearest_mode"] = rounding
    if scales is not None:
        factors = Constant(np.array([float(targets[axis][0]) for axis in targets], np.float32))
        return reading.emit(node.called("Resize"), [x, None, factors], shape, **stated)
    wanted = Constant(np.array([targets[axis][1] for axis in targets], np.int64))
    return reading.emit(node.called("Resize"), [x, None, None, wanted], shape, **stated)
