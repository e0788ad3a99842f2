"""Random ONNX graphs of certified operators, and their exact evaluation in rational numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field
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


_EXACT: dict[str, Callable[[list[np.ndarray], dict, int], list[np.ndarray]]] = {
    "Abs": lambda i, a, n: [np.abs(i[0])],
    "Add": lambda i, a, n: [i[0] + i[1]],
    "Clip": lambda i, a, n: [np.minimum(np.maximum(i[0], i[1]), i[2])],
    "Concat": lambda i, a, n: [np.concatenate(i, axis=a["axis"])],
    "Div": lambda i, a, n: [i[0] / i[1]],
    "Flatten": lambda i, a, n: [i[0].reshape(len(i[0]), -1)],
    "Gather": lambda i, a, n: [np.take(i[0], i[1], axis=a["axis"])],
    "Gemm": _exact_gemm,
    "Identity": lambda i, a, n: [i[0]],
    "LeakyRelu": lambda i, a, n: [np.where(i[0] >= 0, i[0], i[0] * Fraction(a["alpha"]))],
    "MatMul": lambda i, a, n: [i[0] @ i[1]],
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
