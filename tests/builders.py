"""Small models for tests, built with onnx.helper alone: their graphs, adjoints and artefacts.

They share no code with the trainer's exporter, so that a test of the service does not lean on it. Weights are
given as float64 and stored so. Axes: K logits, D = C H W pixels, M and N rows and columns of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.artefact.card import Card, InputShape, write_artefact, write_card
from service.artefact.files import MODEL_FILE, TRANSPORT_FILE, digest
from service.artefact.findings import Findings
from service.inference.classifier import Classifier

OPSET = 18
Affine = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Graphs:
    """The two graphs of one network."""

    model: bytes
    transport: bytes
    shape: tuple[int, int, int]
    n_outputs: int


def linear(weight_KD: np.ndarray, bias_K: np.ndarray, shape: tuple[int, int, int]) -> Graphs:
    """`logits = W x + b`: every radius and every distance is known in closed form."""
    return dense([], (weight_KD, bias_K), shape)


def dense(
    hidden: Sequence[Affine],
    head: Affine,
    shape: tuple[int, int, int],
) -> Graphs:
    """Affine layers `(W, b)`, each followed by GroupSort2 on its two halves, and an affine head."""
    model = _Graph()
    model.network(hidden, head)
    transport = _Graph()
    pullback = transport.network(hidden, head)
    transport.node("Reshape", [pullback("margin_weights"), transport.constant(np.array([0, *shape]))], "gradient")
    image = _info("image", shape)
    n_outputs = len(head[1])
    return Graphs(
        model=model.build([image], [_info("logits", (n_outputs,))]),
        transport=transport.build(
            [image, _info("margin_weights", (n_outputs,))],
            [_info("logits", (n_outputs,)), _info("gradient", shape)],
        ),
        shape=shape,
        n_outputs=n_outputs,
    )


def random_groupsort(
    seed: int, shape: tuple[int, int, int] = (1, 4, 4), n_outputs: int = 3, width: int = 8, depth: int = 2
) -> Graphs:
    """A random network of orthogonal layers and GroupSort2, unit-norm head rows: each logit is
    1-Lipschitz."""
    random = np.random.default_rng(seed)
    sizes = [int(np.prod(shape)), *[width] * depth]
    hidden = [(_orthogonal(random, rows, columns), random.normal(size=rows) / 4) for columns, rows in pairwise(sizes)]
    head = random.normal(size=(n_outputs, sizes[-1]))
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    return dense(hidden, (head, random.normal(size=n_outputs) / 4), shape)


def card_for(graphs: Graphs, name: str = "test") -> Card:
    """The least that a card must say about `graphs`; class k is labelled `class k`."""
    n_classes = max(2, graphs.n_outputs)
    channels, height, width = graphs.shape
    return Card(
        name=name,
        labels=[f"class {k}" for k in range(n_classes)],
        input=InputShape(channels=channels, height=height, width=width),
    )


def write(folder: Path, graphs: Graphs, name: str = "test") -> Findings:
    """Write the artefact of `graphs` to `folder`."""
    return write_artefact(folder, card_for(graphs, name), graphs.model, graphs.transport)


def write_unverified(folder: Path, graphs: Graphs, name: str = "test") -> None:
    """Write an artefact whose card is about `graphs`, whatever they are."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {MODEL_FILE: graphs.model, TRANSPORT_FILE: graphs.transport}
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    digests = {file: digest(content) for file, content in contents.items()}
    write_card(folder, card_for(graphs, name).model_copy(update={"graphs": digests}))


def _orthogonal(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    q, _ = np.linalg.qr(random.normal(size=(max(rows, columns), min(rows, columns))))
    return q if rows >= columns else q.T


def _info(name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["N", *shape])


class _Graph:
    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], *outputs: str, **attributes: object) -> str:
        names = list(outputs) or [f"value_{len(self._nodes)}"]
        self._nodes.append(helper.make_node(operator, inputs, names, name=f"node_{len(self._nodes)}", **attributes))
        return names[0]

    def network(self, hidden: Sequence[Affine], head: Affine) -> Callable[[str], str]:
        """Emit the forward nodes; the result emits the adjoint: weights of the logits -> gradient of the
        pixels."""
        value = self.node("Flatten", ["image"], axis=1)
        sorts = []
        for weight_MN, bias_M in hidden:
            value = self.affine(value, weight_MN, bias_M)
            left, right = self.halves(value, len(bias_M))
            sorts.append((weight_MN, left, right))
            value = self.node("Concat", [self.node("Max", [left, right]), self.node("Min", [left, right])], axis=1)
        self.affine(value, *head, output="logits")

        def pullback(weights: str) -> str:
            gradient = self.node("MatMul", [weights, self.constant(head[0])])
            for weight_MN, above, below in reversed(sorts):
                in_order = self.node("GreaterOrEqual", [above, below])
                of_max, of_min = self.halves(gradient, len(weight_MN))
                left = self.node("Where", [in_order, of_max, of_min])
                right = self.node("Where", [in_order, of_min, of_max])
                gradient = self.node("Concat", [left, right], axis=1)
                gradient = self.node("MatMul", [gradient, self.constant(weight_MN)])
            return gradient

        return pullback

    def affine(self, value: str, weight_MN: np.ndarray, bias_M: np.ndarray, output: str | None = None) -> str:
        product = self.node("MatMul", [value, self.constant(weight_MN.T)])
        return self.node("Add", [product, self.constant(bias_M)], *([output] if output else []))

    def halves(self, value: str, size: int) -> tuple[str, str]:
        names = [f"half_{len(self._nodes)}_{side}" for side in (0, 1)]
        self.node("Split", [value, self.constant(np.array([size // 2, size - size // 2]))], *names, axis=1)
        return names[0], names[1]

    def build(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> bytes:
        graph = helper.make_graph(self._nodes, "network", inputs, outputs, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()


def load(graphs: Graphs, name: str = "test") -> Classifier:
    """The classifier that serves `graphs`, from an artefact on disk that is gone afterwards."""
    with TemporaryDirectory() as folder:
        write(Path(folder), graphs, name)
        return Classifier.load(Path(folder), "cpu", threads=1)
