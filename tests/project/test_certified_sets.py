"""The attack on certified sets refutes none, and would notice sets that leave no room for changes."""

from __future__ import annotations

import builders
import numpy as np
import pytest

pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from docs.certified_sets import attack, head_constants, methods, pulled_inside, split_rows  # noqa: E402
from models.evaluation.calibration import Scored, calibration_of  # noqa: E402
from service.certificate.sets import upper_scores  # noqa: E402
from service.inference import sets  # noqa: E402
from service.inference.classifier import Classifier  # noqa: E402
from service.pixels.distances import is_inside  # noqa: E402

EPSILON = 0.2


def labelled(model: Classifier, n: int, seed: int) -> tuple[np.ndarray, Scored]:
    """Images with labels that are the class of the model, or for one in five any."""
    random = np.random.default_rng(seed)
    image_NCHW = random.uniform(0.2, 0.8, (n, 1, 4, 4))
    logits_NK, radii = model.classify(image_NCHW)
    label_N = np.where(random.uniform(size=n) < 0.2, random.integers(0, 4, n), radii.class_id_N)
    return image_NCHW, Scored(logits_NK, label_N)


@pytest.fixture(scope="module")
def model() -> Classifier:
    model = builders.load(builders.random_groupsort(1, n_outputs=4))
    _, held_out = labelled(model, 400, 0)
    block = calibration_of(model.certificate, held_out, model.digest, "drawn")
    model.card = model.card.model_copy(update={"calibration": block})
    return model


def test_no_change_below_epsilon_pushes_out_a_class_whose_own_score_reaches_the_quantile(model: Classifier) -> None:
    image_NCHW, scored = labelled(model, 300, 1)
    for coverage, found in zip(
        (0.6, 0.8, 0.9), attack(model, image_NCHW, scored.label_N, EPSILON, (0.6, 0.8, 0.9)), strict=True
    ):
        assert found.refuted == 0
        assert found.under_attack <= found.clean
        # Three standard deviations of 300 draws and of 400 calibration images.
        assert found.under_attack >= coverage - 3 * np.sqrt(coverage * (1 - coverage) * (1 / 300 + 1 / 400))


def test_the_attack_refutes_sets_that_leave_no_room_for_changes(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "scaled_up", lambda epsilon, norm: 0.5 * epsilon)
    image_NCHW, scored = labelled(model, 300, 1)
    assert any(found.refuted for found in attack(model, image_NCHW, scored.label_N, EPSILON, (0.6, 0.8, 0.9)))


def test_images_are_pulled_inside_the_ball() -> None:
    random = np.random.default_rng(0)
    one_NCHW, other_NCHW = random.uniform(size=(2, 20, 1, 4, 4))
    for near_CHW, image_CHW in zip(pulled_inside(one_NCHW, other_NCHW, 0.3), one_NCHW, strict=True):
        assert is_inside(image_CHW, near_CHW, 0.3)
        assert not is_inside(image_CHW, near_CHW, 0.3 * (1 - 1e-6))


def test_logits_of_unit_rows_behind_orthogonal_layers_change_by_at_most_the_distance() -> None:
    graphs = builders.random_groupsort(1, n_outputs=4)
    certificate = builders.load(graphs).certificate
    np.testing.assert_allclose(head_constants(graphs.model, certificate), np.ones(4), rtol=1e-6)


def test_of_two_classes_all_three_scores_give_the_same_sets() -> None:
    graphs = builders.random_groupsort(1, n_outputs=1)
    model = builders.load(graphs)
    random = np.random.default_rng(0)
    logits_NK, radii = model.classify(random.uniform(size=(200, 1, 4, 4)))
    scored = Scored(logits_NK, np.where(random.uniform(size=200) < 0.3, 1 - radii.class_id_N, radii.class_id_N))
    compared = methods(scored, model.certificate, head_constants(graphs.model, model.certificate))
    upper_NK = upper_scores(logits_NK, model.certificate.margin_bounds_KK)
    np.testing.assert_allclose(compared[0].score_NK, upper_NK, atol=1e-9)
    for row in split_rows("two", scored, compared, [0.0, 0.05]):
        cells = [cell.strip(" *") for cell in row.split("|")[1:-1]]
        assert cells[3] == cells[4]
        assert cells[6] == cells[7]
