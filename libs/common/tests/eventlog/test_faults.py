"""Connections that break at the worst moment, and many processes at once."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
import uvloop
from hive_common.eventlog.log import Append, LogReader, LogWriter, Stored, envelope_of, leaf_hash
from hive_common.kernel.errors import HiveError, Unavailable, VersionConflict
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database
from hive_common.testing.proxy import POSTGRES_READY, TcpProxy
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo

NewAppend = Callable[..., Append]
PROCESSES = 4
CALLERS = 8
APPENDS = 20


def through(proxy: TcpProxy, database: Database) -> str:
    # Without this libpq would ask for encryption first, and that question would be "the next request".
    return make_conninfo(database.role_dsn("scheduler"), port=proxy.port, sslmode="disable", gssencmode="disable")


async def all_events(database: Database) -> list[Stored]:
    async with LogReader(database.role_dsn("audit")) as reader:
        return await reader.read(0, 10_000)


def assert_chain_holds(events: list[Stored]) -> None:
    prev = "0" * 64
    heads: dict[str, int] = {}
    for position, stored in enumerate(events, start=1):
        envelope = envelope_of(stored.event)
        assert (stored.position, envelope.position, envelope.prev) == (position, position, prev)
        assert stored.version == heads.get(stored.stream, 0) + 1
        assert stored.hash == leaf_hash(stored.event)
        heads[stored.stream] = stored.version
        prev = stored.hash.hex()


async def test_answer_lost_after_commit_is_success_and_stored_once(
    database: Database, new_append: NewAppend
) -> None:
    server = database.server
    stream = new_id()
    async with TcpProxy(server.port) as proxy, await LogWriter.open(through(proxy, database)) as writer:
        # The first call of a connection prepares the statement, in a round trip of its own.
        assert await writer.append(new_append(stream)) == 2
        cut = proxy.cut_next_answer(until=POSTGRES_READY)
        assert await writer.append(new_append(stream, 2)) == 3
        assert cut.is_set()
        assert await writer.append(new_append(stream, 3)) == 4
        assert proxy.connections == 2
    events = await all_events(database)
    assert [stored.stream for stored in events[1:]] == [stream, stream, stream]
    assert_chain_holds(events)


async def test_lost_answer_of_a_batch_gives_each_caller_its_own_outcome(
    database: Database, new_append: NewAppend
) -> None:
    taken = new_id()
    streams = [new_id() for _ in range(10)]
    async with TcpProxy(database.server.port) as proxy, await LogWriter.open(through(proxy, database)) as writer:
        await writer.append(new_append(taken))
        cut = proxy.cut_next_answer(until=POSTGRES_READY)
        # All are queued before the writer's task runs: one batch.
        outcomes = await asyncio.gather(
            *(writer.append(new_append(stream)) for stream in streams),
            writer.append(new_append(taken)),
            return_exceptions=True,
        )
        assert cut.is_set()
    assert sorted(position for position in outcomes if isinstance(position, int)) == list(range(3, 13))
    assert isinstance(outcomes[-1], VersionConflict)
    assert_chain_holds(await all_events(database))


async def test_request_that_never_arrived_is_sent_again(database: Database, new_append: NewAppend) -> None:
    async with TcpProxy(database.server.port) as proxy, await LogWriter.open(through(proxy, database)) as writer:
        await writer.append(new_append(new_id()))
        cut = proxy.cut_next_request()
        assert await writer.append(new_append(new_id())) == 3
        assert cut.is_set()
    assert_chain_holds(await all_events(database))


async def test_another_writers_event_is_a_conflict_also_after_a_lost_answer(
    database: Database, new_append: NewAppend
) -> None:
    stream = new_id()
    async with (
        TcpProxy(database.server.port) as proxy,
        await LogWriter.open(through(proxy, database)) as writer,
        await LogWriter.open(database.role_dsn("registry")) as other,
    ):
        await other.append(new_append(stream))
        await writer.append(new_append(new_id()))
        cut = proxy.cut_next_answer(until=POSTGRES_READY)
        with pytest.raises(VersionConflict):
            await writer.append(new_append(stream))
        assert cut.is_set()


async def test_database_that_stays_away_makes_appends_unavailable(
    database: Database, new_append: NewAppend
) -> None:
    async with (
        TcpProxy(database.server.port) as proxy,
        await LogWriter.open(through(proxy, database), unavailable_after_s=0.1) as writer,
    ):
        proxy.refuse()
        proxy.cut_all()
        with pytest.raises(Unavailable):
            await writer.append(new_append(new_id()))
        assert not writer.failed.is_set()
        proxy.refuse(False)
        assert await writer.append(new_append(new_id())) == 2


async def test_closing_does_not_wait_for_a_database_that_is_away(database: Database, new_append: NewAppend) -> None:
    async with TcpProxy(database.server.port) as proxy:
        writer = await LogWriter.open(through(proxy, database), unavailable_after_s=3600)
        proxy.refuse()
        proxy.cut_all()
        waiting = asyncio.create_task(writer.append(new_append(new_id())))
        await asyncio.sleep(0)
        await asyncio.wait_for(writer.close(), 30)
        with pytest.raises(Unavailable):
            await waiting


async def test_leaders_writer_fails_for_good_when_its_connection_is_lost(
    database: Database, new_append: NewAppend
) -> None:
    async with TcpProxy(database.server.port) as proxy:
        conn = await AsyncConnection.connect(through(proxy, database), autocommit=True)
        await conn.execute("SELECT pg_advisory_lock(7)")
        writer = await LogWriter.open(conn, reconnect=False)
        assert await writer.append(new_append(new_id())) == 2
        proxy.cut_next_answer(until=POSTGRES_READY)
        outcomes = await asyncio.gather(
            *(writer.append(new_append(new_id())) for _ in range(5)), return_exceptions=True
        )
        assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
        assert writer.failed.is_set()
        with pytest.raises(Unavailable):
            await writer.append(new_append(new_id()))
        await writer.close()
        await conn.close()


async def test_idle_leader_notices_that_its_connection_died(database: Database) -> None:
    async with TcpProxy(database.server.port) as proxy:
        conn = await AsyncConnection.connect(through(proxy, database), autocommit=True)
        writer = await LogWriter.open(conn, reconnect=False)
        proxy.cut_all()
        await asyncio.wait_for(writer.failed.wait(), 30)
        await writer.close()
        await conn.close()


async def test_backend_that_is_terminated_loses_nothing(database: Database, new_append: NewAppend) -> None:
    streams = [new_id() for _ in range(200)]

    appended = asyncio.Event()

    async def killer(until: asyncio.Event) -> None:
        async with await AsyncConnection.connect(database.dsn, autocommit=True) as conn:
            while not until.is_set():
                # One append between two kills: on a busy machine a new connection takes longer than any pause.
                appended.clear()
                await conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE usename = 'hive_scheduler' AND datname = current_database()"
                )
                await appended.wait()

    done = asyncio.Event()
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        killing = asyncio.create_task(killer(done))
        slots = asyncio.Semaphore(8)

        async def one(stream: str) -> int:
            async with slots:
                position = await writer.append(new_append(stream))
                appended.set()
                return position

        positions = await asyncio.gather(*(one(stream) for stream in streams))
        done.set()
        appended.set()
        await killing
    events = await all_events(database)
    assert_chain_holds(events)
    by_position = {stored.position: stored.stream for stored in events}
    assert [by_position[position] for position in positions] == streams
    assert len(events) == len(streams) + 1


WORKER = """
import asyncio, json, os, sys
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.errors import VersionConflict
from hive_common.kernel.ids import new_id

async def caller(writer, shared, appends, seen):
    own, version = new_id(), 0
    for _ in range(appends):
        events = (NewEvent(own, version + 1, "TaskCreated", 1, b"{}", 1, "a", "o"),)
        seen.append([await writer.append(Append(events)), own, version + 1])
        version += 1
        while True:  # all processes fight for one stream
            head = shared["version"]
            try:
                events = (NewEvent(shared["id"], head + 1, "Noted", 1, b"{}", 1, "a", "o"),)
                seen.append([await writer.append(Append(events, {own: version})), shared["id"], head + 1])
                shared["version"] = max(shared["version"], head + 1)
                break
            except VersionConflict as conflict:
                shared["version"] = max(shared["version"], conflict.fields["actual"])

async def main():
    shared = {"id": os.environ["SHARED"], "version": 0}
    callers, appends = int(sys.argv[1]), int(sys.argv[2])
    seen = []
    async with await LogWriter.open(os.environ["DSN"]) as writer:
        await asyncio.gather(*(caller(writer, shared, appends, seen) for _ in range(callers)))
    print(json.dumps(seen))

asyncio.run(main())
"""


async def test_positions_are_gapless_and_chained_under_many_processes(database: Database, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    shared = new_id()
    seen: list[int] = []
    reading = asyncio.create_task(_follow_to(database, 1 + 2 * PROCESSES * CALLERS * APPENDS, seen))
    workers = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            str(script),
            str(CALLERS),
            str(APPENDS),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "DSN": database.role_dsn(role), "SHARED": shared},
        )
        for role in ("scheduler", "registry") * (PROCESSES // 2)
    ]
    outputs = await asyncio.gather(*(worker.communicate() for worker in workers))
    acknowledged = [tuple(row) for out, _ in outputs for row in json.loads(out)]
    events = await all_events(database)
    assert_chain_holds(events)
    assert sorted(acknowledged) == [(stored.position, stored.stream, stored.version) for stored in events[1:]]
    await asyncio.wait_for(reading, 30)
    assert seen == [stored.position for stored in events]  # a reader alongside missed none


async def _follow_to(database: Database, last: int, seen: list[int]) -> None:
    async with LogReader(database.role_dsn("audit")) as reader:
        async for batch in reader.follow(0, poll_s=0.001, limit=50):
            seen += [stored.position for stored in batch]
            if seen[-1] >= last:
                return


async def test_reader_reconnects_and_follows_on(database: Database, new_append: NewAppend) -> None:
    got: list[int] = []
    async with (
        TcpProxy(database.server.port) as proxy,
        LogReader(make_conninfo(database.role_dsn("audit"), port=proxy.port)) as reader,
        await LogWriter.open(database.role_dsn("scheduler")) as writer,
    ):

        async def follow() -> None:
            async for batch in reader.follow(1, poll_s=0.01):
                got.extend(stored.position for stored in batch)
                if got[-1] >= 21:
                    return

        following = asyncio.create_task(follow())
        for number in range(20):
            await writer.append(new_append(new_id()))
            if number % 5 == 0:
                proxy.cut_all()
        await asyncio.wait_for(following, 60)
    assert got == list(range(2, 22))


async def test_reader_says_unavailable_when_the_database_is_away(database: Database) -> None:
    async with TcpProxy(database.server.port) as proxy:
        reader = LogReader(make_conninfo(database.role_dsn("audit"), port=proxy.port))
        assert await reader.head() == 1
        proxy.refuse()
        proxy.cut_all()
        with pytest.raises(Unavailable):
            await reader.head()
        proxy.refuse(False)
        assert await reader.head() == 1
        await reader.close()


async def test_writer_needs_a_log_with_a_genesis_event(empty_database: Database) -> None:
    from hive_common.eventlog.migrate import migrate_log

    async with await psycopg.AsyncConnection.connect(empty_database.dsn, autocommit=True) as conn:
        await migrate_log(conn)
    opened: list[AsyncConnection[object]] = []

    async def connect() -> AsyncConnection[object]:
        opened.append(await AsyncConnection.connect(empty_database.dsn, autocommit=True))
        return opened[-1]

    with pytest.raises(HiveError, match="create_log"):
        await LogWriter.open(connect)
    assert [conn.closed for conn in opened] == [True]


async def test_a_session_that_ended_before_the_append_fails_it_on_the_loop_of_the_services_too(
    database: Database, new_append: NewAppend
) -> None:
    async def scenario() -> None:
        conn = await AsyncConnection.connect(database.role_dsn("scheduler"), autocommit=True)
        writer = await LogWriter.open(conn, reconnect=False)
        await writer.append(new_append(new_id()))
        async with await AsyncConnection.connect(database.dsn, autocommit=True) as admin:
            await admin.execute("SELECT pg_terminate_backend(%s, 10000)", (conn.info.backend_pid,))
        # What is sent now is answered by a reset, behind the last words of the session.
        with pytest.raises(Unavailable):
            async with asyncio.timeout(30):
                await writer.append(new_append(new_id()))
        assert writer.failed.is_set()
        await writer.close()
        await conn.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(scenario())

    await asyncio.to_thread(run)
