"""Random ONNX graphs of certified operators, and their exact evaluation in rational numbers."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass
class GraphBuilder:
    """Collects nodes and constants; tracks the shape of the current tensor without its batch axis."""

    rng: np.random.Generator
    dtype: type = np.float64
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    count: int = 0

    def name(self, stem: str = "t") -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def constant(self, array: np.ndarray) -> str:
        name = self.name("c")
        array = np.asarray(array)
        if array.dtype.kind == "f":
            array = array.astype(self.dtype)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: object) -> list[str]:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names

    def one(self, operator: str, *inputs: str, **attributes: object) -> str:
        return self.add(operator, *inputs, **attributes)[0]

    def model(self, input_shape: tuple[int, ...], output: str, output_size: int, batch: object = "N") -> bytes:
        element = TensorProto.DOUBLE if self.dtype is np.float64 else TensorProto.FLOAT
        self.nodes.append(helper.make_node("Identity", [output], ["logits"]))
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("image", element, [batch, *input_shape])],
            [helper.make_tensor_value_info("logits", element, [batch, output_size])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return model.SerializeToString()


Step = Callable[[GraphBuilder, str, tuple[int, ...]], tuple[str, tuple[int, ...]]]


def _weights(b: GraphBuilder, *shape: int) -> np.ndarray:
    return b.rng.standard_normal(shape) * b.rng.choice([0.3, 1.0, 3.0])


def _affine(b: GraphBuilder, x: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    if len(shape) == 1:
        m = int(b.rng.integers(1, 7))
        transposed = bool(b.rng.integers(2))
        weight = _weights(b, m, shape[0]) if transposed else _weights(b, shape[0], m)
        bias = [b.constant(_weights(b, m))] if b.rng.integers(2) else []
        return b.one("Gemm", x, b.constant(weight), *bias, transB=int(transposed)), (m,)
    m = int(b.rng.integers(1, 5))
    if b.rng.integers(2):
        return b.one("MatMul", x, b.constant(_weights(b, shape[-1], m))), (*shape[:-1], m)
    return b.one("MatMul", b.constant(_weights(b, m, shape[-2])), x), (*shape[:-2], m, shape[-1])


def _elementwise_constant(b: GraphBuilder, x: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    operator = str(b.rng.choice(["Add", "Sub", "Mul", "Div"]))
    constant_shape = tuple(size if b.rng.integers(2) else 1 for size in shape)
    values = _weights(b, *constant_shape)
    if operator == "Div":
        values = np.sign(values) * (np.abs(values) + 0.25)
    operands = [x, b.constant(values)]
    if operator != "Div" and b.rng.integers(2):
        operands.reverse()
    return b.one(operator, *operands), shape


def _pointwise(b: GraphBuilder, x: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    operator = str(b.rng.choice(["Relu", "Abs", "Neg", "LeakyRelu", "Clip", "Identity", "Max"]))
    if operator == "LeakyRelu":
        return b.one(operator, x, alpha=0.25), shape
    if operator == "Clip":
        return b.one(operator, x, b.constant(np.array(-0.5)), b.constant(np.array(0.75))), shape
    if operator == "Max":
        return b.one(operator, x, b.constant(_weights(b, *shape))), shape
    return b.one(operator, x), shape


def _sort(b: GraphBuilder, x: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    axis = int(b.rng.integers(len(shape)))
    size = shape[axis]
    if size % 2 == 0 and b.rng.integers(3):
        if b.rng.integers(2):
            left, right = b.add("Split", x, outputs=2, axis=axis + 1, num_outputs=2)
            halves = [b.one("Max", left, right), b.one("Min", right, left)]
            return b.one("Concat", *halves, axis=axis + 1), shape
        pairs = (*shape[:axis], size // 2, 2, *shape[axis + 1 :])
        grouped = b.one("Reshape", x, b.constant(np.array([-1, *pairs])))
        axes = b.constant(np.array([axis + 2]))
        halves = [b.one(operator, grouped, axes, keepdims=1) for operator in ("ReduceMax", "ReduceMin")]
        stacked = b.one("Concat", *halves, axis=axis + 2)
        return b.one("Reshape", stacked, b.constant(np.array([0, *shape]))), shape
    k = int(b.rng.integers(1, size + 1))
    values, _ = b.add("TopK", x, b.constant(np.array([k])), outputs=2, axis=axis + 1, largest=int(b.rng.integers(2)))
    return values, (*shape[:axis], k, *shape[axis + 1 :])


def _reduce(b: GraphBuilder, x: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    operator = str(b.rng.choice(["ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean"]))
    axis = int(b.rng.integers(len(shape)))
    result = b.one(operator, x, b.constant(np.array([axis + 1])), keepdims=1)
    return result, (*shape[:axis], 1, *shape[axis + 1 :])


def _move(b: GraphBuilder, x: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    axis = int(b.rng.integers(len(shape)))
    size = shape[axis]
    kind = int(b.rng.integers(6))
    if kind == 0:
        permutation = [int(p) for p in b.rng.permutation(len(shape))]
        return b.one("Transpose", x, perm=[0] + [p + 1 for p in permutation]), tuple(shape[p] for p in permutation)
    if kind == 1:
        positions = b.rng.integers(-size, size, int(b.rng.integers(1, 5)))
        gathered = b.one("Gather", x, b.constant(positions), axis=axis + 1)
        return gathered, (*shape[:axis], len(positions), *shape[axis + 1 :])
    if kind == 2:
        start = int(b.rng.integers(size))
        step = int(b.rng.integers(1, 3))
        bounds = [b.constant(np.array([number])) for number in (start, size, axis + 1, step)]
        return b.one("Slice", x, *bounds), (*shape[:axis], len(range(start, size, step)), *shape[axis + 1 :])
    if kind == 3:
        modes = ["constant", "edge"] + (["reflect", "wrap"] if size > 1 else [])
        mode = str(b.rng.choice(modes))
        low, high = (int(width) for width in b.rng.integers(0, 2, 2))
        pads = np.zeros((2, len(shape) + 1), dtype=np.int64)
        pads[:, axis + 1] = low, high
        # ONNX Runtime 1.32 knows wrap from opset 19 on, so that this generator leaves it out.
        mode = "reflect" if mode == "wrap" else mode
        padded = b.one("Pad", x, b.constant(pads.ravel()), mode=mode)
        return padded, (*shape[:axis], size + low + high, *shape[axis + 1 :])
    if kind == 4:
        other, other_shape = _affine(b, x, shape)
        if other_shape == shape:
            return b.one(str(b.rng.choice(["Add", "Sub"])), x, other), shape
        if len(shape) == 1:
            return b.one("Concat", x, other, axis=1), (shape[0] + other_shape[0],)
        return other, other_shape
    return b.one("Flatten", x, axis=1), (int(np.prod(shape)),)


_STEPS: list[Step] = [_affine, _affine, _elementwise_constant, _pointwise, _sort, _reduce, _move, _move]


def random_model(seed: int, dtype: type = np.float64, n_steps: int = 6) -> tuple[bytes, tuple[int, ...]]:
    """A random graph of certified operators with rational results, and the shape of its image."""
    rng = np.random.default_rng(seed)
    b = GraphBuilder(rng, dtype)
    shape = tuple(int(size) for size in rng.integers(1, 5, int(rng.integers(1, 4))))
    input_shape = shape
    x = "image"
    for _ in range(int(rng.integers(1, n_steps + 1))):
        x, shape = _STEPS[int(rng.integers(len(_STEPS)))](b, x, shape)
        if np.prod(shape) > 64:
            x, shape = b.one("Flatten", x, axis=1), (int(np.prod(shape)),)
            x, shape = _affine(b, x, shape)
    x, shape = b.one("Flatten", x, axis=1), (int(np.prod(shape)),)
    return b.model(input_shape, x, shape[0]), input_shape


def _conv(b: GraphBuilder, x: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    channels, *size = shape
    groups = int(b.rng.choice([g for g in (1, 2, 3) if channels % g == 0]))
    out = groups * int(b.rng.integers(1, 3))
    kernel = [int(b.rng.integers(1, min(n, 3) + 1)) for n in size]
    strides = [int(s) for s in b.rng.integers(1, 4, len(size))]
    dilations = [1 if (n < 2 * k - 1) else int(b.rng.integers(1, 3)) for n, k in zip(size, kernel, strict=True)]
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    weight = b.constant(_weights(b, out, channels // groups, *kernel))
    bias = [b.constant(_weights(b, out))] if b.rng.integers(2) else []
    common = {"group": groups, "strides": strides, "dilations": dilations, "kernel_shape": kernel}
    # ONNX Runtime has no dilation with automatic padding.
    if b.rng.integers(3) == 0 and max(dilations) == 1:
        mode = str(b.rng.choice(["SAME_UPPER", "SAME_LOWER"]))
        return b.one("Conv", x, weight, *bias, auto_pad=mode, **common), (
            out,
            *(-(-n // s) for n, s in zip(size, strides, strict=True)),
        )
    pads = [int(p) for p in b.rng.integers(0, 3, 2 * len(size))]
    after = [
        (n + pads[a] + pads[a + len(size)] - k) // s + 1
        for a, (n, k, s) in enumerate(zip(size, extent, strides, strict=True))
    ]
    return b.one("Conv", x, weight, *bias, pads=pads, **common), (out, *after)


def _conv_transpose(b: GraphBuilder, x: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    channels, *size = shape
    groups = int(b.rng.choice([g for g in (1, 2) if channels % g == 0]))
    per_group = int(b.rng.integers(1, 3))
    kernel = [int(k) for k in b.rng.integers(2, 4, len(size))]
    strides = [int(s) for s in b.rng.integers(1, 3, len(size))]
    extra = [int(b.rng.integers(s)) for s in strides]
    pads = [int(p) for p in b.rng.integers(0, 2, len(size))] * 2
    if any((n - 1) * s + k - 2 * p + e < 1 for n, s, k, p, e in zip(size, strides, kernel, pads, extra, strict=False)):
        return x, shape
    weight = b.constant(_weights(b, channels, per_group, *kernel))
    attributes = {"group": groups, "strides": strides, "pads": pads, "output_padding": extra, "kernel_shape": kernel}
    after = [(n - 1) * s + k - 2 * p + e for n, s, k, p, e in zip(size, strides, kernel, pads, extra, strict=False)]
    return b.one("ConvTranspose", x, weight, **attributes), (groups * per_group, *after)


def _pool(b: GraphBuilder, x: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    channels, *size = shape
    kernel = [int(b.rng.integers(1, min(n, 3) + 1)) for n in size]
    strides = [int(s) for s in b.rng.integers(1, 4, len(size))]
    pads = [int(b.rng.integers(0, k)) if k > 1 else 0 for k in kernel] * 2
    after = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, pads, kernel, strides, strict=False)]
    common = {"kernel_shape": kernel, "strides": strides, "pads": pads}
    if b.rng.integers(2):
        return b.one("MaxPool", x, **common), (channels, *after)
    counted = int(b.rng.integers(2))
    return b.one("AveragePool", x, count_include_pad=counted, **common), (channels, *after)


def _batch_normalization(b: GraphBuilder, x: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    scale, bias, mean = (b.constant(_weights(b, shape[0])) for _ in range(3))
    variance = b.constant(b.rng.uniform(0.1, 2.0, shape[0]))
    return b.one("BatchNormalization", x, scale, bias, mean, variance, epsilon=1e-3), shape


_SPATIAL_STEPS: list[Step] = [_conv, _conv, _conv, _conv_transpose, _pool, _batch_normalization, _pointwise]


def random_spatial_model(seed: int) -> tuple[bytes, tuple[int, ...]]:
    """A random float32 graph of convolutions, pools and normalisations, and the shape of its image.

    float32, because ONNX Runtime has no float64 convolution on the CPU.
    """
    rng = np.random.default_rng(seed)
    b = GraphBuilder(rng, np.float32)
    axes = int(rng.integers(1, 3))
    shape = (int(rng.integers(1, 5)), *(int(n) for n in rng.integers(2, 7, axes)))
    input_shape = shape
    x = "image"
    for _ in range(int(rng.integers(1, 4))):
        x, shape = _SPATIAL_STEPS[int(rng.integers(len(_SPATIAL_STEPS)))](b, x, shape)
        if np.prod(shape) > 150:
            break
    if rng.integers(4) == 0:
        x, shape = b.one("GlobalAveragePool", x), (shape[0], *[1] * axes)
    x, shape = b.one("Flatten", x, axis=1), (int(np.prod(shape)),)
    return b.model(input_shape, x, shape[0]), input_shape


def exact_logits(model_bytes: bytes, image: np.ndarray) -> np.ndarray:
    """The graph's real-number output for one image, as an array of Fractions.

    A float64 or float32 is a rational number, so that every step of these graphs is exact.
    """
    to_fraction = np.vectorize(Fraction, otypes=[object])
    model = onnx.load_model_from_string(model_bytes)
    values: dict[str, np.ndarray] = {}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        values[tensor.name] = to_fraction(array) if array.dtype.kind == "f" else array
    values["image"] = to_fraction(image[None])
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = [values[name] for name in node.input]
        outputs = _EXACT[node.op_type](inputs, attributes, len(node.output))
        values.update(zip(node.output, outputs, strict=False))
    return values["logits"][0]


def _exact_slice(i: list[np.ndarray], a: dict, n: int) -> list[np.ndarray]:
    (start,), (end,), (axis,), (step,) = i[1:]
    return [i[0][(slice(None),) * int(axis) + (slice(int(start), int(end), int(step)),)]]


def _exact_pad(i: list[np.ndarray], a: dict, n: int) -> list[np.ndarray]:
    widths = np.array(i[1]).reshape(2, -1).T
    mode = a.get("mode", b"constant").decode()
    extra = {"constant_values": Fraction(0)} if mode == "constant" else {}
    return [np.pad(i[0], widths, mode=mode, **extra)]


def _exact_topk(i: list[np.ndarray], a: dict, n: int) -> list[np.ndarray]:
    axis = a["axis"]
    ordered = np.sort(i[0], axis=axis)
    ordered = np.flip(ordered, axis=axis) if a["largest"] else ordered
    return [np.take(ordered, np.arange(int(i[1][0])), axis=axis)]


def _exact_reduce(function: Callable) -> Callable:
    return lambda i, a, n: [function(i[0], axis=tuple(int(x) for x in i[1]), keepdims=bool(a.get("keepdims", 1)))]


def _exact_gemm(i: list[np.ndarray], a: dict, n: int) -> list[np.ndarray]:
    weight = i[1].T if a.get("transB") else i[1]
    return [i[0] @ weight + (i[2] if len(i) > 2 else Fraction(0))]


def _exact_geometry(a: dict, size: tuple[int, ...], kernel: list[int]) -> tuple[list[int], list[int], list[int]]:
    strides, dilations = a.get("strides", [1] * len(size)), a.get("dilations", [1] * len(size))
    pads = list(a.get("pads", [0] * (2 * len(size))))
    mode = a.get("auto_pad", b"NOTSET")
    if mode != b"NOTSET":
        for axis, (n, k, s) in enumerate(zip(size, kernel, strides, strict=True)):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            less, more = total // 2, total - total // 2
            pads[axis], pads[axis + len(size)] = (less, more) if mode == b"SAME_UPPER" else (more, less)
    return list(strides), list(dilations), pads


def _exact_windows(
    image: np.ndarray, a: dict, kernel: list[int]
) -> list[tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]]:
    """For each output position: (position, [(tap, input position inside the image)])."""
    size = image.shape[2:]
    strides, dilations, pads = _exact_geometry(a, size, kernel)
    after = [
        (n + pads[x] + pads[x + len(size)] - ((k - 1) * d + 1)) // s + 1
        for x, (n, k, d, s) in enumerate(zip(size, kernel, dilations, strides, strict=True))
    ]
    found = []
    for out in itertools.product(*(range(n) for n in after)):
        taps = []
        for tap in itertools.product(*(range(k) for k in kernel)):
            place = tuple(o * s + t * d - p for o, s, t, d, p in zip(out, strides, tap, dilations, pads, strict=False))
            if all(0 <= i < n for i, n in zip(place, size, strict=True)):
                taps.append((tap, place))
        found.append((out, taps))
    return found


def _filled(channels: int, positions: list[tuple[int, ...]]) -> np.ndarray:
    shape = tuple(1 + max(position[axis] for position in positions) for axis in range(len(positions[0])))
    return np.full((1, channels, *shape), Fraction(0), dtype=object)


def _exact_conv(i: list[np.ndarray], a: dict, n: int) -> list[np.ndarray]:
    image, weight = i[0], i[1]
    windows = _exact_windows(image, a, list(weight.shape[2:]))
    result = _filled(len(weight), [out for out, _ in windows])
    per_group = len(weight) // a["group"]
    for o in range(len(weight)):
        first = o // per_group * weight.shape[1]
        for out, taps in windows:
            total = i[2][o] if len(i) > 2 else Fraction(0)
            for c in range(weight.shape[1]):
                total += sum(weight[(o, c, *tap)] * image[(0, first + c, *place)] for tap, place in taps)
            result[(0, o, *out)] = total
    return [result]


def _exact_conv_transpose(i: list[np.ndarray], a: dict, n: int) -> list[np.ndarray]:
    image, weight = i[0], i[1]
    size, kernel = image.shape[2:], weight.shape[2:]
    strides, pads, extra = a["strides"], a["pads"], a["output_padding"]
    after = [
        (m - 1) * s + k - p - q + e
        for m, s, k, p, q, e in zip(size, strides, kernel, pads, pads[len(size) :], extra, strict=False)
    ]
    per_group = len(weight) // a["group"]
    result = np.full((1, weight.shape[1] * a["group"], *after), Fraction(0), dtype=object)
    for c in range(len(weight)):
        for place in itertools.product(*(range(m) for m in size)):
            for tap in itertools.product(*(range(k) for k in kernel)):
                out = tuple(x * s + t - p for x, s, t, p in zip(place, strides, tap, pads, strict=False))
                if all(0 <= x < m for x, m in zip(out, after, strict=True)):
                    for o in range(weight.shape[1]):
                        channel = c // per_group * weight.shape[1] + o
                        result[(0, channel, *out)] += weight[(c, o, *tap)] * image[(0, c, *place)]
    return [result]


def _exact_pool(i: list[np.ndarray], a: dict, n: int, mean: bool) -> list[np.ndarray]:
    image = i[0]
    windows = _exact_windows(image, a, list(a["kernel_shape"]))
    result = _filled(image.shape[1], [out for out, _ in windows])
    for c in range(image.shape[1]):
        for out, taps in windows:
            values = [image[(0, c, *place)] for _, place in taps]
            divisor = int(np.prod(a["kernel_shape"])) if a.get("count_include_pad") else len(values)
            result[(0, c, *out)] = sum(values) / divisor if mean else max(values)
    return [result]


def _exact_batch_normalization(i: list[np.ndarray], a: dict, n: int) -> list[np.ndarray]:
    image, scale, bias, mean, variance = i
    shape = (1, -1, *[1] * (image.ndim - 2))
    epsilon = Fraction(float(np.float32(a["epsilon"])))
    # A square root is not rational; 60 digits are exact enough for an error of 1e-7.
    with localcontext() as context:
        context.prec = 60
        roots = [(Decimal(v.numerator) / Decimal(v.denominator)).sqrt() for v in variance + epsilon]
    factors = np.array([s / Fraction(r) for s, r in zip(scale, roots, strict=True)], dtype=object)
    return [(image - mean.reshape(shape)) * factors.reshape(shape) + bias.reshape(shape)]


_EXACT: dict[str, Callable[[list[np.ndarray], dict, int], list[np.ndarray]]] = {
    "Abs": lambda i, a, n: [np.abs(i[0])],
    "Add": lambda i, a, n: [i[0] + i[1]],
    "AveragePool": lambda i, a, n: _exact_pool(i, a, n, mean=True),
    "BatchNormalization": _exact_batch_normalization,
    "Clip": lambda i, a, n: [np.minimum(np.maximum(i[0], i[1]), i[2])],
    "Concat": lambda i, a, n: [np.concatenate(i, axis=a["axis"])],
    "Conv": _exact_conv,
    "ConvTranspose": _exact_conv_transpose,
    "Div": lambda i, a, n: [i[0] / i[1]],
    "Flatten": lambda i, a, n: [i[0].reshape(len(i[0]), -1)],
    "Gather": lambda i, a, n: [np.take(i[0], i[1], axis=a["axis"])],
    "Gemm": _exact_gemm,
    "GlobalAveragePool": lambda i, a, n: [
        np.sum(i[0], axis=tuple(range(2, i[0].ndim)), keepdims=True) / int(np.prod(i[0].shape[2:]))
    ],
    "Identity": lambda i, a, n: [i[0]],
    "LeakyRelu": lambda i, a, n: [np.where(i[0] >= 0, i[0], i[0] * Fraction(a["alpha"]))],
    "MatMul": lambda i, a, n: [i[0] @ i[1]],
    "MaxPool": lambda i, a, n: _exact_pool(i, a, n, mean=False),
    "Max": lambda i, a, n: [np.maximum(i[0], i[1])],
    "Min": lambda i, a, n: [np.minimum(i[0], i[1])],
    "Mul": lambda i, a, n: [i[0] * i[1]],
    "Neg": lambda i, a, n: [-i[0]],
    "Pad": _exact_pad,
    "ReduceMax": _exact_reduce(np.max),
    "ReduceMean": lambda i, a, n: [np.sum(i[0], axis=int(i[1][0]), keepdims=True) / i[0].shape[int(i[1][0])]],
    "ReduceMin": _exact_reduce(np.min),
    "ReduceSum": _exact_reduce(np.sum),
    "Relu": lambda i, a, n: [np.maximum(i[0], Fraction(0))],
    "Reshape": lambda i, a, n: [i[0].reshape([len(i[0]), *(int(x) for x in i[1][1:])])],
    "Slice": _exact_slice,
    "Split": lambda i, a, n: np.split(i[0], n, axis=a["axis"]),
    "Sub": lambda i, a, n: [i[0] - i[1]],
    "TopK": _exact_topk,
    "Transpose": lambda i, a, n: [np.transpose(i[0], a["perm"])],
}
