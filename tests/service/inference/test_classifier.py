"""A loaded artefact: closed-form radii, refusals, and answers that do not depend on the batch."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from builders import linear, load, random_groupsort, write
from exact_preprocessing import exact_map
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import often

from service.artefact.verification import verify
from service.errors import (
    ArtefactChangedError,
    ArtefactError,
    ChannelsError,
    ImageSizeError,
    PixelRangeError,
    ProviderError,
    SideTooLongError,
    TargetIsPredictedClassError,
)
from service.inference.classifier import Classifier
from service.pixels.preprocessing import preprocessing_between
from service.runtime.provider import missing_for_cuda, resolve_provider

SHAPE = (1, 3, 3)
WEIGHT_KD = np.random.default_rng(0).normal(size=(3, 9))
BIAS_K = np.array([0.1, -0.2, 0.3])


@cache
def linear_classifier() -> Classifier:
    return load(linear(WEIGHT_KD, BIAS_K, SHAPE))


@cache
def groupsort_classifier(seed: int, n_outputs: int = 3) -> Classifier:
    return load(random_groupsort(seed, n_outputs=n_outputs))


def images(seed: int, n: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(n, *shape)) / 255


@pytest.mark.parametrize("seed", range(5))
def test_radius_of_a_linear_model_is_its_distance_to_the_boundary(seed: int) -> None:
    (prediction,) = linear_classifier().predict(images(seed, 1))
    logits = WEIGHT_KD @ images(seed, 1).ravel() + BIAS_K
    i = int(np.argmax(logits))
    others = [j for j in range(3) if j != i]
    exact = {j: (logits[i] - logits[j]) / np.linalg.norm(WEIGHT_KD[i] - WEIGHT_KD[j]) for j in others}
    nearest = min(exact, key=lambda j: exact[j])
    assert prediction.class_id == i
    assert prediction.runner_up == nearest
    assert prediction.certified
    assert exact[nearest] * (1 - 1e-8) - 1e-12 <= prediction.radius <= exact[nearest]
    np.testing.assert_allclose(prediction.logits_K, logits, atol=prediction.logit_error)


def test_single_output_is_the_two_class_case() -> None:
    weight = WEIGHT_KD[:1]
    classifier = load(linear(weight, np.array([0.25]), SHAPE))
    for image in images(1, 8):
        (prediction,) = classifier.predict(image[None])
        f = float(weight[0] @ image.ravel() + 0.25)
        assert prediction.class_id == (0 if f > 0 else 1)
        np.testing.assert_allclose(prediction.logits_K, [f, -f], atol=prediction.logit_error)
        exact = abs(f) / np.linalg.norm(weight)
        assert exact * (1 - 1e-8) - 1e-12 <= prediction.radius <= exact


def test_tie_is_an_answer_that_is_not_certified() -> None:
    classifier = load(linear(np.ones((2, 9)), np.zeros(2), SHAPE))
    (prediction,) = classifier.predict(images(0, 1))
    assert prediction.radius == 0.0
    assert not prediction.certified


@settings(max_examples=often(10, 30), deadline=None)
@given(st.integers(0, 3), st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_batch_never_changes_an_answer_beyond_the_error(seed: int, image_seed: int, n: int) -> None:
    classifier = groupsort_classifier(seed)
    batch = images(image_seed, n, classifier.input_shape)
    together = classifier.predict(batch)
    for image, prediction in zip(batch, together, strict=True):
        (alone,) = classifier.predict(image[None])
        np.testing.assert_allclose(prediction.logits_K, alone.logits_K, rtol=0, atol=2 * alone.logit_error)
        if prediction.certified:
            assert alone.class_id == prediction.class_id


@settings(max_examples=often(10, 40), deadline=None)
@given(st.integers(0, 3), st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([1, 3]), st.floats(0.5, 0.999999))
def test_nothing_inside_the_radius_flips_the_class(
    seed: int, image_seed: int, resized: bool, channels: int, share: float
) -> None:
    """Worst directions first: along the gradient of the margin that decides the radius."""
    classifier = groupsort_classifier(seed)
    random = np.random.default_rng(image_seed)
    image = random.random((1, channels, *((7, 5) if resized else classifier.input_shape[1:])))
    (prediction,) = classifier.predict(image, resize=resized)
    weights = np.zeros((1, 3))
    weights[0, prediction.class_id], weights[0, prediction.runner_up] = 1.0, -1.0
    _, gradient = classifier.margin_gradient(image, weights, resized)
    for direction in (-gradient, random.normal(size=image.shape)):
        norm = np.linalg.norm(direction)
        if norm == 0:
            continue
        moved = np.clip(image + share * prediction.radius * direction / norm, 0.0, 1.0)
        (after,) = classifier.predict(moved, resize=resized)
        if prediction.certified:
            assert after.class_id == prediction.class_id


def test_radius_of_a_resized_image_is_about_the_image_that_was_sent() -> None:
    classifier = linear_classifier()
    sent = images(3, 1, (1, 6, 8))
    (prediction,) = classifier.predict(sent, resize=True)
    mapping = preprocessing_between((1, 6, 8), SHAPE)
    (inner,) = classifier.predict(mapping(sent))
    assert prediction.class_id == inner.class_id
    row = WEIGHT_KD[prediction.class_id] - WEIGHT_KD[prediction.runner_up]
    composed = mapping.adjoint(row.reshape(1, 1, 3, 3)).ravel()
    margin = inner.logits_K[prediction.class_id] - inner.logits_K[prediction.runner_up]
    exact = margin / np.linalg.norm(composed)
    assert 0 < prediction.radius <= exact
    assert prediction.radius == pytest.approx(inner.radius / mapping.norm, rel=1e-6)


def test_resize_of_an_image_of_the_right_size_changes_nothing() -> None:
    classifier = linear_classifier()
    with_resize, without = (classifier.predict(images(0, 2), resize=flag) for flag in (True, False))
    for one, other in zip(with_resize, without, strict=True):
        np.testing.assert_array_equal(one.logits_K, other.logits_K)
        assert one.radius == other.radius


def seen_exactly(row_D: np.ndarray, sent: tuple[int, int, int], taken: tuple[int, int, int]) -> np.ndarray:
    """A row of a linear model in rationals, as the image that is sent meets it: behind the exact preprocessing."""
    return np.vectorize(Fraction, otypes=[object])(row_D) @ exact_map(sent, taken)


def fractions(values: np.ndarray) -> np.ndarray:
    """The rationals that these float64 are."""
    return np.vectorize(Fraction, otypes=[object])(values.ravel())


SHAPES = [
    ((3, 3, 3), (1, 3, 3)),
    ((1, 3, 3), (3, 3, 3)),
    ((3, 5, 4), (1, 3, 3)),
    ((1, 2, 4), (3, 3, 3)),
    ((1, 4, 7), SHAPE),
]


@pytest.mark.parametrize(("sent", "taken"), SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_radius_is_not_above_the_distance_to_the_boundary_among_the_images_that_can_be_sent(
    sent: tuple[int, int, int], taken: tuple[int, int, int], seed: int
) -> None:
    """In rationals, pixels v / 255 included: squares are compared, so that no oracle rounds."""
    random = np.random.default_rng(seed)
    weight_KD, bias_K = random.normal(size=(3, int(np.prod(taken)))), random.normal(size=3)
    classifier = load(linear(weight_KD, bias_K, taken))
    level = random.integers(0, 256, sent)
    (prediction,) = classifier.predict(level[None] / 255, resize=True)
    assert prediction.certified
    row_K = [seen_exactly(weight_D, sent, taken) for weight_D in weight_KD]
    pixels = fractions(level) / 255
    logits = [sum(row * pixels, start=Fraction(bias)) for row, bias in zip(row_K, bias_K.tolist(), strict=True)]
    i = prediction.class_id
    assert logits[i] == max(logits)
    assert all(
        abs(Fraction(computed) - exact) <= Fraction(prediction.logit_error)
        for computed, exact in zip(prediction.logits_K.tolist(), logits, strict=True)
    )
    squares = [(logits[i] - logits[j]) ** 2 / sum((row_K[i] - row_K[j]) ** 2) for j in range(3) if j != i]
    assert Fraction(prediction.radius) ** 2 <= min(squares)
    # To grey nothing is lost: its adjoint scales every row alike.
    if sent == (3, 3, 3):
        assert Fraction(prediction.radius) ** 2 >= min(squares) * (1 - Fraction(1, 10**7))


@pytest.mark.parametrize(("sent", "taken"), SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_the_worst_change_inside_the_radius_keeps_the_class_exactly(
    sent: tuple[int, int, int], taken: tuple[int, int, int], seed: int
) -> None:
    """Along the gradient of the margin, in the pixels that are sent; where it leads is judged in rationals."""
    random = np.random.default_rng(seed)
    weight_KD, bias_K = random.normal(size=(3, int(np.prod(taken)))), random.normal(size=3)
    classifier = load(linear(weight_KD, bias_K, taken))
    image = 0.25 + random.random((1, *sent)) / 2
    (prediction,) = classifier.predict(image, resize=True)
    assert prediction.certified
    i, j = prediction.class_id, prediction.runner_up
    weights = np.zeros((1, 3))
    weights[0, i], weights[0, j] = 1.0, -1.0
    _, gradient = classifier.margin_gradient(image, weights, resize=True)
    row = seen_exactly(weight_KD[i], sent, taken) - seen_exactly(weight_KD[j], sent, taken)
    offset = Fraction(float(bias_K[i])) - Fraction(float(bias_K[j]))
    for share in (0.5, 0.999999):
        moved = np.clip(image - share * prediction.radius * gradient / np.linalg.norm(gradient), 0.0, 1.0)
        assert sum((fractions(moved) - fractions(image)) ** 2) < Fraction(prediction.radius) ** 2
        (after,) = classifier.predict(moved, resize=True)
        assert after.class_id == i
        assert sum(row * fractions(moved), start=offset) > 0


def test_conversion_and_resize_compose() -> None:
    """The radius of an RGB image of another size, against the grey one: `||conversion||` once, `||resize||` once."""
    classifier = linear_classifier()
    colour = images(3, 1, (3, 6, 8))
    (prediction,) = classifier.predict(colour, resize=True)
    grey = np.tensordot([0.299, 0.587, 0.114], colour, axes=(0, 1))[:, None]
    (alone,) = classifier.predict(np.clip(grey, 0.0, 1.0), resize=True)
    assert prediction.class_id == alone.class_id
    assert prediction.radius == pytest.approx(alone.radius / np.sqrt(0.446966), rel=1e-6)


def test_a_colour_image_with_equal_channels_is_still_a_colour_image() -> None:
    classifier = linear_classifier()
    grey = images(3, 1)
    (one,), (three,) = classifier.predict(grey), classifier.predict(np.repeat(grey, 3, axis=1))
    assert three.class_id == one.class_id
    assert three.radius == pytest.approx(one.radius / np.sqrt(0.446966), rel=1e-6)


def test_certificates_of_sizes_are_bounded_in_number() -> None:
    classifier = load(linear(WEIGHT_KD, BIAS_K, SHAPE))
    for width in range(4, 104):
        classifier.predict(np.zeros((1, 1, 3, width)), resize=True)
    assert len(classifier._views) <= 64


@pytest.mark.parametrize("shape", [(1, 1, 3, 8193), (1, 1, 8193, 3), (1, 3, 1, 2**21)])
def test_a_side_that_would_need_a_huge_filter_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SideTooLongError, match=r"side of \d+ pixels.*to 3, .*at most 8192"):
        linear_classifier().predict(np.zeros(shape), resize=True)


def test_a_long_side_of_the_models_own_length_needs_no_filter() -> None:
    classifier = load(linear(np.ones((2, 9000)), np.array([1.0, 0.0]), (1, 1, 9000)))
    assert classifier.predict(np.zeros((1, 3, 1, 9000)))[0].class_id == 0
    with pytest.raises(SideTooLongError, match="side of 5 pixels is not resized to 9000"):
        classifier.predict(np.zeros((1, 1, 1, 5)), resize=True)


def test_image_of_another_size_is_refused() -> None:
    with pytest.raises(ImageSizeError, match=r"4 x 3.*3 x 3.*resize=true"):
        linear_classifier().predict(np.zeros((1, 1, 4, 3)))


@pytest.mark.parametrize(("channels", "taken"), [(2, 1), (4, 1), (2, 3), (4, 3), (1, 2), (3, 2), (1, 4), (3, 4)])
def test_image_with_channels_that_have_no_conversion_is_refused(channels: int, taken: int) -> None:
    classifier = load(linear(np.ones((2, taken * 9)), np.zeros(2), (taken, 3, 3)))
    with pytest.raises(ChannelsError, match=rf"{channels} channels.*takes {taken}"):
        classifier.predict(np.zeros((1, channels, 3, 3)), resize=True)


@pytest.mark.parametrize("pixel", [np.nan, np.inf, -np.inf, -1e-300, 1.0000000000000002])
def test_pixel_outside_the_proof_is_refused(pixel: float) -> None:
    image = np.full((1, *SHAPE), 0.5)
    image[0, 0, 1, 1] = pixel
    with pytest.raises(PixelRangeError):
        linear_classifier().predict(image)


def test_empty_batch_has_no_answers() -> None:
    assert linear_classifier().predict(np.zeros((0, *SHAPE))) == []


def test_target_that_is_the_predicted_class_is_refused_and_named_in_a_batch() -> None:
    classifier = linear_classifier()
    batch = images(0, 6)
    predictions = classifier.predict(batch)
    class_id = predictions[4].class_id
    first = next(index for index, prediction in enumerate(predictions) if prediction.class_id == class_id)
    with pytest.raises(TargetIsPredictedClassError, match=f"image {first}: .*'class {class_id}'"):
        classifier.counterfactual(batch, predictions, [class_id] * 6)
    with pytest.raises(TargetIsPredictedClassError, match=f"^target 'class {class_id}'"):
        classifier.counterfactual(batch[4:5], predictions[4:5], [class_id])


def test_threads_get_the_answers_that_one_thread_gets() -> None:
    classifier = groupsort_classifier(0)
    batches = [images(seed, 3, classifier.input_shape) for seed in range(16)]
    expected = [[p.class_id for p in classifier.predict(batch)] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        answers = [[p.class_id for p in answer] for answer in pool.map(classifier.predict, batches)]
    assert answers == expected


def test_loading_tells_what_is_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artefact = write(tmp_path, random_groupsort(0), "named")
    with caplog.at_level(logging.INFO):
        classifier = Classifier.load(tmp_path, "cpu", threads=1)
    assert classifier.name == "named"
    assert classifier.digest == artefact.digest
    assert classifier.labels == ("class 0", "class 1", "class 2")
    assert classifier.provider == "CPUExecutionProvider"
    assert classifier.input_shape == (1, 4, 4)
    assert "CPUExecutionProvider" in caplog.text
    assert classifier.digest in caplog.text


def test_cuda_without_cuda_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runtime.provider.missing_for_cuda", lambda: "there is no driver; install it.")
    write(tmp_path, random_groupsort(0))
    with pytest.raises(ProviderError, match="no driver"):
        Classifier.load(tmp_path, "cuda", threads=1)


def test_a_file_that_changed_since_it_was_proved_is_not_run(tmp_path: Path) -> None:
    file = "model.onnx"
    artefact = write(tmp_path, random_groupsort(0))
    content = (tmp_path / file).read_bytes()
    image = images(0, 1, (1, 4, 4))
    classifier = Classifier.from_findings(tmp_path, verify(tmp_path), "cpu", threads=1)

    def use() -> None:
        classifier.counterfactual(image, classifier.predict(image), [None])

    for other in (random_groupsort(1).model, content[:-1], b""):
        (tmp_path / file).write_bytes(other)
        with pytest.raises(ArtefactChangedError, match="files of model 'test' have changed"):
            use()
    (tmp_path / file).unlink()
    with pytest.raises(ArtefactChangedError, match="put them back"):
        use()
    (tmp_path / file).write_bytes(content)
    use()
    assert classifier.digest == artefact.digest
    # What is loaded stays as it is.
    (tmp_path / file).write_bytes(b"")
    use()


def test_what_is_loaded_later_answers_as_what_is_loaded_now(tmp_path: Path) -> None:
    write(tmp_path, random_groupsort(0))
    now = Classifier.load(tmp_path, "cpu", threads=1)
    later = Classifier.from_findings(tmp_path, verify(tmp_path), "cpu", threads=1)
    for one, other in zip(now.predict(images(1, 5, (1, 4, 4))), later.predict(images(1, 5, (1, 4, 4))), strict=True):
        np.testing.assert_array_equal(one.logits_K, other.logits_K)
        assert one.radius == other.radius
    assert (now.name, now.digest, now.labels, now.provider) == (later.name, later.digest, later.labels, later.provider)
    np.testing.assert_array_equal(now.certificate.margin_bounds_KK, later.certificate.margin_bounds_KK)


def test_findings_about_other_graphs_than_the_card_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "one", random_groupsort(0))
    write(tmp_path / "two", random_groupsort(1))
    with pytest.raises(ArtefactError, match="digest"):
        Classifier.from_findings(tmp_path / "one", verify(tmp_path / "two"), "cpu", threads=1)


ZOO = Path(__file__).resolve().parents[3] / "models" / "zoo"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*sorted(path.name for path in ZOO.iterdir() if path.is_dir()), "random"])
def test_cuda_gives_the_classes_radii_and_logits_of_the_cpu(tmp_path: Path, name: str) -> None:
    if missing := missing_for_cuda():
        pytest.skip(missing)
    folder = ZOO / name
    if name == "random":
        folder = tmp_path
        write(folder, random_groupsort(0))
    findings = verify(folder)
    cpu = Classifier.from_findings(folder, findings, "cpu", threads=1)
    cuda = Classifier.from_findings(folder, findings, resolve_provider("cuda"), threads=1)
    assert cuda.provider == "CUDAExecutionProvider"
    for n in (1, 3, 300):
        batch = images(n, n, cpu.input_shape)
        for one, other in zip(cpu.predict(batch), cuda.predict(batch), strict=True):
            np.testing.assert_allclose(other.logits_K, one.logits_K, rtol=0.0, atol=2.0 * one.logit_error)
            if one.certified:
                assert other.class_id == one.class_id
                # Each margin moves by 4 E at most, over the smallest K.
                bounds_KK = cpu.certificate.margin_bounds_KK
                assert other.radius == pytest.approx(
                    one.radius, rel=1e-12, abs=4.0 * one.logit_error / bounds_KK[bounds_KK > 0.0].min()
                )
    batch = images(0, 5, cpu.input_shape)
    found = cuda.counterfactual(batch, cuda.predict(batch), [None] * 5)
    for counterfactual, again in zip(
        found, cpu.predict(np.stack([counterfactual.pixels_CHW for counterfactual in found]) / 255), strict=True
    ):
        assert again.class_id == counterfactual.class_id
