"""Hedging: percentiles within their error and in bounded memory, and extra attempts within their budget."""

from collections.abc import Callable
from random import Random

import pytest
from hive_common.judgement.hedging import (
    EXTRA_FLOOR,
    EXTRA_PERCENT,
    RELATIVE_ERROR,
    SAMPLES_MIN,
    WINDOW,
    Durations,
    ExtraBudget,
    Kinds,
    Running,
    needs_hedge,
)
from hypothesis import given, settings
from hypothesis import strategies as st

deterministic = settings(derandomize=True)
DAY_US = 24 * 3_600_000_000
durations = st.lists(
    st.integers(0, DAY_US) | st.integers(0, 2_000_000), min_size=SAMPLES_MIN, max_size=min(200, WINDOW)
)


def observed(values: list[int]) -> Durations:
    made = Durations()
    for value in values:
        made.observe(value)
    return made


def nearest_rank(values: list[int], percent: int) -> int:
    return sorted(values)[max(1, -(-len(values) * percent // 100)) - 1]


@deterministic
@given(durations, st.sampled_from([50, 90, 95, 99, 100]))
def test_a_percentile_is_as_near_as_it_says(values: list[int], percent: int) -> None:
    exact = nearest_rank(values, percent)
    found = observed(values).percentile_us(percent)
    assert found is not None and abs(found - exact) <= exact * RELATIVE_ERROR


@deterministic
@given(durations, st.randoms(use_true_random=False))
def test_the_order_of_durations_changes_nothing(values: list[int], random: Random) -> None:
    first = observed(values).percentile_us()
    random.shuffle(values)
    assert observed(values).percentile_us() == first


def test_of_few_nothing_is_said() -> None:
    few = observed([1_000] * (SAMPLES_MIN - 1))
    assert few.percentile_us() is None
    few.observe(1_000)
    assert few.percentile_us() == pytest.approx(1_000, rel=RELATIVE_ERROR)


def test_memory_is_bounded_whatever_comes() -> None:
    random = Random(1)
    kept = observed([int(2 ** (random.random() * 60)) - 5 for _ in range(20_000)])
    assert kept.buckets <= 2 * 1_064
    assert kept.total <= 2 * WINDOW
    kinds = Kinds(kinds_max=50)
    for number in range(1_000):
        kinds.observe(f"agent{number}@1", 1_000)
    assert len(kinds) == 50


def test_the_kind_that_was_not_seen_for_longest_is_forgotten() -> None:
    kinds = Kinds(kinds_max=2)
    for kind in ("a", "b", "a", "c"):
        for _ in range(SAMPLES_MIN):
            kinds.observe(kind, 1_000)
    assert kinds.hedge_after_us("a") is not None and kinds.hedge_after_us("c") is not None
    assert kinds.hedge_after_us("b") is None


def test_what_is_old_is_forgotten() -> None:
    kept = observed([1_000_000] * 5_000)
    for _ in range(2 * WINDOW):
        kept.observe(1_000)
    assert kept.percentile_us() == pytest.approx(1_000, rel=RELATIVE_ERROR)


def test_what_the_job_says_counts_instead() -> None:
    kinds = Kinds()
    assert kinds.hedge_after_us("a", 250) == 250_000
    assert kinds.hedge_after_us("a", 0) == 0
    assert kinds.hedge_after_us("a") is None


@deterministic
@given(st.lists(st.booleans(), max_size=500), st.integers(0, 20), st.integers(0, 20))
def test_extra_attempts_never_exceed_their_share(calls: list[bool], percent: int, floor: int) -> None:
    budget = ExtraBudget(percent, floor)
    firsts = extras = 0
    for first in calls:
        if first:
            budget.first()
            firsts += 1
        else:
            extras += budget.take()
        assert 100 * extras <= 100 * floor + percent * firsts
        assert budget.tokens >= 0


def test_a_quiet_day_does_not_pay_for_a_storm() -> None:
    budget = ExtraBudget(saved_max=20)
    for _ in range(100_000):
        budget.first()
    assert sum(budget.take() for _ in range(100_000)) == 20
    budget.give_back()
    assert budget.take() and not budget.take()


Draw = Callable[[Random], int]


def about_100_ms(slow_percent: int) -> Draw:
    """Attempts of about 100 ms, of which some take ten times as long."""
    return lambda random: random.randint(90_000, 110_000) * (10 if random.random() * 100 < slow_percent else 1)


def exponential(random: Random) -> int:
    return int(random.expovariate(1 / 100_000))


class Tail:
    """Tasks with one hedge each where it is allowed, beside the same without."""

    def __init__(self, draw: Draw, seed: int, observe_cancelled: bool = True) -> None:
        random = Random(seed)
        self.durations = Durations()
        self.hedged: list[int] = []
        self.plain: list[int] = []
        self.extras = 0
        budget = ExtraBudget()
        for _ in range(8_000):
            first, second = draw(random), draw(random)
            budget.first()
            self.plain.append(first)
            after = self.durations.percentile_us()
            end = first
            if after is not None and first > after and budget.take():
                self.extras += 1
                end = min(first, after + second)
                if observe_cancelled or first > end:
                    self.durations.observe(end - after)
            if observe_cancelled or first == end:
                self.durations.observe(end)
            self.hedged.append(end)

    @property
    def extra_share(self) -> float:
        return self.extras / len(self.plain)


@pytest.mark.parametrize("seed", range(2))
def test_hedges_cut_the_tail_of_few_slow_attempts(seed: int) -> None:
    tail = Tail(about_100_ms(slow_percent=2), seed)
    assert nearest_rank(tail.plain, 99) >= 900_000
    assert nearest_rank(tail.hedged, 99) <= 230_000
    assert tail.extra_share <= 0.06


def test_leaving_out_what_was_cancelled_would_sink_the_percentile() -> None:
    """Why `Durations` wants it: with the winners alone, hedges would cause hedges until the budget stops them."""
    right, wrong = Tail(exponential, 1), Tail(exponential, 1, observe_cancelled=False)
    assert right.extra_share <= 0.06 < 0.08 <= wrong.extra_share
    assert wrong.extras <= EXTRA_FLOOR + EXTRA_PERCENT / 100 * len(wrong.plain)
    found = right.durations.percentile_us(), wrong.durations.percentile_us()
    assert found[0] is not None and found[1] is not None
    assert found[0] == pytest.approx(300_000, rel=0.1)  # ln 20 = 3.0 times the mean
    assert found[1] < 0.85 * found[0]


@pytest.mark.parametrize(
    ("attempts", "needs"),
    [
        ([], False),
        ([(99, 0)], False),
        ([(100, 0)], True),
        ([(100, 0), (10, 0)], True),
        # What is said of the work counts only where it is asked for.
        ([(100, 1_000)], True),
    ],
)
def test_one_that_takes_long_needs_another(attempts: list[tuple[int, int]], needs: bool) -> None:
    assert needs_hedge([Running(*one) for one in attempts], 100) is needs


@pytest.mark.parametrize(
    ("attempts", "needs"),
    [
        ([], False),
        ([(99, 0)], False),
        ([(100, 0)], True),
        ([(100, 149)], True),
        ([(100, 150)], False),
        ([(10_000, 150)], False),
        # The first is slow, and its hedge is not: a third would gain nothing.
        ([(200, 0), (100, 150)], False),
        ([(200, 149), (100, 0)], True),
        ([(200, 0), (99, 0)], True),
    ],
)
def test_one_that_has_not_said_in_time_how_far_it_is_needs_another(
    attempts: list[tuple[int, int]], needs: bool
) -> None:
    assert needs_hedge([Running(*one) for one in attempts], 100, 150) is needs
