"""Random ONNX graphs of certified operators: each attribute and mode, in the arrangements that proofs may trip over.

A graph is built from choices. They come from hypothesis (`graphs`), so that a failure shrinks, or from a seed
(`seeded_graph`), so that a long run and a search among fixed seeds make the same graphs everywhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx
from exact_graphs import exact_logits
from graph_builder import GraphBuilder
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

__all__ = ["Graph", "GraphBuilder", "exact_logits", "graphs", "seeded_graph"]

T = TypeVar("T")
Shape = tuple[int, ...]
MOST_ELEMENTS = 72
"""Of one tensor: beyond, exact arithmetic is slow."""


# --- choices ----------------------------------------------------------------------------------------------------------


class Choices(Protocol):
    """Where the decisions come from."""

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        ...


class SeededChoices:
    """Decisions from a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high, endpoint=True))


class DrawnChoices:
    """Decisions from hypothesis: smaller ones and earlier ones are simpler."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))


@dataclass(frozen=True)
class Graph:
    """A model, its format, and the shape of its image."""

    model: bytes
    shape: Shape
    dtype: type
    operators: tuple[str, ...]
    batch: int | None = None
    """Images in a batch, where the graph runs with that number alone."""

    def __repr__(self) -> str:
        model = onnx.load_model_from_string(self.model)
        weights = {t.name: numpy_helper.to_array(t).tolist() for t in model.graph.initializer}
        return f"Graph({self.shape}, {self.dtype.__name__})\n{onnx.printer.to_text(model)}\n{weights}"


Named = tuple[str, Shape]


class Maker(GraphBuilder):
    """A graph in the making."""

    def __init__(self, choices: Choices, dtype: type) -> None:
        # Pad with mode wrap, and dilated average pools, begin with opset 19.
        super().__init__(np.random.default_rng(0), dtype, opset=19)
        self._choices = choices
        self.made: list[Named] = []
        self.batch: int | None = None

    def integer(self, low: int, high: int) -> int:
        return self._choices.integer(low, max(low, high))

    def integers(self, count: int, low: int, high: int) -> list[int]:
        return [self.integer(low, high) for _ in range(count)]

    def flag(self) -> bool:
        return bool(self.integer(0, 1))

    def rarely(self) -> bool:
        return self.integer(0, 7) == 7

    def pick(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def permutation(self, n: int) -> list[int]:
        left = list(range(n))
        return [left.pop(self.integer(0, len(left) - 1)) for _ in range(n)]

    def weights(self, *shape: int) -> np.ndarray:
        """Adversarial matrices and kernels: the first axis counts as rows, the others as columns."""
        kind = self.pick(WEIGHTS)
        rng = np.random.default_rng(self.integer(0, 999_999))
        rows, columns = (shape[0] if shape else 1), int(np.prod(shape[1:]))
        normal = rng.standard_normal((rows, columns))
        if kind == "equal":
            made = np.full((rows, columns), rng.choice([1.0, -0.5, 0.1, 1 / 3]))
        elif kind == "rank one":
            made = np.outer(normal[:, 0], rng.standard_normal(columns))
        elif kind == "orthogonal":
            tall = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))[0]
            made = tall if rows >= columns else tall.T
        elif kind == "nearly orthogonal":
            # Singular values so near to each other that a few steps of power iteration tell them not apart.
            tall = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))[0]
            made = (tall if rows >= columns else tall.T) * (1.0 + 0.03 * rng.standard_normal(columns))
        elif kind == "integers":
            made = rng.integers(-2, 3, (rows, columns)).astype(np.float64)
        elif kind == "zeros":
            made = np.where(rng.random((rows, columns)) < 0.7, 0.0, normal)
        elif kind == "huge":
            made = normal * 10.0 ** rng.integers(2, 9)
        elif kind == "tiny":
            made = normal * 10.0 ** -rng.integers(2, 9)
        elif kind == "ragged":
            made = normal * 10.0 ** rng.integers(-4, 5, (rows, 1))
        else:
            made = normal * rng.choice([0.3, 1.0, 3.0])
        return made.reshape(shape)

    def offsets(self, *shape: int) -> np.ndarray:
        """Biases, huge ones among them."""
        size = self.pick([1.0, 0.1, 0.5, 1e3, 1e6])
        rng = np.random.default_rng(self.integer(0, 999_999))
        return size * rng.standard_normal(shape) if self.flag() else size * rng.integers(-1, 2, shape)

    def numbers(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, dtype=np.int64))

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, dtype=np.float64))

    def reshaped(self, x: str, shape: Sequence[int]) -> Named:
        return self.one("Reshape", x, self.numbers(0, *shape)), tuple(shape)

    def flat(self, x: str, shape: Shape) -> Named:
        return self.one("Flatten", x, axis=1), (math.prod(shape),)


WEIGHTS = (
    *("normal", "equal", "integers", "rank one", "orthogonal", "nearly orthogonal"),
    *("zeros", "huge", "tiny", "ragged"),
)
Step = Callable[[Maker, str, Shape], Named]


# --- linear maps ------------------------------------------------------------------------------------------------------


def dense(g: Maker, x: str, shape: Shape) -> Named:
    m = g.integer(1, 7)
    if len(shape) == 1:
        if g.flag():
            transposed = g.integer(0, 1)
            weight = g.weights(m, shape[0])
            bias = [g.constant(g.offsets(*g.pick([(m,), (1, m), (1,)])))] if g.flag() else []
            factors = {"alpha": g.pick([1.0, -2.0, 0.3]), "beta": g.pick([1.0, 0.1])} if g.rarely() else {}
            weight = weight if transposed else weight.T
            return g.one("Gemm", x, g.constant(weight), *bias, transB=transposed, **factors), (m,)
        return g.one("MatMul", x, g.constant(g.weights(m, shape[0]).T)), (m,)
    if g.flag():
        return g.one("MatMul", x, g.constant(g.weights(m, shape[-1]).T)), (*shape[:-1], m)
    return g.one("MatMul", g.constant(g.weights(m, shape[-2])), x), (*shape[:-2], m, shape[-1])


def with_constant(g: Maker, x: str, shape: Shape) -> Named:
    operator = g.pick(["Add", "Sub", "Mul", "Div"])
    own = tuple(size if g.flag() else 1 for size in shape)
    kind = g.integer(0, 4)
    if kind == 1:
        own = own[g.integer(0, len(own)) :]
    elif kind == 2:
        own = (1, *own)
    elif kind == 3:
        own = tuple(g.integer(1, 3) if size == 1 else size for size in shape)
    values = g.offsets(*own) if operator in ("Add", "Sub") else g.weights(*own)
    if operator == "Div":
        values = np.where(values < 0, -1.0, 1.0) * (np.abs(values) + g.pick([0.25, 1.0, 1e-3]))
    operands = [x, g.constant(values)]
    if operator != "Div" and g.flag():
        operands.reverse()
    after = np.broadcast_shapes(shape, own[1:] if kind == 2 else own)
    return g.one(operator, *operands), after


def number(g: Maker, x: str, shape: Shape) -> Named:
    """Times, divided by or plus one number; or signs."""
    operator = g.pick(["Mul", "Div", "Add", "Sub"])
    if g.flag():
        signs = np.array([g.pick([1.0, -1.0]) for _ in range(shape[-1])])
        return g.one(operator, x, g.constant(signs)), shape
    value = g.pick([2.0, -1.0, 0.5, 1.0, 0.3, -3.0, 1e-3, 1e3])
    return g.one(operator, x, g.scalar(value)), shape


def image_of(g: Maker, x: str, shape: Shape, most: int = 2) -> Named:
    """Any tensor as channels and spatial axes: one or two, or as many as it has, up to `most`."""
    if 2 <= len(shape) <= most + 1:
        return x, shape
    if len(shape) > 3:
        return g.reshaped(x, (shape[0], shape[1], math.prod(shape[2:])))
    (n,) = shape
    channels = g.pick([c for c in (1, 2, 3, 4) if n % c == 0])
    rest = n // channels
    height = g.pick([h for h in range(1, rest + 1) if rest % h == 0])
    return g.reshaped(x, g.pick([(channels, rest), (channels, height, rest // height)]))


def conv(g: Maker, x: str, shape: Shape) -> Named:
    x, shape = image_of(g, x, shape, 3)
    channels, *size = shape
    if g.rarely():
        # A convolution that changes nothing but where the image ends.
        pads = g.integers(2 * len(size), 0, 1)
        kernel = np.ones((channels, 1, *[1] * len(size)))
        after = [n + pads[a] + pads[a + len(size)] for a, n in enumerate(size)]
        return g.one("Conv", x, g.constant(kernel), group=channels, pads=pads), (channels, *after)
    groups = g.pick([n for n in (1, 2, 3, 4) if channels % n == 0])
    out = groups * g.integer(1, 3)
    kernel = [g.integer(1, min(n, 3)) for n in size]
    strides = g.integers(len(size), 1, 3)
    dilations = [1 if n < 2 * k - 1 else g.integer(1, 2) for n, k in zip(size, kernel, strict=True)]
    weight = g.constant(g.weights(out, channels // groups, *kernel))
    bias = [g.constant(g.offsets(out))] if g.flag() else []
    common = {"group": groups, "strides": strides, "dilations": dilations, "kernel_shape": kernel}
    if g.rarely() and max(dilations) == 1:
        # ONNX Runtime has no dilation with automatic padding.
        mode = g.pick(["SAME_UPPER", "SAME_LOWER", "VALID"])
        slack = [k - 1 if mode == "VALID" else 0 for k in kernel]
        after = [-(-(n - less) // s) for n, s, less in zip(size, strides, slack, strict=True)]
        return g.one("Conv", x, weight, *bias, auto_pad=mode, **common), (out, *after)
    pads = g.integers(2 * len(size), 0, 2)
    after = windows_of(size, kernel, strides, dilations, pads)
    return g.one("Conv", x, weight, *bias, pads=pads, **common), (out, *after)


def windows_of(
    size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int]
) -> list[int]:
    return [
        (n + pads[a] + pads[a + len(size)] - ((k - 1) * d + 1)) // s + 1
        for a, (n, k, s, d) in enumerate(zip(size, kernel, strides, dilations, strict=True))
    ]


def same_conv(g: Maker, x: str, shape: Shape) -> Named:
    """A convolution that keeps the shape."""
    x, shape = image_of(g, x, shape, 3)
    channels, *size = shape
    kernel = [g.pick([1, 2, 3]) for _ in size]
    groups = g.pick([1, channels])
    low = [g.integer(0, k - 1) for k in kernel]
    pads = low + [k - 1 - p for k, p in zip(kernel, low, strict=True)]
    weight = g.weights(channels, channels // groups, *kernel)
    return g.one("Conv", x, g.constant(weight), pads=pads, group=groups), shape


def periodic_conv(g: Maker, x: str, shape: Shape) -> Named:
    """A convolution behind padding that repeats pixels; strides that do and do not divide the size."""
    x, shape = image_of(g, x, shape)
    channels, *size = shape
    kernel = [g.integer(1, min(3, n + 1)) for n in size]
    mode = g.pick(["wrap", "reflect", "edge"])
    most = [n - 1 if mode == "reflect" else n for n in size]
    low = [g.integer(0, min(k, m)) for k, m in zip(kernel, most, strict=True)]
    high = [
        min(m, max(0, k - 1 - p + (g.integer(-1, 2) if g.rarely() else 0)))
        for k, p, m in zip(kernel, low, most, strict=True)
    ]
    widths = [0, 0, *low, 0, 0, *high]
    padded = g.one("Pad", x, g.numbers(*widths), mode=mode)
    wide = [n + p + q for n, p, q in zip(size, low, high, strict=True)]
    kernel = [min(k, n) for k, n in zip(kernel, wide, strict=True)]
    strides = g.integers(len(size), 1, 3)
    groups = g.pick([1, channels])
    out = groups * g.integer(1, 2)
    weight = g.constant(g.weights(out, channels // groups, *kernel))
    ones = [1] * len(size)
    after = windows_of(wide, kernel, strides, ones, [0] * (2 * len(size)))
    return g.one("Conv", padded, weight, strides=strides, group=groups), (out, *after)


def conv_transpose(g: Maker, x: str, shape: Shape) -> Named:
    x, shape = image_of(g, x, shape, 3)
    channels, *size = shape
    groups = g.pick([n for n in (1, 2) if channels % n == 0])
    per_group = g.integer(1, 2)
    kernel, strides = g.integers(len(size), 1, 3), g.integers(len(size), 1, 2)
    extra = [g.integer(0, s - 1) for s in strides]
    dilations = [g.integer(1, 2) if g.rarely() else 1 for _ in size]
    pads = g.integers(2 * len(size), 0, 1)
    after = [
        (n - 1) * s + (k - 1) * d + 1 - pads[a] - pads[a + len(size)] + e
        for a, (n, s, k, d, e) in enumerate(zip(size, strides, kernel, dilations, extra, strict=True))
    ]
    if min(after) < 1:
        return x, shape
    weight = g.constant(g.weights(channels, per_group, *kernel))
    bias = [g.constant(g.offsets(groups * per_group))] if g.flag() else []
    attributes = {"group": groups, "strides": strides, "pads": pads, "output_padding": extra, "dilations": dilations}
    return g.one("ConvTranspose", x, weight, *bias, **attributes), (groups * per_group, *after)


def pool(g: Maker, x: str, shape: Shape) -> Named:
    x, shape = image_of(g, x, shape, 3)
    channels, *size = shape
    operator = g.pick(["MaxPool", "AveragePool", "AveragePool", "LpPool"])
    kernel = [g.integer(1, min(n, 3)) for n in size]
    strides = g.integers(len(size), 1, 3)
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    if operator == "AveragePool":
        attributes["count_include_pad"] = g.integer(0, 1)
    if operator == "LpPool":
        attributes["p"] = 2
    # ONNX Runtime would take negative pads where windows lie apart.
    if g.rarely() and all(s <= k for s, k in zip(strides, kernel, strict=True)):
        attributes["auto_pad"] = g.pick(["SAME_UPPER", "SAME_LOWER"])
        return g.one(operator, x, **attributes), (channels, *(-(-n // s) for n, s in zip(size, strides, strict=True)))
    dilations = [1] * len(size)
    if operator == "MaxPool":
        dilations = [1 if n < 2 * k - 1 else g.integer(1, 2) for n, k in zip(size, kernel, strict=True)]
        attributes["dilations"] = dilations
    pads = [g.integer(0, k - 1) for k in (*kernel, *kernel)]
    after = windows_of(size, kernel, strides, dilations, pads)
    return g.one(operator, x, pads=pads, **attributes), (channels, *after)


def volume(g: Maker, x: str, shape: Shape) -> Named:
    """Convolutions and pools of three spatial axes."""
    x, (n,) = g.flat(x, shape)
    sides: list[int] = []
    for _ in range(3):
        rest = n // math.prod(sides)
        sides.append(g.pick([k for k in range(1, min(rest, 4) + 1) if rest % k == 0]))
    x, shape = g.reshaped(x, (n // math.prod(sides), *sides))
    if g.rarely():
        return g.one("GlobalLpPool", x, **({} if g.flag() else {"p": 2})), (shape[0], 1, 1, 1)
    return g.pick([conv, same_conv, conv_transpose, pool, pool])(g, x, shape)


def batch_normalization(g: Maker, x: str, shape: Shape) -> Named:
    x, shape = image_of(g, x, shape)
    channels = shape[0]
    scale, bias, mean = g.weights(channels), g.offsets(channels), g.offsets(channels)
    # A variance far below epsilon, too.
    variance = np.array([g.pick([1.0, 0.01, 1e-5, 4.0]) for _ in range(channels)])
    epsilon = g.pick([1e-3, 1e-5, 0.1])
    parameters = [g.constant(values) for values in (scale, bias, mean, variance)]
    return g.one("BatchNormalization", x, *parameters, epsilon=epsilon), shape


def im2col(g: Maker, x: str, shape: Shape) -> Named:
    """Overlapping windows gathered, then weighed."""
    x, shape = g.flat(x, shape)
    n = shape[0]
    width = g.integer(1, min(n, 4))
    step = g.integer(1, width)
    starts = range(0, n - width + 1, step)
    places = [[start + k for k in range(width)] for start in starts]
    gathered = g.one("Gather", x, g.constant(np.array(places, dtype=np.int64)), axis=1)
    m = g.integer(1, 3)
    return g.one("MatMul", gathered, g.constant(g.weights(m, width).T)), (len(places), m)


# --- elementwise ------------------------------------------------------------------------------------------------------

SMOOTH = ("Elu", "Selu", "Celu", "Softplus", "Softsign", "Sigmoid", "Tanh", "Erf", "HardSigmoid", "HardSwish")


def activation(g: Maker, x: str, shape: Shape) -> Named:
    """With slopes of at least 0, mostly."""
    operator = g.pick(["Relu", "Relu", "LeakyRelu", "PRelu", *SMOOTH])
    if operator == "LeakyRelu":
        return g.one(operator, x, alpha=g.pick([0.25, 0.01, 2.0, -0.5, 1.0])), shape
    if operator == "PRelu":
        below = g.pick([(), (1,), shape, shape[-1:], (shape[0], *[1] * (len(shape) - 1))])
        return g.one(operator, x, g.constant(g.weights(*below))), shape
    if operator in ("Elu", "Celu"):
        alpha = g.pick([1.0, 0.5, 2.0, -0.5])
        return g.one(operator, x, alpha=abs(alpha) if operator == "Celu" else alpha), shape
    if operator == "Selu" and g.flag():
        return g.one(operator, x, alpha=g.pick([1.0, 3.0, -1.0]), gamma=g.pick([1.0, 0.5, -1.0])), shape
    if operator == "HardSigmoid" and g.flag():
        return g.one(operator, x, alpha=g.pick([0.5, 2.0, -1.0]), beta=g.pick([0.5, -1.0])), shape
    return g.one(operator, x), shape


def gated(g: Maker, x: str, shape: Shape) -> Named:
    """Products of two tensors: activations as exporters write them out, gates of channels, and others."""
    kind = g.integer(0, 9)
    if g.rarely():
        # The same function, with rounding errors.
        x = g.one("Sub", g.one("Add", x, g.scalar(1e4)), g.scalar(1e4))
    if kind == 0:
        factors = [x, g.one("Sigmoid", x)]
    elif kind == 1:
        inner = g.one(g.pick(["Div", "Mul"]), x, g.scalar(g.pick([math.sqrt(2.0), -0.5, 1.0])))
        whole = g.one("Add", g.scalar(g.pick([1.0, 0.25])), g.one(g.pick(["Erf", "Tanh"]), inner))
        factors = [g.one("Mul", x, g.scalar(0.5)), whole]
    elif kind == 2:
        factors = [g.one("Tanh", g.one("Softplus", x)), x]
    elif kind == 3:
        shifted = g.one("Clip", g.one("Add", x, g.scalar(3.0)), g.scalar(0.0), g.scalar(6.0))
        factors = [x, g.one("Div", shifted, g.scalar(6.0)) if g.flag() else g.one("HardSigmoid", x)]
    elif kind == 4:
        # Cubes, as they are and as exporters write them.
        square = g.pick([g.one("Mul", x, x), g.one("Pow", x, g.scalar(2.0))])
        cube = g.one("Mul", *((square, x) if g.flag() else (x, square)))
        factors = [x, g.one("Tanh", g.one("Add", x, g.one("Mul", cube, g.scalar(0.044715))))]
    elif kind == 5:
        # Two functions of one tensor whose elements lie elsewhere in the other: no function of one number.
        order = g.numbers(*g.permutation(shape[-1]))
        factors = [x, g.one("Sigmoid", g.one("Gather", x, order, axis=len(shape)))]
    elif kind == 6:
        mean = g.one("ReduceMean", x, g.numbers(len(shape)), keepdims=1)
        factors = [x, g.one(g.pick(["Sigmoid", "Tanh", "Neg"]), mean)]
    elif kind == 7:
        same = [name for name, other in g.made if other == shape] + [x]
        factors = [g.one("Sub", g.pick(same), g.scalar(g.pick([0.5, 3.0]))), g.one("Relu", x)]
    elif kind == 8:
        factors = [g.one("Sub", g.scalar(1.0), x), g.one("Neg", g.one("Mul", x, g.one("Sigmoid", x)))]
    else:
        own = tuple(size if g.flag() else 1 for size in shape)
        factors = [g.one("Mul", x, g.constant(g.offsets(*own))), g.one("Sigmoid", x)]
    made = g.one("Mul", *factors)
    if g.rarely():
        made = g.one(g.pick(["Add", "Sub"]), made, g.one("Mul", x, g.scalar(0.5)))
    return made, shape


def pointwise(g: Maker, x: str, shape: Shape) -> Named:
    operator = g.pick(["Relu", "Abs", "Neg", "Clip", "Max", "Min", "Identity", "Dropout", "Cast"])
    if operator == "Clip":
        limits = [g.scalar(-0.5), g.scalar(0.75)]
        return g.one(operator, x, *g.pick([limits, limits[:1], ["", limits[1]]])), shape
    if operator in ("Max", "Min"):
        own = tuple(size if g.flag() else 1 for size in shape)
        operands = [x, g.constant(g.offsets(*own))]
        return g.one(operator, *(operands if g.flag() else operands[::-1])), shape
    if operator == "Cast":
        return g.one(operator, x, to=TensorProto.DOUBLE if g.dtype is np.float64 else TensorProto.FLOAT), shape
    return g.one(operator, x), shape


def along_axis(g: Maker, x: str, shape: Shape) -> Named:
    return g.one(g.pick(["Softmax", "LogSoftmax"]), x, axis=g.integer(1, len(shape))), shape


# --- order and groups -------------------------------------------------------------------------------------------------


def sort(g: Maker, x: str, shape: Shape) -> Named:
    axis = g.integer(0, len(shape) - 1)
    size = shape[axis]
    if size % 2 == 0 and g.flag():
        pairs = (*shape[:axis], size // 2, 2, *shape[axis + 1 :])
        grouped = g.one("Reshape", x, g.numbers(0, *pairs))
        axes = g.numbers(axis + 2)
        halves = [g.one(operator, grouped, axes, keepdims=1) for operator in ("ReduceMax", "ReduceMin")]
        return g.reshaped(g.one("Concat", *halves, axis=axis + 2), shape)
    k = g.integer(1, size)
    attributes = {"axis": axis + 1, "largest": g.integer(0, 1)}
    return g.add("TopK", x, g.numbers(k), outputs=2, **attributes)[0], (*shape[:axis], k, *shape[axis + 1 :])


def pairs(g: Maker, x: str, shape: Shape) -> Named:
    """Maxima and minima of halves, in arrangements that exporters write, and others."""
    x, (n,) = g.flat(x, shape)
    if n < 2:
        return x, (n,)
    half = n // 2
    left = g.one("Slice", x, g.numbers(0), g.numbers(half), g.numbers(1))
    right = g.one("Slice", x, g.numbers(n - half), g.numbers(n), g.numbers(1))
    turned = g.one("Gather", g.pick([left, right]), g.numbers(*g.permutation(half)), axis=1)
    doubled = g.one("Gather", g.pick([left, right]), g.numbers(*g.integers(half, 0, half - 1)), axis=1)
    pieces = [
        g.one(
            g.pick(["Max", "Min"]), g.pick([left, right, left, right, turned, doubled]), g.pick([right, left, turned])
        )
        for _ in range(g.integer(1, 4))
    ]
    return g.one("Concat", *pieces, axis=1), (half * len(pieces),)


def parts(g: Maker, x: str, shape: Shape) -> Named:
    """Positive and negative parts of one tensor, each used once or more, permuted or not."""
    x, (n,) = g.flat(x, shape)
    negative = g.one("Neg", x)
    views = [x, negative]
    if g.rarely():
        picked = g.numbers(*(g.permutation(n) if g.flag() else g.integers(n, 0, n - 1)))
        turned = g.one("Gather", g.pick([x, negative]), picked, axis=1)
        views += [turned, g.one("Neg", turned)]
    pieces = [g.one("Relu", g.pick(views)) for _ in range(g.integer(2, 3))]
    if g.rarely():
        pieces.append(g.pick(views))
    kind = g.integer(0, 3)
    if kind == 0 and len(pieces) > 1:
        return g.one(g.pick(["Add", "Sub", "Max"]), *pieces[:2]), (n,)
    if kind == 1:
        pieces = [g.one("Gather", piece, g.numbers(*g.integers(n, 0, n - 1)), axis=1) for piece in pieces]
    return g.one("Concat", *pieces, axis=1), (n * len(pieces),)


def reduce(g: Maker, x: str, shape: Shape) -> Named:
    if len(shape) > 1 and len(shape) < 4 and g.rarely():
        return g.one(g.pick(["GlobalAveragePool", "GlobalMaxPool"]), x), (shape[0], *[1] * (len(shape) - 1))
    operator = g.pick(["ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceL2", "ReduceL1"])
    axes = sorted({g.integer(0, len(shape) - 1) for _ in range(g.integer(1, 2))})
    keep = g.integer(0, 1) if len(axes) < len(shape) else 1
    after = tuple(1 if a in axes else n for a, n in enumerate(shape) if keep or a not in axes)
    named = [axis + 1 if g.flag() else axis - len(shape) for axis in axes]
    return g.one(operator, x, g.numbers(*named), keepdims=keep), after


def centre(g: Maker, x: str, shape: Shape) -> Named:
    """x less the mean of its group, and near misses."""
    if len(shape) > 1 and len(shape) < 4 and g.flag():
        mean, axes = g.one("GlobalAveragePool", x), list(range(1, len(shape)))
    else:
        axes = sorted({g.integer(0, len(shape) - 1) for _ in range(g.integer(1, 2))})
        mean = g.one("ReduceMean", x, g.numbers(*(axis + 1 for axis in axes)), keepdims=1)
    own = tuple(1 if axis in axes else n for axis, n in enumerate(shape))
    kind = g.integer(0, 7)
    if kind == 1:
        axis = g.integer(0, len(shape) - 1)
        x = g.one("Gather", x, g.numbers(*g.permutation(shape[axis])), axis=axis + 1)
    elif kind == 2:
        axis = g.integer(0, len(shape) - 1)
        mean = g.one("Gather", mean, g.numbers(*g.integers(own[axis], 0, own[axis] - 1)), axis=axis + 1)
    elif kind == 3 and len(shape) > 1:
        order = g.permutation(len(shape))
        moved = tuple(own[axis] for axis in order)
        if all(m in (1, n) for m, n in zip(moved, shape, strict=True)):
            mean = g.one("Transpose", mean, perm=[0, *(axis + 1 for axis in order)])
    elif kind == 4:
        mean = g.one("Mul", mean, g.scalar(g.pick([2.0, 0.5, -1.0])))
    elif kind == 5:
        axis = g.integer(0, len(shape) - 1)
        repeated = g.integers(shape[axis], 0, shape[axis] - 1)
        x = g.one("Gather", x, g.numbers(*repeated), axis=axis + 1)
    if kind == 6:
        return g.one(g.pick(["Sub", "Add"]), mean, x), shape
    return g.one("Sub", x, mean), shape


def roots(g: Maker, x: str, shape: Shape) -> Named:
    """Roots of sums of squares."""
    first, own = _square(g, x, shape)
    if g.rarely():
        other, after = _square(g, g.one("Mul", x, g.scalar(g.pick([0.5, -2.0, 1.0]))), shape)
        if after == own:
            first = g.one("Add", first, other)
    for _ in range(g.integer(0, 2)):
        kind = g.integer(0, 5)
        if kind == 0:
            factor = np.abs(g.weights(*(n if g.flag() else 1 for n in own))) + 0.125
            first = g.one(g.pick(["Mul", "Div"]), first, g.constant(factor))
        elif kind == 1:
            first = g.one("Add", first, g.scalar(g.pick([0.0, 1e-6, 0.5, 1.0])))
        elif kind == 2:
            axis = g.integer(0, len(own) - 1)
            operator = g.pick(["ReduceSum", "ReduceMean"])
            first = g.one(operator, first, g.numbers(axis + 1), keepdims=1)
            own = (*own[:axis], 1, *own[axis + 1 :])
        elif kind == 3:
            order = g.permutation(len(own))
            first = g.one("Transpose", first, perm=[0, *(axis + 1 for axis in order)])
            own = tuple(own[axis] for axis in order)
        elif kind == 4:
            first = g.one("Mul", g.one("Sign", first), g.one("Relu", g.one("Abs", first)))
        elif len(own) in (2, 3):
            if g.rarely():
                first, own = g.one("GlobalAveragePool", first), (own[0], *[1] * (len(own) - 1))
                continue
            kernel = [g.integer(1, min(n, 3)) for n in own[1:]]
            strides = g.integers(len(kernel), 1, 2)
            pads = [g.integer(0, k - 1) for k in (*kernel, *kernel)]
            first = g.one(
                "AveragePool", first, kernel_shape=kernel, strides=strides, pads=pads, count_include_pad=g.integer(0, 1)
            )
            own = (own[0], *windows_of(own[1:], kernel, strides, [1] * len(kernel), pads))
    return (g.one("Sqrt", first) if g.flag() else g.one("Pow", first, g.scalar(0.5))), own


def _square(g: Maker, x: str, shape: Shape) -> Named:
    kind = g.integer(0, 2)
    if kind == 0:
        return g.one("Mul", x, x), shape
    if kind == 1:
        return g.one("Pow", x, g.scalar(2.0)), shape
    axis = g.integer(0, len(shape) - 1)
    return g.one("ReduceSumSquare", x, g.numbers(axis + 1)), (*shape[:axis], 1, *shape[axis + 1 :])


def strange_squares(g: Maker, x: str, shape: Shape) -> Named:
    """Arrangements of squares and their signs that have no Lipschitz constant, or hardly one: mostly refused."""
    square = g.one("Mul", x, x)
    sign = g.one("Sign", square)
    kind = g.integer(0, 4)
    if kind == 0:
        return g.one("Sqrt", g.one("Add", sign, g.scalar(1.0))), shape
    if kind == 1 and len(shape) > 1 and shape[0] == shape[1]:
        turned = g.one("Transpose", sign, perm=[0, 2, 1, *range(3, len(shape) + 1)])
        return g.one("Sqrt", g.one("Mul", turned, square)), shape
    if kind == 2:
        return g.one("Sqrt", g.one("Mul", sign, g.one("Mul", square, g.scalar(2.0)))), shape
    if kind == 3:
        return g.one("Sqrt", g.one("Div", sign, g.scalar(2.0))), shape
    return g.one("Sqrt", g.one("Relu", x)), shape


# --- rearrangements ---------------------------------------------------------------------------------------------------


def move(g: Maker, x: str, shape: Shape) -> Named:
    axis = g.integer(0, len(shape) - 1)
    size = shape[axis]

    def resized(n: int) -> Shape:
        return (*shape[:axis], n, *shape[axis + 1 :])

    kind = g.pick(
        [
            *("Transpose", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Gather", "Pad", "Split", "Concat"),
            *("Expand", "Tile", "Where"),
        ]
    )
    if kind == "Transpose":
        order = g.permutation(len(shape))
        return g.one(kind, x, perm=[0, *(a + 1 for a in order)]), tuple(shape[a] for a in order)
    if kind == "Flatten":
        return g.flat(x, shape)
    if kind == "Reshape":
        n = math.prod(shape)
        first = g.pick([k for k in range(1, n + 1) if n % k == 0])
        if g.flag():
            # As exporters write it: the batch size read off the tensor.
            batch = g.one("Gather", g.one("Shape", x), g.numbers(0), axis=0)
            return g.one(kind, x, g.one("Concat", batch, g.numbers(first, n // first), axis=0)), (first, n // first)
        return g.one(kind, x, g.numbers(-1, first, n // first)), (first, n // first)
    if kind == "Squeeze":
        ones = [a for a, n in enumerate(shape) if n == 1]
        if not ones or len(shape) == 1:
            return x, shape
        gone = g.pick(ones)
        return g.one(kind, x, g.numbers(gone + 1)), (*shape[:gone], *shape[gone + 1 :])
    if kind == "Unsqueeze":
        if len(shape) > 3:
            return x, shape
        return g.one(kind, x, g.numbers(axis + 1)), (*shape[:axis], 1, *shape[axis:])
    if kind == "Slice":
        step = g.pick([1, 2, -1, -2])
        start, end = g.integer(-size - 1, size + 1), g.integer(-size - 1, size + 1)
        if g.flag():
            start, end = (0, size) if step > 0 else (size - 1, -size - 1)
        first, last = (k + size if k < 0 else k for k in (start, end))
        count = len(
            range(min(max(first, 0), size), min(max(last, 0), size), step)
            if step > 0
            else range(min(max(first, 0), size - 1), min(max(last, -1), size - 1), step)
        )
        if not count:
            return x, shape
        return g.one(kind, x, *(g.numbers(k) for k in (start, end, axis + 1, step))), resized(count)
    if kind == "Gather":
        if g.rarely() and len(shape) > 1:
            place = g.constant(np.array(g.integer(-size, size - 1)))
            return g.one(kind, x, place, axis=axis + 1), (*shape[:axis], *shape[axis + 1 :])
        places = g.integers(g.integer(1, 5), -size, size - 1)
        return g.one(kind, x, g.numbers(*places), axis=axis + 1), resized(len(places))
    if kind == "Pad":
        mode = g.pick(["constant", "edge", "wrap", *(["reflect"] if size > 1 else [])])
        most = size - 1 if mode == "reflect" else 2
        low, high = g.integer(0, min(2, most)), g.integer(0, min(2, most))
        if mode == "wrap":
            low, high = min(low, size), min(high, size)
        if g.flag():
            padded = g.one(kind, x, g.numbers(low, high), "", g.numbers(axis + 1), mode=mode)
            return padded, resized(size + low + high)
        widths = np.zeros((2, len(shape) + 1), dtype=np.int64)
        widths[:, axis + 1] = low, high
        return g.one(kind, x, g.constant(widths.ravel()), mode=mode), resized(size + low + high)
    if kind == "Split":
        if size < 2:
            return x, shape
        first = g.integer(1, size - 1)
        halves = g.add(kind, x, g.numbers(first, size - first), outputs=2, axis=axis + 1)
        chosen = g.integer(0, 1)
        return halves[chosen], resized((first, size - first)[chosen])
    if kind == "Concat":
        count = g.integer(2, 3)
        same = [name for name, other in g.made if other == shape] + [x]
        return g.one(kind, *(g.pick(same) for _ in range(count)), axis=axis + 1), resized(count * size)
    if kind == "Expand":
        wide = tuple(g.integer(1, 3) if n == 1 else g.pick([1, n]) for n in shape)
        return g.one(kind, x, g.numbers(1, *wide)), tuple(np.broadcast_shapes(shape, wide))
    if kind == "Tile":
        repeats = [g.pick([1, 1, 2]) for _ in shape]
        return g.one(kind, x, g.numbers(1, *repeats)), tuple(n * r for n, r in zip(shape, repeats, strict=True))
    if kind == "Where":
        mask = np.array(g.integers(math.prod(shape), 0, 1), dtype=bool).reshape(shape)
        same = [name for name, other in g.made if other == shape] + [x]
        other = g.pick([g.pick(same), g.constant(g.offsets(*shape)), g.constant(np.zeros(shape))])
        operands = [x, other] if g.flag() else [other, x]
        return g.one(kind, g.constant(mask), *operands), shape
    raise AssertionError(kind)


def framed(g: Maker, x: str, shape: Shape) -> Named:
    """Constants beside a tensor: a frame of any value, or constants stacked with it; zeros and huge ones among them."""
    axis = g.integer(0, len(shape) - 1)
    if g.flag():
        low, high = g.integers(len(shape), 0, 1), g.integers(len(shape), 0, 2)
        value = g.scalar(g.pick([0.5, 1 / 3, -1.0, 0.0, 1e6]))
        padded = g.one("Pad", x, g.numbers(0, *low, 0, *high), value)
        return padded, tuple(n + p + q for n, p, q in zip(shape, low, high, strict=True))
    own = (*shape[:axis], g.integer(1, 2), *shape[axis + 1 :])
    constants = [g.constant(g.offsets(1, *own)), g.constant(np.zeros((1, *own)))]
    operands = [x, g.pick(constants)]
    if g.flag():
        operands.reverse()
    if g.rarely():
        operands.append(g.pick([x, *constants]))
    # ONNX stacks no constant beside several images.
    g.batch = 1
    length = sum(shape[axis] if operand == x else own[axis] for operand in operands)
    return g.one("Concat", *operands, axis=axis + 1), (*shape[:axis], length, *shape[axis + 1 :])


def blocks(g: Maker, x: str, shape: Shape) -> Named:
    """SpaceToDepth and DepthToSpace."""
    x, (n,) = g.flat(x, shape)
    if n % 4:
        x, n = g.one("Pad", x, g.numbers(0, 0, 0, -n % 4)), n + -n % 4
    if g.flag():
        x, (channels, height, width) = g.reshaped(x, g.pick([(1, 2, n // 2), (n // 4, 2, 2)]))
        return g.one("SpaceToDepth", x, blocksize=2), (channels * 4, height // 2, width // 2)
    x, (channels, height, width) = g.reshaped(x, g.pick([(4, 1, n // 4), (n, 1, 1)]))
    after = (channels // 4, height * 2, width * 2)
    return g.one("DepthToSpace", x, blocksize=2, mode=g.pick(["DCR", "CRD"])), after


def resize(g: Maker, x: str, shape: Shape) -> Named:
    x, shape = image_of(g, x, shape)
    channels, *size = shape
    attributes = {
        "mode": g.pick(["nearest", "linear"]),
        "coordinate_transformation_mode": g.pick(["asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"]),
    }
    if attributes["mode"] == "nearest":
        attributes["nearest_mode"] = g.pick(["floor", "round_prefer_floor", "round_prefer_ceil", "ceil"])
    if g.flag():
        factors = [g.pick([1.0, 2.0, 0.5]) for _ in size]
        after = [max(1, math.floor(n * f)) for n, f in zip(size, factors, strict=True)]
        scales = g.constant(np.array([1.0, 1.0, *factors]))
        # Scales are float32 in every graph.
        g.constants[-1].CopyFrom(numpy_helper.from_array(np.array([1.0, 1.0, *factors], dtype=np.float32), scales))
        return g.one("Resize", x, "", scales, **attributes), (channels, *after)
    after = [g.integer(1, min(2 * n, 6)) for n in size]
    # A batch of one, or the sizes could not be written down.
    sizes = g.one("Concat", g.one("Slice", g.one("Shape", x), g.numbers(0), g.numbers(2)), g.numbers(*after), axis=0)
    return g.one("Resize", x, "", "", sizes, **attributes), (channels, *after)


# --- branches ---------------------------------------------------------------------------------------------------------


def residual(g: Maker, x: str, shape: Shape) -> Named:
    """`x + h(x)`, `h` one or two steps that keep the shape."""
    y, own = x, shape
    for _ in range(g.integer(1, 2)):
        y, own = g.pick([square_dense, same_conv, activation, number, batch_normalization, with_constant])(g, y, own)
        if math.prod(own) != math.prod(shape):
            return y, own
    if own != shape:
        y, own = g.reshaped(y, shape)
    operands = [x, y] if g.flag() else [y, x]
    return g.one(g.pick(["Add", "Sub"]), *operands), shape


def square_dense(g: Maker, x: str, shape: Shape) -> Named:
    n = shape[-1]
    weight = g.weights(n, n)
    if g.flag():
        weight = weight - g.pick([1.0, -1.0]) * np.eye(n)
    return g.one("MatMul", x, g.constant(weight.T)), shape


def branches(g: Maker, x: str, shape: Shape) -> Named:
    """Sums and differences of tensors that were made before."""
    same = [name for name, other in g.made if other == shape]
    if not same:
        return x, shape
    operator = g.pick(["Add", "Sub", "Sum", "Mean", "Max", "Min"])
    if operator in ("Add", "Sub"):
        return g.one(operator, x, g.pick(same)), shape
    constant = [g.constant(g.offsets(*shape))] if g.flag() else []
    return g.one(operator, x, *(g.pick([*same, x]) for _ in range(g.integer(1, 3))), *constant), shape


def cancelling(g: Maker, x: str, shape: Shape) -> Named:
    """Two branches that nearly cancel; in the first kind only the rounding of the product of weights is left."""
    n, m = shape[-1], g.integer(1, 4)
    weight = g.weights(g.integer(1, 5), n)
    if g.flag():
        last = g.weights(m, len(weight))
        stored = [w.astype(g.dtype).astype(np.float64) for w in (weight, last)]
        x, shape = image_of(g, x, shape)
        channels = shape[0]
        if channels != n or g.flag():
            x, (total,) = g.flat(x, shape)
            if total != n:
                x = g.one("Gather", x, g.numbers(*(k % total for k in range(n))), axis=1)
            left = g.one("MatMul", g.one("MatMul", x, g.constant(weight.T)), g.constant(last.T))
            return g.one("Sub", left, g.one("MatMul", x, g.constant((stored[1] @ stored[0]).T))), (m,)
        ones = [1] * (len(shape) - 1)
        kernels = [w.reshape(*w.shape, *ones) for w in (weight, last, stored[1] @ stored[0])]
        left = g.one("Conv", g.one("Conv", x, g.constant(kernels[0])), g.constant(kernels[1]))
        return g.one("Sub", left, g.one("Conv", x, g.constant(kernels[2]))), (m, *shape[1:])
    moved = weight + g.pick([0.0, 1e-9, 1e-3]) * g.weights(*weight.shape)
    left, right = (g.one("MatMul", x, g.constant(w.T)) for w in (weight, moved))
    return g.one("Sub", left, right), (*shape[:-1], len(weight))


def overflowing(g: Maker, x: str, shape: Shape) -> Named:
    """Large numbers on the way to small ones, too large for float32 at times."""
    way = [1e17, g.pick([1e5, 1e17, 1e19, 1e24]), 1e-17]
    for size in way:
        n = shape[-1]
        x = g.one("MatMul", x, g.constant(size * (g.weights(n, n) + 0.01)))
    return x, shape


def log_probabilities(g: Maker, x: str, shape: Shape) -> Named:
    """LogSoftmax of an affine layer, its signs perhaps changed afterwards."""
    x, (n,) = g.flat(x, shape)
    m = g.integer(2, 5)
    x = g.one("Gemm", x, g.constant(g.weights(m, n)), g.constant(g.offsets(m)), transB=1)
    return number(g, g.one("LogSoftmax", x, axis=1), (m,))


def gradient_step(g: Maker, x: str, shape: Shape) -> Named:
    """`x - N^T S a(N x + b)`, exactly and almost."""
    n, m = shape[-1], g.integer(1, 5)
    weight = g.weights(m, n)
    scale = np.array([g.pick([1.0, 0.5, 2.0, -1.0, 0.0, 30.0]) for _ in range(m)])
    back = weight.copy()
    kind = g.integer(0, 5)
    if kind == 1:
        back = back + 1e-3 * g.weights(m, n)
    elif kind == 2:
        back = -back
    elif kind == 3:
        back = back[g.permutation(m)]
    hidden = g.one("MatMul", x, g.constant(weight.T))
    if g.flag():
        hidden = g.one("Add", hidden, g.constant(g.offsets(m)))
    hidden, own = g.pick([activation, activation, pointwise])(g, hidden, (*shape[:-1], m))
    if g.flag():
        hidden = g.one("Mul", hidden, g.constant(scale))
    elif g.flag():
        back = back * scale[:, None]
    if own != (*shape[:-1], m):
        return hidden, own
    step = g.one("MatMul", hidden, g.constant(back))
    return g.one(g.pick(["Sub", "Sub", "Sub", "Add"]), x, step), shape


def gradient_step_of_convolutions(g: Maker, x: str, shape: Shape) -> Named:
    """The same with a convolution and its adjoint."""
    x, shape = image_of(g, x, shape)
    channels, *size = shape
    groups = g.pick([1, channels])
    hidden_channels = groups * g.integer(1, 2)
    kernel = [g.integer(1, min(3, n)) for n in size]
    low = [g.integer(0, k - 1) for k in kernel]
    high = [k - 1 - p if g.flag() else g.integer(0, k - 1) for k, p in zip(kernel, low, strict=True)]
    strides = [g.pick([1, 1, 2]) for _ in size]
    pads = low + high
    weight = g.weights(hidden_channels, channels // groups, *kernel)
    bias = [g.constant(g.offsets(hidden_channels))] if g.flag() else []
    hidden = g.one("Conv", x, g.constant(weight), *bias, pads=pads, strides=strides, group=groups)
    after = windows_of(size, kernel, strides, [1] * len(size), pads)
    hidden, own = g.pick([activation, activation, pointwise])(g, hidden, (hidden_channels, *after))
    if own != (hidden_channels, *after):
        return hidden, own
    scale = np.array([g.pick([1.0, 0.5, 2.0, -1.0, 0.0, 30.0]) for _ in range(hidden_channels)])
    column = scale.reshape(-1, *[1] * len(size))
    back, kind = weight.copy(), g.integer(0, 5)
    if kind == 1:
        back = back + 1e-3 * g.weights(*weight.shape)
    elif kind == 2:
        back = -back
    elif kind == 3:
        back = back[..., ::-1]
    if g.flag():
        hidden = g.one("Mul", hidden, g.constant(column))
    elif g.flag():
        back = back * column[..., None]
    extra = [
        n - ((m - 1) * s + k - p - q) for n, m, s, k, p, q in zip(size, after, strides, kernel, low, high, strict=True)
    ]
    if any(not 0 <= e < s for e, s in zip(extra, strides, strict=True)):
        return hidden, own
    attributes = {"pads": pads, "strides": strides, "group": groups, "output_padding": extra}
    step = g.one("ConvTranspose", hidden, g.constant(back), **attributes)
    return g.one(g.pick(["Sub", "Sub", "Sub", "Add"]), x, step), shape


def two_convolutions(g: Maker, x: str, shape: Shape) -> Named:
    """Convolutions in a row, and two of one image added: kernels are multiplied out."""
    x, shape = image_of(g, x, shape)
    channels, *size = shape
    ones = [1] * len(size)
    kernel = [g.integer(1, min(2, n)) for n in size]
    low, high = g.integers(len(size), 0, 1), g.integers(len(size), 0, 1)
    weight = g.weights(channels, channels, *kernel)
    one = g.one("Conv", x, g.constant(weight), pads=low + high)
    own = windows_of(size, kernel, ones, ones, low + high)
    missing = [g.integer(0, 1) for _ in size]
    other_high = [max(0, q - less) for q, less in zip(high, missing, strict=True)]
    other = g.one("Conv", x, g.constant(weight if g.flag() else g.weights(*weight.shape)), pads=low + other_high)
    behind = [q - r for q, r in zip(high, other_high, strict=True)]
    identity = np.ones((channels, 1, *ones))
    other = g.one("Conv", other, g.constant(identity), pads=[0] * len(size) + behind, group=channels)
    return g.one(g.pick(["Sub", "Add"]), one, other), (channels, *own)


def block_products(g: Maker, x: str, shape: Shape) -> Named:
    """Sums and differences of matrix products of parts of one tensor: disjoint, overlapping, repeated or of another."""
    left = len(shape) > 1 and g.flag()
    axis, m = len(shape) - 1 - left, g.integer(1, 4)
    n = shape[axis]
    after = (*shape[:axis], m, *shape[axis + 1 :])
    same = [x, *(name for name, other in g.made if other == shape and g.rarely())]
    terms: list[str] = []
    for k in range(g.integer(2, 5)):
        low = g.integer(0, n - 1)
        high = g.integer(low + 1, n)
        if k and g.rarely():
            terms.append(g.pick(terms))
            continue
        bounds = [g.constant(np.array([number], dtype=np.int64)) for number in (low, high, axis + 1)]
        part, weight = g.one("Slice", g.pick(same), *bounds), g.weights(m, high - low)
        if left:
            term = g.one("MatMul", g.constant(weight), part)
        elif len(shape) == 1 and g.flag():
            term = g.one("Gemm", part, g.constant(weight), g.constant(g.offsets(m)), transB=1)
        else:
            term = g.one("MatMul", part, g.constant(weight.T))
        if g.rarely():
            both = [term, g.constant(g.offsets(*after))]
            term = g.one(g.pick(["Add", "Sub"]), *(both if g.flag() else both[::-1]))
        terms.append(term)
    while len(terms) > 1:
        # A tree, a chain, or something between them.
        one, other = terms.pop(0), terms.pop(0)
        operator = g.pick(["Add", "Add", "Sub", "Sum"])
        third = [terms.pop(0)] if operator == "Sum" and terms and g.flag() else []
        terms.insert(g.pick([0, len(terms)]), g.one(operator, one, other, *third))
    return terms[0], after


STEPS: dict[str, Step] = {
    step.__name__: step
    for step in (
        *(dense, with_constant, number, conv, same_conv, periodic_conv, conv_transpose, pool, batch_normalization),
        *(im2col, activation, pointwise, along_axis, sort, pairs, parts, reduce, centre, roots, strange_squares, move),
        *(framed, blocks, gated, volume),
        *(resize, residual, square_dense, branches, cancelling, gradient_step, gradient_step_of_convolutions),
        *(two_convolutions, overflowing, log_probabilities, block_products),
    )
}
FREQUENT = (*STEPS, "dense", "conv", "conv", "move", "move", "move", "activation", "parts", "pairs", "residual")

ARITHMETIC = (
    *("dense", "with_constant", "conv", "conv_transpose", "pool", "batch_normalization", "activation", "roots"),
    "framed",
)
JOINT = (
    *(
        "residual",
        "square_dense",
        "same_conv",
        "periodic_conv",
        "im2col",
        "centre",
        "batch_normalization",
        "two_convolutions",
    ),
    *("gradient_step", "gradient_step_of_convolutions", "cancelling", "branches", "conv", "pool", "move"),
)
REARRANGED = ("parts", "pairs", "sort", "move", "roots", "centre", "activation", "reduce", "branches", "dense")


def make_graph(choices: Choices, dtype: type, steps: Sequence[str] = FREQUENT, most: int = 6) -> Graph:
    """A graph of at most `most` of the named steps and a head, or none."""
    g = Maker(choices, dtype)
    rank = g.integer(1, 3)
    sides = {1: (9,), 2: (3, 6), 3: (4, 4, 4)}[rank]
    shape = tuple(g.integer(1, side) for side in sides)
    image, x = shape, "image"
    for _ in range(g.integer(1, most)):
        g.made.append((x, shape))
        x, shape = STEPS[g.pick(steps)](g, x, shape)
        if math.prod(shape) > MOST_ELEMENTS:
            x, (n,) = g.flat(x, shape)
            x, shape = g.one("Gemm", x, g.constant(g.weights(n, 6))), (6,)
    x, shape = g.flat(x, shape)
    head = g.integer(0, 3)
    if head == 1:
        m = g.integer(1, 4)
        x, shape = g.one("Gemm", x, g.constant(g.weights(m, shape[0])), g.constant(g.offsets(m)), transB=1), (m,)
    elif head == 2:
        x = g.one("LogSoftmax", x, axis=1)
    operators = tuple(node.op_type for node in g.nodes)
    model = g.model(image, x, shape[0], batch=g.batch or "N")
    return Graph(model, image, dtype, operators, g.batch)


@st.composite
def graphs(draw: st.DrawFn, steps: Sequence[str] = FREQUENT, most: int = 6) -> Graph:
    """Random graphs; shrink to few steps of small tensors."""
    choices = DrawnChoices(draw)
    return make_graph(choices, (np.float64, np.float32)[choices.integer(0, 1)], steps, most)


def seeded_graph(seed: int, steps: Sequence[str] = FREQUENT, most: int = 6) -> Graph:
    """The graph of a seed."""
    choices = SeededChoices(seed)
    return make_graph(choices, (np.float64, np.float32)[choices.integer(0, 1)], steps, most)
