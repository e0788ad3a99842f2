"""Licences: NOTICE covers what ships, and a wheel carries the texts."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from service.artefact.card import read_card

ROOT = Path(__file__).resolve().parents[2]
NOTICE = (ROOT / "NOTICE").read_text(encoding="utf-8")
MODELS = sorted(path.parent.name for path in (ROOT / "models" / "zoo").glob("*/card.json"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODELS)
def test_notice_has_data_set_source_and_licence_of_every_shipped_model(name: str) -> None:
    card = read_card(ROOT / "models" / "zoo" / name)
    (entry,) = (entry for entry in NOTICE.split("\n\n") if name in re.findall(r"[\w-]+", entry.split("\n")[0]))
    words = " ".join(entry.split())
    for fact in (card.data["name"], card.data["source"], card.licence):
        assert fact in words


def test_notice_names_the_shipped_version_of_swagger_ui() -> None:
    version = (ROOT / "service/static/swagger-ui/VERSION").read_text(encoding="utf-8")
    (number,) = re.findall(r"swagger-ui-dist (\S+) ", version)
    assert f"Swagger UI {number}, in service/static/swagger-ui" in NOTICE


def test_every_licence_of_the_wheel_is_in_its_metadata() -> None:
    patterns = PROJECT["project"]["license-files"]
    files = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    swagger = "service/static/swagger-ui"
    assert files == {
        "LICENSE",
        "NOTICE",
        f"{swagger}/LICENSE",
        f"{swagger}/NOTICE",
        f"{swagger}/swagger-ui-bundle.js.LICENSE.txt",
    }
    (model,) = {glob.split("/")[1] for glob in PROJECT["tool"]["setuptools"]["package-data"]["models"]}
    data_licence = read_card(ROOT / "models" / "zoo" / model).licence
    code, swagger_ui, data = PROJECT["project"]["license"].split(" AND ")
    assert (code, swagger_ui) == ("MIT", "Apache-2.0")
    assert data == "-".join(data_licence.split())
