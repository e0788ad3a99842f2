"""Small models for tests and benchmarks: their graphs and artefacts.

They share no code with the trainer's exporter, on which a test of the service must not rely. Axes: K logits,
D = C H W pixels, M and N rows and columns of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
from graph_builder import GraphBuilder

from service.artefact.card import Card, InputShape, write_artefact, write_card
from service.artefact.files import MODEL_FILE, digest
from service.artefact.findings import Findings
from service.inference.classifier import Classifier
from service.network.graphs import gradient_graph
from service.network.reader import read

Affine = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Graphs:
    """A model, and the graph of its gradient."""

    model: bytes
    shape: tuple[int, int, int]
    n_outputs: int

    @property
    def gradient(self) -> bytes:
        """As the server writes it."""
        return gradient_graph(read(self.model)).content


def linear(weight_KD: np.ndarray, bias_K: np.ndarray, shape: tuple[int, int, int]) -> Graphs:
    """`logits = W x + b`: every radius and every distance is known in closed form."""
    return dense([], (weight_KD, bias_K), shape)


def dense(
    hidden: Sequence[Affine],
    head: Affine,
    shape: tuple[int, int, int],
    dtype: type = np.float64,
    operator: Literal["MatMul", "Gemm"] = "MatMul",
) -> Graphs:
    """Affine layers `(W, b)`, each followed by GroupSort2 on its two halves, and an affine head.

    Args:
        hidden: the layers before the head.
        head: its rows are those of the logits.
        shape: (C, H, W) of the image.
        dtype: format of the graph; numbers are rounded to it.
        operator: of the affine layers; MatMul is followed by Add.
    """
    model = GraphBuilder(dtype=dtype)
    _network(model, hidden, head, operator)
    return Graphs(model.build({"image": shape}, {"logits": (len(head[1]),)}), shape, len(head[1]))


def _network(g: GraphBuilder, hidden: Sequence[Affine], head: Affine, operator: str) -> None:

    def affine(value: str, weight_MN: np.ndarray, bias_M: np.ndarray) -> str:
        if operator == "Gemm":
            return g.one("Gemm", value, g.constant(weight_MN), g.constant(bias_M), transB=1)
        return g.one("Add", g.one("MatMul", value, g.constant(weight_MN.T)), g.constant(bias_M))

    def halves(value: str, size: int) -> list[str]:
        return g.add("Split", value, g.constant(np.array([size // 2, size - size // 2])), outputs=2, axis=1)

    value = g.one("Flatten", "image", axis=1)
    for weight_MN, bias_M in hidden:
        left, right = halves(affine(value, weight_MN, bias_M), len(bias_M))
        value = g.one("Concat", g.one("Max", left, right), g.one("Min", left, right), axis=1)
    g.called(affine(value, *head), "logits")


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
    return write_artefact(folder, card_for(graphs, name), graphs.model)


def write_unverified(folder: Path, graphs: Graphs, name: str = "test") -> None:
    """Write an artefact whose card is about `graphs`, whatever they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(graphs.model)
    write_card(folder, card_for(graphs, name).model_copy(update={"graphs": {MODEL_FILE: digest(graphs.model)}}))


def _orthogonal(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    q, _ = np.linalg.qr(random.normal(size=(max(rows, columns), min(rows, columns))))
    return q if rows >= columns else q.T


def load(graphs: Graphs, name: str = "test", threads: int = 1) -> Classifier:
    """Return the classifier that serves `graphs`, from an artefact on disk that is removed afterwards."""
    with TemporaryDirectory() as folder:
        write(Path(folder), graphs, name)
        return Classifier.load(Path(folder), "cpu", threads)
