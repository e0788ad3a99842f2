"""A folder of models with faults in it: the good ones are served, the others are reported, and clutter is no model."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from service.artefact.files import digest
from service.artefact.findings import Findings
from service.artefact.folders import artefact_folders
from service.artefact.pool import VerifierPool
from service.artefact.verification import verify
from service.errors import ArtefactError, ModelNotAvailableError, SettingsError, UnknownModelError
from service.inference.loading import load_classifiers
from service.inference.served import Models
from service.settings import Settings


class Pool(VerifierPool):
    """Verifies in this process."""

    def __init__(self) -> None:
        pass

    def findings(self, folder: Path) -> Findings:
        return verify(folder)


@pytest.fixture
def models(zoo: Path, tmp_path: Path) -> Path:
    """A folder with `grey`, the default model, and `colour`."""
    for name in ("grey", "colour"):
        shutil.copytree(zoo / name, tmp_path / name)
    return tmp_path


def load(models: Path, strict: bool = False) -> Models:
    return load_classifiers(Settings(models=models, default_model="grey", provider="cpu", strict=strict), Pool())


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def edit_card(folder: Path, **changes: object) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "damaged card": (lambda folder: (folder / "card.json").write_bytes(b"{"), "not a valid card"),
    "a card of one gigabyte": (lambda folder: os.truncate(folder / "card.json", 2**30), "it has 1073741824 bytes"),
    "a card that is a pipe": (
        lambda folder: ((folder / "card.json").unlink(), os.mkfifo(folder / "card.json")),
        "it is a pipe or a device",
    ),
    "a card that leads nowhere": (
        lambda folder: ((folder / "card.json").unlink(), (folder / "card.json").symlink_to("..data/card.json")),
        "the file is missing",
    ),
    "unknown fields": (
        lambda folder: edit_card(folder, **{f"field{k}" * 100: k for k in range(1000)}),
        "not a valid card",
    ),
    "no model": (lambda folder: (folder / "model.onnx").unlink(), "the file is missing"),
    "a model that is a folder": (
        lambda folder: ((folder / "model.onnx").unlink(), (folder / "model.onnx").mkdir()),
        "cannot be read",
    ),
    "truncated model": (lambda folder: os.truncate(folder / "model.onnx", 100), "the card states the digest"),
    "no proof": (
        lambda folder: (
            (folder / "model.onnx").write_bytes(b"garbage"),
            edit_card(folder, graphs={"model.onnx": digest(b"garbage")}),
        ),
        "the graph has no proved Lipschitz bound, so it is not served: the graph cannot be certified:",
    ),
    "another digest": (
        lambda folder: edit_card(folder, graphs={"model.onnx": "sha256:" + "0" * 64}),
        "the card states the digest",
    ),
    "the name of another": (lambda folder: edit_card(folder, name="binary"), "the name 'binary' is taken"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_others_are_served_and_the_broken_one_is_reported(
    zoo: Path, models: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    shutil.copytree(zoo / "binary", models / "binary")
    FAULTS[fault][0](models / "colour")
    loaded = load(models)
    assert list(loaded) == ["binary", "grey"]
    assert list(loaded.broken) == ["colour"]
    reason = loaded.broken["colour"].line
    assert FAULTS[fault][1] in reason
    assert "\n" not in reason
    assert len(reason) <= 500
    (line,) = lines(caplog, logging.ERROR)
    assert line.startswith(f"model colour is not served: {models / 'colour'}")
    with pytest.raises(ModelNotAvailableError, match="model 'colour' is not available: "):
        loaded["colour"]
    with pytest.raises(UnknownModelError):
        loaded["no such model"]


@pytest.mark.parametrize("fault", ["damaged card", "no model"])
def test_in_strict_mode_a_broken_model_ends_the_start(models: Path, fault: str) -> None:
    FAULTS[fault][0](models / "colour")
    with pytest.raises(ArtefactError, match=FAULTS[fault][1]):
        load(models, strict=True)


@pytest.mark.parametrize("fault", sorted({*FAULTS} - {"the name of another"}))
def test_a_broken_default_model_always_ends_the_start(models: Path, fault: str) -> None:
    FAULTS[fault][0](models / "grey")
    with pytest.raises(ArtefactError, match=FAULTS[fault][1]):
        load(models)


def test_the_name_of_the_default_model_cannot_be_taken(models: Path) -> None:
    edit_card(models / "colour", name="grey")
    with pytest.raises(ArtefactError, match="the name 'grey' is taken"):
        load(models)


def test_a_broken_model_has_the_name_in_its_card(models: Path) -> None:
    (models / "colour").rename(models / "folder")
    (models / "folder" / "model.onnx").unlink()
    assert list(load(models).broken) == ["colour"]


def test_a_default_model_that_is_not_there_is_named_with_those_that_are(models: Path) -> None:
    shutil.rmtree(models / "grey")
    with pytest.raises(SettingsError, match=r"serves no such model; it has colour$"):
        load(models)
    (models / "colour" / "model.onnx").unlink()
    with pytest.raises(SettingsError, match="it has none without a fault"):
        load(models)


def test_folders_without_a_card_are_passed_over_with_one_warning_and_clutter_without(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("lost+found", "__MACOSX", ".git", "..2026_11_30", ".ipynb_checkpoints", "data", "notes"):
        (models / name).mkdir()
    (models / "data" / "model.onnx").write_bytes(b"")
    (models / ".DS_Store").write_bytes(b"")
    (models / "README.md").write_text("models")
    (models / "gone").symlink_to("nowhere")
    assert list(load(models)) == ["colour", "grey"]
    assert [*lines(caplog, logging.WARNING), *lines(caplog, logging.ERROR)] == [
        f"passed over in {models}, without card.json: data, notes"
    ]


def test_a_model_that_is_a_link_is_served(zoo: Path, models: Path) -> None:
    (models / "binary").symlink_to(zoo / "binary")
    assert list(load(models)) == ["binary", "colour", "grey"]


def test_a_folder_of_models_that_is_an_artefact_itself_is_named_as_such(models: Path) -> None:
    with pytest.raises(ArtefactError, match="it is an artefact itself: name the folder around it"):
        artefact_folders(models / "grey", "grey")
    (models / "grey" / "card.json").unlink()
    with pytest.raises(ArtefactError, match=r"set LIPCERT_MODELS to a folder of folders that do$"):
        artefact_folders(models / "grey", "grey")
