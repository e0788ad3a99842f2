"""Rules of operators that resample images. Notation as in `table`.

Resize maps each output position to a coordinate of the input, a rational number. Runtimes compute it in float32 (or
better) by the formula of the ONNX specification, one rounding to nearest for each operation: exactly where every
intermediate result is a float32, and otherwise within `8 u (|x| + 1)`, `u = 2^-24`, which covers six roundings. With
`nearest` such an error may pick another pixel, and then there is no proof; `linear` is continuous, and pays for it.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from service.certificate.facts import LocalError
from service.certificate.norms import spectral_norm_bound
from service.certificate.rounding import FLOAT32, FLOAT64, add_up, mul_up, sqrt_up, up
from service.certificate.rules.linear import LinearMap, linear_result
from service.certificate.rules.operands import (
    Array,
    Operands,
    data_operand,
    float_operand,
    integer_operand,
    limit_size,
    optional_operand,
)
from service.certificate.rules.table import Context, rule
from service.certificate.values import Value, View
from service.network.operators import Operator, Refusal

_HALF = Fraction(1, 2)
_LONGEST_AXIS = 1 << 16
"""Pixels along a resampled axis: each has its coordinate as a fraction."""


@dataclass(frozen=True)
class _Axis:
    """How one axis is resampled."""

    size: int
    """Pixels of the input."""
    coordinates: tuple[Fraction, ...]
    """Of each output pixel in the input; not yet clamped to `[0, size - 1]`."""
    errors: tuple[Fraction, ...]
    """Bounds of computed minus exact coordinate; 0 where float32 computes it exactly."""


@rule("Resize", attributes=("axes", "coordinate_transformation_mode", "mode", "nearest_mode"))
def resize(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Nearest: a rearrangement (a pixel used m times counts sqrt(m)). Linear: a product of one matrix for each axis.

    Args: see `Rule`.

    Raises:
        Refusal: float32 may round a coordinate to another pixel.
    """
    view = data_operand(inputs[0])
    targets = _targets(node, inputs, view)
    # Axes are resampled one after the other, the others as long as they are or will be.
    longest = [max(n, targets[axis][1]) if axis in targets else n for axis, n in enumerate(view.shape)]
    limit_size(longest, *((size, view.shape[axis]) for axis, (_, size) in targets.items()))
    how = node.text("coordinate_transformation_mode")
    resampled = {axis: _axis(view.shape[axis], scale, size, how) for axis, (scale, size) in targets.items()}
    if node.text("mode") == "linear":
        return [_linear(context, view, resampled, math.prod(longest))]
    index = view.index
    for axis, along in resampled.items():
        index = np.take(index, _nearest(along, node.text("nearest_mode")), axis=axis)
    return [view.rearranged(index)]


def _targets(node: Operator, inputs: Operands, view: View) -> dict[int, tuple[Fraction, int]]:
    """Return scale and new size of every axis (of the image's own shape) that is resampled."""
    axes = [axis - 1 for axis in node.integers("axes")]
    scales = optional_operand(inputs, 2)
    if scales is not None:
        factors = [Fraction(factor) for factor in float_operand(scales, "scales").tolist()]
        pairs = zip(axes, factors, strict=True)
        return {axis: (factor, _scaled_size(view.shape[axis], factor)) for axis, factor in pairs}
    sizes = integer_operand(inputs[3], "sizes")
    for size in sizes:
        _limit_axis(size)
    return {axis: (Fraction(size, view.shape[axis]), size) for axis, size in zip(axes, sizes, strict=True)}


def _limit_axis(size: int) -> None:
    if size > _LONGEST_AXIS:
        raise Refusal(f"too large to analyse: {size} pixels along an axis, at most {_LONGEST_AXIS}")


def _scaled_size(length: int, scale: Fraction) -> int:
    size = math.floor(length * scale)
    _limit_axis(size)
    if size == length:
        raise Refusal(
            f"{length} pixels scaled by {float(scale)!r} stay {length}: runtimes resample them, or do nothing"
        )
    return size


def _is_float32(value: Fraction) -> bool:
    return abs(value) < 2**24 and Fraction(float(np.float32(float(value)))) == value


def _axis(length: int, scale: Fraction, size: int, mode: str) -> _Axis:
    coordinates: list[Fraction] = []
    errors: list[Fraction] = []
    if mode == "align_corners" and length * scale != size:
        raise Refusal("align_corners with a scale that gives no whole number of pixels; give sizes")
    if mode == "pytorch_half_pixel" and size == 1 and length * scale != 1:
        raise Refusal("pytorch_half_pixel with a scale that gives one pixel and a part; give sizes")
    for j in range(size):
        # Every intermediate result of the specification's formula, the coordinate last.
        if (mode == "pytorch_half_pixel" or mode == "align_corners") and size == 1:
            steps = [Fraction(0)]
        elif mode == "align_corners":
            steps = [Fraction(j * (length - 1)), Fraction(j * (length - 1), size - 1)]
        elif mode == "asymmetric":
            steps = [scale, j / scale]
        else:
            steps = [scale, j + _HALF, (j + _HALF) / scale, (j + _HALF) / scale - _HALF]
        x = steps[-1]
        coordinates.append(x)
        errors.append(Fraction(0) if all(map(_is_float32, steps)) else (abs(x) + 1) / 2**21)
    return _Axis(length, tuple(coordinates), tuple(errors))


def _picked(x: Fraction, length: int, mode: str) -> int:
    if mode == "round_prefer_floor":
        chosen = math.ceil(x - _HALF)
    elif mode == "round_prefer_ceil":
        chosen = math.floor(x + _HALF)
    else:
        chosen = math.floor(x) if mode == "floor" else math.ceil(x)
    return min(max(chosen, 0), length - 1)


def _nearest(axis: _Axis, mode: str) -> list[int]:
    picked: list[int] = []
    for j, (x, error) in enumerate(zip(axis.coordinates, axis.errors, strict=True)):
        # The choice grows with the coordinate: where both ends of the error agree, so does all between.
        low, high = (_picked(x + sign * error, axis.size, mode) for sign in (-1, 1))
        if low != high:
            raise Refusal(
                f"output pixel {j} lies so near to a tie between pixels {low} and {high} that float32 may pick either;"
                f" use another nearest_mode or coordinate_transformation_mode, or a scale such as 2"
            )
        picked.append(low)
    return picked


def _linear(context: Context, view: View, resampled: dict[int, _Axis], widest: int) -> View:
    """Return `y = (M_1 x M_2 x ...) x`: norm `||M_1|| ||M_2|| ...`; weights are at least 0 and sum to 1.

    A coordinate off by `d` moves the two weights of one axis by `2 d` in sum, and rounding them by `2 u` more; so does
    each product of weights by `u`. A result moves by that sum times the largest pixel.
    """
    if not resampled:
        return view
    matrices: dict[int, Array] = {}
    norm, moved, bits = 1.0, 0.0, 0
    unit = FLOAT32.unit_roundoff
    for axis, along in resampled.items():
        matrix, axis_bits = _interpolation(along)
        matrices[axis] = matrix
        bits += axis_bits
        # Each of at most two weights in a row is rounded to float64 here.
        rounded = mul_up(FLOAT64.unit_roundoff, sqrt_up(2.0 * len(matrix)))
        norm = mul_up(norm, add_up(spectral_norm_bound(matrix), rounded))
        moved = add_up(moved, mul_up(2.0, up(float(max(along.errors)))), 4.0 * unit)
    count = len(resampled)
    if bits <= 24:
        # Coordinates, weights and products of weights are exact.
        moved = 0.0
    if moved > 2.0**-7:
        raise Refusal("its coordinates are too large for float32")
    # Second-order terms are below a hundredth of the first.
    moved = mul_up(1.01, add_up(moved, 2.0 * count * unit if moved else 0.0))

    def apply(stack: Array) -> Array:
        for axis, matrix in matrices.items():
            stack = np.moveaxis(np.tensordot(matrix, stack, axes=(1, axis + 1)), 0, axis + 1)
        return stack

    # Factors of a product: one weight for each axis, a pixel; then the sum. Zero weights add nothing.
    linear = LinearMap(
        apply, norm=norm, spread=norm, row_norm=1.0, terms=2**count + 2 * count, tight=True, widest=widest
    )
    result = linear_result(context, view, linear)
    if moved == 0.0:
        return result
    source, facts = result.source, context.domain.joint(result)
    displaced = LocalError.of_each(mul_up(moved, context.domain.joint(view).largest), source.center.size)
    return context.source(source.center, facts.plus(displaced), step=source.step)


def _interpolation(axis: _Axis) -> tuple[Array, int]:
    """Return the matrix of one axis, and the bits behind the point of its weights (25 where they are rounded)."""
    matrix = np.zeros((len(axis.coordinates), axis.size))
    bits = 25 if any(axis.errors) else 0
    for row, x in zip(matrix, axis.coordinates, strict=True):
        inside = min(max(x, Fraction(0)), Fraction(axis.size - 1))
        first = math.floor(inside)
        share = inside - first
        if share.denominator & (share.denominator - 1):
            bits = 25
        bits = max(bits, share.denominator.bit_length() - 1)
        row[first] = float(1 - share)
        if share:
            row[first + 1] = float(share)
    return matrix, bits
