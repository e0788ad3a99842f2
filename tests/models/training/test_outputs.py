"""Radii at reference images in training, beside those that the server proves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_runs import small_network, small_run

from models.nets.networks import LipschitzNetwork, dense_network
from models.recipes import Loss
from models.training.loop import fit
from models.training.objective import objective_of
from models.training.outputs import Outputs, larger_radii, logits_at_images
from service.certificate.radius import pair_radii
from service.certificate.reference import reference_cost, reference_radii

RADIUS = 0.4
LOSS = Loss(kind="margin_cross_entropy", min_margin=0.6, temperature=0.2, per_pair_bound=True, reference_radius=RADIUS)


def dark_images(n: int, seed: int = 0) -> torch.Tensor:
    """Return images with many pixels at the ends of the box."""
    torch.manual_seed(seed)
    return (1.6 * torch.rand(n, 1, 6, 6) - 0.5).clamp(0, 1)


def at_both(network: LipschitzNetwork, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and larger radii."""
    outputs = Outputs(network, RADIUS)(images, labels)
    return outputs, larger_radii(network, outputs, labels, RADIUS)


@pytest.mark.parametrize("outputs_count", [1, 3])
def test_a_larger_radius_that_reaches_tau_is_what_the_server_proves(outputs_count: int) -> None:
    """At the radius tau training and proof agree: `M >= tau` exactly where one of both images proves tau."""
    torch.manual_seed(3)
    network = dense_network((1, 6, 6), (12, 8), outputs_count)
    images = dark_images(400)
    K = max(outputs_count, 2)
    labels = torch.randint(K, (400,))
    seen: list[torch.Tensor] = []
    network.body.register_forward_hook(lambda _layer, given, _out: seen.append(given[0].detach()))
    outputs, larger_NK = at_both(network, images, labels)
    image, reference = (given.numpy().astype(float) for given in seen)
    n = outputs.shape[1] // 2
    both = [outputs[:, :n], outputs[:, n + 1 :]]
    both = [torch.cat([f, -f], 1) if n == 1 else f for f in both]
    bounds_NK = network.declared_margin_bounds_KK()[labels].detach().numpy().astype(float)
    plain, there = [f.detach().numpy().astype(float) for f in both]
    cost = reference_cost(image, reference)
    np.testing.assert_allclose(outputs[:, n].detach().numpy(), cost, rtol=1e-4, atol=1e-6)
    proved = np.maximum(
        pair_radii(plain, labels.numpy(), bounds_NK, 0.0),
        reference_radii(there, labels.numpy(), cost, bounds_NK, 0.0),
    )
    others = np.arange(K)[None] != labels.numpy()[:, None]
    learned = larger_NK.detach().numpy()
    clear = others & (np.abs(proved - RADIUS) > 1e-5)
    assert ((learned >= RADIUS) == (proved >= RADIUS))[clear].all()
    assert (reference_radii(there, labels.numpy(), cost, bounds_NK, 0.0) > proved * 0.999)[clear].any()


def test_the_reference_image_of_a_linear_margin_is_the_best_part_of_the_way() -> None:
    """For one linear map the way is known: it gains where the box blocks the step, and costs nothing elsewhere."""
    network = dense_network((1, 6, 6), (), 3)
    images, labels = dark_images(200), torch.zeros(200, dtype=torch.int64)
    outputs, larger_NK = at_both(network, images, labels)
    plain = Outputs(network, None)(images, labels)
    assert torch.equal(logits_at_images(outputs, RADIUS), plain)
    radius = ((plain[:, :1] - plain) / network.declared_margin_bounds_KK()[0].clamp(min=1e-9))[:, 1:]
    gained = larger_NK[:, 1:] - radius
    assert (gained >= -1e-6).all()
    assert (gained.amax(1) > 0.01).float().mean() > 0.9

    inside = 0.5 + 0.01 * (images - 0.5)
    outputs, larger_NK = at_both(network, inside, labels)
    plain = Outputs(network, None)(inside, labels)
    assert torch.allclose(outputs[:, 3], torch.zeros(200), atol=1e-6)
    torch.testing.assert_close(outputs[:, 4:], plain, rtol=0, atol=1e-5)


def test_training_with_reference_images_repeats(tmp_path: Path) -> None:
    def run(folder: str) -> LipschitzNetwork:
        base = small_run(tmp_path / folder)
        return fit(
            small_network("stiefel"), replace(base, objective=objective_of(LOSS), reference_radius=RADIUS)
        ).network

    one, other = run("one"), run("other")
    for name, value in one.state_dict().items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_gradient_of_the_loss_is_that_of_its_value() -> None:
    """z is fixed: differences of the loss at a fixed z are the oracle."""
    network = small_network("stiefel")
    images, labels = dark_images(30), torch.arange(30) % 3
    objective = objective_of(LOSS)
    outputs = Outputs(network, RADIUS)(images, labels).detach().double().requires_grad_()
    objective(network, outputs, labels).backward()
    assert outputs.grad is not None
    step = torch.randn(outputs.shape, dtype=outputs.dtype) * 1e-4
    ahead, behind = (objective(network, outputs.detach() + s * step, labels).item() for s in (1, -1))
    assert math.isclose(ahead - behind, 2 * (outputs.grad * step).sum().item(), rel_tol=1e-2, abs_tol=1e-7)


@pytest.mark.parametrize("change", [{"per_pair_bound": False}, {"kind": "hkr"}, {"reference_radius": 0.0}])
def test_a_reference_radius_needs_margins_that_are_radii(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="reference_radius"):
        Loss.model_validate(LOSS.model_dump() | change)
