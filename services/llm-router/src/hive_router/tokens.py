"""Capability tokens that come with calls of executors: on whose account a call is, and what it may be."""

from typing import Final, NamedTuple

import msgspec
from hive_common.inference.calls import ModelCall, narrowest
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import PermissionDenied
from hive_common.permissions import check_model
from hive_common.permissions.tokens import Claims, Verifier

from hive_router.metrics import TOKENS_REFUSED


class Attempt(NamedTuple):
    """Whose call it is; empty and 0 for a program's."""

    job: str = ""
    task: str = ""
    attempt: int = 0


NOBODY: Final = Attempt()


class CapabilityTokens:
    """Reads tokens.

    Args:
        public_key: of the installation; empty where there is none, so that no token is good.
        clock: says whether one has expired.

    Raises:
        InvalidArgument: that is no key.
    """

    def __init__(self, public_key: str, clock: Clock) -> None:
        self._verifier = Verifier(public_key) if public_key else None
        self._clock = clock

    def within(self, call: ModelCall, token: str) -> ModelCall:
        """Return the call of a guest as its token allows it: on the account of its attempt, to no place beyond.

        Raises:
            PermissionDenied: the token is no good, or does not allow this model or any place for its data.
        """
        claims = self._claims(call.origin, token, self._clock.now_us())
        check_model(claims.permissions, call.model)
        permission = claims.permissions.model
        assert permission is not None
        asked = call.tokens_max or permission.max_tokens
        return msgspec.structs.replace(
            call,
            job=claims.job,
            task=claims.task,
            attempt=claims.attempt,
            agent=claims.agent,
            pin=narrowest(call.pin, permission.pin),
            tokens_max=0 if call.endpoint == "embeddings" else min(asked, permission.max_tokens),
        )

    def attempt_of(self, executor: str, token: str) -> Attempt:
        """Return whose call it was that an executor tells of; it may have waited until its token had expired.

        Raises:
            PermissionDenied: the token is not of this installation, or another executor's.
        """
        if not token:
            return NOBODY
        claims = self._claims(executor, token, 0)
        return Attempt(claims.job, claims.task, claims.attempt)

    def _claims(self, executor: str, token: str, now_us: int) -> Claims:
        try:
            if self._verifier is None:
                raise PermissionDenied("capability tokens are not taken here: this router has no key to check them")
            return self._verifier.verify(token, executor=executor, now_us=now_us)
        except PermissionDenied:
            TOKENS_REFUSED.inc()
            raise
