"""`GET /models/{name}/samples/{n}`: the samples of an artefact, and 404 for everything else."""

from __future__ import annotations

import builders
import numpy as np
import pytest
from client import Client

from service.api.app import create_app
from service.pixels.images import encode_png
from service.settings import Settings

PNG = encode_png(np.arange(16, dtype=np.uint8).reshape(1, 4, 4))


@pytest.fixture(scope="module")
def sampled(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Client:
    folder = tmp_path_factory.mktemp("sampled")
    for name in ("with", "without"):
        builders.write(folder / name, builders.random_groupsort(0), name)
    (folder / "with" / "samples").mkdir()
    (folder / "with" / "samples" / "0-2.png").write_bytes(PNG)
    return Client(create_app(Settings(models=folder, default_model="with", provider="cpu")), client._runner)


def test_a_sample_is_served_as_it_is_and_its_class_is_in_the_description(sampled: Client) -> None:
    assert sampled.get("/models/with").json()["samples"] == [{"class_id": 2, "label": "class 2"}]
    answer = sampled.get("/models/with/samples/0")
    assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, "image/png", PNG)
    assert sampled.request("HEAD", "/models/with/samples/0").status_code == 200
    assert sampled.post("/predict", content=PNG, headers={"Content-Type": "image/png"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("with/samples/1", "has 1 sample images, numbered from 0"),
        ("with/samples/-1", "has 1 sample images, numbered from 0"),
        ("with/samples/00", "has 1 sample images, numbered from 0"),
        ("with/samples/" + "9" * 5000, "has 1 sample images, numbered from 0"),
        ("with/samples/%C2%B2", "has 1 sample images, numbered from 0"),
        ("without/samples/0", "has 0 sample images"),
        ("other/samples/0", "available models: with, without"),
    ],
)
def test_what_is_no_sample_is_404_with_a_reason(sampled: Client, path: str, remedy: str) -> None:
    answer = sampled.get(f"/models/{path}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert remedy in answer.json()["detail"]


def test_a_model_without_samples_says_so(sampled: Client) -> None:
    assert sampled.get("/models/without").json()["samples"] == []


def test_the_documentation_fills_in_a_number_that_every_model_with_samples_has(sampled: Client) -> None:
    (operation,) = sampled.get("/openapi.json").json()["paths"]["/models/{name}/samples/{n}"].values()
    (number,) = (parameter for parameter in operation["parameters"] if parameter["name"] == "n")
    assert number["example"] == "0"
