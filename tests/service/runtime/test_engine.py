"""Execution providers: what was asked for is what runs, or an error that says what is missing."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import linear, random_groupsort
from onnx import TensorProto, helper, numpy_helper

from service.errors import ProviderError
from service.runtime import engine, fixed_batches, provider
from service.runtime.engine import Engine, LaterEngine
from service.runtime.fixed_batches import FixedBatches, GraphError
from service.runtime.provider import CPU, CUDA, resolve_provider

GRAPHS = linear(np.arange(8.0).reshape(2, 4) / 8, np.array([0.5, -0.5]), (1, 2, 2))


def test_engine_computes_what_the_graph_says() -> None:
    image = np.random.default_rng(0).random((3, 1, 2, 2))
    loaded = Engine(GRAPHS.model, "cpu", threads=1)
    (logits,) = loaded.run(["logits"], {"image": image})
    expected = image.reshape(3, 4) @ (np.arange(8.0).reshape(2, 4) / 8).T + [0.5, -0.5]
    np.testing.assert_allclose(logits, expected, rtol=1e-14)
    assert loaded.provider == CPU


def test_inputs_are_converted_to_the_precision_of_the_graph() -> None:
    loaded = Engine(GRAPHS.model, "cpu", threads=1)
    (logits,) = loaded.run(["logits"], {"image": np.zeros((1, 1, 2, 2), np.float32)})
    assert logits.dtype == np.float64


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(GraphError):
        Engine(b"garbage", "cpu", threads=1)


def test_engine_without_a_thread_is_refused() -> None:
    with pytest.raises(ValueError, match="1 thread"):
        Engine(GRAPHS.model, "cpu", threads=0)


def test_cpu_never_asks_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "missing_for_cuda", lambda: pytest.fail("asked"))
    assert resolve_provider("cpu") == "cpu"


def test_auto_falls_to_the_cpu_and_logs_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(provider, "missing_for_cuda", lambda: "no driver; install one.")
    with caplog.at_level(logging.INFO):
        assert resolve_provider("auto") == "cpu"
    assert "no driver" in caplog.text


def test_cuda_without_cuda_is_an_error_that_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderError, match="install the `gpu` extra"):
        resolve_provider("cuda")


def test_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(provider.ctypes, "CDLL", no_library)
    with pytest.raises(ProviderError, match=r"libcuda\.so\.1"):
        resolve_provider("cuda")
    assert resolve_provider("auto") == "cpu"


class _Driver:
    def __init__(self, init: int, devices: int) -> None:
        self._init, self._devices = init, devices

    def cuInit(self, flags: int) -> int:
        return self._init

    def cuDeviceGetCount(self, pointer: object) -> int:
        pointer._obj.value = self._devices  # type: ignore[attr-defined]
        return 0


@pytest.mark.parametrize(("driver", "complaint"), [(_Driver(100, 0), "cuInit returned 100"), (_Driver(0, 0), "no GPU")])
def test_driver_without_a_gpu_is_told_apart(monkeypatch: pytest.MonkeyPatch, driver: _Driver, complaint: str) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(provider.ctypes, "CDLL", lambda name: driver)
    with pytest.raises(ProviderError, match=complaint):
        resolve_provider("cuda")


def test_silent_fall_back_of_the_runtime_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.InferenceSession

    def falls_back(graph: bytes, providers: list[object], **options: object) -> object:
        assert providers[0][0] == CUDA  # type: ignore[index]
        assert providers[0][1]["use_tf32"] == "0"  # type: ignore[index]
        return real(graph, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    with pytest.raises(ProviderError, match="could not start its CUDA provider"):
        Engine(GRAPHS.model, "cuda", threads=1)


def test_a_graph_is_loaded_once_and_not_before_it_is_run() -> None:
    loads: list[str] = []
    all_there = threading.Barrier(8)

    def load() -> Engine:
        loads.append("")
        return Engine(GRAPHS.model, "cpu", threads=1)

    def run(later: LaterEngine) -> np.ndarray:
        all_there.wait()
        return later.run(["logits"], {"image": np.ones((1, 1, 2, 2))})[0]

    later = LaterEngine(load)
    assert later.provider == CPU
    assert loads == []
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(run, [later] * 8))
    assert len(loads) == 1
    assert later.input_names == ("image",)
    assert later.output_names == ("logits",)
    expected = Engine(GRAPHS.model, "cpu", threads=1).run(["logits"], {"image": np.ones((1, 1, 2, 2))})[0]
    for answer in answers:
        np.testing.assert_array_equal(answer, expected)


def test_a_graph_that_could_not_be_loaded_is_tried_again() -> None:
    outcomes = [GraphError("not now"), Engine(GRAPHS.model, "cpu", threads=1)]

    def load() -> Engine:
        outcome = outcomes.pop(0)
        if isinstance(outcome, GraphError):
            raise outcome
        return outcome

    later = LaterEngine(load)
    with pytest.raises(GraphError, match="not now"):
        later.run(["logits"], {"image": np.ones((1, 1, 2, 2))})
    assert later.run(["logits"], {"image": np.ones((1, 1, 2, 2))})[0].shape == (1, 2)


def in_fixed_batches(graph: bytes, largest: int) -> tuple[Engine, FixedBatches]:
    loaded = Engine(graph, "cpu", threads=1)
    return loaded, FixedBatches(loaded._session, "cpu", largest)


def inputs_of(loaded: Engine, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {value.name: random.random((n, *value.shape[1:])) for value in loaded._session.get_inputs()}


@pytest.mark.parametrize("graph", ["model", "transport"])
@pytest.mark.parametrize("warm", [True, False])
def test_fixed_batches_give_what_the_session_gives_for_every_size(graph: str, warm: bool) -> None:
    loaded, fixed = in_fixed_batches(getattr(random_groupsort(0), graph), 8)
    if warm:
        fixed.warm_up()
    assert fixed.sizes == (1, 2, 4, 8)
    for n in (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 23):
        inputs = inputs_of(loaded, n, seed=n)
        for one, other in zip(
            fixed.run(loaded.output_names, inputs), loaded.run(loaded.output_names, inputs), strict=True
        ):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            # The same sums, perhaps in another order.
            np.testing.assert_allclose(one, other, rtol=0.0, atol=1e-14)


def test_a_graph_of_one_batch_size_is_run_in_batches_of_that_size() -> None:
    model = onnx.load_model_from_string(GRAPHS.model)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    _, fixed = in_fixed_batches(model.SerializeToString(), 256)
    assert fixed.sizes == (4,)
    image = np.random.default_rng(0).random((6, 1, 2, 2))
    (expected,) = Engine(GRAPHS.model, "cpu", threads=1).run(["logits"], {"image": image})
    np.testing.assert_allclose(fixed.run(["logits"], {"image": image})[0], expected, rtol=1e-14)


def test_results_of_fixed_batches_are_not_written_again_by_the_next_run() -> None:
    loaded, fixed = fixed_batches(GRAPHS.model, 4)
    (first,) = fixed.run(["logits"], inputs_of(loaded, 3, seed=1))
    kept = first.copy()
    fixed.run(["logits"], inputs_of(loaded, 4, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_threads_that_share_fixed_batches_get_their_own_results() -> None:
    loaded, fixed = in_fixed_batches(random_groupsort(0).transport, 8)
    work = [inputs_of(loaded, 1 + seed % 11, seed) for seed in range(64)]
    expected = [loaded.run(loaded.output_names, inputs) for inputs in work]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda inputs: fixed.run(loaded.output_names, inputs), work))
    for one, other in zip(answers, expected, strict=True):
        for values, wanted in zip(one, other, strict=True):
            np.testing.assert_allclose(values, wanted, rtol=0.0, atol=1e-14)


def test_fixed_batches_take_some_of_the_outputs_in_any_order() -> None:
    loaded, fixed = in_fixed_batches(random_groupsort(0).transport, 4)
    inputs = inputs_of(loaded, 3)
    logits, gradient = loaded.run(("logits", "gradient"), inputs)
    for names, wanted in ((("gradient",), (gradient,)), (("gradient", "logits"), (gradient, logits))):
        for one, other in zip(fixed.run(names, inputs), wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"image": np.zeros((2, 1, 1, 1))},
        {"image": np.zeros((2, 4))},
        {"picture": np.zeros((2, 1, 2, 2))},
        {"image": np.zeros((2, 1, 2, 2)), "other": np.zeros((2, 1))},
    ],
)
def test_fixed_batches_refuse_what_is_not_an_input_of_the_graph(inputs: dict[str, np.ndarray]) -> None:
    _, fixed = fixed_batches(GRAPHS.model, 4)
    with pytest.raises(ValueError, match=r"the graph takes \{'image'"):
        fixed.run(["logits"], inputs)


def test_fixed_batches_refuse_a_graph_whose_images_have_no_fixed_shape() -> None:
    model = onnx.load_model_from_string(random_groupsort(0).transport)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    with pytest.raises(GraphError, match="must be fixed behind the batch axis"):
        in_fixed_batches(model.SerializeToString(), 4)


def test_on_a_gpu_every_batch_size_is_run_once_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of what is done for a GPU, with the CPU in its place."""
    real_session, real_fixed = onnxruntime.InferenceSession, fixed_batches.FixedBatches
    seen: list[int] = []

    class Watched(real_fixed):
        def __init__(self, session: onnxruntime.InferenceSession, device: str, largest: int) -> None:
            assert device == "cuda"
            super().__init__(session, "cpu", largest)

        def _run(self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...]) -> list[np.ndarray]:
            seen.append(len(inputs["image"]))
            return super()._run(inputs, outputs)

    monkeypatch.setattr(provider, "CUDA", CPU)
    monkeypatch.setattr(engine, "FixedBatches", Watched)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda graph, providers, **options: real_session(graph, providers=[CPU])
    )
    loaded = Engine(GRAPHS.model, "cuda", threads=1)
    assert sorted(seen) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    seen.clear()
    on_cpu = Engine(GRAPHS.model, "cpu", threads=1)
    inputs = inputs_of(on_cpu, 600)
    np.testing.assert_allclose(
        loaded.run(["logits"], inputs)[0], on_cpu.run(["logits"], inputs)[0], rtol=0.0, atol=1e-14
    )
    assert seen == [256, 256, 88]


def test_nothing_in_the_environment_makes_cuda_compute_in_narrower_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "missing_for_cuda", lambda: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    names = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATE_DOUBLE_PRECISION")
    for name in names:
        monkeypatch.setenv(name, "1")
    assert resolve_provider("auto") == "cuda"
    assert [os.environ[name] for name in names] == ["0", "0", "0"]


@pytest.mark.gpu
def test_cuda_gives_the_logits_of_the_cpu() -> None:
    if missing := provider.missing_for_cuda():
        pytest.skip(missing)
    loaded = Engine(GRAPHS.model, resolve_provider("cuda"), threads=1)
    assert loaded.provider == CUDA
    on_cpu = Engine(GRAPHS.model, "cpu", threads=1)
    for n in (0, 1, 5, 256, 300):
        inputs = inputs_of(on_cpu, n)
        (wanted,) = on_cpu.run(["logits"], inputs)
        np.testing.assert_allclose(loaded.run(["logits"], inputs)[0], wanted, rtol=1e-13)


def test_a_float64_clip_after_a_relu_is_served() -> None:
    # ONNX Runtime 1.32 fails to load this graph where its FuseReluClip is on.
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["image"], ["positive"]),
            helper.make_node("Clip", ["positive", "", "top"], ["logits"]),
        ],
        "clip",
        [helper.make_tensor_value_info("image", TensorProto.DOUBLE, ["N", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.DOUBLE, ["N", 2])],
        [numpy_helper.from_array(np.array(0.5), "top")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (logits,) = Engine(model.SerializeToString(), "cpu", 1).run(["logits"], {"image": np.array([[-1.0, 0.75]])})
    np.testing.assert_array_equal(logits, [[0.0, 0.5]])


@pytest.mark.parametrize(
    ("first", "weight", "second"),
    [
        ("MatMul", (4, 3), "BatchNormalization"),
        ("Conv", (3, 4, 1, 1), "BatchNormalization"),
        ("Conv", (3, 4, 1, 1), "Mul"),
        ("Conv", (3, 4, 1, 1), "Add"),
    ],
)
def test_no_scale_is_folded_into_the_weights_of_the_layer_before_it(
    first: str, weight: tuple[int, ...], second: str, tmp_path: Path
) -> None:
    spatial = (1,) * (len(weight) - 2)
    vectors = ["s", "b", "m", "v"] if second == "BatchNormalization" else ["s"]
    shape = (3,) if second == "BatchNormalization" else (3, *spatial)
    graph = helper.make_graph(
        [helper.make_node(first, ["x", "w"], ["h"]), helper.make_node(second, ["h", *vectors], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, *spatial])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, *spatial])],
        [
            numpy_helper.from_array(np.full(shape_of, 0.3, np.float32), name)
            for name, shape_of in [("w", weight), *((name, shape) for name in vectors)]
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = engine._session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=[CPU],
        disabled_optimizers=engine._DISABLED_OPTIMIZERS,
    )
    run = onnx.load(tmp_path / "optimised.onnx")
    assert [node.op_type for node in run.graph.node] == [first, second]
