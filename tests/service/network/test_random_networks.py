"""Random networks: written and read back, run beside the file that they come from, and differentiated.

`pytest -s` prints how many of them were compared.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from graph_checks import runnable
from random_graphs import Graph, seeded_graph
from thorough import often

from service.certificate import certify
from service.network.graphs import forward_graph, gradient_graph
from service.network.operators import Network, UnsupportedModelError
from service.network.reader import read
from service.network.writer import write
from service.runtime.engine import Engine
from service.runtime.session import GraphError, session_options

COUNT = often(30, 1200)
AT_ONCE = 30
IMAGES = 6
STEP = 1e-6
firsts = pytest.mark.parametrize("first", range(0, COUNT, AT_ONCE))


def network_of(graph: Graph) -> Network | None:
    try:
        return read(graph.model)
    except UnsupportedModelError:
        return None


def report(compared: int) -> None:
    print(f"{compared} of {AT_ONCE} compared")  # noqa: T201
    assert compared > AT_ONCE // 3


@firsts
def test_a_network_that_is_written_is_read_back(first: int) -> None:
    compared = 0
    for seed in range(first, first + AT_ONCE):
        network = network_of(seeded_graph(seed))
        if network is not None:
            written = write(network)
            assert read(written) == network, seed
            assert write(read(written)) == written, seed
            compared += 1
    report(compared)


@firsts
def test_logits_of_the_file_and_of_the_written_graph_are_within_the_proved_error(first: int) -> None:
    compared = 0
    for seed in range(first, first + AT_ONCE):
        graph = runnable(seeded_graph(seed))
        network = network_of(graph)
        try:
            error = certify(graph.model).logit_error
            session = onnxruntime.InferenceSession(graph.model, session_options(1), providers=["CPUExecutionProvider"])
            written = Engine(forward_graph(network).content, "cpu", 1) if network is not None else None
        except (UnsupportedModelError, GraphError):
            continue
        if written is None:
            continue
        image = np.random.default_rng(seed).random((graph.batch or 3, *graph.shape)).astype(graph.dtype)
        one, other = session.run(["logits"], {"image": image})[0], written.run(["logits"], {"image": image})[0]
        # Each is within the error of the exact logits.
        assert np.abs(np.asarray(one, np.float64) - other).max() <= 2.0 * error, seed
        compared += 1
    report(compared)


def disagreements(network: Network, error: float, seed: int) -> int:
    """Return for how many images slope and gradient disagree along a random direction, by more than rounding.

    Args:
        network: differentiated.
        error: bound of |computed - exact logit|.
        seed: of images and directions.
    """
    forward, beside = (Engine(graph.content, "cpu", 1) for graph in (forward_graph(network), gradient_graph(network)))
    random = np.random.default_rng(seed)
    image = random.uniform(0.1, 0.9, (IMAGES, *network.image.shape))
    weights = random.normal(size=(IMAGES, *network.outputs[0].shape))
    direction = random.normal(size=image.shape)
    logits, gradient = beside.run(["logits", "gradient"], {"image": image, "margin_weights": weights})
    np.testing.assert_array_equal(logits, forward.run(["logits"], {"image": image})[0])

    def margin(at: np.ndarray) -> np.ndarray:
        return (forward.run(["logits"], {"image": at})[0] * weights).sum(axis=1)

    slope = (margin(image + STEP * direction) - margin(image - STEP * direction)) / (2.0 * STEP)
    found = (gradient * direction).reshape(IMAGES, -1).sum(axis=1)
    scale = 1e-4 * (1.0 + np.abs(slope) + np.abs(found)) * (1.0 + np.abs(logits).max())
    scale += error * np.abs(weights).sum(axis=1) / STEP
    return int((np.abs(slope - found) > scale).sum())


@firsts
def test_gradients_are_slopes_but_for_kinks(first: int) -> None:
    wrong = compared = 0
    for seed in range(first, first + AT_ONCE):
        graph = seeded_graph(seed)
        network = network_of(graph) if graph.dtype is np.float64 else None
        if network is None:
            continue
        try:
            error = certify(graph.model).logit_error
            if error > 1e-8:
                # Difference quotients may be rounding errors.
                continue
            of_one = disagreements(network, error, seed)
        except (UnsupportedModelError, GraphError):
            continue
        # A kink lies between the two ends of a difference quotient now and then, for one image or another.
        assert of_one <= 2, (seed, of_one)
        wrong, compared = wrong + of_one, compared + 1
    print(f"{compared} networks, {wrong} of {IMAGES * compared} images with a kink in between")  # noqa: T201
    assert compared >= 2
    assert wrong <= 0.05 * IMAGES * compared
