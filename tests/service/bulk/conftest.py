"""Runs in this process, and a server that answers about the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer

from service.api.app import create_app
from service.bulk import local
from service.bulk.work import certify_part
from service.inference.classifier import Classifier
from service.settings import Settings
from service.sheets import in_process


@pytest.fixture(autouse=True)
def settings_are_those_of_the_test(without_settings: None) -> None:
    """Commands run in this process."""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, classifiers: Mapping[str, Classifier]) -> None:
    """Parts are certified in this process, by models that are loaded once for all tests."""

    def run(job: Any, lines: Iterator[str], processes: int) -> Iterator[Any]:
        return (certify_part(job, line) for line in lines)

    def load(settings: Settings, folders: list[Path]) -> Mapping[str, Classifier]:
        return {folder.name: classifiers[folder.name] for folder in folders}

    monkeypatch.setattr(local, "run_locally", run)
    monkeypatch.setattr(in_process, "load_classifiers", load)


@pytest.fixture(scope="module")
def url(classifiers: Mapping[str, Classifier]) -> Iterator[str]:
    with LiveServer(create_app(Settings(default_model="grey"), classifiers)) as server:
        yield f"http://127.0.0.1:{server.port}"
