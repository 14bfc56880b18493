"""The router's view of money: keys, budgets, and what calls have used."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from hive_common.contracts.budgets import JOB, TASK
from hive_common.contracts.events import (
    BudgetLimit,
    BudgetReserved,
    BudgetReturned,
    BudgetSet,
    KeyCreated,
    KeyRevoked,
    ModelCallFinished,
    decode,
)
from hive_common.eventlog.log import LogReader, Stored
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.errors import CorruptLog, DeadlineExceeded, UnknownEvent
from hive_common.kernel.ids import derive_id
from hive_common.ops.database import Database
from psycopg import AsyncConnection

from hive_router.domain.budgets import AGENT, KEY, NOTHING, Account, Amount, windows
from hive_router.treasury import day_of

CURRENT_WITHIN_S: Final = 10.0
"""How long a reader waits for the views."""

LIMITS_MAX: Final = 10_000
"""Subjects with limits of their own."""

BY: Final = ("key", "job", "agent", "model", "route", "provider", "day")

_KEY_CREATED = """
INSERT INTO router.keys (ns, owner, pseudonym, name, cloud, pin, stream) VALUES (%s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (ns, pseudonym) DO NOTHING
"""
_KEY_REVOKED = "UPDATE router.keys SET revoked = true WHERE ns = %s AND stream = %s"
_SET = """
INSERT INTO router.budgets (ns, owner, subject, version, limits) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (ns, subject) DO UPDATE SET version = excluded.version, limits = excluded.limits
"""
_MOVED = """
INSERT INTO router.budgets (ns, owner, subject, version) VALUES (%s, %s, %s, %s)
ON CONFLICT (ns, subject) DO UPDATE SET version = excluded.version
"""
_BLOCK = """
INSERT INTO router.budget_blocks (ns, owner, subject, day, block, nano_usd, tokens)
VALUES (%s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (ns, subject, day, block) DO UPDATE SET
    nano_usd = budget_blocks.nano_usd + excluded.nano_usd, tokens = budget_blocks.tokens + excluded.tokens
"""
_USED = """
INSERT INTO router.usage (
    ns, owner, day, key, job, agent, model, route, provider, block,
    calls, failed, prompt_tokens, completion_tokens, nano_usd, estimated, core
) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (ns, owner, day, key, job, agent, model, route, provider, block) DO UPDATE SET
    calls = usage.calls + excluded.calls, failed = usage.failed + excluded.failed,
    prompt_tokens = usage.prompt_tokens + excluded.prompt_tokens,
    completion_tokens = usage.completion_tokens + excluded.completion_tokens,
    nano_usd = usage.nano_usd + excluded.nano_usd, estimated = usage.estimated + excluded.estimated,
    core = usage.core + excluded.core
"""

_ALL_LIMITS = (
    "SELECT subject, limits FROM router.budgets WHERE ns = %s AND limits <> '[]' ORDER BY subject LIMIT %s"
)
_ACCOUNT = "SELECT version, limits FROM router.budgets WHERE ns = %s AND subject = %s"
# Sums over days, not rows of them: a subject has one row a day and process, for as long as it is used.
_COUNTED = """
SELECT CASE WHEN day = %s THEN 0 WHEN left(day, 7) = %s THEN 1 ELSE 2 END AS age,
       sum(nano_usd)::bigint, sum(tokens)::bigint
FROM router.budget_blocks WHERE ns = %s AND subject = %s GROUP BY age LIMIT 3
"""
_LEFT_BEHIND = """
SELECT block, max(day), sum(nano_usd)::bigint, sum(tokens)::bigint FROM router.budget_blocks
WHERE ns = %s AND subject = %s AND block <> %s GROUP BY block
HAVING sum(nano_usd) > 0 OR sum(tokens) > 0 ORDER BY block LIMIT %s
"""
_ACCOUNTED = """
SELECT block, sum(nano_usd)::bigint, sum(prompt_tokens + completion_tokens)::bigint
FROM router.usage
WHERE ns = %s AND block = ANY(%s) AND %s IN ('', key) AND %s IN ('', job) AND %s IN ('', agent)
  -- Tokens of calls that cost no money are set aside for jobs alone.
  AND (provider <> '' OR %s)
GROUP BY block LIMIT %s
"""
_SPENDER = "SELECT name, cloud, pin, revoked FROM router.keys WHERE ns = %s AND pseudonym = %s"
_USAGE = """
SELECT {by}, sum(calls)::bigint, sum(failed)::bigint, sum(prompt_tokens)::bigint, sum(completion_tokens)::bigint,
       sum(nano_usd)::bigint, sum(estimated)::bigint, sum(core)::bigint
FROM router.usage WHERE ns = %s AND day >= %s AND %s IN ('', job) GROUP BY {by}
ORDER BY sum(nano_usd) DESC, sum(calls) DESC, {by} LIMIT %s
"""
_USAGE_BY = {by: _USAGE.format(by=by) for by in BY}
_BLOCKS_MAX: Final = 1_000


class Spender(msgspec.Struct, frozen=True):
    """A key, as far as it matters for spending."""

    name: str
    cloud: bool
    pin: str
    revoked: bool


class UsageRow(msgspec.Struct, frozen=True):
    """What calls with something in common have used. `core`: so many a device of tier `core`, or a provider, has
    answered.
    """

    name: str
    calls: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    nano_usd: int
    estimated: int
    core: int


class Unaccounted(msgspec.Struct, frozen=True):
    """What a router that has died had set aside, and no record of a call accounts for."""

    block: str
    day: str
    amount: Amount


class MoneyProjection:
    """Keeps keys and budgets (`hive_common.eventlog.projection.Projection`)."""

    name = "money"
    types: Sequence[str] | None = ("KeyCreated", "KeyRevoked", "BudgetSet", "BudgetReserved", "BudgetReturned")

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Write what `batch` changes, in the order of the log, in one round trip."""
        async with conn.pipeline():
            for stored in batch:
                for statement, parameters in _money_of(stored):
                    await conn.execute(statement, parameters)


class UsageProjection:
    """Sums up calls (`hive_common.eventlog.projection.Projection`)."""

    name = "usage"
    types: Sequence[str] | None = ("ModelCallFinished",)

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Add up what `batch` holds: one write for all calls that are alike."""
        sums: dict[tuple[str, ...], list[int]] = {}
        for stored in batch:
            # Its text may have been erased since, and what it used with it.
            if stored.payload is None:
                continue
            event = _usage_decoder.decode(stored.payload) if stored.type in _USAGE_TYPES else _unknown(stored)
            # A name that nobody serves is whatever a caller typed.
            model = event.model if event.route else ""
            place = (stored.ns, stored.owner, day_of(stored.ts_us), event.key, event.job, event.agent, model)
            row = sums.setdefault((*place, event.route, event.provider, event.block), [0] * 7)
            used = (
                1,
                bool(event.code),
                event.prompt_tokens,
                event.completion_tokens,
                event.nano_usd,
                event.estimated,
                event.core or bool(event.provider and not event.code),
            )
            for at, value in enumerate(used):
                row[at] += value
        async with conn.pipeline():
            # In one order, so that two of them never wait for each other.
            for key in sorted(sums):
                await conn.execute(_USED, (*key, *sums[key]))


class _Used(msgspec.Struct, frozen=True):
    """What is summed up of `ModelCallFinished`; prompts and answers are passed over."""

    model: str
    key: str
    route: str
    code: str = ""
    job: str = ""
    agent: str = ""
    provider: str = ""
    block: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nano_usd: int = 0
    estimated: bool = False
    core: bool = False


_USAGE_TYPES: Final = frozenset({ModelCallFinished.__name__})
_usage_decoder: Final = msgspec.json.Decoder(_Used)


class Ledger:
    """Reads of one namespace.

    Args:
        database: of the service.
        reader: tells the log's head.
        money, usage: keep the views.
        wake: makes `money` look at the log now.
        ns: the namespace.
        now_us: the time.
    """

    def __init__(
        self,
        database: Database,
        reader: LogReader,
        money: ProjectionRunner,
        usage: ProjectionRunner,
        wake: Callable[[], None],
        ns: str,
        now_us: Callable[[], int],
    ) -> None:
        self._database = database
        self._reader = reader
        self._money = money
        self._usage = usage
        self._wake = wake
        self._ns = ns
        self._now_us = now_us

    @property
    def has_failed(self) -> bool:
        """Whether a projection has met something it does not know, and follows the log no more."""
        return self._money.failure is not None or self._usage.failure is not None

    async def limits(self) -> dict[str, tuple[BudgetLimit, ...]]:
        """Return all limits that are set. Raises Unavailable."""
        await self._current(self._money)
        rows = await self._database.fetch(_ALL_LIMITS, (self._ns, LIMITS_MAX))
        return {subject: _limits(limits) for subject, limits in rows}

    async def account(self, subject: str) -> Account:
        """Return an account as it stands now. Raises Unavailable."""
        await self._current(self._money)
        day = day_of(self._now_us())
        at = (day, day[:7], self._ns, subject)
        rows, sums = await asyncio.gather(
            self._database.fetch(_ACCOUNT, (self._ns, subject)), self._database.fetch(_COUNTED, at)
        )
        account = Account(subject)
        if rows:
            account.version, account.limits = rows[0][0], _limits(rows[0][1])
        # Today counts for the month and for ever, the rest of the month for ever, too.
        for age, nano_usd, tokens in sums:
            for window in tuple(windows(day).values())[age:]:
                before = account.counted.get(window, NOTHING)
                account.counted[window] = before.plus(Amount(nano_usd, tokens))
        return account

    async def spender(self, pseudonym: str) -> Spender | None:
        """Return the key of a caller, or None. Raises Unavailable."""
        rows = await self._database.fetch(_SPENDER, (self._ns, pseudonym))
        return Spender(*rows[0]) if rows else None

    async def usage(self, by: str, since_day: str, limit: int, job: str = "") -> tuple[list[UsageRow], int]:
        """Return what calls have used, by one of `BY`, and the position up to which they are counted.

        Args:
            by: what rows have in common.
            since_day: the first day.
            limit: so many rows at most.
            job: only calls of this one.

        Raises:
            Unavailable: the log or the view cannot be reached.
        """
        await self._current(self._usage)
        rows = await self._database.fetch(_USAGE_BY[by], (self._ns, since_day, job, limit))
        return [UsageRow(*row) for row in rows], self._usage.position

    async def unaccounted(self, subject: str, but: str) -> list[Unaccounted]:
        """Return what routers that died have left of a subject's blocks, beyond what calls are recorded with.

        Of a task nothing is told: calls are summed up by their jobs.

        Args:
            subject: whose budget.
            but: the block of this process, which has not died.

        Raises:
            Unavailable: the log or the view cannot be reached.
        """
        await self._current(self._money)
        await self._current(self._usage)
        left = await self._database.fetch(_LEFT_BEHIND, (self._ns, subject, but, _BLOCKS_MAX))
        kind, _, name = subject.partition(":")
        if kind == TASK:
            return []
        named = (name if kind == one else "" for one in (KEY, JOB, AGENT))
        at = (self._ns, [row[0] for row in left], *named, kind == JOB, _BLOCKS_MAX)
        known = {row[0]: Amount(row[1], row[2]) for row in await self._database.fetch(_ACCOUNTED, at)}
        found = []
        for block, day, nano_usd, tokens in left:
            rest = Amount(nano_usd, tokens).minus(known.get(block, NOTHING))
            rest = Amount(max(0, rest.nano_usd), max(0, rest.tokens))
            if rest != NOTHING:
                found.append(Unaccounted(block, day, rest))
        return found

    async def _current(self, runner: ProjectionRunner) -> None:
        head = await self._reader.head()
        self._wake()
        try:
            async with asyncio.timeout(CURRENT_WITHIN_S):
                await runner.wait_for(head)
        except TimeoutError:
            raise DeadlineExceeded(f"the view of money is at {runner.position}, the log at {head}") from None


def _limits(raw: bytes) -> tuple[BudgetLimit, ...]:
    return msgspec.json.decode(raw, type=tuple[BudgetLimit, ...])


def _money_of(stored: Stored) -> list[tuple[Any, tuple[Any, ...]]]:
    if stored.payload is None:
        raise CorruptLog(f"the payload at position {stored.position} is missing", position=stored.position)
    event = decode(stored.type, stored.schema, stored.payload)
    whose = (stored.ns, stored.owner)
    match event:
        case KeyCreated():
            pseudonym = derive_id("caller", stored.owner, event.name)
            return [(_KEY_CREATED, (*whose, pseudonym, event.name, event.cloud, event.pin, stored.stream))]
        case KeyRevoked():
            return [(_KEY_REVOKED, (stored.ns, stored.stream))]
        case BudgetSet():
            limits = msgspec.json.encode(event.limits)
            return [(_SET, (*whose, event.subject, stored.version, limits))]
        case BudgetReserved() | BudgetReturned():
            sign = 1 if isinstance(event, BudgetReserved) else -1
            moved = (*whose, event.subject, stored.version)
            place = (*whose, event.subject, event.day, event.block)
            return [(_MOVED, moved), (_BLOCK, (*place, sign * event.nano_usd, sign * event.tokens))]
    raise UnknownEvent(f"position {stored.position}: the router does not know {stored.type}")


def _unknown(stored: Stored) -> _Used:
    raise UnknownEvent(f"position {stored.position}: the router does not know {stored.type}")
