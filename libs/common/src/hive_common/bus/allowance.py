"""What one executor may ask of a responder, so that one that floods takes nothing from the others.

A token bucket for each executor, in requests and in bytes, and a bound on what is handled at once. What is over it
costs the responder as little as it can: most of it is dropped unread.
"""

from collections.abc import Callable
from enum import Enum
from typing import Final

REQUESTS_PER_S: Final = 2_000
"""An executor that runs a thousand tasks a second pulls and reports less than half as often."""
BURST_REQUESTS: Final = 4_000
BYTES_PER_REQUEST: Final = 16_384
"""A request costs one more for each of these that it is long: decoding takes time too."""
IN_FLIGHT_MAX: Final = 64
"""Honest executors have a few requests under way on each subject."""
REFUSALS_PER_S: Final = 10
"""So many of those that are over it are told so; whoever goes on regardless is not heard at all."""


class Verdict(Enum):
    """What becomes of a request."""

    TAKE = "take"
    REFUSE = "refuse"
    DROP = "drop"


class _Bucket:
    __slots__ = ("filled_s", "in_flight", "left", "refusals", "refused_s")

    def __init__(self, now_s: float) -> None:
        self.left = float(BURST_REQUESTS)
        self.filled_s = now_s
        self.in_flight = 0
        self.refusals = 0
        self.refused_s = now_s


class Allowances:
    """The allowances of all executors at one responder. There are as many as there are credentials.

    Args:
        clock_s: seconds that only rise.
    """

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._buckets: dict[str, _Bucket] = {}

    def ask(self, executor: str, byte_count: int) -> Verdict:
        """Say what becomes of a request; what is taken MUST be given back to `done`."""
        now_s = self._clock_s()
        bucket = self._buckets.get(executor)
        if bucket is None:
            bucket = self._buckets[executor] = _Bucket(now_s)
        bucket.left = min(BURST_REQUESTS, bucket.left + (now_s - bucket.filled_s) * REQUESTS_PER_S)
        bucket.filled_s = now_s
        cost = 1 + byte_count // BYTES_PER_REQUEST
        if bucket.left >= cost and bucket.in_flight < IN_FLIGHT_MAX:
            bucket.left -= cost
            bucket.in_flight += 1
            return Verdict.TAKE
        if now_s - bucket.refused_s >= 1.0:
            bucket.refused_s, bucket.refusals = now_s, 0
        bucket.refusals += 1
        return Verdict.REFUSE if bucket.refusals <= REFUSALS_PER_S else Verdict.DROP

    def done(self, executor: str) -> None:
        """Take back what `ask` had taken."""
        self._buckets[executor].in_flight -= 1
