from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import errors
from service.api.problem import MEDIA_TYPE, STATUS, has_error_member, problem, problem_of


def tree(root: type[errors.LipcertError]) -> Iterator[type[errors.LipcertError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__.startswith("service"):
            yield from tree(child)


def test_every_domain_error_has_a_status_and_nothing_else_has() -> None:
    assert set(tree(errors.LipcertError)) == set(STATUS)


def test_every_error_of_the_client_is_a_4xx_and_every_other_a_5xx() -> None:
    for error, status in STATUS.items():
        expected = 4 if issubclass(error, errors.InputError | errors.AccessError) else 5
        assert status // 100 == expected, error.__name__


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = {word for word in (errors.__doc__ or "").split() if word.endswith("Error")}
    assert drawn == {error.__name__ for error in tree(errors.LipcertError)}


def test_errors_know_no_http() -> None:
    source = Path(errors.__file__).read_text()
    assert not any(name in source for name in ("import http", "HTTPStatus", "starlette", "fastapi"))


def test_a_problem_has_the_members_of_rfc_9457() -> None:
    answer = problem_of(errors.ImageSizeError(30, 31, 28, 28), "/predict")
    assert answer.media_type == MEDIA_TYPE == "application/problem+json"
    members = json.loads(bytes(answer.body))
    assert members.pop("detail").startswith("the image is 30 x 31")
    assert members == {
        "type": "urn:problem-type:lipcert:image-size",
        "title": "Image size",
        "status": 422,
        "instance": "/predict",
    }


def test_a_problem_without_a_type_of_its_own_is_about_blank_with_the_phrase_of_the_status() -> None:
    members = json.loads(bytes(problem(404, "gone").body))
    assert members == {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "gone"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2", True),
        ("/v2/models/x", True),
        ("/v1/models", True),
        ("/v2x", False),
        ("/v1x/", False),
        ("/predict", False),
    ],
)
def test_errors_of_the_protocols_have_the_member_that_they_ask_for(path: str, expected: bool) -> None:
    assert has_error_member(path) == expected
    members = json.loads(bytes(problem(404, "no", instance=path).body))
    assert members.get("error") == ("no" if expected else None)
    # Also of a path that is too long to be quoted.
    members = json.loads(bytes(problem(404, "no", instance=path + "/" + "x" * 300).body))
    assert ("error" in members) == (expected or path in ("/v1", "/v2"))


def test_an_error_of_the_server_tells_the_client_nothing_of_its_files() -> None:
    answer = problem_of(errors.ArtefactError(Path("/secret/model.onnx"), "damaged"))
    assert answer.status_code == 500
    assert b"secret" not in bytes(answer.body)


@pytest.mark.parametrize(
    "error",
    [errors.ImageSizeError(3, 4, 5, 6), errors.UnknownModelError("a", ["b"]), errors.Base64Error("not base64")],
)
def test_an_error_at_an_index_keeps_its_type_and_names_the_index(error: errors.InputError) -> None:
    indexed = error.at_index(3)
    assert type(indexed) is type(error)
    assert str(indexed) == f"image 3: {error}"
