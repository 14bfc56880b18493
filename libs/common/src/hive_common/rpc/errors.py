"""The catalogue of errors on gRPC: status code, message, and the whole body in a trailer."""

import grpc
import grpc.aio
import msgspec

from hive_common.kernel.errors import (
    CATALOGUE,
    DeadlineExceeded,
    ErrorBody,
    HiveError,
    Internal,
    Unavailable,
    body_of,
)

TRAILER = "hive-error-bin"


def status_of(body: ErrorBody) -> grpc.StatusCode:
    """Return the gRPC status of an error."""
    mapping = CATALOGUE.get(body.code, CATALOGUE["internal"])
    return grpc.StatusCode[mapping.grpc]


async def abort(context: grpc.aio.ServicerContext[object, object], error: BaseException) -> None:
    """End a call with `error`. Never returns normally."""
    body = body_of(error)
    await context.abort(status_of(body), body.message, ((TRAILER, msgspec.json.encode(body)),))


def raised(error: grpc.aio.AioRpcError) -> HiveError:
    """Return the catalogue's error for a failed call."""
    for key, value in error.trailing_metadata() or ():
        if key == TRAILER and isinstance(value, bytes):
            return msgspec.json.decode(value, type=ErrorBody).raised()
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(error.details() or "the service cannot be reached")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded("the service did not answer in time")
    for code, mapping in CATALOGUE.items():
        if mapping.grpc == error.code().name:
            return ErrorBody(code, error.details() or mapping.title).raised()
    return Internal(f"{error.code().name}: {error.details()}")
