"""Reading: every form of an operator becomes one canonical form, and what has two meanings is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from outside_weights import OUTSIDE, write_numbers
from random_graphs import GraphBuilder

from service.network.limits import LARGEST_CONSTANT, LARGEST_TENSOR
from service.network.lowering import LOWERINGS
from service.network.operators import Network, UnsupportedModelError
from service.network.reader import read
from service.network.writer import write
from service.runtime.engine import Engine

Build = Callable[[GraphBuilder], str]


def model_of(build: Build, shape: tuple[int, ...], outputs: int, opset: int = 18, **options: Any) -> bytes:
    builder = GraphBuilder(np.random.default_rng(0), opset=opset, **options)
    return builder.model(shape, build(builder), outputs)


def reasons(model_bytes: bytes) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        read(model_bytes)
    return str(caught.value)


def canonical_logits(network: Network, image_NCHW: np.ndarray) -> np.ndarray:
    return Engine(write(network), "cpu", 1).run(["logits"], {"image": image_NCHW})[0]


def constants(b: GraphBuilder, *numbers: object) -> list[str]:
    return [b.constant(np.array(number)) for number in numbers]


OLDER_FORMS: dict[str, tuple[int, Build]] = {
    "squeeze": (11, lambda b: b.one("Squeeze", b.one("Unsqueeze", "image", axes=[2]), axes=[-3])),
    "reduce mean": (9, lambda b: b.one("ReduceMean", "image", axes=[3, 2], keepdims=1)),
    "reduce maximum": (12, lambda b: b.one("ReduceMax", "image", axes=[-1], keepdims=0)),
    "slice": (9, lambda b: b.one("Slice", "image", starts=[1, -3], ends=[1000, -1], axes=[2, 3])),
    "backward slice": (18, lambda b: b.one("Slice", "image", *constants(b, [-1], [-(2**63) + 1], [3], [-2]))),
    "split": (11, lambda b: b.add("Split", "image", outputs=2, axis=2, split=[1, 3])[1]),
    "split into equal parts": (13, lambda b: b.add("Split", "image", outputs=2, axis=2)[1]),
    "split with a smaller last part": (18, lambda b: b.add("Split", "image", outputs=2, axis=3, num_outputs=2)[1]),
    "pad": (9, lambda b: b.one("Pad", "image", mode="constant", pads=[0, 0, 1, 0, 0, 0, 0, 2], value=0.25)),
    "pad of two axes": (18, lambda b: b.one("Pad", "image", *constants(b, [1, 0, 0, 2], 0.5, [2, -1]))),
    "clip": (9, lambda b: b.one("Clip", "image", min=0.25, max=0.5)),
    "clip from one side": (11, lambda b: b.one("Clip", "image", "", b.constant(np.array(0.5)))),
    "largest": (9, lambda b: b.add("TopK", "image", outputs=2, k=2, axis=3)[0]),
    "upsample": (9, lambda b: b.one("Upsample", "image", numbers32(b, 1, 1, 2, 3), mode="nearest")),
    "resize of opset 10": (10, lambda b: b.one("Resize", "image", numbers32(b, 1, 1, 2, 2), mode="nearest")),
    "flatten": (9, lambda b: b.one("Flatten", "image")),
    "softmax over all axes": (11, lambda b: b.one("Softmax", "image", axis=1)),
    "softmax of the last axis": (11, lambda b: b.one("LogSoftmax", "image", axis=3)),
    "dropout": (7, lambda b: b.one("Dropout", "image", ratio=0.5)),
    "product with a scaled bias": (
        9,
        lambda b: b.one("Gemm", b.one("Flatten", "image"), b.constant(b.rng.normal(size=(48, 3))), *constants(b, [0.5]),
                        alpha=0.5, beta=2.0),
    ),
    "normalisation": (
        9,
        lambda b: b.one("BatchNormalization", "image", *constants(b, [0.5, 2.0], [1.0, 0.0], [0.1, 0.2], [1.0, 4.0])),
    ),
}  # fmt: skip


def numbers32(b: GraphBuilder, *numbers: float) -> str:
    name = b.name("c")
    b.constants.append(numpy_helper.from_array(np.array(numbers, np.float32), name))
    return name


@pytest.mark.parametrize("form", OLDER_FORMS)
def test_an_older_form_means_what_the_runtime_takes_it_for(form: str) -> None:
    opset, build = OLDER_FORMS[form]
    builder = GraphBuilder(np.random.default_rng(0), dtype=np.float32, opset=opset)
    model = onnx.load_model_from_string(builder.model((2, 4, 6), builder.one("Flatten", build(builder)), 1))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "K"
    image_NCHW = np.random.default_rng(1).random((3, 2, 4, 6), np.float32)
    expected = Engine(model.SerializeToString(), "cpu", 1).run(["logits"], {"image": image_NCHW})[0]
    network = read(model.SerializeToString())
    assert network.outputs[0].shape == expected.shape[1:]
    np.testing.assert_allclose(canonical_logits(network, image_NCHW), expected, rtol=1e-5, atol=1e-6)


def test_the_opset_does_not_matter_where_no_operator_changed() -> None:
    def build(b: GraphBuilder) -> str:
        return b.one("MatMul", b.one("Flatten", "image"), b.constant(b.rng.normal(size=(4, 3))))

    networks = [read(model_of(build, (1, 2, 2), 3, opset)) for opset in (9, 13, 18, 24, 25, 27)]
    assert all(network == networks[0] for network in networks)


def test_a_form_that_is_newer_than_the_table_is_refused_with_the_cure() -> None:
    said = reasons(model_of(lambda b: b.one("Celu", "image"), (4,), 4, 28))
    assert "form of opset 28" in said
    assert "version_converter" in said


def test_weights_among_the_inputs_are_weights() -> None:
    def build(b: GraphBuilder) -> str:
        return b.one("Gemm", "image", b.constant(np.eye(4)))

    model = onnx.load_model_from_string(model_of(build, (4,), 4))
    expected = read(model.SerializeToString())
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert read(model.SerializeToString()) == expected


def test_declarations_inside_are_not_believed() -> None:
    def build(b: GraphBuilder) -> str:
        flat = b.one("Flatten", "image")
        count = b.one("Gather", b.one("Shape", flat), b.constant(np.array(1)), axis=0)
        return b.one("Mul", flat, b.one("Cast", count, to=TensorProto.DOUBLE))

    model = onnx.load_model_from_string(model_of(build, (2, 2), 4))
    expected = read(model.SerializeToString())
    flat = model.graph.node[0].output[0]
    model.graph.value_info.append(helper.make_tensor_value_info(flat, TensorProto.DOUBLE, ["N", 990]))
    assert read(model.SerializeToString()) == expected
    assert not onnx.load_model_from_string(write(expected)).graph.value_info


def test_a_batch_size_that_the_file_fixes_becomes_free() -> None:
    def build(b: GraphBuilder) -> str:
        return b.one("Gemm", b.one("Reshape", "image", b.constant(np.array([1, 4]))), b.constant(np.eye(4)))

    builder = GraphBuilder(np.random.default_rng(0))
    network = read(builder.model((2, 2), build(builder), 4, batch=1))
    image = np.random.default_rng(0).random((5, 2, 2))
    np.testing.assert_array_equal(canonical_logits(network, image), image.reshape(5, 4))


def test_dead_nodes_are_dropped_whatever_they_are() -> None:
    def build(b: GraphBuilder) -> str:
        b.one("NonMaxSuppression", "image", "image")
        b.one("ArgMax", "image", axis=1)
        return b.one("Neg", "image")

    model = onnx.load_model_from_string(model_of(build, (4,), 4))
    del model.graph.node[0]
    assert [operator.kind for operator in read(model.SerializeToString()).operators] == ["Neg"]


def test_no_name_of_a_file_reaches_the_canonical_graph() -> None:
    model = onnx.load_model_from_string(model_of(lambda b: b.one("Relu", "image"), (4,), 4))
    model.graph.name = model.producer_name = model.doc_string = model.graph.node[0].name = "SECRET"
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "SECRET"
    model.metadata_props.add(key="SECRET", value="SECRET")
    assert b"SECRET" not in write(read(model.SerializeToString()))


def test_bytes_behind_the_model_do_not_reach_the_canonical_graph() -> None:
    model_bytes = model_of(lambda b: b.one("Relu", "image"), (4,), 4)
    # An unknown field (number 1000, length-delimited), such as another file could hide in.
    hidden = b"\xc2\x3e\x08ORTMhide"
    assert write(read(model_bytes + hidden)) == write(read(model_bytes))


def raw_constant(b: GraphBuilder, data_type: int, array: np.ndarray) -> str:
    name = b.name("c")
    b.constants.append(helper.make_tensor(name, data_type, array.shape, array.ravel().tolist()))
    return name


REFUSED: dict[str, tuple[Build, str]] = {
    "squeeze without axes": (lambda b: b.one("Squeeze", "image"), "names no axes"),
    "squeeze with an empty list of axes": (
        lambda b: b.one("Squeeze", "image", b.constant(np.zeros(0, np.int64))),
        "names no axes",
    ),
    "reduction of an empty list of axes": (
        lambda b: b.one("ReduceSum", "image", b.constant(np.zeros(0, np.int64))),
        "names no axes",
    ),
    "a text that is cast to a number": (
        lambda b: b.one("Mul", "image", b.one("Cast", raw_constant(b, TensorProto.STRING, np.array([b"1e-3_0"])),
                                              to=TensorProto.DOUBLE)),
        "string",
    ),
    "float8": (
        lambda b: b.one("Mul", "image", b.one("Cast", raw_constant(b, TensorProto.FLOAT8E4M3FN, np.array([1.0])),
                                              to=TensorProto.DOUBLE)),
        "float8",
    ),
    "a constant cast to bfloat16": (
        lambda b: b.one("Mul", "image", b.one("Cast", b.one("Cast", b.constant(np.ones(1)), to=TensorProto.BFLOAT16),
                                              to=TensorProto.DOUBLE)),
        "several meanings",
    ),
    "the smallest integer divided by -1": (
        lambda b: b.one("Expand", "image", b.one("Div", *constants(b, [-(2**63), 1], [-1, 1]))),
        "outside of int64",
    ),
    "a number that is no integer after the cast": (
        lambda b: b.one("Expand", "image", b.one("Cast", b.constant(np.array([1e300, 1.0])), to=TensorProto.INT64)),
        "outside of the integers",
    ),
    "arithmetic that rounds": (
        lambda b: b.one("Mul", "image", b.one("Add", *constants(b, [0.1], [0.2]))),
        "rounds",
    ),
    "an attribute that the specification does not have": (lambda b: b.one("Relu", "image", alpha=0.5), "alpha"),
    "float32 weights in a float64 graph": (
        lambda b: b.one("Mul", "image", numbers32(b, 2.0)),
        "float32 in a graph of float64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_with_two_meanings_is_refused(kind: str) -> None:
    build, expected = REFUSED[kind]
    assert expected in reasons(model_of(build, (4,), 4))


TOO_LARGE: dict[str, Build] = {
    "Pad": lambda b: b.one("Pad", "image", b.constant(np.array([0, 0, 2**23, 0, 0, 2**23]))),
    "Expand": lambda b: b.one("Expand", b.one("Gather", "image", b.constant(np.array([0])), axis=2),
                              b.constant(np.array([1, 4, 2**40]))),
    "Tile": lambda b: b.one("Tile", "image", b.constant(np.array([1, 2**31, 2**31]))),
    "ConstantOfShape": lambda b: b.one("Add", "image", b.one("ConstantOfShape", b.constant(np.array([2**20, 2**20])))),
    "Range": lambda b: b.one("Gather", "image", b.one("Range", *constants(b, 0, 2**50, 1)), axis=1),
    "constant Tile": lambda b: b.one("Add", "image", b.one("Tile", *constants(b, np.ones((1, 1)), [2**30, 2**30]))),
    "constant Pad": lambda b: b.one("Add", "image", b.one("Pad", *constants(b, np.ones(1), [2**40, 0]))),
    "constant Expand": lambda b: b.one("Add", "image", b.one("Expand", *constants(b, np.ones(1), [2**40]))),
    "Gather": lambda b: b.one("Gather", b.one("Gather", "image", b.constant(np.zeros(5000, int)), axis=1),
                              b.constant(np.zeros(5000, int)), axis=2),
    "ConvTranspose": lambda b: b.one("ConvTranspose", b.one("Unsqueeze", "image", b.constant(np.array([1]))),
                                     b.constant(np.ones((1, 1, 1, 1))), strides=[100_000, 100_000]),
    "Resize": lambda b: b.one("Resize", b.one("Unsqueeze", "image", b.constant(np.array([1]))), "", "",
                              b.constant(np.array([2**20, 2**20])), axes=[2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_sizes_that_a_file_states_are_not_believed(kind: str) -> None:
    most = LARGEST_CONSTANT if kind[0].islower() or kind in ("ConstantOfShape", "Range") else LARGEST_TENSOR
    assert f"at most {most}" in reasons(model_of(TOO_LARGE[kind], (4, 4), 4))


def test_an_image_that_no_machine_holds_is_refused() -> None:
    assert "too large" in reasons(model_of(lambda b: b.one("Relu", "image"), (2**62,), 4))


def test_every_reason_is_said_at_once() -> None:
    def build(b: GraphBuilder) -> str:
        x = b.one("Exp", "image")
        x = b.one("InstanceNormalization", x, *constants(b, [1.0], [1.0]))
        return b.one("Add", b.one("Log", x), b.one("Squeeze", "image"))

    said = reasons(model_of(build, (4,), 4))
    for expected in ("Exp", "InstanceNormalization", "no Lipschitz constant", "Log", "names no axes"):
        assert expected in said


def test_the_specification_knows_each_version_that_a_lowering_reads() -> None:
    known = {(schema.name, schema.since_version) for schema in onnx.defs.get_all_schemas_with_history()}
    for kind, entry in LOWERINGS.items():
        versions = {version for name, version in known if name == kind}
        assert entry.versions & versions, kind


@pytest.mark.parametrize("place", OUTSIDE)
def test_a_tensor_outside_the_file_is_refused_wherever_it_is_named(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbers(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "is stored outside the file, where its digest does not reach" in reasons(
        OUTSIDE[place]().SerializeToString()
    )
