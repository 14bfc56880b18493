"""Request bodies: read with a bound, and taken apart without re-serialising what they carry."""

from typing import NamedTuple, TypeVar

import msgspec
from hive_common.contracts.limits import JOB_BYTES_MAX, KIB, MIB
from hive_common.contracts.values import is_digest
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge
from starlette.requests import Request

SUBMIT_BYTES_MAX = 64 * MIB
"""A job with its input. More than that is put as a blob first and named by `input_digest`."""

COMMAND_BYTES_MAX = 64 * KIB
"""The body of every other call."""

S = TypeVar("S", bound=msgspec.Struct)


class JobBody(NamedTuple):
    """A submitted job: its document without the input, and the input as the very bytes that were sent."""

    document: bytes
    input: bytes | None
    input_digest: str


def declared_length(request: Request, bytes_max: int) -> int | None:
    """Return the content length, or None where the body comes in chunks.

    Raises:
        PayloadTooLarge: it is over `bytes_max`; nothing of the body was read.
    """
    text = request.headers.get("content-length")
    length = int(text) if text is not None else None
    if length is not None and length > bytes_max:
        raise _too_large(bytes_max)
    return length


async def read_body(request: Request, bytes_max: int) -> bytes:
    """Return the body. Raises PayloadTooLarge as soon as it is known to be over `bytes_max`."""
    declared_length(request, bytes_max)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > bytes_max:
            raise _too_large(bytes_max)
        chunks.append(chunk)
    return b"".join(chunks)


async def read_command(request: Request, kind: type[S]) -> S:
    """Return a small body decoded as `kind`; an empty one is an empty object.

    Raises:
        InvalidArgument: it is not JSON, or does not fit; the message names the place in it.
    """
    body = await read_body(request, COMMAND_BYTES_MAX)
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"body: {error}", path="body") from error


def split_job(body: bytes) -> JobBody:
    """Take a job document apart into what the scheduler wants separately.

    Raises:
        InvalidArgument: it is not a JSON object, or names its input twice.
        PayloadTooLarge: without its input it is larger than a document may be.
    """
    parts = _members(body)
    given = parts.pop("input", None)
    digest = _input_digest(parts.pop("input_digest", None))
    if given is not None and digest:
        raise InvalidArgument("body: expected one of `input` and `input_digest`, not both", path="input_digest")
    document = b"{" + b",".join(msgspec.json.encode(key) + b":" + bytes(raw) for key, raw in parts.items()) + b"}"
    if len(document) > JOB_BYTES_MAX:
        raise PayloadTooLarge(
            f"body: without its input the job document has {len(document)} bytes, at most {JOB_BYTES_MAX} go",
            limit_bytes=JOB_BYTES_MAX,
        )
    return JobBody(document, None if given is None else bytes(given), digest)


def _members(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        # Raw members are passed on as they are, and only checking all of it shows where text is not UTF-8.
        str(body, "utf-8")
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"body: not UTF-8 at byte {error.start}", path="body") from error
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"body: expected a job document: {error}", path="body") from error
    except msgspec.DecodeError as error:
        where = "" if "byte" in str(error) else f" (byte {len(body)})"
        raise InvalidArgument(f"body: {error}{where}; expected a job document as JSON", path="body") from error
    except RecursionError as error:
        raise InvalidArgument("body: nested too deeply", path="body") from error


def _input_digest(raw: msgspec.Raw | None) -> str:
    if raw is None:
        return ""
    try:
        digest = msgspec.json.decode(raw, type=str)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"body.input_digest: {error}", path="input_digest") from error
    if not is_digest(digest):
        raise InvalidArgument("body.input_digest: expected `sha256:` and 64 hex digits", path="input_digest")
    return digest


def _too_large(bytes_max: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"body: at most {bytes_max} bytes are taken here", limit_bytes=bytes_max)
