"""Projections: exactly once, whatever breaks in the middle."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hive_common.eventlog.log import Append, LogReader, LogWriter, Stored
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.errors import Unavailable, UnknownEvent
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database
from hive_common.testing.proxy import TcpProxy
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo

NewAppend = Callable[..., Append]


class Counts:
    """Counts events by type; adding twice shows."""

    name = "counts"
    types: Sequence[str] | None = None

    def __init__(self) -> None:
        self.batches = 0
        self.before_commit: Callable[[], None] = lambda: None

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        self.batches += 1
        for stored in batch:
            if stored.type == "Mystery":
                raise UnknownEvent(f"unknown event {stored.type}", type=stored.type)
            await conn.execute(
                "INSERT INTO gateway.counts VALUES (%s, 1)"
                " ON CONFLICT (type) DO UPDATE SET count = counts.count + 1",
                (stored.type,),
            )
        self.before_commit()


async def counts(database: Database) -> dict[str, int]:
    async with await AsyncConnection.connect(database.role_dsn("gateway"), autocommit=True) as conn:
        rows = await (await conn.execute("SELECT type, count FROM gateway.counts")).fetchall()
    return dict(rows)


async def stored_position(database: Database) -> int:
    async with await AsyncConnection.connect(database.role_dsn("gateway"), autocommit=True) as conn:
        row = await (await conn.execute("SELECT position FROM gateway.projections")).fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
async def table(database: Database) -> None:
    async with await AsyncConnection.connect(database.role_dsn("gateway"), autocommit=True) as conn:
        await conn.execute("CREATE TABLE gateway.counts (type text PRIMARY KEY, count bigint NOT NULL)")


async def append_tasks(database: Database, new_append: NewAppend, count: int) -> int:
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        return max(await asyncio.gather(*(writer.append(new_append(new_id())) for _ in range(count))))


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.usefixtures("table")
async def test_view_and_position_follow_the_log(database: Database, new_append: NewAppend) -> None:
    wake = asyncio.Event()
    async with LogReader(database.role_dsn("gateway")) as reader:
        runner = ProjectionRunner(
            database.role_dsn("gateway"), reader, Counts(), "gateway", wake=wake, batch_events=7, poll_s=60
        )
        running = asyncio.create_task(runner.run())
        await runner.wait_for(1)
        head = await append_tasks(database, new_append, 50)
        wake.set()
        await runner.wait_for(head)
        assert runner.lag == 0
        await stop(running)
    assert await counts(database) == {"LogCreated": 1, "TaskCreated": 50}
    assert await stored_position(database) == head == 51


@pytest.mark.usefixtures("table")
async def test_batch_cut_off_before_commit_is_applied_once_afterwards(
    database: Database, new_append: NewAppend
) -> None:
    head = await append_tasks(database, new_append, 30)
    async with TcpProxy(database.server.port) as proxy, LogReader(database.role_dsn("gateway")) as reader:
        projection = Counts()
        cuts = 0

        def cut_twice() -> None:
            nonlocal cuts
            if cuts < 2:
                cuts += 1
                proxy.cut_all()

        projection.before_commit = cut_twice
        dsn = make_conninfo(database.role_dsn("gateway"), port=proxy.port)
        runner = ProjectionRunner(dsn, reader, projection, "gateway", batch_events=10, poll_s=0.05)
        running = asyncio.create_task(runner.run())
        await asyncio.wait_for(runner.wait_for(head), 60)
        await stop(running)
    assert cuts == 2
    assert projection.batches > 4  # some were applied in vain
    assert await counts(database) == {"LogCreated": 1, "TaskCreated": 30}


@pytest.mark.usefixtures("table")
async def test_runner_cancelled_inside_a_batch_leaves_neither_half(
    database: Database, new_append: NewAppend
) -> None:
    head = await append_tasks(database, new_append, 20)
    projection = Counts()
    reached = asyncio.Event()
    async with LogReader(database.role_dsn("gateway")) as reader:
        runner = ProjectionRunner(database.role_dsn("gateway"), reader, projection, "gateway", batch_events=5)
        running = asyncio.create_task(runner.run())

        def die() -> None:
            if projection.batches == 3:
                reached.set()
                running.cancel()

        projection.before_commit = die
        await reached.wait()
        await asyncio.wait({running})
        assert await stored_position(database) == sum((await counts(database)).values()) == 10
        again = ProjectionRunner(database.role_dsn("gateway"), reader, Counts(), "gateway")
        running = asyncio.create_task(again.run())
        await again.wait_for(head)
        await stop(running)
    assert await counts(database) == {"LogCreated": 1, "TaskCreated": 20}


@pytest.mark.usefixtures("table")
async def test_two_runners_of_one_projection_apply_each_batch_once(
    database: Database, new_append: NewAppend
) -> None:
    async with (
        LogReader(database.role_dsn("gateway")) as reader,
        LogReader(database.role_dsn("gateway")) as reader2,
    ):
        runners = [
            ProjectionRunner(database.role_dsn("gateway"), source, Counts(), "gateway", batch_events=3, poll_s=0.01)
            for source in (reader, reader2)
        ]
        running = [asyncio.create_task(runner.run()) for runner in runners]
        head = await append_tasks(database, new_append, 60)
        await asyncio.wait_for(asyncio.gather(*(runner.wait_for(head) for runner in runners)), 60)
        for task in running:
            await stop(task)
    assert await counts(database) == {"LogCreated": 1, "TaskCreated": 60}


@pytest.mark.usefixtures("table")
async def test_unknown_event_stops_the_projection_and_is_not_skipped(
    database: Database, new_append: NewAppend
) -> None:
    async with (
        await LogWriter.open(database.role_dsn("scheduler")) as writer,
        LogReader(database.role_dsn("gateway")) as reader,
    ):
        await writer.append(new_append(new_id()))
        await writer.append(new_append(new_id(), 1, "Mystery"))
        await writer.append(new_append(new_id()))
        runner = ProjectionRunner(database.role_dsn("gateway"), reader, Counts(), "gateway", batch_events=2)
        with pytest.raises(UnknownEvent):
            await runner.run()
        assert runner.position == 2
        assert isinstance(runner.failure, UnknownEvent)
        with pytest.raises(Unavailable) as caught:
            await runner.wait_for(4)
        assert isinstance(caught.value.__cause__, UnknownEvent)
    assert await counts(database) == {"LogCreated": 1, "TaskCreated": 1}


@pytest.mark.usefixtures("table")
async def test_unknown_event_stops_a_projection_that_wants_other_types(
    database: Database, new_append: NewAppend
) -> None:
    projection = Counts()
    projection.types = ["AgentVersionPublished"]
    async with (
        await LogWriter.open(database.role_dsn("registry")) as writer,
        LogReader(database.role_dsn("gateway")) as reader,
    ):
        for type_name in ("ExecutorUndrained", "AgentVersionPublished", "Mystery", "AgentVersionPublished"):
            await writer.append(new_append(new_id(), 1, type_name))
        runner = ProjectionRunner(database.role_dsn("gateway"), reader, projection, "gateway", batch_events=1)
        with pytest.raises(UnknownEvent):
            await runner.run()
        assert runner.position == 3
    assert await counts(database) == {"AgentVersionPublished": 1}


@pytest.mark.usefixtures("table")
async def test_projection_of_some_types_reaches_the_head_through_the_others(
    database: Database, new_append: NewAppend
) -> None:
    projection = Counts()
    projection.types = ["AgentNoted"]
    async with LogReader(database.role_dsn("gateway")) as reader:
        runner = ProjectionRunner(database.role_dsn("gateway"), reader, projection, "gateway", poll_s=0.01)
        running = asyncio.create_task(runner.run())
        head = await append_tasks(database, new_append, 10)
        await asyncio.wait_for(runner.wait_for(head), 30)
        assert projection.batches == 0
        async with await LogWriter.open(database.role_dsn("registry")) as writer:
            await runner.wait_for(await writer.append(new_append(new_id(), 1, "AgentNoted")))
        await stop(running)
    assert await counts(database) == {"AgentNoted": 1}
    assert await stored_position(database) == head + 1


@pytest.mark.usefixtures("table")
async def test_a_runner_that_is_woken_and_cancelled_in_one_moment_ends(database: Database) -> None:
    """`asyncio.wait_for` swallows such a cancellation (CPython issue 86296), and its owner waits for ever."""
    wake = asyncio.Event()
    async with LogReader(database.role_dsn("gateway")) as reader:
        runner = ProjectionRunner(database.role_dsn("gateway"), reader, Counts(), "gateway", wake=wake, poll_s=60)
        running = asyncio.create_task(runner.run())
        await runner.wait_for(1)
        while wake._waiters == type(wake._waiters)():  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        wake.set()
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running}, timeout=10)
        assert running.cancelled()
