from collections import Counter

from hive_common.bus.allowance import REFUSALS_PER_S, REQUESTS, Allowances, Verdict

BURST, PER_S, IN_FLIGHT = REQUESTS.burst, REQUESTS.per_s, REQUESTS.in_flight


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
    verdicts = ask(Allowances(REQUESTS, Clock()), "a", BURST + 1_000)
    assert verdicts == {
        Verdict.TAKE: BURST,
        Verdict.REFUSE: REFUSALS_PER_S,
        Verdict.DROP: 1_000 - REFUSALS_PER_S,
    }


def test_one_that_floods_takes_nothing_from_another() -> None:
    allowances = Allowances(REQUESTS, Clock())
    ask(allowances, "a", 3 * BURST)
    assert ask(allowances, "b", BURST) == {Verdict.TAKE: BURST}


def test_it_fills_with_time_up_to_a_burst() -> None:
    clock = Clock()
    allowances = Allowances(REQUESTS, clock)
    ask(allowances, "a", 2 * BURST)
    clock.now_s += 0.5
    assert ask(allowances, "a", BURST)[Verdict.TAKE] == PER_S // 2
    clock.now_s += 3_600
    assert ask(allowances, "a", 2 * BURST)[Verdict.TAKE] == BURST


def test_long_requests_cost_more() -> None:
    verdicts = ask(Allowances(REQUESTS, Clock()), "a", BURST, byte_count=9 * REQUESTS.bytes_per_message)
    assert verdicts[Verdict.TAKE] == BURST // 10


def test_what_is_handled_at_once_is_bounded() -> None:
    allowances = Allowances(REQUESTS, Clock())
    assert [allowances.ask("a", 1) for _ in range(IN_FLIGHT)] == [Verdict.TAKE] * IN_FLIGHT
    assert allowances.ask("a", 1) is Verdict.REFUSE
    allowances.done("a")
    assert allowances.ask("a", 1) is Verdict.TAKE


def test_refusals_are_told_again_after_a_second() -> None:
    clock = Clock()
    allowances = Allowances(REQUESTS, clock)
    for _ in range(IN_FLIGHT):
        allowances.ask("a", 1)
    assert [allowances.ask("a", 1) for _ in range(REFUSALS_PER_S + 1)][-1] is Verdict.DROP
    clock.now_s += 1
    assert allowances.ask("a", 1) is Verdict.REFUSE


def test_a_flood_is_what_goes_on_beyond_the_allowance() -> None:
    clock = Clock()
    allowances = Allowances(REQUESTS, clock)
    ask(allowances, "a", BURST + REQUESTS.flood_per_s - 1)
    assert not allowances.floods("a")
    clock.now_s += 1
    ask(allowances, "a", PER_S + REQUESTS.flood_per_s)
    assert allowances.floods("a")
