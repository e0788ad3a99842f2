"""The loss of a recipe as a function of network, outputs and labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from models.nets.networks import LipschitzNetwork, both_logits
from models.recipes import Loss
from models.training import losses
from models.training.outputs import larger_radii

Objective = Callable[[LipschitzNetwork, Tensor, Tensor], Tensor]
"""`(network, outputs, labels_N) -> loss` of a whole batch, with the outputs of `models.training.outputs.Outputs`."""


def objective_of(loss: Loss) -> Objective:
    """Return the function of `models.training.losses` that a recipe names, with its parameters; it can be pickled."""
    return partial(_loss_of, loss)


def _loss_of(loss: Loss, network: LipschitzNetwork, outputs: Tensor, labels: Tensor) -> Tensor:
    logits = outputs
    bounds = network.declared_margin_bounds_KK() if loss.per_pair_bound else None
    if loss.reference_radius is not None:
        # Radii as the logits of a network whose constants are all 1.
        logits, bounds = -larger_radii(network, outputs, labels, loss.reference_radius), None
    match loss.kind:
        case "kr":
            return losses.kr_loss(logits, labels)
        case "hkr":
            return losses.hkr_loss(logits, labels, alpha=loss.alpha, min_margin=loss.min_margin)
        case "hkr_margin":
            return losses.hkr_margin_loss(
                both_logits(logits),
                labels,
                alpha=loss.alpha,
                min_margin=loss.min_margin,
                margin_bounds_KK=bounds,
                accuracy_alpha=loss.accuracy_alpha,
                accuracy_margin=loss.accuracy_margin,
            )
        case "soft_hkr" | "lse_hkr":
            smooth = losses.soft_hkr_loss if loss.kind == "soft_hkr" else losses.lse_hkr_loss
            return smooth(
                both_logits(logits),
                labels,
                alpha=loss.alpha,
                min_margin=loss.min_margin,
                temperature=loss.temperature,
            )
        case "margin_cross_entropy":
            return losses.margin_cross_entropy_loss(
                both_logits(logits),
                labels,
                min_margin=loss.min_margin,
                temperature=loss.temperature,
                margin_bounds_KK=bounds,
            )
