"""The constructions that only the comparison of layers has: their claims against singular values of explicit operators.

Axes: H hidden features, k kernel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers import tables, training
from benchmarks.layers.constructions import (
    AolKernel,
    AolMatrix,
    Convolution,
    Dense,
    FoldedConvolution,
    PointKernel,
    QrMatrix,
    SllConvolution,
    SllDense,
    kernel_row_sums,
)
from benchmarks.layers.networks import CONVOLUTIONAL, DENSE, Method
from benchmarks.layers.training import BUDGETS, Budget, Proof, Row, chosen_rate
from models.data import LabelledImages
from models.layers import Chain, Flatten, GroupSort2, Layer, OrthogonalDense, SpaceToDepth, UnitHead
from models.networks import LipschitzNetwork

SHAPES = [(5, 9), (9, 5), (6, 6)]
ROUNDING = 1e-12
IMAGE = 5
NEEDS_LIBRARIES = {"bjorck", "aoc", "rko"}


def disturbed(module: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """The module in float64, its parameters moved at random: what holds at the start only would not hold here."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def norm_of(matrix: Tensor) -> float:
    return float(np.linalg.svd(matrix.detach().numpy(), compute_uv=False)[0])


def operator_of(kernel_OCkk: Tensor, size: int = IMAGE) -> Tensor:
    """The matrix of the zero-padded convolution on a `size x size` image, its columns the images of unit vectors."""
    channels = kernel_OCkk.shape[1]
    units = torch.eye(channels * size**2, dtype=kernel_OCkk.dtype).reshape(-1, channels, size, size)
    return torch.nn.functional.conv2d(units, kernel_OCkk, padding=kernel_OCkk.shape[-1] // 2).flatten(1).T


def largest_slope(layer: Callable[[Tensor], Tensor], shape: tuple[int, ...], seed: int) -> float:
    """The largest norm of the Jacobian at some random points."""
    generator = torch.Generator().manual_seed(seed)
    largest = 0.0
    for point in 3.0 * torch.randn(12, *shape, generator=generator, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0].flatten(), point)
        assert isinstance(jacobian, Tensor)
        largest = max(largest, norm_of(jacobian.flatten(1)))
    return largest


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_an_almost_orthogonal_matrix_has_norm_at_most_1(shape: tuple[int, int], seed: int) -> None:
    weight = disturbed(AolMatrix(*shape), seed, scale=10.0**seed)
    assert norm_of(weight()) <= 1.0 + ROUNDING


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factor_of_a_qr_decomposition_is_orthogonal_in_its_shorter_axis(shape: tuple[int, int]) -> None:
    weight = disturbed(QrMatrix(*shape), 1)().detach().numpy()
    assert np.linalg.svd(weight, compute_uv=False) == pytest.approx(1.0, abs=1e-12)


def test_the_factor_of_a_qr_decomposition_is_the_matrix_itself_where_that_is_orthogonal() -> None:
    module = QrMatrix(4, 7)
    assert torch.allclose(module(), module.raw, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_an_almost_orthogonal_kernel_has_norm_at_most_1_with_zero_padding(shape: tuple[int, int], seed: int) -> None:
    kernel = disturbed(AolKernel(*shape, 3), seed)
    assert norm_of(operator_of(kernel())) <= 1.0 + ROUNDING
    # Without the factors it is far above: the assertion can fail.
    assert norm_of(operator_of(kernel.raw)) > 2.0


@pytest.mark.parametrize("shape", SHAPES)
def test_an_almost_orthogonal_kernel_starts_as_an_orthogonal_one(shape: tuple[int, int]) -> None:
    kernel = AolKernel(*shape, 3)
    assert torch.allclose(kernel(), kernel.raw, atol=1e-5)
    assert norm_of(operator_of(kernel())) <= 1.0 + 1e-6


@pytest.mark.parametrize("weighted", [False, True])
def test_row_sums_of_a_kernel_are_those_of_its_operator_far_from_the_border(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    kernel = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    log_weight = torch.randn(4, generator=generator, dtype=torch.float64) if weighted else None
    size = 7
    operator = operator_of(kernel, size)
    weight = torch.exp(log_weight if log_weight is not None else torch.zeros(4, dtype=torch.float64))
    each = weight.repeat_interleave(size**2)
    sums = ((operator @ operator.T).abs() * each / each[:, None]).sum(1).reshape(4, size, size)
    expected = kernel_row_sums(kernel, log_weight)
    assert sums[:, size // 2, size // 2].numpy() == pytest.approx(expected.numpy(), rel=1e-12)
    assert bool((sums <= expected[:, None, None] * (1.0 + ROUNDING)).all())


@pytest.mark.parametrize("seed", range(4))
def test_a_residual_step_of_sll_never_stretches(seed: int) -> None:
    layer = disturbed(SllDense(7, 5 + 2 * seed), seed)
    assert largest_slope(layer, (7,), seed) <= 1.0 + ROUNDING


@pytest.mark.parametrize("seed", range(3))
def test_a_convolutional_residual_step_of_sll_never_stretches(seed: int) -> None:
    layer = disturbed(SllConvolution(3, 4, 3), seed)
    assert largest_slope(layer, (3, IMAGE, IMAGE), seed) <= 1.0 + ROUNDING


@pytest.mark.parametrize("layer", [SllDense(6, 4), SllConvolution(2, 3, 3), Convolution(PointKernel(6, 4), 6)])
def test_a_folded_layer_is_the_layer(layer: Layer) -> None:
    disturbed(layer, 5, scale=0.3)
    x = torch.randn(3, 6, dtype=torch.float64)
    if not isinstance(layer, SllDense):
        x = torch.randn(3, 2 if isinstance(layer, SllConvolution) else 4, IMAGE, IMAGE, dtype=torch.float64)
    # float32 weights: that is what folding rounds to.
    assert torch.allclose(layer.fold()(x), layer(x), atol=1e-5)


def small_network(*body: Layer) -> LipschitzNetwork:
    return LipschitzNetwork((1, 4, 4), Chain(body), UnitHead(16, 3))


@pytest.mark.parametrize(
    "body",
    [
        [Flatten(), SllDense(16, 12), OrthogonalDense(16, 16), GroupSort2(), SllDense(16, 8)],
        [SpaceToDepth(2), Convolution(AolKernel(4, 4, 3), 4), GroupSort2(), SllConvolution(4, 3, 3), Flatten()],
    ],
    ids=["dense", "convolutional"],
)
def test_graphs_of_the_constructions_are_proved_and_their_radii_hold(body: list[Layer]) -> None:
    network = small_network(*body)
    disturbed(network, 2, scale=0.2).float()
    proof = Proof(network)
    assert proof.body_bound() <= 1.0 + 1e-4
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (20, 1, 4, 4), generator=generator, dtype=torch.uint8)
    images = LabelledImages(pixels, torch.zeros(20, dtype=torch.int64))
    assert 0.0 < proof.slope(images) <= 1.0 + 1e-9


@pytest.mark.parametrize(
    "method",
    [method for method in (*DENSE, *CONVOLUTIONAL) if method.name not in NEEDS_LIBRARIES],
    ids=lambda method: method.name,
)
def test_every_row_of_ours_can_be_proved(method: Method) -> None:
    torch.manual_seed(0)
    network = method.build()
    assert network.outputs == 10
    assert Proof(network).body_bound() <= 1.0 + 1e-4


def test_a_network_that_is_not_1_lipschitz_is_not_said_to_be() -> None:
    class Doubled(AolMatrix):
        def forward(self) -> Tensor:
            return 2.0 * super().forward()

    network = small_network(Flatten(), Dense(Doubled(16, 16), 16))
    assert Proof(network).body_bound() >= 2.0 - 1e-6


def test_a_graph_that_computes_something_else_is_refused() -> None:
    class OtherBias(FoldedConvolution):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e-6

    kernel = AolKernel(1, 1, 3).fold()
    network = small_network(OtherBias(kernel, torch.zeros(1, dtype=torch.float64)), Flatten())
    with pytest.raises(RuntimeError, match="differs from the network"):
        Proof(network)


# --- choosing rates, tables -------------------------------------------------------------------------------------------


def tried_rates(monkeypatch: pytest.MonkeyPatch, best: float, rates: tuple[float, ...]) -> tuple[float, list[float]]:
    """The rate chosen and those tried, if the figures peak at `best`."""
    tried: list[float] = []

    def trained(method: Method, budget: Budget, images: object, rate: float, *_: object, **__: object) -> object:
        tried.append(rate)
        return rate, 0.0

    class Peak:
        def __init__(self, rate: float) -> None:
            self.rate = rate

        def certified(self, *_: object) -> list[float]:
            return [0.0, 1.0 / (1.0 + abs(np.log2(self.rate / best)))]

    monkeypatch.setattr(training, "trained", trained)
    monkeypatch.setattr(training, "Proof", Peak)
    monkeypatch.setattr(training, "is_finite", lambda _: True)
    images = LabelledImages(torch.zeros(20, 1, 2, 2, dtype=torch.uint8), torch.arange(20) % 2)
    budget = replace(BUDGETS["dense"], short_images=4)
    rate, _ = chosen_rate(replace(DENSE[0], rates=rates), budget, images, images, lambda _: None)
    return rate, tried


def test_a_rate_at_the_edge_is_followed_until_it_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried_rates(monkeypatch, 2.0, (1.0, 2.0, 4.0)) == (2.0, [1.0, 2.0, 4.0])
    assert tried_rates(monkeypatch, 8.0, (1.0, 2.0, 4.0)) == (8.0, [1.0, 2.0, 4.0, 8.0, 16.0])
    assert tried_rates(monkeypatch, 0.5, (1.0, 2.0, 4.0)) == (0.5, [1.0, 2.0, 4.0, 0.5, 0.25])
    assert tried_rates(monkeypatch, 1e-6, (1.0, 2.0, 4.0))[1] == [1.0, 2.0, 4.0, 0.5, 0.25]


def row(method: str, seed: int, second: float, bound: float = 1.0, epochs: int = 4) -> Row:
    return Row(
        method=method,
        seed=seed,
        epochs=epochs,
        rate=0.004,
        tried={},
        parameters=1_000_000,
        multiply_adds=930_000,
        seconds=60.0,
        proved_bound=bound,
        slope=0.995,
        logit_error=1e-10,
        accuracy=0.9,
        certified=[0.8, second, 0.5],
        held_out=0.7,
        n=10_000,
    )


def test_the_table_has_the_best_row_first_and_rounds_bounds_up() -> None:
    rows = [row("cayley", 0, 0.61), row("qr", 0, 0.62, bound=1.00000012), row("qr", 1, 0.99)]
    text = tables.table(BUDGETS["dense"], rows, {"cayley": 12.34, "qr": 5.0})
    lines = text.splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| QR", "| Cayley"]
    assert "1.0000002" in lines[-2]
    assert "62.00" in lines[-2]
    assert "12.3" in lines[-1]
    assert "n = 10,000" in lines[0]


def test_other_seeds_are_told_beside_the_first() -> None:
    rows = [row("qr", 0, 0.62), row("qr", 1, 0.64), row("cayley", 0, 0.61)]
    text = tables.spread(BUDGETS["dense"], rows)
    assert "QR, 2 seeds" in text
    assert "at 0.5 62.00, 64.00" in text
    assert "Cayley" not in text


def test_the_whole_section_needs_no_more_than_rows_and_times() -> None:
    rows = [row("qr", 0, 0.62), row("aoc", 0, 0.3, epochs=3)]
    text = tables.section(list(BUDGETS.values()), rows, {"dense": {"qr": 1.0}, "convolutional": {"aoc": 2.0}})
    assert text.count("### ") == 2
    assert "36/255" in text


def test_rows_of_other_epochs_are_told_apart_and_sorted_by_time() -> None:
    rows = [row("qr", 0, 0.62), row("qr", 0, 0.66, epochs=9), row("cayley", 0, 0.61)]
    text = tables.section([BUDGETS["dense"]], rows, {"dense": {"qr": 5.0, "cayley": 12.0}})
    first, second = text.split("By processor time")
    assert "66.00" not in first
    assert [line.split(" | ")[1:3] for line in second.splitlines()[-3:]] == [["4", "20"], ["9", "45"], ["4", "48"]]
