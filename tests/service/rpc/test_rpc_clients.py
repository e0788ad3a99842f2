"""Calls that public clients made, message for message, and answers of the shipped models over gRPC.

`calls_of_clients.json` holds the messages that tritonclient 2.73.0 (`tritonclient.grpc`) and kserve 0.21.0
(`InferenceGRPCClient`) sent to a relay in front of a server of the model `grey` of `conftest`, each call by a new
client. The images are `LEVELS`, as UINT8 or divided by 255.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import npy
from google.protobuf.message import Message
from protocol_answers import DTYPES, assert_are_those_of_predict, in_type, texts
from rpc_server import Caller, LiveRpcServer, infer_request

from service.api.app import create_app
from service.inference.classifier import Classifier
from service.rpc import open_inference_pb2 as protocol
from service.settings import Settings

RECORDED = json.loads(Path(__file__).with_name("calls_of_clients.json").read_text())
CALLS = {
    f"{record['client'].split()[0]}: {record['call']}": (record["method"], base64.b64decode(record["request"]))
    for record in RECORDED
}
INFERENCES = [call for call in CALLS if " infer" in call]
LEVELS = np.random.default_rng(4).integers(0, 256, (3, 1, HEIGHT, WIDTH), dtype=np.uint8)
NPY = {"Content-Type": "application/x-npy"}
ZOO = Path(__file__).resolve().parents[3] / "models" / "zoo"


@pytest.fixture(scope="module")
def caller(classifiers: Mapping[str, Classifier]) -> Iterator[Caller]:
    settings = Settings(default_model="grey")
    with LiveRpcServer(create_app(settings, classifiers), settings) as live, Caller(live.port) as caller:
        yield caller


def outputs(answer: Any) -> dict[str, np.ndarray]:
    """The outputs of an answer, raw or in the field of their type."""
    found: dict[str, np.ndarray] = {}
    for number, output in enumerate(answer.outputs):
        raw = answer.raw_output_contents[number] if answer.raw_output_contents else None
        if raw is None:
            (values,) = (values for _, values in output.contents.ListFields())
            array = np.array([value.decode() if isinstance(value, bytes) else value for value in values])
        elif output.datatype == "BYTES":
            array = np.array(texts(raw))
        else:
            array = np.frombuffer(raw, DTYPES[output.datatype])
        found[output.name] = array.reshape(output.shape)
    return found


@pytest.mark.parametrize("call", CALLS)
def test_a_client_is_answered(caller: Caller, call: str) -> None:
    method, content = CALLS[call]
    answer = caller.ask(method, content)
    assert isinstance(answer, Message)
    if method in ("ServerLive", "ServerReady", "ModelReady"):
        assert answer.ListFields()[0][1] is True


@pytest.mark.parametrize("call", INFERENCES)
def test_a_client_gets_the_bits_of_predict(caller: Caller, client: Client, call: str) -> None:
    answer = caller.ask(*CALLS[call])
    datatype = next(name for name in ("UINT8", "FP32", "FP64") if name in call)
    batch = client.post("/predict/batch", content=npy(in_type(datatype, LEVELS)), headers=NPY).json()["predictions"]
    found = outputs(answer)
    assert_are_those_of_predict(found, batch)
    assert answer.id == ("42" if "id" in call or call.startswith("kserve") else answer.id)
    assert ("counterfactual" in found) == ("counterfactual" in call)
    if "chosen" in call:
        assert list(found) == ["radius", "class_id", "logits", "proof"]
    # As the client sent its tensor.
    assert bool(answer.raw_output_contents) != ("contents" in call)


def test_descriptions_are_those_of_rest(caller: Caller, client: Client) -> None:
    server, model = client.get("/v2").json(), client.get("/v2/models/grey").json()
    found = caller.ask("ServerMetadata")
    assert (found.name, found.version, list(found.extensions)) == tuple(server.values())
    described = caller.ask("ModelMetadata", protocol.ModelMetadataRequest(name="grey", version=model["versions"][0]))
    assert [(one.name, one.datatype, list(one.shape)) for one in described.outputs] == [
        tuple(one.values()) for one in model["outputs"]
    ]
    assert list(described.versions) == model["versions"]
    index = caller.ask("RepositoryIndex", protocol.RepositoryIndexRequest(ready=True)).models
    assert [
        {"name": one.name, "version": one.version, "state": one.state, "reason": one.reason} for one in index
    ] == client.post("/v2/repository/index", json={"ready": True}).json()


def test_a_shipped_model_answers_with_the_bits_of_predict(runner: asyncio.Runner) -> None:
    classifier = Classifier.load(ZOO / "mnist", "cpu", threads=1)
    settings = Settings(default_model="mnist")
    app = create_app(settings, {"mnist": classifier})
    levels = np.random.default_rng(5).integers(0, 256, (1, *classifier.input_shape), dtype=np.uint8)
    with LiveRpcServer(app, settings) as live, Caller(live.port) as caller:
        for datatype in ("UINT8", "FP16", "FP32", "FP64"):
            array = in_type(datatype, levels)
            prediction = Client(app, runner).post("/predict", content=npy(array[0]), headers=NPY).json()
            raw = infer_request(datatype, array.shape, array.tobytes(), model="mnist")
            typed = infer_request(datatype, array.shape, model="mnist")
            fields = {"UINT8": "uint_contents", "FP32": "fp32_contents", "FP64": "fp64_contents"}
            if datatype in fields:
                getattr(typed.inputs[0].contents, fields[datatype]).extend(array.ravel().tolist())
            for request in (raw, typed) if datatype in fields else (raw,):
                assert_are_those_of_predict(outputs(caller.ask("ModelInfer", request)), [prediction])
