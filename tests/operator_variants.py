"""Small graphs of one operator each, in every opset that has it: attributes and shapes from a seed.

Attributes are left out now and then, so that defaults count; axes are counted from the front or from the back. Some
variants are no valid graphs, or have no proof: a check that uses them counts those apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from graph_builder import GraphBuilder
from onnx import numpy_helper

T = TypeVar("T")
Shape = tuple[int, ...]
NEWEST = 27
"""Opset; operators changed in 28 have no lowering yet."""


@dataclass(frozen=True)
class Variant:
    """A model from `image` to `logits`, with the shape of an image."""

    model: bytes
    shape: Shape
    dtype: type


class Draft(GraphBuilder):
    """A variant in the making."""

    def __init__(self, seed: int, operator: str) -> None:
        rng = np.random.default_rng(seed)
        opset = int(rng.integers(7, NEWEST + 1))
        super().__init__(rng, (np.float32, np.float64)[int(rng.integers(2))], opset=opset)
        self.operator = operator
        self.shape: Shape = ()

    def image(self, *shape: int) -> str:
        """State the shape of the image; return a tensor of that shape, with negative numbers in most cases."""
        self.shape = shape
        scale = self.pick([None, 2.0, 8.0])
        if scale is None:
            return "image"
        return self.one("Mul", self.one("Sub", "image", self.scalar(0.5)), self.scalar(scale))

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def flag(self) -> bool:
        return bool(self.rng.integers(2))

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def lengths(self, axes: int, high: int = 4) -> Shape:
        return tuple(self.integer(1, high) for _ in range(axes))

    def axis(self, axis: int, rank: int) -> int:
        """Return an axis of an image of `rank` axes as ONNX counts it, from either end."""
        return axis + 1 if self.flag() or self.opset < 11 else axis - rank

    def weights(self, *shape: int) -> str:
        return self.constant(np.round(self.rng.standard_normal(shape) * self.pick([0.3, 1.0, 10.0]), self.pick([1, 9])))

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, np.float64))

    def int64(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def float32(self, *numbers: float) -> str:
        name = self.name("c")
        self.constants.append(numpy_helper.from_array(np.array(numbers, np.float32), name))
        return name

    def some(self, **attributes: Any) -> dict[str, Any]:
        """Return some of the attributes; others keep their defaults."""
        return {name: value for name, value in attributes.items() if self.flag()}

    def since(self, operator: str = "") -> int:
        """Return the version of an operator in this opset."""
        return onnx.defs.get_schema(operator or self.operator, self.opset).since_version


Make = Callable[[Draft], str]
VARIANTS: dict[str, Make] = {}


def variant(operator: str, seed: int) -> Variant | None:
    """Return a graph of one operator; null where its opset does not have the operator."""
    draft = Draft(seed, operator)
    try:
        draft.since()
        result = VARIANTS[operator](draft)
    except onnx.defs.SchemaError:
        return None
    flat = draft.one("Flatten", result)
    draft.called(flat, "logits")
    proto = draft._proto({"image": draft.shape}, {"logits": (1,)}, draft.pick(["N", 2]))
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "K"
    proto.ir_version = min(8 if draft.opset < 19 else 10, 10)
    return Variant(proto.SerializeToString(), draft.shape, draft.dtype)


def makes(*operators: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        VARIANTS.update(dict.fromkeys(operators, make))
        return make

    return register


# --- elementwise ------------------------------------------------------------------------------------------------------

_ATTRIBUTES: dict[str, dict[str, Sequence[float | str]]] = {
    "Celu": {"alpha": (0.5, 2.0, 1e-3)},
    "Elu": {"alpha": (0.5, 2.0, -1.0, 0.0)},
    "Gelu": {"approximate": ("none", "tanh")},
    "HardSigmoid": {"alpha": (0.5, -2.0, 0.0), "beta": (0.1, -3.0, 1e3)},
    "LeakyRelu": {"alpha": (0.5, -2.0, 0.0, 30.0)},
    "Selu": {"alpha": (0.5, 2.0), "gamma": (0.5, -2.0)},
    "Swish": {"alpha": (1.0, 0.5, -2.0)},
    "ThresholdedRelu": {"alpha": (0.5, 2.0)},
}


@makes("Abs", "Erf", "HardSwish", "Identity", "Mish", "Neg", "Relu", "Sigmoid", "Softplus", "Softsign")
@makes("Tanh", *_ATTRIBUTES)
def _unary(g: Draft) -> str:
    attributes = {name: g.pick(values) for name, values in _ATTRIBUTES.get(g.operator, {}).items()}
    return g.one(g.operator, g.image(*g.lengths(g.integer(1, 3))), **g.some(**attributes))


@makes("Cast")
def _cast(g: Draft) -> str:
    return g.one("Cast", g.image(*g.lengths(2)), to=11 if g.dtype is np.float64 else 1)


@makes("Dropout")
def _dropout(g: Draft) -> str:
    x = g.image(*g.lengths(2))
    if g.since() < 12:
        return g.one("Dropout", x, **g.some(ratio=0.25))
    more = g.pick([[], [g.float32(0.25)], ["", g.constant(np.array(False))]])
    return g.one("Dropout", x, *more, **g.some(seed=3))


def _constant_beside(g: Draft, shape: Shape) -> np.ndarray:
    """Return a constant that broadcasts with a tensor, in either direction."""
    own = tuple(size if g.flag() else 1 for size in shape)
    if g.flag():
        own = own[g.integer(0, len(own)) :]
    elif g.flag():
        own = tuple(g.integer(1, 3) if size == 1 else size for size in shape)
    array = np.round(g.rng.standard_normal(own if len(own) < len(shape) else (1, *own)) * g.pick([1.0, 30.0]), 2)
    return array if g.flag() else array.reshape(own)


@makes("Add", "Sub", "Mul", "Div")
def _binary(g: Draft) -> str:
    shape = g.lengths(g.integer(1, 3))
    x = g.image(*shape)
    constant = _constant_beside(g, shape)
    if g.operator == "Div":
        return g.one("Div", x, g.constant(np.where(constant == 0.0, 0.3, constant)))
    if g.operator in ("Add", "Sub") and g.flag():
        other = g.one("ReduceMax", x, **_axes_attribute(g, "ReduceMax", [1])) if g.flag() else g.one("Relu", x)
        return g.one(g.operator, *g.pick([(x, other), (other, x)]))
    operands = [x, g.constant(constant)]
    return g.one(g.operator, *(operands if g.flag() else reversed(operands)))


def _axes_attribute(g: Draft, operator: str, axes: list[int]) -> dict[str, Any]:
    if onnx.defs.get_schema(operator, g.opset).since_version >= 18:
        raise onnx.defs.SchemaError
    return {"axes": axes}


@makes("Max", "Min", "Sum", "Mean")
def _variadic(g: Draft) -> str:
    shape = g.lengths(g.integer(1, 3))
    x = g.image(*shape)
    tensors = [x, g.one("Neg", x), g.one("Relu", x)][: g.integer(1, 3)]
    constants = [g.constant(_constant_beside(g, shape)) for _ in range(g.integer(0, 2))] if g.since() >= 8 else []
    operands = tensors + constants + ([x] if g.flag() else [])
    return g.one(g.operator, *(operands[int(k)] for k in g.rng.permutation(len(operands))))


@makes("PRelu")
def _prelu(g: Draft) -> str:
    shape = g.lengths(g.integer(1, 3))
    own = tuple(size if g.flag() else 1 for size in shape)[g.integer(0, len(shape)) :]
    return g.one("PRelu", g.image(*shape), g.weights(*own))


@makes("Clip")
def _clip(g: Draft) -> str:
    x = g.image(*g.lengths(2))
    low, high = g.pick([(0.25, 0.5), (0.5, 0.25), (-1.0, 1.0), (0.0, 6.0), (0.1, 0.1)])
    if g.since() < 11:
        return g.one("Clip", x, **g.some(min=low, max=high))
    return g.one("Clip", x, *g.pick([[], [g.scalar(low)], ["", g.scalar(high)], [g.scalar(low), g.scalar(high)]]))


@makes("Pow", "Sqrt", "Sign", "ReduceSumSquare")
def _roots(g: Draft) -> str:
    """Roots of sums of squares: the other squares have no proof."""
    x = g.image(*g.lengths(3))
    exponent = np.array(2.0) if g.flag() else np.full((1, 1), 2.0)
    square = g.pick(
        [
            lambda: g.one("Pow", x, g.constant(exponent)),
            lambda: g.one("Pow", x, g.int64(2)) if g.since("Pow") >= 12 else g.one("Mul", x, x),
            lambda: g.one("ReduceSumSquare", x, **_axes_attribute(g, "ReduceSumSquare", [g.integer(1, 3)])),
            lambda: g.one("ReduceSumSquare", x, g.int64(-1)) if g.opset >= 18 else g.one("Mul", x, x),
        ]
    )()
    if g.operator == "Sign" and g.since() >= 9:
        square = g.one("Mul", g.one("Sign", square), square)
    root = g.one("Sqrt", square) if g.operator == "Sqrt" or g.flag() else g.one("Pow", square, g.scalar(0.5))
    if g.operator == "Pow" and g.flag():
        return g.one("Pow", x, g.scalar(1.0))
    return root


# --- linear maps ------------------------------------------------------------------------------------------------------


@makes("Gemm")
def _gemm(g: Draft) -> str:
    n, m = g.integer(1, 9), g.integer(1, 5)
    x, transposed = g.image(n), g.integer(0, 1)
    weight = g.weights(m, n) if transposed else g.weights(n, m)
    biases = [(m,), (1, m), (1,), (1, 1), ()]
    bias = [g.weights(*g.pick(biases))] if g.flag() or g.since() < 11 else []
    factors = g.some(alpha=g.pick([0.5, -2.0, 0.1, 0.0, 30.0]), beta=g.pick([0.5, -3.0, 0.0, 0.1]), transA=0)
    return g.one("Gemm", x, weight, *bias, **factors, **({"transB": transposed} if transposed or g.flag() else {}))


@makes("MatMul")
def _matmul(g: Draft) -> str:
    shape = g.lengths(g.integer(1, 3), 5)
    x = g.image(*shape)
    if len(shape) > 1 and g.flag():
        return g.one("MatMul", g.weights(g.integer(1, 4), shape[-2]), x)
    return g.one("MatMul", x, g.weights(shape[-1], g.integer(1, 4)))


def _window(g: Draft, size: Sequence[int], kernel: Sequence[int], dilated: bool = True) -> dict[str, Any]:
    axes = len(size)
    found = g.some(strides=[g.integer(1, 3) for _ in range(axes)])
    if dilated:
        found |= g.some(dilations=[g.integer(1, 2) for _ in range(axes)])
    if g.integer(0, 2):
        return found | g.some(pads=[g.integer(0, 2) for _ in range(2 * axes)])
    return found | {"auto_pad": g.pick(["VALID", "SAME_UPPER", "SAME_LOWER", "NOTSET"])}


@makes("Conv")
def _conv(g: Draft) -> str:
    axes, group = g.integer(1, 2), g.pick([1, 1, 2])
    size, kernel = g.lengths(axes, 6), g.lengths(axes, 3)
    channels, out = g.integer(1, 2), g.integer(1, 2)
    x = g.image(channels * group, *size)
    bias = [g.weights(out * group)] if g.flag() else []
    attributes = _window(g, size, kernel) | g.some(kernel_shape=list(kernel))
    if group > 1:
        attributes["group"] = group
    return g.one("Conv", x, g.weights(out * group, channels, *kernel), *bias, **attributes)


@makes("ConvTranspose")
def _conv_transpose(g: Draft) -> str:
    axes, group = g.integer(1, 2), g.pick([1, 1, 2])
    size, kernel = g.lengths(axes, 3), g.lengths(axes, 3)
    channels, out = g.integer(1, 2), g.integer(1, 2)
    x = g.image(channels * group, *size)
    bias = [g.weights(out * group)] if g.flag() else []
    strides = [g.integer(1, 3) for _ in range(axes)]
    attributes = {
        "strides": strides,
        **g.some(
            dilations=[g.integer(1, 2) for _ in range(axes)],
            kernel_shape=list(kernel),
            output_padding=[g.integer(0, s - 1) for s in strides],
            pads=[g.integer(0, 1) for _ in range(2 * axes)],
        ),
    }
    if group > 1:
        attributes["group"] = group
    return g.one("ConvTranspose", x, g.weights(channels * group, out, *kernel), *bias, **attributes)


@makes("BatchNormalization")
def _batch_normalization(g: Draft) -> str:
    shape = g.lengths(g.integer(1, 3))
    x = g.image(*shape)
    variance = g.constant(np.abs(g.rng.standard_normal(shape[0])) + g.pick([0.0, 1e-3]))
    attributes = g.some(epsilon=g.pick([1e-3, 0.5]), momentum=0.5)
    if g.since() < 9:
        attributes |= g.some(spatial=1)
    elif g.since() >= 14:
        attributes |= g.some(training_mode=0)
    return g.one("BatchNormalization", x, *(g.weights(shape[0]) for _ in range(3)), variance, **attributes)


# --- windows ----------------------------------------------------------------------------------------------------------


@makes("MaxPool", "AveragePool", "LpPool")
def _pool(g: Draft) -> str:
    axes = g.integer(1, 2)
    size, kernel = g.lengths(axes, 7), g.lengths(axes, 3)
    x = g.image(g.integer(1, 2), *size)
    dilated_since = {"MaxPool": 10, "AveragePool": 19, "LpPool": 18}[g.operator]
    ceiled_since = {"MaxPool": 10, "AveragePool": 10, "LpPool": 18}[g.operator]
    attributes = _window(g, size, kernel, g.opset >= dilated_since)
    if g.opset >= ceiled_since:
        attributes |= g.some(ceil_mode=g.integer(0, 1))
    if g.operator == "AveragePool":
        attributes |= g.some(count_include_pad=g.integer(0, 1))
    elif g.operator == "LpPool":
        attributes |= g.some(p=g.pick([2, 2, 2, 1]))
    elif g.opset >= 8:
        attributes |= g.some(storage_order=g.integer(0, 1))
    return g.one(g.operator, x, kernel_shape=list(kernel), **attributes)


@makes("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(g: Draft) -> str:
    return g.one(g.operator, g.image(*g.lengths(g.integer(2, 3))))


@makes("GlobalLpPool")
def _global_norm(g: Draft) -> str:
    return g.one("GlobalLpPool", g.image(*g.lengths(g.integer(2, 3))), **g.some(p=2))


@makes("Resize")
def _resize(g: Draft) -> str:
    axes = g.integer(1, 2)
    size = g.lengths(axes, 5)
    channels = g.integer(1, 2)
    x = g.image(channels, *size)
    attributes: dict[str, Any] = g.some(mode=g.pick(["nearest", "nearest", "linear"]))
    scales = [g.pick([1.0, 2.0, 3.0, 0.5, 1.5, 0.75, 0.4]) for _ in size]
    if g.since() < 11:
        return g.one("Resize", x, g.float32(1.0, 1.0, *scales), **attributes)
    how = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "tf_half_pixel_for_nn"]
    attributes |= g.some(
        coordinate_transformation_mode=g.pick(how),
        nearest_mode=g.pick(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    )
    roi = "" if g.since() >= 13 else g.float32()
    if g.flag():
        named = g.since() >= 18 and g.flag()
        if named:
            attributes["axes"] = [g.axis(1 + k, axes + 1) for k in range(axes)]
        return g.one("Resize", x, roi, g.float32(*([] if named else [1.0, 1.0]), *scales), **attributes)
    after = [g.integer(1, 7) for _ in size]
    if g.since() >= 18:
        attributes["axes"] = [2 + k for k in range(axes)]
        return g.one("Resize", x, roi, "", g.int64(*after), **attributes)
    # The batch axis has no length of its own: it is copied from the shape.
    batch = g.one("Slice", g.one("Shape", x), *(g.int64(n) for n in (0, 1, 0)))
    sizes = g.one("Concat", batch, g.int64(channels, *after), axis=0)
    return g.one("Resize", x, roi, g.float32() if g.since() < 13 else "", sizes, **attributes)


@makes("Upsample")
def _upsample(g: Draft) -> str:
    g.opset = g.integer(7, 9)
    size = g.lengths(2, 4)
    x = g.image(g.integer(1, 2), *size)
    scales = [1.0, 1.0, *(g.pick([1.0, 2.0, 3.0, 1.5]) for _ in size)]
    attributes = g.some(mode=g.pick(["nearest", "linear"]))
    if g.opset < 9:
        return g.one("Upsample", x, scales=scales, **attributes)
    return g.one("Upsample", x, g.float32(*scales), **attributes)


# --- along axes -------------------------------------------------------------------------------------------------------


@makes("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
def _reduce(g: Draft) -> str:
    rank = g.integer(1, 3)
    x = g.image(*g.lengths(rank))
    count = g.integer(1, rank)
    axes = [g.axis(int(axis), rank) for axis in g.rng.permutation(rank)[:count]]
    attributes = g.some(keepdims=g.integer(0, 1))
    if g.since() >= (13 if g.operator == "ReduceSum" else 18):
        return g.one(g.operator, x, g.int64(*axes), **attributes, **g.some(noop_with_empty_axes=g.integer(0, 1)))
    return g.one(g.operator, x, axes=axes, **attributes)


@makes("TopK")
def _top_k(g: Draft) -> str:
    rank = g.integer(1, 3)
    shape = g.lengths(rank, 5)
    x, axis = g.image(*shape), g.integer(0, rank - 1)
    k = g.integer(1, shape[axis])
    attributes: dict[str, Any] = {} if axis == rank - 1 and g.flag() else {"axis": g.axis(axis, rank)}
    if g.since() >= 11:
        attributes |= g.some(largest=g.integer(0, 1), sorted=1)
    operands = [x] if g.since() < 10 else [x, g.int64(k)]
    return g.add("TopK", *operands, outputs=2, **attributes, **({"k": k} if g.since() < 10 else {}))[0]


@makes("Softmax", "LogSoftmax")
def _softmax(g: Draft) -> str:
    rank = g.integer(1, 3)
    return g.one(g.operator, g.image(*g.lengths(rank)), **g.some(axis=g.axis(g.integer(0, rank - 1), rank)))


# --- moves ------------------------------------------------------------------------------------------------------------


@makes("Flatten")
def _flatten(g: Draft) -> str:
    rank = g.integer(0, 3)
    x = g.image(*g.lengths(rank))
    return g.one("Flatten", x, **g.some(axis=g.pick([1, 1, -rank]) if g.since() >= 11 else 1))


@makes("Reshape")
def _reshape(g: Draft) -> str:
    shape = (2 * g.integer(1, 2), g.integer(1, 3), g.integer(1, 3))
    x = g.image(*shape)
    total = math.prod(shape)
    target = g.pick(
        [
            [0, -1],
            [-1, total],
            [0, 0, -1],
            [0, 2, -1],
            [-1, *reversed(shape)],
            [0, total // 2, 2],
            [0, 1, -1, 1],
            [0, 0, 0, 0],
            [0, 2, total // 2],
        ]
    )
    return g.one("Reshape", x, g.int64(*target), **(g.some(allowzero=0) if g.since() >= 14 else {}))


@makes("Squeeze", "Unsqueeze")
def _squeeze(g: Draft) -> str:
    rank = g.integer(1, 3)
    x = g.image(*g.lengths(rank))
    places = [int(place) for place in sorted(g.rng.permutation(rank + 2)[: g.integer(1, 2)])]
    total = rank + 1 + len(places)
    axes = [place + 1 if g.flag() or g.opset < 11 else place + 1 - total for place in places if place + 1 < total]
    if not axes:
        axes = [1]
    make = g.opset >= 13
    wide = g.one("Unsqueeze", x, g.int64(*axes)) if make else g.one("Unsqueeze", x, axes=axes)
    if g.operator == "Unsqueeze":
        return wide
    axes.reverse()
    return g.one("Squeeze", wide, g.int64(*axes)) if make else g.one("Squeeze", wide, axes=axes)


@makes("Transpose")
def _transpose(g: Draft) -> str:
    rank = g.integer(1, 4)
    return g.one("Transpose", g.image(*g.lengths(rank, 3)), perm=[0, *(int(k) + 1 for k in g.rng.permutation(rank))])


@makes("Split")
def _split(g: Draft) -> str:
    rank = g.integer(1, 3)
    shape = g.lengths(rank, 6)
    x, axis = g.image(*shape), g.integer(0, rank - 1)
    n, count = shape[axis], g.integer(1, 3)
    attributes: dict[str, Any] = {"axis": g.axis(axis, rank)}
    operands = [x]
    if g.flag() and n >= count:
        cuts = sorted(int(k) + 1 for k in g.rng.permutation(n - 1)[: count - 1])
        sizes = [high - low for low, high in zip([0, *cuts], [*cuts, n], strict=True)]
        if g.since() < 13:
            attributes["split"] = sizes
        else:
            operands.append(g.int64(*sizes))
    elif g.since() >= 18:
        attributes["num_outputs"] = count
    parts = g.add("Split", *operands, outputs=count, **attributes)
    return g.one("Concat", *reversed(parts), axis=axis + 1) if g.flag() else parts[g.integer(0, count - 1)]


@makes("Slice")
def _slice(g: Draft) -> str:
    rank = g.integer(1, 3)
    shape = g.lengths(rank, 6)
    x = g.image(*shape)
    axes = [int(axis) for axis in g.rng.permutation(rank)[: g.integer(1, rank)]]
    bounds = [-(2**63), -(2**63) + 1, -(2**31), -3, -2, -1, 0, 1, 2, 3, 2**31 - 1, 2**63 - 1]
    starts, ends = ([g.pick(bounds) for _ in axes] for _ in range(2))
    named = [g.axis(axis, rank) for axis in axes]
    if g.since() < 10:
        return g.one("Slice", x, starts=starts, ends=ends, axes=named)
    steps = [g.int64(*(g.pick([1, 1, 2, 3, -1, -2, 2**63 - 1]) for _ in axes))] if g.flag() else []
    return g.one("Slice", x, g.int64(*starts), g.int64(*ends), g.int64(*named), *steps)


@makes("Gather")
def _gather(g: Draft) -> str:
    rank = g.integer(1, 3)
    shape = g.lengths(rank)
    x, axis = g.image(*shape), g.integer(0, rank - 1)
    n = shape[axis]
    where = g.rng.integers(-n if g.since() >= 11 else 0, n, g.pick([(), (1,), (3,), (2, 2)]))
    positions = g.constant(where.astype(g.pick([np.int32, np.int64])))
    return g.one("Gather", x, positions, axis=g.axis(axis, rank))


@makes("Concat")
def _concat(g: Draft) -> str:
    rank = g.integer(1, 3)
    shape = g.lengths(rank)
    x, axis = g.image(*shape), g.integer(0, rank - 1)
    parts = [x, g.one("Neg", x), x][: g.integer(1, 3)]
    return g.one("Concat", *(parts[int(k)] for k in g.rng.permutation(len(parts))), axis=g.axis(axis, rank))


@makes("Pad")
def _pad(g: Draft) -> str:
    rank = g.integer(1, 3)
    shape = g.lengths(rank, 4)
    x = g.image(*shape)
    modes = ["constant", "constant", "reflect", "edge", "wrap"][: 5 if g.opset >= 19 else 4]
    attributes = g.some(mode=g.pick(modes))
    most = 3 if attributes.get("mode", "constant") in ("constant", "edge") else min(shape)
    sizes = [[g.integer(0, most) for _ in range(rank)] for _ in range(2)]
    pads = [0, *sizes[0], 0, *sizes[1]]
    if g.since() < 11:
        return g.one("Pad", x, pads=pads, **attributes, **g.some(value=0.3))
    value = g.pick(["", g.scalar(0.7)])
    if g.since() >= 18 and g.flag():
        axes = g.int64(*(g.axis(axis, rank) for axis in range(rank)))
        return g.one("Pad", x, g.int64(*sizes[0], *sizes[1]), value, axes, **attributes)
    return g.one("Pad", x, g.int64(*pads), *([value] if value else []), **attributes)


@makes("Expand")
def _expand(g: Draft) -> str:
    rank = g.integer(1, 3)
    shape = g.lengths(rank, 2)
    target = [g.pick([1, n]) if n > 1 else g.integer(1, 3) for n in shape]
    return g.one("Expand", g.image(*shape), g.int64(*g.pick([[1, *target], target])))


@makes("Tile")
def _tile(g: Draft) -> str:
    rank = g.integer(1, 3)
    return g.one("Tile", g.image(*g.lengths(rank, 3)), g.int64(1, *g.lengths(rank, 3)))


@makes("Where")
def _where(g: Draft) -> str:
    shape = g.lengths(g.integer(1, 3))
    x = g.image(*shape)
    own = tuple(size if g.flag() else 1 for size in shape)[g.integer(0, len(shape)) :]
    mask = g.constant(g.rng.integers(0, 2, own).astype(bool))
    other = g.pick([lambda: g.constant(_constant_beside(g, shape)), lambda: g.one("Neg", x), lambda: x])()
    return g.one("Where", mask, *g.pick([(x, other), (other, x)]))


@makes("SpaceToDepth")
def _space_to_depth(g: Draft) -> str:
    block = g.integer(1, 3)
    return g.one("SpaceToDepth", g.image(g.integer(1, 2), *(block * n for n in g.lengths(2, 2))), blocksize=block)


@makes("DepthToSpace")
def _depth_to_space(g: Draft) -> str:
    block = g.integer(1, 3)
    mode = g.some(mode=g.pick(["DCR", "CRD"])) if g.since() >= 11 else {}
    return g.one("DepthToSpace", g.image(g.integer(1, 2) * block**2, *g.lengths(2, 2)), blocksize=block, **mode)
