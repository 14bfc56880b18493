"""Failures as data: each one counted once, in groups, with what it cost, from old events as well as new ones."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.resources import files

import psycopg
import pytest
from hive_common.contracts import events
from hive_common.contracts.events import (
    AttemptFailed,
    AttemptLost,
    AttemptSucceeded,
    Event,
    ModelCallFinished,
    TaskAssigned,
    TaskCreated,
    TaskFailed,
    TaskReady,
    TaskSucceeded,
    Usage,
)
from hive_common.contracts.values import by_digest, digest_of, inline
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.errors import Conflict, InvalidArgument, NotFound
from hive_common.kernel.fingerprints import fingerprint_of
from hive_common.kernel.ids import new_id
from hive_common.rpc.client import bearer, call
from hive_proto.pain.v1 import pain_pb2, pain_pb2_grpc
from hive_scheduler import failure_groups
from hive_scheduler.failure_groups import Failures, message_of

from .conftest import KEY

TABLES = ("failures", "failure_kinds", "attempt_calls")


class Log:
    """A log with tasks that fail, and the groups of their failures."""

    def __init__(self, database, writer: LogWriter, failures: Failures) -> None:
        self.database = database
        self.writer = writer
        self.failures = failures

    async def write(self, stream: str, *made: Event, at_us: int = 1_000, ns: str = "default") -> str:
        """Append events one second apart, and return their stream."""
        new = [
            NewEvent(
                *(stream, version, type(event).__name__, events.SCHEMA, events.encode(event)),
                *(at_us + (version - 1) * 1_000_000, "scheduler", "owner", ns),
            )
            for version, event in enumerate(made, 1)
        ]
        await self.writer.append(Append(tuple(new)))
        return stream

    async def failing(self, message: str, *more: Event, agent: str = "solver@1.0.0", **named) -> str:
        """Append a task whose first attempt fails."""
        made = [
            TaskCreated("job", "step", agent, input=inline(b'{"n":1}')),
            TaskAssigned(1, "executor-1", "s", 1),
            AttemptFailed(1, "agent_error", message),
        ]
        return await self.write(new_id(), *made, *(more or (TaskFailed("agent_error", message, 1),)), **named)

    async def call(self, task: str, attempt: int, tokens: int, nano_usd: int) -> None:
        called = ModelCallFinished(
            *("chat", "m", "k", "r", "e"),
            prompt_tokens=tokens,
            completion_tokens=1,
            task=task,
            attempt=attempt,
            nano_usd=nano_usd,
            request=inline(b'{"large":true}'),
        )
        await self.write(new_id(), called)

    async def groups(self, since_us: int = 0, agent: str = "", limit: int = 20):
        await self.failures.caught_up()
        return (await self.failures.groups(since_us, agent, limit))[0]

    async def tables(self) -> list[list[tuple]]:
        async with await psycopg.AsyncConnection.connect(
            self.database.role_dsn("scheduler"), autocommit=True
        ) as conn:
            return [
                await (await conn.execute(f"SELECT * FROM scheduler.{table} ORDER BY 1, 2, 3, 4")).fetchall()
                for table in TABLES
            ]


@contextlib.asynccontextmanager
async def following(database) -> AsyncIterator[Failures]:
    failures = Failures(database.role_dsn("scheduler"), "default")
    await failures.open()
    task = asyncio.create_task(failures.runner.run())
    try:
        yield failures
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await failures.close()


@pytest.fixture
async def log(database) -> AsyncIterator[Log]:
    async with (
        following(database) as failures,
        await LogWriter.open(database.role_dsn("scheduler")) as writer,
    ):
        yield Log(database, writer, failures)


async def test_what_fails_alike_is_one_group_with_what_it_cost(log):
    first = await log.failing("KeyError: 'a' in line 3")
    await log.call(first, 1, tokens=10, nano_usd=5)
    second = new_id()
    await log.call(second, 1, tokens=20, nano_usd=7)  # before it is known how the attempt ended
    await log.write(
        second,
        TaskCreated("other job", "step", "solver@2.0.0"),
        TaskReady(by_digest(b'{"large":1}')),
        TaskAssigned(1, "executor-2", "s", 1),
        AttemptFailed(1, "agent_error", "KeyError: 'b' in line 44", usage=Usage(wall_ms=250)),
        TaskAssigned(2, "executor-2", "s", 1),
        AttemptSucceeded(2, inline(b"1")),
        TaskSucceeded(2),
    )
    await log.call(second, 2, tokens=999, nano_usd=999)  # of the attempt that succeeded
    await log.failing("something else")
    group, other = await log.groups()
    fingerprint = fingerprint_of("solver", "agent_error", "KeyError: 'c' in line 5")
    assert group[:6] == (fingerprint, "solver", "agent_error", "KeyError: <value> in line <n>", 2, 2)
    assert [sorted(group[6]), sorted(group[7]), group[8]] == [
        ["solver@1.0.0", "solver@2.0.0"],
        ["executor-1", "executor-2"],
        2,
    ]
    assert group[9:] == (2_001_000, 3_001_000, 1_000 + 250, 2, 32, 12)
    assert other[3:6] == ("something else", 1, 1)
    (_, examples) = await log.failures.group(fingerprint[:8], 0, 5)
    assert [(row[0], row[1], row[3], row[4], message_of(row[6], row[7]), row[8]) for row in examples] == [
        ("other job", second, 1, "solver@2.0.0", "KeyError: 'b' in line 44", digest_of(b'{"large":1}')),
        ("job", first, 1, "solver@1.0.0", "KeyError: 'a' in line 3", digest_of(b'{"n":1}')),
    ]


async def test_each_failure_counts_once(log):
    created, assigned = TaskCreated("job", "step", "a@1.0.0", input=inline(b"1")), TaskAssigned(1, "e", "s", 1)
    await log.write(new_id(), created, assigned, AttemptFailed(1, "timeout", "late"), TaskFailed("timeout", "late"))
    await log.write(
        new_id(), created, assigned, AttemptFailed(1, "timeout", "late"), TaskFailed("no_quorum", "few")
    )
    await log.write(new_id(), created, TaskFailed("invalid_input", "$.n: expected a number"))
    lost = [
        AttemptLost(number, reason) for number, reason in enumerate(("given_back", "killed", "lease_expired"), 1)
    ]
    await log.write(new_id(), created, *lost, TaskFailed("lost", "lost too often", 3))
    await log.write(new_id(), created, assigned, AttemptSucceeded(1, inline(b"1")), TaskSucceeded(1))
    await log.write(new_id(), created, assigned, AttemptFailed(1, "killed", "an order"), TaskFailed("killed", "no"))
    found = {(row[2], row[3]): row[4] for row in await log.groups()}
    assert found == {
        ("timeout", "late"): 2,
        ("no_quorum", "few"): 1,
        ("invalid_input", "$.n: expected a number"): 1,
        ("lost", "lease_expired"): 1,
    }


async def test_what_fails_over_its_results_counts_what_they_took_once(log):
    judged = new_id()
    await log.write(
        judged,
        TaskCreated("job", "step", "solver@1.0.0", input=inline(b"1"), replicas=5),
        *(TaskAssigned(number, f"executor-{number}", "s", 1) for number in range(1, 6)),
        AttemptFailed(1, "agent_error", "no", usage=Usage(wall_ms=7)),
        AttemptLost(2, "given_back"),
        AttemptSucceeded(3, by_digest(b"large"), Usage(wall_ms=30)),
        AttemptSucceeded(4, inline(b"4")),  # at 9 s; it began at 4 s
        TaskFailed("no_quorum", "too few results agree"),  # at 10 s; the fifth began at 5 s
    )
    for attempt in range(1, 6):
        await log.call(judged, attempt, tokens=10**attempt, nano_usd=2 * 10**attempt)
    found = {row[2]: row[4:5] + row[11:] for row in await log.groups()}
    assert found == {
        "agent_error": (1, 7, 1, 11, 20),
        "no_quorum": (1, 30 + 5_000 + 5_000, 3, 111_003, 222_000),
    }


async def test_a_task_without_attempts_costs_nothing(log):
    await log.write(new_id(), TaskCreated("job", "step", "solver@1.0.0"), TaskFailed("invalid_input", "no"))
    assert [row[2:3] + row[11:] for row in await log.groups()] == [("invalid_input", 0, 0, 0, 0)]


async def test_groups_are_of_a_time_of_an_agent_and_of_a_namespace(log):
    hour = 3_600_000_000
    for at in (1, 2, 3):
        await log.failing("old", at_us=at * hour)
    await log.failing("new", agent="other@1.0.0", at_us=9 * hour)
    await log.failing("elsewhere", at_us=9 * hour, ns="another")
    assert [(row[3], row[4]) for row in await log.groups()] == [("old", 3), ("new", 1)]
    assert [(row[3], row[4]) for row in await log.groups(since_us=2 * hour)] == [("old", 2), ("new", 1)]
    assert [row[3] for row in await log.groups(since_us=5 * hour)] == ["new"]
    for agent in ("other", "other@1.0.0"):
        assert [row[3] for row in await log.groups(agent=agent)] == ["new"]
    assert await log.groups(agent="other@2.0.0") == []
    assert [row[3] for row in await log.groups(limit=1)] == ["old"]
    old = fingerprint_of("solver", "agent_error", "old")
    group, examples = await log.failures.group(old, 3 * hour, 5)
    assert (group[4], len(examples)) == (1, 1)
    with pytest.raises(NotFound):
        await log.failures.group(old, 5 * hour, 5)
    with pytest.raises(NotFound):
        await log.failures.group("0000", 0, 5)


async def test_the_newest_are_looked_at_where_there_are_too_many(log, monkeypatch):
    monkeypatch.setattr(failure_groups, "FAILURES_MAX", 2)
    for number, message in enumerate(("one", "two", "two")):
        await log.failing(message, at_us=number * 1_000)
    await log.failures.caught_up()
    rows, truncated = await log.failures.groups(0, "", 20)
    assert ([(row[3], row[4]) for row in rows], truncated) == ([("two", 2)], True)
    monkeypatch.setattr(failure_groups, "FAILURES_MAX", 3)
    rows, truncated = await log.failures.groups(0, "", 20)
    assert (len(rows), truncated) == (2, False)


async def test_fingerprints_that_begin_alike_are_told(log):
    messages = [chr(97 + number // 26) * 3 + chr(97 + number % 26) for number in range(26 * 20)]
    by_start: dict[str, list[str]] = {}
    for message in messages:
        by_start.setdefault(fingerprint_of("solver", "agent_error", message)[:4], []).append(message)
    start, alike = next((start, alike) for start, alike in by_start.items() if len(alike) > 1)
    for message in alike[:2]:
        await log.failing(message)
    await log.failures.caught_up()
    with pytest.raises(Conflict):
        await log.failures.group(start, 0, 5)


async def test_it_is_rebuilt_from_the_log(log):
    for message in ("one 1", "one 2", "zero \x00 and \\ and {x}"):
        await log.call(await log.failing(message), 1, tokens=3, nano_usd=4)
    await log.groups()
    before = await log.tables()
    assert [len(rows) for rows in before] == [3, 2, 3]
    async with await psycopg.AsyncConnection.connect(log.database.role_dsn("scheduler"), autocommit=True) as conn:
        await conn.execute("TRUNCATE scheduler.failures, scheduler.failure_kinds, scheduler.attempt_calls")
        await conn.execute("DELETE FROM scheduler.projections WHERE name = 'failures'")
    async with following(log.database) as again:
        await again.caught_up()
        assert await log.tables() == before


async def test_what_was_counted_before_costs_were_is_counted_anew(log):
    await log.failing("one")
    await log.groups()
    before = await log.tables()
    made = files("hive_scheduler") / "migrations" / "0009_costs_of_failures.sql"
    async with await psycopg.AsyncConnection.connect(log.database.role_dsn("scheduler"), autocommit=True) as conn:
        await conn.execute("ALTER TABLE scheduler.failures DROP COLUMN attempts")
        await conn.execute("UPDATE scheduler.failures SET fingerprint = 'old'")
        await conn.execute("UPDATE scheduler.failure_kinds SET fingerprint = 'old'")
        await conn.execute(made.read_bytes())
    async with following(log.database) as again:
        await again.caught_up()
        assert await log.tables() == before


async def test_what_failed_in_a_job_is_asked_for_over_grpc(cluster, control, one_step, fail):
    def always(assignment, given):
        raise fail("agent_error", f"no square of {given['n']}")

    await cluster.executor("one", {"square": always}, slots=4)
    task = {**one_step["tasks"][0], "fork": "${input}", "input": {"n": "${item}"}, "on_failure": "skip"}
    job = await control.submit({**one_step, "output": None, "input": [1, 2, 3], "tasks": [task]})
    await control.finish(job)
    pain = pain_pb2_grpc.PainStub(control.channel)
    with_key = {"metadata": bearer(KEY), "timeout": 20}
    answer = await call(pain.List(pain_pb2.ListRequest(), **with_key))
    (group,) = answer.groups
    assert (group.agent, group.code, group.message) == ("square", "agent_error", "no square of <n>")
    assert (group.failures, group.jobs, group.executor_count, answer.truncated) == (3, 1, 1, False)
    assert answer.position >= (await control.get(job)).position
    found = await call(pain.Get(pain_pb2.GetRequest(fingerprint=group.fingerprint, examples=2), **with_key))
    assert found.group == group and len(found.examples) == 2
    assert {one.message for one in found.examples} < {f"no square of {number}" for number in (1, 2, 3)}
    assert all(one.job_id == job and one.attempt == 1 and one.input_digest for one in found.examples)
    for request in (pain_pb2.ListRequest(limit=201), pain_pb2.ListRequest(limit=-1)):
        with pytest.raises(InvalidArgument):
            await call(pain.List(request, **with_key))
    for fingerprint in ("", "abc", "ABCD", "g" * 8, "0" * 17):
        with pytest.raises(InvalidArgument):
            await call(pain.Get(pain_pb2.GetRequest(fingerprint=fingerprint), **with_key))
