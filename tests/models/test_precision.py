"""A model in float32 in blocks is the same network up to its proved error, and its graph splits every long sum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exact_graphs import FLOATS, Program
from graph_builder import GraphBuilder

from models.data.labelled import LabelledImages
from models.export import ExportRefusedError, converted, emit_graph, export_artefact
from models.nets.networks import convolutional_network, dense_network
from models.precision import PrecisionError, in_float32
from models.recipes import Stage
from service.artefact.card import read_card
from service.certificate import certify
from service.network.operators import Constant
from service.network.reader import read
from service.runtime.engine import Engine


def dense() -> bytes:
    torch.manual_seed(0)
    return emit_graph(dense_network((1, 6, 6), (24, 20), 3))


def convolutional() -> bytes:
    torch.manual_seed(0)
    return emit_graph(convolutional_network((1, 8, 8), [Stage(channels=8), Stage(channels=8)], "none", (16,), 3))


def columns(model_bytes: bytes) -> list[int]:
    """Summed columns of each matrix product."""
    found = []
    for operator in read(model_bytes).operators:
        if operator.kind in ("Gemm", "MatMul"):
            left, right = operator.operands[:2]
            turned = isinstance(left, Constant) or (operator.kind == "Gemm" and operator.integer("transB"))
            weight = left if isinstance(left, Constant) else right
            assert isinstance(weight, Constant)
            found.append(weight.array.shape[1 if turned else 0])
    return found


@pytest.mark.parametrize("block", [1, 5, 8, 1000])
@pytest.mark.parametrize("model", [dense, convolutional])
def test_no_product_has_more_columns_than_a_block_and_none_is_lost(model: object, block: int) -> None:
    before = model()  # type: ignore[operator]
    after = in_float32(before, block)
    assert max(columns(after)) <= block
    assert sum(columns(after)) == sum(columns(before))
    assert {op.array.dtype for o in read(after).operators for op in o.operands if isinstance(op, Constant)} <= {
        np.dtype(np.float32),
        np.dtype(np.int64),
    }


@pytest.mark.parametrize("model", [dense, convolutional])
def test_logits_are_those_of_the_exact_network_within_the_proved_error(model: object) -> None:
    before = model()  # type: ignore[operator]
    after, certificate = converted(before, 5)
    whole = certify(in_float32(before, 1000))
    assert certificate.precision == "float32"
    assert 1e-9 < certificate.logit_error < whole.logit_error
    np.testing.assert_allclose(certificate.margin_bounds_KK, certify(before).margin_bounds_KK, rtol=1e-6)
    shape = certificate.input_shape
    pixels = np.random.default_rng(1).integers(0, 256, (50, *shape)) / 255
    (logits,) = Engine(after, "cpu", 1).run(["logits"], {"image": pixels})
    exact = Program.parse(after).evaluate(pixels, FLOATS)["logits"]
    assert np.max(np.abs(logits - exact)) <= certificate.logit_error


def test_a_bias_is_added_once() -> None:
    b = GraphBuilder()
    y = b.one("Gemm", "image", b.constant(np.zeros((9, 2))), b.constant(np.array([3.0, -1.0])))
    made = in_float32(b.model((9,), y, 2), 2)
    (logits,) = Engine(made, "cpu", 1).run(["logits"], {"image": np.ones((1, 9))})
    assert logits.tolist() == [[3.0, -1.0]]


def test_a_scaled_product_stays_whole() -> None:
    b = GraphBuilder()
    model = b.model((9,), b.one("Gemm", "image", b.constant(np.ones((9, 2))), alpha=0.5), 2)
    assert columns(in_float32(model, 2)) == [9]


def test_a_constant_beyond_float32_is_refused() -> None:
    b = GraphBuilder()
    model = b.model((3,), b.one("MatMul", "image", b.constant(np.full((3, 2), 1e39))), 2)
    with pytest.raises(PrecisionError, match="beyond the range of float32"):
        in_float32(model, 2)


def test_a_conversion_to_another_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = in_float32(emit_graph(dense_network((1, 6, 6), (8,), 3)), 5)
    monkeypatch.setattr("models.export.in_float32", lambda *_: other)
    with pytest.raises(ExportRefusedError, match="differ from those in float64"):
        converted(dense(), 5)


def test_the_card_of_an_export_in_float32_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 6, 6), dtype=torch.uint8)
    measured = export_artefact(
        dense_network((1, 6, 6), (24, 20), 3),
        tmp_path / "small",
        labels=["a", "b", "c"],
        lipschitz_constant=1.0,
        test=LabelledImages(images, torch.arange(12) % 3),
        epsilons=(0.1,),
        data={},
        recipe={"loss": {}},
        seed=0,
        wall_time_s=1.0,
        block=8,
    )
    card = read_card(tmp_path / "small")
    assert card.recipe["export"] == {"precision": "float32", "blocks": 8}
    assert card.accuracy == measured.accuracy
    assert certify((tmp_path / "small" / "model.onnx").read_bytes()).precision == "float32"
