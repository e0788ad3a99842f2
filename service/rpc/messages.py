"""Messages of the protocol as requests of `/v2`, and answers of `/v2` as messages.

A tensor travels to the application as bytes behind a JSON object, whether the message has it in `raw_input_contents` or
in its `contents`: the code that checks requests of REST checks messages too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from service.api.body import JSON, JSON_LENGTH
from service.errors import ArrayError, MalformedBodyError
from service.rpc import open_inference_pb2 as protocol
from service.rpc.fields import INFER, Nested, check_fields, no_message

SERVICE = "inference.GRPCInferenceService"

_MOST_NAME = 1000
_AXES = 4
_DTYPES = {"UINT8": "u1", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "BOOL": "?"}
_CONTENTS = {
    "UINT8": "uint_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT64": "int64_contents",
    "BOOL": "bool_contents",
    "BYTES": "bytes_contents",
}
"""Fields of InferTensorContents by datatype; FP16 is not among them."""
_Parameters: TypeAlias = Mapping[str, protocol.InferParameter]


class Ask(NamedTuple):
    """A request of `/v2`."""

    method: str
    path: str
    content: bytes = b""
    headers: Mapping[str, str] = {}
    is_typed: bool = False
    """Whether tensors of the answer are in `contents`, as those of the request."""


class Answer(NamedTuple):
    """An answer of `/v2`."""

    content: bytes
    json_length: int | None
    """Header `JSON_LENGTH`."""
    is_typed: bool
    """See `Ask`."""


class Method(NamedTuple):
    """A method of the service."""

    nested: Nested
    """See `check_fields`."""
    request: type[Message]
    ask: Callable[[Any], Ask]
    answer: Callable[[Answer], Message]

    def read(self, content: bytes) -> Ask:
        """Return the request of `/v2` that a message stands for.

        Raises:
            MalformedBodyError: the bytes are not the message of this method, it has too many fields, or names no model.
            ArrayError: its tensor does not have the numbers of its shape.
        """
        check_fields(content, self.nested)
        try:
            return self.ask(self.request.FromString(content))
        except DecodeError:
            raise no_message() from None


def _get(path: str) -> Callable[[Any], Ask]:
    return lambda _: Ask("GET", path)


def _as(kind: type[Message], member: str | None = None) -> Callable[[Answer], Message]:
    """Return a function that reads a JSON object as a message, or a list as its only field."""

    def answer(found: Answer) -> Message:
        content = json.loads(found.content)
        return json_format.ParseDict(
            content if member is None else {member: content}, kind(), ignore_unknown_fields=True
        )

    return answer


def _model_path(name: str, version: str, end: str) -> str:
    if not name:
        raise MalformedBodyError("the message names no model; GET /models lists the models that answer")
    return f"/v2/models/{_segment(name)}{f'/versions/{_segment(version)}' if version else ''}{end}"


def _segment(name: str) -> str:
    """Return a name as one segment of a path; no model has a name that this changes."""
    return name[:_MOST_NAME].replace("/", "%2F")


def _index(request: protocol.RepositoryIndexRequest) -> Ask:
    return Ask("POST", "/v2/repository/index", json.dumps({"ready": request.ready}).encode(), {"content-type": JSON})


def _infer(request: protocol.ModelInferRequest) -> Ask:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise MalformedBodyError(
            f"there are {len(raw)} raw_input_contents for {len(request.inputs)} inputs; send the bytes of each tensor"
        )
    tensors = [_raw(tensor, raw[number]) if raw else _packed(tensor) for number, tensor in enumerate(request.inputs)]
    asked: dict[str, Any] = {
        "parameters": _values(request.parameters) | {"binary_data_output": True},
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                # A tensor of images has four axes: more are refused whatever they are.
                "shape": list(tensor.shape[: _AXES + 1]),
                "parameters": _values(tensor.parameters) | {"binary_data_size": len(data)},
            }
            for tensor, data in zip(request.inputs, tensors, strict=True)
        ],
    }
    if request.id:
        asked["id"] = request.id
    if request.outputs:
        asked["outputs"] = [
            {"name": output.name, "parameters": _values(output.parameters) | {"binary_data": True}}
            for output in request.outputs
        ]
    text = json.dumps(asked).encode()
    return Ask(
        "POST",
        _model_path(request.model_name, request.model_version, "/infer"),
        b"".join([text, *tensors]),
        {"content-type": JSON, JSON_LENGTH: str(len(text))},
        is_typed=not raw,
    )


def _values(parameters: _Parameters) -> dict[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None) for name, value in parameters.items()
    }


def _raw(tensor: protocol.ModelInferRequest.InferInputTensor, data: bytes) -> bytes:
    if tensor.HasField("contents"):
        raise MalformedBodyError("the input has contents and raw_input_contents; send one of them")
    count = _count(tensor)
    if count is not None and tensor.datatype in _DTYPES:
        expected = count * np.dtype(_DTYPES[tensor.datatype]).itemsize
        if len(data) != expected:
            raise ArrayError(
                f"raw_input_contents has {len(data)} bytes; expected {expected} for the shape {list(tensor.shape)} of "
                f"{tensor.datatype}"
            )
    return data


def _packed(tensor: protocol.ModelInferRequest.InferInputTensor) -> bytes:
    """Return the bytes of a tensor whose numbers are in its contents."""
    field, count = _CONTENTS.get(tensor.datatype, "raw_input_contents"), _count(tensor)
    if count is None or tensor.datatype not in _DTYPES:
        # Refused for its shape or its datatype.
        return b""
    given = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if given != [field]:
        raise ArrayError(
            f"contents has {' and '.join(given) or 'no numbers'}; send {tensor.datatype} as {field} (every datatype as "
            "raw_input_contents)"
        )
    values = getattr(tensor.contents, field)
    if len(values) != count:
        raise ArrayError(f"{field} has {len(values)} numbers; expected {count} for the shape {list(tensor.shape)}")
    numbers = np.array(values)
    if tensor.datatype == "UINT8" and numbers.max() > 255:
        raise ArrayError(f"{field} has numbers outside 0..255; send 0..255 as UINT8, or FP64 in [0, 1]")
    return numbers.astype(_DTYPES[tensor.datatype]).tobytes()


def _count(tensor: protocol.ModelInferRequest.InferInputTensor) -> int | None:
    """Return the numbers of a shape that images can have."""
    shape = tensor.shape
    return prod(shape) if len(shape) == _AXES and all(0 < length < 2**31 for length in shape) else None


def _inferred(found: Answer) -> protocol.ModelInferResponse:
    """Return the answer to an inference, whose outputs are all bytes behind the JSON object."""
    assert found.json_length is not None
    head, at = json.loads(found.content[: found.json_length]), found.json_length
    response = protocol.ModelInferResponse(
        model_name=head["model_name"], model_version=head["model_version"], id=head["id"] or ""
    )
    for output in head["outputs"]:
        tensor = response.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        end = at + output["parameters"]["binary_data_size"]
        if found.is_typed:
            getattr(tensor.contents, _CONTENTS[tensor.datatype]).extend(
                _unpacked(tensor.datatype, found.content[at:end])
            )
        else:
            response.raw_output_contents.append(found.content[at:end])
        at = end
    return response


def _unpacked(datatype: str, data: bytes) -> Iterable[Any]:
    if datatype != "BYTES":
        return np.frombuffer(data, _DTYPES[datatype]).tolist()
    texts: list[bytes] = []
    at = 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        texts.append(data[at + 4 : end])
        at = end
    return texts


METHODS: Mapping[str, Method] = {
    "ServerLive": Method({}, protocol.ServerLiveRequest, _get("/v2/health/live"), _as(protocol.ServerLiveResponse)),
    "ServerReady": Method({}, protocol.ServerReadyRequest, _get("/v2/health/ready"), _as(protocol.ServerReadyResponse)),
    "ModelReady": Method(
        {},
        protocol.ModelReadyRequest,
        lambda request: Ask("GET", _model_path(request.name, request.version, "/ready")),
        _as(protocol.ModelReadyResponse),
    ),
    "ServerMetadata": Method({}, protocol.ServerMetadataRequest, _get("/v2"), _as(protocol.ServerMetadataResponse)),
    "ModelMetadata": Method(
        {},
        protocol.ModelMetadataRequest,
        lambda request: Ask("GET", _model_path(request.name, request.version, "")),
        _as(protocol.ModelMetadataResponse),
    ),
    "ModelInfer": Method(INFER, protocol.ModelInferRequest, _infer, _inferred),
    "RepositoryIndex": Method(
        {}, protocol.RepositoryIndexRequest, _index, _as(protocol.RepositoryIndexResponse, "models")
    ),
}
"""Methods by name."""
