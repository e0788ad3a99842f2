"""Several versions of a model: which of them a name stands for, in every protocol, and what the start refuses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import encode, npy

from service.api.app import create_app
from service.artefact.findings import Findings
from service.artefact.pool import VerifierPool
from service.artefact.verification import verify
from service.audit.verdict import audit
from service.errors import ArtefactError, SettingsError
from service.inference.loading import load_classifiers
from service.inference.served import Models
from service.settings import Settings

SHAPE = (1, HEIGHT, WIDTH)
IMAGE_HW = np.random.default_rng(3).random(SHAPE[1:])
NPY = {"Content-Type": "application/x-npy"}
ALIASES = "champion=grey:2,newest=grey,same=other"


class Pool(VerifierPool):
    """Verifies in this process."""

    def __init__(self) -> None:
        pass

    def findings(self, folder: Path) -> Findings:
        return verify(folder)


def write(folder: Path, seed: int, name: str) -> None:
    random = np.random.default_rng(seed)
    builders.write(folder, builders.linear(random.normal(size=(3, HEIGHT * WIDTH)), random.normal(size=3), SHAPE), name)


def settings_of(models: Path, **others: Any) -> Settings:
    return Settings(models=models, provider="cpu", **({"default_model": "grey"} | others))


def load(models: Path, **others: Any) -> Models:
    return load_classifiers(settings_of(models, **others), Pool())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    for version in (2, 9, 10):
        write(models / "grey" / str(version), version, "grey")
    write(models / "other", 0, "other")
    return models


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    return load(folder, aliases=ALIASES)


@pytest.fixture(scope="module")
def client(folder: Path, models: Models, runner: asyncio.Runner) -> Client:
    return Client(create_app(settings_of(folder, aliases=ALIASES), models), runner)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (None, "grey:10"),
        ("grey", "grey:10"),
        ("grey:9", "grey:9"),
        ("champion", "grey:2"),
        ("newest", "grey:10"),
        ("same", "other"),
        ("other", "other"),
    ],
)
def test_a_name_stands_for_the_highest_version_a_version_or_an_alias(
    client: Client, models: Models, asked: str | None, answered: str
) -> None:
    answer = client.post(
        "/predict", content=npy(IMAGE_HW), headers=NPY, params={"model": asked} if asked else {}
    ).json()
    assert (answer["model"], answer["digest"]) == (answered, models[answered].digest)
    # The form body goes another way through the server.
    form = {"model": asked} if asked else {}
    parts = {"image": ("image.png", encode((255 * IMAGE_HW).astype(np.uint8)), "image/png")}
    assert client.post("/predict", data=form, files=parts).json()["model"] == answered
    if asked:
        assert client.get(f"/models/{asked}").json()["name"] == answered
        assert client.get(f"/v1/models/{asked}").json() == {"name": asked, "ready": True}
        body = {"instances": [IMAGE_HW.tolist()]}
        assert client.post(f"/v1/models/{asked}:predict", json=body).json()["predictions"][0]["model"] == answered


def tensor() -> dict[str, Any]:
    return {"name": "image", "shape": [1, *SHAPE], "datatype": "FP64", "data": IMAGE_HW.ravel().tolist()}


def test_versions_of_the_open_inference_protocol_are_numbers_and_digests(client: Client, models: Models) -> None:
    assert client.get("/v2/models").json() == {"models": ["grey", "other"]}
    assert client.get("/v2/models/grey").json()["versions"] == ["2", "9", "10"]
    assert client.get("/v2/models/other").json()["versions"] == [models["other"].digest]
    for version, number in (("9", "9"), (models["grey:9"].digest, "9"), ("10", "10")):
        path = f"/v2/models/grey/versions/{version}"
        answer = client.post(f"{path}/infer", json={"model_name": "grey", "inputs": [tensor()]}).json()
        assert (answer["model_name"], answer["model_version"]) == ("grey", number)
        assert client.get(f"{path}/ready").json()["ready"]
    assert (
        client.post("/v2/models/champion/infer", json={"model_name": "champion", "inputs": [tensor()]}).json()[
            "model_version"
        ]
        == "2"
    )
    assert client.get("/v2/models/champion/versions/2").status_code == 200
    assert client.get("/v2/models/champion/versions/10").status_code == 404
    problem = client.get("/v2/models/grey/versions/3").json()
    assert problem["status"] == 404
    assert "it has 10, 9, 2: name one of them" in problem["detail"]
    other = client.post("/v2/models/grey/infer", json={"model_name": "other", "inputs": [tensor()]})
    assert other.status_code == 422


def test_lists_have_every_version(client: Client) -> None:
    listed = client.get("/models").json()["models"]
    assert [(one["name"], one["version"], one["aliases"], one["default"]) for one in listed] == [
        ("grey:2", "2", ["champion"], False),
        ("grey:9", "9", [], False),
        ("grey:10", "10", ["grey", "newest"], True),
        ("other", None, ["same"], False),
    ]
    index = client.post("/v2/repository/index").json()
    assert [(one["name"], one["version"]) for one in index[:3]] == [("grey", "2"), ("grey", "9"), ("grey", "10")]
    assert client.get("/v1/models").json() == {"models": ["grey", "other"]}


def test_an_answer_of_a_version_is_audited_with_its_artefact(client: Client, folder: Path, tmp_path: Path) -> None:
    answer = client.post("/predict?model=champion", content=npy(IMAGE_HW), headers=NPY)
    (tmp_path / "answer.json").write_bytes(answer.content)
    (tmp_path / "image.npy").write_bytes(npy(IMAGE_HW))
    assert audit(tmp_path / "answer.json", tmp_path / "image.npy", folder / "grey" / "2").conclusion.value == "holds"
    forged = answer.json() | {"model": "other:2"}
    (tmp_path / "answer.json").write_text(json.dumps(forged))
    verdict = audit(tmp_path / "answer.json", tmp_path / "image.npy", folder / "grey" / "2")
    assert verdict.conclusion.value == "does not hold"


@pytest.mark.parametrize("default", ["grey:2", "champion"])
def test_the_default_model_is_a_version_or_an_alias(folder: Path, default: str, runner: asyncio.Runner) -> None:
    models = load(folder, default_model=default, aliases=ALIASES)
    assert [name for name, one in models.items() if one.is_warm] == ["grey:2"]
    client = Client(create_app(settings_of(folder, default_model=default, aliases=ALIASES), models), runner)
    assert client.post("/predict", content=npy(IMAGE_HW), headers=NPY).json()["model"] == "grey:2"
    assert client.get("/health/ready").status_code == 200


def test_the_only_model_is_the_default_also_with_versions(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from service.settings import read_settings

    (tmp_path / "cells").symlink_to(folder / "grey")
    monkeypatch.setenv("LIPCERT_MODELS", str(tmp_path))
    assert read_settings().default_model == "cells"


@pytest.mark.parametrize(
    ("aliases", "complaint"),
    [
        ("champion", "write ALIAS=MODEL once"),
        ("champion=grey,champion=other", "write ALIAS=MODEL once"),
        ("champion=", "stands for nothing"),
        ("a=b,b=a", "'b' is an alias itself"),
        ("a=a", "'a' is an alias itself"),
        ("grey:1=grey:2", "is no name"),
        ("a/b=grey", "is no name"),
    ],
)
def test_aliases_that_cannot_be_read_are_refused(aliases: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Settings(aliases=aliases)


@pytest.mark.parametrize("target", ["grey:3", "gray", "grey/2"])
def test_an_alias_of_nothing_ends_the_start(folder: Path, target: str) -> None:
    with pytest.raises(SettingsError, match=f"champion={target}, and .* has no such model; it has grey, grey:10"):
        load(folder, aliases=f"champion={target}")


def test_a_version_with_a_fault_leaves_the_name_to_the_older_one(tmp_path: Path, runner: asyncio.Runner) -> None:
    for version in (1, 2):
        write(tmp_path / "grey" / str(version), version, "grey")
    (tmp_path / "grey" / "2" / "model.onnx").write_bytes(b"garbage")
    models = load(tmp_path, aliases="new=grey:2")
    assert (models["grey"].name, list(models.broken)) == ("grey:1", ["grey:2"])
    client = Client(create_app(settings_of(tmp_path), models), runner)
    for path in ("/models/grey:2", "/models/new", "/v2/models/grey/versions/2"):
        assert client.get(path).status_code == 503
    for name in ("grey:2", "new"):
        assert client.post(f"/predict?model={name}", content=npy(IMAGE_HW), headers=NPY).status_code == 503
    assert client.post("/v2/repository/index").json()[-1] | {"reason": ""} == {
        "name": "grey",
        "version": "2",
        "state": "UNAVAILABLE",
        "reason": "",
    }
    for others in ({"strict": True}, {"default_model": "grey:2"}, {"default_model": "new", "aliases": "new=grey:2"}):
        with pytest.raises(ArtefactError, match="the card states the digest"):
            load(tmp_path, **others)
    (tmp_path / "grey" / "1" / "model.onnx").write_bytes(b"garbage")
    with pytest.raises(ArtefactError, match="the card states the digest"):
        load(tmp_path)


def test_names_that_collide_are_faults_of_the_later_artefact(tmp_path: Path, runner: asyncio.Runner) -> None:
    write(tmp_path / "grey" / "1", 1, "grey")
    write(tmp_path / "grey" / "2", 2, "stranger")
    write(tmp_path / "a", 3, "grey")
    write(tmp_path / "champion", 4, "champion")
    models = load(tmp_path, default_model="grey:1", aliases="champion=grey")
    assert list(models) == ["grey:1"]
    reasons = {name: str(error.reason) for name, error in models.broken.items()}
    assert "it names the model 'stranger', and the folder is a version of 'grey'" in reasons["grey:2"]
    assert "'grey' is taken by another artefact" in reasons["grey"]
    assert "'champion' is an alias" in reasons["champion"]
    # The names stand for what they stood for.
    client = Client(create_app(settings_of(tmp_path, default_model="grey:1", aliases="champion=grey"), models), runner)
    for name in ("grey", "champion"):
        answer = client.post(f"/predict?model={name}", content=npy(IMAGE_HW), headers=NPY).json()
        assert answer["model"] == "grey:1"
    for strict in ("grey:1", "champion"):
        with pytest.raises(ArtefactError):
            load(tmp_path, default_model=strict, aliases="champion=grey", strict=True)
