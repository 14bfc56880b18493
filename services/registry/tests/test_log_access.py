import asyncio
from importlib.resources import files

from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.ids import new_id
from hive_common.ops.database import Database as ServiceDatabase
from hive_common.testing.fixtures import Database
from hive_registry.log_access import LogAccess
from hive_registry.views import SCHEMA, RegistryProjection


async def test_catching_up_does_not_wait_for_a_hint_or_a_poll(database: Database) -> None:
    dsn = database.role_dsn("registry")
    views = ServiceDatabase(dsn, SCHEMA)
    await views.open(files("hive_registry") / "migrations")
    wake = asyncio.Event()
    async with (
        LogReader(dsn) as reader,
        LogReader(dsn) as heads,
        await LogWriter.open(dsn) as writer,
    ):
        runner = ProjectionRunner(dsn, reader, RegistryProjection(), SCHEMA, wake=wake, poll_s=3600)
        running = asyncio.create_task(runner.run())
        try:
            await runner.wait_for(1)
            # An event of somebody else, of which no hint wakes the registry.
            event = NewEvent(new_id(), 1, "TaskReady", 1, b"{}", 1, "scheduler", "o")
            head = await writer.append(Append((event,)))
            log = LogAccess(writer, heads, runner, wake, SystemClock(), "o", "default")
            await log.catch_up()
            assert runner.position == head
        finally:
            running.cancel()
            await asyncio.wait({running})
    await views.close()
