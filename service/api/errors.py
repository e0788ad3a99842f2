"""Exception handlers: every error becomes a problem document."""

from __future__ import annotations

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.api.metrics import REQUEST_ID, error_type_of
from service.api.problem import problem, problem_of
from service.errors import LipcertError
from service.errors.quotations import shortened

_log = logging.getLogger(__name__)


def add_error_handlers(app: FastAPI) -> None:
    """Make the application answer every exception with a problem document."""

    @app.exception_handler(LipcertError)
    async def domain_error(request: Request, error: LipcertError) -> Response:
        path = request.scope["path"]
        answer = problem_of(error, path)
        if answer.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.error("%s %s: %s", request.method, shortened(path), error, exc_info=error)
        return answer

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        # Nobody reads this; without it a client that hangs up would count as an error of the server.
        del request, error
        return Response(status_code=HTTPStatus.BAD_REQUEST)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        detail, headers = str(error.detail), error.headers
        if error.status_code == HTTPStatus.NOT_FOUND:
            detail = f"there is no resource at {shortened(path)}; /docs lists all paths"
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # The router names the methods of one route; HEAD has a route of its own.
            allow = (error.headers or {"Allow": "GET"})["Allow"]
            # Where GET is, HEAD is; a framework that knows of both gives them in any order.
            allow = "GET, HEAD" if "GET" in allow else allow
            if request.method == "OPTIONS":
                return Response(status_code=HTTPStatus.NO_CONTENT, headers={"Allow": f"{allow}, OPTIONS"})
            detail = f"method {request.method} is not allowed at {shortened(path)}; use {allow}"
            headers = {"Allow": allow}
        return problem(error.status_code, detail, instance=path, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, faults, instance=request.scope["path"])

    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> Response:
        # Starlette raises it again after this answer, and the server logs it with its traceback.
        del error
        detail = "the server failed on this request; see its log"
        # This answer passes no middleware.
        number = request.scope.get(REQUEST_ID, "")
        answer = problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail, instance=request.scope["path"], request_id=number)
        answer.headers["X-Request-ID"] = number
        answer.headers["Content-Type"] = error_type_of(request.scope["path"])
        return answer
