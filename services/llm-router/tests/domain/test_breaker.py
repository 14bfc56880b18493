from hive_router.domain.breaker import CLOSED, Breaker, BreakerLimits, abandoned, allows, begun, failed, succeeded
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

LIMITS = BreakerLimits(failures=3, open_ms=100, open_ms_max=400)


def tripped(now_ms: int = 0) -> Breaker:
    breaker = CLOSED
    for _ in range(LIMITS.failures):
        breaker = failed(breaker, False, now_ms, LIMITS)
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = failed(failed(CLOSED, False, 0, LIMITS), False, 0, LIMITS)
    assert allows(breaker, 0)
    assert failed(succeeded(breaker, False), False, 0, LIMITS).state == "closed"
    opened = failed(breaker, False, 7, LIMITS)
    assert (opened.state, opened.until_ms) == ("open", 107)
    assert not allows(opened, 106)


def test_after_its_time_one_call_tries_and_decides() -> None:
    opened = tripped()
    probing = begun(opened, 100)
    assert (probing.state, allows(probing, 1_000_000)) == ("half_open", False)
    assert succeeded(probing, True) == CLOSED
    again = failed(probing, True, 100, LIMITS)
    assert (again.state, again.until_ms) == ("open", 300)


def test_it_stays_open_longer_each_time_up_to_a_bound() -> None:
    breaker, now, spans = tripped(), 0, []
    for _ in range(5):
        now = breaker.until_ms
        breaker = failed(begun(breaker, now), True, now, LIMITS)
        spans.append(breaker.until_ms - now)
    assert spans == [200, 400, 400, 400, 400]


def test_a_probe_whose_caller_left_lets_the_next_one_try_at_once() -> None:
    probing = begun(tripped(), 100)
    assert allows(abandoned(probing, True, 150), 150)
    assert abandoned(probing, False, 150) == probing


def test_calls_from_before_it_opened_change_nothing() -> None:
    opened = tripped()
    assert succeeded(opened, False) == failed(opened, False, 50, LIMITS) == abandoned(opened, False, 50) == opened


class BreakerMachine(RuleBasedStateMachine):
    """Calls that begin and end in any order, at any time."""

    calls: Bundle[bool] = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.breaker = CLOSED
        self.now_ms = 0
        self.probes = 0
        self.opened_ms = 0

    @rule(target=calls, passes_ms=st.integers(0, 300))
    def begin(self, passes_ms: int) -> bool | None:  # type: ignore[override]
        self.now_ms += passes_ms
        if not allows(self.breaker, self.now_ms):
            return None
        before, self.breaker = self.breaker, begun(self.breaker, self.now_ms)
        probe = self.breaker is not before
        self.probes += probe
        return probe

    @rule(call=consumes(calls), outcome=st.sampled_from(["succeeded", "failed", "abandoned"]))
    def end(self, call: bool | None, outcome: str) -> None:
        if call is None:
            return
        before = self.breaker
        if outcome == "succeeded":
            self.breaker = succeeded(before, call)
        elif outcome == "failed":
            self.breaker = failed(before, call, self.now_ms, LIMITS)
        else:
            self.breaker = abandoned(before, call, self.now_ms)
        self.probes -= call
        if before.state != "open" and self.breaker.state == "open":
            self.opened_ms = self.now_ms

    @invariant()
    def one_call_at_most_tries(self) -> None:
        assert self.probes == (self.breaker.state == "half_open")

    @invariant()
    def it_never_stays_shut_for_ever(self) -> None:
        assert self.breaker.until_ms - self.opened_ms <= LIMITS.open_ms_max or self.breaker.state == "closed"
        if self.breaker.state == "open":
            assert allows(self.breaker, self.breaker.until_ms)

    @invariant()
    def closed_means_fewer_failures_than_the_limit(self) -> None:
        if self.breaker.state == "closed":
            assert self.breaker.failures < LIMITS.failures


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=60, stateful_step_count=40)
