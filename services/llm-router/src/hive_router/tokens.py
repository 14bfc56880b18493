"""Capability tokens that come with calls of executors: on whose account a call is, and what it may be."""

from typing import Final, NamedTuple

import msgspec
from hive_common.control.kill_log import KillLog
from hive_common.inference.bodies import decode
from hive_common.inference.calls import ModelCall, narrowest
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import PermissionDenied
from hive_common.permissions import check_model
from hive_common.permissions.actions import check_approved, model_action
from hive_common.permissions.tokens import Claims, Verifier

from hive_router.kills import killed
from hive_router.metrics import TOKENS_REFUSED


class Attempt(NamedTuple):
    """Whose call it is; empty and 0 for a program's. `pin` and `counts_only` are its job's."""

    job: str = ""
    task: str = ""
    attempt: int = 0
    pin: str = ""
    counts_only: bool = False


NOBODY: Final = Attempt()


class CapabilityTokens:
    """Reads tokens.

    Args:
        public_key: of the installation; empty where there is none, so that no token is good.
        clock: says whether one has expired.
        kills: what was stopped.

    Raises:
        InvalidArgument: that is no key.
    """

    def __init__(self, public_key: str, clock: Clock, kills: KillLog) -> None:
        self._verifier = Verifier(public_key) if public_key else None
        self._clock = clock
        self._kills = kills

    def within(self, call: ModelCall, token: str) -> ModelCall:
        """Return the call of a guest as its token allows it: on the account of its attempt, to no place beyond.

        What the call says of itself counts where it is narrower than what the scheduler said in the token.

        Raises:
            PermissionDenied: the token is no good, or does not allow this model or any place for its data; or what
                it was made for was killed since.
        """
        claims = self._claims(call.origin, token, self._clock.now_us())
        name, _, version = claims.agent.partition("@")
        entry = self._kills.ended(call.origin, name, version, claims.job, claims.kill_epoch)
        if entry is not None:
            TOKENS_REFUSED.inc()
            raise killed(self._kills, entry)
        check_model(claims.permissions, call.model)
        if "model" in claims.permissions.asks:
            # A person was asked, and approved of just this.
            body = decode(call.body, dict[str, msgspec.Raw])
            counts_only = claims.counts_only or call.counts_only
            action = model_action(claims.agent, call.endpoint, call.model, body, counts_only)
            check_approved(claims.permissions, claims.approved, action)
        permission = claims.permissions.model
        assert permission is not None
        asked = call.tokens_max or permission.max_tokens
        is_text = call.endpoint != "embeddings"
        return msgspec.structs.replace(
            call,
            job=claims.job,
            task=claims.task,
            attempt=claims.attempt,
            agent=claims.agent,
            pin=narrowest(narrowest(claims.pin, permission.pin), call.pin),
            counts_only=claims.counts_only or call.counts_only,
            tokens_max=min(asked, permission.max_tokens) if is_text else 0,
            attempt_tokens_max=permission.max_tokens if is_text else 0,
            budgets=claims.budgets,
        )

    def attempt_of(self, executor: str, token: str) -> Attempt:
        """Return whose call it was that an executor tells of; it may have waited until its token had expired.

        Raises:
            PermissionDenied: the token is not of this installation, or another executor's.
        """
        if not token:
            return NOBODY
        claims = self._claims(executor, token, 0)
        return Attempt(claims.job, claims.task, claims.attempt, claims.pin, claims.counts_only)

    def _claims(self, executor: str, token: str, now_us: int) -> Claims:
        try:
            if self._verifier is None:
                raise PermissionDenied("capability tokens are not taken here: this router has no key to check them")
            return self._verifier.verify(token, executor=executor, now_us=now_us)
        except PermissionDenied:
            TOKENS_REFUSED.inc()
            raise
