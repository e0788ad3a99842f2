"""What is served computes what torch computes, its gradient is autograd's, and what does not hold is not written."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from layer_cases import each_layer, trained
from onnx import TensorProto

from models import export
from models.data.labelled import LabelledImages
from models.export import ExportRefusedError, compare, emit_graph, export_artefact, measure, prove, run_graph
from models.nets.layers.base import Chain, Layer
from models.nets.layers.convolution import OrthogonalConv2d
from models.nets.layers.linear import OrthogonalDense, UnitHead
from models.nets.layers.pooling import L2Pool2d
from models.nets.layers.reshaping import Flatten, Normalize
from models.nets.layers.sorting import GroupSort2
from models.nets.networks import LipschitzNetwork, convolutional_network, dense_network
from models.nets.onnx_graph import IR_VERSION, OPSET, GraphBuilder, Value
from models.recipes import Stage
from service.certificate import UnsupportedModelError
from service.inference.classifier import Classifier
from service.network.graphs import forward_graph, gradient_graph
from service.network.reader import read

LABELS = ["zero", "one", "two"]


def small_network(outputs: int = 3) -> LipschitzNetwork:
    torch.manual_seed(0)
    return dense_network((1, 4, 4), (12, 8), outputs)


def small_test_set(classes: int = 3) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.arange(30) % classes)


def write(network: LipschitzNetwork, folder: Path, **changes: Any) -> export.Measured:
    settings: dict[str, Any] = {
        "labels": LABELS if network.outputs == 3 else LABELS[:2],
        "lipschitz_constant": 1.0,
        "test": small_test_set(max(network.outputs, 2)),
        "epsilons": (0.1, 0.5),
        "data": {"name": "noise", "licence": "none"},
        "recipe": {"loss": {"kind": "hkr"}, "name": "small"},
        "seed": 7,
        "wall_time_s": 1.0,
    }
    return export_artefact(network, folder, **{**settings, **changes})


def served_gradient(layer: Layer, image: np.ndarray, cotangent: np.ndarray) -> dict[str, np.ndarray]:
    """Return the value of a layer and its vector-Jacobian product, by the graph that a server derives from it."""
    graph = GraphBuilder(image.shape[1:])
    value = layer.emit(graph, graph.image)
    assert value.shape == cotangent.shape[1:]
    content = gradient_graph(read(graph.build(value))).content
    return run_graph(content, {"image": image, "margin_weights": cotangent})


@each_layer
def test_every_layer_and_its_gradient_in_onnx_equal_torch_and_autograd(
    make: Callable[[], Layer], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    layer = trained(make())
    x = torch.randn(5, *shape, dtype=torch.float64, requires_grad=True)
    y = layer.fold()(x)
    cotangent = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, cotangent)

    found = served_gradient(layer, x.detach().numpy(), cotangent.numpy())
    np.testing.assert_allclose(found["logits"], y.detach().numpy(), rtol=0, atol=1e-13)
    np.testing.assert_allclose(found["gradient"], expected.numpy(), rtol=0, atol=1e-13)


def test_gradient_of_l2_pooling_is_zero_at_an_empty_window() -> None:
    found = served_gradient(L2Pool2d(2), np.zeros((1, 1, 2, 2)), np.ones((1, 1, 1, 1)))
    assert (found["gradient"] == 0).all()


def test_at_a_tie_the_gradient_of_group_sort_still_is_a_permutation() -> None:
    found = served_gradient(GroupSort2(), np.ones((1, 4)), np.array([[1.0, 2.0, 3.0, 4.0]]))
    assert sorted(found["gradient"][0]) == [1, 2, 3, 4]


@pytest.mark.parametrize("outputs", [1, 3])
def test_graphs_have_the_face_that_the_server_expects(outputs: int) -> None:
    model_bytes = emit_graph(small_network(outputs))

    def face(values: Any) -> dict[str, tuple[int, list[str | int]]]:
        return {
            v.name: (v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
            for v in values
        }

    image, logits = (TensorProto.DOUBLE, ["N", 1, 4, 4]), (TensorProto.DOUBLE, ["N", outputs])
    network = read(model_bytes)
    derived = [graph.content for graph in (forward_graph(network), gradient_graph(network))]
    model, forward, gradient = (onnx.load_model_from_string(content) for content in (model_bytes, *derived))
    for graph in (model, forward):
        assert face(graph.graph.input) == {"image": image}
        assert face(graph.graph.output) == {"logits": logits}
    assert face(gradient.graph.input) == {"image": image, "margin_weights": logits}
    assert face(gradient.graph.output) == {"logits": logits, "gradient": image}
    for graph in (model, forward, gradient):
        assert graph.ir_version == IR_VERSION
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", OPSET)]


def test_weights_are_stored_once_as_float32_and_the_head_is_one_gemm() -> None:
    graph = onnx.load_model_from_string(emit_graph(small_network())).graph
    weights = [i for i in graph.initializer if i.data_type == TensorProto.FLOAT]
    assert sorted(tuple(w.dims) for w in weights) == [(3, 8), (8, 12), (12, 16)]
    (last,) = [n for n in graph.node if "logits" in n.output]
    assert last.op_type == "Gemm"


def test_equal_networks_give_equal_bytes() -> None:
    assert emit_graph(small_network()) == emit_graph(small_network())


@pytest.mark.parametrize(
    "network",
    [
        small_network(1),
        small_network(3),
        convolutional_network((1, 8, 8), [Stage(channels=8, blocks=2)] * 2, "none", (6,), 3),
        convolutional_network((1, 8, 8), [Stage(channels=8, blocks=2)], "max", (6,), 3),
        convolutional_network((1, 8, 8), [Stage(channels=8, window=1)], "l2", (6,), 1),
        dense_network((1, 4, 4), (12, 8), 2, activation="fullsort", parametrisation="stiefel"),
    ],
    ids=["one output", "three outputs", "convolutional", "global maximum", "global norm", "full sort"],
)
def test_certifier_proves_the_declared_constant_of_what_is_exported(network: LipschitzNetwork) -> None:
    model_bytes = emit_graph(network)
    certificate = prove(network, model_bytes, 1.0)
    compare(network, model_bytes, certificate)
    declared = network.fold().declared_margin_bounds_KK().numpy()
    off_diagonal = ~np.eye(len(declared), dtype=bool)
    ratio = certificate.margin_bounds_KK[off_diagonal] / declared[off_diagonal]
    # Zero padding makes a convolution shorter than what is declared of it, and the certifier sees that.
    padded = any(isinstance(module, OrthogonalConv2d) for module in network.modules())
    assert (ratio > (0.8 if padded else 1 - 1e-6)).all()
    assert (ratio < 1 + 1e-3).all()


def test_artefact_can_be_read_by_the_server_and_says_what_made_it(tmp_path: Path) -> None:
    measured = write(small_network(), tmp_path / "small")
    card = Classifier.load(tmp_path / "small", "cpu", threads=1).card
    assert (card.name, card.labels, card.seed) == ("small", LABELS, 7)
    assert card.input.shape == (1, 4, 4)
    assert card.accuracy == measured.accuracy
    assert [(c.epsilon, c.value, c.n) for c in card.certified_accuracy] == [
        (epsilon, value, 30) for epsilon, value in measured.certified_accuracy.items()
    ]
    assert {"cpu", "torch", "onnxruntime", "wall_time_s"} <= set(card.environment)
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


def test_export_replaces_an_older_artefact_whole(tmp_path: Path) -> None:
    write(small_network(), tmp_path / "small")
    (tmp_path / "small" / "leftover").touch()
    write(small_network(), tmp_path / "small", seed=8)
    assert json.loads((tmp_path / "small" / "card.json").read_text())["seed"] == 8
    assert {path.name for path in (tmp_path / "small").iterdir()} == {"model.onnx", "card.json"}


def test_measured_accuracy_counts_right_images_with_a_larger_proved_radius() -> None:
    network, test = small_network(), small_test_set()
    model_bytes = emit_graph(network)
    certificate = prove(network, model_bytes, 1.0)
    measured = measure(model_bytes, certificate, test, (0.0, 0.05, 100.0))
    logits = network.fold()(test.pixels(torch.float64)).detach().numpy()
    right, wide = 0, 0
    for row, label in zip(logits, test.labels_N.tolist(), strict=True):
        margins = [(row[label] - row[j]) / certificate.margin_bounds_KK[label, j] for j in range(3) if j != label]
        right += min(margins) > 0
        wide += min(margins) > 0.05
    assert measured.accuracy == right / 30
    assert measured.certified_accuracy == {0.0: right / 30, 0.05: wide / 30, 100.0: 0.0}


class Stretching(OrthogonalDense):
    """Claims 1 and has 1.01."""

    def fold(self) -> Any:
        folded = super().fold()
        folded.weight_OD = (1.01 * folded.weight_OD).float().double()
        return folded


class WrongBackward(Flatten):
    """Evaluates the identity, whose gradient has the other sign in torch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return 2 * y.detach() - y


class WrongForward(Flatten):
    """Evaluates the identity, emits the negative."""

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        return graph.node("Neg", [super().emit(graph, x)], [x.size])


class Unproved(Flatten):
    """Emits an operator without a rule."""

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        return graph.node("Exp", [super().emit(graph, x)], [x.size])


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (lambda: [Flatten(), Stretching(16, 8)], ExportRefusedError, "proved Lipschitz bound"),
        (lambda: [Normalize([0.0], [0.5]), Flatten(), OrthogonalDense(16, 8)], ExportRefusedError, "declares"),
        (lambda: [WrongBackward(), OrthogonalDense(16, 8)], ExportRefusedError, "differs from autograd"),
        (lambda: [WrongForward(), OrthogonalDense(16, 8)], ExportRefusedError, "differ from torch"),
        (lambda: [Unproved(), OrthogonalDense(16, 8)], UnsupportedModelError, "Exp"),
    ],
    ids=["stretching layer", "undeclared normalisation", "wrong backward", "wrong forward", "no rule"],
)
def test_network_that_breaks_the_promise_is_refused_and_nothing_is_left_behind(
    tmp_path: Path, body: Callable[[], list[Layer]], error: type[Exception], message: str
) -> None:
    torch.manual_seed(2)
    network = LipschitzNetwork((1, 4, 4), Chain(body()), UnitHead(8, 3))
    with pytest.raises(error, match=message):
        write(network, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_refused_export_leaves_the_older_artefact_as_it_was(tmp_path: Path) -> None:
    write(small_network(), tmp_path / "small")
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    network = LipschitzNetwork((1, 4, 4), Chain([Flatten(), Stretching(16, 8)]), UnitHead(8, 3))
    with pytest.raises(ExportRefusedError):
        write(network, tmp_path / "small")
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()} == before


def test_declared_normalisation_is_exported(tmp_path: Path) -> None:
    body = Chain([Normalize([0.2], [0.5]), Flatten(), OrthogonalDense(16, 8), GroupSort2()])
    write(LipschitzNetwork((1, 4, 4), body, UnitHead(8, 3)), tmp_path / "small", lipschitz_constant=2.0)
    assert Classifier.load(tmp_path / "small", "cpu", threads=1).certificate.margin_bounds_KK.max() > 2.0


def test_outside_git_the_code_version_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.shutil, "which", lambda name: None)
    monkeypatch.setattr(export, "metadata", SimpleNamespace(version=lambda name: "1.2.3"))
    assert export.code_version() == "1.2.3"
