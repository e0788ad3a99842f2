"""ONNX graphs evaluated in real arithmetic, by code that the certifier shares nothing with.

One evaluation, three kinds of numbers: float64 (many images at once, to search with), rationals, and balls of 320 bits
for graphs with roots or transcendental functions. A stored weight is the exact number that its format stands for.
Axes: N images in front of each tensor.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from typing import Any

import flint
import numpy as np
import onnx
from flint import arb, fmpq
from onnx import helper, numpy_helper

PRECISION = 320
Array = np.ndarray


class Numbers:
    """Operations of the evaluation on arrays of one kind of numbers."""

    def convert(self, array: Array) -> Array:
        """From floats of any format, or from rationals."""
        raise NotImplementedError

    def number(self, value: float) -> Any:
        return self.convert(np.asarray(value)).item()

    def maximum(self, x: Array, y: Array) -> Array:
        raise NotImplementedError

    def minimum(self, x: Array, y: Array) -> Array:
        return -self.maximum(-x, -y)

    def choose(self, x: Array, above: Array, below: Array) -> Array:
        """`above` where `x >= 0`, else `below`."""
        raise NotImplementedError

    def sign(self, x: Array) -> Array:
        raise NotImplementedError

    def function(self, name: str, x: Array) -> Array:
        """sqrt, exp, expm1, log, log1p, tanh or erf."""
        raise NotImplementedError

    def largest(self, x: Array) -> Array:
        """Maximum over the last axis."""
        result = x[..., 0]
        for k in range(1, x.shape[-1]):
            result = self.maximum(result, x[..., k])
        return result

    def ascending(self, x: Array) -> Array:
        """Sorted along the last axis, by exchanges of neighbours: each is a maximum and a minimum."""
        x = x.copy()
        n = x.shape[-1]
        for end in range(n - 1, 0, -1):
            for k in range(end):
                low, high = self.minimum(x[..., k], x[..., k + 1]), self.maximum(x[..., k], x[..., k + 1])
                x[..., k], x[..., k + 1] = low, high
        return x


class Floats(Numbers):
    """float64: an approximation, to search with."""

    def convert(self, array: Array) -> Array:
        return np.asarray(array).astype(np.float64)

    def maximum(self, x: Array, y: Array) -> Array:
        return np.maximum(x, y)

    def choose(self, x: Array, above: Array, below: Array) -> Array:
        return np.where(x >= 0.0, above, below)

    def sign(self, x: Array) -> Array:
        return np.sign(x)

    def function(self, name: str, x: Array) -> Array:
        if name == "erf":
            return np.vectorize(math.erf, otypes=[np.float64])(x)
        return getattr(np, name)(x)

    def largest(self, x: Array) -> Array:
        return x.max(axis=-1)

    def ascending(self, x: Array) -> Array:
        return np.sort(x, axis=-1)


def _on_objects(function: Callable[..., Any], n_inputs: int) -> Callable[..., Array]:
    apply = np.frompyfunc(function, n_inputs, 1)
    return lambda *arrays: np.asarray(apply(*arrays), dtype=object)


def _fmpq(value: Any) -> fmpq:
    if isinstance(value, fmpq):
        return value
    ratio = value if isinstance(value, Fraction) else Fraction(float(value))
    return fmpq(ratio.numerator, ratio.denominator)


class Rationals(Numbers):
    """`flint.fmpq`: exact."""

    convert = staticmethod(_on_objects(_fmpq, 1))
    maximum = staticmethod(_on_objects(lambda x, y: x if x >= y else y, 2))
    choose = staticmethod(_on_objects(lambda x, above, below: above if x >= 0 else below, 3))
    sign = staticmethod(_on_objects(lambda x: fmpq((x > 0) - (x < 0)), 1))


def _arb(value: Any) -> arb:
    return value if isinstance(value, arb) else arb(_fmpq(value))


def _choose_ball(x: arb, above: arb, below: arb) -> arb:
    return above if x >= 0 else below if x < 0 else above.union(below)


def _sign_of_ball(x: arb) -> arb:
    return arb(1) if x > 0 else arb(-1) if x < 0 else arb(0) if x == 0 else arb(0, 1)


class Balls(Numbers):
    """`flint.arb`: enclosures. Where a ball leaves a choice open the result encloses both."""

    convert = staticmethod(_on_objects(_arb, 1))
    maximum = staticmethod(_on_objects(lambda x, y: x.max(y), 2))
    choose = staticmethod(_on_objects(_choose_ball, 3))
    sign = staticmethod(_on_objects(_sign_of_ball, 1))
    _functions = {  # noqa: RUF012
        "sqrt": _on_objects(lambda x: x.nonnegative_part().sqrt(), 1),
        **{
            name: _on_objects(lambda x, name=name: getattr(x, name)(), 1)
            for name in ("exp", "expm1", "log", "log1p", "tanh", "erf")
        },
    }

    def function(self, name: str, x: Array) -> Array:
        return self._functions[name](x)


FLOATS, RATIONALS, BALLS = Floats(), Rationals(), Balls()
IRRATIONAL = frozenset(
    [
        *(
            "BatchNormalization",
            "Celu",
            "Elu",
            "Erf",
            "GlobalLpPool",
            "LogSoftmax",
            "LpPool",
            "Pow",
            "ReduceL2",
            "Selu",
            "Sigmoid",
        ),
        *("Softmax", "Softplus", "Sqrt", "Tanh"),
    ]
)
"""Operators that leave the rational numbers."""


@dataclass
class Program:
    """A parsed graph with one input `image` and one output `logits`."""

    model: onnx.ModelProto
    nodes: list[tuple[str, list[str], list[str], dict[str, Any]]]
    constants: dict[str, Array]
    _converted: dict[Numbers, dict[str, Array]] = field(default_factory=dict)

    @classmethod
    def parse(cls, model_bytes: bytes) -> "Program":
        model = onnx.load_model_from_string(model_bytes)
        nodes = [
            (
                node.op_type,
                list(node.input),
                list(node.output),
                {a.name: helper.get_attribute_value(a) for a in node.attribute},
            )
            for node in model.graph.node
        ]
        return cls(model, nodes, {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer})

    @property
    def operators(self) -> frozenset[str]:
        return frozenset(name for name, *_ in self.nodes)

    @property
    def exact_numbers(self) -> Numbers:
        return BALLS if self.operators & IRRATIONAL else RATIONALS

    def evaluate(self, images: Array, numbers: Numbers) -> dict[str, Array]:
        """Every tensor by its name, for `images` (N x *shape) of any numbers that `numbers` can convert."""
        if numbers not in self._converted:
            self._converted[numbers] = {
                name: numbers.convert(array) if array.dtype.kind == "f" else array
                for name, array in self.constants.items()
            }
        values: dict[str, Array] = {**self._converted[numbers], "image": numbers.convert(images)}
        flint.ctx.prec = PRECISION
        with np.errstate(over="ignore", invalid="ignore"):
            for operator_name, inputs, outputs, attributes in self.nodes:
                operands = [values[name] if name else None for name in inputs]
                results = OPERATORS[operator_name](numbers, operands, attributes, len(outputs))
                values.update(zip(outputs, results, strict=False))
        return values


def exact_logits(model_bytes: bytes, image: Array) -> Array:
    """The real-number output of a graph of rational operators for one image, as an array of Fractions."""
    logits = Program.parse(model_bytes).evaluate(image[None], RATIONALS)["logits"][0]
    return np.array([Fraction(int(value.p), int(value.q)) for value in logits], dtype=object)


# --- operators --------------------------------------------------------------------------------------------------------

Operands = Sequence[Any]
Operator = Callable[[Numbers, Operands, dict[str, Any], int], list[Array]]
OPERATORS: dict[str, Operator] = {}


def _simple(function: Callable[..., Array]) -> Operator:
    """An operator with one output; the function takes the numbers, the operands and the attributes."""
    return lambda numbers, operands, attributes, n: [function(numbers, operands, attributes)]


def _elementwise(function: Callable[[Numbers, Array, dict[str, Any]], Array]) -> Operator:
    return lambda numbers, operands, attributes, n: [function(numbers, operands[0], attributes)]


def _axes(operands: Operands, attributes: dict[str, Any], x: Array) -> list[int]:
    given = operands[1] if len(operands) > 1 else attributes["axes"]
    return sorted(int(axis) % x.ndim for axis in np.ravel(given))


def _reduction(function: Callable[[Numbers, Array], Array]) -> Operator:
    """`function` reduces the last axis."""

    def reduced(numbers: Numbers, operands: Operands, attributes: dict[str, Any], n: int) -> list[Array]:
        x = operands[0]
        axes = _axes(operands, attributes, x)
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        moved = np.transpose(x, kept + axes).reshape([x.shape[axis] for axis in kept] + [-1])
        result = function(numbers, moved)
        return [np.expand_dims(result, axes) if attributes.get("keepdims", 1) else result]

    return reduced


def _over_the_channel(function: Callable[[Numbers, Array], Array]) -> Operator:
    def pool(numbers: Numbers, operands: Operands, attributes: dict[str, Any], n: int) -> list[Array]:
        x = operands[0]
        result = function(numbers, x.reshape(*x.shape[:2], -1))
        return [result.reshape(*result.shape, *[1] * (x.ndim - 2))]

    return pool


def _mean(numbers: Numbers, x: Array) -> Array:
    return x.sum(axis=-1) / numbers.number(x.shape[-1])


def _norm(numbers: Numbers, x: Array) -> Array:
    return numbers.function("sqrt", (x * x).sum(axis=-1))


def _relu(numbers: Numbers, x: Array) -> Array:
    return numbers.maximum(x, np.broadcast_to(numbers.convert(np.zeros(())), x.shape))


def _clipped(numbers: Numbers, x: Array, low: Any, high: Any) -> Array:
    # The upper limit wins, as in the specification.
    if low is not None:
        x = numbers.maximum(x, low)
    return x if high is None else numbers.minimum(x, high)


def _unit_clipped(numbers: Numbers, x: Array) -> Array:
    return _clipped(numbers, x, numbers.convert(np.zeros(())), numbers.convert(np.ones(())))


def _elu(numbers: Numbers, x: Array, alpha: Any) -> Array:
    below = numbers.function("expm1", numbers.minimum(x, numbers.convert(np.zeros(()))))
    return numbers.choose(x, x, alpha * below)


def _selu(numbers: Numbers, x: Array, attributes: dict[str, Any]) -> Array:
    alpha = attributes.get("alpha", 1.67326319217681884765625)
    gamma = attributes.get("gamma", 1.05070102214813232421875)
    return numbers.number(gamma) * _elu(numbers, x, numbers.number(alpha))


def _celu(numbers: Numbers, x: Array, attributes: dict[str, Any]) -> Array:
    alpha = numbers.number(attributes.get("alpha", 1.0))
    return numbers.choose(x, x, alpha * _elu(numbers, x / alpha, numbers.number(1.0)))


def _softplus(numbers: Numbers, x: Array, attributes: dict[str, Any]) -> Array:
    one = numbers.number(1.0)
    return _relu(numbers, x) + numbers.function("log", one + numbers.function("exp", -abs(x)))


def _sigmoid(numbers: Numbers, x: Array, attributes: dict[str, Any]) -> Array:
    half = numbers.number(0.5)
    return half + half * numbers.function("tanh", half * x)


def _hard_sigmoid(numbers: Numbers, x: Array, attributes: dict[str, Any]) -> Array:
    alpha, beta = attributes.get("alpha", float(np.float32(0.2))), attributes.get("beta", 0.5)
    return _unit_clipped(numbers, numbers.number(alpha) * x + numbers.number(beta))


def _hard_swish(numbers: Numbers, x: Array, attributes: dict[str, Any]) -> Array:
    return x * _unit_clipped(numbers, x / numbers.number(6.0) + numbers.number(0.5))


def _leaky_relu(numbers: Numbers, x: Array, attributes: dict[str, Any]) -> Array:
    return numbers.choose(x, x, numbers.number(attributes.get("alpha", float(np.float32(0.01)))) * x)


def _exponentials(numbers: Numbers, x: Array) -> tuple[Array, Array, Array]:
    shifted = x - numbers.largest(x)[..., None]
    powers = numbers.function("exp", shifted)
    return shifted, powers, powers.sum(axis=-1, keepdims=True)


def _softmax(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    axis = attributes.get("axis", -1)
    _, powers, total = _exponentials(numbers, np.moveaxis(operands[0], axis, -1))
    return np.moveaxis(powers / total, -1, axis)


def _log_softmax(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    axis = attributes.get("axis", -1)
    shifted, _, total = _exponentials(numbers, np.moveaxis(operands[0], axis, -1))
    return np.moveaxis(shifted - numbers.function("log", total), -1, axis)


def _power(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x, exponent = operands
    power = float(np.ravel(exponent)[0])
    if power == 1.0:
        return x
    return x * x if power == 2.0 else numbers.function("sqrt", x)


def _gemm(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    weight = operands[1].T if attributes.get("transB") else operands[1]
    product = (operands[0] @ weight) * numbers.number(attributes.get("alpha", 1.0))
    bias = operands[2] if len(operands) > 2 else None
    return product if bias is None else product + bias * numbers.number(attributes.get("beta", 1.0))


def _topk(numbers: Numbers, operands: Operands, attributes: dict[str, Any], n: int) -> list[Array]:
    axis = attributes.get("axis", -1)
    ordered = numbers.ascending(np.moveaxis(operands[0], axis, -1))
    if attributes.get("largest", 1):
        ordered = ordered[..., ::-1]
    kept = np.moveaxis(ordered[..., : int(operands[1][0])], -1, axis)
    return [kept, np.zeros(kept.shape)]


def _slice(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x, starts, ends, *rest = operands
    axes = rest[0] if rest else range(len(starts))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        length = x.shape[axis]
        # As the specification words it: count from the end once, then clamp.
        first, last = (int(bound) + length if bound < 0 else int(bound) for bound in (start, end))
        if step > 0:
            positions = range(min(max(first, 0), length), min(max(last, 0), length), int(step))
        else:
            positions = range(min(max(first, 0), length - 1), min(max(last, -1), length - 1), int(step))
        x = np.take(x, list(positions), axis=axis)
    return x


def _split(numbers: Numbers, operands: Operands, attributes: dict[str, Any], n: int) -> list[Array]:
    x, axis = operands[0], attributes.get("axis", 0)
    if len(operands) > 1:
        sizes = [int(size) for size in operands[1]]
    else:
        chunk = -(-x.shape[axis] // n)
        sizes = [min(chunk, x.shape[axis] - start) for start in range(0, x.shape[axis], chunk)]
    return np.split(x, np.cumsum(sizes)[:-1], axis=axis)


def _pad(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x, pads = operands[0], np.array(operands[1])
    axes = operands[3] if len(operands) > 3 else range(x.ndim)
    mode = attributes.get("mode", b"constant").decode()
    fill = np.ravel(operands[2])[0] if len(operands) > 2 and operands[2] is not None else numbers.number(0.0)
    for position, axis in enumerate(axes):
        n = x.shape[axis]
        places = np.arange(-int(pads[position]), n + int(pads[position + len(axes)]))
        if mode == "constant":
            frame = np.full((*x.shape[:axis], 1, *x.shape[axis + 1 :]), fill, dtype=x.dtype)
            x = np.concatenate([x, frame], axis=axis)
            places = np.where((places < 0) | (places >= n), n, places)
        elif mode == "edge":
            places = np.clip(places, 0, n - 1)
        elif mode == "wrap":
            places = places % n
        else:
            places = np.where(places < 0, -places, np.where(places >= n, 2 * (n - 1) - places, places))
        x = np.take(x, places, axis=axis)
    return x


def _concat(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    """Constants of one image stand beside each of the N images."""
    axis = attributes["axis"] % operands[0].ndim
    if axis > 0:
        images = max(len(x) for x in operands)
        operands = [np.broadcast_to(x, (images, *x.shape[1:])) for x in operands]
    return np.concatenate(operands, axis=axis)


def _reshape(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x = operands[0]
    shape = [x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(operands[1])]
    return x.reshape(shape)


def _expand(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    return np.broadcast_to(operands[0], np.broadcast_shapes(operands[0].shape, tuple(int(n) for n in operands[1])))


def _space_to_depth(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x, block = operands[0], attributes["blocksize"]
    parts = [x[:, :, i::block, j::block] for i in range(block) for j in range(block)]
    return np.concatenate(parts, axis=1)


def _depth_to_space(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x, block = operands[0], attributes["blocksize"]
    images, channels, height, width = x.shape
    depth = channels // block**2
    made = np.empty((images, depth, height * block, width * block), dtype=x.dtype)
    for c, i, j in itertools.product(range(depth), range(block), range(block)):
        column_first = attributes.get("mode", b"DCR") == b"DCR"
        source = (i * block + j) * depth + c if column_first else c * block**2 + i * block + j
        made[:, c, i::block, j::block] = x[:, source]
    return made


# --- windows of images ------------------------------------------------------------------------------------------------


def _geometry(
    attributes: dict[str, Any], size: Sequence[int], kernel: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """Stride, dilation, zeros before, results: along each axis."""
    axes = len(size)
    strides, dilations = attributes.get("strides", [1] * axes), attributes.get("dilations", [1] * axes)
    pads, mode = attributes.get("pads", [0] * (2 * axes)), attributes.get("auto_pad", b"NOTSET")
    found = []
    for axis, (n, k, s, d) in enumerate(zip(size, kernel, strides, dilations, strict=True)):
        extent = (k - 1) * d + 1
        low, high = (0, 0) if mode == b"VALID" else (pads[axis], pads[axis + axes])
        if mode in (b"SAME_UPPER", b"SAME_LOWER"):
            total = max(((n + s - 1) // s - 1) * s + extent - n, 0)
            low = total // 2 if mode == b"SAME_UPPER" else total - total // 2
            high = total - low
        found.append((s, d, low, (n + low + high - extent) // s + 1))
    return found


def _places(attributes: dict[str, Any], size: Sequence[int], kernel: Sequence[int]) -> tuple[Array, tuple[int, ...]]:
    """Positions in a flattened image of `size`, -1 outside: `out x taps`; the shape of the results."""
    geometry = _geometry(attributes, size, kernel)
    after = tuple(count for *_, count in geometry)
    found = np.zeros((1, 1), dtype=np.int64)
    inside = np.ones((1, 1), dtype=bool)
    for n, k, (s, d, low, count) in zip(size, kernel, geometry, strict=True):
        places = np.arange(count)[:, None] * s + np.arange(k)[None, :] * d - low
        there = (places >= 0) & (places < n)
        found = (found[:, None, :, None] * n + places[None, :, None, :]).reshape(len(found) * count, -1)
        inside = (inside[:, None, :, None] & there[None, :, None, :]).reshape(found.shape)
    return np.where(inside, found, -1), after


def _picked(numbers: Numbers, x: Array, places: Array) -> Array:
    """`N x C x *places` of an image `N x C x *S`, with zeros where a place is -1."""
    flat = x.reshape(*x.shape[:2], -1)
    zeros = numbers.convert(np.zeros((*flat.shape[:2], 1)))
    return np.concatenate([flat, zeros], axis=2)[:, :, places]


def _conv(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x, weight = operands[:2]
    places, after = _places(attributes, x.shape[2:], weight.shape[2:])
    groups = attributes.get("group", 1)
    seen = _picked(numbers, x, places).reshape(len(x), groups, -1, *places.shape)
    seen = np.moveaxis(seen, -1, 3).reshape(len(x), groups, -1, len(places))
    result = (weight.reshape(1, groups, len(weight) // groups, -1) @ seen).reshape(len(x), len(weight), *after)
    return result + operands[2].reshape(-1, *[1] * len(after)) if len(operands) > 2 else result


def _conv_transpose(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    """As a convolution of the image with zeros between its pixels: positions of the dense matrix, one by one."""
    x, weight = operands[:2]
    axes = x.ndim - 2
    groups, strides = attributes.get("group", 1), attributes.get("strides", [1] * axes)
    dilations, pads = attributes.get("dilations", [1] * axes), attributes.get("pads", [0] * 2 * axes)
    extra = attributes.get("output_padding", [0] * axes)
    after = [
        (n - 1) * s + (k - 1) * d + 1 - pads[a] - pads[a + axes] + e
        for a, (n, k, s, d, e) in enumerate(zip(x.shape[2:], weight.shape[2:], strides, dilations, extra, strict=True))
    ]
    taps = list(itertools.product(*(range(k) for k in weight.shape[2:])))
    places = np.full((math.prod(after), len(taps)), -1)
    for row, out in enumerate(itertools.product(*(range(n) for n in after))):
        for column, tap in enumerate(taps):
            steps = [o + p - t * d for o, t, d, p in zip(out, tap, dilations, pads, strict=False)]
            if all(0 <= v < n * s and v % s == 0 for v, n, s in zip(steps, x.shape[2:], strides, strict=True)):
                whole = tuple(v // s for v, s in zip(steps, strides, strict=True))
                places[row, column] = np.ravel_multi_index(whole, x.shape[2:])
    seen = _picked(numbers, x, places).reshape(len(x), groups, -1, *places.shape)
    seen = np.moveaxis(seen, -1, 3).reshape(len(x), groups, -1, len(places))
    per_group = weight.reshape(groups, -1, weight.shape[1], len(taps))
    rows = np.swapaxes(per_group, 1, 2).reshape(1, groups, weight.shape[1], -1)
    result = (rows @ seen).reshape(len(x), -1, *after)
    return result + operands[2].reshape(-1, *[1] * axes) if len(operands) > 2 else result


def _max_pool(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x = operands[0]
    places, after = _places(attributes, x.shape[2:], attributes["kernel_shape"])
    # A place outside of the image gives way to one inside of the same window.
    places = np.where(places >= 0, places, places.max(axis=1, keepdims=True))
    return numbers.largest(_picked(numbers, x, places)).reshape(*x.shape[:2], *after)


def _average_pool(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x = operands[0]
    places, after = _places(attributes, x.shape[2:], attributes["kernel_shape"])
    inside = (places >= 0).sum(axis=1)
    divisors = np.full(len(places), places.shape[1]) if attributes.get("count_include_pad") else inside
    total = _picked(numbers, x, places).sum(axis=-1)
    return (total / numbers.convert(divisors.astype(np.float64))).reshape(*x.shape[:2], *after)


def _lp_pool(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x = operands[0]
    places, after = _places(attributes, x.shape[2:], attributes["kernel_shape"])
    return _norm(numbers, _picked(numbers, x, places)).reshape(*x.shape[:2], *after)


def _batch_normalization(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x, *parameters = operands
    scale, bias, mean, variance = (array.reshape(-1, *[1] * (x.ndim - 2)) for array in parameters)
    epsilon = numbers.number(attributes.get("epsilon", float(np.float32(1e-5))))
    return (x - mean) * (scale / numbers.function("sqrt", variance + epsilon)) + bias


def _resize(numbers: Numbers, operands: Operands, attributes: dict[str, Any]) -> Array:
    x = operands[0]
    axes = [int(axis) % x.ndim for axis in attributes.get("axes", range(x.ndim))]
    scales, sizes = [Fraction(1)] * x.ndim, list(x.shape)
    for position, axis in enumerate(axes):
        if len(operands) > 3:
            sizes[axis] = int(operands[3][position])
            scales[axis] = Fraction(sizes[axis], x.shape[axis])
        else:
            scales[axis] = Fraction(float(_floats_of(operands[2])[position]))
            sizes[axis] = math.floor(x.shape[axis] * scales[axis])
    how = attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
    rounding = attributes.get("nearest_mode", b"round_prefer_floor").decode()
    for axis in range(2, x.ndim):
        n, size, scale = x.shape[axis], sizes[axis], scales[axis]
        if scale == 1:
            continue
        matrix = np.full((size, n), Fraction(0), dtype=object)
        for j in range(size):
            place = _coordinate(j, n, size, scale, how)
            if attributes.get("mode", b"nearest") == b"nearest":
                chosen = {
                    "round_prefer_floor": math.ceil(place - Fraction(1, 2)),
                    "round_prefer_ceil": math.floor(place + Fraction(1, 2)),
                    "floor": math.floor(place),
                    "ceil": math.ceil(place),
                }[rounding]
                matrix[j, min(max(chosen, 0), n - 1)] = Fraction(1)
                continue
            place = min(max(place, Fraction(0)), Fraction(n - 1))
            first = math.floor(place)
            matrix[j, first] += 1 - (place - first)
            if place != first:
                matrix[j, first + 1] += place - first
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ numbers.convert(matrix).T, -1, axis)
    return x


def _floats_of(numbers_or_floats: Array) -> list[float]:
    return [float(Fraction(int(v.p), int(v.q))) if isinstance(v, fmpq) else float(v) for v in numbers_or_floats]


def _coordinate(j: int, n: int, size: int, scale: Fraction, how: str) -> Fraction:
    if how == "align_corners":
        return Fraction(0) if size == 1 else Fraction(j * (n - 1), size - 1)
    if how == "asymmetric":
        return j / scale
    if how == "pytorch_half_pixel" and size == 1:
        return Fraction(0)
    return (j + Fraction(1, 2)) / scale - Fraction(1, 2)


OPERATORS.update(
    {
        "Abs": _elementwise(lambda numbers, x, a: abs(x)),
        "Add": _simple(lambda numbers, i, a: i[0] + i[1]),
        "AveragePool": _simple(_average_pool),
        "BatchNormalization": _simple(_batch_normalization),
        "Cast": _elementwise(lambda numbers, x, a: x),
        "Celu": _elementwise(_celu),
        "Clip": _simple(lambda numbers, i, a: _clipped(numbers, *i, *[None] * (3 - len(i)))),
        "Concat": _simple(_concat),
        "Conv": _simple(_conv),
        "ConvTranspose": _simple(_conv_transpose),
        "DepthToSpace": _simple(_depth_to_space),
        "Div": _simple(lambda numbers, i, a: i[0] / i[1]),
        "Dropout": _elementwise(lambda numbers, x, a: x),
        "Elu": _elementwise(lambda numbers, x, a: _elu(numbers, x, numbers.number(a.get("alpha", 1.0)))),
        "Erf": _elementwise(lambda numbers, x, a: numbers.function("erf", x)),
        "Expand": _simple(_expand),
        "Flatten": _elementwise(lambda numbers, x, a: x.reshape(len(x), -1)),
        "Gather": _simple(lambda numbers, i, a: np.take(i[0], i[1], axis=a.get("axis", 0))),
        "Gemm": _simple(_gemm),
        "GlobalAveragePool": _over_the_channel(_mean),
        "GlobalLpPool": _over_the_channel(_norm),
        "GlobalMaxPool": _over_the_channel(lambda numbers, x: numbers.largest(x)),
        "HardSigmoid": _elementwise(_hard_sigmoid),
        "HardSwish": _elementwise(_hard_swish),
        "Identity": _elementwise(lambda numbers, x, a: x),
        "LeakyRelu": _elementwise(_leaky_relu),
        "LogSoftmax": _simple(_log_softmax),
        "LpPool": _simple(_lp_pool),
        "MatMul": _simple(lambda numbers, i, a: i[0] @ i[1]),
        "Max": _simple(lambda numbers, i, a: reduce(numbers.maximum, i)),
        "MaxPool": _simple(_max_pool),
        "Mean": _simple(lambda numbers, i, a: reduce(operator.add, i) / numbers.number(len(i))),
        "Min": _simple(lambda numbers, i, a: reduce(numbers.minimum, i)),
        "Mul": _simple(lambda numbers, i, a: i[0] * i[1]),
        "Neg": _elementwise(lambda numbers, x, a: -x),
        "PRelu": _simple(lambda numbers, i, a: numbers.choose(i[0], i[0], i[0] * i[1])),
        "Pad": _simple(_pad),
        "Pow": _simple(_power),
        "ReduceL1": _reduction(lambda numbers, x: abs(x).sum(axis=-1)),
        "ReduceL2": _reduction(_norm),
        "ReduceMax": _reduction(lambda numbers, x: numbers.largest(x)),
        "ReduceMean": _reduction(_mean),
        "ReduceMin": _reduction(lambda numbers, x: -numbers.largest(-x)),
        "ReduceSum": _reduction(lambda numbers, x: x.sum(axis=-1)),
        "ReduceSumSquare": _reduction(lambda numbers, x: (x * x).sum(axis=-1)),
        "Relu": _elementwise(lambda numbers, x, a: _relu(numbers, x)),
        "Reshape": _simple(_reshape),
        "Resize": _simple(_resize),
        "Selu": _elementwise(_selu),
        "Shape": _elementwise(lambda numbers, x, a: np.array(x.shape, dtype=np.int64)),
        "Sigmoid": _elementwise(_sigmoid),
        "Sign": _elementwise(lambda numbers, x, a: numbers.sign(x)),
        "Slice": _simple(_slice),
        "Softmax": _simple(_softmax),
        "Softplus": _elementwise(_softplus),
        "Softsign": _elementwise(lambda numbers, x, a: x / (numbers.number(1.0) + abs(x))),
        "SpaceToDepth": _simple(_space_to_depth),
        "Split": _split,
        "Sqrt": _elementwise(lambda numbers, x, a: numbers.function("sqrt", x)),
        "Squeeze": _simple(lambda numbers, i, a: np.squeeze(i[0], tuple(int(axis) for axis in i[1]))),
        "Sub": _simple(lambda numbers, i, a: i[0] - i[1]),
        "Sum": _simple(lambda numbers, i, a: reduce(operator.add, i)),
        "Tanh": _elementwise(lambda numbers, x, a: numbers.function("tanh", x)),
        "Tile": _simple(lambda numbers, i, a: np.tile(i[0], [int(n) for n in i[1]])),
        "TopK": _topk,
        "Transpose": _elementwise(lambda numbers, x, a: np.transpose(x, a["perm"])),
        "Unsqueeze": _simple(lambda numbers, i, a: np.expand_dims(i[0], tuple(int(axis) for axis in i[1]))),
        "Where": _simple(lambda numbers, i, a: np.where(i[0].astype(bool), i[1], i[2])),
    }
)
