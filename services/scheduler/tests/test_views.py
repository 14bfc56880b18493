"""The views: fed from memory they are what a replay of the log gives, whoever else writes in between."""

import asyncio

import msgspec
import psycopg
from hive_common.contracts import events
from hive_common.contracts.events import ExecutorDrainRequested, ExecutorUndrained, TaskCreated
from hive_common.contracts.values import inline
from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent
from hive_common.kernel.ids import new_id
from hive_proto.jobs.v1 import jobs_pb2
from hive_scheduler import feed as feeds
from hive_scheduler.commits import Committed
from hive_scheduler.feed import Feed

VIEWS = {
    "jobs": "SELECT * FROM scheduler.jobs ORDER BY ns, job_id",
    "tasks": "SELECT * FROM scheduler.tasks ORDER BY ns, task_id",
    "steps": "SELECT * FROM scheduler.steps ORDER BY ns, job_id, step",
    # How positions are cut into rows depends on the batches in which they came.
    "job_positions": "SELECT ns, owner, job_id, array_agg(position ORDER BY position)"
    " FROM scheduler.job_positions, unnest(positions) AS position GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
}


def some_event(stream: str) -> NewEvent:
    payload = events.encode(TaskCreated(job=stream, step="s", agent="a@1.0.0", input=inline(b"{}")))
    return NewEvent(stream, 1, "TaskCreated", 1, payload, 5, "me", "owner", correlation=stream)


async def append(writer: LogWriter, count: int) -> list[Committed]:
    """Append events and return them as a committer would hand them out."""
    new = [some_event(new_id()) for _ in range(count)]
    last = await writer.append(Append(tuple(new)))
    return [Committed(last - count + 1 + offset, event) for offset, event in enumerate(new)]


async def test_feed_gives_each_position_once_and_reads_only_what_memory_has_not(database, monkeypatch):
    monkeypatch.setattr(feeds, "EVENTS_MAX", 60)
    async with (
        await LogWriter.open(database.role_dsn("scheduler")) as writer,
        LogReader(database.role_dsn("scheduler")) as reader,
    ):
        await append(writer, 7)  # before this process led
        feed = Feed(reader)
        feed.put(await append(writer, 10))
        await append(writer, 3)  # somebody else's
        feed.put(await append(writer, 50))
        feed.put(await append(writer, 5))  # drops the five oldest from memory
        await append(writer, 4)
        head = await reader.head()
        read: list[int] = []
        inner = reader.read

        async def counted(*args, **named):
            batch = await inner(*args, **named)
            read.extend(stored.position for stored in batch)
            return batch

        monkeypatch.setattr(reader, "read", counted)
        got = []
        wake = asyncio.Event()
        async for scan in feed.scans(0, wake=wake, limit=8, poll_s=0.01):
            assert len(scan.events) <= 8
            assert scan.through == scan.events[-1].position
            got += scan.events
            if scan.through == head:
                break
        assert [stored.position for stored in got] == list(range(1, head + 1))
        assert not {*read} & {*range(14, 19), *range(22, 77)}, "what memory had was read"
        stored = await inner(0)
        bare = [msgspec.structs.replace(one, event=b"", hash=b"") for one in stored]
        assert [msgspec.structs.replace(one, event=b"", hash=b"") for one in got] == bare


async def test_what_memory_gave_is_read_again_by_who_begins_again(database):
    async with (
        await LogWriter.open(database.role_dsn("scheduler")) as writer,
        LogReader(database.role_dsn("scheduler")) as reader,
    ):
        feed = Feed(reader)
        feed.put(await append(writer, 20))
        for after in (1, 1, 9):
            # A batch whose transaction failed comes again from the position that is written.
            async for scan in feed.scans(after, poll_s=0.01):
                assert [stored.position for stored in scan.events] == list(range(after + 1, 22))
                break


async def views_of(cluster):
    dsn = cluster.database.role_dsn("scheduler")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        return {name: await (await conn.execute(query)).fetchall() for name, query in VIEWS.items()}


async def stands_still(cluster):
    """Return once nothing more is written, as far as half a second says."""
    head = -1
    while (now := (await cluster.log())[-1].position) != head:
        head = now
        await asyncio.sleep(0.5)


async def test_views_from_memory_equal_those_of_a_replay_of_the_log(cluster, control, one_step, fail):
    def sometimes(assignment, given):
        if given["n"] % 7 == 3:
            raise fail("agent_error", "three \x00 'is' {too} much, \\ it is")
        return given["n"]

    executor = await cluster.executor("one", {"square": sometimes}, slots=16)
    task = {**one_step["tasks"][0], "fork": "${input}", "input": {"n": "${item}"}}
    document = {**one_step, "output": None, "limits": {"fan_out": 300}}
    retried = {**task, "retry": {"max_attempts": 2, "backoff": "1ms"}}
    jobs = [
        await control.submit({**document, "input": list(range(3)), "tasks": [task]}),
        await control.submit({**document, "input": list(range(300)), "tasks": [retried]}),
    ]
    version = 2
    for event in (ExecutorDrainRequested("a while"), ExecutorUndrained()) * 5:
        version += 1
        await cluster.append(executor.id, version, event)
        jobs.append(await control.submit(one_step))
    ended = [await control.finish(job_id) for job_id in jobs]
    assert {job.state for job in ended} == {"succeeded", "failed"}
    # A job that failed has attempts whose reports still come.
    await executor.stop()
    await stands_still(cluster)
    await control.get(jobs[0], (await cluster.log())[-1].position)
    live = await views_of(cluster)
    assert [len(live[name]) for name in ("jobs", "steps")] == [12, 12]
    await control.shut_down()
    async with await psycopg.AsyncConnection.connect(
        cluster.database.role_dsn("scheduler"), autocommit=True
    ) as conn:
        await conn.execute("TRUNCATE scheduler.jobs, scheduler.tasks, scheduler.steps, scheduler.job_positions")
        await conn.execute("UPDATE scheduler.projections SET position = 0 WHERE name = 'jobs'")
    await control.start()
    await control.get(jobs[0], (await cluster.log())[-1].position)
    assert await views_of(cluster) == live


async def test_who_has_heard_of_an_end_sees_it_without_naming_a_position(cluster, control, one_step):
    await cluster.executor("one", {"square": lambda assignment, given: 9})
    for _ in range(5):
        job_id = await control.submit(one_step)
        assert (await control.watch_batches(job_id))[-1][-1].type == "JobSucceeded"
        assert (await control.get(job_id)).state == "succeeded"
        job_id = await control.submit(one_step)
        await control.watch_batches(job_id)
        listed = await control.rpc("List", jobs_pb2.ListRequest(limit=1))
        assert [(job.job_id, job.state) for job in listed.jobs] == [(job_id, "succeeded")]
        job_id = await control.submit(one_step)
        await control.watch_batches(job_id)
        page = await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=job_id))
        assert [task.state for task in page.tasks] == ["succeeded"]
