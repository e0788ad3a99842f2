"""Open Inference Protocol, version 2: https://github.com/kserve/open-inference-protocol."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import npy

from service import __version__
from service.api.app import create_app
from service.inference.classifier import Classifier, View
from service.settings import Settings

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
    assert "binary_tensor_data" in server["extensions"]
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


def binary(
    array: np.ndarray, datatype: str, length: int | str | None = None, size: Any = None, **fields: Any
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with the bytes of its tensor; with a wrong length or size, if one is given."""
    parameters = {"binary_data_size": array.nbytes if size is None else size}
    tensor = {"name": "image", "shape": list(array.shape), "datatype": datatype, "parameters": parameters}
    header = json.dumps({"inputs": [tensor], **fields}).encode()
    declared = str(len(header) if length is None else length)
    return header + array.tobytes(), {"Inference-Header-Content-Length": declared}


@pytest.mark.parametrize("padding", [0, 5_000])
@pytest.mark.parametrize(("datatype", "dtype"), [("UINT8", "u1"), ("FP16", "<f2"), ("FP32", "<f4"), ("FP64", "<f8")])
def test_bytes_mean_what_numbers_mean(
    client: Client, levels_NCHW: np.ndarray, datatype: str, dtype: str, padding: int
) -> None:
    array = (levels_NCHW if datatype == "UINT8" else levels_NCHW / 255.0).astype(dtype)
    # A long JSON object is read in another process.
    more = {"outputs": [{"name": name, "parameters": {"note": "x" * padding}} for name in ("logits", "radius")]}
    content, headers = binary(array, datatype, **more)
    expected = client.post(
        INFER, json={**question(array, datatype), "outputs": [{"name": "logits"}, {"name": "radius"}]}
    )
    response = client.post(INFER, content=content, headers=headers)
    assert (response.status_code, response.content) == (200, expected.content)


BAD_BYTES: dict[str, tuple[dict[str, Any], int, str]] = {
    "no size": ({"size": []}, 422, "binary_data_size"),
    "a size too small": ({"size": 159}, 422, "160 bytes follow the JSON and binary_data_size is 159; expected 160"),
    "a size too large": ({"size": 2**62}, 422, "expected 160"),
    "a size beyond 64 bits": ({"size": 10**400}, 422, "binary_data_size"),
    "a negative size": ({"size": -160}, 422, "binary_data_size"),
    "a size in text": ({"size": "160"}, 422, "binary_data_size"),
    "no bytes": ({"array": np.zeros((0, 1, HEIGHT, WIDTH)), "size": 0}, 422, "inputs.0.shape"),
    "a length of 0": ({"length": 0}, 400, "Inference-Header-Content-Length is '0'"),
    "a negative length": ({"length": -1}, 400, "Inference-Header-Content-Length"),
    "a length beyond the body": ({"length": 10_000}, 400, "Inference-Header-Content-Length"),
    "a length of many digits": ({"length": "9" * 5000}, 400, "Inference-Header-Content-Length"),
    "a length in text": ({"length": "many"}, 400, "Inference-Header-Content-Length"),
    "a length too short": ({"length": 100}, 400, "is not JSON"),
    "another datatype": ({"datatype": "FP32"}, 422, "expected 80"),
    "not a number": ({"array": np.full((1, 1, HEIGHT, WIDTH), np.nan)}, 422, "expected in [0, 1]"),
    "another model": ({"model_name": "binary"}, 422, "model_name is 'binary'"),
    "shared memory": ({"outputs": [{"name": "radius", "parameters": {"shared_memory_region": "x"}}]}, 422, "shared"),
    "classification": ({"outputs": [{"name": "logits", "parameters": {"classification": 3}}]}, 422, "classification"),
    "a sequence": ({"parameters": {"sequence_id": 1}}, 422, "parameters.sequence_id is an unknown field"),
    "a negative timeout": ({"parameters": {"timeout": -1}}, 422, "timeout"),
    "a timeout in text": ({"parameters": {"timeout": "1"}}, 422, "timeout"),
    "binary_data in text": (
        {"outputs": [{"name": "logits", "parameters": {"binary_data": "yes"}}]},
        422,
        "binary_data",
    ),
}


@pytest.mark.parametrize("kind", BAD_BYTES)
def test_bad_bytes_are_problems_that_the_protocol_can_read(client: Client, kind: str) -> None:
    changes, status, expected = BAD_BYTES[kind]
    content, headers = binary(**({"array": np.zeros((1, 1, HEIGHT, WIDTH)), "datatype": "FP64"} | changes))
    response = client.post(INFER, content=content, headers=headers)
    assert response.status_code == status, response.text
    assert expected in response.json()["detail"]
    assert response.json()["error"] == response.json()["detail"]


def test_bytes_beside_numbers_and_bytes_without_a_length_are_refused(client: Client) -> None:
    content, headers = binary(np.zeros((1, 1, HEIGHT, WIDTH)), "FP64")
    assert "not JSON" in client.post(INFER, content=content).json()["detail"]
    both = {"inputs": [{**GOOD["inputs"][0], "parameters": {"binary_data_size": 160}}]}
    header = json.dumps(both).encode()
    headers["Inference-Header-Content-Length"] = str(len(header))
    response = client.post(INFER, content=header + bytes(160), headers=headers)
    assert "send one of them" in response.json()["detail"]
    # Bytes after an object without a size.
    header = json.dumps(GOOD).encode()
    headers["Inference-Header-Content-Length"] = str(len(header))
    response = client.post(INFER, content=header + bytes(160), headers=headers)
    assert "binary_data_size is None" in response.json()["detail"]


@pytest.mark.parametrize("end", ["", "/ready", "/config"])
def test_the_version_of_a_model_is_the_digest_of_its_bytes(client: Client, end: str) -> None:
    digest = client.get("/models/grey").json()["digest"]
    assert client.get(f"/v2/models/grey/versions/{digest}{end}").json() == client.get(f"/v2/models/grey{end}").json()
    for path in (f"/v2/models/grey/versions/1{end}", f"/v2/models/binary/versions/{digest}{end}"):
        response = client.get(path)
        assert response.status_code == 404
        assert "has no version" in response.json()["error"]


def test_a_request_for_a_version_is_answered_by_that_version_alone(client: Client) -> None:
    digest = client.get("/models/grey").json()["digest"]
    response = client.post(f"/v2/models/grey/versions/{digest}/infer", json=GOOD)
    assert response.content == client.post(INFER, json=GOOD).content
    assert client.post("/v2/models/grey/versions/2/infer", json=GOOD).status_code == 404


def test_explain_is_infer_with_a_counterfactual(client: Client) -> None:
    wanted = client.post(INFER, json={**GOOD, "parameters": {"counterfactual": True}})
    assert client.post("/v2/models/grey/explain", json=GOOD).content == wanted.content


def test_the_configuration_has_the_shapes_of_one_image(client: Client) -> None:
    config = client.get("/v2/models/grey/config").json()
    assert config["max_batch_size"] == 4
    assert config["input"] == [{"name": "image", "data_type": "TYPE_FP64", "dims": [1, HEIGHT, WIDTH]}]
    types = {output["name"]: (output["data_type"], output["dims"]) for output in config["output"]}
    assert types["logits"] == ("TYPE_FP64", [3])
    assert types["proof"] == ("TYPE_STRING", [])


def test_the_index_lists_all_models(client: Client) -> None:
    names = ["binary", "colour", "grey"]
    assert client.get("/v2/models").json() == {"models": names}
    for content in (b"", b"{}", b'{"ready": true}'):
        index = client.post("/v2/repository/index", content=content).json()
        assert [(model["name"], model["state"]) for model in index] == [(name, "READY") for name in names]
    for content, status in ((b"{" + b" " * 2000, 413), (b"[]", 400), (b'{"ready": 1}', 422), (b'{"name": "x"}', 422)):
        response = client.post("/v2/repository/index", content=content)
        assert response.status_code == status
        assert "error" in response.json()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/stats", 501),
        ("GET", "/v2/models/grey/stats", 501),
        ("GET", "/v2/trace/setting", 404),
        ("GET", "/v2/logging", 404),
        ("GET", "/v2/systemsharedmemory/status", 404),
        ("POST", "/v2/models/grey", 405),
        ("GET", INFER, 405),
    ],
)
def test_what_the_server_does_not_have_is_an_error_of_the_protocol(
    client: Client, method: str, path: str, status: int
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"] == response.json()["detail"]


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


@pytest.mark.parametrize("is_binary", [False, True])
def test_a_timeout_is_a_deadline(
    classifiers: Mapping[str, Classifier], runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, is_binary: bool
) -> None:
    """Both of a request that the event loop decodes and of one that a worker does."""
    settings = Settings(default_model="grey", max_pixels=10**6, max_batch=1000)
    fresh = Client(create_app(settings, classifiers), runner)
    waiting = threading.Event()
    classify = View.classify
    monkeypatch.setattr(View, "classify", lambda *arguments: waiting.wait(20) and classify(*arguments))
    array = np.zeros((600 if is_binary else 1, 1, HEIGHT, WIDTH))
    started_s = time.monotonic()
    if is_binary:
        content, headers = binary(array, "FP64", parameters={"timeout": 300_000})
        response = fresh.post(INFER, content=content, headers=headers)
    else:
        response = fresh.post(INFER, json=question(array, "FP64", parameters={"timeout": 300_000, "priority": 1}))
    assert (response.status_code, response.json()["type"]) == (503, "urn:problem-type:lipcert:deadline")
    assert "no answer within 0.3 s" in response.json()["error"]
    assert 0.3 <= time.monotonic() - started_s < 15.0
    waiting.set()
    unlimited = question(array[:1], "FP64", parameters={"timeout": 0})
    assert fresh.post(INFER, json=unlimited).status_code == 200
    fresh.app.state.service.batcher.close()


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
