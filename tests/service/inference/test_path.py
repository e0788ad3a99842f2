"""Paths: from the image as sent to the counterfactual, each image as it is classified when it is posted back."""

from __future__ import annotations

import builders
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import often

from service.inference.counterfactual import Counterfactual
from service.inference.path import find_paths

MODEL = builders.load(builders.random_groupsort(3, (1, 5, 4), 4))


@settings(max_examples=often(15, 60), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(2, 16), min_size=1, max_size=5),
    eight_bit=st.booleans(),
    resize=st.booleans(),
)
def test_every_image_has_the_class_and_the_radius_that_it_gets_when_posted(
    seed: int, counts: list[int], eight_bit: bool, resize: bool
) -> None:
    random = np.random.default_rng(seed)
    shape = (len(counts), 1, *((7, 9) if resize else (5, 4)))
    image_NCHW = random.integers(0, 256, shape) / 255 if eight_bit else random.random(shape)
    view = MODEL.view(shape[1:], resize)
    predictions = view.predict(image_NCHW)
    found = MODEL.counterfactual(image_NCHW, predictions, [None] * len(counts), resize)
    paths = find_paths(view, image_NCHW, found, counts)
    for image, prediction, one, count, path in zip(image_NCHW, predictions, found, counts, paths, strict=True):
        assert len(path) == count
        assert (path[0].pixels_CHW == np.rint(image * 255)).all()
        assert (path[-1].pixels_CHW == one.pixels_CHW).all()
        assert (path[-1].class_id, path[-1].distance) == (one.class_id, one.distance)
        assert all(np.diff([step.distance for step in path]) >= (0.0 if eight_bit else -0.05))
        if eight_bit:
            assert path[0].distance == 0.0
            assert path[0].class_id == prediction.class_id
            assert path[0].radius == pytest.approx(prediction.radius, rel=1e-9)
        for step in path:
            assert step.pixels_CHW.dtype == np.uint8
            (posted,) = view.predict(step.pixels_CHW[None] / 255)
            assert step.radius == pytest.approx(posted.radius, rel=1e-9, abs=1e-12)
            assert step.class_id == posted.class_id or step.radius == 0.0
            assert step.margin == pytest.approx(posted.logits_K[posted.class_id] - posted.logits_K[posted.runner_up])
            # The sent image is as far as the radius of this one from any change of class.
            assert step.class_id == prediction.class_id or step.distance >= max(step.radius, prediction.radius)


def test_the_steps_are_equal_up_to_rounding() -> None:
    first, last = np.zeros((1, 1, 2, 2)), np.array([[[0, 255], [100, 7]]], np.uint8)
    model = builders.load(builders.random_groupsort(0, (1, 2, 2), 3))
    (path,) = find_paths(model, first, [Counterfactual(last, 0, 1.0, True)], [6])
    assert [step.pixels_CHW[0, 0, 1] for step in path] == [0, 51, 102, 153, 204, 255]
    assert [step.pixels_CHW[0, 1, 1] for step in path] == [0, 1, 3, 4, 6, 7]


def test_a_pass_has_the_images_of_one_path(monkeypatch: pytest.MonkeyPatch) -> None:
    image_NCHW = np.random.default_rng(1).integers(0, 256, (3, 1, 5, 4)) / 255
    found = MODEL.counterfactual(image_NCHW, MODEL.predict(image_NCHW), [None] * 3)
    sizes: list[int] = []
    view = MODEL.view((1, 5, 4))
    run = MODEL._model.run
    monkeypatch.setattr(
        MODEL._model, "run", lambda outputs, inputs: sizes.append(len(inputs["image"])) or run(outputs, inputs)
    )
    find_paths(view, image_NCHW, found, [16, 2, 9])
    assert sizes == [16, 2, 9]


def test_no_counterfactuals_have_no_paths() -> None:
    assert find_paths(MODEL, np.zeros((0, 1, 5, 4)), [], []) == []
