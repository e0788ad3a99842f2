"""The options `coverage` and `max_error` in every form of request."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Mapping
from typing import Any

import builders
import httpx
import numpy as np
import pytest
from client import HEIGHT, LIMITS, WIDTH, Client
from encoding import encode, npy

from service.api.app import create_app
from service.artefact.card import AcceptanceThreshold, Calibration, ConformalQuantile
from service.inference.classifier import Classifier
from service.settings import Settings

NPY = {"Content-Type": "application/x-npy"}


@pytest.fixture(scope="module")
def models() -> Mapping[str, Classifier]:
    shape = (1, HEIGHT, WIDTH)
    plain, model = (builders.load(builders.random_groupsort(2, shape, 4), name) for name in ("plain", "calibrated"))
    block = Calibration(
        model=model.digest,
        n=99,
        source="drawn",
        confidence=0.95,
        quantiles=[ConformalQuantile(coverage=0.5, quantile=0.4), ConformalQuantile(coverage=0.9, quantile=-0.1)],
        thresholds=[AcceptanceThreshold(radius=0.2, accepted=50, errors=0, error_bound=0.1)],
    )
    model.card = model.card.model_copy(update={"calibration": block})
    return {"calibrated": model, "plain": plain}


@pytest.fixture(scope="module")
def client(models: Mapping[str, Classifier], runner: asyncio.Runner) -> Client:
    return Client(create_app(Settings(default_model="calibrated", **LIMITS), models), runner)


@pytest.fixture(scope="module")
def image_NHW() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (4, HEIGHT, WIDTH), dtype=np.uint8)


def text(pixels: np.ndarray) -> str:
    return base64.b64encode(encode(pixels)).decode()


FORMS: dict[str, Callable[[Client, np.ndarray, dict[str, Any]], httpx.Response]] = {
    "json": lambda client, pixels, options: client.post("/predict", json={"image": text(pixels), **options}),
    "form": lambda client, pixels, options: client.post(
        "/predict",
        files={"image": ("x.png", encode(pixels), "image/png")},
        data={name: str(value) for name, value in options.items()},
    ),
    "image body": lambda client, pixels, options: client.post(
        "/predict", content=encode(pixels), headers={"Content-Type": "image/png"}, params=options
    ),
    "npy body": lambda client, pixels, options: client.post(
        "/predict", content=npy(pixels), headers=NPY, params=options
    ),
}


def expected_set(model: Classifier, pixels: np.ndarray, quantile: float, epsilon: float) -> list[dict[str, Any]]:
    """By the definition, with room for rounding: no score of the images lies there."""
    (logits_K,), _ = model.classify(pixels[None, None] / 255.0)
    bounds_KK, classes = model.certificate.margin_bounds_KK, range(4)
    score_K = [min((logits_K[k] - logits_K[j]) / bounds_KK[k, j] for j in classes if j != k) for k in classes]
    assert min(abs(score + epsilon - quantile) for score in score_K) > 1e-9
    kept = [k for k in classes if score_K[k] + epsilon >= quantile or k == int(np.argmax(logits_K))]
    return [{"class_id": k, "label": f"class {k}"} for k in kept]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("coverage", "quantile"), [(0.4, 0.4), (0.9, -0.1)])
@pytest.mark.parametrize("epsilon", [0.0, 0.15])
def test_every_form_gives_the_set_in_class_order(
    client: Client,
    models: Mapping[str, Classifier],
    image_NHW: np.ndarray,
    form: str,
    coverage: float,
    quantile: float,
    epsilon: float,
) -> None:
    options = {"coverage": coverage, **({"epsilon": epsilon} if epsilon else {})}
    sizes = set[int]()
    for pixels in image_NHW:
        answer = FORMS[form](client, pixels, options).json()
        assert answer["set"] == expected_set(models["calibrated"], pixels, quantile, epsilon)
        assert (answer["coverage"], answer["max_error"], answer["decision"]) == (coverage, None, None)
        sizes.add(len(answer["set"]))
    assert quantile > 0 or len(sizes) > 1


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_decision(client: Client, image_NHW: np.ndarray, form: str) -> None:
    found = set[str]()
    for pixels in image_NHW:
        answer = FORMS[form](client, pixels, {"max_error": 0.1}).json()
        assert answer["decision"] == ("accept" if answer["certificate"]["radius"] >= 0.2 else "abstain")
        assert (answer["max_error"], answer["coverage"], answer["set"]) == (0.1, None, None)
        found.add(answer["decision"])
    assert found == {"accept", "abstain"}


def test_batch_records_and_the_open_inference_protocol_say_the_same(client: Client, image_NHW: np.ndarray) -> None:
    options: dict[str, Any] = {"coverage": 0.9, "max_error": 0.1, "epsilon": 0.15}
    batch = {"images": [text(pixels) for pixels in image_NHW], **options}
    answers = client.post("/predict/batch", json=batch).json()["predictions"]
    assert answers == [FORMS["json"](client, pixels, options).json() for pixels in image_NHW]
    member_NK = [[any(entry["class_id"] == k for entry in answer["set"]) for k in range(4)] for answer in answers]
    decisions = [answer["decision"] for answer in answers]
    reply = client.post(
        "/predict/batch", content=npy(image_NHW), headers={**NPY, "Accept": "application/x-npy"}, params=options
    )
    records = np.load(io.BytesIO(reply.content))
    assert records["set"].tolist() == member_NK
    assert records["decision"].tolist() == decisions
    tensor = {"name": "image", "shape": [4, 1, HEIGHT, WIDTH], "datatype": "UINT8", "data": image_NHW.ravel().tolist()}
    asked = {"inputs": [tensor], "parameters": options, "outputs": [{"name": "set"}, {"name": "decision"}]}
    found = client.post("/v2/models/calibrated/infer", json=asked).json()["outputs"]
    assert (found[0]["shape"], found[0]["datatype"]) == ([4, 4], "BOOL")
    assert np.reshape(found[0]["data"], (4, 4)).tolist() == member_NK
    assert (found[1]["data"], found[1]["datatype"]) == (decisions, "BYTES")


def test_the_protocol_describes_set_and_decision_of_calibrated_models_alone(client: Client) -> None:
    names = {
        model: [output["name"] for output in client.get(f"/v2/models/{model}").json()["outputs"]]
        for model in ("calibrated", "plain")
    }
    assert names["calibrated"] == [*names["plain"], "set", "decision"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "coverage 0": ({"coverage": 0.0}, "coverage is not valid; expected a number above 0 and below 1"),
    "coverage 1": ({"coverage": 1.0}, "coverage is not valid"),
    "coverage 95": ({"coverage": 95}, "coverage is not valid"),
    "max_error 0": ({"max_error": 0.0}, "max_error is not valid; expected a number above 0 and below 1"),
    "max_error 1": ({"max_error": 1.0}, "max_error is not valid"),
    "too much coverage": ({"coverage": 0.91}, "coverage 0.91 is above 0.9, the largest"),
    "too little error": ({"max_error": 0.09}, "max_error 0.09 is below 0.1, the smallest"),
    "coverage, no calibration": ({"coverage": 0.5, "model": "plain"}, "plain is not calibrated, which coverage needs"),
    "error, no calibration": ({"max_error": 0.5, "model": "plain"}, "plain is not calibrated, which max_error needs"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_answered_is_a_problem(client: Client, image_NHW: np.ndarray, form: str, kind: str) -> None:
    options, expected = BAD[kind]
    response = FORMS[form](client, image_NHW[0], options)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert expected in problem["detail"]
    wanted = "option" if "not valid" in expected else "calibration"
    assert problem["type"] == f"urn:problem-type:lipcert:{wanted}"


def test_the_protocol_refuses_in_the_same_words(client: Client, image_NHW: np.ndarray) -> None:
    tensor = {
        "name": "image",
        "shape": [1, 1, HEIGHT, WIDTH],
        "datatype": "UINT8",
        "data": image_NHW[0].ravel().tolist(),
    }
    for options, expected in ({"coverage": 0.95}, "is above 0.9"), ({"max_error": 2.0}, "max_error is not valid"):
        response = client.post("/v2/models/calibrated/infer", json={"inputs": [tensor], "parameters": options})
        assert response.status_code == 422
        assert expected in response.json()["error"]
    unasked = {"inputs": [tensor], "outputs": [{"name": "set"}]}
    assert "set requires coverage" in client.post("/v2/models/calibrated/infer", json=unasked).json()["detail"]


def test_the_card_of_a_model_has_its_calibration(client: Client) -> None:
    assert client.get("/models/calibrated").json()["card"]["calibration"]["n"] == 99
    assert client.get("/models/plain").json()["card"]["calibration"] is None
