"""Saliency: the gradient of the margin that decides the radius."""

from __future__ import annotations

import builders
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import often

from service.inference.saliency import find_saliencies

MODEL = builders.load(builders.random_groupsort(3, (1, 5, 4), 4))


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_the_saliency_of_a_linear_model_is_the_difference_of_its_rows(n_outputs: int) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(n_outputs, 12))
    model = builders.load(builders.linear(weight, random.normal(size=n_outputs), (1, 3, 4)))
    image_NCHW = random.random((6, 1, 3, 4))
    predictions = model.predict(image_NCHW)
    found = find_saliencies(
        model, image_NCHW, [p.class_id for p in predictions], [p.runner_up for p in predictions], max(n_outputs, 2)
    )
    rows = np.concatenate([weight, -weight]) if n_outputs == 1 else weight
    for prediction, one in zip(predictions, found, strict=True):
        assert one.class_id == prediction.runner_up
        assert one.gradient_CHW.dtype == np.float32
        expected = rows[prediction.class_id] - rows[prediction.runner_up]
        np.testing.assert_allclose(one.gradient_CHW.ravel(), expected, rtol=1e-6)


@settings(max_examples=often(10, 40), deadline=None)
@given(seed=st.integers(0, 2**32 - 1), resize=st.booleans())
def test_its_norm_is_below_the_lipschitz_bound_and_steps_against_it_lower_the_margin(seed: int, resize: bool) -> None:
    shape = (3, 1, *((7, 9) if resize else (5, 4)))
    image_NCHW = np.random.default_rng(seed).random(shape)
    view = MODEL.view(shape[1:], resize)
    predictions = view.predict(image_NCHW)
    class_id_N, runner_up_N = [p.class_id for p in predictions], [p.runner_up for p in predictions]
    found = find_saliencies(view, image_NCHW, class_id_N, runner_up_N, 4)
    step = 1e-6
    gradient_NCHW = np.stack([one.gradient_CHW for one in found]).astype(np.float64)
    moved_NK, _ = view.classify(image_NCHW - step * gradient_NCHW)
    for prediction, one, moved_K, i, j in zip(predictions, found, moved_NK, class_id_N, runner_up_N, strict=True):
        norm = np.linalg.norm(one.gradient_CHW.astype(np.float64))
        assert norm <= prediction.lipschitz_bound * (1 + 1e-6)
        fall = (prediction.logits_K[i] - prediction.logits_K[j]) - (moved_K[i] - moved_K[j])
        assert fall == pytest.approx(step * norm**2, rel=1e-3, abs=1e-12)


class Broken:
    """A model whose gradient is not finite, and beyond float32."""

    def classify(self, image_NCHW: np.ndarray) -> tuple[np.ndarray, object]:
        raise AssertionError

    def margin_gradient(self, image_NCHW: np.ndarray, weights_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gradient_NCHW = np.full(image_NCHW.shape, 1e60)
        gradient_NCHW[0, 0, 0, 0], gradient_NCHW[0, 0, 0, 1] = np.nan, -np.inf
        return np.zeros_like(weights_NK), gradient_NCHW


def test_numbers_that_float32_does_not_have_are_replaced() -> None:
    (found,) = find_saliencies(Broken(), np.zeros((1, 1, 2, 2)), [0], [1], 2)
    largest = np.finfo(np.float32).max
    assert found.gradient_CHW.tolist() == [[[0.0, -largest], [largest, largest]]]


def test_an_empty_batch_has_no_saliency() -> None:
    assert find_saliencies(MODEL, np.zeros((0, 1, 5, 4)), [], [], 4) == []
