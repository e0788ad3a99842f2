"""Sessions of ONNX Runtime: options inside the error analysis, and whose fault a failure is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import linear
from fake_gpu import NO_KERNEL, OTHER_PROVIDER, OUT_OF_MEMORY, FakeGpu, failed_call
from onnx import TensorProto, helper, numpy_helper

from service.errors import ProviderError
from service.runtime.engine import Engine
from service.runtime.provider import CPU, CUDA
from service.runtime.session import GraphError, open_session, session_options

GRAPHS = linear(np.arange(8.0).reshape(2, 4) / 8, np.array([0.5, -0.5]), (1, 2, 2))


def test_bytes_that_are_no_graph_are_refused_on_every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu().install(monkeypatch)
    for provider in ("cpu", "cuda"):
        with pytest.raises(GraphError):
            open_session(b"garbage", provider, threads=1)


def test_a_session_on_the_cpu_has_one_provider_and_the_threads_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu().install(monkeypatch)
    session = open_session(GRAPHS.model, "cpu", threads=3)
    assert session.get_providers() == [CPU]
    assert session.get_session_options().intra_op_num_threads == 3
    assert gpu.opened == []


@pytest.mark.parametrize("memory_bytes", [0, 2_000_000])
def test_a_session_on_a_gpu_has_no_fallback_no_tf32_and_the_limit_of_memory(
    monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    gpu = FakeGpu().install(monkeypatch)
    open_session(GRAPHS.model, "cuda", 1, memory_bytes)
    ((options, ((name, chosen),)),) = gpu.opened
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert name == CUDA
    assert chosen["use_tf32"] == "0"
    assert chosen.get("gpu_mem_limit") == ("2000000" if memory_bytes else None)


@pytest.mark.parametrize(
    ("failure", "complaint"),
    [
        (failed_call(35, "CUDA driver version is insufficient for CUDA runtime version"), r"\(CUDA failure 35: .*\)"),
        (failed_call(46, "CUDA-capable device(s) is/are busy or unavailable"), r"\(CUDA failure 46: .*nvidia-smi"),
        (NO_KERNEL, "no kernel image"),
        (OTHER_PROVIDER, "assigned to the default CPU EP"),
        (OUT_OF_MEMORY, "too small for the weights .*8388608 bytes asked for; 16000000000 bytes in all"),
    ],
    ids=["old driver", "exclusive device", "no code", "operator without CUDA", "memory"],
)
def test_a_failure_that_the_cpu_does_not_have_is_an_error_of_the_provider(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, complaint: str
) -> None:
    FakeGpu(open_failure=failure).install(monkeypatch)
    with pytest.raises(ProviderError, match=complaint):
        open_session(GRAPHS.model, "cuda", threads=1)


def test_a_failure_that_the_cpu_has_too_is_an_error_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(open_failure=NO_KERNEL).install(monkeypatch)
    with pytest.raises(GraphError) as caught:
        open_session(b"garbage", "cuda", threads=1)
    assert "kernel" not in str(caught.value)


def test_a_silent_fallback_of_the_runtime_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(given=[CPU]).install(monkeypatch)
    with pytest.raises(ProviderError, match="could not start its CUDA provider"):
        open_session(GRAPHS.model, "cuda", threads=1)


def test_a_float64_clip_after_a_relu_is_served() -> None:
    # ONNX Runtime 1.32 fails to load this graph where its optimisers are on.
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


def floats(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


# The optimisers of the runtime make fewer nodes of each.
JOINED: dict[str, tuple[tuple[str, np.ndarray], ...]] = {
    "a product and a sum": (("MatMul", floats(*[0.3] * 16).reshape(4, 4)), ("Add", floats(*[0.3] * 4))),
    "a scale of weights": (
        ("Conv", floats(*[0.3] * 16).reshape(4, 4, 1, 1)),
        ("Mul", floats(*[0.3] * 4)[:, None, None]),
    ),
    "nearly one is a factor": (("Mul", np.array(0.5)), ("Mul", np.array(1.0 + 2.0**-26)), ("Add", np.array(0.5))),
    "one is a divisor": (("Mul", np.array(0.5)), ("Div", np.array(1.0)), ("Add", np.array(0.5))),
    "nearly nothing is added": (("Mul", np.array(0.5)), ("Add", np.array(1e-46)), ("Add", np.array(0.5))),
}


@pytest.mark.parametrize("name", JOINED)
def test_every_node_of_a_graph_is_one_kernel(name: str, tmp_path: Path) -> None:
    nodes = JOINED[name]
    shape = ["N", 4, 2, 2] if nodes[0][0] == "Conv" else ["N", 4]
    element = helper.np_dtype_to_tensor_dtype(nodes[0][1].dtype)
    graph = helper.make_graph(
        [helper.make_node(kind, [f"x{k}", f"c{k}"], [f"x{k + 1}"]) for k, (kind, _) in enumerate(nodes)],
        "g",
        [helper.make_tensor_value_info("x0", element, shape)],
        [helper.make_tensor_value_info(f"x{len(nodes)}", element, shape)],
        [numpy_helper.from_array(constant, f"c{k}") for k, (_, constant) in enumerate(nodes)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    def run_by(options: onnxruntime.SessionOptions) -> list[str]:
        options.optimized_model_filepath = str(tmp_path / "run.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
        return [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]

    written = [kind for kind, _ in nodes]
    assert run_by(onnxruntime.SessionOptions()) != written
    assert run_by(session_options(1)) == written
