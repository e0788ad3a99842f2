"""The declared constants of a network bound the gradients of its margins, in float64."""

import itertools
import math
from typing import Literal

import pytest
import torch

from models.nets.networks import both_logits, convolutional_network, dense_network
from models.recipes import Stage

TOLERANCE = 1e-6
"""Relative excess that rounding of weights to float32 may cause."""


def test_declared_margin_bounds_are_bounds_of_the_margins() -> None:
    torch.manual_seed(9)
    network = dense_network((1, 4, 4), (12, 8), 3).fold()
    bounds = network.declared_margin_bounds_KK()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    gradients = torch.autograd.functional.jacobian(network, x).reshape(3, -1)
    for i, j in itertools.combinations(range(3), 2):
        assert torch.linalg.vector_norm(gradients[i] - gradients[j]) <= bounds[i, j] * (1 + TOLERANCE)


def test_one_output_counts_as_two_classes_with_twice_the_constant() -> None:
    network = dense_network((1, 4, 4), (8,), 1)
    expected = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    torch.testing.assert_close(network.declared_margin_bounds_KK(), expected, check_dtype=False)
    assert both_logits(torch.tensor([[3.0]])).tolist() == [[3.0, -3.0]]


def test_gradient_of_margin_bounds_is_finite_on_the_diagonal() -> None:
    network = dense_network((1, 4, 4), (8,), 3)
    network.declared_margin_bounds_KK().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("pool", ["none", "max", "l2"])
def test_convolutional_network_is_one_lipschitz(pool: Literal["none", "max", "l2"]) -> None:
    torch.manual_seed(10)
    network = convolutional_network((1, 8, 8), [Stage(channels=8, blocks=2)] * 2, pool, (6,), 1).fold()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(network, x)
    assert math.sqrt(gradient.square().sum()) <= 1 + TOLERANCE
