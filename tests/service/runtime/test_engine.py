"""Engines: graphs that run, on a GPU in fixed batches, and a GPU that fails at the start or while it serves."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from builders import linear
from fake_gpu import NO_KERNEL, OUT_OF_MEMORY, FakeGpu, failed_call

from service.errors import DeviceLostError, ProviderError
from service.runtime import provider
from service.runtime.engine import Engine, LazyEngine
from service.runtime.provider import CPU, CUDA, resolve_provider
from service.runtime.session import GpuLimits, GraphError

GRAPHS = linear(np.arange(8.0).reshape(2, 4) / 8, np.array([0.5, -0.5]), (1, 2, 2))
IMAGE = {"image": np.ones((1, 1, 2, 2))}
LAUNCH = failed_call(719, "unspecified launch failure")


def inputs_of(loaded: Engine, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {value.name: random.random((n, *value.shape[1:])) for value in loaded._session.get_inputs()}


def test_engine_computes_what_the_graph_says() -> None:
    image = np.random.default_rng(0).random((3, 1, 2, 2))
    loaded = Engine(GRAPHS.model, "cpu", threads=1)
    (logits,) = loaded.run(["logits"], {"image": image})
    expected = image.reshape(3, 4) @ (np.arange(8.0).reshape(2, 4) / 8).T + [0.5, -0.5]
    np.testing.assert_allclose(logits, expected, rtol=1e-14)
    assert loaded.provider == CPU


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [7]), (1 << 16, [4, 3]), (1 << 17, [2, 2, 2, 1]), (1 << 30, [1] * 7)]
)
def test_a_batch_of_large_tensors_runs_in_parts(
    largest: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Engine(GRAPHS.gradient, "cpu", threads=1, largest=largest)
    inputs = inputs_of(loaded, 7)
    expected = Engine(GRAPHS.gradient, "cpu", threads=1).run(["gradient", "logits"], inputs)
    run, seen = loaded._session.run, []

    def counted(outputs: list[str], feed: dict[str, np.ndarray]) -> object:
        seen.append(len(feed["image"]))
        return run(outputs, feed)

    monkeypatch.setattr(loaded._session, "run", counted)
    for one, other in zip(loaded.run(["gradient", "logits"], inputs), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert seen == sizes


def test_inputs_are_converted_to_the_precision_of_the_graph() -> None:
    loaded = Engine(GRAPHS.model, "cpu", threads=1)
    (logits,) = loaded.run(["logits"], {"image": np.zeros((1, 1, 2, 2), np.float32)})
    assert logits.dtype == np.float64


def test_engine_without_a_thread_is_refused() -> None:
    with pytest.raises(ValueError, match="1 thread"):
        Engine(GRAPHS.model, "cpu", threads=0)


def test_a_graph_is_loaded_once_and_not_before_it_is_run() -> None:
    loads: list[str] = []
    all_there = threading.Barrier(8)

    def load() -> Engine:
        loads.append("")
        return Engine(GRAPHS.model, "cpu", threads=1)

    def run(lazy: LazyEngine) -> np.ndarray:
        all_there.wait()
        return lazy.run(["logits"], {"image": np.ones((1, 1, 2, 2))})[0]

    lazy = LazyEngine("cpu", load)
    assert lazy.provider == CPU
    assert loads == []
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(run, [lazy] * 8))
    assert len(loads) == 1
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

    lazy = LazyEngine("cpu", load)
    with pytest.raises(GraphError, match="not now"):
        lazy.run(["logits"], {"image": np.ones((1, 1, 2, 2))})
    assert lazy.run(["logits"], {"image": np.ones((1, 1, 2, 2))})[0].shape == (1, 2)


def test_on_a_gpu_every_batch_size_is_run_once_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu().install(monkeypatch)
    loaded = Engine(GRAPHS.model, "cuda", threads=1)
    assert loaded.provider == CUDA
    assert gpu.sizes == [256, 128, 64, 32, 16, 8, 4, 2, 1]
    gpu.sizes.clear()
    on_cpu = Engine(GRAPHS.model, "cpu", threads=1)
    inputs = inputs_of(on_cpu, 600)
    np.testing.assert_allclose(
        loaded.run(["logits"], inputs)[0], on_cpu.run(["logits"], inputs)[0], rtol=0.0, atol=1e-14
    )
    assert gpu.sizes == [256, 256, 128]


def test_on_a_gpu_the_largest_batch_and_the_memory_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu().install(monkeypatch)
    Engine(GRAPHS.model, "cuda", 1, GpuLimits(batch=20, memory_bytes=1_000))
    assert gpu.sizes == [20, 16, 8, 4, 2, 1]
    assert gpu.opened[0][1][0][1]["gpu_mem_limit"] == "1000"


def test_missing_memory_in_the_warm_up_is_an_error_with_figures_and_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(run_failure=lambda size: OUT_OF_MEMORY if size == 256 else None).install(monkeypatch)
    with pytest.raises(ProviderError, match=r"batch of 256 images \(8388608 .* free\): serve fewer .*FORWARD_BATCH"):
        Engine(GRAPHS.model, "cuda", threads=1)
    Engine(GRAPHS.model, "cuda", 1, GpuLimits(batch=128))


def test_a_kernel_that_fails_in_the_warm_up_is_an_error_of_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(run_failure=lambda size: NO_KERNEL).install(monkeypatch)
    with pytest.raises(ProviderError, match="no kernel image is available"):
        Engine(GRAPHS.model, "cuda", threads=1)


def test_a_graph_that_fails_on_the_cpu_too_is_an_error_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu().install(monkeypatch)
    model = onnx.load_model_from_string(GRAPHS.model)
    # The declared shape does not fit the weights, which is found when it is run.
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 3
    with pytest.raises(GraphError):
        Engine(model.SerializeToString(), "cuda", threads=1)


def refuse_after_start(gpu: FakeGpu, *failures: Exception | None, then: Exception | None) -> None:
    """The next batches fail as stated, and all others as `then`."""
    left = list(failures)
    gpu.run_failure = lambda size: left.pop(0) if left else then


@pytest.mark.parametrize(
    "failures",
    [[LAUNCH], [failed_call(700, "an illegal memory access was encountered")], [RuntimeError("anything"), NO_KERNEL]],
    ids=["launch failure", "illegal address", "whatever fails again"],
)
def test_a_device_that_fails_for_good_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: list[Exception]
) -> None:
    gpu = FakeGpu().install(monkeypatch)
    lazy = LazyEngine("cuda", lambda: Engine(GRAPHS.model, "cuda", threads=1))
    assert not lazy.is_lost
    lazy.run(["logits"], IMAGE)
    assert not lazy.is_lost
    refuse_after_start(gpu, *failures, then=None)
    with caplog.at_level(logging.ERROR), pytest.raises(DeviceLostError, match="about to restart"):
        lazy.run(["logits"], IMAGE)
    assert lazy.is_lost
    # It does not come back, even if it seems to.
    with pytest.raises(DeviceLostError):
        lazy.run(["logits"], IMAGE)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["the GPU is lost"]


@pytest.mark.parametrize("failure", [OUT_OF_MEMORY, RuntimeError("a spurious failure")])
def test_a_device_that_still_answers_is_not_lost(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    gpu = FakeGpu().install(monkeypatch)
    loaded = Engine(GRAPHS.model, "cuda", threads=1)
    refuse_after_start(gpu, failure, then=None)
    with pytest.raises(type(failure), match=str(failure)[-30:]):
        loaded.run(["logits"], IMAGE)
    assert not loaded.is_lost
    assert loaded.run(["logits"], IMAGE)[0].shape == (1, 2)


def test_inputs_that_the_graph_does_not_have_lose_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu().install(monkeypatch)
    loaded = Engine(GRAPHS.model, "cuda", threads=1)
    with pytest.raises(ValueError, match="the graph takes"):
        loaded.run(["logits"], {"image": np.ones((1, 1, 3, 3))})
    assert not loaded.is_lost


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
