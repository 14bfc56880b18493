"""The one catalogue of errors. A code is stable; what may be retried is said by the code, not by the caller.

    HiveError
    ├── InvalidArgument      what was sent can never be accepted
    │   └── PayloadTooLarge
    ├── Unauthenticated      no key, or a wrong one
    ├── PermissionDenied     a key that may not do this
    ├── NotFound
    ├── Conflict             it exists, or it changed meanwhile
    │   └── VersionConflict  an append met another version of the stream
    ├── FailedPrecondition   not in the state the call needs
    ├── RateLimited          retryable
    ├── Unavailable          retryable: something this needs cannot be reached
    ├── DeadlineExceeded     retryable
    ├── BudgetExhausted      what was granted is used up
    ├── UnknownEvent         a reader met an event it does not know, and stopped
    ├── CorruptLog           the log does not verify
    └── Internal

`CATALOGUE` maps each code once to gRPC and HTTP; NATS replies and problem documents carry the same body
(`ErrorBody`).
"""

from typing import Any, ClassVar, NamedTuple

import msgspec


class Mapping(NamedTuple):
    """How a code looks on each transport."""

    grpc: str
    http_status: int
    title: str


class HiveError(Exception):
    """Base of every error that crosses a boundary.

    Args:
        message: one sentence for the reader: what is wrong, where, and what would be right.
        fields: small facts for programs, such as `path`, `expected`, `stream`. Never a secret.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields


class InvalidArgument(HiveError):
    """What was sent can never be accepted. `fields` has `file` and `path` where they are known."""

    code = "invalid_argument"


class PayloadTooLarge(InvalidArgument):
    """More bytes than the limit named in the message."""

    code = "payload_too_large"


class Unauthenticated(HiveError):
    """No key, or a wrong one."""

    code = "unauthenticated"


class PermissionDenied(HiveError):
    """The key is good but may not do this."""

    code = "permission_denied"


class NotFound(HiveError):
    """There is nothing under this name or id."""

    code = "not_found"


class Conflict(HiveError):
    """It exists already with other content."""

    code = "conflict"


class VersionConflict(Conflict):
    """An append expected another version of a stream. `fields`: `stream`, `expected`, `actual`."""

    code = "version_conflict"


class FailedPrecondition(HiveError):
    """The thing is not in the state that this call needs."""

    code = "failed_precondition"


class RateLimited(HiveError):
    """Too much at once; later it will be taken."""

    code = "rate_limited"
    retryable = True


class Unavailable(HiveError):
    """Something that this needs cannot be reached now."""

    code = "unavailable"
    retryable = True


class DeadlineExceeded(HiveError):
    """The time that was given ran out."""

    code = "deadline_exceeded"
    retryable = True


class BudgetExhausted(HiveError):
    """What was granted is used up; waiting does not help. `fields` may have `limit` and `spent`."""

    code = "budget_exhausted"


class UnknownEvent(HiveError):
    """A reader met a type or schema version it does not know. It must stop, never skip (law 11)."""

    code = "unknown_event"


class CorruptLog(HiveError):
    """The log contradicts itself. `fields`: `position`."""

    code = "corrupt_log"


class Internal(HiveError):
    """A defect on our side."""

    code = "internal"


CATALOGUE: dict[str, Mapping] = {
    "invalid_argument": Mapping("INVALID_ARGUMENT", 400, "Invalid argument"),
    "payload_too_large": Mapping("OUT_OF_RANGE", 413, "Payload too large"),
    "unauthenticated": Mapping("UNAUTHENTICATED", 401, "Key missing or wrong"),
    "permission_denied": Mapping("PERMISSION_DENIED", 403, "Not allowed"),
    "not_found": Mapping("NOT_FOUND", 404, "Not found"),
    "conflict": Mapping("ALREADY_EXISTS", 409, "Conflict"),
    "version_conflict": Mapping("ABORTED", 409, "Changed meanwhile"),
    "failed_precondition": Mapping("FAILED_PRECONDITION", 409, "Wrong state"),
    "rate_limited": Mapping("RESOURCE_EXHAUSTED", 429, "Too many requests"),
    "unavailable": Mapping("UNAVAILABLE", 503, "Unavailable"),
    "deadline_exceeded": Mapping("DEADLINE_EXCEEDED", 504, "Deadline exceeded"),
    "budget_exhausted": Mapping("RESOURCE_EXHAUSTED", 402, "Budget used up"),
    "unknown_event": Mapping("UNIMPLEMENTED", 500, "Unknown event"),
    "corrupt_log": Mapping("DATA_LOSS", 500, "The log does not verify"),
    "internal": Mapping("INTERNAL", 500, "Internal error"),
}


def _classes(root: type[HiveError]) -> dict[str, type[HiveError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _classes(child)
    return found


_BY_CODE = _classes(HiveError) | {"internal": Internal}


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it travels: in NATS replies, gRPC trailers and problem documents."""

    code: str
    message: str
    retryable: bool = False
    fields: dict[str, Any] = {}

    def raised(self) -> HiveError:
        """Return the error to raise. A code of a newer peer becomes `Internal` and keeps its name."""
        cls = _BY_CODE.get(self.code)
        if cls is None:
            return Internal(f"{self.code}: {self.message}", **self.fields)
        return cls(self.message, **self.fields)


def body_of(error: BaseException) -> ErrorBody:
    """Return what may leave the process about `error`. The text of a foreign exception stays inside."""
    if isinstance(error, HiveError):
        return ErrorBody(error.code, error.message, error.retryable, error.fields)
    return ErrorBody("internal", "internal error; the service's log has the details")
