"""The option `novelty` in every form of request."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest
from client import HEIGHT, LIMITS, WIDTH, Client
from encoding import encode, npy
from guards import write_guarded

from service.api.app import create_app
from service.inference.loading import load_classifiers
from service.inference.served import Models
from service.settings import Settings

NPY = {"Content-Type": "application/x-npy"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    write_guarded(folder)
    return load_classifiers(Settings(models=folder, default_model="guarded", provider="cpu"))


@pytest.fixture(scope="module")
def client(models: Models, runner: asyncio.Runner) -> Client:
    return Client(create_app(Settings(default_model="guarded", **LIMITS), models), runner)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def image_NHW() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (4, HEIGHT, WIDTH), dtype=np.uint8)


def text(pixels: np.ndarray) -> str:
    return base64.b64encode(encode(pixels)).decode()


def assert_same(answer: dict[str, Any], wanted: dict[str, Any]) -> None:
    """In a batch of another size the last bits may differ."""
    assert answer.keys() == wanted.keys()
    for name, value in wanted.items():
        assert answer[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value)


def expected(models: Models, pixels: np.ndarray) -> dict[str, Any]:
    guard = models["guard"]
    (found,) = guard.predict(pixels[None, None] / 255.0, resize=True)
    return {
        "model": "guard",
        "digest": guard.digest,
        "novel": bool(found.logits_K[0] < 0),
        "score": float(found.logits_K[0]),
        "radius": found.radius,
        "certified": found.certified,
    }


def test_the_answer_has_the_decision_of_the_guard_only_where_it_is_asked(
    client: Client, models: Models, image_NHW: np.ndarray
) -> None:
    found = set[bool]()
    for pixels in image_NHW:
        asked = client.post("/predict", json={"image": text(pixels), "novelty": True}).json()
        plain = client.post("/predict", json={"image": text(pixels)}).json()
        novelty = asked.pop("novelty")
        assert_same(novelty, expected(models, pixels))
        assert "novelty" not in plain
        assert asked == plain
        found.add(novelty["novel"])
    assert found == {True, False}


def test_other_forms_of_requests_say_the_same(client: Client, models: Models, image_NHW: np.ndarray) -> None:
    wanted = [expected(models, pixels) for pixels in image_NHW]
    batch = {"images": [text(pixels) for pixels in image_NHW], "novelty": True, "counterfactual": True}
    answers = client.post("/predict/batch", json=batch).json()["predictions"]
    for answer, one in zip(answers, wanted, strict=True):
        assert_same(answer["novelty"], one)
        assert answer["counterfactual"] is not None
    headers = {**NPY, "Accept": "application/x-npy"}
    reply = client.post("/predict/batch", content=npy(image_NHW), headers=headers, params={"novelty": "true"})
    records = np.load(io.BytesIO(reply.content))
    tensor = {"name": "image", "shape": [4, 1, HEIGHT, WIDTH], "datatype": "UINT8", "data": image_NHW.ravel().tolist()}
    asked = {"inputs": [tensor], "parameters": {"novelty": True}}
    outputs = {
        output["name"]: output for output in client.post("/v2/models/guarded/infer", json=asked).json()["outputs"]
    }
    names = {"novel": "novel", "novelty_score": "score", "novelty_radius": "radius", "novelty_certified": "certified"}
    for name, member in names.items():
        values = [one[member] for one in wanted]
        assert records[name].tolist() == pytest.approx(values, rel=1e-12)
        assert outputs[name]["data"] == pytest.approx(values, rel=1e-12)
    plain = client.post("/predict/batch", content=npy(image_NHW), headers=headers)
    assert "novel" not in (np.load(io.BytesIO(plain.content)).dtype.names or ())


def test_the_protocol_describes_the_outputs_of_guarded_models_alone(client: Client) -> None:
    names = {
        model: [output["name"] for output in client.get(f"/v2/models/{model}").json()["outputs"]]
        for model in ("guarded", "guard")
    }
    assert names["guarded"] == [*names["guard"], "novel", "novelty_score", "novelty_radius", "novelty_certified"]


def test_a_model_without_a_guard_refuses_the_option(client: Client, image_NHW: np.ndarray) -> None:
    body = {"image": text(image_NHW[0]), "novelty": True, "model": "guard", "resize": True}
    response = client.post("/predict", json=body)
    assert response.status_code == 422
    problem = response.json()
    assert problem["type"] == "urn:problem-type:lipcert:novelty"
    assert "guard has no novelty model" in problem["detail"]
    assert "LIPCERT_NOVELTY_MODELS" in problem["detail"]


def test_a_value_that_is_not_bool_is_refused(client: Client, image_NHW: np.ndarray) -> None:
    response = client.post("/predict", json={"image": text(image_NHW[0]), "novelty": "perhaps"})
    assert response.status_code == 422
    assert "novelty is not valid" in response.json()["detail"]


def test_the_guard_answers_as_a_model_with_its_radius(client: Client, models: Models, image_NHW: np.ndarray) -> None:
    body = {"image": text(image_NHW[0]), "model": "guard", "resize": True}
    answer = client.post("/predict", json=body).json()
    wanted = expected(models, image_NHW[0])
    assert answer["label"] == ("novel" if wanted["novel"] else "known")
    assert answer["certificate"]["radius"] == pytest.approx(wanted["radius"], rel=1e-12)
