"""Problem documents: the single table from domain error to HTTP status, and the RFC 9457 body.

RFC 9457 (Problem Details for HTTP APIs): members `type`, `title`, `status`, `detail`, `instance`, media type
`application/problem+json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType

from starlette.responses import Response

from service import errors

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:problem-type:lipcert:"
_MOST_BYTES = 4096 - 256
"""Room for an identifier of the request is left of the 4 KiB."""
_MOST_INSTANCE = 200

STATUS: Mapping[type[errors.LipcertError], HTTPStatus] = MappingProxyType(
    {
        errors.RequestSyntaxError: HTTPStatus.BAD_REQUEST,
        errors.HeadTooLargeError: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        errors.TargetTooLongError: HTTPStatus.REQUEST_URI_TOO_LONG,
        errors.TooSlowError: HTTPStatus.REQUEST_TIMEOUT,
        errors.EmptyBodyError: HTTPStatus.BAD_REQUEST,
        errors.MalformedBodyError: HTTPStatus.BAD_REQUEST,
        errors.UnknownModelError: HTTPStatus.NOT_FOUND,
        errors.UnknownVersionError: HTTPStatus.NOT_FOUND,
        errors.UnknownSampleError: HTTPStatus.NOT_FOUND,
        errors.BodyTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        errors.ImageTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        errors.BatchTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        errors.PathTooLongError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        errors.TooManyValuesError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        errors.TooCostlyError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.MediaTypeError: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        errors.ContentCodingError: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        errors.OptionError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.UnknownOptionError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.Base64Error: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.NotAnImageError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.ImageFormatError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.ArrayError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.ImageSizeError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.SideTooLongError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.MixedSizesError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.ChannelsError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.PixelRangeError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.UnknownLabelError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.TargetIsPredictedClassError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.CalibrationError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.NoveltyError: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.InputError: HTTPStatus.BAD_REQUEST,
        errors.BusyError: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.OverloadedError: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.TooManyConnectionsError: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.DeadlineError: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.DeviceLostError: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.AccessError: HTTPStatus.FORBIDDEN,
        errors.UnauthorizedError: HTTPStatus.UNAUTHORIZED,
        errors.ForbiddenError: HTTPStatus.FORBIDDEN,
        errors.RateLimitError: HTTPStatus.TOO_MANY_REQUESTS,
        errors.UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.ArtefactChangedError: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.ModelNotAvailableError: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.ModelControlError: HTTPStatus.CONFLICT,
        errors.NotImplementedByServerError: HTTPStatus.NOT_IMPLEMENTED,
        errors.HttpVersionError: HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
        # These stop the server at start. In an answer, a check is missing.
        errors.ArtefactError: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.ProviderError: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.SettingsError: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.PortError: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.ClusterError: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.KeptError: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.ImportRefusedError: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.LipcertError: HTTPStatus.INTERNAL_SERVER_ERROR,
    }
)
"""HTTP status of each domain error; total over the tree of `service.errors`."""


def has_error_member(path: str) -> bool:
    """Return whether errors at a path have the member `error`, as the Open Inference Protocol and KServe V1 ask for."""
    return path.startswith(("/v2/", "/v1/")) or path in ("/v2", "/v1")


def problem_of(error: errors.LipcertError, instance: str | None = None, error_member: bool = False) -> Response:
    """Return the response to a domain error.

    Args:
        error: its class gives the status (see `STATUS`), the type and the title; its message is the detail.
        instance: path of the request.
        error_member: see `problem`.
    """
    words = re.findall(r"[A-Z][a-z0-9]*", type(error).__name__.removesuffix("Error"))
    status = STATUS[type(error)]
    detail = str(error)
    if status is HTTPStatus.INTERNAL_SERVER_ERROR:
        detail = "the server failed on a valid request; see its log"
    headers: dict[str, str] = {}
    if isinstance(error, errors.MediaTypeError):
        headers["Accept"] = ", ".join(error.accepted)
    if isinstance(error, errors.ContentCodingError):
        # RFC 7694 section 3.
        headers["Accept-Encoding"] = ", ".join(error.accepted)
    if isinstance(error, errors.BusyError | errors.RateLimitError):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, errors.UnauthorizedError):
        headers["WWW-Authenticate"] = 'Bearer realm="lipcert"'
    if isinstance(error, errors.ForbiddenError):
        headers["WWW-Authenticate"] = f'Bearer realm="lipcert", error="insufficient_scope", scope="{error.scope}"'
    return problem(
        status,
        detail,
        type_uri=TYPE_PREFIX + "-".join(word.lower() for word in words),
        title=" ".join(words).capitalize(),
        instance=instance,
        headers=headers,
        error_member=error_member,
    )


def last_bytes(answer: Response) -> bytes:
    """Return the complete response, but for `Date`; the client is told that the connection closes."""
    lines = [f"HTTP/1.1 {answer.status_code} {HTTPStatus(answer.status_code).phrase}\r\n".encode()]
    for name, value in answer.raw_headers:
        lines += [name, b": ", value, b"\r\n"]
    return b"".join([*lines, b"connection: close\r\n\r\n", bytes(answer.body)])


def problem(
    status: int,
    detail: str,
    *,
    type_uri: str = "about:blank",
    title: str | None = None,
    instance: str | None = None,
    headers: Mapping[str, str] | None = None,
    error_member: bool = False,
    request_id: str | None = None,
) -> Response:
    """Return an RFC 9457 response.

    The document has at most 4 KiB, whatever the request was.

    Args:
        status: HTTP status.
        detail: cause and remedy, for a person.
        type_uri: with `about:blank`, the title must be the phrase of the status (section 4.2.1).
        title: default: the phrase of the status.
        instance: path of the request; left out if it is very long.
        headers: further headers of the response.
        error_member: whether to repeat the detail in the extension member `error` (section 3.2), also where the
            instance is not one of `has_error_member`.
        request_id: identifier of the request, for an answer that passes no middleware, which adds it to others.
    """
    body: dict[str, str | int] = {
        "type": type_uri,
        "title": title or HTTPStatus(status).phrase,
        "status": int(status),
        "detail": detail,
    }
    if instance is not None:
        error_member = error_member or has_error_member(instance)
        if len(instance) <= _MOST_INSTANCE:
            body["instance"] = instance
    if request_id is not None:
        body["request_id"] = request_id
    while True:
        if error_member:
            body["error"] = detail
        # ensure_ascii: the detail may quote the request, surrogates included.
        content = json.dumps(body, ensure_ascii=True)
        if len(content) <= _MOST_BYTES:
            return Response(content, status_code=status, media_type=MEDIA_TYPE, headers=headers)
        # Messages quote at most `quotations.shortened`, so this is rare: labels in an alphabet that takes many bytes.
        detail = body["detail"] = f"{detail[: len(detail) // 2]}..."
