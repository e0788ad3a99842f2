"""Files as other people write them: networks of the verification competition, and the operator tests of `onnx`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import pytest
from exact_graphs import Program
from flint import fmpq
from graph_checks import as_float, as_number
from onnx import TensorProto, helper, numpy_helper

from service.certificate import certify
from service.network.operators import UnsupportedModelError
from service.network.reader import read
from service.network.writer import write
from service.runtime.engine import Engine

PUBLIC = Path(onnx.__file__).parent / "backend/test/data"


def competition(shape: tuple[int, ...], *, kernels: bool, normalised: bool, opset: int = 9) -> bytes:
    """Return a network as the benchmarks of VNN-COMP store them: IR 3, every weight among the inputs, a batch of 1.

    Args:
        shape: of one image.
        kernels: whether it begins with a convolution.
        normalised: whether it subtracts a mean and divides by a deviation.
        opset: version of the operators.
    """
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {}

    def stored(array: np.ndarray) -> str:
        name = f"w{len(weights)}"
        weights[name] = array if array.dtype.kind == "i" else array.astype(np.float32)
        return name

    def add(operator: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, list(inputs), [f"y{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    x, size = "input", int(np.prod(shape))
    if normalised:
        x = add("Sub", x, stored(np.array([[[[0.1307]]]] if len(shape) == 3 else [0.1307])))
        x = add("Div", x, stored(np.array([[[[0.3081]]]] if len(shape) == 3 else [0.3081])))
    if kernels:
        if len(shape) == 1:
            shape_of_image = add("Constant", value=numpy_helper.from_array(np.array([-1, 1, 28, 28])))
            x = add("Reshape", x, shape_of_image)
        kernel, bias = stored(rng.normal(size=(2, 1, 4, 4)) / 4), stored(rng.normal(size=2))
        x = add("Conv", x, kernel, bias, kernel_shape=[4, 4], strides=[2, 2], pads=[1] * 4, dilations=[1, 1], group=1)
        x, size = add("Relu", x), 2 * 14 * 14
        x = add("Flatten", x, axis=1)
    elif len(shape) > 1:
        x = add("Reshape", x, stored(np.array([1, size])))
    hidden = rng.normal(size=(size, 9)) / 8
    x = add("Relu", add("Gemm", x, stored(hidden.T), stored(rng.normal(size=9)), alpha=1.0, beta=1.0, transB=1))
    x = add("Add", add("MatMul", x, stored(rng.normal(size=(9, 10)))), stored(rng.normal(size=10)))
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, *shape])
    declared = [
        helper.make_tensor_value_info(
            name, TensorProto.INT64 if array.dtype.kind == "i" else TensorProto.FLOAT, array.shape
        )
        for name, array in weights.items()
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [image, *declared],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, ir_version=3, opset_imports=[helper.make_opsetid("", opset)]).SerializeToString()


SHAPES = [((784,), False), ((784,), True), ((1, 28, 28), False), ((1, 28, 28), True), ((1, 784), False)]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("shape", "kernels"), SHAPES)
def test_a_network_of_the_competition_is_proved_as_it_is(
    shape: tuple[int, ...], kernels: bool, normalised: bool
) -> None:
    model = competition(shape, kernels=kernels, normalised=normalised)
    certificate = certify(model)
    assert (certificate.input_shape, certificate.n_outputs) == (shape, 10)
    canonical = write(read(model))
    pixels_NX = np.random.default_rng(1).integers(0, 256, (2, *shape))
    computed_NK = Engine(canonical, "cpu", 1).run(["logits"], {"image": pixels_NX / 255})[0]
    program = Program.parse(canonical)
    exact = program.evaluate(np.frompyfunc(lambda p: fmpq(int(p), 255), 1, 1)(pixels_NX), program.exact_numbers)
    off = max(
        (abs(one) for one in (program.exact_numbers.convert(computed_NK) - exact["logits"]).ravel()), key=as_float
    )
    assert off <= as_number(certificate.logit_error, off)
    (by_file,) = [value.name for value in onnx.load_model_from_string(model).graph.output]
    engine = Engine(model, "cpu", 1)
    by_file_NK = [engine.run([by_file], {"input": image[None] / 255})[0][0] for image in pixels_NX]
    np.testing.assert_allclose(np.stack(by_file_NK), computed_NK, atol=2.0 * certificate.logit_error)


def _with_batch_and_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its first output flattened to one row for each image."""
    result = model.graph.output[0].name
    model.graph.node.append(helper.make_node("Flatten", [result], ["flat"], axis=1))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["N", "K"]))
    return model


def _outcome(model: bytes) -> tuple[str, ...]:
    """Return the reasons against a model; empty where it is proved."""
    try:
        certify(model)
    except UnsupportedModelError as error:
        return error.reasons
    return ()


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="this build of onnx comes without its tests")
def test_every_public_model_is_proved_or_refused_with_reasons() -> None:
    """Of the 140 small models that come with `onnx`: as they are, of opset 6 most of them, and by the cure named."""
    tally: Counter[str] = Counter()
    for path in sorted(PUBLIC.glob("[ps]*/*/model.onnx")):
        reasons = _outcome(path.read_bytes())
        assert all(reason.isprintable() for reason in reasons)
        if "version_converter" in "".join(reasons):
            try:
                model = onnx.version_converter.convert_version(onnx.load(path), 18)
            except RuntimeError:  # The converter does not have all operators.
                continue
            reasons = _outcome(_with_batch_and_logits(model).SerializeToString())
        assert all(reason.isprintable() for reason in reasons)
        tally["refused" if reasons else "proved"] += 1
    assert tally["proved"] >= 60, tally
