"""The OpenAPI 3.1 document: the forms of a request, and computed examples.

The sample image has the input shape of the default model, and the example answers are computed by that model. So "Try
it out" on the docs page, without a change, returns the answer that is printed below it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from service import errors
from service.api import body, problem
from service.api.answers import RECORDS
from service.api.examples import EXPLAINED, Examples
from service.api.schema import BatchRequest, Options, PredictRequest, Problem

SAMPLES = "/samples"
"""Path of the sample images."""

Json = dict[str, Any]


def document(app: FastAPI, examples: Examples | None, bodies: Sequence[type[BaseModel]] = ()) -> Json:
    """Return the OpenAPI document of `app`.

    FastAPI describes the routes and their answers. The bodies are added here: one operation takes several media types,
    which a function signature cannot express.

    Args:
        app: the application with all its routes.
        examples: absent where no default model is loaded.
        bodies: models of further request bodies to which routes refer.
    """
    openapi = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
        # Relative to the document, so that requests go below the prefix of a proxy.
        servers=[{"url": "."}],
    )
    schemas: Json = openapi["components"]["schemas"]
    for model in (PredictRequest, BatchRequest, Problem, *bodies):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    for path, body_of, form in (
        ("/predict", _predict_body, f"JSON, a form, an image file or an npy array{_CODINGS}"),
        ("/predict/batch", _batch_body, f"JSON or an npy array{_CODINGS}"),
    ):
        operation: Json = openapi["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "description": form, "content": body_of(examples)}
        operation["parameters"] = [*_query_parameters(), _PREFER]
        operation["responses"]["200"]["content"][body.NPY] = {"schema": _RECORDS}
    if examples is not None:
        _add_protocols(openapi["paths"], examples)
        _add_answers(openapi["paths"], examples)
    _mend(openapi)
    return openapi


def _mend(openapi: Json) -> None:
    """Remove declarations that make generated clients wrong.

    A field with `default` is not optional in the types of openapi-typescript: a request would have to give every
    option, and an answer without the field would be read as one with it. FastAPI declares a 422 of its own for path
    parameters, which the routes do not answer.
    """
    schemas: Json = openapi["components"]["schemas"]
    for schema in schemas.values():
        for field in schema.get("properties", {}).values():
            default = field.pop("default", None)
            if isinstance(default, str | int | float) and "description" in field:
                field["description"] += f" Default: {json.dumps(default)}."
    for operations in openapi["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)


def problem_responses(*statuses: int, media_type: str = problem.MEDIA_TYPE) -> dict[int | str, Json]:
    """Return the entries for `responses=` of a route: each status as RFC 9457 problem details, with examples."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {
                media_type: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "examples": {
                        type(error).__name__: {"value": json.loads(bytes(problem.problem_of(error).body))}
                        for error in _TYPICAL_ERRORS
                        if problem.STATUS[type(error)] == status
                    },
                }
            },
        }
        for status in statuses
    }


_CODINGS = ", also compressed (`Content-Encoding: gzip`, `deflate`)"
_TYPICAL_ERRORS: tuple[errors.LipcertError, ...] = (
    errors.EmptyBodyError("the body is empty; send an image in one of the forms listed in /docs"),
    errors.UnknownModelError("minst", ["mnist", "mnist-0-8"]),
    errors.BodyTooLargeError(16 * 1024 * 1024),
    errors.MediaTypeError("text/plain", body.PREDICT_TYPES),
    errors.ImageSizeError(32, 32, 28, 28),
    errors.UnknownOptionError(["epsilom"], list(PredictRequest.model_fields), "JSON object"),
    errors.TargetIsPredictedClassError("7"),
    errors.OverloadedError("LIPCERT_MAX_WAIT_MS", 1),
    errors.DeadlineError(30.0),
    errors.ArtefactChangedError("mnist"),
    errors.ModelNotAvailableError("mnist-0-8", "the file is missing."),
)


def _predict_body(examples: Examples | None) -> Json:
    binary: Json = {"type": "string", "format": "binary"}
    fields: Json = {name: _option_schema(name) for name in Options.model_fields}
    content: Json = {
        body.JSON: {"schema": {"$ref": "#/components/schemas/PredictRequest"}},
        body.FORM: {
            "schema": {
                "type": "object",
                "required": ["image"],
                "additionalProperties": False,
                "properties": {
                    "image": {**binary, "description": "Exactly one image file, grey or RGB."},
                    **fields,
                },
            }
        },
        **{media_type: {"schema": {**binary, "contentMediaType": media_type}} for media_type in body.IMAGES},
        body.NPY: {
            "schema": {
                **binary,
                "contentMediaType": body.NPY,
                "description": "A file of numpy.save: uint8 (0..255) or float16/32/64 in [0, 1], "
                "C x H x W, H x W x C, or H x W for a grey model.",
            }
        },
        body.OCTETS: {"schema": {**binary, "description": "An image file or an npy array, by its signature."}},
    }
    if examples is not None:
        wanted = {"epsilon": 0.5, "counterfactual": True}
        content[body.JSON]["examples"] = {
            "class and radius": {"value": {"image": examples.base64}},
            "with a counterfactual": {"value": {"image": examples.base64, **wanted}},
            "with strength, path and saliency": {"value": {"image": examples.base64, **EXPLAINED}},
        }
        # The docs page fills in every field of a form, with the word "string" unless there is an example.
        form: Json = {name: field.default for name, field in Options.model_fields.items() if field.annotation is bool}
        form |= {
            "model": examples.answer["model"],
            "target": examples.counterfactual_answer["certificate"]["runner_up"]["label"],
            **wanted,
        }
        content[body.FORM]["example"] = form
        for name, value in form.items():
            content[body.FORM]["schema"]["properties"][name]["example"] = value
        _point_to_sample(content["image/png"], "image.png")
        _point_to_sample(content[body.NPY], "image.npy")
    return content


def _batch_body(examples: Examples | None) -> Json:
    content: Json = {
        body.JSON: {"schema": {"$ref": "#/components/schemas/BatchRequest"}},
        body.NPY: {
            "schema": {
                "type": "string",
                "format": "binary",
                "contentMediaType": body.NPY,
                "description": "As for /predict, with a leading batch axis: N x C x H x W, N x H x W x C, or N x H x W "
                "for a grey model.",
            }
        },
        body.OCTETS: {"schema": {"type": "string", "format": "binary", "description": "The same array."}},
    }
    if examples is not None:
        content[body.JSON]["examples"] = {
            "two images": {"value": {"images": [examples.base64, examples.base64], "epsilon": 0.5}}
        }
        _point_to_sample(content[body.NPY], "batch.npy")
    return content


def _point_to_sample(media: Json, name: str) -> None:
    """Add the link to a file that the server provides: JSON cannot express a binary body, and openapi-typescript reads
    the target of `externalValue` as a document."""
    schema: Json = media["schema"]
    schema["description"] = f"{schema.get('description', 'An image file.')} Sample: [{name}](.{SAMPLES}/{name})."


def _option_schema(name: str) -> Json:
    schema: Json = dict(Options.model_json_schema()["properties"][name])
    # A client that fills in defaults would send options in the query of a JSON body, where they are refused.
    schema.pop("default", None)
    schema.pop("title", None)
    # In a form or a query, an absent option is null.
    for variant in schema.pop("anyOf", []):
        if variant.get("type") != "null":
            schema.update(variant)
    return schema


_PREFER: Json = {
    "name": "Prefer",
    "in": "header",
    "description": "`wait=SECONDS` (RFC 7240): an earlier deadline than the server's own; after it, the status is 503.",
    "schema": {"type": "string", "examples": ["wait=5"]},
}
_RECORDS: Json = {
    "type": "string",
    "format": "binary",
    "description": f"With `Accept: application/x-npy`. {RECORDS}",
}


def _query_parameters() -> list[Json]:
    parameters: list[Json] = []
    for name in Options.model_fields:
        schema = _option_schema(name)
        described = schema.pop("description")
        note = "In the query of an image or npy body only; a JSON or form body contains it."
        parameters.append({"name": name, "in": "query", "description": f"{described} {note}", "schema": schema})
    return parameters


def _add_protocols(paths: Json, examples: Examples) -> None:
    """Add requests of the protocols, and a model to every path with a name: "Try it out" works without a change."""
    instances = [{"b64": examples.base64}]
    radius = {"parameters": {"epsilon": 0.5}}
    requests: dict[str, tuple[str, Json]] = {
        "/v1/models/{name}:predict": ("class and radius", {"instances": instances}),
        "/v1/models/{name}:explain": ("counterfactual", {"instances": instances, **radius}),
    }
    if examples.infer is not None:
        requests["/v2/models/{name}/infer"] = ("class and radius", examples.infer)
        requests["/v2/models/{name}/explain"] = ("counterfactual", {**examples.infer, **radius})
    for path, (name, request) in requests.items():
        content = paths[path]["post"]["requestBody"]["content"][body.JSON]
        content["examples"] = {name: {"value": request}}
    in_path = {"name": examples.answer["model"], "n": "0"}
    for path, operations in paths.items():
        for operation in operations.values() if "{name}" in path else ():
            for parameter in operation["parameters"]:
                if parameter["in"] == "path":
                    parameter["example"] = in_path[parameter["name"]]


def _add_answers(paths: Json, examples: Examples) -> None:
    in_batch = examples.epsilon_answer
    shown: dict[tuple[str, str], Json] = {
        ("/predict", "post"): {
            "class and radius": examples.answer,
            "with a counterfactual": examples.counterfactual_answer,
            "with strength, path and saliency": examples.explained_answer,
        },
        ("/predict/batch", "post"): {"two images": {"predictions": [in_batch, in_batch]}},
        ("/models", "get"): {"models": examples.models},
        ("/models/{name}", "get"): {"model": examples.model},
        ("/v1/models/{name}:predict", "post"): {"class and radius": {"predictions": [examples.answer]}},
        ("/v1/models/{name}:explain", "post"): {
            "counterfactual": {
                "predictions": [examples.counterfactual_answer],
                "explanations": [examples.counterfactual_answer["counterfactual"]],
            }
        },
        ("/v2/models/{name}/infer", "post"): {"class and radius": examples.infer_answer},
        ("/v2/models/{name}/explain", "post"): {"counterfactual": examples.explain_answer},
    }
    for (path, method), answers in shown.items():
        content = paths[path][method]["responses"]["200"]["content"]["application/json"]
        content["examples"] = {name: {"value": value} for name, value in answers.items()}
