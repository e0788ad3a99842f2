"""The gradient network against the definition where that is simple; `test_random_networks` has the others."""

from __future__ import annotations

import numpy as np
import pytest
from random_graphs import GraphBuilder

from service.network.adjoint import PULLBACKS, differentiate
from service.network.lowering import LOWERINGS
from service.network.operators import Network, UnsupportedModelError
from service.network.reader import read
from service.network.writer import write
from service.runtime.engine import Engine


def engines(network: Network) -> tuple[Engine, Engine]:
    gradient = write(differentiate(network), ("image", "margin_weights"), ("logits", "gradient"))
    return Engine(write(network), "cpu", 1), Engine(gradient, "cpu", 1)


def test_every_operator_that_is_read_has_a_pullback() -> None:
    composite = {"Gelu", "GlobalLpPool", "Mish", "Swish"}
    moved = {"Cast", "Dropout", "Flatten", "Identity", "Squeeze", "Unsqueeze", "Upsample"}
    assert set(LOWERINGS) - composite - moved <= set(PULLBACKS)


def windows(operator: str, **attributes: object) -> bytes:
    b = GraphBuilder(np.random.default_rng(0), dtype=np.float32)
    x, operands = "image", []
    if len(attributes.get("kernel_shape", [])) == 3:  # type: ignore[arg-type]
        x = b.one("Reshape", x, b.constant(np.array([0, 2, 2, 3, 7])))
    if operator == "Conv":
        operands = [b.constant(b.rng.normal(size=(2, 2, *attributes["kernel_shape"])))]  # type: ignore[misc]
    if operator.startswith("Reduce"):
        operands = [b.constant(np.array([2, 3]))]
    x = b.one(operator, x, *operands, **attributes)
    return b.model((2, 6, 7), b.one("Flatten", x), 1)


WINDOWS = {
    "MaxPool": {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]},
    "MaxPool with gaps": {"kernel_shape": [2, 2], "strides": [3, 3]},
    "AveragePool": {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]},
    "AveragePool of padding": {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1},
    "MaxPool rounded up": {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    "LpPool": {"kernel_shape": [2, 3], "strides": [2, 2], "p": 2},
    "GlobalLpPool": {},
    "GlobalMaxPool": {},
    "ReduceMax": {"keepdims": 0},
    "ReduceMin": {"keepdims": 1},
    "ReduceSumSquare": {"keepdims": 1},
    "LogSoftmax": {"axis": 3},
    "MaxPool of three axes": {"kernel_shape": [2, 2, 3], "strides": [1, 1, 2], "pads": [0, 1, 0, 1, 0, 1]},
    "AveragePool of three axes": {"kernel_shape": [2, 2, 3], "strides": [1, 2, 2], "pads": [0, 1, 0, 1, 0, 1]},
    "LpPool of three axes": {"kernel_shape": [2, 2, 2], "p": 2},
    "Conv of three axes": {"kernel_shape": [2, 2, 3], "strides": [1, 1, 2], "pads": [0, 1, 0, 1, 0, 1]},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_gradients_of_windows_in_float32(name: str) -> None:
    network = read(windows(name.split()[0], **WINDOWS[name]))
    _, adjoint = engines(network)
    random = np.random.default_rng(0)
    image = random.permutation(84).reshape(1, 2, 6, 7).astype(np.float32) / 64.0 + 0.5
    weights = random.normal(size=(1, *network.outputs[0].shape)).astype(np.float32)
    gradient = adjoint.run(["gradient"], {"image": image, "margin_weights": weights})[0]
    forward = Engine(write(network), "cpu", 1)
    step = np.float32(2.0**-8)
    for pixel in np.ndindex(image.shape):
        moved = [image.copy(), image.copy()]
        moved[0][pixel] += step
        moved[1][pixel] -= step
        high, low = (float((forward.run(["logits"], {"image": one})[0] * weights).sum()) for one in moved)
        assert gradient[pixel] == pytest.approx((high - low) / (2.0 * step), abs=2e-3), pixel


@pytest.mark.parametrize("name", ["Elu", "HardSigmoid", "HardSwish", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh"])
def test_gradients_of_activations_in_float64(name: str) -> None:
    b = GraphBuilder(np.random.default_rng(0))
    centred = b.one("Mul", b.one("Sub", "image", b.constant(np.array(0.5))), b.constant(np.array(10.0)))
    network = read(b.model((1, 4, 5), b.one("Flatten", b.one(name, centred)), 1))
    forward, adjoint = engines(network)
    # No pixel is at a kink, and both sides of each kink have some.
    image = ((np.arange(20) + 0.3) / 20.0).reshape(1, 1, 4, 5)
    weights = np.random.default_rng(0).normal(size=(1, 20))
    gradient = adjoint.run(["gradient"], {"image": image, "margin_weights": weights})[0]
    step = 2.0**-16
    for pixel in np.ndindex(image.shape):
        moved = np.concatenate([image, image])
        moved[0][pixel[1:]] += step
        moved[1][pixel[1:]] -= step
        high, low = ((forward.run(["logits"], {"image": one[np.newaxis]})[0] * weights).sum() for one in moved)
        assert gradient[pixel] == pytest.approx((high - low) / (2.0 * step), rel=1e-5, abs=1e-5)


def test_what_has_no_gradient_is_named() -> None:
    network = read(windows("MaxPool", kernel_shape=[2, 2]))
    strange = network.operators[0].__class__("Strange", network.operators[0].operands, (), network.operators[0].results)
    with pytest.raises(UnsupportedModelError, match="Strange: no gradient"):
        differentiate(Network(network.inputs, network.precision, (strange, *network.operators[1:]), network.outputs))
