"""When a second attempt starts beside a slow first one, and how many of them there may be.

A hedge starts when the first attempt is slower than the 95th percentile of its kind: then about one task in twenty
gets a second attempt, and the tail is cut (J. Dean, L. A. Barroso, The Tail at Scale, CACM 56(2), 2013). A budget
bounds all extra attempts together, so that a slow fleet is not made slower by its own hedges (RetryBudget of
Finagle, Twitter's RPC library).
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

from hive_common.contracts.limits import TIMEOUT_MAX_MS

QUANTILE_PERCENT: Final = 95
SAMPLES_MIN: Final = 20
"""Below this the 95th percentile is the greatest of what was seen, which is no estimate."""
WINDOW: Final = 1_000
"""Percentiles are of the last one to two thousand attempts: what is old is forgotten whole."""
KINDS_MAX: Final = 1_000
"""Kinds of which durations are known; beyond it, what was not seen for longest is forgotten."""
EXTRA_PERCENT: Final = 10
EXTRA_FLOOR: Final = 10
EXTRA_SAVED_MAX: Final = 100

_BITS: Final = 5
_DURATION_MAX_US: Final = TIMEOUT_MAX_MS * 1_000
RELATIVE_ERROR: Final = 1 / (1 << (_BITS + 1))
"""Of a percentile: half the width of a bucket, 1/64."""


class Durations:
    """Durations of one kind, and their percentiles.

    A histogram whose buckets are 1/32 of the power of two wide in which they lie (G. Tene, HdrHistogram): integers
    only, so that it is the same on every machine, and within a window in whatever order durations came. A
    percentile is the middle of the bucket that holds the nearest-rank percentile of what is counted: off by 1/64
    (1.6 %) of it at most. There are two windows of at most 1,064 buckets (32 for each power of two up to a day).

    What was cancelled because another was faster MUST be observed too, with the time it had run: left out, the
    percentile would sink with each hedge, and cause more of them. It had run for longer than the percentile, and
    how much longer does not change a percentile.
    """

    def __init__(self) -> None:
        self._now: Counter[int] = Counter()
        self._before: Counter[int] = Counter()
        self._now_total = 0
        self.total = 0

    def observe(self, duration_us: int) -> None:
        """Count one attempt: how long it ran until it ended, or was cancelled."""
        if self._now_total == WINDOW:
            self._before, self._now = self._now, Counter()
            self.total, self._now_total = WINDOW, 0
        self._now[_bucket(min(max(duration_us, 0), _DURATION_MAX_US))] += 1
        self._now_total += 1
        self.total += 1

    def percentile_us(self, percent: int = QUANTILE_PERCENT) -> int | None:
        """Return a percentile; None while too few are known."""
        if self.total < SAMPLES_MIN:
            return None
        rank = max(1, -(-self.total * percent // 100))
        passed = 0
        for bucket in sorted(self._now.keys() | self._before.keys()):
            passed += self._now[bucket] + self._before[bucket]
            if passed >= rank:
                return _middle(bucket)
        raise AssertionError("the counts are fewer than their total")

    @property
    def buckets(self) -> int:
        """How many numbers are kept."""
        return len(self._now) + len(self._before)


class Kinds:
    """Durations by kind, such as an agent and its version; the least recently seen kind is forgotten."""

    def __init__(self, kinds_max: int = KINDS_MAX) -> None:
        self._kinds: dict[str, Durations] = {}
        self._kinds_max = kinds_max

    def observe(self, kind: str, duration_us: int) -> None:
        """Count one attempt of a kind."""
        durations = self._kinds.pop(kind, None) or Durations()
        self._kinds[kind] = durations
        if len(self._kinds) > self._kinds_max:
            del self._kinds[next(iter(self._kinds))]
        durations.observe(duration_us)

    def hedge_after_us(self, kind: str, hedge_after_ms: int | None = None) -> int | None:
        """Return after which time of its first attempt a task gets a second one; None: not at all.

        One hedge does not help where both are slow: with 5 % slow attempts that is one task in 400, more than a
        99.9th percentile leaves out. A further hedge after as long again helps there. And where one attempt in
        twenty is slow, or more, this percentile is a slow one's: such jobs say `hedge_after`.

        Args:
            hedge_after_ms: what the job asks for, which counts instead of what is known.
        """
        if hedge_after_ms is not None:
            return hedge_after_ms * 1_000
        durations = self._kinds.get(kind)
        return None if durations is None else durations.percentile_us()

    def __len__(self) -> int:
        return len(self._kinds)


class Running(NamedTuple):
    """An attempt that runs: for how long, and how far it says it is, in thousandths; 0: it has said nothing."""

    age_us: int
    done_permille: int = 0


def needs_hedge(attempts: Iterable[Running], after_us: int, unless_permille: int = 0) -> bool:
    """Say whether a task gets another attempt beside these: one is slow, and none is known not to be.

    Time alone tells that an attempt is slow when it has taken longer than others in all. What it says of its work
    tells it as much sooner as there was less to do by then (M. Zaharia et al., Improving MapReduce Performance in
    Heterogeneous Environments, OSDI 2008).

    Args:
        attempts: all of the task that run.
        after_us: from this age on one is slow.
        unless_permille: of its work; one that says that so much is done is not slow, at whatever age. 0: what
            attempts say does not count.
    """
    found = list(attempts)
    if unless_permille and any(one.done_permille >= unless_permille for one in found):
        return False
    return any(one.age_us >= after_us for one in found)


class ExtraBudget:
    """Bounds extra attempts to a share of first ones: extras ≤ floor + percent/100 x firsts, at any time.

    A bucket of tokens: each first attempt puts in `percent` hundredths of one, each extra takes one out. It starts
    with `floor` tokens, so that small installations hedge at all, and holds no more than `saved_max`, so that a
    quiet day does not pay for a storm.
    """

    def __init__(
        self, percent: int = EXTRA_PERCENT, floor: int = EXTRA_FLOOR, saved_max: int = EXTRA_SAVED_MAX
    ) -> None:
        self._percent = percent
        self._saved_max = 100 * max(saved_max, floor)
        self._hundredths = 100 * floor

    def first(self) -> None:
        """A task was given its first attempt."""
        self._hundredths = min(self._hundredths + self._percent, self._saved_max)

    def take(self) -> bool:
        """Take a token for an extra attempt; False where there is none, and then it MUST NOT be made."""
        if self._hundredths < 100:
            return False
        self._hundredths -= 100
        return True

    def give_back(self) -> None:
        """The extra attempt that a token was taken for was not made after all."""
        self._hundredths = min(self._hundredths + 100, self._saved_max)

    @property
    def tokens(self) -> int:
        """Extra attempts that may be made now."""
        return self._hundredths // 100


def _bucket(value: int) -> int:
    """Number the buckets: exact below 32, then 32 for each power of two."""
    shift = max(value.bit_length() - _BITS - 1, 0)
    return (shift << _BITS) + (value >> shift)


def _middle(bucket: int) -> int:
    shift = max((bucket >> _BITS) - 1, 0)
    return ((bucket - (shift << _BITS)) << shift) + ((1 << shift) >> 1)
