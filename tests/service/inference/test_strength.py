"""Counterfactuals beyond the boundary: invariants, and the best image of a linear model."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from builders import linear, load, random_groupsort
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import often

from service.inference.classifier import Classifier, Prediction
from service.inference.closest import lowest_levels
from service.inference.counterfactual import Counterfactual
from service.inference.strength import GRADIENTS, strengthen

SEEDS = st.integers(0, 2**32 - 1)


@cache
def groupsort_classifier(seed: int, n_outputs: int) -> Classifier:
    return load(random_groupsort(seed, shape=(1, 5, 4), n_outputs=n_outputs))


def strong(
    classifier: Classifier, image_NCHW: np.ndarray, strength_N: list[float], resize: bool = False
) -> tuple[list[Prediction], list[Counterfactual], list[Counterfactual]]:
    """Return predictions, nearest counterfactuals and those of a strength."""
    view = classifier.view(image_NCHW.shape[1:], resize)
    predictions = view.predict(image_NCHW)
    nearest = classifier.counterfactual(image_NCHW, predictions, [None] * len(predictions), resize)
    class_id_N = [prediction.class_id for prediction in predictions]
    found = strengthen(view, image_NCHW, class_id_N, nearest, strength_N, len(classifier.labels))
    return predictions, nearest, found


def margin_to(logits_K: np.ndarray, class_id: int) -> float:
    return float(logits_K[class_id] - np.delete(logits_K, class_id).max())


@settings(max_examples=often(20, 80), deadline=None)
@given(
    seed=st.integers(0, 3),
    n_outputs=st.sampled_from([1, 2, 4]),
    image_seed=SEEDS,
    strengths=st.lists(st.floats(1.0, 3.0), min_size=1, max_size=4),
    eight_bit=st.booleans(),
    resize=st.booleans(),
)
def test_invariants_hold_for_any_strength(
    seed: int, n_outputs: int, image_seed: int, strengths: list[float], eight_bit: bool, resize: bool
) -> None:
    classifier = groupsort_classifier(seed, n_outputs)
    random = np.random.default_rng(image_seed)
    shape = (len(strengths), 1, 7, 9) if resize else (len(strengths), 1, 5, 4)
    image_NCHW = random.integers(0, 256, shape) / 255 if eight_bit else random.random(shape)
    predictions, nearest, found = strong(classifier, image_NCHW, strengths, resize)
    for image, strength, prediction, near, one in zip(image_NCHW, strengths, predictions, nearest, found, strict=True):
        if strength == 1.0 or not near.reached:
            assert one is near
            continue
        (again,) = classifier.predict(one.pixels_CHW[None] / 255, resize=resize)
        (at_boundary,) = classifier.predict(near.pixels_CHW[None] / 255, resize=resize)
        assert one.reached
        assert again.class_id == one.class_id == near.class_id
        assert margin_to(again.logits_K, one.class_id) >= margin_to(at_boundary.logits_K, one.class_id) - 1e-12
        assert one.nearest_distance == near.distance
        assert prediction.radius <= one.distance <= strength * near.distance * (1 + 1e-12)
        assert one.distance == pytest.approx(np.linalg.norm(image - one.pixels_CHW / 255), rel=1e-9)


@pytest.mark.parametrize("n_outputs", [1, 2])
@pytest.mark.parametrize("strength", [1.5, 3.0])
def test_margin_of_a_linear_model_is_the_largest_within_the_distance(n_outputs: int, strength: float) -> None:
    """Away from the bounds of the box, up to what the 8-bit grid and the aim within the distance cost."""
    random = np.random.default_rng(5)
    weight = random.normal(size=(n_outputs, 400)) / 20
    image_NCHW = random.integers(90, 166, (10, 1, 20, 20)) / 255
    bias = -weight @ image_NCHW[0].ravel() + random.normal(size=n_outputs) / 3
    classifier = load(linear(weight, bias, (1, 20, 20)))
    predictions, nearest, found = strong(classifier, image_NCHW, [strength] * 10)
    slope = 2 * weight[0] if n_outputs == 1 else weight[0] - weight[1]
    for prediction, near, one in zip(predictions, nearest, found, strict=True):
        (at,) = classifier.predict(one.pixels_CHW[None] / 255)
        best = strength * near.distance * np.linalg.norm(slope) - margin_to(prediction.logits_K, prediction.class_id)
        assert 0.98 * best - 0.02 <= margin_to(at.logits_K, one.class_id) <= best + 1e-9
        assert one.distance >= 0.97 * strength * near.distance


def test_a_larger_strength_has_a_larger_margin_and_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = groupsort_classifier(1, 4)
    image_NCHW = np.random.default_rng(3).integers(0, 256, (40, 1, 5, 4)) / 255
    means = []
    for strength in (1.0, 1.2, 1.6, 2.5):
        _, _, found = strong(classifier, image_NCHW, [strength] * 40)
        at = classifier.predict(np.stack([one.pixels_CHW for one in found]) / 255)
        means.append(np.mean([margin_to(p.logits_K, one.class_id) for p, one in zip(at, found, strict=True)]))
    assert means == sorted(means)
    view = classifier.view((1, 5, 4))
    predictions = view.predict(image_NCHW)
    nearest = classifier.counterfactual(image_NCHW, predictions, [None] * 40)
    images = {"model": 0, "transport": 0}
    for name, engine in (("model", classifier._model), ("transport", classifier._transport)):

        def counted(
            outputs: object, inputs: dict[str, np.ndarray], name: str = name, run: object = engine.run
        ) -> object:
            images[name] += len(inputs["image"])
            return run(outputs, inputs)  # type: ignore[operator]

        monkeypatch.setattr(engine, "run", counted)
    strengthen(view, image_NCHW, [p.class_id for p in predictions], nearest, [1.0] * 20 + [2.0] * 20, 4)
    assert images == {"model": 20, "transport": 20 * GRADIENTS}


@settings(deadline=None)
@given(seed=SEEDS, reach=st.floats(0.0, 2000.0), spread=st.sampled_from([0.0, 1.0, 6.0]), corners=st.booleans())
def test_lowest_levels_stays_within_reach_and_below_other_images_there(
    seed: int, reach: float, spread: float, corners: bool
) -> None:
    random = np.random.default_rng(seed)
    start_MD = random.integers(0, 2, (4, 60)) * 255.0 if corners else random.integers(0, 256, (4, 60)).astype(float)
    slope_MD = random.normal(size=(4, 60)) * np.exp(spread * random.normal(size=(4, 60)))
    slope_MD[0] = 0.0
    level_MD = lowest_levels(start_MD, slope_MD, np.full(4, reach))
    assert (level_MD == np.rint(level_MD)).all()
    assert ((level_MD >= 0) & (level_MD <= 255)).all()
    assert (np.linalg.norm(level_MD - start_MD, axis=1) <= reach).all()
    value_M = ((level_MD - start_MD) * slope_MD).sum(axis=1)
    assert (value_M <= 0.0).all()
    # Random images at most so far away, none of them below by more than rounding to 8 bits costs.
    for _ in range(20):
        way_MD = random.normal(size=(4, 60)) - 3.0 * slope_MD / np.abs(slope_MD).max()
        share_M = reach / np.linalg.norm(way_MD, axis=1)
        other_MD = np.clip(start_MD + share_M[:, None] * way_MD, 0.0, 255.0)
        rounding_M = 0.02 * np.abs(value_M) + 0.5 * np.abs(slope_MD).sum(axis=1)
        assert (((other_MD - start_MD) * slope_MD).sum(axis=1) >= value_M - rounding_M).all()


def test_nothing_is_strengthened_in_an_empty_batch() -> None:
    assert strengthen(groupsort_classifier(0, 4), np.zeros((0, 1, 5, 4)), [], [], [], 4) == []
