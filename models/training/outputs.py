"""Outputs of a training step: logits, or logits at the images and at their reference images.

Radii at reference images. The theorem of `service.certificate.reference`: for images x and z of the box with the cost
`c = c(z - x)`, a margin of `K sqrt(rho^2 + c)` at z proves the radius rho at x. So at the radius tau that a recipe asks
for, the radius `m(z) / K - (sqrt(tau^2 + c) - tau)` counts as much as `m(x) / K`, and the loss gets the larger one.

z is a part of the way to the best image of the linear margin, `clip(x - t g, 0, 1) + t g` with the gradient g of
`m / K` and `t^2 = tau^2 + c`, as in `service.inference.references`. m is the margin to the nearest other class; no
derivative of z is taken.

Axes: N batch, K classes, C H W image.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.nets.networks import LipschitzNetwork, both_logits
from models.training.losses import with_unit_diagonal

# The part of the way, as in the server's search: the margin of a network falls behind its linearisation.
_PART = 0.7
# Steps of the fixed point t, from tau.
_STEPS = 3


class Outputs(nn.Module):
    """A network with its head outside of mixed precision, since a margin is a small difference of logits."""

    def __init__(self, network: LipschitzNetwork, reference_radius: float | None) -> None:
        super().__init__()
        self.network = network
        self.reference_radius = reference_radius

    def forward(self, images_NCHW: Float[Tensor, "N C H W"], labels_N: Int[Tensor, " N"]) -> Float[Tensor, "N outputs"]:
        """Return logits; with a reference radius: logits, cost of a reference image, logits there, side by side."""
        if self.reference_radius is None:
            return self._logits(images_NCHW)
        images_NCHW = images_NCHW.detach().requires_grad_()
        logits = self._logits(images_NCHW)
        radius_NK = _radii(self.network, logits, labels_N).scatter(1, labels_N[:, None], torch.inf)
        (gradient_NCHW,) = torch.autograd.grad(radius_NK.amin(1).sum(), images_NCHW, retain_graph=True)
        images_NCHW = images_NCHW.detach()
        step_NCHW = _PART * _best_step(images_NCHW, gradient_NCHW, self.reference_radius)
        cost_N = _cost(images_NCHW, step_NCHW)
        return torch.cat([logits, cost_N[:, None].to(logits), self._logits(images_NCHW + step_NCHW)], dim=1)

    def _logits(self, images: Tensor) -> Tensor:
        features = self.network.body(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.network.head(features.float())


def logits_at_images(outputs: Tensor, reference_radius: float | None) -> Tensor:
    """Return the logits at the images themselves."""
    return outputs if reference_radius is None else outputs[:, : outputs.shape[1] // 2]


def larger_radii(
    network: LipschitzNetwork,
    outputs: Float[Tensor, "N outputs"],
    labels_N: Int[Tensor, " N"],
    reference_radius: float,
) -> Float[Tensor, "N K"]:
    """Return the larger radius of image and reference image against each other class; 0 for the class itself.

    Args:
        network: its constants `K_ij`.
        outputs: of `Outputs`.
        labels_N: class numbers.
        reference_radius: tau.
    """
    classes = outputs.shape[1] // 2
    at_image, cost_N1, at_reference = outputs.split([classes, 1, classes], dim=1)
    lost_N1 = (reference_radius**2 + cost_N1).sqrt() - reference_radius
    larger_NK = torch.maximum(_radii(network, at_image, labels_N), _radii(network, at_reference, labels_N) - lost_N1)
    return larger_NK.scatter(1, labels_N[:, None], 0.0)


def _radii(network: LipschitzNetwork, logits: Tensor, labels_N: Tensor) -> Float[Tensor, "N K"]:
    """Return `(f_y - f_j) / K_yj` of all classes j, 0 for y itself; a single output f counts as two logits."""
    logits_NK = both_logits(logits)
    bounds_KK = with_unit_diagonal(network.declared_margin_bounds_KK())
    return (logits_NK.gather(1, labels_N[:, None]) - logits_NK) / bounds_KK[labels_N]


def _best_step(images_NCHW: Tensor, gradient_NCHW: Tensor, radius: float) -> Float[Tensor, "N C H W"]:
    """Return the step to the best image of the linear margin; the part beyond the box is put back at its start."""
    step_NCHW = _put_back(images_NCHW, radius * gradient_NCHW)
    for _ in range(_STEPS):
        t_N = (radius**2 + _cost(images_NCHW, step_NCHW)).sqrt()
        step_NCHW = _put_back(images_NCHW, t_N[:, None, None, None] * gradient_NCHW)
    return step_NCHW


def _put_back(images_NCHW: Tensor, way_NCHW: Tensor) -> Float[Tensor, "N C H W"]:
    """Return `clip(x - way, 0, 1) + way - x`, inside the box."""
    return ((images_NCHW - way_NCHW).clamp(0, 1) + way_NCHW).clamp(0, 1) - images_NCHW


def _cost(images_NCHW: Tensor, step_NCHW: Tensor) -> Float[Tensor, " N"]:
    """Return `c(s) = ||s||^2 + 2 sum max(s, 0) x + 2 sum max(-s, 0) (1 - x)`."""
    blocked_NCHW = torch.where(step_NCHW > 0, images_NCHW, 1 - images_NCHW)
    return (step_NCHW.square() + 2 * step_NCHW.abs() * blocked_NCHW).flatten(1).sum(1)
