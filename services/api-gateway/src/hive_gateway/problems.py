"""Errors as they leave on HTTP: problem details (RFC 9457), or OpenAI's and Ollama's shape under their paths."""

import logging
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from hive_common.inference.errors import openai_error, retry_after_s
from hive_common.inference.ollama import Ollama
from hive_common.inference.openai import OpenAI
from hive_common.kernel.errors import CATALOGUE, ErrorBody, HiveError, InvalidArgument, body_of
from hive_common.kernel.ids import new_id
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

log = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"
CLIENT_CLOSED = 499
"""Written to metrics where a client went away before its answer; nobody receives it."""

# Codes that only HTTP has: the catalogue speaks of calls, not of verbs.
_HTTP_ONLY = {405: ("method_not_allowed", "Method not allowed")}
# In place of the regular expression that a parameter did not match.
_WANTED = {
    "job_id": "the id of a job: a UUID in lower case",
    "call_id": "the id of a model call, its `x-request-id`: a UUID in lower case",
    "task_id": "the id of a task: a UUID in lower case",
    "digest": "`sha256:` and 64 hexadecimal digits in lower case",
}
_BY_STATUS = {400: "invalid_argument", 401: "unauthenticated", 403: "permission_denied", 404: "not_found"}


class Problem(msgspec.Struct, frozen=True):
    """Problem details (RFC 9457). Further members are facts for programs, such as `path` or `expected`."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool


def problem_of(error: ErrorBody) -> dict[str, Any]:
    """Return the members of the problem document for `error`."""
    mapping = CATALOGUE.get(error.code, CATALOGUE["internal"])
    return _members(error, mapping.http_status, mapping.title)


def error_response(path: str, error: BaseException) -> Response:
    """Return the answer for `error` on `path`, headers included."""
    body = body_of(error)
    mapping = CATALOGUE.get(body.code, CATALOGUE["internal"])
    return _response(path, body, mapping.http_status, mapping.title, {})


def install(app: FastAPI) -> None:
    """Register the handlers; there is no other place where an error becomes an answer."""
    app.add_exception_handler(HiveError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_error)


async def answer_of(request: Request, error: Exception) -> Response:
    """Return the answer where a handler raised `error` outside of FastAPI."""
    if isinstance(error, ClientDisconnect):
        return await _on_disconnect(request, error)
    return await _on_error(request, error)


async def _on_error(request: Request, error: Exception) -> Response:
    if body_of(error).code == "internal":
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(request.url.path, error)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    wanted = _WANTED.get(str(first["loc"][-1])) if first["type"] == "string_pattern_mismatch" else None
    if wanted is None:
        return error_response(request.url.path, InvalidArgument(f"{path}: {first['msg']}", path=path))
    message = f"{path}: got {str(first['input'])[:80]!r}; expected {wanted}"
    return error_response(request.url.path, InvalidArgument(message, path=path, expected=wanted))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, dict(error.headers or {})
    if error.status_code in _HTTP_ONLY:
        code, title = _HTTP_ONLY[error.status_code]
        body = ErrorBody(code, f"{request.method} is not allowed on {path}")
        return _response(path, body, error.status_code, title, headers)
    code = _BY_STATUS.get(error.status_code, "internal")
    detail = f"there is nothing at {path}" if error.status_code == 404 else str(error.detail)
    return _response(path, ErrorBody(code, detail), error.status_code, CATALOGUE[code].title, headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


def _response(path: str, error: ErrorBody, status: int, title: str, headers: dict[str, str]) -> Response:
    headers = _headers(error, status) | headers
    if Ollama.route(path):
        headers["x-request-id"] = new_id()
        return Response(msgspec.json.encode({"error": error.message}), status, headers, "application/json")
    if OpenAI.route(path):
        headers["x-request-id"] = new_id()
        return Response(msgspec.json.encode(openai_error(error, status)), status, headers, "application/json")
    content = msgspec.json.encode(_members(error, status, title), enc_hook=str)
    return Response(content, status, headers, PROBLEM_TYPE)


def _members(error: ErrorBody, status: int, title: str) -> dict[str, Any]:
    own = {
        "type": f"urn:hivefabric:error:{error.code}",
        "title": title,
        "status": status,
        "detail": error.message,
        "code": error.code,
        "retryable": error.retryable,
    }
    return own | {key: value for key, value in error.fields.items() if key not in own}


def _headers(error: ErrorBody, status: int) -> dict[str, str]:
    if status == 401:
        return {"WWW-Authenticate": 'Bearer realm="hivefabric"'}
    if error.retryable and status in (429, 503):
        return {"Retry-After": str(retry_after_s(error))}
    return {}
