"""Which folders of a folder of models are artefacts, and which of them are versions of one model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from service.artefact.folders import artefact_folders, names_of, newest, root_of, split_name, version_of


def make(models: Path, *artefacts: str) -> Path:
    for artefact in artefacts:
        (models / artefact).mkdir(parents=True)
        (models / artefact / "card.json").touch()
    return models


def found(models: Path, first: str = "mnist") -> list[str]:
    return [str(folder.relative_to(models)) for folder in artefact_folders(models, first)]


def test_numbers_are_versions_and_the_highest_comes_first_by_value(tmp_path: Path) -> None:
    make(tmp_path, "mnist/9", "mnist/10", "mnist/2", "cells", "zebra/1")
    assert found(tmp_path) == ["mnist/10", "mnist/9", "mnist/2", "cells", "zebra/1"]
    assert found(tmp_path, "mnist:2") == ["mnist/2", "cells", "mnist/10", "mnist/9", "zebra/1"]
    assert found(tmp_path, "zebra")[0] == "zebra/1"


def test_what_is_no_version_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "mnist/1", "mnist/01", "mnist/latest", "mnist/-1", "mnist/١", "mnist/" + "9" * 19, "mnist/.3")
    (tmp_path / "mnist" / "2").mkdir()
    (tmp_path / "mnist" / "config.pbtxt").touch()
    (tmp_path / "notes" / "inner").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == ["mnist/1"]
    without, numbers = (record.getMessage() for record in caplog.records)
    assert without.endswith("without card.json: mnist/2, notes")
    assert numbers.endswith(
        "numbers without leading zeros: "
        + ", ".join(sorted(["mnist/01", "mnist/latest", "mnist/-1", "mnist/١", "mnist/" + "9" * 19]))
    )


def test_an_artefact_is_no_model_with_versions_whatever_is_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "mnist/2", "cells/samples")
    (tmp_path / "mnist" / "card.json").touch()
    (tmp_path / "cells" / "card.json").touch()
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == ["mnist", "cells"]
    (line,) = caplog.messages
    assert f"{tmp_path / 'mnist'} is an artefact" in line


def test_names_of_folders(tmp_path: Path) -> None:
    make(tmp_path, "mnist/1", "mnist/12", "7")
    assert names_of(tmp_path / "mnist" / "12", tmp_path) == ("mnist:12", "mnist")
    # A number is a name like others.
    assert names_of(tmp_path / "7", tmp_path) == ("7",)
    assert version_of(tmp_path / "7", tmp_path) is None
    assert newest(tmp_path / "mnist") == tmp_path / "mnist" / "12"
    assert newest(tmp_path / "7") == tmp_path / "7"
    assert root_of(tmp_path / "mnist" / "1", "mnist") == tmp_path
    assert root_of(tmp_path / "mnist" / "1", "other") == tmp_path / "mnist"
    assert root_of(tmp_path / "7", "mnist") == tmp_path


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mnist:2", ("mnist", 2)),
        ("mnist", ("mnist", 0)),
        ("mnist:02", ("mnist:02", 0)),
        ("a:b", ("a:b", 0)),
        (":1", (":1", 0)),
    ],
)
def test_names_of_versions(name: str, parts: tuple[str, int]) -> None:
    assert split_name(name) == parts
