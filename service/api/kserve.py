"""The KServe V1 protocol, which is that of TensorFlow Serving, for the same models.

Protocol: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol. `:predict` answers
`predictions` with the fields of `/predict`, `:explain` also `explanations`, the counterfactual of each. Errors
have the members of RFC 9457 problem details and `error`, as `application/json`: the client of KServe shows no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic_core import to_json

from service.api.answers import Reply, in_words
from service.api.body import JSON, PROTOCOL_TYPES, Head
from service.api.decoding import Order
from service.api.decoding import Request as DecodedBody
from service.api.instances import InstanceOptions, InstancesRequest
from service.api.openapi import problem_responses
from service.api.parsing import read_query, refuse_query
from service.api.predict import Service
from service.api.schema import BatchAnswer, CounterfactualAnswer, ImageOptions
from service.inference.classifier import Classifier
from service.inference.outcome import Decoded, Outcome
from service.inference.served import Models

PREFIX = "/v1"
_DESCRIPTION = """An instance is an image: nested numbers in [0, 1], or `{"b64": "<base64 of an image file>"}`.

A prediction has the fields of `/predict`.
"""


class ExplainAnswer(BatchAnswer):
    """Answers in the order of the images, and their counterfactuals."""

    explanations: list[CounterfactualAnswer | None]
    """`counterfactual` of each prediction."""


def build_router(service: Service) -> APIRouter:
    """Return the routes of the protocol, over one `Service`."""
    router = APIRouter(prefix=PREFIX, tags=["KServe V1 protocol"])

    @router.get("/models", summary="Names of the models")
    async def v1_models() -> dict[str, list[str]]:
        return {"models": service.models.names}

    # Before the next path, which matches these.
    for verb, summary, answer in (
        ("predict", "Classify images", BatchAnswer),
        ("explain", "Find counterfactuals", ExplainAnswer),
    ):
        router.add_api_route(
            f"/models/{{name}}:{verb}",
            _endpoint(service, explains=answer is ExplainAnswer),
            methods=["POST"],
            name=f"v1_{verb}",
            summary=summary,
            description=_DESCRIPTION,
            response_model=answer,
            responses=problem_responses(400, 404, 413, 415, 422, 503, media_type=JSON),
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{InstancesRequest.__name__}"}}},
                }
            },
        )

    @router.get(
        "/models/{name}", summary="Readiness of a model", responses=problem_responses(404, 503, media_type=JSON)
    )
    async def v1_model(name: str) -> Response:
        is_ready = service.models[name].is_ready
        return JSONResponse({"name": name, "ready": is_ready}, status_code=200 if is_ready else 503)

    return router


def _endpoint(service: Service, *, explains: bool) -> Callable[..., Any]:
    async def respond(name: str, request: Request) -> Response:
        refuse_query(read_query(request.scope["query_string"]), "`parameters`")
        models = service.models
        question_of = partial(_InstancesQuestion, service, models, models[name], explains)
        reply = await service.ask(request, PROTOCOL_TYPES, question_of)
        return Response(reply.content, media_type=reply.media_type)

    return respond


@dataclass
class _InstancesQuestion:
    """One request of the protocol, for the workers."""

    service: Service
    models: Models
    classifier: Classifier
    explains: bool
    head: Head
    content: bytes

    def order(self) -> Order:
        return self.service.order(self.models, "instances", self.head, (), self.classifier.name)

    def take(self, body: DecodedBody) -> None:
        assert isinstance(body.options, InstanceOptions)
        options = body.options.parameters
        if self.explains:
            options = options.model_copy(update={"counterfactual": True})
        self.decoded = Decoded(self.classifier, body.pixels_NCHW, options)

    def decode_at_once(self) -> Decoded[ImageOptions]:
        return self.decoded

    def decode(self) -> Decoded[ImageOptions]:
        return self.decoded

    def answer(self, outcome: Outcome[ImageOptions]) -> Reply:
        self.service.count(outcome)
        predictions = in_words(outcome)
        content: dict[str, Any] = {"predictions": predictions}
        if self.explains:
            content["explanations"] = [prediction["counterfactual"] for prediction in predictions]
        return Reply(to_json(content, inf_nan_mode="null"), JSON)
