"""A call as a sequence of tries and pauses, without input and output: `Client` and `AsyncClient` run the same steps.

A call changes nothing on the server, so it is tried again where that can help: the connection failed, the status is
429, 502 or 503, and the service did not say that its operator has to act.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ValidationError

from service.api.schema import BatchAnswer, ModelAnswer, ModelsAnswer, Options, PredictAnswer, Problem, ReadyAnswer
from service.client.errors import ClientError, ServiceError, UnreachableError, UnreadableAnswerError
from service.client.images import NPY, Encoded, stacked
from service.client.retries import Retries, retry_after_s

Result = TypeVar("Result")
Answer = TypeVar("Answer", bound=BaseModel)

JSON = "application/json"
_PROBLEM = "application/problem+json"
_OWN_PROBLEM = "urn:problem-type:lipcert:"
_AGAIN = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE)
_SHOWN = 200
"""Characters of a foreign answer that an error quotes."""


class Reply(NamedTuple):
    """A complete response."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    content: bytes


class Failure(NamedTuple):
    """A try without a complete response."""

    reason: str
    is_final: bool = False
    """Whether another try would end the same way."""


class Pause(NamedTuple):
    """A step that only waits."""

    seconds: float


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One request, and how its response is read."""

    method: str
    path: str
    """With the query."""
    read: Callable[[Reply], Result]
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Steps: TypeAlias = Generator["Call[Any] | Pause", "Reply | Failure | None", Result]


def steps(call: Call[Result], retries: Retries) -> Steps[Result]:
    """Yield the call for each try, and the pauses between; receive a reply or a failure for each try.

    Raises:
        ClientError: the call has failed.
    """
    failures = 0
    while True:
        outcome = yield call
        if isinstance(outcome, Reply):
            try:
                return call.read(outcome)
            except ServiceError as error:
                fault: ClientError = error
        else:
            assert outcome is not None
            fault = UnreachableError(outcome.reason)
            if outcome.is_final:
                raise fault
        failures += 1
        pause_s = _pause_s(fault, failures, retries)
        if pause_s is None:
            raise fault
        yield Pause(pause_s)


def _pause_s(fault: ClientError, failures: int, retries: Retries) -> float | None:
    if not isinstance(fault, ServiceError):
        return retries.pause_s(failures, None)
    if fault.status not in _AGAIN:
        return None
    if fault.retry_after_s is None and fault.type.startswith(_OWN_PROBLEM):
        # The service names a pause wherever one helps: here its operator has to act.
        return None
    return retries.pause_s(failures, fault.retry_after_s)


def options_of(given: Mapping[str, Any]) -> Options:
    """Return the options of a request; raises `ValueError` for one that is unknown or invalid."""
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'options'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors(include_url=False)
        ]
        raise ValueError(f"{'; '.join(faults)} (options: {', '.join(Options.model_fields)})") from None


def predict(image: Encoded, options: Options) -> Call[PredictAnswer]:
    """Return the call that classifies one image."""
    return Call(
        "POST",
        f"/predict{_query(options)}",
        lambda reply: _answer(PredictAnswer, reply),
        image.content,
        {"Content-Type": image.media_type},
    )


def predict_batch(images: list[Encoded], options: Options) -> Call[list[PredictAnswer]]:
    """Return the call that classifies several images, all arrays or all image files."""

    def read(reply: Reply) -> list[PredictAnswer]:
        answers = _answer(BatchAnswer, reply).predictions
        if len(answers) != len(images):
            raise UnreadableAnswerError(f"the answer has {len(answers)} predictions for {len(images)} images")
        return answers

    if images[0].kind:
        headers = {"Content-Type": NPY}
        return Call("POST", f"/predict/batch{_query(options)}", read, stacked(images), headers)
    texts = [base64.b64encode(image.content).decode("ascii") for image in images]
    content = json.dumps({"images": texts, **_given(options)}).encode()
    return Call("POST", "/predict/batch", read, content, {"Content-Type": JSON})


def models() -> Call[ModelsAnswer]:
    """Return the call that lists the models."""
    return Call("GET", "/models", lambda reply: _answer(ModelsAnswer, reply))


def model(name: str) -> Call[ModelAnswer]:
    """Return the call that describes one model."""
    return Call("GET", f"/models/{quote(name, safe='')}", lambda reply: _answer(ModelAnswer, reply))


def ready() -> Call[ReadyAnswer]:
    """Return the call that asks whether the service is ready; status 503 with its reasons is an answer, too."""

    def read(reply: Reply) -> ReadyAnswer:
        if reply.status == HTTPStatus.SERVICE_UNAVAILABLE and _media_type(reply) == JSON:
            reply = reply._replace(status=HTTPStatus.OK)
        return _answer(ReadyAnswer, reply)

    return Call("GET", "/health/ready", read)


def _given(options: Options) -> dict[str, Any]:
    return options.model_dump(exclude_unset=True, exclude_none=True)


def _query(options: Options) -> str:
    given = {name: json.dumps(value) if isinstance(value, bool) else value for name, value in _given(options).items()}
    return f"?{urlencode(given)}" if given else ""


def _media_type(reply: Reply) -> str:
    return reply.headers.get("content-type", "").partition(";")[0].strip().lower()


def _answer(kind: type[Answer], reply: Reply) -> Answer:
    """Return the body of a response; fields that this version does not know stay in it.

    Raises:
        ServiceError: the status is an error.
        UnreadableAnswerError: the response is not one of this service.
    """
    if reply.status >= HTTPStatus.BAD_REQUEST:
        raise ServiceError(_problem(reply), retry_after_s(reply.headers.get("retry-after")))
    if reply.status >= HTTPStatus.MULTIPLE_CHOICES:
        raise UnreadableAnswerError(
            f"the server redirects to {reply.headers.get('location', 'nowhere')[:_SHOWN]}, and requests do not follow: "
            "give the URL of the service itself"
        )
    if reply.status == HTTPStatus.OK and _media_type(reply) == JSON:
        try:
            return kind.model_validate_json(reply.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise UnreadableAnswerError(f"the answer is not one of this service: {place} {first['msg']}") from None
    raise UnreadableAnswerError(f"status {reply.status}, but not an answer of this service: {_shown(reply)}")


def _problem(reply: Reply) -> Problem:
    """Return the problem document of a response, or one that quotes it: proxies answer in HTML."""
    if _media_type(reply) == _PROBLEM:
        try:
            return Problem.model_validate_json(reply.content).model_copy(update={"status": reply.status})
        except ValidationError:
            pass
    try:
        title = HTTPStatus(reply.status).phrase
    except ValueError:
        title = "Unknown status"
    return Problem(type="about:blank", title=title, status=reply.status, detail=_shown(reply))


def _shown(reply: Reply) -> str:
    text = " ".join(reply.content[: 4 * _SHOWN].decode("utf-8", "replace").split())[:_SHOWN]
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return f"{_media_type(reply) or 'no media type'}: {shown}" if shown else "no content"
