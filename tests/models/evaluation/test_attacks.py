"""Attacks see the served graphs and use the balls they are given; their finds are judged exactly."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import linear, load, random_groupsort

pytest.importorskip("foolbox")
if find_spec("art") is None:
    pytest.skip("art is not installed", allow_module_level=True)
torch = pytest.importorskip("torch")

from models.evaluation import attacks, libraries  # noqa: E402
from models.evaluation.attacks import (  # noqa: E402
    AttackResult,
    CertificateRefutedError,
    run_attacks,
    union,
)
from models.evaluation.libraries import ServedModel  # noqa: E402
from models.evaluation.measure import prove_with_references  # noqa: E402
from models.evaluation.partial import PartialResults  # noqa: E402
from service.inference.classifier import Classifier  # noqa: E402
from service.pixels.distances import distance  # noqa: E402

FEWER_STEPS = {
    "PGD": {"steps": 10},
    "Carlini-Wagner": {"steps": 20, "binary_search_steps": 2},
    "AutoAttack": {"apgd_steps": 10, "square_queries": 10},
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fewer in FEWER_STEPS.items():
        monkeypatch.setitem(attacks.ATTACKS, name, {**attacks.ATTACKS[name], **fewer})


def images(n: int, shape: tuple[int, int, int] = (1, 4, 4)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape)) / 255


def attack_all(classifier: Classifier, image: np.ndarray, **options: Any) -> list[AttackResult]:
    """Attack with the largest proved radii, as the evaluation does."""
    return run_attacks(classifier, image, best_radii(classifier, image), progress=False, **options)


def best_radii(classifier: Classifier, image: np.ndarray) -> np.ndarray:
    return prove_with_references(classifier, image, [])["radius"]


def plane() -> Classifier:
    """Two classes with the boundary `sum(x) = 8`: `radius = distance = |sum(x) - 8| / 4`."""
    return load(linear(np.stack([np.ones(16), -np.ones(16)]) / 4, np.array([-2.0, 2.0]), (1, 4, 4)))


def target(classifier: Classifier, image: np.ndarray, radius: np.ndarray, class_id: int = 0) -> attacks.AttackedBatch:
    return attacks.AttackedBatch(classifier, "test", image, np.full(len(image), class_id), radius)


def test_served_model_has_the_gradient_of_the_graph() -> None:
    classifier = load(random_groupsort(0))
    image = torch.rand(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ServedModel(classifier), (image,), eps=1e-6, atol=1e-6)


def test_served_model_of_one_output_has_two_logits() -> None:
    classifier = load(random_groupsort(0, n_outputs=1))
    image = torch.rand(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert ServedModel(classifier)(image).shape == (3, 2)
    assert torch.autograd.gradcheck(ServedModel(classifier), (image,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_outputs", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 6)])
def test_every_attack_runs_and_finds_nothing_inside(n_outputs: int, shape: tuple[int, int, int]) -> None:
    classifier = load(random_groupsort(2, shape, n_outputs=n_outputs))
    results = attack_all(classifier, images(6, shape))
    assert [result.name for result in results] == ["FGSM", "DeepFool", "PGD", "Carlini-Wagner", "AutoAttack"]
    for result in results:
        assert result.distance_N.shape == (6,)
        assert (result.distance_N >= result.best_N).all()
        assert (result.best_N >= result.radius_N).all()
        assert result.as_card_entry()["successes"] == 0
    assert np.isfinite(union(results).distance_N).any()


def test_images_too_small_for_square_are_attacked_by_the_rest() -> None:
    results = attack_all(load(random_groupsort(0, (1, 3, 3))), images(3, (1, 3, 3)))
    assert all((result.distance_N >= result.radius_N).all() for result in results)


def test_every_attack_finds_the_plane_at_its_distance() -> None:
    classifier = plane()
    image = 0.45 + 0.1 * images(5)
    distance = np.abs(image.sum(axis=(1, 2, 3)) - 8) / 4
    for result in attack_all(classifier, image):
        # Few steps from a random start do not end at the nearest point of the plane.
        slack = 1.5 if result.name in ("PGD", "AutoAttack") else 1.05
        assert (result.distance_N >= distance * (1 - 1e-9)).all()
        assert (result.distance_N <= distance * slack).all(), result.name


def test_union_takes_the_nearest_of_each_image() -> None:
    radius = np.array([1.0, 1.0, 1.0])
    first = AttackResult("first", "", {}, np.array([2.0, np.inf, np.inf]), radius, 1.5 * radius)
    second = AttackResult("second", "", {}, np.array([3.0, 4.0, np.inf]), radius, 1.5 * radius)
    both = union([first, second])
    assert both.distance_N.tolist() == [2.0, 4.0, np.inf]
    assert (both.flipped, both.median_distance, both.median_radius_over_distance) == (2, 3.0, 0.375)
    assert both.as_card_entry()["with_references"] == {"median_radius": 1.5, "median_radius_over_distance": 0.5625}
    assert union([replace(first, distance_N=np.full(3, np.inf))]).median_distance is None


def test_what_was_found_is_drawn_to_the_boundary() -> None:
    image = np.full((1, 1, 4, 4), 0.6)
    found = np.full((1, 1, 4, 4), 0.1)
    _, radii = plane().classify(image)
    (distance,) = target(plane(), image, radii.radius_N).judge(found)
    assert 0.4 <= distance < 0.4001


def test_image_that_kept_its_class_is_not_a_find() -> None:
    image = np.full((1, 1, 4, 4), 0.6)
    assert target(plane(), image, np.array([0.4])).judge(image + 0.1).tolist() == [np.inf]
    assert target(plane(), image, np.array([0.4])).judge(np.full_like(image, np.nan)).tolist() == [np.inf]


def test_find_inside_the_radius_is_an_error_that_carries_both_images() -> None:
    """With a radius that is too large the check must fail: that it never does means something."""
    image, found = np.full((1, 1, 4, 4), 0.6), np.full((1, 1, 4, 4), 0.45)
    with pytest.raises(CertificateRefutedError, match="of class 1 at distance") as refuted:
        target(plane(), image, np.array([0.7])).judge(found)
    assert np.array_equal(refuted.value.image_CHW, image[0])
    assert plane().classify(refuted.value.found_CHW[None])[1].class_id_N.tolist() == [1]
    assert distance(image[0], refuted.value.found_CHW) < 0.7


def test_find_outside_the_radius_is_tried_inside_it_too() -> None:
    """The boundary is at 0.4 and the find at 2.0; between them the radius claims 0.5."""
    image, found = np.full((1, 1, 4, 4), 0.6), np.full((1, 1, 4, 4), 0.1)
    with pytest.raises(CertificateRefutedError):
        target(plane(), image, np.array([0.5])).judge(found)


@pytest.mark.parametrize("name", ["PGD", "FGSM"])
def test_ball_search_uses_the_whole_ball_of_each_image_and_no_more(name: str) -> None:
    image, radius = np.full((2, 1, 4, 4), 0.6), np.array([0.1, 0.3])
    found = libraries.gradient_search(plane(), name, attacks.ATTACKS[name])(image, np.array([0, 0]), radius, True)
    for n in range(2):
        assert 0.99 * radius[n] < distance(image[n], found[n]) <= radius[n] * (1 + 1e-9)


def test_groups_of_similar_radii_are_a_partition() -> None:
    size = np.array([3.0, 1.0, 1.2, 9.0, 1.1, 3.1])
    groups = [group.tolist() for group in libraries.groups_of_similar_size(size)]
    assert groups == [[1, 4, 2], [0, 5], [3]]


def test_parts_that_are_kept_are_not_attacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "ATTACKS", {"DeepFool": attacks.ATTACKS["DeepFool"]})
    monkeypatch.setattr(attacks, "BATCH", 3)
    classifier, cache = load(random_groupsort(0)), PartialResults(tmp_path)
    (first,) = attack_all(classifier, images(6), cache=cache)
    assert cache.count() == 2
    with monkeypatch.context() as patch:
        patch.setattr(attacks.AttackedBatch, "attack", lambda *_: pytest.fail("the part was kept"))
        (second,) = attack_all(classifier, images(6), cache=cache)
        assert second.distance_N.tolist() == first.distance_N.tolist()
        with pytest.raises(pytest.fail.Exception):
            attack_all(load(random_groupsort(1)), images(6), cache=cache)
        with pytest.raises(pytest.fail.Exception):
            attack_all(classifier, images(6), cache=cache, seed=1)
        with pytest.raises(pytest.fail.Exception):
            run_attacks(classifier, images(6), np.zeros(6), cache=cache, progress=False)


def test_find_inside_the_radius_with_reference_images_alone_is_an_error() -> None:
    """A larger radius that is false must be refuted, although the fast one holds."""
    classifier, image = plane(), np.full((1, 1, 4, 4), 0.6)
    _, radii = classifier.classify(image)
    assert radii.radius_N == pytest.approx(0.4)
    with pytest.raises(CertificateRefutedError, match=r"certified radius is 0\.5"):
        run_attacks(classifier, image, np.array([0.5]), progress=False)
