from collections import Counter

from hive_common.bus.allowance import (
    BURST_REQUESTS,
    BYTES_PER_REQUEST,
    IN_FLIGHT_MAX,
    REFUSALS_PER_S,
    REQUESTS_PER_S,
    Allowances,
    Verdict,
)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def ask(allowances: Allowances, executor: str, times: int, byte_count: int = 100) -> Counter[Verdict]:
    """Ask and be done at once."""
    verdicts: Counter[Verdict] = Counter()
    for _ in range(times):
        verdict = allowances.ask(executor, byte_count)
        verdicts[verdict] += 1
        if verdict is Verdict.TAKE:
            allowances.done(executor)
    return verdicts


def test_a_burst_is_taken_a_few_are_told_and_the_rest_is_dropped() -> None:
    verdicts = ask(Allowances(Clock()), "a", BURST_REQUESTS + 1_000)
    assert verdicts == {
        Verdict.TAKE: BURST_REQUESTS,
        Verdict.REFUSE: REFUSALS_PER_S,
        Verdict.DROP: 1_000 - REFUSALS_PER_S,
    }


def test_one_that_floods_takes_nothing_from_another() -> None:
    allowances = Allowances(Clock())
    ask(allowances, "a", 3 * BURST_REQUESTS)
    assert ask(allowances, "b", BURST_REQUESTS) == {Verdict.TAKE: BURST_REQUESTS}


def test_it_fills_with_time_up_to_a_burst() -> None:
    clock = Clock()
    allowances = Allowances(clock)
    ask(allowances, "a", 2 * BURST_REQUESTS)
    clock.now_s += 0.5
    assert ask(allowances, "a", BURST_REQUESTS)[Verdict.TAKE] == REQUESTS_PER_S // 2
    clock.now_s += 3_600
    assert ask(allowances, "a", 2 * BURST_REQUESTS)[Verdict.TAKE] == BURST_REQUESTS


def test_long_requests_cost_more() -> None:
    verdicts = ask(Allowances(Clock()), "a", BURST_REQUESTS, byte_count=9 * BYTES_PER_REQUEST)
    assert verdicts[Verdict.TAKE] == BURST_REQUESTS // 10


def test_what_is_handled_at_once_is_bounded() -> None:
    allowances = Allowances(Clock())
    assert [allowances.ask("a", 1) for _ in range(IN_FLIGHT_MAX)] == [Verdict.TAKE] * IN_FLIGHT_MAX
    assert allowances.ask("a", 1) is Verdict.REFUSE
    allowances.done("a")
    assert allowances.ask("a", 1) is Verdict.TAKE


def test_refusals_are_told_again_after_a_second() -> None:
    clock = Clock()
    allowances = Allowances(clock)
    for _ in range(IN_FLIGHT_MAX):
        allowances.ask("a", 1)
    assert [allowances.ask("a", 1) for _ in range(REFUSALS_PER_S + 1)][-1] is Verdict.DROP
    clock.now_s += 1
    assert allowances.ask("a", 1) is Verdict.REFUSE
