"""The hKR loss family. One convention for all: `-(KR term) + alpha * (hinge term)`, averaged over the batch.

Other libraries write the margin as `min_margin / 2`, or weigh the terms by `1 - alpha` and `alpha` with alpha
in [0, 1]; here `alpha >= 0` multiplies the hinge, and a score of `min_margin` pays no hinge.

Source: Serrurier, Mamalet, Gonzalez-Sanz, Boissin, Loubes, del Barrio, Achieving robustness in classification
using optimal transport with hinge regularization, CVPR 2021.

Labels are class numbers. With one output f, class 0 is `f > 0`: the sign of a label is `s = 1 - 2 y`. Parameters of all
losses: `alpha` weighs the hinge term; `min_margin` and `temperature` are in the unit of the logits, or of a radius (L2,
pixels in [0, 1]) where the margins are divided by their constants `K_ij`.

Axes: N batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def kr_loss(logits_NK: Float[Tensor, "N K"], labels_N: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Return the negative Kantorovich-Rubinstein term, `-sum_k (mean_{y = k} f_k - mean_{y != k} f_k)`.

    One output f: `-(mean_{y = 0} f - mean_{y = 1} f)`; over all 1-Lipschitz f its infimum is minus the
    Wasserstein distance W1 between the two classes (Kantorovich-Rubinstein duality). A class that is absent
    from the batch, or alone in it, contributes nothing.
    """
    member_NK = _membership(logits_NK, labels_N).to(logits_NK.dtype)
    inside_K, outside_K = member_NK.sum(0), (1 - member_NK).sum(0)
    inside_mean_K = (member_NK * logits_NK).sum(0) / inside_K.clamp(min=1)
    outside_mean_K = ((1 - member_NK) * logits_NK).sum(0) / outside_K.clamp(min=1)
    both_present_K = (inside_K > 0) & (outside_K > 0)
    return -((inside_mean_K - outside_mean_K) * both_present_K).sum()


def hinge_loss(logits_NK: Float[Tensor, "N K"], labels_N: Int[Tensor, " N"], min_margin: float) -> Float[Tensor, ""]:
    """Return the hinge term, `mean_n sum_k relu(min_margin - s_nk f_k)` with `s_nk = 1` if `y_n = k`, else `-1`.

    One output f: `mean_n relu(min_margin - s_n f)` with `s = +1` for class 0 and `-1` for class 1.

    Args:
        logits_NK: logits, or one output f.
        labels_N: class numbers.
        min_margin: score from which a class pays no hinge.
    """
    sign_NK = 2 * _membership(logits_NK, labels_N).to(logits_NK.dtype) - 1
    return F.relu(min_margin - sign_NK * logits_NK).sum(1).mean()


def hkr_loss(
    logits_NK: Float[Tensor, "N K"], labels_N: Int[Tensor, " N"], *, alpha: float, min_margin: float
) -> Float[Tensor, ""]:
    """Return `kr_loss + alpha * hinge_loss`: two classes with one output, or K classes, each against all the others.

    For K outputs each logit must be 1-Lipschitz on its own (`UnitHead` normalises each row), as in the
    paper's section on several classes.

    Args:
        logits_NK: logits, or one output f.
        labels_N: class numbers.
        alpha: weight of the hinge.
        min_margin: score from which a class pays no hinge.
    """
    return kr_loss(logits_NK, labels_N) + alpha * hinge_loss(logits_NK, labels_N, min_margin)


def hkr_margin_loss(
    logits_NK: Float[Tensor, "N K"],
    labels_N: Int[Tensor, " N"],
    *,
    alpha: float,
    min_margin: float,
    margin_bounds_KK: Float[Tensor, "K K"] | None = None,
    accuracy_alpha: float = 0.0,
    accuracy_margin: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the hKR loss on the margin that decides the class, with a second hinge near the boundary.

    `mean(-m + alpha relu(min_margin - m) + accuracy_alpha relu(accuracy_margin - m))`. The first hinge asks every image
    for a large radius; the second weighs those that are wrong, or nearly so, more than those that are merely near.

    `m = min_{j != y} (f_y - f_j)`, or `min_{j != y} (f_y - f_j) / K_yj` when the constants `K_ij` of the
    differences are given; m is then a radius in pixel units.

    Args:
        logits_NK: at least two logits.
        labels_N: class numbers.
        alpha: weight of the first hinge.
        min_margin: margin from which an image does not pay the first hinge.
        margin_bounds_KK: constants `K_ij`; default: margins of logits.
        accuracy_alpha: weight of the second hinge.
        accuracy_margin: margin from which an image does not pay the second hinge.
    """
    difference_NK = logits_NK.gather(1, labels_N[:, None]) - logits_NK
    if margin_bounds_KK is not None:
        difference_NK = difference_NK / with_unit_diagonal(margin_bounds_KK)[labels_N]
    margin_N = difference_NK.scatter(1, labels_N[:, None], torch.inf).amin(1)
    hinges_N = alpha * F.relu(min_margin - margin_N) + accuracy_alpha * F.relu(accuracy_margin - margin_N)
    return (hinges_N - margin_N).mean()


def soft_hkr_loss(
    logits_NK: Float[Tensor, "N K"], labels_N: Int[Tensor, " N"], *, alpha: float, min_margin: float, temperature: float
) -> Float[Tensor, ""]:
    """Return the hKR loss of each class against all the others, which are weighed by their nearness.

    `mean(-(f_y - sum_j p_j f_j) + alpha (relu(min_margin - f_y) + sum_j p_j relu(min_margin + f_j)))` over `j != y`,
    with `p = softmax(f_j / temperature)` over these, through which no gradient flows. Towards temperature 0 only the
    nearest other class counts, towards infinity all count alike, as in `hkr_loss`.

    Source: the softmax-weighted hKR loss of the authors' library (deel-torchlip, `SoftHKRMulticlassLoss`), in the
    convention of this module, and with a temperature in the unit of the logits.

    Args:
        logits_NK: at least two logits.
        labels_N: class numbers.
        alpha: weight of the hinge.
        min_margin: score from which a class pays no hinge.
        temperature: of the softmax.
    """
    own_N = logits_NK.gather(1, labels_N[:, None])[:, 0]
    masked_NK = logits_NK.scatter(1, labels_N[:, None], -torch.inf)
    weight_NK = F.softmax(masked_NK.detach() / temperature, dim=1)
    others_N = (weight_NK * logits_NK).sum(1)
    hinge_N = F.relu(min_margin - own_N) + (weight_NK * F.relu(min_margin + logits_NK)).sum(1)
    return (others_N - own_N + alpha * hinge_N).mean()


def lse_hkr_loss(
    logits_NK: Float[Tensor, "N K"], labels_N: Int[Tensor, " N"], *, alpha: float, min_margin: float, temperature: float
) -> Float[Tensor, ""]:
    """Return the hKR loss on a smooth lower bound of the margin, `mean(-m + alpha relu(min_margin - m))`.

    `m = f_y - T log sum_{j != y} exp(f_j / T)`, at most `min_{j != y} (f_y - f_j)` and at least that less
    `T log(K - 1)`: every other class gets a gradient, the nearest the largest.

    Source: the log-sum-exp hKR loss of the authors' library (deel-torchlip, `LseHKRMulticlassLoss`), in the convention
    of this module.

    Args:
        logits_NK: at least two logits.
        labels_N: class numbers.
        alpha: weight of the hinge.
        min_margin: margin from which an image pays no hinge.
        temperature: T, of the log-sum-exp.
    """
    own_N = logits_NK.gather(1, labels_N[:, None])[:, 0]
    masked_NK = logits_NK.scatter(1, labels_N[:, None], -torch.inf)
    margin_N = own_N - temperature * torch.logsumexp(masked_NK / temperature, dim=1)
    return (alpha * F.relu(min_margin - margin_N) - margin_N).mean()


def margin_cross_entropy_loss(
    logits_NK: Float[Tensor, "N K"],
    labels_N: Int[Tensor, " N"],
    *,
    min_margin: float,
    temperature: float,
    margin_bounds_KK: Float[Tensor, "K K"] | None = None,
) -> Float[Tensor, ""]:
    """Return the cross-entropy with a margin, `T mean(log(1 + sum_{j != y} exp((min_margin - m_yj) / T)))`.

    `m_yj = f_y - f_j`, which makes it `T` times the cross-entropy of `(f - min_margin e_y) / T`; the factor T keeps the
    size of the gradient. Where the constants `K_ij` of the differences are given `m_yj = (f_y - f_j) / K_yj`, a radius,
    and so are min_margin and T: the head then learns which classes it pays to keep apart.

    Source: Prach and Lampert, Almost-orthogonal layers for efficient general-purpose Lipschitz networks, ECCV 2022,
    section 5 (there the margin is called offset); dividing by `K_yj` is ours.

    Args:
        logits_NK: at least two logits.
        labels_N: class numbers.
        min_margin: offset subtracted from each margin.
        temperature: T.
        margin_bounds_KK: constants `K_ij`; default: margins of logits.
    """
    deficit_NK = logits_NK - logits_NK.gather(1, labels_N[:, None])
    if margin_bounds_KK is not None:
        deficit_NK = deficit_NK / with_unit_diagonal(margin_bounds_KK)[labels_N]
    deficit_NK = deficit_NK + min_margin * (1 - F.one_hot(labels_N, logits_NK.shape[1]).to(logits_NK))
    return temperature * torch.logsumexp(deficit_NK / temperature, dim=1).mean()


def with_unit_diagonal(margin_bounds_KK: Tensor) -> Tensor:
    """Put 1 on the diagonal, which never counts: it keeps 0 / 0 out of the gradient."""
    return margin_bounds_KK + torch.eye(len(margin_bounds_KK)).to(margin_bounds_KK)


def _membership(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    if logits_NK.shape[1] == 1:
        return labels_N[:, None] == 0
    return labels_N[:, None] == torch.arange(logits_NK.shape[1], device=labels_N.device)
