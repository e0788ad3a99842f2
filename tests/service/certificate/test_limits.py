"""Sizes that a file declares: refused by node before an array of that size is made, whatever the operator."""

import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from random_graphs import GraphBuilder

from service.certificate import UnsupportedModelError, analysis, certify, limits
from service.certificate.limits import fits
from service.network import limits as network_limits

SHAPE = (2, 4, 4)
HUGE = 1 << 40
LIMIT = 1 << 19
"""Elements, for these tests: arrays near the real limit take gigabytes."""
LITTLE = 80 * LIMIT
"""Bytes that a refusal may take at most: ten arrays of the largest size."""
Build = Callable[[GraphBuilder, str], str]


def model(build: Build, shape: tuple[int, ...] = SHAPE) -> bytes:
    b = GraphBuilder(np.random.default_rng(0), np.float32, opset=19)
    output = build(b, "image")
    return b.model(shape, b.one("Flatten", output, axis=1), "K")


@pytest.fixture(autouse=True)
def lower_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_ELEMENTS", LIMIT)
    monkeypatch.setattr(network_limits, "LARGEST_TENSOR", LIMIT)


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()


def reasons(model_bytes: bytes) -> tuple[str, ...]:
    with little_memory(), pytest.raises(UnsupportedModelError) as caught:
        certify(model_bytes)
    return caught.value.reasons


def ints(b: GraphBuilder, *numbers: int) -> str:
    return b.constant(np.array(numbers, dtype=np.int64))


def weights(b: GraphBuilder, *shape: int) -> str:
    return b.constant(np.ones(shape))


def resized(mode: str, by_scales: bool) -> Build:
    def build(b: GraphBuilder, x: str) -> str:
        if by_scales:
            scales = b.name("c")
            factors = np.array([1.0, 1.0, 1e6, 1e6], dtype=np.float32)
            b.constants.append(numpy_helper.from_array(factors, scales))
            return b.one("Resize", x, "", scales, mode=mode)
        sizes = b.one(
            "Concat", b.one("Slice", b.one("Shape", x), *(ints(b, k) for k in (0, 2))), ints(b, HUGE, 4), axis=0
        )
        return b.one("Resize", x, "", "", sizes, mode=mode)

    return build


def repeated(b: GraphBuilder, x: str, rows: int, columns: int) -> str:
    """32 elements and repetitions of them along one of two further axes."""
    column = b.one("Reshape", x, ints(b, 0, 32, 1, 1))
    return b.one("Tile", column, ints(b, 1, 1, rows, columns))


def doubled_again_and_again(b: GraphBuilder, x: str) -> str:
    for _ in range(40):
        x = b.one("Concat", x, x, axis=1)
    return x


def squares_pooled_again_and_again(b: GraphBuilder, x: str) -> str:
    x = b.one("Mul", x, x)
    for _ in range(12):
        x = b.one("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
    return b.one("Sqrt", x)


ON_IMAGES: dict[str, Build] = {
    "Pad": lambda b, x: b.one("Pad", x, ints(b, 0, 0, 120_000, 120_000, 0, 0, 120_000, 120_000)),
    "Pad with a value": lambda b, x: b.one("Pad", x, ints(b, *[0] * 7, HUGE), b.constant(np.array(0.5))),
    "Pad by repetition": lambda b, x: b.one("Pad", x, ints(b, *[0] * 7, HUGE), mode="edge"),
    "Expand": lambda b, x: b.one("Expand", b.one("Unsqueeze", x, ints(b, 1)), ints(b, 1, HUGE, 1, 1, 1)),
    "Tile": lambda b, x: b.one("Tile", x, ints(b, 1, 1 << 20, 1 << 20, 1)),
    "Gather": lambda b, x: b.one("Gather", x, b.constant(np.zeros((1 << 10, 1 << 8), np.int64)), axis=2),
    "Concat": doubled_again_and_again,
    "Where": lambda b, x: b.one(
        "Where", b.constant(np.ones((1, 1 << 15), bool)), b.one("Reshape", x, ints(b, 0, 32, 1)), weights(b, 1)
    ),
    "Resize nearest": resized("nearest", by_scales=False),
    "Resize linear": resized("linear", by_scales=False),
    "Resize by scales": resized("nearest", by_scales=True),
    "Add": lambda b, x: b.one("Add", b.one("Reshape", x, ints(b, 0, 32, 1)), weights(b, 1, 1 << 15)),
    "Sum": lambda b, x: b.one("Sum", repeated(b, x, 1 << 8, 1), repeated(b, x, 1, 1 << 8)),
    "Max": lambda b, x: b.one("Max", b.one("Reshape", x, ints(b, 0, 32, 1)), weights(b, 1, 1 << 15)),
    "MatMul": lambda b, x: b.one("MatMul", b.one("Reshape", x, ints(b, 0, 32, 1)), weights(b, 1, 1 << 15)),
    "Conv by its pads": lambda b, x: b.one("Conv", x, weights(b, 1, 2, 1, 1), pads=[1 << 20] * 4),
    "Conv by its dilations": lambda b, x: b.one(
        "Conv", x, weights(b, 64, 2, 2, 2), dilations=[200, 200], pads=[100] * 4
    ),
    "Conv by its strides": lambda b, x: b.one("Conv", x, weights(b, 1, 2, 1, 1), strides=[1 << 30, 1 << 30]),
    "ConvTranspose by its strides": lambda b, x: b.one(
        "ConvTranspose", x, weights(b, 2, 1, 1, 1), strides=[1 << 20] * 2
    ),
    "ConvTranspose by its dilations": lambda b, x: b.one(
        "ConvTranspose", x, weights(b, 2, 1, 2, 2), dilations=[1 << 20] * 2, pads=[1 << 19] * 4
    ),
    "ConvTranspose by its output_padding": lambda b, x: b.one(
        "ConvTranspose", x, weights(b, 2, 1, 2, 2), output_padding=[1 << 20] * 2, dilations=[(1 << 20) + 1] * 2
    ),
    "MaxPool": lambda b, x: b.one("MaxPool", x, kernel_shape=[1 << 20] * 2, pads=[(1 << 20) - 1] * 4),
    "MaxPool by its windows": lambda b, x: b.one("MaxPool", x, kernel_shape=[100, 100], pads=[99] * 4),
    "AveragePool": lambda b, x: b.one("AveragePool", x, kernel_shape=[1 << 20] * 2, pads=[(1 << 20) - 1] * 4),
    "AveragePool by its strides": lambda b, x: b.one("AveragePool", x, kernel_shape=[2, 2], strides=[1 << 30] * 2),
    "LpPool": lambda b, x: b.one("LpPool", x, kernel_shape=[2000, 2000], pads=[1999] * 4),
    "squares": squares_pooled_again_and_again,
}


@pytest.mark.parametrize("name", ON_IMAGES)
def test_no_operator_enlarges_an_image_beyond_the_limit(name: str) -> None:
    (reason,) = reasons(model(ON_IMAGES[name]))
    assert "too large to analyse" in reason
    assert reason.split()[0] in (name.split()[0], "AveragePool")


def added(build: Callable[[GraphBuilder], str]) -> Build:
    """A constant that is folded on its way to an addition."""
    return lambda b, x: b.one("Add", x, b.one("ReduceMax", build(b), keepdims=0))


def zeros(b: GraphBuilder, *shape: int) -> str:
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    return b.one("ConstantOfShape", ints(b, *shape), value=value)


def constant_doubled(b: GraphBuilder) -> str:
    x = zeros(b, 4)
    for _ in range(40):
        x = b.one("Concat", x, x, axis=0)
    return x


def numbers_up_to(b: GraphBuilder, limit: int, delta: int) -> str:
    last, step = b.constant(np.array(limit)), b.constant(np.array(delta))
    return b.one("Cast", b.one("Range", b.constant(np.array(0)), last, step), to=TensorProto.FLOAT)


OF_CONSTANTS: dict[str, Build] = {
    "ConstantOfShape": added(lambda b: zeros(b, HUGE)),
    "Expand": added(lambda b: b.one("Expand", zeros(b, 1), ints(b, 1 << 20, 1 << 20))),
    "Tile": added(lambda b: b.one("Tile", zeros(b, 4), ints(b, HUGE))),
    "Pad": added(lambda b: b.one("Pad", zeros(b, 4), ints(b, 0, HUGE))),
    "Range": added(lambda b: numbers_up_to(b, HUGE, 1)),
    "Range backwards": added(lambda b: numbers_up_to(b, -HUGE, -3)),
    "Concat": added(constant_doubled),
    "Gather": added(lambda b: b.one("Gather", zeros(b, 2, 1 << 16), b.constant(np.zeros(1 << 12, np.int64)), axis=0)),
    "GatherND": added(lambda b: b.one("GatherND", zeros(b, 2, 1 << 16), b.constant(np.zeros((1 << 12, 1), np.int64)))),
    "Where": added(lambda b: b.one("Where", b.constant(np.ones((1 << 14, 1), bool)), zeros(b, 1 << 14), zeros(b, 1))),
    "Max": added(lambda b: b.one("Max", zeros(b, 1 << 14, 1), zeros(b, 1 << 14))),
    "Mul": added(
        lambda b: b.one(
            "Cast", b.one("Mul", b.constant(np.ones((1 << 14, 1), np.int64)), ints(b, *[1] * (1 << 14))), to=1
        )
    ),
}


@pytest.mark.parametrize("name", OF_CONSTANTS)
def test_no_fold_enlarges_a_constant_beyond_the_limit(name: str) -> None:
    (reason,) = reasons(model(OF_CONSTANTS[name]))
    assert reason.startswith(name.split()[0])
    assert "too large to analyse" in reason


def test_an_image_beyond_the_limit_is_refused_once() -> None:
    (reason,) = reasons(model(lambda b, x: b.one("ReduceMax", x, ints(b, 1)), (1 << 62,)))
    assert "input 'image': image too large to analyse" in reason


def test_all_pairs_of_too_many_logits_are_refused() -> None:
    (reason,) = reasons(model(lambda b, x: b.one("Tile", x, ints(b, 1, 32, 1, 1))))
    assert "logits" in reason
    assert "too large to analyse" in reason


def test_the_values_of_a_graph_are_limited_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "MOST_ELEMENTS_TOGETHER", 1000)

    def build(b: GraphBuilder, x: str) -> str:
        for _ in range(40):
            x = b.one("Relu", x)
        return x

    (reason,) = reasons(model(build))
    assert reason.startswith("Relu")
    assert "1024 elements, at most 1000 in all values so far" in reason


def test_the_limit_itself_is_within_the_limit() -> None:
    assert fits(LIMIT)
    assert fits(LIMIT // 2, 2)
    assert not fits(LIMIT + 1)
    assert fits(HUGE, 0)


def test_a_stored_weight_may_be_larger_than_a_value_that_a_node_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_ELEMENTS", 32)
    weight = np.arange(96.0).reshape(32, 3)

    def transposed(b: GraphBuilder, x: str) -> str:
        return b.one("Gemm", b.one("Flatten", x, axis=1), b.one("Transpose", b.constant(weight.T), perm=[1, 0]))

    assert certify(model(transposed)).lipschitz_bound >= np.linalg.norm(weight, 2)


def test_windows_whose_stack_would_be_too_large_keep_the_product_of_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    build: Build = lambda b, x: b.one("AveragePool", b.one("Neg", x), kernel_shape=[2, 2])  # noqa: E731
    tight = certify(model(build)).lipschitz_bound
    monkeypatch.setattr("service.certificate.matrices._LARGEST_STACK", 1)
    assert tight <= certify(model(build)).lipschitz_bound <= 1.5 * tight


def test_a_kernel_with_too_many_frequencies_is_bounded_by_the_norm_of_its_absolute_values() -> None:
    # 4,000 lags at 2,000 frequencies.
    def build(b: GraphBuilder, x: str) -> str:
        kernel = b.constant(np.array([[[[3.0, 4.0]]]]))
        wide = b.one("Conv", x, kernel, dilations=[1, 4000], pads=[0, 4000, 0, 4000])
        return b.one("GlobalMaxPool", wide)

    with little_memory():
        certificate = certify(model(build, (1, 1, 4)))
    # Two taps that never meet: the norm of the convolution is 5.
    assert 5.0 <= certificate.lipschitz_bound <= 7.0 * (1.0 + 1e-9)


def test_a_kernel_of_many_strides_keeps_the_product_of_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each stride alone is within the limit; a kernel of both would be filled up to 2^16 x 2^16.
    def build(b: GraphBuilder, x: str) -> str:
        for _ in range(2):
            x = b.one("Conv", x, weights(b, 2, 2, 1, 1), strides=[1 << 8, 1 << 8])
        return x

    monkeypatch.setattr("service.certificate.matrices._LARGEST_MATRIX", 0)
    with little_memory():
        assert certify(model(build)).lipschitz_bound == pytest.approx(4.0)


def test_no_more_elements_are_sorted_than_there_are() -> None:
    (reason,) = reasons(model(lambda b, x: b.add("TopK", x, ints(b, HUGE), outputs=2)[0]))
    assert f"k={HUGE} of an axis of 4" in reason


def test_a_quotation_of_the_file_is_short() -> None:
    (reason,) = reasons(model(lambda b, x: b.one("Tile", x, b.constant(np.ones(5000, np.int64)))))
    assert "Tile" in reason
    assert len(reason) < 400
    (reason,) = reasons(model(added(lambda b: b.one("Tile", zeros(b, 1), b.constant(np.ones(5000, np.int64))))))
    assert len(reason) < 400


def test_a_limit_near_the_size_of_memory_is_a_refusal_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("service.certificate.rules.selections.np.tile", no_memory)
    with pytest.raises(UnsupportedModelError, match="more memory than there is"):
        certify(model(lambda b, x: b.one("Tile", x, ints(b, 1, 2, 1, 1))))


def test_the_command_says_one_line_and_exits_2(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model(ON_IMAGES["Pad"]))
    done = subprocess.run(
        [sys.executable, "-m", "service.certificate", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Pad" in done.stderr


def test_a_sparse_constant_is_not_made_dense() -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "values")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    sparse = helper.make_sparse_tensor(values, indices, [HUGE])

    def build(b: GraphBuilder, x: str) -> str:
        b.nodes.append(helper.make_node("Constant", [], ["sparse"], sparse_value=sparse))
        return b.one("Add", x, "sparse")

    assert reasons(model(build))
    assert onnx.load_model_from_string(model(build)).graph.node
