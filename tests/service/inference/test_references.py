"""Reference images: every radius is proved again from the images of the answer, and reached in closed form."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from builders import linear, load, random_groupsort
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import often

from service.inference.classifier import Classifier, Prediction, View, with_references
from service.inference.references import best_of_linear, find_references
from service.pixels.distances import is_inside

SEEDS = st.integers(0, 2**32 - 1)


@cache
def groupsort_classifier(seed: int, n_outputs: int, channels: int = 1) -> Classifier:
    return load(random_groupsort(seed, shape=(channels, 5, 4), n_outputs=n_outputs))


def dark_and_bright(random: np.random.Generator, shape: tuple[int, ...], eight_bit: bool) -> np.ndarray:
    """Pixels at the ends of the box or near them, where a reference image gains most."""
    image = np.round(random.random(shape)) + random.normal(size=shape) / 20 * (random.random(shape) < 0.5)
    image = np.clip(image, 0.0, 1.0)
    return np.rint(image * 255) / 255 if eight_bit else image


def best(view: View, image_NCHW: np.ndarray, predictions: list[Prediction]) -> list[Prediction]:
    return with_references(view, image_NCHW, predictions, [None] * len(predictions), [True] * len(predictions))


def proved_again(view: View, image_CHW: np.ndarray, prediction: Prediction) -> Fraction:
    """The smallest squared radius of all pairs of classes, exact from the computed logits and the images."""
    held = {reference.class_id: as_pixels(reference.pixels_CHW) for reference in prediction.references}
    bounds_K = view.certificate.margin_bounds_KK[prediction.class_id]
    error = 4 * Fraction(view.certificate.logit_error)
    squares = []
    for k in range(len(prediction.logits_K)):
        if k == prediction.class_id:
            continue
        z = held.get(k, image_CHW)
        logits_K = view.classify(z[None])[0][0].tolist()
        surplus = Fraction(logits_K[prediction.class_id]) - Fraction(logits_K[k]) - error
        cost = Fraction(0)
        for a, b in zip(image_CHW.ravel().tolist(), z.ravel().tolist(), strict=True):
            x, y = Fraction(a), Fraction(b)
            cost += (y - x) * (y + x) if y > x else (x - y) * (2 - x - y)
        assert surplus > 0
        squares.append((surplus / Fraction(float(bounds_K[k]))) ** 2 - cost)
    return min(squares)


def as_pixels(pixels_CHW: np.ndarray) -> np.ndarray:
    return pixels_CHW / 255 if pixels_CHW.dtype == np.uint8 else pixels_CHW


@settings(max_examples=often(10, 40), deadline=None)
@given(
    seed=st.integers(0, 3),
    form=st.sampled_from(
        [("grey", 1, 1), ("grey", 1, 2), ("grey", 1, 4), ("rgb to grey", 1, 3), ("grey to rgb", 3, 3)]
    ),
    image_seed=SEEDS,
    n=st.integers(1, 5),
    eight_bit=st.booleans(),
    resize=st.booleans(),
)
def test_every_radius_is_proved_by_the_images_of_the_answer(
    seed: int, form: tuple[str, int, int], image_seed: int, n: int, eight_bit: bool, resize: bool
) -> None:
    kind, channels, n_outputs = form
    classifier = groupsort_classifier(seed, n_outputs, channels)
    sent = {"grey": channels, "rgb to grey": 3, "grey to rgb": 1}[kind]
    image_NCHW = dark_and_bright(
        np.random.default_rng(image_seed), (n, sent, *((7, 6) if resize else (5, 4))), eight_bit
    )
    view = classifier.view(image_NCHW.shape[1:], resize)
    fast = view.predict(image_NCHW)
    found = best(view, image_NCHW, fast)
    answers = classifier.counterfactual(image_NCHW, fast, [None] * n, resize)
    for image_CHW, one, other, answer in zip(image_NCHW, fast, found, answers, strict=True):
        assert other.proof == "best"
        assert other.class_id == one.class_id
        assert other.radius >= one.radius
        assert other.certified == (other.radius > 0)
        assert other.lipschitz_bound == view.certificate.margin_bounds_KK[other.class_id, other.runner_up]
        assert [reference.class_id for reference in other.references] == sorted(
            {reference.class_id for reference in other.references}
        )
        for reference in other.references:
            on_grid = bool((np.rint(image_CHW * 255) / 255 == image_CHW).all())
            assert reference.pixels_CHW.dtype == (np.uint8 if on_grid else np.float64)
            assert reference.pixels_CHW.shape == image_CHW.shape
            assert 0.0 <= as_pixels(reference.pixels_CHW).min() <= as_pixels(reference.pixels_CHW).max() <= 1.0
        if other.certified:
            assert Fraction(other.radius) ** 2 <= proved_again(view, image_CHW, other)
        if answer.class_id != one.class_id:
            assert not is_inside(image_CHW, answer.pixels_CHW / 255, other.radius)


def nearest_of_the_box(slope_D: np.ndarray, value: float, image_D: np.ndarray) -> float:
    """The distance to the nearest image of the box where `value + <slope, x - image>` is 0, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        step = 0.5 * (low + high)
        moved_D = np.clip(image_D - step * slope_D, 0.0, 1.0)
        low, high = (step, high) if value + slope_D @ (moved_D - image_D) > 0 else (low, step)
    return float(np.linalg.norm(np.clip(image_D - high * slope_D, 0.0, 1.0) - image_D))


@pytest.mark.parametrize("eight_bit", [True, False])
def test_the_radius_of_a_linear_model_is_the_distance_to_its_boundary_in_the_box(eight_bit: bool) -> None:
    """Where the fast radius is far below it: the box is in the way."""
    random = np.random.default_rng(4)
    weight_1D = random.normal(size=(1, 400)) / 20
    image_NCHW = dark_and_bright(random, (30, 1, 20, 20), eight_bit)
    values_N = random.uniform(0.5, 1.5, 30)
    gained = []
    for image_CHW, value in zip(image_NCHW, values_N.tolist(), strict=True):
        bias = value - weight_1D[0] @ image_CHW.ravel()
        view = load(linear(weight_1D, np.array([bias]), (1, 20, 20))).view((1, 20, 20))
        (fast,) = view.predict(image_CHW[None])
        (found,) = with_references(view, image_CHW[None], [fast], [100.0], [True])
        distance = nearest_of_the_box(weight_1D[0], value, image_CHW.ravel())
        assert found.radius <= distance * (1 + 1e-12)
        assert found.radius >= distance * (0.995 if eight_bit else 0.9995)
        gained.append(found.radius / fast.radius)
    assert np.median(gained) > 1.1


def test_the_best_image_of_a_linear_margin_is_better_than_images_near_it() -> None:
    random = np.random.default_rng(6)
    sent_MD = random.random((20, 30)) ** random.choice([1.0, 9.0], (20, 30))
    slope_MD = random.normal(size=(20, 30))
    slope_MD *= random.uniform(0.5, 1.0, (20, 1)) / np.linalg.norm(slope_MD, axis=1, keepdims=True)
    value_M = random.uniform(0.1, 2.0, 20)

    def square(held_MD: np.ndarray) -> np.ndarray:
        margin_M = value_M + ((held_MD - sent_MD) * slope_MD).sum(axis=1)
        way_MD = held_MD - sent_MD
        room_MD = np.where(way_MD > 0, held_MD + sent_MD, 2.0 - held_MD - sent_MD)
        return np.maximum(margin_M, 0.0) ** 2 - (np.abs(way_MD) * room_MD).sum(axis=1)

    best_MD = best_of_linear(sent_MD, slope_MD, value_M)
    assert (square(best_MD) >= square(sent_MD)).all()
    for scale in (1e-1, 1e-2, 1e-3):
        for _ in range(50):
            other_MD = np.clip(best_MD + scale * random.normal(size=best_MD.shape), 0.0, 1.0)
            assert (square(other_MD) <= square(best_MD) + 1e-6).all()


def test_the_search_ends_at_the_radius_that_is_wanted() -> None:
    classifier = groupsort_classifier(1, 4)
    view = classifier.view((1, 5, 4))
    image_NCHW = dark_and_bright(np.random.default_rng(8), (40, 1, 5, 4), eight_bit=True)
    fast = view.predict(image_NCHW)
    largest = best(view, image_NCHW, fast)
    radius_N = np.array([prediction.radius for prediction in fast])
    class_id_N = np.array([prediction.class_id for prediction in fast])
    logits_NK = np.array([prediction.logits_K for prediction in fast])

    def steps(epsilon_N: np.ndarray, largest_N: np.ndarray) -> np.ndarray:
        return np.array(
            [p.steps for p in find_references(view, image_NCHW, class_id_N, logits_NK, epsilon_N, largest_N)]
        )

    never, always = np.zeros(40, np.bool_), np.ones(40, np.bool_)
    assert (steps(radius_N, never) == 0).all()
    assert (steps(np.zeros(40), always)[radius_N > 0] > 0).all()
    halfway_N = 0.5 * (radius_N + np.array([prediction.radius for prediction in largest]))
    ended = with_references(view, image_NCHW, fast, halfway_N.tolist(), [False] * 40)
    for prediction, other, wanted in zip(ended, largest, halfway_N.tolist(), strict=True):
        assert prediction.radius >= wanted or prediction.radius == pytest.approx(other.radius, rel=0.02)
    assert steps(halfway_N, never).mean() < steps(halfway_N, always).mean()


def test_an_abstention_has_no_reference_images() -> None:
    """A tie: the margin at the image is 0, whatever it is elsewhere."""
    classifier = load(linear(np.eye(3, 9), np.zeros(3), (1, 3, 3)))
    view = classifier.view((1, 3, 3))
    image_NCHW = np.full((1, 1, 3, 3), 0.5)
    (found,) = best(view, image_NCHW, view.predict(image_NCHW))
    assert (found.radius, found.certified, found.references) == (0.0, False, ())


def test_pixels_that_do_not_move_keep_their_values() -> None:
    random = np.random.default_rng(9)
    weight_1D = random.normal(size=(1, 100)) / 10
    image_CHW = random.integers(100, 156, (1, 10, 10)) / 255.0
    image_CHW[0, :2] = 0.0
    bias = 1.0 - weight_1D[0] @ image_CHW.ravel()
    view = load(linear(weight_1D, np.array([bias]), (1, 10, 10))).view((1, 10, 10))
    (found,) = best(view, image_CHW[None], view.predict(image_CHW[None]))
    (reference,) = found.references
    np.testing.assert_array_equal(reference.pixels_CHW[0, 2:], np.rint(image_CHW[0, 2:] * 255))
    assert (reference.pixels_CHW[0, :2] > 0).any()
