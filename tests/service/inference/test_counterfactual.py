"""Counterfactuals: both invariants in every answer, and closed-form distances where there are any."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from builders import Graphs, linear, load, random_groupsort
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from thorough import often

from models.export import emit_graph
from models.nets.layers.base import Chain
from models.nets.layers.linear import Affine
from models.nets.layers.pooling import GlobalMaxPool2d
from models.nets.layers.reshaping import Flatten
from models.nets.networks import LipschitzNetwork
from service.inference.classifier import Classifier, Prediction
from service.inference.closest import closest_levels, l2_distance
from service.inference.counterfactual import Counterfactual

SEEDS = st.integers(0, 2**32 - 1)


@cache
def groupsort_classifier(seed: int, n_outputs: int, channels: int = 1) -> Classifier:
    return load(random_groupsort(seed, shape=(channels, 5, 4), n_outputs=n_outputs))


def posted_back(pixels_CHW: np.ndarray) -> np.ndarray:
    """The image as the service would see it after a round trip through a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels_CHW[0] if len(pixels_CHW) == 1 else np.moveaxis(pixels_CHW, 0, -1)).save(file, "PNG")
    pixels = np.asarray(Image.open(file)) / 255
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def check_invariants(
    classifier: Classifier,
    image_NCHW: np.ndarray,
    predictions: list[Prediction],
    answers: list[Counterfactual],
    target: int | None,
    resize: bool = False,
) -> None:
    assert len(answers) == len(predictions)
    for image, prediction, answer in zip(image_NCHW, predictions, answers, strict=True):
        assert answer.pixels_CHW.dtype == np.uint8
        assert answer.pixels_CHW.shape == image.shape
        (again,) = classifier.predict(posted_back(answer.pixels_CHW)[None], resize=resize)
        assert again.class_id == answer.class_id
        assert answer.distance >= prediction.radius
        assert answer.distance == pytest.approx(np.linalg.norm(image - answer.pixels_CHW / 255), rel=1e-9)
        wanted = answer.class_id != prediction.class_id if target is None else answer.class_id == target
        assert answer.reached == wanted


@settings(max_examples=often(15, 60), deadline=None)
@given(
    seed=st.integers(0, 3),
    n_outputs=st.sampled_from([1, 2, 4]),
    image_seed=SEEDS,
    n=st.integers(1, 5),
    eight_bit=st.booleans(),
    resize=st.booleans(),
)
def test_invariants_hold_for_any_other_class(
    seed: int, n_outputs: int, image_seed: int, n: int, eight_bit: bool, resize: bool
) -> None:
    classifier = groupsort_classifier(seed, n_outputs)
    random = np.random.default_rng(image_seed)
    shape = (n, 1, 7, 9) if resize else (n, 1, 5, 4)
    image = random.integers(0, 256, shape) / 255 if eight_bit else random.random(shape)
    predictions = classifier.predict(image, resize=resize)
    answers = classifier.counterfactual(image, predictions, [None] * n, resize=resize)
    check_invariants(classifier, image, predictions, answers, None, resize)


@settings(max_examples=often(15, 60), deadline=None)
@given(
    seed=st.integers(0, 3),
    channels=st.sampled_from([(3, 1), (1, 3)]),
    image_seed=SEEDS,
    n=st.integers(1, 4),
    resize=st.booleans(),
    target=st.sampled_from([None, 0, 3]),
)
def test_invariants_hold_for_converted_images_in_the_channels_that_were_sent(
    seed: int, channels: tuple[int, int], image_seed: int, n: int, resize: bool, target: int | None
) -> None:
    sent, taken = channels
    classifier = groupsort_classifier(seed, 4, taken)
    random = np.random.default_rng(image_seed)
    image = random.integers(0, 256, (n, sent, *((7, 9) if resize else (5, 4)))) / 255
    predictions = classifier.predict(image, resize=resize)
    kept = [n for n, prediction in enumerate(predictions) if prediction.class_id != target]
    image, predictions = image[kept], [predictions[n] for n in kept]
    answers = classifier.counterfactual(image, predictions, [target] * len(image), resize=resize)
    check_invariants(classifier, image, predictions, answers, target, resize)


@pytest.mark.parametrize(("sent", "taken"), [(3, 1), (1, 3)])
def test_distance_of_a_converted_image_of_a_linear_model_is_the_closed_form(sent: int, taken: int) -> None:
    """The radius of a linear model is its distance to the boundary, here among the images that were sent."""
    random = np.random.default_rng(5)
    image = random.integers(90, 166, (20, sent, 20, 20)) / 255
    if taken == 1:
        weight_PK, seen = random.normal(size=(400, 3)) / 20, np.tensordot(image, [0.299, 0.587, 0.114], axes=(1, 0))
    else:
        # The same for each channel, so that three copies lose nothing of the norm.
        weight_PK, seen = np.tile(random.normal(size=(400, 3)) / 20, (3, 1)), np.repeat(image, 3, axis=1)
    bias_K = -weight_PK.T @ seen[0].ravel() + random.normal(size=3) / 3
    classifier = load(linear(weight_PK.T, bias_K, (taken, 20, 20)))
    predictions = classifier.predict(image)
    answers = classifier.counterfactual(image, predictions, [None] * len(image))
    check_invariants(classifier, image, predictions, answers, None)
    for prediction, answer in zip(predictions, answers, strict=True):
        assert answer.reached
        assert answer.distance <= 1.02 * prediction.radius + 0.02


@settings(max_examples=often(10, 40), deadline=None)
@given(seed=st.integers(0, 3), image_seed=SEEDS, target=st.integers(0, 3), resize=st.booleans())
def test_invariants_hold_for_a_target(seed: int, image_seed: int, target: int, resize: bool) -> None:
    classifier = groupsort_classifier(seed, 4)
    random = np.random.default_rng(image_seed)
    image = random.integers(0, 256, (4, 1, 7, 9) if resize else (4, 1, 5, 4)) / 255
    predictions = classifier.predict(image, resize=resize)
    kept = [n for n, prediction in enumerate(predictions) if prediction.class_id != target]
    image, predictions = image[kept], [predictions[n] for n in kept]
    answers = classifier.counterfactual(image, predictions, [target] * len(image), resize=resize)
    check_invariants(classifier, image, predictions, answers, target, resize)


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("eight_bit", [True, False])
def test_distance_of_a_linear_model_is_the_closed_form(n_outputs: int, eight_bit: bool) -> None:
    """Away from the bounds of the box, up to what the 8-bit grid costs."""
    random = np.random.default_rng(5)
    weight = random.normal(size=(n_outputs, 400)) / 20
    level = random.integers(90, 166, (20, 1, 20, 20))
    image = level / 255 if eight_bit else level / 256
    # Logits of the first image that are nearly equal: the boundary is close to all of them.
    bias = -weight @ image[0].ravel() + random.normal(size=n_outputs) / 3
    classifier = load(linear(weight, bias, (1, 20, 20)))
    predictions = classifier.predict(image)
    answers = classifier.counterfactual(image, predictions, [None] * len(image))
    check_invariants(classifier, image, predictions, answers, None)
    for prediction, answer in zip(predictions, answers, strict=True):
        assert answer.reached
        grid = 20 / 255 / np.sqrt(12)
        assert answer.distance <= 1.02 * np.hypot(prediction.radius, 0 if eight_bit else grid) + 0.02


@pytest.mark.parametrize("n_outputs", [1, 4])
def test_search_aims_at_a_margin_of_which_the_other_class_is_certain(n_outputs: int) -> None:
    # With logit errors of float32, an answer just across the boundary is not certain of its class.
    exact = groupsort_classifier(2, n_outputs)
    images = np.random.default_rng(4).integers(0, 256, (40, 1, 5, 4)) / 255
    near = exact.counterfactual(images, exact.predict(images), [None] * 40)
    # A twentieth of the median margin of the images.
    error = float(np.median([one.radius * one.lipschitz_bound for one in exact.predict(images)])) / 80.0
    certificate = replace(exact.certificate, logit_error=error)
    rounding = Classifier(exact.card, exact.files, certificate, exact._model, exact._transport)
    predictions = rounding.predict(images)
    answers = rounding.counterfactual(images, predictions, [None] * 40)
    check_invariants(rounding, images, predictions, answers, None)
    assert all(answer.reached for answer in answers)
    assert np.median([answer.distance / one.distance for answer, one in zip(answers, near, strict=True)]) < 1.15


def test_gradient_of_a_model_with_one_output_is_that_of_its_margin() -> None:
    classifier = load(linear(np.full((1, 9), 0.5), np.zeros(1), (1, 3, 3)))
    _, gradient = classifier.margin_gradient(np.zeros((1, 1, 3, 3)), np.array([[1.0, -1.0]]))
    np.testing.assert_array_equal(gradient, 1.0)


def test_target_out_of_reach_is_answered_with_the_best_image_found() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(3, 9))
    classifier = load(linear(weight, np.array([0.0, 0.0, -100.0]), (1, 3, 3)))
    image = random.integers(0, 256, (6, 1, 3, 3)) / 255
    predictions = classifier.predict(image)
    answers = classifier.counterfactual(image, predictions, [2] * len(image))
    check_invariants(classifier, image, predictions, answers, 2)
    for prediction, answer in zip(predictions, answers, strict=True):
        assert not answer.reached
        (found,) = classifier.predict(answer.pixels_CHW[None] / 255)

        def left(logits_K: np.ndarray) -> float:
            return float(max(logits_K[:2]) - logits_K[2])

        assert left(found.logits_K) <= left(prediction.logits_K)


def brightest_pixel_above(threshold: float, side: int) -> Classifier:
    """Class 0 where any pixel is brighter: a detector under a global maximum, as for parasites or scratches."""
    head = Affine(torch.ones(1, 1, dtype=torch.float64), torch.tensor([-threshold], dtype=torch.float64))
    model = emit_graph(LipschitzNetwork((1, side, side), Chain([GlobalMaxPool2d(), Flatten()]), head))
    return load(Graphs(model, (1, side, side), 1))


def test_every_detection_under_a_maximum_is_taken_back() -> None:
    classifier = brightest_pixel_above(0.5, 6)
    image = np.full((1, 1, 6, 6), 0.2)
    image[0, 0].flat[:30] = (140 + 3 * np.arange(30)) / 255
    predictions = classifier.predict(image)
    answers = classifier.counterfactual(image, predictions, [None] * len(image))
    check_invariants(classifier, image, predictions, answers, None)
    assert answers[0].reached
    nearest = np.sqrt(np.square(np.maximum(image - 0.5, 0)).sum())
    assert nearest <= answers[0].distance <= 1.1 * nearest


def test_model_that_never_changes_its_mind_is_answered() -> None:
    """The degenerate case: K_ij = 0, so that the radius exceeds the box."""
    classifier = load(linear(np.zeros((2, 9)), np.array([1.0, 0.0]), (1, 3, 3)))
    image = np.full((2, 1, 3, 3), 0.25)
    predictions = classifier.predict(image)
    for answer in classifier.counterfactual(image, predictions, [None] * len(image)):
        assert not answer.reached
        assert answer.class_id == 0
        assert answer.distance == 2.25


def test_tie_still_gets_a_counterfactual_of_a_certain_class() -> None:
    classifier = load(linear(np.stack([np.ones(9), -np.ones(9)]), np.array([-4.5, 4.5]), (1, 3, 3)))
    image = np.full((1, 1, 3, 3), 0.5)
    predictions = classifier.predict(image)
    assert not predictions[0].certified
    answers = classifier.counterfactual(image, predictions, [None] * len(image))
    check_invariants(classifier, image, predictions, answers, None)
    assert answers[0].reached


def test_batch_gives_each_image_what_it_gets_alone() -> None:
    classifier = groupsort_classifier(0, 4)
    image = np.random.default_rng(0).integers(0, 256, (12, 1, 5, 4)) / 255
    predictions = classifier.predict(image)
    together = classifier.counterfactual(image, predictions, [None] * len(image))
    for n, answer in enumerate(together):
        (alone,) = classifier.counterfactual(image[n : n + 1], predictions[n : n + 1], [None])
        assert alone.reached == answer.reached
        assert alone.distance == pytest.approx(answer.distance, rel=0.02)


def assert_same(together: Counterfactual, alone: Counterfactual) -> None:
    assert (together.reached, together.class_id) == (alone.reached, alone.class_id)
    assert together.distance == pytest.approx(alone.distance, rel=0.02)


def test_images_of_one_batch_may_have_different_targets() -> None:
    classifier = groupsort_classifier(1, 4)
    image = np.random.default_rng(1).integers(0, 256, (16, 1, 5, 4)) / 255
    predictions = classifier.predict(image)
    targets = [None if n % 3 == 0 else (p.class_id + 1 + n % 2) % 4 for n, p in enumerate(predictions)]
    together = classifier.counterfactual(image, predictions, targets)
    for n, (target, answer) in enumerate(zip(targets, together, strict=True)):
        check_invariants(classifier, image[n : n + 1], predictions[n : n + 1], [answer], target)
        (alone,) = classifier.counterfactual(image[n : n + 1], predictions[n : n + 1], [target])
        assert_same(answer, alone)


def test_target_out_of_reach_of_one_image_is_no_matter_of_its_neighbours() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(3, 9))
    classifier = load(linear(weight, np.array([0.0, 0.0, -100.0]), (1, 3, 3)))
    image = random.integers(0, 256, (6, 1, 3, 3)) / 255
    predictions = classifier.predict(image)
    targets = [None, 2, None, None, 2, None]
    together = classifier.counterfactual(image, predictions, targets)
    for n, target in enumerate(targets):
        (alone,) = classifier.counterfactual(image[n : n + 1], predictions[n : n + 1], [target])
        assert_same(together[n], alone)
        assert together[n].reached == (target is None)


def test_a_step_costs_one_run_and_at_most_one_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = groupsort_classifier(0, 4)
    image = np.random.default_rng(0).integers(0, 256, (30, 1, 5, 4)) / 255
    predictions = classifier.predict(image)
    images = {"model": 0, "transport": 0}
    for name, engine in (("model", classifier._model), ("transport", classifier._transport)):

        def counted(
            outputs: object, inputs: dict[str, np.ndarray], name: str = name, run: object = engine.run
        ) -> object:
            images[name] += len(next(iter(inputs.values())))
            return run(outputs, inputs)  # type: ignore[operator]

        monkeypatch.setattr(engine, "run", counted)
    answers = classifier.counterfactual(image, predictions, [None] * 30)
    assert all(answer.reached for answer in answers)
    assert images["transport"] == sum(answer.steps for answer in answers) <= 4 * 30
    # The first step classifies nothing.
    assert images["model"] <= images["transport"] - 30


def test_empty_batch_has_no_counterfactuals() -> None:
    assert groupsort_classifier(0, 4).counterfactual(np.zeros((0, 1, 5, 4)), [], []) == []


@given(SEEDS, st.booleans())
def test_distance_is_exact_up_to_its_last_rounding(seed: int, eight_bit: bool) -> None:
    random = np.random.default_rng(seed)
    level = random.integers(0, 256, (1, 4, 4))
    pixels = random.integers(0, 256, (1, 4, 4)).astype(np.uint8)
    image = level / 255 if eight_bit else random.random((1, 4, 4))
    sent = [Fraction(int(v), 255) for v in level.ravel()] if eight_bit else [Fraction(v) for v in image.ravel()]
    square = sum((x - Fraction(int(v), 255)) ** 2 for x, v in zip(sent, pixels.ravel(), strict=True))
    distance = Fraction(float(l2_distance(image[None], pixels[None])[0]))
    slack = Fraction(1) + Fraction(1, 2**52)
    assert distance**2 <= square * slack**2
    assert square <= distance**2 * slack**2


@settings(deadline=None)
@given(SEEDS, st.floats(0.01, 0.5))
def test_closest_levels_falls_far_enough_and_not_much_further(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    anchor = random.integers(0, 256, (3, 50)).astype(float)
    at = random.integers(0, 256, (3, 50)).astype(float)
    gradient = random.normal(size=(3, 50))
    corner = np.where(gradient > 0, 0.0, 255.0)
    # A share of what the box allows at all, so that there is a solution.
    to_corner = (gradient * (at - corner)).sum(axis=1)
    from_anchor = (gradient * (at - anchor)).sum(axis=1)
    fall = from_anchor + share * (to_corner - from_anchor)
    level = closest_levels(anchor, gradient, fall - from_anchor)
    assert ((level >= 0) & (level <= 255) & (level == np.rint(level))).all()
    assert ((gradient * (at - level)).sum(axis=1) >= fall - 1e-9).all()
    # No image of the same fall is nearer than the relaxation without a grid allows.
    lower = _relaxed_distance(anchor, at, gradient, fall)
    distance = np.linalg.norm(level - anchor, axis=1)
    assert (distance <= 1.1 * lower + np.sqrt(50) / 2).all()


def _relaxed_distance(anchor: np.ndarray, at: np.ndarray, gradient: np.ndarray, fall: np.ndarray) -> np.ndarray:
    low, high = np.zeros(len(anchor)), np.full(len(anchor), 1e9)
    for _ in range(200):
        middle = (low + high) / 2
        moved = np.clip(anchor - middle[:, None] * gradient, 0, 255)
        enough = (gradient * (at - moved)).sum(axis=1) >= fall
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.linalg.norm(np.clip(anchor - high[:, None] * gradient, 0, 255) - anchor, axis=1)


def test_closest_levels_without_a_solution_is_the_downhill_corner() -> None:
    level = closest_levels(np.full((1, 4), 100.0), np.array([[1.0, -1.0, 2.0, 0.0]]), np.array([1e6]))
    np.testing.assert_array_equal(level, [[0.0, 255.0, 0.0, 100.0]])


def test_gradient_that_is_not_a_number_moves_nothing_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = groupsort_classifier(0, 4)
    image = np.random.default_rng(0).integers(0, 256, (2, 1, 5, 4)) / 255
    predictions = classifier.predict(image)
    run = classifier._transport.run

    def broken(outputs: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        logits, gradient = run(outputs, inputs)  # type: ignore[arg-type]
        return [logits, np.full_like(gradient, np.nan)]

    monkeypatch.setattr(classifier._transport, "run", broken)
    answers = classifier.counterfactual(image, predictions, [None] * len(image))
    check_invariants(classifier, image, predictions, answers, None)


def test_gradient_of_one_image_that_is_not_a_number_is_no_matter_of_its_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classifier = groupsort_classifier(0, 4)
    image = np.random.default_rng(0).integers(0, 256, (5, 1, 5, 4)) / 255
    predictions = classifier.predict(image)
    expected = classifier.counterfactual(image, predictions, [None] * 5)
    run = classifier._transport.run
    sent = image[2].ravel()
    runs = 0

    def broken(outputs: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        nonlocal runs
        logits, gradient = run(outputs, inputs)  # type: ignore[arg-type]
        same_M = np.abs(inputs["image"].reshape(len(gradient), -1) - sent).max(axis=1) == 0
        runs += int(same_M.sum())
        gradient[same_M] = np.nan
        return [logits, gradient]

    monkeypatch.setattr(classifier._transport, "run", broken)
    answers = classifier.counterfactual(image, predictions, [None] * 5)
    assert runs > 0
    for n, (answer, healthy) in enumerate(zip(answers, expected, strict=True)):
        check_invariants(classifier, image[n : n + 1], predictions[n : n + 1], [answer], None)
        if n != 2:
            assert_same(answer, healthy)
