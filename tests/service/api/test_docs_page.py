"""The docs page and the playground work without internet, and every example in the document is true."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from client import Client
from PIL import Image

from service.api.app import create_app
from service.api.body import BATCH_TYPES, PREDICT_TYPES
from service.api.examples import SAMPLE_DIGIT, STATIC
from service.api.schema import Options
from service.settings import Settings

PAGES = ("/", "/docs")
OWN = [file for pattern in ("*.js", "*.css", "playground/*.js") for file in STATIC.glob(pattern)]
"""Scripts and styles of the pages, without those of Swagger UI."""


class References(HTMLParser):
    """Everything that a page makes a browser fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a":
            self.links.append(values.get("href") or "")
            return
        self.found += [values[name] or "" for name in ("src", "href", "action", "data") if name in values]


@pytest.fixture(scope="module")
def document(client: Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_fetches_nothing_from_elsewhere(client: Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    for reference in References(response.text).found:
        assert not re.match(r"(?i)([a-z]+:)?//", reference), reference
        if not reference.startswith("data:"):
            assert client.get(f"/{reference}").status_code == 200, reference
    texts = [response.text, *(file.read_text() for file in OWN)]
    assert len(texts) > 8
    assert [url for text in texts for url in re.findall(r"https?://[^\s\"'<>)]+", text)] == []


@pytest.mark.parametrize("path", PAGES)
def test_the_browser_is_told_to_fetch_from_this_server_only(client: Client, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("name", ["playground", "docs"])
def test_no_page_is_served_without_its_headers(client: Client, name: str) -> None:
    assert client.get(f"/static/{name}.css").status_code == 200
    assert client.get(f"/static/{name}.html").status_code == 404


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_no_inline_script_or_style(client: Client, path: str) -> None:
    page = client.get(path).text
    assert re.findall(r"(?i)<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", page) == []
    # Nor do its scripts write any; they set the properties of an element, which the policy allows.
    for script in (file for file in OWN if file.suffix == ".js"):
        text = script.read_text()
        assert re.findall(r"(?i)<script|<style|\sstyle=|\son\w+=\"|\beval\(|new Function", text) == [], script


def test_every_script_of_the_pages_is_a_small_module() -> None:
    for script in (file for file in OWN if file.suffix == ".js"):
        assert script.read_text().count("\n") < 450, script


def test_the_docs_page_asks_no_public_validator() -> None:
    assert "validatorUrl: null" in (STATIC / "docs.js").read_text()


def test_the_document_works_below_the_prefix_of_a_proxy(document: dict[str, Any]) -> None:
    # Relative references, which clients resolve against the address of the document (OpenAPI 3.1, section 4.5).
    assert document["servers"] == [{"url": "."}]
    urls = re.findall(r"Sample: \[[^\]]*\]\(([^)]+)\)", str(document))
    assert urls
    assert all(url.startswith("./") for url in urls)


def test_the_style_of_the_docs_page_fetches_nothing_from_elsewhere() -> None:
    style = (STATIC / "swagger-ui" / "swagger-ui.css").read_text()
    assert "@import" not in style
    assert all(url.startswith(("data:", '"data:')) for url in re.findall(r"url\(([^)]*)", style))


def test_the_vendored_files_say_what_they_are() -> None:
    assert "swagger-ui-dist 5." in (STATIC / "swagger-ui" / "VERSION").read_text()
    assert "Apache License" in (STATIC / "swagger-ui" / "LICENSE").read_text()


def test_the_playground_and_the_docs_page_link_to_each_other(client: Client) -> None:
    assert "docs" in References(client.get("/").text).links
    assert "." in References(client.get("/docs").text).links


def test_the_document_is_openapi_3_1_and_lists_every_path_of_the_contract(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    assert {
        "/predict",
        "/predict/batch",
        "/models",
        "/models/{name}",
        "/health/live",
        "/health/ready",
        "/metrics",
    } <= set(document["paths"])


def test_every_reference_in_the_document_is_resolved(document: dict[str, Any]) -> None:
    references = set(re.findall(r"'\$ref': '([^']+)'", str(document)))
    assert references
    for reference in references:
        node: Any = document
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]


def test_every_form_of_request_is_documented(document: dict[str, Any]) -> None:
    for path, media_types in (("/predict", PREDICT_TYPES), ("/predict/batch", BATCH_TYPES)):
        operation = document["paths"][path]["post"]
        assert set(operation["requestBody"]["content"]) == set(media_types)
        assert {(parameter["name"], parameter["in"]) for parameter in operation["parameters"]} == {
            *((option, "query") for option in Options.model_fields),
            ("Prefer", "header"),
        }
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "application/x-npy"}
    form = document["paths"]["/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"image", *Options.model_fields}


def test_every_field_of_the_answer_is_described(document: dict[str, Any]) -> None:
    self_evident = {"model", "label", "class_id", "norm", "media_type", "counterfactual"}
    for name in ("PredictAnswer", "ImageAnswer", "CertificateAnswer", "CounterfactualAnswer"):
        for field, schema in document["components"]["schemas"][name]["properties"].items():
            assert "description" in schema or "$ref" in schema or field in self_evident, f"{name}.{field}"


def test_every_problem_of_a_request_is_documented_with_its_media_type(document: dict[str, Any]) -> None:
    responses = document["paths"]["/predict"]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "413", "415", "422", "503"}
    for status in set(responses) - {"200"}:
        (media_type,) = responses[status]["content"]
        assert media_type == "application/problem+json"
        assert responses[status]["content"][media_type]["examples"]


def test_every_operation_runs_as_it_is_documented(client: Client, document: dict[str, Any]) -> None:
    ran: set[str] = set()
    # Loading and unloading need a key of the scope admin.
    documented = {path: found for path, found in document["paths"].items() if "/repository/models/" not in path}
    for path, operations in documented.items():
        for method, operation in operations.items():
            names = {
                parameter["name"]: parameter["example"]
                for parameter in operation.get("parameters", ())
                if parameter["in"] == "path"
            }
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            answers = operation["responses"]["200"].get("content", {}).get("application/json", {}).get("examples", {})
            for name, example in content.get("examples", {"": {"value": None}}).items():
                body = {} if example["value"] is None else {"json": example["value"]}
                response = client.request(method.upper(), path.format(**names), **body)
                # The model of these tests has no samples.
                assert response.status_code == (404 if "{n}" in path else 200), path
                if name in answers:
                    assert same(response.json(), answers[name]["value"]), path
                    ran.add(path)
    protocols = {"/v1/models/{name}:predict", "/v1/models/{name}:explain", "/v2/models/{name}/infer"}
    assert {"/predict", "/predict/batch", *protocols, "/v2/models/{name}/explain"} == ran


@pytest.mark.parametrize(("path", "examples"), [("/predict", 3), ("/predict/batch", 1)])
def test_the_json_examples_are_answered_as_the_document_says(
    client: Client, document: dict[str, Any], path: str, examples: int
) -> None:
    operation = document["paths"][path]["post"]
    requests = operation["requestBody"]["content"]["application/json"]["examples"]
    answers = operation["responses"]["200"]["content"]["application/json"]["examples"]
    assert set(requests) == set(answers)
    assert len(requests) == examples
    for name, request in requests.items():
        response = client.post(path, json=request["value"])
        assert response.status_code == 200
        assert same(response.json(), answers[name]["value"])


def same(one: Any, other: Any) -> bool:
    """Equal, up to the rounding of floats: a batch may add up in another order."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one == pytest.approx(other, rel=1e-9, abs=1e-9)
    return one == other


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_the_samples_that_the_document_points_to_are_there_and_are_answered(
    client: Client, document: dict[str, Any], path: str
) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]
    pointed = {
        media_type: url
        for media_type, described in content.items()
        for url in re.findall(r"Sample: \[[^\]]*\]\(([^)]+)\)", described["schema"].get("description", ""))
    }
    assert "application/x-npy" in pointed
    for media_type, url in pointed.items():
        sample = client.get(url)
        assert sample.headers["content-type"] == media_type
        response = client.post(path, content=sample.content, headers={"Content-Type": media_type})
        assert response.status_code == 200


def test_the_form_example_is_answered(client: Client, document: dict[str, Any]) -> None:
    example = document["paths"]["/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["example"]
    fields = {name: str(value).lower() for name, value in example.items()}
    sample = client.get("/samples/image.png").content
    response = client.post("/predict", files={"image": ("image.png", sample, "image/png")}, data=fields)
    assert response.status_code == 200
    assert response.json()["counterfactual"] is not None


def test_the_examples_of_the_models_are_true(client: Client, document: dict[str, Any]) -> None:
    shown = document["paths"]["/models/{name}"]["get"]["responses"]["200"]["content"]["application/json"]
    assert shown["examples"]["model"]["value"] == client.get("/models/grey").json()


def test_the_examples_of_problems_have_the_members_of_the_schema(document: dict[str, Any]) -> None:
    responses = document["paths"]["/predict"]["post"]["responses"]
    for status in ("400", "404", "413", "415", "422"):
        for example in responses[status]["content"]["application/problem+json"]["examples"].values():
            assert {"type", "title", "status", "detail"} <= set(example["value"])
            assert str(example["value"]["status"]) == status


def test_the_sample_digit_is_grey_and_28_by_28() -> None:
    image = Image.open(io.BytesIO(SAMPLE_DIGIT.read_bytes()))
    assert (image.mode, image.size) == ("L", (28, 28))


def test_a_digit_is_the_example_where_the_default_model_reads_digits(client: Client, tmp_path: Path) -> None:
    builders.write(tmp_path / "mnist", builders.linear(np.eye(2, 784), np.zeros(2), (1, 28, 28)), "mnist")
    digits = Client(create_app(Settings(models=tmp_path, provider="cpu")), client._runner)
    digit = np.asarray(Image.open(SAMPLE_DIGIT))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(digits.get("/samples/image.png").content))), digit)
    assert np.array_equal(np.load(io.BytesIO(digits.get("/samples/image.npy").content))[0], digit)


def test_the_image_in_the_json_example_is_the_sample(client: Client, document: dict[str, Any]) -> None:
    examples = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    image = Image.open(io.BytesIO(base64.b64decode(examples["class and radius"]["value"]["image"])))
    assert np.array_equal(
        np.asarray(image), np.asarray(Image.open(io.BytesIO(client.get("/samples/image.png").content)))
    )
