"""Files that somebody wrote against the certifier: two readings, sizes that nobody has, bytes that are no model.

Each is refused with a reason on one line, or means the same to ONNX Runtime. A sample runs in processes of their own,
under limits of time and memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hostile_sizes import Build, model_of, run_on_files
from onnx import TensorProto, helper, numpy_helper
from random_graphs import GraphBuilder

from service.certificate import certify
from service.network.limits import LARGEST_CONSTANT
from service.network.operators import UnsupportedModelError
from service.network.reader import read
from service.network.writer import write
from service.runtime.engine import Engine

Edit = Callable[[onnx.ModelProto], object]
MOST_SECONDS = 2.0
MOST_MEGABYTES = 200


def constant(b: GraphBuilder, numbers: object) -> str:
    return b.constant(np.array(numbers))


def float32(b: GraphBuilder, *numbers: float) -> str:
    return stored(b, numpy_helper.from_array(np.array(numbers, np.float32), b.name("c")))


def stored(b: GraphBuilder, tensor: TensorProto) -> str:
    b.constants.append(tensor)
    return tensor.name


def filled(b: GraphBuilder, value: object, *shape: int) -> str:
    """Return a constant that the file computes: one number, many times."""
    return b.one("ConstantOfShape", constant(b, shape), value=numpy_helper.from_array(np.array([value])))


def reasons(model: bytes) -> tuple[str, ...]:
    with pytest.raises(UnsupportedModelError) as caught:
        certify(model)
    for reason in caught.value.reasons:
        assert reason.isprintable()
        assert len(reason) < 800
    return caught.value.reasons


# --- forms with two readings ------------------------------------------------------------------------------------------

Form = tuple[int, tuple[int, ...], Build, str]
IMAGE = (1, 8, 8)
ONE = np.ones((1, 1, 1, 1))
TWO_READINGS: dict[str, Form] = {
    "a convolution that leaves pixels out, aligned by auto_pad": (
        18, IMAGE, lambda b: b.one("Conv", "image", constant(b, ONE), auto_pad="SAME_UPPER", strides=[4, 4]), "gaps"),
    "a pool that leaves pixels out, aligned by auto_pad": (
        18, IMAGE, lambda b: b.one("MaxPool", "image", kernel_shape=[1, 1], auto_pad="SAME_LOWER", strides=[4, 4]),
        "gaps"),
    "a dilated pool, aligned by auto_pad": (
        18, IMAGE, lambda b: b.one("MaxPool", "image", kernel_shape=[2, 2], auto_pad="SAME_LOWER", dilations=[2, 2]),
        "gaps"),
    "windows rounded up, in a valid pool": (
        22, (1, 5, 5),
        lambda b: b.one("MaxPool", "image", kernel_shape=[2, 2], strides=[2, 2], auto_pad="VALID", ceil_mode=1),
        "VALID with ceil_mode"),
    "pads counted in windows rounded up": (
        18, (1, 5, 5), lambda b: b.one("AveragePool", "image", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1,
                                       count_include_pad=1), "ceil_mode with count_include_pad"),
    "auto_pad and pads": (
        18, IMAGE, lambda b: b.one("Conv", "image", constant(b, ONE), auto_pad="VALID", pads=[1] * 4), "give one"),
    "auto_pad of a transposed convolution": (
        18, IMAGE, lambda b: b.one("ConvTranspose", "image", constant(b, ONE), auto_pad="SAME_LOWER"), "two ways"),
    "the shape of the result of a transposed convolution": (
        18, IMAGE, lambda b: b.one("ConvTranspose", "image", constant(b, ONE), output_shape=[8, 8]), "output_shape"),
    "output padding as large as the stride": (
        18, IMAGE, lambda b: b.one("ConvTranspose", "image", constant(b, ONE), output_padding=[1, 1]), "below stride"),
    "a smaller image by opset 10": (
        10, IMAGE, lambda b: b.one("Resize", "image", float32(b, 1, 1, 0.75, 0.75), mode="nearest"), "opset 10"),
    "Upsample to a smaller image": (
        9, IMAGE, lambda b: b.one("Upsample", "image", float32(b, 1, 1, 0.5, 0.5)), "rules out"),
    "Upsample of opset 7 to a smaller image": (
        7, IMAGE, lambda b: b.one("Upsample", "image", scales=[1.0, 1.0, 0.5, 0.5]), "rules out"),
    "reflected further than the constant reaches": (
        18, (8,), lambda b: b.one("Add", "image", b.one("Pad", constant(b, [1.0, 2.0, 3.0]), constant(b, [5, 0]),
                                                        mode="reflect")), "several ways"),
    "wrapped further than the constant reaches": (
        19, (8,), lambda b: b.one("Add", "image", b.one("Pad", constant(b, [1.0, 2.0, 3.0]), constant(b, [5, 0]),
                                                        mode="wrap")), "several ways"),
    "reflected further than the image reaches": (
        18, (4,), lambda b: b.one("Pad", "image", constant(b, [0, 4, 0, 0]), mode="reflect"), "several ways"),
    "booleans other than 0 and 1, as int32": (
        18, (4,), lambda b: b.one("Where", stored(b, TensorProto(
            name="m", data_type=9, dims=[4], int32_data=[2, 0, 1, 256])), "image", "image"), "booleans"),
    "booleans other than 0 and 1, as bytes": (
        18, (4,), lambda b: b.one("Where", stored(b, TensorProto(
            name="m", data_type=9, dims=[4], raw_data=b"\x02\x00\x01\xff")), "image", "image"), "booleans"),
    "an int8 of 300": (
        18, (4,), lambda b: b.one("Gather", "image", stored(b, TensorProto(
            name="i", data_type=3, dims=[1], int32_data=[256])), axis=1), "outside of int8"),
    "a negative length other than -1": (
        18, (4,), lambda b: b.one("Add", "image", b.one("Reshape", constant(b, np.ones(4)), constant(b, [-2]))),
        "a shape of [-2]"),
    "the length that stands for the batch size": (
        18, (4,), lambda b: b.one("Reshape", "image", constant(b, [2**61 - 1, 4])), "too large"),
    "the length that stands for the batch size, of an image": (
        18, IMAGE, lambda b: b.one("Resize", "image", "", "", constant(b, [2**61 - 1, 1, 16, 16])), "of its own"),
    "an unequal number of outputs": (
        18, (4,), lambda b: b.add("Split", "image", outputs=4, axis=1, num_outputs=2**40)[0], "num_outputs"),
    "a flag that is neither 0 nor 1": (18, IMAGE, lambda b: b.one("MaxPool", "image", kernel_shape=[2, 2], ceil_mode=2),
                                       "must be 0 or 1"),
    "a softplus of float64 whose exp overflows": (
        18, (4,), lambda b: b.one("Softplus", b.one("Mul", "image", constant(b, 1e3))), "may overflow"),
    "a scatter that writes twice": (
        18, (4,), lambda b: b.one("Add", "image", b.one("ScatterElements", *(
            constant(b, numbers) for numbers in (np.zeros(4), [1, 1], [1.0, 2.0])))), "twice"),
    "a scatter that writes twice, by tuples": (
        18, (4,), lambda b: b.one("Add", "image", b.one("ScatterND", constant(b, np.zeros(4)), constant(b, [[1], [1]]),
                                                        constant(b, [1.0, 2.0]))), "twice"),
}  # fmt: skip


@pytest.mark.parametrize("form", TWO_READINGS)
def test_a_form_with_two_readings_is_refused(form: str) -> None:
    opset, shape, build, expected = TWO_READINGS[form]
    assert expected in "\n".join(reasons(model_of(build, shape, opset)))


def test_the_default_limits_of_an_old_clip_are_those_of_float32() -> None:
    def build(b: GraphBuilder) -> str:
        large = b.one("Mul", "image", constant(b, 1e40))
        return b.one("Mul", b.one("Clip", large), constant(b, 1e-38))

    (logits,) = Engine(write(read(model_of(build, opset=9))), "cpu", 1).run(["logits"], {"image": np.ones((1, 4))})
    np.testing.assert_allclose(logits, float(np.finfo(np.float32).max) * 1e-38)


# --- bytes that are no model ------------------------------------------------------------------------------------------


def edited(edit: Edit, build: Build = lambda b: b.one("Relu", "image")) -> bytes:
    model = onnx.load_model_from_string(model_of(build))
    edit(model)
    return model.SerializeToString()


def _image_axes(*sizes: int) -> Edit:
    axes = [onnx.TensorShapeProto.Dimension(dim_value=size) for size in sizes]
    return lambda model: model.graph.input[0].type.tensor_type.shape.dim.extend(axes)


def _foreign(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="x\ny", version=1)
    model.graph.node[0].domain = "x\ny"
    model.graph.node[0].op_type = "A\nB\x1b[31m"


def _branches(b: GraphBuilder) -> str:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["image"], ["q"])], "branch", [], [helper.make_tensor_value_info("q", 11, None)]
    )
    return b.one("If", constant(b, True), then_branch=branch, else_branch=branch)


def _function(model: onnx.ModelProto) -> None:
    opset = helper.make_opsetid("", 18)
    model.functions.append(
        helper.make_function("", "Relu", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], [opset])
    )


def _sparse(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "i"))


def _initializer(**fields: object) -> Edit:
    return lambda model: model.graph.initializer.append(TensorProto(name="w", **fields))  # type: ignore[arg-type]


NO_MODEL: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not a valid ONNX model"),
    "zeros": (lambda: bytes(100), "not a valid ONNX model"),
    "an end that is missing": (lambda: edited(lambda model: None)[:-7], "not a valid ONNX model"),
    "two models": (lambda: 2 * edited(lambda model: None), "not a valid ONNX model"),
    "axes of 2^62": (lambda: edited(_image_axes(*[2**62] * 1000)), "axes, at most 32"),
    "a thousand axes": (lambda: edited(_image_axes(*[1] * 1000)), "axes, at most 32"),
    "a weight of a thousand axes": (
        lambda: edited(_initializer(data_type=1, dims=[1] * 1000, raw_data=b"abcd")), "axes, at most 32"),
    "a weight of negative length": (
        lambda: edited(_initializer(data_type=1, dims=[-1], raw_data=b"abcd")), "Negative dimension"),
    "a weight of 2^62 numbers": (lambda: edited(_initializer(data_type=1, dims=[2**62])), "not a valid ONNX model"),
    "a weight that is empty and huge": (lambda: edited(_initializer(data_type=1, dims=[0, 2**62])), "too big"),
    "a weight in float8": (lambda: edited(_initializer(data_type=17, dims=[1], raw_data=b"a")), "float8e4m3fn"),
    "a weight of texts": (lambda: edited(_initializer(data_type=8, dims=[1], string_data=[b"0x1"])), "string"),
    "a weight outside of the file": (
        lambda: edited(_initializer(data_type=1, dims=[4], data_location=1,
                                    external_data=[onnx.StringStringEntryProto(key="location", value="w")])),
        "outside"),
    "a name with line breaks": (lambda: edited(_foreign), "no proved rule"),
    "a name that is no text": (
        lambda: edited(_initializer(data_type=11, dims=[1], double_data=[np.nan])).replace(b"\x01w", b"\x01\xff"),
        "NaN"),
    "branches": (lambda: edited(lambda model: None, _branches), "If"),
    "a function called Relu": (lambda: edited(_function), "functions"),
    "two opsets": (
        lambda: edited(lambda model: model.opset_import.add(domain="ai.onnx", version=9)), "several opsets"),
    "no opset": (lambda: edited(lambda model: model.ClearField("opset_import")), "not a valid ONNX model"),
    "an output that is a weight": (
        lambda: edited(lambda model: (_initializer(data_type=11, dims=[4], double_data=[1.0] * 4)(model),
                                      setattr(model.graph.output[0], "name", "w"))), "does not depend on the image"),
    "two images": (
        lambda: edited(lambda model: model.graph.input.append(helper.make_tensor_value_info("x", 11, ["N", 4]))),
        "2 inputs"),
    "an opset before 7": (
        lambda: edited(lambda model: setattr(model.opset_import[0], "version", 6)), "opsets 7 to"),
    "a sparse weight": (lambda: edited(_sparse), "store them dense"),
    "two outputs": (
        lambda: edited(lambda model: model.graph.output.add().CopyFrom(model.graph.output[0])), "2 outputs"),
    "a node before its operand": (
        lambda: edited(lambda model: model.graph.node.append(model.graph.node.pop(0))), "topologically sorted"),
    "a name written twice": (
        lambda: edited(lambda model: model.graph.node.append(model.graph.node[0])), "single static"),
    "an image of integers": (
        lambda: edited(lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 7)), "int64"),
    "an image that is a sequence": (
        lambda: edited(lambda model: model.graph.input[0].type.CopyFrom(
            helper.make_sequence_type_proto(helper.make_tensor_type_proto(11, ["N", 4])))), "fixed shape"),
    "an attribute that is not a number": (
        lambda: edited(lambda model: None, lambda b: b.one("LeakyRelu", "image", alpha=float("nan"))), "finite number"),
    "an attribute of a function that is not there": (
        lambda: edited(lambda model: (setattr(model.graph.node[0], "op_type", "LeakyRelu"),
                                      model.graph.node[0].attribute.add(name="alpha", ref_attr_name="z", type=1))),
        "refers to an attribute"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_MODEL)
def test_bytes_that_are_no_model_end_in_one_line(kind: str) -> None:
    build, expected = NO_MODEL[kind]
    assert expected in "\n".join(reasons(build()))


def test_a_constant_in_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w").write_bytes(np.ones(4).tobytes())
    monkeypatch.chdir(tmp_path)

    def build(b: GraphBuilder) -> str:
        place = onnx.StringStringEntryProto(key="location", value="w")
        outside = TensorProto(data_type=11, dims=[4], data_location=1, external_data=[place])
        return b.one("Add", "image", b.one("Constant", value=outside))

    assert "outside the file" in reasons(model_of(build))[0]


def test_numbers_beyond_the_format_are_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    tiny = float(np.finfo(np.float64).smallest_subnormal)
    assert "overflow" in reasons(model_of(lambda b: b.one("Div", "image", constant(b, tiny))))[0]
    assert not recwarn.list


# --- sizes ------------------------------------------------------------------------------------------------------------

HUGE = 2**63 - 1


def _square(b: GraphBuilder) -> str:
    return b.one("Reshape", "image", constant(b, [0, 1, 2, 2]))


def _of_constant(operator: str, *more: object, **attributes: object) -> Build:
    """Return a graph that adds a part of a huge constant, worked on by an operator."""

    def build(b: GraphBuilder) -> str:
        large = filled(b, 3, LARGEST_CONSTANT)
        result = b.one(operator, large, *(large if one is ... else constant(b, one) for one in more), **attributes)
        return b.one("Gather", "image", b.one("Slice", result, *(constant(b, [n]) for n in (0, 4))), axis=1)

    return build


def _chain(b: GraphBuilder) -> str:
    x = "image"
    for _ in range(30):
        many = b.one("Neg", filled(b, 1.0, LARGEST_CONSTANT))
        x = b.one("Add", x, b.one("Gather", many, constant(b, [0])))
    return x


SIZES: dict[str, Build] = {
    "shape of 2^20 axes": lambda b: b.one("Reshape", "image", filled(b, 2**62, 2**20)),
    "new shape of 2^20 axes": lambda b: b.one("Expand", "image", filled(b, 2**62, 2**20)),
    "repeats of 2^20 axes": lambda b: b.one("Tile", constant(b, [1.0]), filled(b, 2**62, 2**20)),
    "constant of 2^20 axes": lambda b: b.one("Add", "image", b.one("ConstantOfShape", filled(b, 2**62, 2**20))),
    "100 axes of 1": lambda b: b.one("Reshape", "image", b.one("Concat", *(
        constant(b, numbers) for numbers in ([0, 4], [1] * 100)), axis=0)),
    "axes from 1 to 2^21": lambda b: b.one("Unsqueeze", "image", b.one("Range", *(
        constant(b, n) for n in (1, 2**21, 1)))),
    "pads of many axes": lambda b: b.one("Pad", "image", filled(b, 0, 2**21)),
    "reduced many times": lambda b: b.one("ReduceSum", "image", filled(b, 1, 2**21)),
    "sliced many times": lambda b: b.one("Slice", "image", *(filled(b, n, 2**20) for n in (0, 9, 1))),
    "parts by the trillion": lambda b: b.add("Split", "image", outputs=4, axis=1, num_outputs=2**40)[0],
    "integers added": _of_constant("Add", ...),
    "integers multiplied": _of_constant("Mul", ...),
    "integers multiplied together": lambda b: b.one("Gather", "image", b.one("ReduceProd", filled(b, 2**62, 2**20)),
                                                    axis=1),
    "integers cast twice": lambda b: b.one("Gather", "image", b.one("Slice", b.one("Cast", b.one("Cast", filled(
        b, 3, LARGEST_CONSTANT), to=1), to=7), *(constant(b, [n]) for n in (0, 4))), axis=1),
    "places that are not 0": lambda b: b.one("Gather", "image", b.one("NonZero", filled(b, 3, *[32] * 3, 128)), axis=1),
    "constants one after the other": _chain,
    "a kernel of 2^63": lambda b: b.one("MaxPool", _square(b), kernel_shape=[HUGE, HUGE], auto_pad="SAME_UPPER"),
    "pads of 2^62": lambda b: b.one("MaxPool", _square(b), kernel_shape=[2, 2], pads=[2**62] * 4),
    "strides of 2^63": lambda b: b.one("AveragePool", _square(b), kernel_shape=[2, 2], strides=[HUGE] * 2, ceil_mode=1),
    "dilations of 2^40": lambda b: b.one("Conv", _square(b), constant(b, np.ones((1, 1, 2, 2))), dilations=[2**40] * 2,
                                         pads=[2**40] * 4),
    "groups by the trillion": lambda b: b.one("Conv", _square(b), constant(b, np.ones((1, 1, 2, 2))), group=2**62),
    "strides of 2^30, transposed": lambda b: b.one("ConvTranspose", _square(b), constant(b, np.ones((1, 1, 2, 2))),
                                                   strides=[2**30] * 2, pads=[2**29] * 4),
    "blocks of 2^62": lambda b: b.one("SpaceToDepth", _square(b), blocksize=2**62),
    "the largest 2^62": lambda b: b.add("TopK", "image", constant(b, [2**62]), outputs=2)[0],
    "a power of 2^62": lambda b: b.one("Pow", "image", constant(b, 2**62)),
    "scales beyond float32": lambda b: b.one("Resize", _square(b), "", float32(b, 3e38, 1e38), axes=[2, 3]),
    "sizes of 2^62": lambda b: b.one("Resize", _square(b), "", "", constant(b, [2**62, 2**62]), axes=[2, 3]),
    "a triangle of 2^63": lambda b: b.one("Gather", "image", b.one("Trilu", constant(b, np.ones((2, 2), int)),
                                                                   constant(b, HUGE)), axis=2),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
def test_a_size_is_refused_before_it_is_made(kind: str) -> None:
    assert reasons(model_of(SIZES[kind]))


_MEASURED = """
import json, re, sys, time
from service.certificate.__main__ import main
found = []
for path in sys.argv[1:]:
    started = time.process_time()
    status = main([path])
    seconds = time.process_time() - started
    peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())
    found.append((status, seconds, int(peak[1]) >> 10 if peak else 0))
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_sizes_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    done = run_on_files(tmp_path, map(model_of, SIZES.values()), _MEASURED)
    for kind, (status, seconds, megabytes) in zip(SIZES, json.loads(done.stdout), strict=True):
        assert (status, seconds < MOST_SECONDS, megabytes < MOST_MEGABYTES) == (2, True, True), (
            kind,
            seconds,
            megabytes,
        )
    assert done.stderr.count("\n") < 3 * len(SIZES)
    assert "Traceback" not in done.stderr
