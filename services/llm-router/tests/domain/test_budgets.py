import pytest
from hive_common.contracts.budgets import SharedBudget
from hive_common.contracts.events import BudgetLimit, BudgetReserved, BudgetReturned, BudgetSet, JoinTokenUsed
from hive_common.kernel.errors import InvalidArgument, UnknownEvent
from hive_common.kernel.ids import new_id
from hive_router.domain.budgets import (
    BLOCK_CALLS,
    BLOCK_CALLS_MAX,
    NOTHING,
    PERIODS,
    UNITS,
    Account,
    Amount,
    Purse,
    Shortage,
    asked_of,
    block,
    block_calls,
    changed,
    check_limits,
    check_subject,
    has_budget,
    limits_of,
    over_request,
    subjects_of,
    windows,
    with_asked,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

DAY = "2026-11-26"
MONTH_USD = BudgetLimit("month", "usd", 1_000)


def account(*limits: BudgetLimit, counted: dict[str, Amount] | None = None) -> Account:
    return Account("total", 1, limits, counted or {})


def test_a_block_is_for_several_calls_and_never_beyond_a_limit() -> None:
    purse, need = Purse(DAY), Amount(100, 10)
    large = BudgetLimit("month", "usd", 10_000)
    assert block(account(large), [large], purse, need, need) == Amount(100 * BLOCK_CALLS, 10 * BLOCK_CALLS)
    assert block(account(large), [large], purse, need, need, 2) == Amount(200, 20)
    # Of what a limit leaves a part stays for others, unless calls wait for it.
    assert block(account(MONTH_USD), [MONTH_USD], purse, need, need) == Amount(250, 80)
    assert block(account(MONTH_USD), [MONTH_USD], purse, need, Amount(900, 0)) == Amount(900, 80)
    used = account(MONTH_USD, counted={"2026-11": Amount(850, 0)})
    assert block(used, [MONTH_USD], purse, need, need.times(8)) == Amount(150, 10 * BLOCK_CALLS)


def test_under_load_a_block_is_for_more_calls() -> None:
    assert block_calls(8, 0.1) == 16
    assert block_calls(BLOCK_CALLS_MAX, 0.1) == BLOCK_CALLS_MAX
    assert block_calls(16, 1.0) == 16
    assert (block_calls(16, 60.0), block_calls(BLOCK_CALLS, 60.0)) == (8, BLOCK_CALLS)


def test_what_is_free_already_is_not_asked_for_again() -> None:
    purse = Purse(DAY)
    purse.fill(Amount(60, 0))
    used = account(MONTH_USD, counted={"2026-11": Amount(960, 0)})
    assert block(used, [MONTH_USD], purse, Amount(100, 0), Amount(100, 0)) == Amount(40, 0)
    short = block(used, [MONTH_USD], purse, Amount(101, 0), Amount(101, 0))
    assert short == Shortage("total", MONTH_USD, spent=900, reserved=0, need=101)


def test_all_that_waits_is_asked_for_at_once() -> None:
    limit = BudgetLimit("ever", "usd", 10**9)
    assert block(account(limit), [limit], Purse(DAY), Amount(1, 1), Amount(500, 500)) == Amount(500, 500)


def test_days_and_months_end_and_ever_does_not() -> None:
    state = account()
    state.evolve(BudgetReserved("total", "b", "2026-11-30", 100, 1))
    state.evolve(BudgetReserved("total", "b", "2026-12-01", 10, 1))
    state.evolve(BudgetReturned("total", "b", "2026-12-01", 3, 1))
    assert state.counted == {
        "2026-11-30": Amount(100, 1),
        "2026-11": Amount(100, 1),
        "2026-12-01": Amount(7, 0),
        "2026-12": Amount(7, 0),
        "ever": Amount(107, 1),
    }
    assert state.version == 4


def test_a_stream_with_something_else_in_it_stops_its_reader() -> None:
    with pytest.raises(UnknownEvent):
        account().evolve(JoinTokenUsed("x"))


def test_a_failed_call_gives_its_money_back_and_a_finished_one_what_it_did_not_use() -> None:
    purse = Purse(DAY)
    purse.fill(Amount(100, 100))
    assert purse.reserve(Amount(60, 60))
    assert not purse.reserve(Amount(60, 60))
    purse.settle(Amount(60, 60), NOTHING)
    assert purse.reserve(Amount(60, 60))
    purse.settle(Amount(60, 60), Amount(25, 5))
    assert (purse.free, purse.held) == (Amount(75, 95), NOTHING)


def test_a_provider_that_charges_more_than_was_reserved_is_paid_first_from_the_next_block() -> None:
    purse = Purse(DAY)
    purse.fill(Amount(10, 10))
    assert purse.reserve(Amount(10, 10))
    purse.settle(Amount(10, 10), Amount(5_000, 10))
    assert purse.free == Amount(-4_990, 0)
    limit = BudgetLimit("ever", "usd", 10**9)
    granted = block(account(limit), [limit], purse, Amount(10, 0), Amount(10, 0))
    assert isinstance(granted, Amount)
    purse.fill(granted)
    assert purse.reserve(Amount(10, 0))


def test_one_call_may_be_bounded_by_itself() -> None:
    limit = BudgetLimit("request", "tokens", 50)
    assert over_request("key:ci", [limit], Amount(10**9, 50)) is None
    short = over_request("key:ci", [limit], Amount(0, 51))
    assert short is not None
    assert short.message == (
        "one call of key `ci` may cost 50 tokens, and this one may cost 51 tokens: ask for fewer tokens. The owner,"
        " or who has a key made with --admin, may raise it: hive model budget set --key ci --tokens NUMBER"
        " --per request"
    )


def test_only_money_over_time_is_a_budget() -> None:
    assert has_budget([MONTH_USD])
    assert not has_budget([BudgetLimit("request", "usd", 1), BudgetLimit("day", "tokens", 1)])


def test_own_limits_stand_in_place_of_those_of_each() -> None:
    each, own = (MONTH_USD,), (BudgetLimit("day", "usd", 1),)
    limits = {"job:*": each, "key:ci": own, "total": own}
    assert limits_of("job:1", limits) == each
    assert limits_of("key:ci", limits) == own
    assert limits_of("key:other", limits) == ()
    assert limits_of("total", limits) == own


def test_a_call_counts_against_all_that_it_belongs_to() -> None:
    assert subjects_of("ci", "j", "a") == ("total", "key:ci", "job:j", "agent:a")
    assert subjects_of("ci", "", "") == ("total", "key:ci")


def test_a_limit_replaces_that_of_the_same_period_and_unit() -> None:
    new = BudgetLimit("month", "usd", 5)
    other = BudgetLimit("day", "tokens", 7)
    assert changed([MONTH_USD, other], [new], clear=False) == (other, new)
    assert changed([MONTH_USD, other], [new], clear=True) == (new,)
    assert changed([MONTH_USD], [], clear=True) == ()


@pytest.mark.parametrize(
    "subject", ["", "everything", "key:", "job:1", "agent:a\nb", "user:me", "total:1", "key:" + "x" * 201]
)
def test_what_is_no_subject_is_refused(subject: str) -> None:
    with pytest.raises(InvalidArgument, match="subject"):
        check_subject(subject)


@pytest.mark.parametrize(
    ("limit", "path"),
    [
        (BudgetLimit("week", "usd", 1), "per"),
        (BudgetLimit("day", "eur", 1), "unit"),
        (BudgetLimit("day", "usd", -1), "amount"),
        (BudgetLimit("day", "usd", 10**19), "amount"),
    ],
)
def test_what_is_no_limit_is_refused(limit: BudgetLimit, path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_limits([limit])
    assert caught.value.fields["path"] == f"limits[0].{path}"


AMOUNTS = st.builds(Amount, st.integers(0, 400), st.integers(0, 400))
LIMITS = st.lists(
    st.builds(BudgetLimit, st.sampled_from(PERIODS), st.sampled_from(UNITS), st.integers(0, 2_000)), max_size=4
)


@given(LIMITS, AMOUNTS, AMOUNTS)
def test_what_is_granted_is_enough(limits: list[BudgetLimit], need: Amount, more: Amount) -> None:
    purse = Purse(DAY)
    granted = block(account(*limits), limits, purse, need, need.plus(more))
    if isinstance(granted, Amount):
        purse.fill(granted)
        assert purse.reserve(need)
    else:
        assert need.of(granted.limit.unit) > granted.limit.amount


class Spending(RuleBasedStateMachine):
    """Calls come, end and fail, blocks are reserved, processes die: what was spent is never beyond the limits."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = [BudgetLimit("day", "usd", 1_000), BudgetLimit("month", "tokens", 1_500)]
        self.account = account(*self.limits)
        self.purse = Purse(DAY)
        self.running: list[Amount] = []
        self.spent = NOTHING

    @rule(need=AMOUNTS)
    def call(self, need: Amount) -> None:
        """Reserve, from another block where this one is used up."""
        if not self.purse.reserve(need):
            granted = block(self.account, self.limits, self.purse, need, need)
            if isinstance(granted, Shortage):
                return
            self.account.evolve(BudgetReserved("total", "b", DAY, granted.nano_usd, granted.tokens))
            self.purse.fill(granted)
            assert self.purse.reserve(need)
        self.running.append(need)

    @rule(which=st.integers(0, 9), percent=st.integers(0, 100))
    def end(self, which: int, percent: int) -> None:
        """Settle a call with a part of its reservation; 0 is a failed one."""
        if which < len(self.running):
            need = self.running.pop(which)
            cost = Amount(need.nano_usd * percent // 100, need.tokens * percent // 100)
            self.purse.settle(need, cost)
            self.spent = self.spent.plus(cost)

    @rule()
    def stop(self) -> None:
        """End the process in order, once no call runs."""
        if not self.running:
            free = self.purse.emptied()
            self.account.evolve(BudgetReturned("total", "b", DAY, free.nano_usd, free.tokens))
            self.purse = Purse(DAY)

    @rule(used=st.booleans())
    def die(self, used: bool) -> None:
        """Kill the process: what ran may have been generated to its end, and nobody knows."""
        for need in self.running:
            self.spent = self.spent.plus(need if used else NOTHING)
        self.running, self.purse = [], Purse(DAY)

    @rule(amount=st.integers(0, 3_000))
    def set(self, amount: int) -> None:
        """Set the limit anew; never below what was reserved, since that cannot be taken back."""
        used = self.account.counted.get(DAY, NOTHING).nano_usd
        new = BudgetLimit("day", "usd", max(amount, used))
        self.limits = list(changed(self.limits, [new], clear=False))
        self.account.evolve(BudgetSet("total", tuple(self.limits)))

    @invariant()
    def within(self) -> None:
        """The log counts at least what was spent, and no more than is allowed."""
        held = NOTHING
        for need in self.running:
            held = held.plus(need)
        at = windows(DAY)
        for limit in self.limits:
            counted = self.account.counted.get(at[limit.per], NOTHING).of(limit.unit)
            assert self.spent.of(limit.unit) + held.of(limit.unit) <= counted <= limit.amount


TestSpending = Spending.TestCase


DAILY, EVER_5, EVER_9 = (BudgetLimit("day", "usd", 3), BudgetLimit("ever", "usd", 5), BudgetLimit("ever", "usd", 9))
TOKENS_7 = BudgetLimit("ever", "tokens", 7)


@pytest.mark.parametrize(
    ("each", "own", "asked", "hold"),
    [
        # Nothing is set: what was asked for holds.
        ((), (), (EVER_5, TOKENS_7), {EVER_5, TOKENS_7}),
        # What is set for each job holds beside it, and the less of two.
        ((DAILY,), (), (EVER_5,), {DAILY, EVER_5}),
        ((EVER_5,), (), (EVER_9,), {EVER_5}),
        ((EVER_9,), (), (EVER_5,), {EVER_5}),
        # What is set for just this one takes its place, whichever is more.
        ((EVER_9,), (EVER_9,), (EVER_5, TOKENS_7), {EVER_9, TOKENS_7}),
        ((), (EVER_5,), (EVER_9,), {EVER_5}),
        ((), (DAILY,), (EVER_5,), {DAILY, EVER_5}),
    ],
)
def test_what_a_job_asks_for_is_less_than_what_is_set_until_somebody_sets_it_for_the_job(
    each: tuple[BudgetLimit, ...],
    own: tuple[BudgetLimit, ...],
    asked: tuple[BudgetLimit, ...],
    hold: set[BudgetLimit],
) -> None:
    known = {"job:*": each, "job:x": own}
    assert set(with_asked(limits_of("job:x", known), own, asked)) == hold


def test_a_budget_of_a_job_file_is_limits_of_all_time() -> None:
    assert asked_of(SharedBudget("job:x", 0, 5)) == (
        BudgetLimit("ever", "usd", 0),
        BudgetLimit("ever", "tokens", 5),
    )
    assert asked_of(SharedBudget("job:x")) == ()


def test_tasks_are_subjects_by_their_ids_alone() -> None:
    check_subject(f"task:{new_id()}")
    for wrong in ("task:*", "task:mine", "task:"):
        with pytest.raises(InvalidArgument):
            check_subject(wrong)
