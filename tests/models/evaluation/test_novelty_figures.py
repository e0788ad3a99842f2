"""AUROC and certified AUROC, by brute force and against attacks; the figures of a novelty model."""

from __future__ import annotations

from pathlib import Path

import builders
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from models.data.labelled import LabelledImages  # noqa: E402
from models.evaluation.images import EvaluationError  # noqa: E402
from models.evaluation.novelty import (  # noqa: E402
    Scores,
    auroc,
    certified_auroc,
    novel_images,
    novelty_cells,
    novelty_figures,
    scores_of,
)
from service.artefact.card import NOVELTY_LABELS, write_artefact  # noqa: E402
from service.inference.classifier import Classifier  # noqa: E402

SHAPE = (1, 5, 4)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = tmp_path_factory.mktemp("models") / "guard"
    graphs = builders.random_groupsort(5, SHAPE, 1)
    card = builders.card_for(graphs, "guard").model_copy(update={"labels": list(NOVELTY_LABELS)})
    write_artefact(folder, card, graphs.model)
    return Classifier.load(folder, "cpu", 1)


def made(f: np.ndarray, lipschitz: float = 1.0, error: float = 0.0) -> Scores:
    return Scores(f, np.abs(f), np.full(len(f), lipschitz), np.full(len(f), error))


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_all_pairs(seed: int) -> None:
    random = np.random.default_rng(seed)
    # On a grid, so that there are ties.
    known, novel = (made(random.integers(-8, 9, n) / 8) for n in (30, 20))
    pairs = [(k, n) for k in known.f_N.tolist() for n in novel.f_N.tolist()]
    assert auroc(known, novel) == pytest.approx(np.mean([(k > n) + (k == n) / 2 for k, n in pairs]), abs=1e-12)
    for epsilon in (0.1, 0.3, 0.6):
        # No difference of grid values is 2 epsilon.
        expected = np.mean([k - epsilon > n + epsilon for k, n in pairs])
        assert certified_auroc(known, novel, epsilon) == pytest.approx(expected, abs=1e-12)
    assert certified_auroc(known, novel, 0.0) <= auroc(known, novel)


def test_constants_and_errors_of_both_sides_count() -> None:
    known, novel = np.array([1.0]), np.array([0.0])
    assert certified_auroc(made(known, 2.0), made(novel, 1.0), 0.3) == 1.0
    assert certified_auroc(made(known, 2.0), made(novel, 1.0), 0.34) == 0.0
    assert certified_auroc(made(known, 2.0, 0.03), made(novel, 1.0, 0.03), 0.3) == 0.0
    assert certified_auroc(made(known, 2.0, 0.02), made(novel, 1.0, 0.02), 0.3) == 1.0


def test_a_margin_of_exactly_the_shift_is_not_certified() -> None:
    assert certified_auroc(made(np.array([1.0])), made(np.array([0.0])), 0.5) == 0.0


def test_no_change_of_both_images_gets_below_the_certified_figure(guard: Classifier) -> None:
    random = np.random.default_rng(0)
    images = random.integers(30, 226, (60, *SHAPE), dtype=np.uint8)
    scores = scores_of(guard, list(images))
    order = np.argsort(scores.f_N)
    novel_M, known_M = order[:30], order[20:]
    epsilon = 0.05

    def attacked(at: np.ndarray, sign: float) -> np.ndarray:
        pixels = images[at] / 255.0
        _, gradient = guard.margin_gradient(pixels, np.tile([0.5, -0.5], (len(at), 1)))
        norm = np.linalg.norm(gradient.reshape(len(at), -1), axis=1)[:, None, None, None]
        moved = np.clip(pixels + sign * 0.999 * epsilon * gradient / norm, 0, 1)
        return guard.classify(moved)[0][:, 0]

    def part(at: np.ndarray) -> Scores:
        return Scores(scores.f_N[at], scores.radius_N[at], scores.lipschitz_N[at], scores.error_N[at])

    low, high = made(attacked(known_M, -1)), made(attacked(novel_M, 1))
    certified = certified_auroc(part(known_M), part(novel_M), epsilon)
    assert certified <= auroc(low, high) < auroc(part(known_M), part(novel_M))


def test_scores_are_those_that_are_served_whatever_the_sizes(guard: Classifier) -> None:
    random = np.random.default_rng(1)
    shapes = [SHAPE, SHAPE, (1, 9, 9), (3, 5, 4), SHAPE]
    images = [random.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    scores = scores_of(guard, images)
    for n, image in enumerate(images):
        (alone,) = guard.predict(image[None] / 255.0, resize=True)
        assert scores.f_N[n] == pytest.approx(alone.logits_K[0], rel=1e-12)
        assert scores.radius_N[n] == pytest.approx(alone.radius, rel=1e-9)
        assert 2 * scores.lipschitz_N[n] >= alone.lipschitz_bound


def test_a_set_without_novel_images_is_measured_against_noise_and_other_sets(guard: Classifier, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    known = LabelledImages(torch.from_numpy(random.integers(0, 256, (40, *SHAPE), np.uint8)), torch.zeros(40).long())
    (tmp_path / "bark" / "wet").mkdir(parents=True)
    Image.fromarray(random.integers(0, 256, (12, 10), np.uint8)).save(tmp_path / "bark" / "wet" / "1.png")
    (tmp_path / "bark" / "notes.txt").write_text("no image")
    others = novel_images([str(tmp_path / "bark")], tmp_path)
    figures = novelty_figures(guard, known, others, [0.1, 0.5])
    assert [(one["name"], one["n"]) for one in figures["against"]] == [("bark", 1), ("uniform noise", 40)]
    both = LabelledImages(known.images_NCHW, (torch.arange(40) < 10).long())
    assert [one["name"] for one in novelty_figures(guard, both, {}, [0.1])["against"]] == [
        "other classes",
        "uniform noise",
    ]
    head, rows = novelty_cells(figures)
    assert {len(head)} == {len(row) for row in rows}


def test_a_place_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no image file"):
        novel_images([str(tmp_path)], tmp_path)
    with pytest.raises(EvaluationError, match="no such folder; name a folder of images, or one of cifar10"):
        novel_images([str(tmp_path / "missing")], tmp_path)
