"""Clients that are generated from the OpenAPI document are right; docs/client.md names the generators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from client import Client

REQUESTS = {
    "PredictRequest",
    "BatchRequest",
    "ImageOptions",
    "InferRequest",
    "InferParameters",
    "InputTensor",
    "OutputRequest",
    "InstancesRequest",
}


@pytest.fixture(scope="module")
def document(client: Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every object of the document, but for the examples, which are data."""
    if isinstance(node, dict):
        yield node
        for name, value in node.items():
            if name not in ("example", "examples"):
                yield from objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from objects(value)


def test_answers_may_have_fields_that_the_document_does_not_name(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert {name for name, schema in schemas.items() if schema.get("additionalProperties") is False} == REQUESTS
    for operations in document["paths"].values():
        for operation in operations.values():
            assert not any(part.get("additionalProperties") is False for part in objects(operation["responses"]))


def test_every_option_of_a_request_is_optional(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["PredictRequest"]["required"] == ["image"]
    assert schemas["BatchRequest"]["required"] == ["images"]
    assert schemas["InferRequest"]["required"] == ["inputs"]
    assert "required" not in schemas["ImageOptions"]


def test_no_field_has_a_default_which_openapi_typescript_takes_for_required(document: dict[str, Any]) -> None:
    fields = {
        f"{name}.{field}": schema
        for name, described in document["components"]["schemas"].items()
        for field, schema in described.get("properties", {}).items()
    }
    assert [name for name, schema in fields.items() if "default" in schema] == []
    fast = document["components"]["schemas"]["PredictRequest"]["properties"]["proof"]
    assert fast["description"].endswith('Default: "fast".')


def test_fields_that_every_answer_has_are_required_and_no_others(document: dict[str, Any], client: Client) -> None:
    schemas = document["components"]["schemas"]
    asked_for = {"PredictAnswer": {"saliency", "novelty"}, "CounterfactualAnswer": {"nearest_distance", "path"}}
    for name in ("PredictAnswer", "CertificateAnswer", "CounterfactualAnswer", "ReferenceAnswer", "ModelAnswer"):
        assert set(schemas[name]["required"]) == set(schemas[name]["properties"]) - asked_for.get(name, set()), name
    assert "reasons" not in client.get("/health/live").json()
    assert set(schemas["LiveAnswer"]["required"]) == {"status"}
    assert set(schemas["ReadyAnswer"]["required"]) == {"status", "provider"}


def test_no_reference_leads_out_of_the_document(document: dict[str, Any]) -> None:
    # openapi-typescript reads the target of externalValue, here an image, as a document.
    assert [part for part in objects(document) if "externalValue" in part] == []
    assert "externalValue" not in str(document)
    assert all(part["$ref"].startswith("#/") for part in objects(document) if "$ref" in part)


def test_every_error_is_a_problem_document(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status.startswith("4"):
                    media_type = "application/json" if path.startswith("/v1/") else "application/problem+json"
                    assert set(response["content"]) == {media_type}, (path, status)
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])


def test_operations_have_names_of_their_own(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operations in document["paths"].values() for operation in operations.values()]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
