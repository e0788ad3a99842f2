"""What runs in place of a shift of channels computes the same numbers; what is no shift stays as it is.

Weights are small integers and pixels multiples of 1/8, so that no sum is rounded and its order does not matter: two
graphs of one function agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from graph_builder import GraphBuilder
from hypothesis import given
from hypothesis import strategies as st

from service.artefact.files import MODEL_FILE
from service.certificate import certify
from service.network.adjoint import differentiate
from service.network.arrangement import arranged
from service.network.arrangement.planes import PlaneMoves, is_same_map, plane_moves, rolled, runs
from service.network.operators import Network
from service.network.reader import read
from service.network.writer import write
from service.runtime.engine import Engine

ZOO = Path(__file__).parents[3] / "models" / "zoo"
C, H, W = 16, 12, 12
P = H * W
Mask = Callable[[np.ndarray], np.ndarray]


def shift(channels: int, height: int, width: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and mask of a circular shift whose border is set to zero: channel c belongs to `c mod k^2`."""
    pixel = np.arange(channels * height * width).reshape(channels, height, width)
    positions, mask = np.empty_like(pixel), np.zeros(pixel.shape)
    for channel in range(channels):
        dy, dx = divmod(channel % window**2, window)
        dy, dx = dy - 1, dx - 1
        positions[channel] = np.roll(pixel[channel], (dy, dx), (0, 1))
        mask[channel] = np.pad(np.ones((height, width)), 1)[1 - dy :, 1 - dx :][:height, :width]
    return positions.ravel(), mask.ravel()


def integers(b: GraphBuilder, *shape: int) -> str:
    return b.constant(b.rng.integers(-2, 3, shape).astype(float))


@dataclass
class Layers:
    """A product, a sort, a shift and a product, with what a test changes."""

    window: int = 3
    bias: tuple[int, ...] = (C, 1)
    halves: tuple[int, int] = (C // 2, C // 2)
    sorts: tuple[str, str] = ("Max", "Min")
    turned: bool = False
    block: int = 1
    move: Callable[[np.ndarray], None] = field(default=lambda positions: None)
    cover: Callable[[np.ndarray], None] = field(default=lambda mask: None)
    taken_twice: str = ""
    weight_right: bool = False
    dtype: type = np.float64

    def model(self) -> bytes:
        b = GraphBuilder(dtype=self.dtype)
        image = b.one("Reshape", "image", b.constant(np.array([0, 3, P])))
        x = b.one("MatMul", integers(b, C, 3), image)
        if self.bias:
            x = b.one("Add", x, integers(b, *self.bias))
        x = b.one("Reshape", x, b.constant(np.array([0, C, H, W])))
        one, other = b.add("Split", x, b.constant(np.array(self.halves)), outputs=2, axis=1)
        second = (other, one) if self.turned else (one, other)
        pair = [b.one(self.sorts[0], one, other), b.one(self.sorts[1], *second)]
        planes = x = b.one("Concat", *pair, axis=1)
        channels, height, width = 2 * max(self.halves), H, W
        if self.block > 1:
            k, height, width = self.block, H // self.block, W // self.block
            x = b.one("Reshape", x, b.constant(np.array([0, channels, height, k, width, k])))
            x = b.one("Transpose", x, perm=[0, 1, 3, 5, 2, 4])
            channels *= k * k
            x = b.one("Reshape", x, b.constant(np.array([0, channels, height, width])))
        size = channels * height * width
        flat = b.one("Reshape", x, b.constant(np.array([0, size])))
        positions, mask = shift(channels, height, width, self.window)
        self.move(positions)
        self.cover(mask)
        gathered = b.one("Gather", flat, b.constant(positions), axis=1)
        x = b.one("Mul", gathered, b.constant(mask))
        x = b.one("Reshape", x, b.constant(np.array([0, channels, height, width])))
        x = b.one("Reshape", x, b.constant(np.array([0, channels, height * width])))
        if self.weight_right:
            x = b.one("MatMul", x, integers(b, height * width, 5))
        else:
            x = b.one("MatMul", integers(b, 5, channels), x)
        x = b.one("Flatten", b.one("ReduceSum", x, b.constant(np.array([2])), keepdims=0))
        taken = {"planes": planes, "flat": flat, "gathered": gathered, "sort": pair[0], "half": one}
        if self.taken_twice:
            again = b.one("Flatten", taken[self.taken_twice])
            x = b.one("Concat", x, again, axis=1)
        outputs = read(b.model((3, H, W), x, 0)).outputs[0].shape[0]
        b.nodes.pop()
        return b.model((3, H, W), x, outputs)


def values(network: Network) -> list[np.ndarray]:
    """Return logits, and logits and gradient, for some images."""
    random = np.random.default_rng(0)
    image = random.integers(0, 9, (3, *network.image.shape)) / 8.0
    weights = random.integers(-3, 4, (3, *network.outputs[0].shape)).astype(float)
    gradient = write(differentiate(network), ("image", "margin_weights"), ("logits", "gradient"))
    return [
        *Engine(write(network), "cpu", 1).run(["logits"], {"image": image}),
        *Engine(gradient, "cpu", 1).run(["logits", "gradient"], {"image": image, "margin_weights": weights}),
    ]


def changed(model: bytes) -> bool:
    """Return whether a network is arranged anew; fail unless it computes the same, bit for bit."""
    network = read(model)
    other = arranged(network)
    if other == network:
        return False
    for one, same in zip(values(network), values(other), strict=True):
        np.testing.assert_array_equal(one, same)
    return True


SHIFTS = {
    "3 x 3": Layers(),
    "2 x 2": Layers(window=2),
    "float32": Layers(dtype=np.float32),
    "without bias": Layers(bias=()),
    "a bias of each pixel": Layers(bias=(1, P)),
    "a bias of each number": Layers(bias=(C, P)),
    "minimum first": Layers(sorts=("Min", "Max")),
    "two maxima": Layers(sorts=("Max", "Max")),
    "turned operands": Layers(turned=True),
    "unequal halves": Layers(halves=(1, C - 1)),
    "blocks of pixels": Layers(block=2),
    "larger blocks of pixels": Layers(block=3),
    "planes that are taken twice": Layers(taken_twice="planes"),
    "a sort that is taken twice": Layers(taken_twice="sort"),
    "a half that is taken twice": Layers(taken_twice="half"),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_is_moved_in_long_rows(name: str) -> None:
    layers = SHIFTS[name]
    assert changed(layers.model())
    kinds = [(operator.kind, operator.results[0].shape) for operator in arranged(read(layers.model())).operators]
    assert all(kind != "Gather" or len(shape) == 2 for kind, shape in kinds), kinds


def swapped(positions: np.ndarray) -> None:
    # Pixels of the inner of a plane, where the mask is 1.
    first = 4 * P + 5 * W + 5
    positions[[first, first + 1]] = positions[[first + 1, first]]


def of_another_plane(positions: np.ndarray) -> None:
    positions[5 * P : 6 * P] = positions[4 * P : 5 * P]


def all_open(mask: np.ndarray) -> None:
    mask[:] = 1.0


def halved(mask: np.ndarray) -> None:
    mask[7 * P + 50] = 0.5


def closed(mask: np.ndarray) -> None:
    mask[3 * P : 4 * P] = 0.0


OTHERS = {
    "two pixels change places": Layers(move=swapped),
    "a plane is taken twice": Layers(move=of_another_plane),
    "pixels come in again at the other side": Layers(cover=all_open),
    "a factor other than 0 and 1": Layers(cover=halved),
    "a plane is closed": Layers(cover=closed),
    "numbers of the shift are taken twice": Layers(taken_twice="gathered"),
    "the row of numbers is taken twice": Layers(taken_twice="flat"),
    "the pixels are mixed": Layers(weight_right=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_shift_stays_as_it_is(name: str) -> None:
    assert not changed(OTHERS[name].model())


@given(st.integers(0, C * P - 1), st.integers(0, C * P - 1), st.sampled_from([0.0, 1.0, -1.0, 0.25]))
def test_another_position_or_factor_is_computed_or_left_alone(at: int, position: int, factor: float) -> None:
    positions, mask = shift(C, H, W, 3)
    positions[at], mask[(at + position) % mask.size] = position, factor
    moves = plane_moves(positions, mask, C)
    if moves is None:
        return
    x = np.arange(C * P) + 1.0
    row = x.reshape(C, P)[moves.source]
    for plane, ahead in enumerate(moves.distance):
        row[plane] = np.roll(row[plane], -ahead)
    np.testing.assert_array_equal(row * moves.mask, (x[positions] * mask).reshape(C, P))


def test_a_row_with_one_number_from_elsewhere_is_another_map() -> None:
    moves = plane_moves(*shift(C, H, W, 3), C)
    assert isinstance(moves, PlaneMoves)
    order = np.argsort(moves.of_source, kind="stable")
    row = rolled(moves.of_source[order].tolist(), P).applied((order[:, None] * P + np.arange(P)).ravel())
    assert is_same_map(moves, order, row)
    kept = np.flatnonzero(moves.mask[np.argsort(moves.source)[order]].ravel())
    for at in kept[:: len(kept) // 50]:
        wrong = row.copy()
        wrong[at] = row[(at + 1) % row.size]
        assert not is_same_map(moves, order, wrong)
    assert not is_same_map(moves, order[::-1], row)


def test_runs_are_longest() -> None:
    assert runs([4, 4, 1, 4]) == [(0, 2), (2, 3), (3, 4)]
    assert rolled([0, 0, 0], 4).sizes == (12,)


@pytest.mark.parametrize("name", ["cifar10-cpu", "malaria-cells"])
def test_the_proof_of_what_runs_is_that_of_the_file(name: str) -> None:
    model = (ZOO / name / MODEL_FILE).read_bytes()
    network = read(model)
    other = arranged(network)
    assert other != network
    of_file, of_run = certify(model), certify(write(other))
    # The norms of matrices whose rows and columns are permuted, each rounded up.
    np.testing.assert_allclose(of_run.margin_bounds_KK, of_file.margin_bounds_KK, rtol=1e-13)
    assert of_run.logit_error == pytest.approx(of_file.logit_error, rel=1e-12)
