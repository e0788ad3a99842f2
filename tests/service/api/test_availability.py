"""Models that cannot answer: broken at the start, or changed since; what clients and load balancers are told."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import npy

from service.api.app import create_app
from service.artefact import verified_files
from service.inference.loading import load_classifiers
from service.inference.served import Models
from service.settings import Settings

NPY = {"Content-Type": "application/x-npy"}
GREY = npy(np.zeros((HEIGHT, WIDTH)))
COLOUR = npy(np.zeros((3, HEIGHT, WIDTH)))
INFER = {"inputs": [{"name": "image", "shape": [1, 3, HEIGHT, WIDTH], "datatype": "FP64", "data": [0.0] * 60}]}


@pytest.fixture
def models(zoo: Path, tmp_path: Path) -> Path:
    for name in ("grey", "colour", "binary"):
        shutil.copytree(zoo / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def loaded(models: Path) -> Models:
    """`grey`, `colour`, and `binary`, which is broken."""
    (models / "binary" / "model.onnx").write_bytes(b"no model")
    return load_classifiers(settings_for(models))


@pytest.fixture
def client(models: Path, loaded: Models, runner: asyncio.Runner) -> Client:
    return Client(create_app(settings_for(models), loaded), runner)


def settings_for(models: Path) -> Settings:
    return Settings(models=models, default_model="grey", provider="cpu")


def ask(client: Client, model: str, content: bytes) -> Any:
    return client.post("/predict", params={"model": model}, content=content, headers=NPY)


def test_a_broken_model_is_listed_and_a_request_for_it_gets_its_reason(client: Client, models: Path) -> None:
    answer = client.get("/models").json()
    assert [model["name"] for model in answer["models"]] == ["colour", "grey"]
    (broken,) = answer["broken"]
    assert broken["name"] == "binary"
    assert broken["reason"].startswith("the card states the digest sha256:")
    refused = [
        ask(client, "binary", GREY),
        client.get("/models/binary"),
        client.get("/v2/models/binary"),
        client.get("/v2/models/binary/ready"),
        client.post("/v2/models/binary/infer", json=INFER),
    ]
    for response in refused:
        assert response.status_code == 503
        assert response.json()["type"] == "urn:problem-type:lipcert:model-not-available"
        assert response.json()["detail"].startswith(f"model 'binary' is not available: {broken['reason']}")
        assert "Retry-After" not in response.headers
        assert str(models) not in response.text
    assert ask(client, "grey", GREY).status_code == 200
    assert client.get("/health/ready").status_code == 200
    assert client.get("/models/nothing").status_code == 404


@pytest.mark.parametrize("file", ["model.onnx", "card.json"])
def test_a_model_whose_files_change_is_refused_and_the_server_is_not_ready(
    client: Client, models: Path, loaded: Models, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    assert ask(client, "grey", GREY).status_code == 200
    path = models / "grey" / file
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    loaded["grey"].files.check()
    for response in (
        ask(client, "grey", GREY),
        client.post("/predict/batch", params={"model": "grey"}, content=npy(np.zeros((2, 4, 5))), headers=NPY),
    ):
        assert response.status_code == 503
        assert response.json()["type"] == "urn:problem-type:lipcert:artefact-changed"
        assert str(models) not in response.text
    assert client.get("/health/ready").status_code == 503
    assert client.get("/v2/health/ready").status_code == 503
    assert client.get("/v2/models/grey/ready").status_code == 503
    assert client.get("/v2/models/colour/ready").status_code == 200
    assert ask(client, "colour", COLOUR).status_code == 200
    assert sum(str(path) in record.getMessage() for record in caplog.records) == 1
    path.write_bytes(content)
    assert ask(client, "grey", GREY).status_code == 200
    assert client.get("/health/ready").status_code == 200


def test_a_model_that_changes_before_it_is_loaded_is_refused(
    client: Client, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = models / "colour" / "model.onnx"
    content = path.read_bytes()
    path.unlink()
    for _ in range(3):
        assert ask(client, "colour", COLOUR).json()["type"] == "urn:problem-type:lipcert:artefact-changed"
    assert client.post("/v2/models/colour/infer", json=INFER).status_code == 503
    assert client.get("/health/ready").status_code == 503
    assert sum(str(path) in record.getMessage() for record in caplog.records) == 1
    path.write_bytes(content)
    assert ask(client, "colour", COLOUR).status_code == 200


def test_the_application_watches_the_files_while_it_runs(
    client: Client, models: Path, loaded: Models, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified_files, "_EVERY_S", 0.01)

    async def run() -> bool:
        async with client.app.router.lifespan_context(client.app):
            (models / "colour" / "card.json").unlink()
            end = time.monotonic() + 30.0
            while not loaded["colour"].files.have_changed and time.monotonic() < end:
                await asyncio.sleep(0.01)
        return loaded["colour"].files.have_changed

    assert runner.run(run())
    assert client.get("/health/ready").status_code == 503
