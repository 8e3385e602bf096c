"""Errors as every client knows them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler, request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from nanochat.server.schemas import UNSUPPORTED

PLAIN_PATH = "/chat/completions"  # the reference's endpoint, whose errors are {"detail": ...}
TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # 5xx: server_error; others: invalid_request_error


class ApiError(Exception):
    """An answer that is an error.

    Args:
        param: the field of the request that is to blame.
        code: what a program can tell the case by.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str = "") -> Response:
        body = {"detail": self.message} if path == PLAIN_PATH else self.body()
        return JSONResponse(body, self.status, self.headers)


def add_handlers(app: FastAPI) -> None:
    """Every error of a route, and of there being none, becomes an error object."""

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if request.url.path == PLAIN_PATH:
            return await request_validation_exception_handler(request, _without_values(error))
        return _explain(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if request.url.path == PLAIN_PATH:
            return await http_exception_handler(request, error)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path}; /openapi.json lists what there is"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def crashed(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says why", code="internal_error").response(request.url.path)


def _without_values(error: RequestValidationError) -> RequestValidationError:
    """What was sent may be no JSON (NaN, half a surrogate pair), so it is not sent back."""
    return RequestValidationError([{k: v for k, v in e.items() if k in ("type", "loc", "msg")} for e in error.errors()])


def _explain(error: Mapping[str, Any]) -> ApiError:
    """The first thing that the schema refused."""
    loc: Sequence[Any] = error["loc"]
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {error['ctx']['error']} at {loc[-1]}", code="invalid_json")
    if len(loc) < 2:
        return ApiError(400, "the body must be a JSON object, sent as application/json", code="invalid_json")
    # behind a field stand the names of the types that it might have had; a message has an index and fields of its own
    place = loc[1:4] if loc[1] == "messages" else loc[1:2]
    param = ".".join(str(part) for part in place)
    if param in UNSUPPORTED:
        return ApiError(400, f"{param} is not supported here; leave it out", param, "unsupported_parameter")
    message = str(error["msg"]).removeprefix("Value error, ")
    got = "" if error["type"] in ("missing", "value_error") else f", got {_brief(error.get('input'))}"
    return ApiError(400, f"{param}: {message}{got}", param=param, code=f"invalid_{error['type']}")


def _brief(value: Any) -> str:
    text = repr(value)
    return ascii(text)[1:-1] if len(text) <= 60 else f"a {type(value).__name__}"
