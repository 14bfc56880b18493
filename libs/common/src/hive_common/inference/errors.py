"""Errors in OpenAI's shape: the one place where the catalogue becomes it."""

import math
from typing import Final

import msgspec

from hive_common.inference.calls import CONTEXT_LENGTH_EXCEEDED
from hive_common.inference.exchange import Refusal
from hive_common.kernel.errors import CATALOGUE, ErrorBody, body_of

RETRY_AFTER_S: Final = 1
"""Where nobody knows better."""

# What OpenAI calls by another name than the catalogue; clients compare these.
_CODES: Final = {
    "unauthenticated": "invalid_api_key",
    "rate_limited": "rate_limit_exceeded",
}
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    """The inner part of an error in OpenAI's shape."""

    message: str
    type: str
    code: str
    param: str | None = None


class OpenAIError(msgspec.Struct, frozen=True):
    """An error in OpenAI's shape."""

    error: OpenAIErrorBody


def openai_error(error: ErrorBody, status: int | None = None) -> OpenAIError:
    """Return `error` in OpenAI's shape.

    Args:
        error: of the catalogue, or of HTTP.
        status: where it is not the catalogue's.
    """
    status = status_of(error) if status is None else status
    param = error.fields.get("path")
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return OpenAIError(
        OpenAIErrorBody(error.message, kind, _code(error), param if isinstance(param, str) else None)
    )


def openai_refusal(error: ErrorBody) -> Refusal:
    """Return the whole answer for `error` in OpenAI's shape."""
    return Refusal(status_of(error), error_headers(error), msgspec.json.encode(openai_error(error)))


def error_event(error: BaseException) -> bytes:
    """Return the server-sent event that a stream ends with where it broke off."""
    return b"data: %b\n\n" % msgspec.json.encode(openai_error(body_of(error)))


def status_of(error: ErrorBody) -> int:
    """Return the HTTP status of an error."""
    return CATALOGUE.get(error.code, CATALOGUE["internal"]).http_status


def error_headers(error: ErrorBody) -> list[tuple[bytes, bytes]]:
    """Return the headers that an error's status asks for (RFC 9110)."""
    status = status_of(error)
    if status == 401:
        return [(b"www-authenticate", b'Bearer realm="hivefabric"')]
    if error.retryable and status in (429, 503):
        return [(b"retry-after", b"%d" % retry_after_s(error))]
    return []


def retry_after_s(error: ErrorBody) -> int:
    """Return the whole seconds until another try makes sense."""
    known = error.fields.get("retry_after_s")
    return max(1, math.ceil(known)) if isinstance(known, int | float) else RETRY_AFTER_S


def _code(error: ErrorBody) -> str:
    if error.fields.get("reason") == CONTEXT_LENGTH_EXCEEDED:
        return CONTEXT_LENGTH_EXCEEDED
    if error.code == "not_found" and "nearest" in error.fields:
        return "model_not_found"
    return _CODES.get(error.code, error.code)
