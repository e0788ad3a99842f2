"""Each check of the reader, by a node that it alone refuses: a check that goes is noticed here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper
from random_graphs import GraphBuilder

from service.network.operators import UnsupportedModelError
from service.network.reader import read

Build = Callable[[GraphBuilder], str]
Case = tuple[tuple[int, ...], Build, str] | tuple[tuple[int, ...], Build, str, int]


def c(b: GraphBuilder, *numbers: object) -> list[str]:
    """Return constants."""
    return [b.constant(np.array(number)) for number in numbers]


def f32(b: GraphBuilder, *numbers: float) -> str:
    name = b.name("c")
    b.constants.append(numpy_helper.from_array(np.array(numbers, np.float32), name))
    return name


def node(operator: str, *more: object, first: str = "image", outputs: int = 1, **attributes: object) -> Build:
    """Return a graph of one operator on the image and constants."""
    return lambda b: b.add(operator, first, *c(b, *more), outputs=outputs, **attributes)[0]


def beside(operator: str, *operands: object, **attributes: object) -> Build:
    """Return a graph that adds what an operator makes of constants."""
    return lambda b: b.one("Add", "image", b.one(operator, *c(b, *operands), **attributes))


def resized(*operands: Callable[[GraphBuilder], str], **attributes: object) -> Build:
    return lambda b: b.one("Resize", "image", *(one(b) for one in operands), **attributes)


def empty(b: GraphBuilder) -> str:
    return ""


def scales(*numbers: float) -> Callable[[GraphBuilder], str]:
    return lambda b: f32(b, *numbers)


def sizes(*numbers: int) -> Callable[[GraphBuilder], str]:
    return lambda b: c(b, list(numbers))[0]


K, IMAGE = np.ones((2, 1, 2, 2)), (1, 4, 4)
REFUSALS: list[Case] = [
    # elementwise
    ((4,), lambda b: b.one("Dropout", "image", f32(b, 0.5), *c(b, True)), "training_mode"),
    ((4,), node("Cast", to=TensorProto.FLOAT), "away from float64"),
    ((1, 4), node("PRelu", np.ones((3, 4))), "broadcasts the tensor"),
    ((4,), lambda b: b.one("Add", b.one("Unsqueeze", "image", *c(b, [1])), "image"), "across the batch"),
    ((4,), node("Pow", [2.0, 2.0]), "must be one number"),
    ((4,), node("Add", np.ones((2, 4))), "own batch axis"),
    ((4,), node("Add", np.ones((2, 1, 4))), "more axes"),
    ((4,), node("Add", np.ones(3)), "do not broadcast"),
    ((4,), node("Add", np.ones(4, int)), "floating-point numbers"),
    ((4,), lambda b: b.one("Add", "image", f32(b, 1.0)), "float32 in a graph of float64"),
    ((4,), lambda b: b.one("Add", "image", b.one("Exp", "image")), "no proved rule"),
    ((4,), lambda b: b.one("Reshape", "image", "image"), "must be a constant"),
    (IMAGE, lambda b: b.one("Conv", *c(b, np.ones((1, 1, 4, 4))), "image"), "must depend on the image"),
    ((4,), node("Celu"), "form of opset 28", 28),
    # linear maps
    ((4,), node("Gemm", np.ones((4, 2)), transA=1), "contract the batch"),
    ((2, 2), node("Gemm", np.ones((2, 2))), "flat tensor"),
    ((4,), node("Gemm", np.ones((3, 2))), "3 rows"),
    ((4,), node("Gemm", np.ones((4, 2)), np.ones((2, 2))), "a bias of shape (2, 2)"),
    ((4,), lambda b: b.one("MatMul", "image", b.one("Relu", "image")), "both depend on the image"),
    ((4,), node("MatMul", np.ones((1, 4, 2))), "must be a matrix"),
    ((2, 4), lambda b: b.one("MatMul", *c(b, np.ones((3, 4))), "image"), "constant left operand"),
    ((4,), node("MatMul", np.ones((3, 2))), "3 rows"),
    ((4,), node("Conv", np.ones((4, 4))), "a kernel of shape"),
    (IMAGE, node("Conv", K, kernel_shape=[3, 3]), "kernel_shape is not"),
    (IMAGE, node("Conv", K, np.ones(3)), "does not fit 2 channels"),
    (IMAGE, node("Conv", K, strides=[0, 1]), "must be 1 or more"),
    (IMAGE, node("Conv", K, strides=[1]), "has 1 entries, expected 2"),
    (IMAGE, node("Conv", np.ones((2, 2, 2, 2))), "does not fit an image"),
    (IMAGE, node("Conv", K, pads=[-1, 0, 0, 0]), "negative pads"),
    (IMAGE, node("Conv", K, auto_pad="SOMEHOW"), "has no proved rule"),
    (IMAGE, node("Conv", np.ones((2, 1, 5, 5))), "larger than the padded image"),
    (IMAGE, node("ConvTranspose", np.ones((2, 1, 2, 2))), "does not fit an image"),
    ((2, 3), node("BatchNormalization", *[np.ones(2)] * 4, training_mode=1, outputs=3), "training form"),
    ((2, 3), node("BatchNormalization", *[np.ones(3)] * 4), "do not fit 2 channels"),
    ((2, 3), node("BatchNormalization", *[np.ones((2, 3))] * 4, spatial=0), "spatial=0", 7),
    # windows
    (IMAGE, node("MaxPool", kernel_shape=[0, 1]), "must be 1 or more"),
    (IMAGE, node("MaxPool", kernel_shape=[2, 2], pads=[2, 0, 0, 0]), "padding only"),
    (IMAGE, node("MaxPool", kernel_shape=[2, 2], outputs=2), "indices of a maximum"),
    ((4,), node("GlobalMaxPool"), "at least one spatial axis"),
    ((4,), node("GlobalLpPool"), "at least one spatial axis"),
    (IMAGE, node("GlobalLpPool", p=3), "p other than 2"),
    # reductions
    ((4,), node("ReduceSum"), "names no axes"),
    ((4,), node("ReduceSum", [0]), "along the batch axis"),
    ((4,), node("ReduceSum", [2]), "outside of the 2 axes"),
    ((4,), node("TopK", [1, 2], outputs=2), "one constant integer"),
    ((4,), node("TopK", [5], outputs=2), "k=5"),
    # moves
    ((4,), node("Flatten", axis=0), "would mix images"),
    ((4,), node("Reshape", [0, 4, 0]), "copies an axis"),
    ((4,), node("Reshape", [4, -1]), "keep the batch axis"),
    ((4,), node("Reshape", [0, 3]), "keep the batch axis"),
    ((4,), node("Reshape", [0.0, 4.0]), "must be constant integers"),
    ((4, 1), node("Squeeze"), "names no axes"),
    ((4, 1), node("Squeeze", [2, -1]), "twice"),
    ((4, 1), node("Squeeze", [1]), "longer than 1"),
    ((4,), node("Unsqueeze", [2, -2]), "twice"),
    ((4,), node("Unsqueeze", [0]), "before the batch"),
    ((4,), node("Unsqueeze", np.zeros(0, int)), "names no axes"),
    ((4, 1), node("Transpose", perm=[1, 0, 2]), "moves the batch axis"),
    ((4, 1), node("Transpose", perm=[0, 1, 1]), "does not fit 3 axes"),
    ((4,), node("Split", [1, 2], axis=1, outputs=2), "do not split"),
    ((5,), lambda b: b.add("Split", "image", axis=1, outputs=2)[0], "equal parts", 13),
    ((4,), node("Slice", [0], [1], [0]), "cuts the batch"),
    ((4,), node("Slice", [3], [1], [1]), "nothing is left"),
    ((4,), node("Slice", [0, 1], [1], [1]), "different lengths"),
    ((4,), node("Slice", [0], [1], [2]), "outside of the 2 axes"),
    ((4,), node("Slice", [0], [1], [1], [0]), "a step of 0"),
    ((4,), node("Slice", [-5], [-9], [1], [-1]), "read in two ways"),
    ((4,), node("Slice", [0, 1], [4, 4], [1, -1]), "named twice"),
    ((4,), node("Gather", [0.0], axis=1), "must be constant integers"),
    ((4,), node("Gather", [4], axis=1), "positions outside"),
    ((4,), node("Concat", np.ones(4), axis=1), "a constant of 1 axes"),
    ((4,), node("Concat", np.ones((2, 4)), axis=1), "own batch axis"),
    ((2, 2), node("Concat", np.ones((1, 3, 3)), axis=1), "do not fit"),
    ((4,), node("Pad", [0, 1, 1]), "3 pads for 2 axes"),
    ((4,), node("Pad", [1, 0, 0, 1], 0.0, [1, -1]), "twice"),
    ((4,), node("Pad", [0, -1, 0, 0]), "negative pads"),
    ((4,), node("Pad", [1, 0, 0, 0]), "pads the batch"),
    ((4,), node("Pad", [0, 1, 0, 0], mode="mirror"), "has no proved rule"),
    ((4,), node("Expand", [1, 1, 4]), "before the batch"),
    ((4,), node("Expand", [2, 4]), "fixes the length"),
    ((4,), node("Expand", [1, 0]), "empty axis"),
    ((4,), node("Tile", [1, 2, 2]), "do not fit"),
    ((4,), node("Tile", [2, 1]), "repeats the batch"),
    ((4,), lambda b: b.one("Where", *c(b, np.ones(4)), "image", "image"), "must hold booleans"),
    ((4,), lambda b: b.one("Where", *c(b, True), "image", b.one("Unsqueeze", "image", *c(b, [1]))), "different ranks"),
    ((4,), lambda b: b.one("Where", "image", "image", "image"), "jumps"),
    (IMAGE, node("SpaceToDepth", blocksize=3), "does not divide"),
    (IMAGE, node("DepthToSpace", blocksize=2), "does not divide"),
    # resampling
    (IMAGE, resized(empty, scales(1, 1, 0.5, 0.5), mode="linear", antialias=1), "antialias"),
    (IMAGE, resized(empty, empty, sizes(2, 2), axes=[2, 3], keep_aspect_ratio_policy="not_larger"), "stretch"),
    (IMAGE, resized(empty, scales(2, 2), sizes(8, 8), axes=[2, 3]), "either scales or sizes"),
    (IMAGE, resized(empty, scales(2, 2), axes=[2, -2]), "twice"),
    (IMAGE, resized(empty, lambda b: c(b, [1.0, 1.0, 2.0, 2.0])[0]), "one float32 for each axis"),
    (IMAGE, resized(empty, scales(2, 2, 2)), "one float32 for each axis"),
    (IMAGE, resized(empty, scales(1, 1, -2, 2)), "a scale of -2"),
    ((1, 3, 3), resized(empty, scales(1, 1, 1.6666666, 1)), "another size"),
    (IMAGE, resized(empty, empty, sizes(8, 8)), "one integer for each axis"),
    (IMAGE, resized(empty, empty, sizes(3, 1, 8, 8)), "a length of its own"),
    (IMAGE, resized(empty, empty, sizes(0, 8), axes=[2, 3]), "a size of 0"),
    (IMAGE, resized(empty, empty, lambda b: b.one("Gather", b.one("Shape", "image"), *c(b, [0, 1, 0, 0]))), "depend"),
    (IMAGE, resized(empty, scales(1, 2, 2, 2)), "scales the channel axis"),
    (IMAGE, resized(empty, lambda b: "image"), "must be constants"),
    (IMAGE, resized(empty, scales(1, 1, 2, 2), mode="cubic"), "has no proved rule"),
    # constants
    ((4,), lambda b: b.one("Reshape", "image", b.one("Neg", b.one("Shape", "image"))), "computes with the batch size"),
    ((4,), lambda b: b.one("Expand", "image", b.one("Gather", b.one("Shape", "image"), *c(b, [0, 0]))), "batch"),
    ((4,), lambda b: b.one("Tile", "image", b.one("Shape", "image")), "depends on the batch size"),
    ((4,), lambda b: b.one("Mul", "image", b.one("Cast", b.one("Size", "image"), to=11)), "with the batch size"),
    ((4,), lambda b: b.one("Where", b.one("Not", b.add("Dropout", "image", outputs=2)[1]), "image", "image"), "mask"),
    ((4,), lambda b: b.one("Tile", "image", b.one("Shape", b.add("TopK", "image", *c(b, [2]), outputs=2)[1])), "jump"),
    ((4,), beside("Reshape", np.ones(4), [3]), "do not fit"),
    ((4,), beside("Squeeze", np.ones((1, 4)), np.zeros(0, int)), "two ways"),
    ((4,), beside("ScatterND", np.ones(4), np.zeros((1, 0), int), np.ones((1, 4))), "of no axis"),
    ((4,), beside("Sin", 1.0), "no proved rule"),
    ((4,), beside("Sqrt", 1.0), "rounds"),
    ((4,), beside("Range", 0.0, 4.0, 1.0), "rounds"),
    ((4,), beside("Range", 0, 4, 0), "a step of 0"),
    ((4,), beside("ConstantOfShape", [-1]), "a constant of shape"),
    ((4,), lambda b: b.one("Add", "image", b.one("ConstantOfShape", *c(b, [4]), value=numpy_helper.from_array(
        np.ones(2)))), "one number"),
    ((4,), beside("Cast", 1e300, to=TensorProto.FLOAT), "not finite"),
    ((4,), beside("Cast", 1.0, to=TensorProto.FLOAT16), "several meanings"),
    ((4,), beside("Cast", -1.0, to=TensorProto.UINT8), "outside of the integers"),
    ((4,), beside("Concat", [1.0], [1], axis=0), "different types"),
    ((4,), beside("Concat", [1.0], [1.0], axis=2), "outside of the 1 axes"),
    ((4,), beside("Flatten", np.ones((2, 2)), axis=3), "outside of the 2 axes"),
    ((4,), beside("Gather", np.ones(4), [1.0]), "must be integers"),
    ((4,), beside("Gather", np.ones(4), [4]), "positions outside"),
    ((4,), beside("GatherND", np.ones((1, 4)), [[0]], batch_dims=1), "batch_dims"),
    ((4,), beside("ScatterND", np.ones(4), [[0]], [1.0], reduction="add"), "rounds"),
    ((4,), beside("ScatterElements", np.ones(4), [0], [1.0], reduction="add"), "rounds"),
    ((4,), beside("Pad", np.ones(4), [0, 0], mode="mirror"), "not supported"),
    ((4,), beside("Pad", np.ones(4), [0, 0, 0]), "do not fit"),
    ((4,), beside("Tile", np.ones(4), [1, 1]), "do not fit"),
    ((4,), beside("Where", np.ones(4), np.ones(4), np.ones(4)), "mask of booleans"),
    ((4,), lambda b: b.one("Where", b.one("Equal", *c(b, [1, 2], [1.0, 2.0])), "image", "image"), "different types"),
    ((4,), lambda b: b.one("Gather", "image", b.one("Neg", *c(b, [-(2**63)]))), "no opposite"),
    ((4,), lambda b: b.one("Gather", "image", b.one("Div", *c(b, [1], [0]))), "divides by zero"),
    ((4,), lambda b: b.one("Gather", "image", b.one("Add", *c(b, [2**63 - 1], [1]))), "outside of int64"),
    ((4,), lambda b: b.one("Gather", "image", b.one("ReduceProd", *c(b, [2**12, 2**12]))), "beyond 24 bits"),
    ((4,), beside("ReduceProd", [1.0, 2.0]), "rounds"),
    ((4,), lambda b: b.one("Add", "image", b.one("Clip", *c(b, np.ones(4)), min=0.0)), "limits as attributes", 9),
    ((4,), lambda b: b.one("Add", "image", b.one("Constant", value_string="1")), "not supported"),
    ((4,), lambda b: b.one("Add", "image", b.one("Constant", value_float=1.0, value_int=1)), "exactly one value"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSALS)), ids=[f"{k} {case[2]}" for k, case in enumerate(REFUSALS)])
def test_a_check_refuses(number: int) -> None:
    shape, build, expected, *opset = REFUSALS[number]
    builder = GraphBuilder(np.random.default_rng(0), dtype=np.float64, opset=opset[0] if opset else 18)
    with pytest.raises(UnsupportedModelError) as caught:
        read(builder.model(shape, build(builder), 4))
    assert expected in "\n".join(caught.value.reasons)
