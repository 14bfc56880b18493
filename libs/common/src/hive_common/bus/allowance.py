"""What one executor may ask of a service, so that one that floods takes nothing from the others.

A token bucket for each executor, in messages and in bytes, and a bound on what is handled at once.
"""

from collections.abc import Callable, KeysView
from enum import Enum
from typing import Final

import msgspec

REFUSALS_PER_S: Final = 1
"""So many of those that are over it are told so, and logged; whoever goes on regardless is not heard at all."""


class Verdict(Enum):
    """What becomes of a message."""

    TAKE = "take"
    REFUSE = "refuse"
    DROP = "drop"


class Allowance(msgspec.Struct, frozen=True, kw_only=True):
    """How much each executor may send to one subject.

    Args:
        per_s: messages.
        burst: messages at once after a quiet time.
        bytes_per_message: a message costs one more for each of these that it is long: decoding takes time too.
        in_flight: handled at the same time; 0 where that is not counted.
        flood_per_s: so many beyond all that are a flood.
    """

    per_s: int = 2_000
    burst: int = 2_000
    bytes_per_message: int = 16_384
    in_flight: int = 64
    flood_per_s: int = 1_000


REQUESTS: Final = Allowance()
"""An executor that runs a thousand tasks a second pulls and reports a tenth as often, a few at a time."""


class _Bucket:
    __slots__ = ("filled_s", "in_flight", "left", "over", "over_s")

    def __init__(self, left: float, now_s: float) -> None:
        self.left = left
        self.filled_s = now_s
        self.in_flight = 0
        self.over = 0
        self.over_s = now_s


class Allowances:
    """What each executor has left at one subject. There are as many as there are credentials.

    Args:
        allowance: of each.
        clock_s: seconds that only rise.
    """

    def __init__(self, allowance: Allowance, clock_s: Callable[[], float]) -> None:
        self._allowance = allowance
        self._clock_s = clock_s
        self._buckets: dict[str, _Bucket] = {}

    @property
    def seen(self) -> KeysView[str]:
        """Every executor that has asked."""
        return self._buckets.keys()

    def ask(self, executor: str, byte_count: int) -> Verdict:
        """Say what becomes of a message. Where `in_flight` is counted, what is taken MUST be given to `done`."""
        allowance, now_s = self._allowance, self._clock_s()
        bucket = self._buckets.get(executor)
        if bucket is None:
            bucket = self._buckets[executor] = _Bucket(allowance.burst, now_s)
        bucket.left = min(allowance.burst, bucket.left + (now_s - bucket.filled_s) * allowance.per_s)
        bucket.filled_s = now_s
        cost = 1 + byte_count // allowance.bytes_per_message
        if bucket.left >= cost and (not allowance.in_flight or bucket.in_flight < allowance.in_flight):
            bucket.left -= cost
            bucket.in_flight += 1
            return Verdict.TAKE
        if now_s - bucket.over_s >= 1.0:
            bucket.over_s, bucket.over = now_s, 0
        bucket.over += 1
        return Verdict.REFUSE if bucket.over <= REFUSALS_PER_S else Verdict.DROP

    def floods(self, executor: str) -> bool:
        """Say whether what came beyond the allowance of an executor in this second is a flood."""
        return self._buckets[executor].over >= self._allowance.flood_per_s

    def done(self, executor: str) -> None:
        """Take back what `ask` had taken."""
        self._buckets[executor].in_flight -= 1
