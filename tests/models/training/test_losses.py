"""The losses agree with the formulas of their docstrings, evaluated by loops in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import often

from models.training.losses import (
    hinge_loss,
    hkr_loss,
    hkr_margin_loss,
    kr_loss,
    lse_hkr_loss,
    margin_cross_entropy_loss,
    soft_hkr_loss,
)


def sample(seed: int, images: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, outputs, dtype=torch.float64, generator=generator)
    return logits, torch.randint(0, max(outputs, 2), (images,), generator=generator)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def kr_by_hand(logits: list[list[float]], labels: list[int]) -> float:
    total = 0.0
    for k in range(len(logits[0])):
        inside = [row[k] for row, y in zip(logits, labels, strict=True) if y == k]
        outside = [row[k] for row, y in zip(logits, labels, strict=True) if y != k]
        if inside and outside:
            total -= mean(inside) - mean(outside)
    return total


def hinge_by_hand(logits: list[list[float]], labels: list[int], min_margin: float) -> float:
    return mean(
        [
            sum(max(0.0, min_margin - (f if y == k else -f)) for k, f in enumerate(row))
            for row, y in zip(logits, labels, strict=True)
        ]
    )


def margin_by_hand(row: list[float], y: int, bounds: list[list[float]] | None) -> float:
    return min((row[y] - f) / (bounds[y][j] if bounds is not None else 1.0) for j, f in enumerate(row) if j != y)


@settings(max_examples=often(15, 60), deadline=None)
@given(
    seed=st.integers(0, 1000),
    images=st.integers(1, 12),
    outputs=st.integers(1, 5),
    alpha=st.floats(0, 50),
    min_margin=st.floats(0, 5),
)
def test_hkr_is_kr_plus_alpha_hinge_as_written(
    seed: int, images: int, outputs: int, alpha: float, min_margin: float
) -> None:
    logits, labels = sample(seed, images, outputs)
    rows, ys = logits.tolist(), labels.tolist()
    kr, hinge = kr_by_hand(rows, ys), hinge_by_hand(rows, ys, min_margin)
    assert kr_loss(logits, labels).item() == pytest.approx(kr, abs=1e-12)
    assert hinge_loss(logits, labels, min_margin).item() == pytest.approx(hinge, abs=1e-12)
    actual = hkr_loss(logits, labels, alpha=alpha, min_margin=min_margin).item()
    assert actual == pytest.approx(kr + alpha * hinge, rel=1e-12, abs=1e-10)


@settings(max_examples=often(15, 60), deadline=None)
@given(
    seed=st.integers(0, 1000),
    images=st.integers(1, 12),
    outputs=st.integers(2, 5),
    alpha=st.floats(0, 50),
    min_margin=st.floats(0, 5),
    accuracy_alpha=st.floats(0, 50),
    accuracy_margin=st.floats(0, 5),
    per_pair=st.booleans(),
)
def test_margin_hkr_is_the_mean_over_deciding_margins(
    seed: int,
    images: int,
    outputs: int,
    alpha: float,
    min_margin: float,
    accuracy_alpha: float,
    accuracy_margin: float,
    per_pair: bool,
) -> None:
    logits, labels = sample(seed, images, outputs)
    bounds = None
    if per_pair:
        points = torch.randn(outputs, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        bounds = torch.cdist(points, points)
    margins = [
        margin_by_hand(row, y, bounds.tolist() if bounds is not None else None)
        for row, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    expected = mean(
        [-m + alpha * max(0.0, min_margin - m) + accuracy_alpha * max(0.0, accuracy_margin - m) for m in margins]
    )
    actual = hkr_margin_loss(
        logits,
        labels,
        alpha=alpha,
        min_margin=min_margin,
        margin_bounds_KK=bounds,
        accuracy_alpha=accuracy_alpha,
        accuracy_margin=accuracy_margin,
    )
    assert actual.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_with_one_output_class_0_is_pushed_up_and_class_1_down() -> None:
    logits = torch.zeros(2, 1, requires_grad=True)
    hkr_loss(logits, torch.tensor([0, 1]), alpha=1.0, min_margin=1.0).backward()
    assert logits.grad is not None
    assert logits.grad[0].item() < 0 < logits.grad[1].item()


def test_kr_loss_of_a_perfect_potential_is_minus_the_distance() -> None:
    # Two points on a line 5 apart; f(x) = -x is 1-Lipschitz and optimal.
    logits = -torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    assert kr_loss(logits, torch.tensor([0, 0, 1, 1])).item() == -5.0


def test_kr_loss_does_not_see_a_shift_of_the_potential() -> None:
    logits, labels = sample(3, 10, 4)
    assert kr_loss(logits + 7.0, labels).item() == pytest.approx(kr_loss(logits, labels).item(), abs=1e-12)


def test_batch_of_one_class_gives_a_finite_loss() -> None:
    logits = torch.randn(4, 1, requires_grad=True)
    loss = hkr_loss(logits, torch.zeros(4, dtype=torch.int64), alpha=1.0, min_margin=1.0)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_gradient_of_margin_hkr_is_finite_with_a_zero_diagonal_of_bounds() -> None:
    logits, labels = sample(5, 8, 4)
    rows = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    bounds = torch.cdist(rows, rows)
    logits.requires_grad_()
    hkr_margin_loss(logits, labels, alpha=2.0, min_margin=1.0, margin_bounds_KK=bounds).backward()
    for tensor in (logits, rows):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


SMOOTH = {
    "seed": st.integers(0, 1000),
    "images": st.integers(1, 8),
    "outputs": st.integers(2, 5),
    "alpha": st.floats(0, 50),
    "min_margin": st.floats(0, 5),
    "temperature": st.floats(0.05, 5),
}


def softmax_by_hand(values: list[float], temperature: float) -> list[float]:
    top = max(values)
    powers = [math.exp((value - top) / temperature) for value in values]
    return [power / math.fsum(powers) for power in powers]


@settings(max_examples=often(15, 60), deadline=None)
@given(**SMOOTH)
def test_soft_hkr_weighs_the_other_classes_as_written(
    seed: int, images: int, outputs: int, alpha: float, min_margin: float, temperature: float
) -> None:
    logits, labels = sample(seed, images, outputs)
    terms: list[float] = []
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        others = [f for j, f in enumerate(row) if j != y]
        weights = softmax_by_hand(others, temperature)
        kr = row[y] - math.fsum(p * f for p, f in zip(weights, others, strict=True))
        hinge = max(0.0, min_margin - row[y])
        hinge += math.fsum(p * max(0.0, min_margin + f) for p, f in zip(weights, others, strict=True))
        terms.append(-kr + alpha * hinge)
    loss = soft_hkr_loss(logits, labels, alpha=alpha, min_margin=min_margin, temperature=temperature)
    assert loss.item() == pytest.approx(mean(terms), rel=1e-9, abs=1e-9)


@settings(max_examples=often(15, 60), deadline=None)
@given(**SMOOTH)
def test_lse_hkr_is_hkr_of_a_lower_bound_of_the_margin(
    seed: int, images: int, outputs: int, alpha: float, min_margin: float, temperature: float
) -> None:
    logits, labels = sample(seed, images, outputs)
    terms: list[float] = []
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        others = [f for j, f in enumerate(row) if j != y]
        top = max(others)
        smooth = top + temperature * math.log(math.fsum(math.exp((f - top) / temperature) for f in others))
        margin = row[y] - smooth
        assert row[y] - top - temperature * math.log(outputs) - 1e-9 <= margin <= row[y] - top + 1e-9
        terms.append(-margin + alpha * max(0.0, min_margin - margin))
    loss = lse_hkr_loss(logits, labels, alpha=alpha, min_margin=min_margin, temperature=temperature)
    assert loss.item() == pytest.approx(mean(terms), rel=1e-9, abs=1e-9)


@settings(max_examples=often(15, 60), deadline=None)
@given(**{key: value for key, value in SMOOTH.items() if key != "alpha"})
def test_margin_cross_entropy_sets_the_own_class_back(
    seed: int, images: int, outputs: int, min_margin: float, temperature: float
) -> None:
    logits, labels = sample(seed, images, outputs)
    terms: list[float] = []
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        shifted = [f - min_margin * (j == y) for j, f in enumerate(row)]
        top = max(shifted)
        total = top / temperature + math.log(math.fsum(math.exp((f - top) / temperature) for f in shifted))
        terms.append(temperature * (total - shifted[y] / temperature))
    loss = margin_cross_entropy_loss(logits, labels, min_margin=min_margin, temperature=temperature)
    assert loss.item() == pytest.approx(mean(terms), rel=1e-9, abs=1e-9)


def test_margin_cross_entropy_on_radii_divides_each_margin_by_its_constant() -> None:
    logits, labels = sample(3, 5, 4)
    points = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    bounds = torch.cdist(points, points)
    terms: list[float] = []
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        radii = [(row[y] - f) / bounds[y, j].item() for j, f in enumerate(row) if j != y]
        terms.append(0.5 * math.log1p(math.fsum(math.exp((1.5 - radius) / 0.5) for radius in radii)))
    loss = margin_cross_entropy_loss(logits, labels, min_margin=1.5, temperature=0.5, margin_bounds_KK=bounds)
    assert loss.item() == pytest.approx(mean(terms), rel=1e-12)


def test_no_gradient_flows_through_the_weights_of_soft_hkr() -> None:
    logits = torch.tensor([[1.0, 0.5, -0.5]], requires_grad=True)
    soft_hkr_loss(logits, torch.tensor([0]), alpha=0.0, min_margin=1.0, temperature=0.5).backward()
    weights = softmax_by_hand([0.5, -0.5], 0.5)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-1.0, *weights], abs=1e-6)
