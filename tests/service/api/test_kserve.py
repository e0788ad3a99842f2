"""KServe V1: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import encode, npy

PREDICT, EXPLAIN = "/v1/models/grey:predict", "/v1/models/grey:explain"
NPY = {"Content-Type": "application/x-npy"}
LEVELS = np.random.default_rng(6).integers(0, 256, (3, 1, HEIGHT, WIDTH), dtype=np.uint8)
FILES = [{"b64": base64.b64encode(encode(image_CHW[0])).decode()} for image_CHW in LEVELS]


def batch(client: Client, pixels_NCHW: np.ndarray, query: str = "", model: str = "grey") -> Any:
    answer = client.post(f"/predict/batch?model={model}{query}", content=npy(pixels_NCHW), headers=NPY)
    assert answer.status_code == 200
    return answer.json()


@pytest.mark.parametrize(
    "instances",
    [
        (LEVELS / 255.0).tolist(),
        np.moveaxis(LEVELS / 255.0, 1, -1).tolist(),
        (LEVELS[:, 0] / 255.0).tolist(),
        FILES,
    ],
    ids=["C x H x W", "H x W x C", "H x W", "files"],
)
def test_predictions_are_those_of_the_batch(client: Client, instances: list[Any]) -> None:
    response = client.post(PREDICT, json={"instances": instances, "signature_name": "serving_default"})
    assert response.status_code == 200
    assert response.json() == batch(client, LEVELS)


def test_colour_images_are_those_of_the_batch(client: Client) -> None:
    pixels_NCHW = np.random.default_rng(8).integers(0, 256, (2, 3, HEIGHT, WIDTH)) / 255.0
    expected = batch(client, pixels_NCHW, model="colour")
    for array in (pixels_NCHW, np.moveaxis(pixels_NCHW, 1, -1)):
        response = client.post("/v1/models/colour:predict", json={"instances": array.tolist()})
        assert response.json() == expected


def test_the_options_are_parameters(client: Client) -> None:
    asked = {"instances": FILES, "parameters": {"epsilon": 0.5, "proof": "best"}}
    assert client.post(PREDICT, json=asked).json() == batch(client, LEVELS, "&epsilon=0.5&proof=best")


def test_explanations_are_counterfactuals(client: Client) -> None:
    answer = client.post(EXPLAIN, json={"instances": FILES}).json()
    expected = batch(client, LEVELS, "&counterfactual=true")
    assert answer["predictions"] == expected["predictions"]
    assert answer["explanations"] == [one["counterfactual"] for one in expected["predictions"]]
    for one in answer["explanations"]:
        again = client.post(PREDICT, json={"instances": [{"b64": one["image"]}]}).json()["predictions"]
        assert again[0]["class_id"] == one["class_id"]


def test_models_are_listed_and_ready(client: Client) -> None:
    assert client.get("/v1/models").json() == {"models": ["binary", "colour", "grey"]}
    assert client.get("/v1/models/grey").json() == {"name": "grey", "ready": True}


def test_the_type_of_the_body_does_not_matter_to_clients_that_send_none(client: Client) -> None:
    content = json.dumps({"instances": FILES}).encode()
    expected = client.post(PREDICT, content=content)
    assert expected.status_code == 200
    # curl -d sends the second one.
    for media_type in ("application/json", "application/x-www-form-urlencoded"):
        assert client.post(PREDICT, content=content, headers={"Content-Type": media_type}).content == expected.content
    assert client.post(PREDICT, content=content, headers={"Content-Type": "text/plain"}).status_code == 415


ZERO = np.zeros((HEIGHT, WIDTH)).tolist()
BAD: dict[str, tuple[Any, int, str]] = {
    "nothing": ({}, 422, "instances"),
    "an empty list": ({"instances": []}, 422, "instances"),
    "an object": ({"instances": {}}, 422, "instances"),
    "numbers": ({"instances": [0.5, 0.5]}, 422, "shape (2,)"),
    "five axes": ({"instances": [[[ZERO]]]}, 422, "shape (1, 1, 1, 4, 5)"),
    "six axes": ({"instances": [[[[ZERO]]]]}, 422, "numbers of one shape"),
    "an empty image": ({"instances": [[]]}, 422, "numbers of one shape"),
    "ragged": ({"instances": [ZERO, ZERO[:-1]]}, 422, "numbers of one shape"),
    "texts": ({"instances": [[["0"] * WIDTH] * HEIGHT]}, 422, "numbers of one shape"),
    "truths": ({"instances": [[[True] * WIDTH] * HEIGHT]}, 422, "numbers of one shape"),
    "null": ({"instances": [None]}, 422, "numbers of one shape"),
    "beyond float64": ({"instances": [[[10**400] * WIDTH] * HEIGHT]}, 422, "beyond float64"),
    "grey levels": ({"instances": [[[255] * WIDTH] * HEIGHT]}, 422, "divide 0..255 by 255"),
    "another size": ({"instances": [np.zeros((5, 4)).tolist()]}, 422, "takes 4 x 5"),
    "other channels": ({"instances": [np.zeros((3, HEIGHT, WIDTH)).tolist()]}, 422, "channel"),
    "many images": ({"instances": [ZERO] * 5}, 413, "1 to 4 per batch"),
    "many pixels": ({"instances": np.zeros((1, 46, 46)).tolist()}, 413, "2116 pixels"),
    "a file that is none": ({"instances": [{"b64": "AAAA"}]}, 422, "image 0"),
    "no base64": ({"instances": [{"b64": "*"}]}, 422, "base64"),
    "a number for a file": ({"instances": [{"b64": 1}]}, 422, "no image file"),
    "another member": ({"instances": [{"b64": "AAAA", "key": "1"}]}, 422, "no image file"),
    "a file among numbers": ({"instances": [ZERO, FILES[0]]}, 422, "numbers of one shape"),
    "numbers among files": ({"instances": [FILES[0], ZERO]}, 422, "no image file"),
    "another signature": ({"instances": [ZERO], "signature_name": "x"}, 422, "signature_name"),
    "unknown parameter": ({"instances": [ZERO], "parameters": {"model": "grey"}}, 422, "unknown field"),
    "unknown member": ({"instances": [ZERO], "inputs": []}, 422, "unknown"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_instances_are_problems_that_the_protocol_can_read(client: Client, kind: str) -> None:
    body, status, expected = BAD[kind]
    response = client.post(PREDICT, json=body)
    assert response.status_code == status, response.text
    assert expected in response.json()["detail"]
    assert response.json()["error"] == response.json()["detail"]
    # The client of KServe shows the error of this type alone.
    assert response.headers["content-type"] == "application/json"
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_an_unknown_model_or_verb_is_not_there(client: Client) -> None:
    for response in (client.get("/v1/models/x"), client.post("/v1/models/x:predict", json={"instances": FILES})):
        assert response.status_code == 404
        assert "available models: binary, colour, grey" in response.json()["error"]
    assert "error" in client.post("/v1/models/grey:classify").json()


def test_the_query_is_not_lost_in_silence(client: Client) -> None:
    assert client.post(f"{PREDICT}?epsilon=1", json={"instances": FILES}).status_code == 422
