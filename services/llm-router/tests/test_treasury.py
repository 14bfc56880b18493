"""The books of budgets: bounded however many jobs there were, and nothing is lost with what is forgotten."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from random import Random

import pytest
from hive_common.contracts.events import BudgetLimit, BudgetReserved, BudgetReturned, BudgetSet, decode
from hive_common.eventlog.log import Append
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import BudgetExhausted, Unavailable, VersionConflict
from hive_router.domain.budgets import NOTHING, Account, Amount
from hive_router.treasury import BOOKS_MAX, Treasury, _Book

LIMIT = BudgetLimit("ever", "usd", 1_000)
NEED = Amount(100, 10)
DAY_US = 86_400_000_000
AT_ONCE = 32


class Log:
    """The streams of budgets, as sums: what the log and its view hold.

    Args:
        waits: lets others run in between.
    """

    def __init__(self, waits: bool = True) -> None:
        self._waits = waits
        self.accounts: dict[str, Account] = {}
        self.loads = 0
        self.away = False

    async def append(self, append: Append) -> int:
        if self._waits:
            await asyncio.sleep(0)
        (new,) = append.events
        event = decode(new.type, new.schema, bytes(new.payload or b""))
        assert isinstance(event, BudgetReserved | BudgetReturned | BudgetSet)
        account = self.accounts.setdefault(event.subject, Account(event.subject))
        if self.away:
            raise Unavailable("the log is away")
        if new.version != account.version + 1:
            raise VersionConflict("another one was first", stream=new.stream)
        account.evolve(event)
        return 1

    async def load(self, subject: str) -> Account:
        self.loads += 1
        if self._waits:
            await asyncio.sleep(0)
        known = self.accounts.get(subject, Account(subject))
        return Account(subject, known.version, known.limits, dict(known.counted))

    def counted(self, subject: str) -> int:
        return self.accounts.get(subject, Account(subject)).counted.get("ever", NOTHING).nano_usd


class Clock(SystemClock):
    """A clock whose day a test sets."""

    def __init__(self) -> None:
        self.us = 1_800_000_000_000_000

    def now_us(self) -> int:
        return self.us


def books(log: Log, books_max: int = BOOKS_MAX) -> Treasury:
    treasury = Treasury(log, log.load, Clock(), owner="o", ns="default", books_max=books_max)
    treasury.know({"job:*": (LIMIT,), "total": (BudgetLimit("ever", "usd", 10**15),)})
    return treasury


async def spend(treasury: Treasury, subject: str, cost: int = 7) -> None:
    hold = await treasury.hold(("total", subject), NEED)
    await asyncio.sleep(0)
    hold.settle(Amount(cost, 1))


async def each(numbers: range, make: Callable[[int], Awaitable[None]], at_once: int = AT_ONCE) -> None:
    left = iter(numbers)

    async def worker() -> None:
        for number in left:
            await make(number)

    await asyncio.gather(*(worker() for _ in range(at_once)))


JOBS = 30_000
"""A fifth of a millisecond each, for the block and for what is left of it."""


@pytest.mark.timeout(600)
async def test_thirty_thousand_jobs_leave_no_more_behind_than_a_thousand() -> None:
    log, most = Log(waits=False), 0
    treasury = books(log)
    # Of a larger limit a block is for eight calls, and no second one is reserved ahead.
    treasury.know({"job:*": (BudgetLimit("ever", "usd", 10**9),)})

    async def one(number: int) -> None:
        nonlocal most
        hold = await treasury.hold((f"job:{number}",), NEED)
        hold.settle(Amount(7, 1))
        most = max(most, len(treasury._books))

    await each(range(JOBS), one)
    assert BOOKS_MAX <= most <= 2 * BOOKS_MAX + AT_ONCE
    # Nor does anything else hold on to them.
    gc.collect()
    assert sum(isinstance(one, _Book) for one in gc.get_objects()) <= 2 * BOOKS_MAX
    await treasury.close()
    assert len(log.accounts) == JOBS
    assert all(account.counted["ever"] == Amount(7, 1) for account in log.accounts.values())


async def test_what_was_forgotten_is_read_again_and_its_limit_holds() -> None:
    log = Log()
    treasury = books(log, books_max=4)
    random, spent = Random(5), dict.fromkeys(range(20), 0)

    async def one(_: int) -> None:
        job = random.randrange(20)
        try:
            hold = await treasury.hold((f"job:{job}",), NEED)
        except BudgetExhausted:
            # Nothing is refused that would have fitted, but for what others hold at this moment.
            return
        spent[job] += 40
        await asyncio.sleep(0)
        hold.settle(Amount(40, 1))

    await each(range(2_000), one, at_once=12)
    await treasury.close()
    for job, amount in spent.items():
        assert log.counted(f"job:{job}") == amount <= LIMIT.amount
        # A call is refused where less than it needs is left.
        assert LIMIT.amount - amount < NEED.nano_usd
    assert log.loads > 100


async def test_what_a_call_is_under_way_for_is_not_forgotten() -> None:
    log = Log()
    treasury = books(log, books_max=1)
    hold = await treasury.hold(("job:a",), NEED)
    for number in range(5):
        await spend(treasury, f"job:{number}")
    await treasury.forget_idle(0)
    assert list(treasury._books) == ["job:a"]
    hold.settle(Amount(60, 1))
    await treasury.forget_idle(0)
    assert not treasury._books
    assert log.counted("job:a") == 60


async def test_what_is_idle_returns_its_block() -> None:
    log = Log()
    treasury = books(log)
    await spend(treasury, "job:a")
    assert log.counted("job:a") > 7
    await treasury.forget_idle(3_600)
    assert len(treasury._books) == 2
    await treasury.forget_idle(0)
    assert (log.counted("job:a"), log.counted("total"), len(treasury._books)) == (7, 7, 0)


async def test_while_the_log_is_away_nothing_is_counted_as_free_that_may_not_be() -> None:
    log = Log()
    treasury = books(log)
    await spend(treasury, "job:a")
    counted = log.counted("job:a")
    log.away = True
    await treasury.forget_idle(0)
    log.away = False
    assert log.counted("job:a") == counted
    await spend(treasury, "job:a")
    await treasury.close()
    assert log.counted("job:a") == counted + 7


async def test_days_that_are_over_are_forgotten() -> None:
    log, clock = Log(), Clock()
    treasury = Treasury(log, log.load, clock, owner="o", ns="default")
    treasury.know({"total": (BudgetLimit("month", "usd", 10**9),)})
    for _ in range(100):
        hold = await treasury.hold(("total",), NEED)
        hold.settle(Amount(7, 1))
        clock.us += DAY_US
    account, *_ = await treasury.state("total")
    assert len(account.counted) <= 5
    await treasury.close()
    assert log.counted("total") == 700
