"""Runs in this process, and a server that answers about the same inputs."""

from __future__ import annotations

import logging
import os
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
def process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.upper().startswith("LIPCERT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LIPCERT_PROVIDER", "cpu")
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


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
