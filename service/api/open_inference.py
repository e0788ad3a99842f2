"""The Open Inference Protocol, version 2 over REST, for the same models.

Protocol: https://github.com/kserve/open-inference-protocol, with the extensions "binary tensor data" and "model
configuration" of Triton and `/explain` of MLServer. One input `image`, N x C x H x W; outputs `logits`, `class_id`,
`radius`, `certified`, `proof`, `references` (the JSON list of `/predict`), `image_digest`, and with the parameter
`counterfactual` also the counterfactuals, with `strength` their nearest distances, with `path` the paths (N x P
images), with `saliency` the gradients, with `coverage` also `set` (N x K, whether a class is in the certified set),
with `max_error` also `decision`. The `parameters` of a request are the options of `/predict` that concern images.
Errors are RFC 9457 problem details with the member `error`, which the protocol requires.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service import __version__
from service.api.answers import Reply
from service.api.body import JSON, OCTETS, PROTOCOL_TYPES, Head, read_body, read_head
from service.api.decoding import Order, decode
from service.api.decoding import Request as DecodedBody
from service.api.openapi import problem_responses
from service.api.outputs import InferAnswer, infer_reply, outputs_of, protocol_version
from service.api.parsing import parse_json, read_query, refuse_query
from service.api.predict import AT_ONCE_BYTES, Service
from service.api.schema import ImageOptions
from service.api.tensors import InferOptions, InferRequest, Protocol
from service.artefact.folders import split_name
from service.errors import EmptyBodyError, NotImplementedByServerError, OptionError, UnknownVersionError
from service.errors.quotations import quoted
from service.inference.classifier import Classifier
from service.inference.outcome import Decoded, Outcome
from service.inference.served import Models

PREFIX = "/v2"
_MODEL = "/models/{name}"
_VERSION = _MODEL + "/versions/{version}"
_PLATFORM = "onnx_onnxv1"
_MOST_INDEX_BYTES = 1024
_BODY_PROBLEMS = problem_responses(400, 404, 413, 415, 422, 503)
_INFER = """JSON; or, with the header `Inference-Header-Content-Length`, a JSON object of that length and the
`binary_data_size` bytes of its tensor. Outputs come as bytes where `binary_data` or `binary_data_output` is set.

`/v2/models/{name}/versions/{version}/infer` is the same for a version in `versions` of the metadata.
"""
_EXPLAIN = "As `/infer` with the parameter `counterfactual`."
_NO_STATISTICS = "this server has no statistics of the protocol; GET /metrics has requests, latency and predictions"
_ABSENT = (
    ("GET", "/models/stats", _NO_STATISTICS),
    ("GET", _MODEL + "/stats", _NO_STATISTICS),
    ("GET", _VERSION + "/stats", _NO_STATISTICS),
)
"""Operations of Triton that clients know and this server does not have: method, path and what to do instead."""


class IndexRequest(Protocol):
    """The optional body of the repository index."""

    ready: bool = False
    """Whether only models that are ready are listed."""


def build_router(service: Service) -> APIRouter:
    """Return the routes of the protocol, over one `Service`."""
    router = APIRouter(prefix=PREFIX, tags=["open inference protocol"])
    # Before the routes of models: a path of it could be that of a model.
    for method, path, reason in _ABSENT:
        router.add_api_route(path, _absent(reason), methods=[method], include_in_schema=False)
    _add_server(router, service)
    _add_models(router, service)
    _add_inference(router, service)
    return router


def _absent(reason: str) -> Callable[[], None]:
    def refuse() -> None:
        raise NotImplementedByServerError(reason)

    return refuse


def _add_server(router: APIRouter, service: Service) -> None:
    @router.get("", summary="Server metadata")
    async def server() -> dict[str, Any]:
        return {
            "name": "lipcert",
            "version": __version__,
            "extensions": ["binary_tensor_data", "model_configuration", "model_repository", "parameters"],
        }

    @router.get("/health/live", summary="Liveness of the server")
    async def server_live() -> Response:
        is_live = not service.health.fatal_faults()
        return JSONResponse({"live": is_live}, status_code=200 if is_live else 503)

    @router.get("/health/ready", summary="Readiness of the server")
    async def server_ready() -> Response:
        is_ready = not service.health.faults()
        return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)

    @router.get("/models", summary="Names of the models")
    async def model_names() -> dict[str, list[str]]:
        return {"models": service.models.names}

    @router.post(
        "/repository/index",
        summary="Models and their states",
        responses=problem_responses(400, 413, 415, 422, 503),
    )
    async def repository_index(request: Request) -> list[dict[str, str]]:
        """All models, also those that could not be verified; with the body `{"ready": true}`, those that are ready."""
        head = read_head(request, PROTOCOL_TYPES)
        content = b"{}"
        with service.place(request, head) as place, contextlib.suppress(EmptyBodyError):
            content = await read_body(request, head, _MOST_INDEX_BYTES, place)
        asked = parse_json(IndexRequest, content)
        return [model for model in _index(service.models) if model["state"] == "READY" or not asked.ready]


def _add_models(router: APIRouter, service: Service) -> None:
    async def model_metadata(name: str, request: Request) -> dict[str, Any]:
        models = service.models
        return _metadata(_served(models, name, request), models)

    async def model_ready(name: str, request: Request) -> Response:
        classifier = _served(service.models, name, request)
        is_ready = classifier.is_ready
        return JSONResponse({"name": name, "ready": is_ready}, status_code=200 if is_ready else 503)

    async def model_config(name: str, request: Request) -> dict[str, Any]:
        """The model as Triton describes it: shapes are those of one image."""
        return _config(_served(service.models, name, request), service.settings.max_batch)

    for end, endpoint, summary in (
        ("", model_metadata, "Metadata of a model"),
        ("/ready", model_ready, "Readiness of a model"),
        ("/config", model_config, "Configuration of a model"),
    ):
        for path in (_MODEL, _VERSION):
            router.add_api_route(
                path + end,
                endpoint,
                methods=["GET"],
                summary=summary,
                responses=problem_responses(404, 503),
                include_in_schema=path is _MODEL,
            )


def _add_inference(router: APIRouter, service: Service) -> None:
    def endpoint(explains: bool) -> Callable[..., Any]:
        async def infer(name: str, request: Request) -> Response:
            refuse_query(read_query(request.scope["query_string"]), "`parameters`")
            models = service.models
            question_of = partial(_InferQuestion, service, models, _served(models, name, request), name, explains)
            reply = await service.ask(request, PROTOCOL_TYPES, question_of)
            return Response(reply.content, media_type=reply.media_type, headers=reply.headers)

        return infer

    schema = {"$ref": f"#/components/schemas/{InferRequest.__name__}"}
    binary = {
        "schema": {"type": "string", "format": "binary", "description": "The JSON object, and the bytes of tensors."}
    }
    for end, summary, explains in (("/infer", "Classify images", False), ("/explain", "Find counterfactuals", True)):
        for path in (_MODEL, _VERSION):
            router.add_api_route(
                path + end,
                endpoint(explains),
                methods=["POST"],
                name=end.strip("/"),
                summary=summary,
                description=_EXPLAIN if explains else _INFER,
                response_model=InferAnswer,
                responses={200: {"content": {OCTETS: binary}}, **_BODY_PROBLEMS},
                include_in_schema=path is _MODEL,
                openapi_extra={
                    "requestBody": {"required": True, "content": {JSON: {"schema": schema}, OCTETS: binary}}
                },
            )


def _served(models: Models, name: str, request: Request) -> Classifier:
    """Return the model in the path of a request.

    Raises:
        UnknownModelError, ModelNotAvailableError: there is no such model, or its version is broken.
        UnknownVersionError: the path names neither the number nor the digest of a version.
    """
    version = request.path_params.get("version")
    if version is None:
        return models[name]
    if f"{name}:{version}" in models.broken:
        return models[f"{name}:{version}"]
    versions = models.versions(name)
    for classifier in versions:
        if version in (protocol_version(classifier), classifier.digest):
            return classifier
    raise UnknownVersionError(name, version, [protocol_version(classifier) for classifier in versions])


@dataclass
class _InferQuestion:
    """One request of the protocol, for the workers."""

    service: Service
    models: Models
    classifier: Classifier
    name: str
    """In the path."""
    explains: bool
    head: Head
    content: bytes
    decoded: Decoded[ImageOptions] | None = None

    def order(self) -> Order | None:
        """Return how a child process has to decode the body; null if its JSON object is short: bytes cost little."""
        json_length = self.head.json_length or ""
        is_short = json_length.isdecimal() and len(json_length) < 5 and int(json_length) <= AT_ONCE_BYTES
        return None if is_short else self._order()

    def decode_at_once(self) -> Decoded[ImageOptions] | None:
        """Return the decoded request if it is short."""
        return self.decode() if len(self.content) <= AT_ONCE_BYTES else self.decoded

    def decode(self) -> Decoded[ImageOptions]:
        """Return the decoded request; raise `InputError`, see `service.api.decoding`."""
        if self.decoded is None:
            self.take(decode(self._order(), self.content))
        assert self.decoded is not None
        return self.decoded

    def take(self, body: DecodedBody) -> None:
        """Receive the decoded body."""
        assert isinstance(body.options, InferOptions)
        self.asked = body.options
        if self.asked.model_name not in (None, self.name, self.classifier.name, self.classifier.card.name):
            raise OptionError(
                f"model_name is {quoted(self.asked.model_name)} and the path names {quoted(self.name)}; name the same"
            )
        options = self.asked.parameters
        if self.explains:
            options = options.model_copy(update={"counterfactual": True})
        # 0 is no limit, as for Triton.
        wait_s = options.timeout / 1e6 if options.timeout else math.inf
        self.decoded = Decoded(self.classifier, body.pixels_NCHW, options, wait_s)

    def answer(self, outcome: Outcome[ImageOptions]) -> Reply:
        """Return the answer, see `service.api.outputs`."""
        self.service.count(outcome)
        return infer_reply(outcome, self.asked, self.head.answer_coding)

    def _order(self) -> Order:
        return self.service.order(self.models, "infer", self.head, (), self.classifier.name)


def _index(models: Models) -> list[dict[str, str]]:
    served = [
        {
            "name": classifier.card.name,
            "version": protocol_version(classifier),
            "state": "READY" if classifier.is_ready else "UNAVAILABLE",
            "reason": "" if classifier.is_ready else "its files have changed, or the GPU is lost",
        }
        for classifier in models.values()
    ]
    broken = [
        {"name": name, "version": str(version or ""), "state": "UNAVAILABLE", "reason": error.line}
        for (name, version), error in ((split_name(name), error) for name, error in models.broken.items())
    ]
    return served + broken


def _metadata(classifier: Classifier, models: Models) -> dict[str, Any]:
    return {
        "name": classifier.card.name,
        "versions": [protocol_version(one) for one in models.values() if one.card.name == classifier.card.name],
        "platform": _PLATFORM,
        "inputs": [{"name": "image", "datatype": "FP64", "shape": [-1, *classifier.input_shape]}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shape}
            for name, (datatype, shape) in outputs_of(classifier).items()
        ],
        "parameters": {
            "labels": list(classifier.labels),
            "card_digest": classifier.card_digest,
            "provider": classifier.provider,
        },
    }


def _config(classifier: Classifier, max_batch: int) -> dict[str, Any]:
    return {
        "name": classifier.card.name,
        "platform": _PLATFORM,
        "max_batch_size": max_batch,
        "input": [{"name": "image", "data_type": "TYPE_FP64", "dims": list(classifier.input_shape)}],
        "output": [
            {
                "name": name,
                "data_type": "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}",
                "dims": shape[1:],
            }
            for name, (datatype, shape) in outputs_of(classifier).items()
        ],
    }
