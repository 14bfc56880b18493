"""What a guest may ask of the host: the parent's side of host calls. Nothing is there unless it was granted."""

import logging
import math
from collections.abc import Mapping
from typing import Final, Protocol

import msgspec
from hive_common.kernel.errors import (
    BudgetExhausted,
    DeadlineExceeded,
    HiveError,
    InvalidArgument,
    PayloadTooLarge,
    PermissionDenied,
    body_of,
)

from hive_executor.sandbox.frames import HostAnswer, HostCall
from hive_executor.sandbox.limit import TimeLimit
from hive_executor.sandbox.model import HOST_ANSWER_BYTES_MAX, HOST_REQUEST_BYTES_MAX

log = logging.getLogger(__name__)

_AFTER_LIMIT_S: Final = 0.1
"""A call that runs into the limit of its attempt is answered this much later: the guest is then interrupted when
it goes on, and its runner, which would otherwise be killed, stays."""


class Capability(Protocol):
    """One thing that an attempt was granted, with the bounds of the grant. It lives as long as the attempt."""

    async def call(self, operation: str, request: bytes, left_ms: int) -> bytes:
        """Answer one call; it is cancelled when the attempt ends.

        Args:
            operation: a function of the interface in `agent.wit`.
            request: what the guest gave: JSON if it is honest.
            left_ms: until the attempt's limit.

        Returns:
            JSON.

        Raises:
            PermissionDenied: this was not granted. The attempt ends, whatever the guest does about it.
            HiveError: anything else; the guest gets its code and its message.
        """
        ...


Capabilities = Mapping[str, Capability]
"""By the name of the permission."""


class Host:
    """Answers the host calls of one attempt.

    Args:
        granted: nothing else exists for the guest.
        limit: the attempt's time, which has begun.
    """

    def __init__(self, granted: Capabilities, limit: TimeLimit) -> None:
        self._granted = granted
        self._limit = limit
        self.denied = ""
        self.exhausted = ""
        """What a budget did not leave that others share, so that another attempt would not get it either."""

    async def answer(self, call: HostCall) -> HostAnswer:
        """Answer one call; only a cancellation comes out of this."""
        stood_s = self._limit.stood_s
        answer = await self._answered(call)
        stood_ms = math.ceil((self._limit.stood_s - stood_s) * 1000)
        return msgspec.structs.replace(answer, stood_ms=stood_ms) if stood_ms else answer

    async def _answered(self, call: HostCall) -> HostAnswer:
        try:
            return HostAnswer(await self._answer(call))
        except PermissionDenied as error:
            self.denied = error.message
            return HostAnswer(code=error.code, message=error.message, ends=True)
        except HiveError as error:
            if isinstance(error, BudgetExhausted) and _is_for_good(error):
                self.exhausted = error.message
            return HostAnswer(code=error.code, message=error.message)
        except Exception as error:
            log.exception("%s.%s failed inside the executor", call.capability, call.operation)
            return HostAnswer(code=body_of(error).code, message="the executor failed; its log has the details")

    async def _answer(self, call: HostCall) -> str:
        capability = self._granted.get(call.capability)
        if capability is None:
            raise PermissionDenied(
                f"the permission `{call.capability}` is not granted: the manifest does not ask for it "
                f"(`permissions.{call.capability}`)"
            )
        try:
            request = call.request.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"the request is not UTF-8: {error}") from error
        _check_size("the request", request, HOST_REQUEST_BYTES_MAX)
        left_ms = int(self._limit.left_s * 1000)
        try:
            with self._limit.timer(_AFTER_LIMIT_S) as timer:
                async with timer:
                    answer = await capability.call(call.operation, request, left_ms)
        except TimeoutError as error:
            raise DeadlineExceeded("the attempt's time ran out") from error
        _check_size("the answer", answer, HOST_ANSWER_BYTES_MAX)
        return answer.decode()


def _is_for_good(error: BudgetExhausted) -> bool:
    """Say whether a budget that attempts share is used up, and not held for a while by calls that run."""
    fields = error.fields
    if not {"subject", "limit", "spent", "needed"} <= fields.keys():
        return False
    return bool(fields["spent"] + fields["needed"] > fields["limit"])


def _check_size(what: str, data: bytes, bytes_max: int) -> None:
    if len(data) > bytes_max:
        raise PayloadTooLarge(f"{what} has {len(data)} bytes; expected {bytes_max} at most")
