"""The Open Inference Protocol, version 2 over REST, for the same models.

Protocol: https://github.com/kserve/open-inference-protocol. One input `image`, N x C x H x W; outputs `logits`,
`class_id`, `radius`, `certified`, `proof`, `references` (the JSON list of `/predict`), `image_digest`, and with the
parameter `counterfactual` also the counterfactuals, with `coverage` also `set` (N x K, whether a class is in the
certified set), with `max_error` also `decision`. The `parameters` of a request are the options of `/predict` that
concern images. Errors are RFC 9457 problem details with the member `error`, which the protocol requires.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic_core import to_json

from service import __version__
from service.api.answers import in_columns, references_in_words
from service.api.body import JSON, Head
from service.api.decoding import Order
from service.api.decoding import Request as DecodedBody
from service.api.openapi import problem_responses
from service.api.parsing import read_query, refuse_query
from service.api.predict import Service
from service.api.schema import ImageOptions
from service.api.tensors import InferOptions, InferRequest, OutputRequest
from service.errors import OptionError
from service.errors.quotations import listed, quoted
from service.inference.classifier import Classifier
from service.inference.loading import Models
from service.inference.outcome import Decoded, Outcome
from service.pixels.images import image_digest

PREFIX = "/v2"

OutputDatatype = Literal["FP64", "INT64", "BOOL", "UINT8", "BYTES"]
_OUTPUTS: dict[str, OutputDatatype] = {
    "logits": "FP64",
    "class_id": "INT64",
    "radius": "FP64",
    "certified": "BOOL",
    "proof": "BYTES",
    "references": "BYTES",
    "image_digest": "BYTES",
    "counterfactual": "UINT8",
    "counterfactual_class_id": "INT64",
    "counterfactual_distance": "FP64",
    "counterfactual_reached": "BOOL",
    "set": "BOOL",
    "decision": "BYTES",
}
"""Outputs of every model, in order; those from `counterfactual` on only where they are requested."""
_CALIBRATED = ("set", "decision")
"""Outputs of calibrated models alone."""


class OutputTensor(BaseModel):
    """One output, flat in row-major order; a value that is not finite is null."""

    name: str
    datatype: OutputDatatype
    shape: list[int]
    data: list[Any]


class InferAnswer(BaseModel):
    """A response of the protocol; the version of a model is the digest of its bytes."""

    model_name: str
    model_version: str
    id: str | None
    outputs: list[OutputTensor]


def build_router(service: Service) -> APIRouter:
    """Return the routes of the protocol, over one `Service`."""
    router = APIRouter(prefix=PREFIX, tags=["open inference protocol"])

    @router.get("", summary="Server metadata")
    async def server() -> dict[str, Any]:
        return {"name": "lipcert", "version": __version__, "extensions": []}

    @router.get("/health/live", summary="Liveness of the server")
    async def server_live() -> Response:
        is_live = not service.health.fatal_faults()
        return JSONResponse({"live": is_live}, status_code=200 if is_live else 503)

    @router.get("/health/ready", summary="Readiness of the server")
    async def server_ready() -> Response:
        is_ready = not service.health.faults()
        return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)

    @router.get("/models/{name}", summary="Metadata of a model", responses=problem_responses(404, 503))
    async def model_metadata(name: str) -> dict[str, Any]:
        return _metadata(service.models[name])

    @router.get("/models/{name}/ready", summary="Readiness of a model", responses=problem_responses(404, 503))
    async def model_ready(name: str) -> Response:
        classifier = service.models[name]
        is_ready = not (classifier.is_lost or classifier.files.have_changed)
        return JSONResponse({"name": name, "ready": is_ready}, status_code=200 if is_ready else 503)

    @router.post(
        "/models/{name}/infer",
        summary="Classify images",
        response_model=InferAnswer,
        responses=problem_responses(400, 404, 413, 415, 422, 503),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{InferRequest.__name__}"}}},
            }
        },
    )
    async def infer(name: str, request: Request) -> Response:
        refuse_query(read_query(request.scope["query_string"]), "`parameters`")
        models = service.models
        answer = await service.ask(request, [JSON], partial(_InferQuestion, service, models, models[name]))
        return Response(answer, media_type=JSON)

    return router


@dataclass
class _InferQuestion:
    """One request of the protocol, for the workers."""

    service: Service
    models: Models
    classifier: Classifier
    head: Head
    content: bytes

    def order(self) -> Order:
        return self.service.order(self.models, "infer", self.head, (), self.classifier.name)

    def take(self, body: DecodedBody) -> None:
        assert isinstance(body.options, InferOptions)
        self.request = body.options
        self.decoded = Decoded(self.classifier, body.pixels_NCHW, body.options.parameters)

    def decode_at_once(self) -> Decoded[ImageOptions]:
        return self.decoded

    def decode(self) -> Decoded[ImageOptions]:
        return self.decoded

    def answer(self, outcome: Outcome[ImageOptions]) -> bytes:
        self.service.count(outcome)
        answer = InferAnswer(
            model_name=outcome.classifier.name,
            model_version=outcome.classifier.digest,
            id=self.request.id,
            outputs=_wanted(_outputs(outcome), self.request.outputs),
        )
        return answer.model_dump_json().encode()


def _metadata(classifier: Classifier) -> dict[str, Any]:
    shape = [-1, *classifier.input_shape]
    by_class = [-1, len(classifier.labels)]
    shapes = {"logits": by_class, "set": by_class, "counterfactual": shape}
    return {
        "name": classifier.name,
        "versions": [classifier.digest],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "image", "datatype": "FP64", "shape": shape}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shapes.get(name, [-1])}
            for name, datatype in _OUTPUTS.items()
            if name not in _CALIBRATED or classifier.card.calibration is not None
        ],
        "parameters": {
            "labels": list(classifier.labels),
            "card_digest": classifier.card_digest,
            "provider": classifier.provider,
        },
    }


def _outputs(outcome: Outcome[ImageOptions]) -> list[OutputTensor]:
    columns = in_columns(outcome)
    columns["references"] = np.array(
        [to_json(references_in_words(prediction)).decode() for prediction in outcome.predictions]
    )
    columns["image_digest"] = np.array([image_digest(image_CHW) for image_CHW in outcome.image_NCHW])
    return [
        OutputTensor(name=name, datatype=datatype, shape=list(columns[name].shape), data=columns[name].ravel().tolist())
        for name, datatype in _OUTPUTS.items()
        if name in columns
    ]


def _wanted(outputs: list[OutputTensor], requested: list[OutputRequest] | None) -> list[OutputTensor]:
    if not requested:
        return outputs
    by_name = {output.name: output for output in outputs}
    unknown = [output.name for output in requested if output.name not in by_name]
    if unknown:
        raise OptionError(
            f"this answer has no output {quoted(unknown[0])}; available outputs: {listed(by_name)} (those of the "
            "counterfactual require parameters.counterfactual=true, set requires coverage, decision max_error)"
        )
    return [by_name[output.name] for output in requested]
