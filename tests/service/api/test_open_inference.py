"""Open Inference Protocol, version 2: https://github.com/kserve/open-inference-protocol."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import npy

from service import __version__

INFER = "/v2/models/grey/infer"
NPY = {"Content-Type": "application/x-npy"}
ALL = {"counterfactual": True, "strength": 2.0, "path": 3, "saliency": True}
"""Parameters that give every output of a model without calibration."""


def question(array: np.ndarray, datatype: str, nested: bool = False, **fields: Any) -> dict[str, Any]:
    data = array.tolist() if nested else array.ravel().tolist()
    tensor = {"name": "image", "shape": list(array.shape), "datatype": datatype, "data": data}
    return {"inputs": [tensor], **fields}


def outputs(answer: dict[str, Any]) -> dict[str, np.ndarray]:
    return {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in answer["outputs"]}


@pytest.fixture
def levels_NCHW() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (3, 1, HEIGHT, WIDTH), dtype=np.uint8)


def test_the_server_and_its_models_describe_themselves(client: Client) -> None:
    server = client.get("/v2").json()
    assert (server["name"], server["version"]) == ("lipcert", __version__)
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/grey/ready").json() == {"name": "grey", "ready": True}
    model = client.get("/v2/models/grey").json()
    assert model["inputs"] == [{"name": "image", "datatype": "FP64", "shape": [-1, 1, HEIGHT, WIDTH]}]
    question_outputs = client.post(INFER, json={**GOOD, "parameters": ALL}).json()["outputs"]
    assert [(output["name"], output["datatype"]) for output in model["outputs"]] == [
        (output["name"], output["datatype"]) for output in question_outputs
    ]
    assert model["parameters"] == {
        "labels": ["class 0", "class 1", "class 2"],
        "card_digest": client.get("/models/grey").json()["card_digest"],
        "provider": "CPUExecutionProvider",
    }
    assert model["versions"] == [client.get("/models/grey").json()["digest"]]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("datatype", ["UINT8", "FP64"])
def test_it_answers_as_predict_does(client: Client, levels_NCHW: np.ndarray, datatype: str, nested: bool) -> None:
    array = levels_NCHW if datatype == "UINT8" else levels_NCHW / 255.0
    answer = client.post(INFER, json=question(array, datatype, nested, id="42")).json()
    assert (answer["model_name"], answer["id"]) == ("grey", "42")
    found = outputs(answer)
    batch = client.post("/predict/batch", content=npy(levels_NCHW), headers=NPY).json()["predictions"]
    assert found["class_id"].tolist() == [one["class_id"] for one in batch]
    assert found["radius"].tolist() == [one["certificate"]["radius"] for one in batch]
    assert found["certified"].tolist() == [one["certificate"]["certified"] for one in batch]
    assert found["logits"].tolist() == [one["logits"] for one in batch]
    assert found["image_digest"].tolist() == [one["image"]["digest"] for one in batch]
    assert answer["model_version"] == batch[0]["digest"]


def test_fp32_values_are_read_as_float32(client: Client) -> None:
    array = np.full((1, 1, HEIGHT, WIDTH), 0.1)
    single = outputs(client.post(INFER, json=question(array, "FP32")).json())["logits"]
    exact = outputs(client.post(INFER, json=question(array.astype(np.float32).astype(float), "FP64")).json())["logits"]
    assert np.array_equal(single, exact)


def test_counterfactuals_come_where_they_are_asked_for(client: Client, levels_NCHW: np.ndarray) -> None:
    asked = question(levels_NCHW, "UINT8", parameters={"counterfactual": True})
    found = outputs(client.post(INFER, json=asked).json())
    assert found["counterfactual"].shape == levels_NCHW.shape
    assert found["counterfactual_reached"].all()
    assert (found["counterfactual_distance"] >= found["radius"]).all()
    again = outputs(client.post(INFER, json=question(found["counterfactual"], "UINT8")).json())
    assert np.array_equal(again["class_id"], found["counterfactual_class_id"])


def test_the_best_proof_is_that_of_predict(client: Client, levels_NCHW: np.ndarray) -> None:
    asked = question(levels_NCHW, "UINT8", parameters={"proof": "best"})
    found = outputs(client.post(INFER, json=asked).json())
    batch = client.post("/predict/batch", content=npy(levels_NCHW), headers=NPY, params={"proof": "best"}).json()
    for radius, proof, references, one in zip(
        found["radius"], found["proof"], found["references"], batch["predictions"], strict=True
    ):
        assert proof == "best"
        assert radius == one["certificate"]["radius"]
        assert json.loads(references) == one["certificate"]["references"]


def test_only_the_wanted_outputs_come_in_their_order(client: Client, levels_NCHW: np.ndarray) -> None:
    asked = question(levels_NCHW, "UINT8", outputs=[{"name": "radius"}, {"name": "class_id"}])
    answer = client.post(INFER, json=asked).json()
    assert [output["name"] for output in answer["outputs"]] == ["radius", "class_id"]


def test_parameters_of_an_output_may_be_anything(client: Client, levels_NCHW: np.ndarray) -> None:
    deep: Any = 1.0
    for _ in range(400):
        deep = [deep]
    asked = question(levels_NCHW, "UINT8", outputs=[{"name": "radius", "parameters": {"a": deep}}])
    assert client.post(INFER, json=asked).status_code == 200


GOOD = question(np.zeros((1, 1, HEIGHT, WIDTH)), "FP64")


def changed(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{**GOOD["inputs"][0], **fields}]}


BAD: dict[str, tuple[Any, int, str]] = {
    "no inputs": ({}, 422, "inputs"),
    "another input": (changed(name="pixels"), 422, "inputs.0.name"),
    "another datatype": (changed(datatype="BYTES"), 422, "inputs.0.datatype"),
    "three axes": (changed(shape=[1, HEIGHT, WIDTH]), 422, "inputs.0.shape"),
    "sides of 4,000 digits": (changed(shape=[1, 1, 10**4000, 10**4000]), 422, "inputs.0.shape"),
    "no image": (changed(shape=[0, 1, HEIGHT, WIDTH]), 422, "inputs.0.shape"),
    "too few values": (changed(data=[0.0]), 422, "expected 20 numbers"),
    "ragged values": (changed(data=[[0.0], [0.0, 1.0]]), 422, "ragged"),
    "text": (changed(data=["0"] * 20), 422, "is not numbers"),
    "booleans": (changed(data=[True] * 20), 422, "is not numbers"),
    "floats as uint8": (changed(datatype="UINT8"), 422, "is not numbers of type UINT8"),
    "uint8 above 255": (changed(datatype="UINT8", data=[256] * 20), 422, "0..255"),
    "huge integer": (changed(datatype="UINT8", data=[10**30] * 20), 422, "numbers"),
    "above 1": (changed(data=[1.5] * 20), 422, "expected in [0, 1]"),
    "another size": (changed(shape=[1, 1, WIDTH, HEIGHT]), 422, "takes 4 x 5"),
    "other channels": (changed(shape=[1, 2, 2, 5]), 422, "channel"),
    "too many images": (changed(shape=[5, 1, 4, 1]), 413, "1 to 4 per batch"),
    "too many pixels": (changed(shape=[1, 1, 100, 100]), 413, "2000 pixels"),
    "unknown field": ({**GOOD, "model": "grey"}, 422, "known fields"),
    "unknown parameter": ({**GOOD, "parameters": {"model": "grey"}}, 422, "parameters.model is an unknown field"),
    "target alone": ({**GOOD, "parameters": {"target": "class 1"}}, 422, "set counterfactual=true"),
    "unknown target": (
        {**GOOD, "parameters": {"counterfactual": True, "target": "x"}},
        422,
        "its labels are: class 0",
    ),
    "an output twice": ({**GOOD, "outputs": [{"name": "radius"}] * 2}, 422, "name each once"),
    "many outputs": ({**GOOD, "outputs": [{"name": f"n{n}"} for n in range(65)]}, 422, "outputs"),
    "a long id": ({**GOOD, "id": "i" * 1025}, 422, "id"),
    "a text for data": (changed(data="0" * 20), 422, "data is no list"),
    "a truth among numbers": (changed(data=[0.0] * 19 + [True]), 422, "is not numbers"),
    "a number beyond float64": (changed(data=[10**400] * 20), 422, "beyond float64"),
    "half floats that overflow": (changed(datatype="FP16", data=[1e9] * 20), 422, "expected in [0, 1]"),
    "nested to another depth": (changed(data=[[0.0] * 20]), 422, "ragged"),
    "unknown output": ({**GOOD, "outputs": [{"name": "softmax"}]}, 422, "available outputs: logits, class_id"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_questions_are_problems_that_the_protocol_can_read(client: Client, kind: str) -> None:
    body, status, expected = BAD[kind]
    response = client.post(INFER, json=body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    members = response.json()
    assert expected in members["detail"]
    assert members["error"] == members["detail"]


def test_a_body_without_content_type_is_read_as_json(client: Client) -> None:
    content = json.dumps(GOOD).encode()
    bare = client.post(INFER, content=content)
    assert bare.status_code == 200
    assert bare.content == client.post(INFER, json=GOOD).content
    assert client.post(INFER, content=content, headers={"Content-Type": "text/plain"}).status_code == 415


def test_an_unknown_model_is_not_found(client: Client) -> None:
    for response in (
        client.get("/v2/models/x"),
        client.get("/v2/models/x/ready"),
        client.post("/v2/models/x/infer", json=GOOD),
    ):
        assert response.status_code == 404
        assert "available models: binary, colour, grey" in response.json()["error"]


def test_the_query_is_not_lost_in_silence(client: Client) -> None:
    assert client.post(f"{INFER}?resize=true", json=GOOD).status_code == 422
