"""The service against searches for images that refute it: a small version of `make soundness`.

Distances are compared as exact rationals. Each attack is also shown to work, on the radius that a certificate without
rounding errors would give.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from builders import Graphs, load
from thorough import ZOO, often, shipped_models

from benchmarks.soundness.boundary import QUICK, RETRACE, Search, View, bisect, search
from benchmarks.soundness.document import write_section
from benchmarks.soundness.exact import just_inside, ratio
from benchmarks.soundness.graphs import in_float32, residual, shipped, with_planted_biases
from benchmarks.soundness.invariance import vary
from benchmarks.soundness.known import Network, examine, exhaust, nudge_midpoints, random_network
from benchmarks.soundness.sampling import Sampled, near_boundary
from benchmarks.soundness.wire import ask
from service.certificate import certify
from service.inference.classifier import Classifier
from service.pixels.distances import is_inside

IMAGES = often(1, 2)
"""From which the boundaries of each shipped model are searched; `make soundness` takes 500."""


@cache
def artefact(name: str) -> Graphs:
    return shipped(ZOO / name)


@cache
def classifier_of(name: str) -> Classifier:
    return Classifier.load(ZOO / name, "cpu", threads=1)


@cache
def shipped_search(name: str) -> Search:
    """From smooth random images: what the boundaries of a model look like does not depend on what it was trained on."""
    classifier = classifier_of(name)
    shape = classifier.card.input
    random = np.random.default_rng(0)
    coarse = random.random((IMAGES, shape.channels, -(-shape.height // 4), -(-shape.width // 4)))
    image_NCHW = np.kron(coarse, np.ones((4, 4)))[..., : shape.height, : shape.width]
    # Where any spot counts, only images with faint ones have a boundary near by.
    image_NCHW = np.clip(0.5 + 0.05 * image_NCHW if name == "malaria-cells" else 1.4 * image_NCHW - 0.4, 0.0, 1.0)
    return search(View(classifier), image_NCHW, random, QUICK)


@cache
def isometric(dtype: type, depth: int) -> Network:
    return random_network(np.random.default_rng(depth), depth, 16, 3, dtype)


def assert_kept(found: Search, near: Sampled | None = None) -> None:
    assert found.violations == []
    assert found.pulled_flips == 0
    assert near is None or near.flips == 0


def test_the_last_image_inside_of_a_radius_below_the_spacing_of_pixels_is_the_image_itself() -> None:
    image, other = np.full((1, 2, 2), 0.5), np.full((1, 2, 2), 0.75)
    assert np.array_equal(just_inside(image, other, 1e-18), image)


@pytest.mark.parametrize("radius", [1.0, 1e-3, 1e-9, 1e-14])
def test_pulled_points_are_inside_and_close_to_the_radius(radius: float) -> None:
    image, other = np.random.default_rng(1).uniform(0.3, 0.7, (2, 1, 4, 4))
    pulled = just_inside(image, other, min(radius, 0.5 * ratio(image, other, 1.0)))
    assert is_inside(image, pulled, radius)
    assert (pulled != image).any()


def test_bisection_ends_at_adjacent_images() -> None:
    view = View(isometric(np.float64, 0).classifier)
    image_NCHW = np.random.default_rng(2).random((40, 1, 4, 4))
    class_N = view.classes(image_NCHW)
    image, point = next((image_NCHW[[0]], image_NCHW[[n]]) for n in range(1, 40) if class_N[n] != class_N[0])
    nearest = bisect(view, image, point, class_N[:1], 80)
    assert view.classes(nearest)[0] != class_N[0]
    before = image + (1.0 - 1e-14) * (nearest - image)
    assert view.classes(before)[0] == class_N[0]


@pytest.mark.parametrize("name", shipped_models())
def test_no_point_of_another_class_is_found_inside_the_radius_of_a_shipped_model(name: str) -> None:
    found = shipped_search(name)
    near = near_boundary(View(classifier_of(name)), found, np.random.default_rng(1), samples=12)
    assert_kept(found, near)
    # The search is worth something: it comes close, and rounding decides in front of the boundary.
    assert found.found_N.all()
    assert near.images > 0
    assert found.ratios.min() < 2.5


@pytest.mark.parametrize("name", shipped_models())
def test_the_application_answers_what_the_search_met(name: str) -> None:
    answers = ask(classifier_of(name), shipped_search(name))
    assert (answers.n, answers.other_answer, answers.inside, answers.pulled_flips) == (IMAGES, 0, 0, 0)


@pytest.mark.parametrize("shape", [(1, 20, 24), (3, 28, 28), (3, 33, 30)])
def test_no_point_is_found_inside_the_radius_of_images_in_another_shape(shape: tuple[int, int, int]) -> None:
    view = View(classifier_of("mnist-0-8"), resize=True)
    random = np.random.default_rng(3)
    found = search(view, random.integers(0, 256, (often(2, 4), *shape)) / 255, random, QUICK)
    assert_kept(found, near_boundary(view, found, random, samples=12))
    assert found.found_N.any()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_no_radius_exceeds_a_distance_that_is_known_exactly(dtype: type, depth: int) -> None:
    known = examine([isometric(dtype, depth)], np.random.default_rng(4), often(5, 10), QUICK)
    assert known.beyond == 0
    assert known.worst_error <= 1.0
    assert known.attained > 0
    assert_kept(known.searches[0])
    # In float64 nothing is lost, so that a radius could not be larger.
    if dtype is np.float64:
        assert known.smallest < 1.0 + 1e-10


@pytest.mark.parametrize("depth", [0, 1])
def test_every_float32_image_inside_a_small_radius_keeps_the_class(depth: int) -> None:
    network = random_network(np.random.default_rng(5), depth, 4, 2, np.float32)
    certified = exhaust(network, np.random.default_rng(6), 3, naive=False)
    assert certified.images == 3
    assert certified.flips == 0
    naive = exhaust(network, np.random.default_rng(6), 3, naive=True)
    assert naive.broken > 0


@pytest.mark.parametrize("share", [1e-4, 3.99, 4.01])
def test_rounding_of_the_input_is_paid_for(share: float) -> None:
    nudged = nudge_midpoints(np.random.default_rng(7), share)
    assert nudged.certified == (share > 4.0)
    assert not nudged.inside_radius
    # Without E the first would have a radius ten million times the length of the nudge that flips it.
    assert nudged.flipped == (share < 1e-3)
    assert nudged.naive_radius > 1e6 * nudged.nudge


@pytest.mark.parametrize("constant", often([1e2, 1e8, 1e12], [1e2, 1e6, 1e8, 1e10, 1e12]))
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_planted_biases_break_no_radius(dtype: type, half: bool, constant: float) -> None:
    graphs = with_planted_biases(isometric(dtype, 2).graphs(), constant, half)
    view, random = View(load(graphs)), np.random.default_rng(8)
    found = search(view, random.uniform(0.2, 0.8, (often(4, 10), 1, 4, 4)), random, QUICK)
    near = near_boundary(view, found, random, samples=12)
    assert_kept(found, near)
    # Of larger constants float32 certifies nothing, float64 less and less.
    assert constant > 1e2 or near.images > 0


def test_planted_biases_would_break_a_radius_without_the_error() -> None:
    graphs = with_planted_biases(isometric(np.float64, 2).graphs(), 1e12, half=False)
    view, random = View(load(graphs)), np.random.default_rng(8)
    found = search(view, random.uniform(0.2, 0.8, (10, 1, 4, 4)), random, QUICK)
    near = near_boundary(view, found, random, samples=12)
    assert found.naive_broken + near.naive_broken > 0


def test_planted_biases_leave_the_network_what_it_is_in_real_arithmetic() -> None:
    """Up to the rounding of the stored biases: with a small power of two there is next to none."""
    network = isometric(np.float64, 2)
    image_NCHW = np.random.default_rng(9).random((5, 1, 4, 4))
    before, _ = network.classifier.classify(image_NCHW)
    for half in (False, True):
        planted = load(with_planted_biases(network.graphs(), 1024.0, half))
        after, _ = planted.classify(image_NCHW)
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-10)
        assert planted.certificate.logit_error > 10 * network.classifier.certificate.logit_error


def test_planted_biases_break_no_radius_of_a_shipped_model() -> None:
    reference = shipped_search("mnist-0-8")
    for graphs in (artefact("mnist-0-8"), in_float32(artefact("mnist-0-8"))):
        view, random = View(load(with_planted_biases(graphs, 1e6, half=False))), np.random.default_rng(10)
        found = search(view, reference.image_NCHW, random, RETRACE, [reference.point_NCHW])
        assert_kept(found, near_boundary(view, found, random, samples=12))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("optimised", [False, True])
def test_batch_threads_and_optimisation_move_no_radius_by_more_than_the_error(single: bool, optimised: bool) -> None:
    own = artefact("mnist-0-8")
    random = np.random.default_rng(11)
    image_NCHW = random.integers(0, 256, (9, 1, 28, 28)) / 255
    seen = vary((in_float32(own) if single else own).model, image_NCHW, optimised)
    assert seen.logits_over_2e <= 1.0
    assert seen.radii_over_2e <= 1.0
    assert seen.classes_changed == 0


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_convolutions_give_the_same_in_every_setting_up_to_the_error(normalised: bool, optimised: bool) -> None:
    image_NCHW = np.random.default_rng(12).integers(0, 256, (5, 3, 8, 8)) / 255
    seen = vary(residual(4, 1, 8, normalised), image_NCHW, optimised)
    assert seen.logits_over_2e <= 1.0
    assert seen.radii_over_2e <= 1.0


@pytest.mark.parametrize("normalised", [False, True])
def test_the_large_residual_network_is_certified_in_small(normalised: bool) -> None:
    certificate = certify(residual(often(4, 8), 2, 8, normalised))
    assert certificate.precision == "float32"
    assert np.isfinite(certificate.margin_bounds_KK).all()


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "FILE.md"
    write_section("one", "soundness", "## One\n\nfirst", file)
    write_section("two", "other", "## Two", file)
    before = file.read_text()
    write_section("one", "soundness", "## One\n\nsecond \\1", file)
    assert file.read_text() == before.replace("first", "second \\1")
    assert before.count("<!-- one: written by make soundness -->") == 1
