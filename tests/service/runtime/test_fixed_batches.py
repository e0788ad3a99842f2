"""Batches of fixed sizes give the results of the session, for every size of batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from builders import linear, random_groupsort

from service.runtime.engine import Engine
from service.runtime.fixed_batches import FixedBatches
from service.runtime.session import GraphError, open_session

GRAPHS = linear(np.arange(8.0).reshape(2, 4) / 8, np.array([0.5, -0.5]), (1, 2, 2))


def in_fixed_batches(graph: bytes, largest: int) -> tuple[Engine, FixedBatches]:
    return Engine(graph, "cpu", threads=1), FixedBatches(open_session(graph, "cpu", threads=1), "cpu", largest)


def inputs_of(loaded: Engine, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {value.name: random.random((n, *value.shape[1:])) for value in loaded._session.get_inputs()}


@pytest.mark.parametrize("graph", ["model", "gradient"])
@pytest.mark.parametrize("warm", [True, False])
def test_fixed_batches_give_what_the_session_gives_for_every_size(graph: str, warm: bool) -> None:
    loaded, fixed = in_fixed_batches(getattr(random_groupsort(0), graph), 8)
    if warm:
        for size in fixed.sizes:
            fixed.run_once(size)
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
    loaded, fixed = in_fixed_batches(GRAPHS.model, 4)
    (first,) = fixed.run(["logits"], inputs_of(loaded, 3, seed=1))
    kept = first.copy()
    fixed.run(["logits"], inputs_of(loaded, 4, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_threads_that_share_fixed_batches_get_their_own_results() -> None:
    loaded, fixed = in_fixed_batches(random_groupsort(0).gradient, 8)
    work = [inputs_of(loaded, 1 + seed % 11, seed) for seed in range(64)]
    expected = [loaded.run(loaded.output_names, inputs) for inputs in work]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda inputs: fixed.run(loaded.output_names, inputs), work))
    for one, other in zip(answers, expected, strict=True):
        for values, wanted in zip(one, other, strict=True):
            np.testing.assert_allclose(values, wanted, rtol=0.0, atol=1e-14)


def test_fixed_batches_take_some_of_the_outputs_in_any_order() -> None:
    loaded, fixed = in_fixed_batches(random_groupsort(0).gradient, 4)
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
    _, fixed = in_fixed_batches(GRAPHS.model, 4)
    with pytest.raises(ValueError, match=r"the graph takes \{'image'"):
        fixed.run(["logits"], inputs)


def test_fixed_batches_refuse_a_graph_whose_images_have_no_fixed_shape() -> None:
    model = onnx.load_model_from_string(random_groupsort(0).gradient)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    with pytest.raises(GraphError, match="must be fixed behind the batch axis"):
        in_fixed_batches(model.SerializeToString(), 4)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (100, (1, 2, 4, 8, 16, 32, 64, 100))]
)
def test_the_largest_batch_is_the_one_asked_for(largest: int, sizes: tuple[int, ...]) -> None:
    loaded, fixed = in_fixed_batches(GRAPHS.model, largest)
    assert fixed.sizes == sizes
    inputs = inputs_of(loaded, 201)
    np.testing.assert_allclose(fixed.run(["logits"], inputs)[0], loaded.run(["logits"], inputs)[0], atol=1e-14)
