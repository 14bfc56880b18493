"""Law 11: a scheduler stops at an event that it does not know, and no other leads past it."""

import asyncio

import pytest
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.ids import new_id


@pytest.mark.parametrize(("type_name", "schema"), [("TaskTeleported", 1), ("JobSubmitted", 2), ("GrantMade", 1)])
async def test_an_event_it_does_not_know_stops_the_scheduler(cluster, type_name, schema):
    leader = cluster.control_process()
    await leader.start()
    stream = new_id()
    async with await LogWriter.open(cluster.database.role_dsn("registry")) as writer:
        unknown = NewEvent(stream, 1, type_name, schema, b"{}", 1, "somebody newer", new_id(), correlation=stream)
        await writer.append(Append((unknown,)))
    successor = cluster.control_process()
    for scheduler in (leader, successor):
        if scheduler is successor:
            await scheduler.start(wait=False)
        assert await asyncio.wait_for(scheduler.process.wait(), 30) == 1
        assert type_name in scheduler.file.with_suffix(".log").read_text()
