"""Requests that public clients of the protocols sent, byte for byte, on a socket; and answers of the shipped models.

`requests_of_clients.json` holds what tritonclient 2.73.0 (`tritonclient.http`) and kserve 0.21.0
(`InferenceRESTClient`) wrote to a relay in front of a server of the model `grey` of `conftest`, each call by a new
client; the host and the digest of the model were replaced. The images are `LEVELS`, as UINT8 or divided by 255.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import npy
from live_server import Answer, LiveServer
from protocol_answers import DTYPES, assert_are_those_of_predict, in_type, texts
from thorough import shipped_models

from service.api.app import create_app
from service.inference.classifier import Classifier
from service.settings import Settings

RECORDED = json.loads(Path(__file__).with_name("requests_of_clients.json").read_text())
CALLS = {f"{record['client'].split()[0]}: {record['call']}": base64.b64decode(record["request"]) for record in RECORDED}
INFERENCES = [call for call in CALLS if " infer" in call and ": v1 " not in call]
LEVELS = np.random.default_rng(4).integers(0, 256, (3, 1, HEIGHT, WIDTH), dtype=np.uint8)
NPY = {"Content-Type": "application/x-npy"}
ZOO = Path(__file__).resolve().parents[3] / "models" / "zoo"


@pytest.fixture(scope="module")
def server(classifiers: Mapping[str, Classifier]) -> Iterator[LiveServer]:
    app = create_app(Settings(default_model="grey"), classifiers)
    with LiveServer(app, refuse=app.state.refuse) as live:
        yield live


def replayed(server: LiveServer, call: str, digest: str) -> Answer:
    answer = server.ask(CALLS[call].replace(b"DIGEST", digest.encode()))
    assert answer.status == 200, answer.body
    return answer


def outputs(headers: Mapping[str, str], content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON object and the outputs of a response, read as the extension defines them."""
    coding = headers.get("content-encoding")
    content = {None: bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}[coding](content)
    length = int(headers.get("inference-header-content-length", len(content)))
    answer, rest = json.loads(content[:length]), content[length:]
    found: dict[str, np.ndarray] = {}
    for output in answer["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values: Any = output["data"]
        else:
            data, rest = rest[:size], rest[size:]
            assert "data" not in output
            values = texts(data) if output["datatype"] == "BYTES" else np.frombuffer(data, DTYPES[output["datatype"]])
        found[output["name"]] = np.array(values).reshape(output["shape"])
    assert rest == b""
    return answer, found


@pytest.mark.parametrize("call", CALLS)
def test_a_client_is_answered(server: LiveServer, client: Client, call: str) -> None:
    replayed(server, call, client.get("/models/grey").json()["digest"])


@pytest.mark.parametrize("call", INFERENCES)
def test_a_client_gets_the_bits_of_predict(server: LiveServer, client: Client, call: str) -> None:
    answer = replayed(server, call, client.get("/models/grey").json()["digest"])
    parsed, found = outputs(answer.headers, answer.body)
    datatype = next(name for name in ("UINT8", "FP32", "FP64") if name in call)
    batch = client.post("/predict/batch", content=npy(in_type(datatype, LEVELS)), headers=NPY).json()["predictions"]
    assert_are_those_of_predict(found, batch)
    assert parsed["id"] == ("42" if "id" in call or call.startswith("kserve") else None)
    assert ("counterfactual" in found) == ("counterfactual" in call)
    if "chosen" in call:
        assert list(found) == ["radius", "class_id", "logits", "proof", "certified"]
    coding = next((coding for coding in ("gzip", "deflate") if coding in call), None)
    assert answer.headers.get("content-encoding") in (None, coding)


def test_a_client_of_the_first_version_gets_the_predictions_of_the_batch(server: LiveServer, client: Client) -> None:
    batch = client.post("/predict/batch", content=npy(LEVELS / 255.0), headers=NPY).json()
    assert replayed(server, "kserve: v1 infer", "").json == batch
    explained = replayed(server, "kserve: v1 explain", "").json
    searched = client.post("/predict/batch?counterfactual=true", content=npy(LEVELS / 255.0), headers=NPY).json()
    assert explained["predictions"] == searched["predictions"]
    assert explained["explanations"] == [one["counterfactual"] for one in searched["predictions"]]
    assert replayed(server, "kserve: v1 is_model_ready", "").json == {"name": "grey", "ready": True}


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_answers_the_protocol_with_the_bits_of_predict(client: Client, name: str) -> None:
    classifier = Classifier.load(ZOO / name, "cpu", threads=1)
    shipped = Client(create_app(Settings(default_model=name), {name: classifier}), client._runner)
    levels = np.random.default_rng(5).integers(0, 256, (1, *classifier.input_shape), dtype=np.uint8)
    for datatype in ("UINT8", "FP32", "FP64"):
        array = in_type(datatype, levels)
        prediction = shipped.post("/predict", content=npy(array[0]), headers=NPY).json()
        tensor: dict[str, Any] = {"name": "image", "shape": list(array.shape), "datatype": datatype}
        numbers = {"inputs": [{**tensor, "data": array.ravel().tolist()}]}
        header = json.dumps(
            {
                "inputs": [{**tensor, "parameters": {"binary_data_size": array.nbytes}}],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        extension = {"Inference-Header-Content-Length": str(len(header))}
        infer = f"/v2/models/{name}/infer"
        for response in (
            shipped.post(infer, json=numbers),
            shipped.post(infer, content=header + array.tobytes(), headers=extension),
        ):
            assert response.status_code == 200, response.text
            assert_are_those_of_predict(outputs(response.headers, response.content)[1], [prediction])
