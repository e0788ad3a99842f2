"""A step follows the manifold, and descent finds the known best orthogonal matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import often

from models.nets.networks import dense_network
from models.recipes import Schedule
from models.training.optimisers import StiefelMuon, optimisers_of, orthogonalised, tangent

shapes = pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])


def polar(matrix: torch.Tensor) -> torch.Tensor:
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh


def random_orthogonal(shape: tuple[int, int]) -> torch.Tensor:
    return polar(torch.randn(shape, dtype=torch.float64))


@shapes
def test_projected_gradient_is_tangent_to_the_orthogonal_matrices(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    W = random_orthogonal(shape)
    G = tangent(W, torch.randn(shape, dtype=torch.float64))
    # Along a tangent G the Gram matrix is stationary: d/dt (W + tG)(W + tG)^T = 0 at t = 0.
    change = W @ G.T + G @ W.T if shape[0] <= shape[1] else W.T @ G + G.T @ W
    torch.testing.assert_close(change, torch.zeros_like(change), atol=1e-12, rtol=0)


@shapes
def test_tangent_part_of_a_tangent_is_itself(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    W = random_orthogonal(shape)
    G = tangent(W, torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(tangent(W, G), G)


@settings(max_examples=often(10, 30), deadline=None)
@given(
    rows=st.integers(1, 10), columns=st.integers(1, 10), scale=st.sampled_from([1e-6, 1.0, 1e6]), seed=st.integers(0, 9)
)
def test_sign_has_the_singular_vectors_of_the_matrix_and_values_near_1(
    rows: int, columns: int, scale: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    U, _, Vh = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64, generator=random), full_matrices=False)
    values = 0.3 + 0.7 * torch.rand(min(rows, columns), dtype=torch.float64, generator=random)
    signed = orthogonalised(scale * U @ torch.diag(values) @ Vh)
    inner = U.T @ signed @ Vh.T
    assert (inner.diag() > 0.5).all()
    assert (inner.diag() < 1.4).all()
    torch.testing.assert_close(inner - torch.diag(inner.diag()), torch.zeros_like(inner), atol=1e-8, rtol=0)


def test_sign_of_zero_is_zero() -> None:
    assert torch.equal(orthogonalised(torch.zeros(3, 4)), torch.zeros(3, 4))


@shapes
def test_matrices_stay_orthogonal_over_many_steps(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    weight = torch.nn.Parameter(random_orthogonal(shape).float())
    optimiser = StiefelMuon([weight], lr=0.1)
    for _ in range(50):
        weight.grad = torch.randn(shape)
        optimiser.step()
    singular_values = torch.linalg.svdvals(weight.detach())
    torch.testing.assert_close(singular_values, torch.ones(min(shape)), atol=1e-3, rtol=0)


@shapes
def test_descent_finds_the_nearest_orthogonal_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    start = random_orthogonal(shape)
    # The nearest orthogonal matrix to T is its polar factor (the orthogonal Procrustes problem).
    target = polar(start + 0.3 * torch.randn(shape, dtype=torch.float64)) * 2.0
    weight = torch.nn.Parameter(start)
    optimiser = StiefelMuon([weight], lr=0.1)
    for step in range(300):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimiser.zero_grad()
        (weight - target).square().sum().backward()
        optimiser.step()
    torch.testing.assert_close(weight.detach(), polar(target), atol=0.02, rtol=0)


def test_closure_is_refused() -> None:
    optimiser = StiefelMuon([torch.nn.Parameter(torch.eye(2))], lr=0.1)
    with pytest.raises(ValueError, match="no closure"):
        optimiser.step(lambda: 0.0)


def test_every_parameter_is_trained_by_exactly_one_optimiser() -> None:
    schedule = Schedule(epochs=1, learning_rate=0.1, rotation_rate=0.2)
    for parametrisation, rates in (("cayley", [0.1]), ("stiefel", [0.1, 0.2])):
        network = dense_network((1, 4, 4), (12, 8), 3, parametrisation=parametrisation)  # type: ignore[arg-type]
        groups = [group for optimiser in optimisers_of(network, schedule) for group in optimiser.param_groups]
        assert [group["lr"] for group in groups] == rates
        trained = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(trained) == sorted(id(parameter) for parameter in network.parameters())
