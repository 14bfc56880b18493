"""What back ends say when they refuse, in the catalogue. Each has a shape of its own for it."""

import re
from typing import Any, Final

import msgspec

from hive_common.inference.calls import CONTEXT_LENGTH_EXCEEDED, ModelCall
from hive_common.inference.http1 import Response
from hive_common.inference.sse import data_of
from hive_common.kernel.errors import (
    DeadlineExceeded,
    HiveError,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    Unavailable,
)

MESSAGE_CHARS_MAX: Final = 1_000
_OVERFLOW_CODES: Final = frozenset({"context_length_exceeded", "exceed_context_size_error"})
_OVERFLOW: Final = re.compile(
    r"maximum context length|exceeds? the (available|maximum|model'?s?) (context|input)"
    r"|context (size|length|window) (is )?exceeded|longer than the (maximum )?(model|context)"
    r"|input length exceeds|greater than the context length|(is )?too large to process",
    re.IGNORECASE,
)


class Told(msgspec.Struct, frozen=True):
    """What a back end says of an error. `status` is 0 where it says none."""

    message: str = ""
    type: str = ""
    code: str = ""
    param: str = ""

    @property
    def status(self) -> int:
        """HTTP status that stands in the body, in a stream for want of a better place."""
        number = int(self.code) if self.code.isdecimal() and len(self.code) == 3 else 0
        return number if number >= 400 else 0


def refusal(url: str, call: ModelCall, response: Response, body: bytes) -> HiveError:
    """Return the error for an answer that is none.

    Args:
        url: of the back end, for the message.
        call: that was refused.
        response: with a status from 300 on.
        body: of it, maybe cut.
    """
    after = response.headers.get("retry-after", "")
    return refused(url, call, response.status, _told(body), int(after) if after.isdecimal() else 0)


def refused(url: str, call: ModelCall, status: int, told: Told, retry_after_s: int = 0) -> HiveError:
    """Return the error for what a back end says."""
    message = told.message or f"status {status}"
    if {told.code, told.type} & _OVERFLOW_CODES or (status != 429 and _OVERFLOW.search(told.message)):
        return InvalidArgument(message, reason=CONTEXT_LENGTH_EXCEEDED)
    if status == 404:
        return NotFound(f"{url}: {message}", model=call.model, nearest=())
    if status in (429, 503):
        fields = {"status": status} | ({"retry_after_s": retry_after_s} if retry_after_s else {})
        return (RateLimited if status == 429 else Unavailable)(f"{url}: {message}", **fields)
    if status in (408, 504, 524):
        return DeadlineExceeded(f"{url}: {message}")
    if status in (401, 403):
        return Unavailable(f"{url}: it refuses the key that is configured for it: {message}", status=status)
    if status == 413:
        return PayloadTooLarge(message)
    if 400 <= status < 500 or status == 501:
        need = _need(call, told.message)
        known = {"path": told.param} if told.param else {}
        return InvalidArgument(message, **known, **({"reason": "unsupported", "need": need} if need else {}))
    return Unavailable(f"{url}: {message}", status=status)


def stream_error(event: bytes) -> Told | None:
    """Return what an event says went wrong, or None where it is no error."""
    if b"error" not in event:
        return None
    data = data_of(event)
    if data is None:
        # llama.cpp used a field of its own for a while.
        data = event.partition(b"error:")[2]
    try:
        found = msgspec.json.decode(data)
    except msgspec.DecodeError:
        return None
    if not isinstance(found, dict) or ("error" not in found and ("choices" in found or "message" not in found)):
        return None
    told = _from(found)
    return told if told.message else Told("it failed", told.type, told.code)


def _need(call: ModelCall, message: str) -> str:
    if call.endpoint == "embeddings" and "not support embedding" in message:
        return "embedding"
    return "tools" if "does not support tools" in message else ""


def _told(body: bytes) -> Told:
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return Told(_short(body.decode("utf-8", "replace").strip()))
    return _from(found) if isinstance(found, dict) else Told()


def _from(found: dict[str, Any]) -> Told:
    inner = found.get("error", found)
    if isinstance(inner, str):
        return Told(_short(inner))
    if not isinstance(inner, dict):
        return Told()
    message = inner.get("message") or inner.get("detail") or ""
    texts = {name: str(inner.get(name) or "") for name in ("type", "code", "param")}
    return Told(_short(message if isinstance(message, str) else str(message)), **texts)


def _short(text: str) -> str:
    return text[:MESSAGE_CHARS_MAX]
