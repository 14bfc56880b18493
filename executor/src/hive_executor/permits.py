"""What an attempt may do: what its capability token says, and nothing without one (law 6)."""

from hive_common.contracts.messages import Assignment
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import PermissionDenied
from hive_common.permissions.tokens import Claims, Verifier


class Permits:
    """Reads the tokens of attempts.

    Args:
        executor_id: of this executor; its tokens count, and no others.
        key: its public nkey.
        token_public_key: verifies them; empty where this executor was never told.
        clock: says whether one has expired.

    Raises:
        InvalidArgument: `token_public_key` is no key.
    """

    def __init__(self, executor_id: str, key: str, token_public_key: str, clock: Clock) -> None:
        self._executor_id = executor_id
        self._key = key
        self._verifier = Verifier(token_public_key) if token_public_key else None
        self._clock = clock

    def claims(self, assignment: Assignment) -> Claims | None:
        """Return what the token of an attempt says; None where it has none, and may do nothing.

        Raises:
            PermissionDenied: its token is none of this installation's, or is another executor's or attempt's, or
                has expired.
        """
        if not assignment.token:
            return None
        if self._verifier is None:
            raise PermissionDenied(
                "this executor has no key to check capability tokens with: start it anew with `hive up`, "
                "and on a machine that has joined, join again"
            )
        claims = self._verifier.verify(
            assignment.token, executor=self._executor_id, key=self._key, now_us=self._clock.now_us()
        )
        if (claims.job, claims.task, claims.attempt) != (assignment.job, assignment.task, assignment.attempt):
            raise PermissionDenied("the capability token is another attempt's")
        return claims
