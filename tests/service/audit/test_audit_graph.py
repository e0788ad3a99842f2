"""Graphs as the audit reads them: moves are those of the runtime, constants fold exactly, anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from audit_cases import derived, rational
from onnx import TensorProto, helper, numpy_helper
from outside_weights import OUTSIDE, write_numbers
from random_graphs import GraphBuilder

from service.audit.balls import NotAuditableError
from service.audit.graph import read_graph

SHAPE = (8, 2, 4)
Build = Callable[[GraphBuilder], str]


def integers(b: GraphBuilder, *values: int) -> str:
    return b.constant(np.array(values, dtype=np.int64))


def halves(b: GraphBuilder, **attributes: Any) -> str:
    names = b.add("Split", "image", outputs=3, **attributes)
    return b.one("Concat", names[2], names[0], names[1], axis=1)


MOVES: dict[str, Build] = {
    "space to depth": lambda b: b.one("SpaceToDepth", "image", blocksize=2),
    "depth to space, depth first": lambda b: b.one("DepthToSpace", "image", blocksize=2),
    "depth to space, columns first": lambda b: b.one("DepthToSpace", "image", blocksize=2, mode="CRD"),
    "uneven split": lambda b: halves(b, axis=1, num_outputs=3),
    "backward slice": lambda b: b.one(
        "Slice", "image", integers(b, -1, 3), integers(b, -100, 0), integers(b, 1, -1), integers(b, -3, -2)
    ),
    "slice of the first axes": lambda b: b.one("Slice", "image", integers(b, 0, 2), integers(b, 100, -1)),
    "gather from the end": lambda b: b.one("Gather", "image", integers(b, -1, 0, -8), axis=1),
    "zeros around": lambda b: b.one("Pad", "image", integers(b, 0, 1, 2, 0, 0, 0, 1, 3)),
    "mirrored": lambda b: b.one(
        "Pad", "image", integers(b, 2, 1), b.constant(np.array(0.0)), integers(b, 3), mode="reflect"
    ),
    "edges repeated": lambda b: b.one("Pad", "image", integers(b, 0, 0, 1, 2, 0, 0, 3, 0), mode="edge"),
    "axes in and out": lambda b: b.one(
        "Squeeze", b.one("Unsqueeze", b.one("Transpose", "image", perm=[0, 3, 1, 2]), integers(b, 1)), integers(b, 1)
    ),
    "sizes taken over": lambda b: b.one("Reshape", "image", integers(b, 0, -1, 4)),
    "sizes that include 0": lambda b: b.one("Reshape", "image", integers(b, -1, 4, 16), allowzero=1),
    "identities": lambda b: b.one("Dropout", b.one("Identity", "image")),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_those_of_the_runtime(name: str) -> None:
    b = GraphBuilder(np.random.default_rng(0))
    output = b.one("Flatten", MOVES[name](b), axis=1)
    pixels = np.random.default_rng(1).permutation(64).reshape(SHAPE)
    # The builder declares a size of the output; without it, one test serves all moves.
    proto = onnx.load_from_string(b.model(SHAPE, output, 1))
    proto.graph.output[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = np.asarray(session.run(None, {"image": (pixels / 255)[None]})[0])
    (exact,) = derived(proto.SerializeToString(), pixels).logits
    assert [float(ball) for ball in exact] == expected[0].tolist()


FOLDED: dict[str, Build] = {
    "a constant node": lambda b: b.one("Constant", value=numpy_helper.from_array(np.array([0.5, 0.25, 2.0]))),
    "negated": lambda b: b.one("Neg", b.constant(np.array([-0.5, -0.25, -2.0]))),
    "cast without a rounding": lambda b: b.one(
        "Cast", b.one("Constant", value=numpy_helper.from_array(np.array([0.5, 0.25, 2.0], np.float32))), to=11
    ),
    "moved": lambda b: b.one("Gather", b.constant(np.array([2.0, 0.25, 0.5])), integers(b, 2, 1, 0)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_constants_fold_exactly(name: str) -> None:
    b = GraphBuilder(np.random.default_rng(0))
    (exact,) = derived(b.model((3,), b.one("Mul", "image", FOLDED[name](b)), 3), np.array([51, 102, 51])).logits
    assert [float(ball) for ball in exact] == pytest.approx([0.1, 0.1, 0.4], abs=1e-16)
    assert rational(exact[0].mid()) * 10 == pytest.approx(1, abs=1e-50)


def size(b: GraphBuilder, operator: str, left: int, right: int) -> str:
    computed = b.one(operator, integers(b, left), integers(b, right))
    return b.one("Reshape", "image", b.one("Concat", computed, integers(b, 3), axis=0))


REFUSED: dict[str, tuple[Build, str]] = {
    "negative pads": (lambda b: b.one("Pad", "image", integers(b, 0, -1, 0, 0)), "mode 'constant' with pads"),
    "padding with ones": (
        lambda b: b.one("Pad", "image", integers(b, 0, 1, 0, 0), b.constant(np.array(1.0))),
        "a padding value other than 0",
    ),
    "a step of 0": (
        lambda b: b.one("Slice", "image", integers(b, 0), integers(b, 3), integers(b, 1), integers(b, 0)),
        "a step of 0",
    ),
    "positions outside": (lambda b: b.one("Gather", "image", integers(b, 3), axis=1), "within an axis of 3"),
    "a shape of floats": (lambda b: b.one("Reshape", "image", b.constant(np.array([-1.0, 3.0]))), "must be integers"),
    "sizes that do not split": (
        lambda b: b.add("Split", "image", integers(b, 1, 1), outputs=2, axis=1)[0],
        "sizes [1, 1] do not split an axis of 3",
    ),
    "nothing left": (
        lambda b: b.one("Slice", "image", integers(b, 2), integers(b, 1), integers(b, 1)),
        "nothing is left of the tensor",
    ),
    "an unknown attribute": (lambda b: b.one("Flatten", "image", axis=1, extra=1), "not a valid ONNX model"),
    "rounded constants": (
        lambda b: b.one("Mul", "image", b.one("Add", b.constant(np.ones(3)), b.constant(np.ones(3)))),
        "arithmetic on constants has no rule here",
    ),
    "a cast that rounds": (
        lambda b: b.one("Mul", "image", b.one("Cast", b.one("Cast", b.constant(np.full(3, 0.1)), to=1), to=11)),
        "a cast that rounds a constant",
    ),
    "a cast to integers": (
        lambda b: b.one("Mul", "image", b.one("Cast", b.constant(np.ones(3)), to=6)),
        "a cast to another type than float64 or float32",
    ),
    "a cast of data": (lambda b: b.one("Cast", b.one("Cast", "image", to=1), to=11), "another format than the graph's"),
    "a constant that is infinite": (
        lambda b: b.one("Mul", "image", b.one("Constant", value=numpy_helper.from_array(np.full(3, np.inf)))),
        "a constant that is NaN or infinite",
    ),
    "a constant of text": (
        lambda b: b.one("Mul", "image", b.one("Constant", value_string="x")),
        "a constant that is no tensor",
    ),
    "a negative quotient": (lambda b: size(b, "Div", -4, 2), "a quotient of integers that are not sizes"),
    "huge sizes": (lambda b: size(b, "Mul", 2**40, 2**40), "integers too large for sizes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_node_that_is_not_read_is_refused_with_its_reason(name: str) -> None:
    build, reason = REFUSED[name]
    b = GraphBuilder(np.random.default_rng(0))
    with pytest.raises(NotAuditableError) as caught:
        derived(b.model((3,), build(b), 3), np.array([1, 2, 3]))
    assert reason in str(caught.value)


def changed(change: Callable[[onnx.ModelProto], object]) -> bytes:
    b = GraphBuilder(np.random.default_rng(0))
    model = onnx.load_from_string(b.model((3,), b.one("Mul", "image", b.constant(np.ones(3))), 3))
    change(model)
    return model.SerializeToString()


def second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.DOUBLE, [1]))


def local_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 18)]))
    model.opset_import.append(helper.make_opsetid("own", 1))


def not_a_number(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(3, np.nan), model.graph.initializer[0].name))


def half_precision(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def free_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "W"


def old_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 7


MODELS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "a second input": (second_input, "exactly one input, the image, and one output"),
    "a local function": (local_function, "local functions or sparse weights"),
    "a weight that is NaN": (not_a_number, "a weight that is NaN or infinite"),
    "half precision": (half_precision, "the input must be float64 or float32"),
    "a free shape": (free_shape, "of a fixed shape after the batch axis"),
    "an old opset": (old_opset, "opset [7]: 13 to 24 are read here"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_not_read_is_refused_with_its_reason(name: str) -> None:
    change, reason = MODELS[name]
    with pytest.raises(NotAuditableError) as caught:
        read_graph(changed(change))
    assert reason in str(caught.value)


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(NotAuditableError, match="not a valid ONNX model"):
        read_graph(b"\x08\x07onnx")


@pytest.mark.parametrize("place", OUTSIDE)
def test_a_tensor_outside_the_file_is_refused_wherever_it_is_named(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbers(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotAuditableError, match="stored outside the file"):
        read_graph(OUTSIDE[place]().SerializeToString())
