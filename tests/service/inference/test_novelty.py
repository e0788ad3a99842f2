"""Guards: which model guards which, and that their decisions are certified about the image as sent."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from client import HEIGHT, WIDTH
from guards import write_guarded

from service.api.schema import ImageOptions
from service.artefact.card import read_card
from service.errors import ArtefactChangedError, ChannelsError, NoveltyError, SettingsError
from service.inference.classifier import Classifier
from service.inference.loading import load_classifiers
from service.inference.outcome import compute
from service.inference.served import Models
from service.settings import Settings, novelty_models_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_guarded(folder)
    return folder


def loaded(folder: Path, **others: object) -> Models:
    return load_classifiers(Settings(models=folder, default_model="guarded", provider="cpu", **others))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    return loaded(folder)


def images(n: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, channels, HEIGHT, WIDTH)) / 255.0


def test_the_card_names_the_guard(models: Models) -> None:
    assert models["guarded"].guard is models["guard"]
    assert models["guard"].guard is None


@pytest.mark.parametrize("channels", [1, 3])
def test_the_decision_is_the_guard_s_own_about_the_image_as_sent(models: Models, channels: int) -> None:
    image_NCHW = images(5, channels)
    outcome = compute(models["guarded"], image_NCHW, ImageOptions(novelty=True))
    plain = compute(models["guarded"], image_NCHW, ImageOptions())
    guard = Classifier.predict(models["guard"], image_NCHW, resize=True)
    assert channels == 3 or len({prediction.class_id for prediction in guard}) > 1
    for found, without, expected in zip(outcome.predictions, plain.predictions, guard, strict=True):
        assert without.novelty is None
        assert found.novelty is not None
        guard, novelty = found.novelty
        assert guard is models["guard"]
        assert (novelty.class_id, novelty.radius) == (expected.class_id, expected.radius)
        assert found._replace(novelty=None)[:1] == without[:1]
        assert found.radius == without.radius


def test_nothing_within_the_radius_changes_the_decision(models: Models) -> None:
    random = np.random.default_rng(0)
    image_NCHW = 0.2 + 0.6 * images(20)
    predictions = compute(models["guarded"], image_NCHW, ImageOptions(novelty=True)).predictions
    tried = 0
    for image_CHW, prediction in zip(image_NCHW, predictions, strict=True):
        assert prediction.novelty is not None
        _, novelty = prediction.novelty
        for _ in range(20):
            step_CHW = random.normal(size=image_CHW.shape)
            moved = np.clip(image_CHW + 0.999 * novelty.radius * step_CHW / np.linalg.norm(step_CHW), 0, 1)
            (found,) = models["guard"].predict(moved[None], resize=True)
            assert found.class_id == novelty.class_id
            tried += novelty.certified
    assert tried > 100


def test_the_setting_comes_before_the_card(folder: Path, tmp_path: Path) -> None:
    assert loaded(folder, novelty_models="guarded=").get("guarded").guard is None  # type: ignore[union-attr]
    write_guarded(tmp_path, named=None)
    assert loaded(tmp_path)["guarded"].guard is None
    found = loaded(tmp_path, novelty_models="guarded = guard")
    assert found["guarded"].guard is found["guard"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("other=guard", "names 'other', which is no model of the folder"),
        ("guarded=missing", "missing is not in the folder of models"),
        ("guard=guarded", "guarded has the labels class 0, .* instead of known, novel"),
    ],
)
def test_a_setting_that_cannot_be_followed_ends_the_start(folder: Path, setting: str, expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        loaded(folder, novelty_models=setting)


@pytest.mark.parametrize("value", ["guarded", "=guard", "guarded=guard,guarded=guard"])
def test_a_setting_that_cannot_be_read_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="write MODEL=NOVELTY once"):
        novelty_models_of(value)


def test_a_card_may_name_a_model_that_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_guarded(tmp_path, named="elsewhere")
    with caplog.at_level(logging.INFO):
        models = loaded(tmp_path)
    assert "guarded is served without its novelty model: elsewhere is not in the folder" in caplog.text
    with pytest.raises(NoveltyError, match="its card names elsewhere, which this server does not serve"):
        compute(models["guarded"], images(1), ImageOptions(novelty=True))
    with pytest.raises(NoveltyError, match="guard has no novelty model: its card names none"):
        compute(models["guard"], images(1), ImageOptions(novelty=True, resize=True))


def test_a_guard_without_proof_does_not_guard(tmp_path: Path) -> None:
    write_guarded(tmp_path)
    model = tmp_path / "guard" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-10])
    models = loaded(tmp_path)
    assert models["guarded"].guard is None
    with pytest.raises(NoveltyError, match="guard, which this server does not serve"):
        compute(models["guarded"], images(1), ImageOptions(novelty=True))
    with pytest.raises(SettingsError, match="guard is not available"):
        loaded(tmp_path, novelty_models="guarded=guard")


def test_a_guard_whose_file_changed_answers_nothing(tmp_path: Path) -> None:
    write_guarded(tmp_path)
    models = loaded(tmp_path)
    card = tmp_path / "guard" / "card.json"
    card.write_text(card.read_text() + " ")
    models["guard"].files.check()
    compute(models["guarded"], images(1), ImageOptions())
    with pytest.raises(ArtefactChangedError):
        compute(models["guarded"], images(1), ImageOptions(novelty=True))


def test_images_that_the_guard_cannot_take_are_refused_before_any_computation(models: Models) -> None:
    with pytest.raises(ChannelsError):
        compute(models["guarded"], np.zeros((1, 2, HEIGHT, WIDTH)), ImageOptions(novelty=True))


def test_cards_without_the_member_are_read(tmp_path: Path) -> None:
    write_guarded(tmp_path, named=None)
    card = tmp_path / "guarded" / "card.json"
    card.write_text(card.read_text().replace('  "novelty_model": null,\n', ""))
    assert "novelty_model" not in card.read_text()
    assert read_card(tmp_path / "guarded").novelty_model is None
