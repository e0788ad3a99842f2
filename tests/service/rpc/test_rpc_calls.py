"""Calls that are refused have the sentence of REST; hostile callers cost no more than their limit."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import numpy as np
import pytest
from client import HEIGHT, LIMITS, WIDTH, Client
from garbage import count, uncollected
from process_table import wait_until
from rpc_server import Caller, LiveRpcServer, infer_request
from starlette.requests import ClientDisconnect

from service.access.keys import new_key
from service.api.app import create_app
from service.api.predict import ABANDON
from service.inference.classifier import Classifier
from service.rpc import open_inference_pb2 as protocol
from service.rpc.calls import Gate, Response
from service.rpc.messages import SERVICE, Ask
from service.settings import Settings

SHAPE = (1, 1, HEIGHT, WIDTH)
BYTES = bytes(HEIGHT * WIDTH)
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def caller(classifiers: Mapping[str, Classifier]) -> Iterator[Caller]:
    settings = Settings(default_model="grey", body_s=1.0, **LIMITS)
    with LiveRpcServer(create_app(settings, classifiers), settings) as live, Caller(live.port) as caller:
        yield caller


def request(datatype: str = "UINT8", shape: Any = SHAPE, raw: bytes = BYTES, **fields: Any) -> Any:
    return infer_request(datatype, shape, raw, **fields)


def with_parameter(name: str, kind: str, value: Any) -> Any:
    made = request()
    setattr(made.parameters[name], kind, value)
    return made


def typed(datatype: str, field: str, values: list[Any]) -> Any:
    made = infer_request(datatype, SHAPE)
    getattr(made.inputs[0].contents, field).extend(values)
    return made


def with_two_inputs() -> Any:
    made = infer_request("UINT8", SHAPE, BYTES, BYTES)
    made.inputs.add(name="image", datatype="UINT8", shape=SHAPE)
    return made


def with_outputs(*names: str) -> Any:
    made = request()
    for name in names:
        made.outputs.add(name=name)
    return made


def with_both() -> Any:
    made = request()
    made.inputs[0].contents.uint_contents.extend([0] * len(BYTES))
    return made


REFUSED: dict[str, tuple[Any, grpc.StatusCode, str]] = {
    "an unknown model": (request(model="none"), Code.NOT_FOUND, "there is no model 'none'; available models: "),
    "a path as a model": (request(model="grey/versions/1"), Code.NOT_FOUND, "there is no model"),
    "a long name": (request(model="x" * 15_000), Code.NOT_FOUND, "there is no model"),
    "no model": (request(model=""), Code.INVALID_ARGUMENT, "names no model"),
    "an unknown version": (request(model_version="7"), Code.NOT_FOUND, "no version '7'"),
    "a number of another type": (request("INT64", raw=bytes(160)), Code.INVALID_ARGUMENT, "inputs.0.datatype"),
    "a type in small letters": (request("uint8"), Code.INVALID_ARGUMENT, "inputs.0.datatype"),
    "three axes": (request(shape=SHAPE[1:]), Code.INVALID_ARGUMENT, "inputs.0.shape"),
    "many axes": (request(shape=[1] * 10_000), Code.INVALID_ARGUMENT, "inputs.0.shape"),
    "a negative axis": (request(shape=(-1, 1, HEIGHT, WIDTH)), Code.INVALID_ARGUMENT, "inputs.0.shape"),
    "another size": (request(shape=(1, 1, 2, 2), raw=bytes(4)), Code.INVALID_ARGUMENT, "the image is 2 x 2"),
    "two channels": (request(shape=(1, 2, HEIGHT, WIDTH), raw=BYTES * 2), Code.INVALID_ARGUMENT, "2 channels"),
    "too few bytes": (request(raw=BYTES[1:]), Code.INVALID_ARGUMENT, "raw_input_contents has 19 bytes; expected 20"),
    "no bytes": (infer_request("UINT8", SHAPE), Code.INVALID_ARGUMENT, "contents has no numbers"),
    "two tensors for one input": (infer_request("UINT8", SHAPE, BYTES, BYTES), Code.INVALID_ARGUMENT, "2 raw_input"),
    "two inputs": (with_two_inputs(), Code.INVALID_ARGUMENT, "inputs"),
    "no input": (protocol.ModelInferRequest(model_name="grey"), Code.INVALID_ARGUMENT, "inputs"),
    "bytes and numbers": (with_both(), Code.INVALID_ARGUMENT, "send one of them"),
    "numbers of another type": (typed("FP32", "fp64_contents", [0.0] * 20), Code.INVALID_ARGUMENT, "as fp32_contents"),
    "too few numbers": (typed("FP32", "fp32_contents", [0.0] * 19), Code.INVALID_ARGUMENT, "has 19 numbers; expected"),
    "a grey level of 256": (typed("UINT8", "uint_contents", [256] * 20), Code.INVALID_ARGUMENT, "outside 0..255"),
    "numbers of FP16": (typed("FP16", "fp32_contents", [0.0] * 20), Code.INVALID_ARGUMENT, "raw_input_contents"),
    "a pixel of 2": (request("FP64", raw=np.full(20, 2.0).tobytes()), Code.INVALID_ARGUMENT, "expected in [0, 1]"),
    "not a number": (request("FP64", raw=np.full(20, np.nan).tobytes()), Code.INVALID_ARGUMENT, "expected in [0, 1]"),
    "many images": (request(shape=(5, 1, HEIGHT, WIDTH), raw=BYTES * 5), Code.RESOURCE_EXHAUSTED, "5 images"),
    "many pixels": (
        request(shape=(4, 1, 30, 30), raw=bytes(3600)),
        Code.RESOURCE_EXHAUSTED,
        "at most 2000 pixels",
    ),
    "an unknown option": (with_parameter("sequence_id", "int64_param", 1), Code.INVALID_ARGUMENT, "sequence_id"),
    "an option of another type": (
        with_parameter("counterfactual", "string_param", "maybe"),
        Code.INVALID_ARGUMENT,
        "counterfactual",
    ),
    "an option without a value": (with_parameter("epsilon", "double_param", np.inf), Code.INVALID_ARGUMENT, ""),
    "an output twice": (with_outputs("radius", "radius"), Code.INVALID_ARGUMENT, "twice"),
    "an unknown output": (with_outputs("depth"), Code.INVALID_ARGUMENT, "no output 'depth'"),
    "65 outputs": (with_outputs(*map(str, range(65))), Code.INVALID_ARGUMENT, "outputs"),
    "100 outputs": (with_outputs(*map(str, range(100))), Code.INVALID_ARGUMENT, "outputs"),
    "2,000 outputs": (with_outputs(*map(str, range(2000))), Code.INVALID_ARGUMENT, "more than 1024 fields"),
    "another message": (b"\xff" * 100, Code.INVALID_ARGUMENT, "not a message of this method"),
    "a name that is no text": (b"\x0a\x02\xff\xfe", Code.INVALID_ARGUMENT, "not a message of this method"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_call_that_cannot_be_answered_is_told_why(caller: Caller, kind: str) -> None:
    message, code, words = REFUSED[kind]
    error = caller.refusal("ModelInfer", message)
    assert (error.code(), words in error.details()) == (code, True), error.details()
    assert caller.ask("ModelInfer", request()).model_name == "grey"


def test_a_call_that_is_refused_is_no_garbage(caller: Caller) -> None:
    with uncollected():
        before = count(Ask, Response)
        for _ in range(3):
            caller.refusal("ModelInfer", request(model="none"))
        wait_until(lambda: count(Ask, Response) <= before)


def test_the_sentence_is_that_of_rest(caller: Caller, client: Client) -> None:
    problem = client.get("/v2/models/none").json()
    error = caller.refusal("ModelMetadata", protocol.ModelMetadataRequest(name="none"), x_request_id="a-1")
    assert error.details() == problem["detail"]
    assert dict(error.trailing_metadata())["x-request-id"] == "a-1"
    assert caller.refusal("ModelReady", protocol.ModelReadyRequest(name="none")).code() is Code.NOT_FOUND


def test_a_method_that_is_not_there_is_unimplemented(caller: Caller) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        caller.channel.unary_unary(f"/{SERVICE}/ModelConfig")(b"", timeout=30)
    assert caught.value.code() is Code.UNIMPLEMENTED


def test_a_message_beyond_the_limit_is_refused(caller: Caller) -> None:
    assert caller.refusal("ModelInfer", bytes(20_001)).code() is Code.RESOURCE_EXHAUSTED
    squeezed = caller.channel.unary_unary(f"/{SERVICE}/ModelInfer")
    with pytest.raises(grpc.RpcError) as caught:
        squeezed(bytes(50_000_000), timeout=30, compression=grpc.Compression.Gzip)
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    assert caller.ask("ServerLive").live


def test_metadata_beyond_the_limit_is_refused(caller: Caller) -> None:
    assert caller.refusal("ServerLive", flood="x" * 100_000).code() is Code.RESOURCE_EXHAUSTED
    assert caller.refusal("ServerLive", **{f"a{n}": "x" * 50 for n in range(2000)}).code() is Code.RESOURCE_EXHAUSTED
    assert caller.ask("ServerLive", authorization=" ", x_request_id="\N{LATIN SMALL LETTER A}" * 500).live


def test_a_message_that_does_not_come_ends_the_call_in_time(caller: Caller) -> None:
    held = threading.Event()

    def nothing() -> Iterator[bytes]:
        held.wait(20)
        yield b""

    call = caller.channel.stream_unary(f"/{SERVICE}/ModelInfer").future(nothing(), timeout=30)
    error = call.exception()
    held.set()
    assert error.code() is Code.DEADLINE_EXCEEDED
    assert "LIPCERT_BODY_S" in error.details()
    empty = caller.channel.stream_unary(f"/{SERVICE}/ServerLive").future(iter([]), timeout=30)
    assert protocol.ServerLiveResponse.FromString(empty.result()).live


def test_slow_callers_of_one_address_leave_room_for_others() -> None:
    async def scenario() -> bool:
        gate = Gate(4, 0.5)
        never = asyncio.Event()

        async def hold(address: str) -> None:
            async with gate.entered(address):
                await never.wait()

        slow = [asyncio.ensure_future(hold("192.0.2.1")) for _ in range(20)]
        await asyncio.sleep(0)
        async with asyncio.timeout(10), gate.entered("192.0.2.2"):
            pass
        for task in slow:
            task.cancel()
        await asyncio.wait(slow)
        async with asyncio.timeout(10), gate.entered("192.0.2.1"):
            return True

    assert asyncio.run(scenario())


def test_a_caller_that_leaves_frees_its_place(classifiers: Mapping[str, Classifier]) -> None:
    settings = Settings(default_model="grey")
    app = create_app(settings, classifiers)
    batcher = app.state.service.batcher
    entered, left = threading.Event(), threading.Event()

    class Slow:
        state = app.state

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                with batcher.place(30.0, "") as place:
                    scope[ABANDON] = functools.partial(place.stop, ClientDisconnect)
                    entered.set()
                    await asyncio.sleep(30)
            except ClientDisconnect:
                left.set()

    with LiveRpcServer(Slow(), settings) as live, Caller(live.port) as caller:  # type: ignore[arg-type]
        for timeout_s in (30.0, 0.3):
            call = caller.begin("ServerLive", b"", timeout_s)
            assert entered.wait(20)
            if timeout_s == 30.0:
                call.cancel()
            assert left.wait(20)
            entered.clear()
            left.clear()


KEY, LINE = new_key("ci", ["predict"])
OTHER, OTHER_LINE = new_key("probe", ["metrics"])


def test_keys_and_rates_are_those_of_http(classifiers: Mapping[str, Classifier]) -> None:
    settings = Settings(
        default_model="grey", api_keys=f"{LINE};{OTHER_LINE}", rate_per_key=0.001, rate_burst=3, allow_anonymous=True
    )
    with (
        LiveRpcServer(create_app(settings, classifiers), settings) as live,
        Caller(live.port) as caller,
    ):
        assert caller.ask("ServerLive").live
        error = caller.refusal("ModelInfer", request())
        assert error.code() is Code.UNAUTHENTICATED
        assert "Bearer" in error.details()
        assert caller.refusal("ModelInfer", request(), authorization="Bearer no").code() is Code.UNAUTHENTICATED
        forbidden = caller.refusal("ModelInfer", request(), authorization=f"Bearer {OTHER}")
        assert forbidden.code() is Code.PERMISSION_DENIED
        for metadata in ({"authorization": f"Bearer {KEY}"}, {"x_api_key": KEY}, {"authorization": f"bearer {KEY}"}):
            assert caller.ask("ModelInfer", request(), **metadata).model_name == "grey"
        limited = caller.refusal("ModelInfer", request(), x_api_key=KEY)
        assert limited.code() is Code.RESOURCE_EXHAUSTED
        assert int(dict(limited.trailing_metadata())["retry-after"]) > 0


def test_a_server_that_is_full_is_unavailable_and_says_when_to_come_back(classifiers: Mapping[str, Classifier]) -> None:
    settings = Settings(default_model="grey", max_requests=1, client_share=1.0)
    app = create_app(settings, classifiers)
    with LiveRpcServer(app, settings) as live, Caller(live.port) as caller:

        async def full() -> Any:
            with app.state.service.batcher.place(30.0, ""):
                return await asyncio.get_running_loop().run_in_executor(None, caller.refusal, "ModelInfer", request())

        error = live.run(full())
        assert error.code() is Code.UNAVAILABLE
        assert "too many requests" in error.details()
        assert dict(error.trailing_metadata())["retry-after"] == "1"
        assert caller.ask("ModelInfer", request()).id == ""
        counted = app.state.service.metrics.exposition().decode()
        assert 'lipcert_refusals_total{reason="overloaded"} 1.0' in counted
        assert 'route="/v2/models/{name}/infer",status="200"' in counted
