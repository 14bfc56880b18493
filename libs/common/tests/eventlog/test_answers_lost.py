"""Every call to the log and the views whose answer is lost after the database has done what it was asked.

The caller sees a broken connection. It gets its answer all the same, or the error that its docstring names; what
was acknowledged is there; and nothing is there twice. The cases are held against the ports: a method without one
fails.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
import pytest
from eventsourcing.persistence import OperationalError, StoredEvent
from eventsourcing.postgres import PostgresDatastore
from hive_common.eventlog.eventsourcing_adapter import HiveApplicationRecorder
from hive_common.eventlog.genesis import create_log
from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent, Stored
from hive_common.eventlog.migrate import migrate_log
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.eventlog.roles import provision
from hive_common.kernel.errors import Unavailable
from hive_common.kernel.ids import new_id
from hive_common.ops import database as views
from hive_common.testing.fixtures import Database
from hive_common.testing.ports import calls_of
from hive_common.testing.proxy import TcpProxy
from hive_common.testing.wire import postgres_answered
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo

STREAMS = [new_id() for _ in range(8)]
HEAD = 1 + len(STREAMS)
BATCH = 3
REQUESTS_MAX = 60
"""More than any of these calls makes; a call that asks for ever fails the test."""


class World:
    """A log with some events, and a wire to it on which answers are lost."""

    def __init__(self, database: Database, proxy: TcpProxy, folder: Path) -> None:
        self.database = database
        self.proxy = proxy
        self.folder = folder

    def dsn(self, role: str) -> str:
        # Without this libpq asks for encryption first, and that question would be the next request.
        return make_conninfo(
            self.database.role_dsn(role), port=self.proxy.port, sslmode="disable", gssencmode="disable"
        )

    def lose(self, skip: int = 0) -> asyncio.Event:
        return self.proxy.cut_next_answer(postgres_answered, skip=skip)

    async def stored(self) -> list[Stored]:
        async with LogReader(self.database.role_dsn("audit")) as reader:
            return await reader.read(0, 10_000)


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits before it tries again does so tens of times here."""
    monkeypatch.setattr("hive_common.eventlog.projection.BACKOFF_S", 0.01)
    monkeypatch.setattr("hive_common.eventlog.reader.BACKOFF_S", 0.01)
    monkeypatch.setattr("hive_common.ops.startup._RETRY_S", 0.01)


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        await asyncio.gather(*(writer.append(created(stream)) for stream in STREAMS))
    async with TcpProxy(database.server.port) as proxy:
        yield World(database, proxy, tmp_path)


def created(stream: str, version: int = 1) -> Append:
    return Append((NewEvent(stream, version, "TaskCreated", 1, b'{"n":1}', 1, "a", "o"),))


async def opening(world: World, skip: int) -> bool:
    """Lose the answer to one request of `LogWriter.open`; say whether it makes so many."""
    cut = world.proxy.cut_next_answer(skip=skip)
    try:
        writer = await LogWriter.open(world.dsn("scheduler"))
    except Unavailable:
        assert cut.is_set()
        return True
    world.proxy.spare_answers()
    await writer.close()
    return cut.is_set()


async def writer_open(world: World) -> None:
    """Whatever is lost, it is Unavailable, and the next one opens."""
    lost = 0
    while await opening(world, lost):
        lost += 1
        assert lost < REQUESTS_MAX
    assert lost >= 4  # greeting, two of SCRAM, the genesis event


async def writer_append(world: World) -> None:
    """The outcome is found out, and is there once."""
    appended = []
    async with await LogWriter.open(world.dsn("scheduler")) as writer:
        for skip in (0, 1, 0, 0):  # on a new connection the statement is prepared first
            stream = new_id()
            cut = world.lose(skip)
            appended.append((await writer.append(created(stream)), stream))
            if not cut.is_set():
                stream = new_id()
                appended.append((await writer.append(created(stream)), stream))
            assert cut.is_set()
            # Without a loss between, so that the next one meets a connection that has appended.
            stream = new_id()
            appended.append((await writer.append(created(stream)), stream))
    found = [(stored.position, stored.stream) for stored in await world.stored()]
    assert found[HEAD:] == appended


async def writer_close(world: World) -> None:
    """Closing does not connect again: the caller hears that the outcome is unknown, and it is there once."""
    writer = await LogWriter.open(world.dsn("scheduler"))
    await writer.append(created(new_id()))
    cut = world.lose()
    stream = new_id()
    appending = asyncio.create_task(writer.append(created(stream)))
    await asyncio.sleep(0)
    await writer.close()
    assert cut.is_set()
    with pytest.raises(Unavailable, match="unknown"):
        await appending
    assert [stored.stream for stored in await world.stored()].count(stream) == 1


async def reads(world: World, call: Callable[[LogReader], Awaitable[Any]]) -> None:
    """A read is made again, and gives what it would have given."""
    async with LogReader(world.database.role_dsn("audit")) as direct:
        expected = await call(direct)
    assert expected
    async with LogReader(world.dsn("audit")) as reader:
        await reader.head()  # connected
        cut = world.lose()
        assert await call(reader) == expected
        assert cut.is_set()
        # On a new connection too, whichever of its requests is concerned, or it says Unavailable.
        lost = 0
        while lost < REQUESTS_MAX:
            await reader.close()
            cut = world.proxy.cut_next_answer(skip=lost)
            with contextlib.suppress(Unavailable):
                assert await call(reader) == expected
            world.proxy.spare_answers()
            if not cut.is_set():
                break
            lost += 1
        assert 4 <= lost < REQUESTS_MAX
        assert await call(reader) == expected


async def followed(reader: LogReader) -> list[int]:
    found: list[int] = []
    async for batch in reader.follow(0, limit=BATCH, poll_s=0.01):
        found += [stored.position for stored in batch]
        if len(found) == HEAD:
            return found
    raise AssertionError


async def scanned(reader: LogReader) -> list[int]:
    found: list[int] = []
    async for scan in reader.scans(0, limit=BATCH, poll_s=0.01):
        found += [stored.position for stored in scan.events]
        if scan.through == HEAD:
            return found
    raise AssertionError


async def read_one(reader: LogReader) -> list[Stored]:
    return await reader.read(3, 10, streams=STREAMS[:6])


async def reader_close(world: World) -> None:
    """Closing asks for nothing, so nothing can be lost."""
    reader = LogReader(world.dsn("audit"))
    await reader.head()
    cut = world.proxy.cut_next_answer()
    await reader.close()
    assert not cut.is_set()


class Counts:
    """Counts events; one that was applied twice shows."""

    name = "counts"
    types: Sequence[str] | None = None

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        for stored in batch:
            await conn.execute(
                "INSERT INTO gateway.counts VALUES (%s, 1)"
                " ON CONFLICT (stream) DO UPDATE SET count = counts.count + 1",
                (stored.stream,),
            )


async def projection_run(world: World) -> None:
    """Each of its requests in turn, the commit of a batch among them: every event is in the view once."""
    lost = 0
    while await project(world, lost):
        lost += 1
        assert lost < REQUESTS_MAX
    assert lost > HEAD + 3 * HEAD // BATCH  # the events, and what frames their batches


async def project(world: World, skip: int) -> bool:
    async with await AsyncConnection.connect(world.database.role_dsn("gateway"), autocommit=True) as conn:
        await conn.execute("DROP TABLE IF EXISTS gateway.counts, gateway.projections")
        await conn.execute("CREATE TABLE gateway.counts (stream text PRIMARY KEY, count bigint NOT NULL)")
        async with LogReader(world.database.role_dsn("gateway")) as reader:
            cut = world.proxy.cut_next_answer(skip=skip)
            runner = ProjectionRunner(
                world.dsn("gateway"), reader, Counts(), "gateway", batch_events=BATCH, poll_s=0.01
            )
            running = asyncio.create_task(runner.run())
            async with asyncio.timeout(60):
                await runner.wait_for(HEAD)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            world.proxy.spare_answers()
        counted = await (await conn.execute("SELECT count(*), max(count) FROM gateway.counts")).fetchone()
        at = await (await conn.execute("SELECT position FROM gateway.projections")).fetchone()
        assert (counted, at) == ((HEAD, 1), (HEAD,)), f"after the answer to request {skip} was lost"
    return cut.is_set()


async def projection_wait_for(world: World) -> None:
    """Who waits for a position is told when the view has it, although the answer to its commit was lost."""
    assert await project(world, 5)


def one_table(world: World) -> Path:
    folder = world.folder / "migrations"
    folder.mkdir(exist_ok=True)
    (folder / "0001_one.sql").write_text("CREATE TABLE gateway.one (n int); INSERT INTO gateway.one VALUES (1);")
    (folder / "0002_two.sql").write_text("INSERT INTO gateway.one VALUES (2);")
    return folder


async def database_open(world: World) -> None:
    """Each request of the migration in turn: it starts again, and each file is applied once."""
    lost = 0
    while lost < REQUESTS_MAX:
        async with await AsyncConnection.connect(world.database.role_dsn("gateway"), autocommit=True) as conn:
            await conn.execute("DROP TABLE IF EXISTS gateway.one, gateway.migrations")
        cut = world.proxy.cut_next_answer(skip=lost)
        opened = views.Database(world.dsn("gateway"), "gateway", connections_max=1)
        await opened.open(one_table(world))
        world.proxy.spare_answers()
        assert await opened.fetch("SELECT n FROM gateway.one ORDER BY n LIMIT 3") == [(1,), (2,)]
        await opened.close()
        if not cut.is_set():
            break
        lost += 1
    assert 12 < lost < REQUESTS_MAX


async def database_fetch(world: World) -> None:
    """A lost answer is Unavailable, as it says, and the next query has a connection."""
    opened = views.Database(world.dsn("gateway"), "gateway", connections_max=1)
    await opened.open(one_table(world))
    for skip in (0, 1):  # the check of the connection, the query itself
        cut = world.lose(skip)
        with contextlib.suppress(Unavailable):
            assert await opened.fetch("SELECT n FROM gateway.one ORDER BY n LIMIT 3") == [(1,), (2,)]
        assert cut.is_set()
        assert await opened.fetch("SELECT n FROM gateway.one ORDER BY n LIMIT 3") == [(1,), (2,)]
    await opened.close()


async def database_watch(world: World) -> None:
    """A probe whose answer is lost is a problem at most until the next one."""
    opened = views.Database(world.dsn("gateway"), "gateway", connections_max=1)
    await opened.open(one_table(world))
    watching = asyncio.create_task(opened.watch())
    cut = world.lose(1)
    async with asyncio.timeout(60):
        await cut.wait()
        while opened.problem() is None:
            await asyncio.sleep(0.01)
        while opened.problem() is not None:
            await asyncio.sleep(0.01)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await opened.close()


async def database_close(world: World) -> None:
    """Closing asks for nothing that could be lost."""
    opened = views.Database(world.dsn("gateway"), "gateway", connections_max=1)
    await opened.open(one_table(world))
    cut = world.proxy.cut_next_answer()
    await opened.close()
    assert not cut.is_set()


class Case(NamedTuple):
    """One method of a port, and what must hold when its answer is lost."""

    port: type
    method: str
    holds: Callable[[World], Awaitable[None]]


def reading(call: Callable[[LogReader], Awaitable[Any]]) -> Callable[[World], Awaitable[None]]:
    return lambda world: reads(world, call)


CASES = (
    Case(LogWriter, "open", writer_open),
    Case(LogWriter, "append", writer_append),
    Case(LogWriter, "close", writer_close),
    Case(LogReader, "log_id", reading(lambda reader: reader.log_id())),
    Case(LogReader, "head", reading(lambda reader: reader.head())),
    Case(LogReader, "versions", reading(lambda reader: reader.versions(STREAMS))),
    Case(LogReader, "read", reading(read_one)),
    Case(LogReader, "scan", reading(lambda reader: reader.scan(0, 10))),
    Case(LogReader, "follow", reading(followed)),
    Case(LogReader, "scans", reading(scanned)),
    Case(LogReader, "close", reader_close),
    Case(ProjectionRunner, "run", projection_run),
    Case(ProjectionRunner, "wait_for", projection_wait_for),
    Case(views.Database, "open", database_open),
    Case(views.Database, "fetch", database_fetch),
    Case(views.Database, "watch", database_watch),
    Case(views.Database, "close", database_close),
)


@pytest.mark.parametrize("port", [LogWriter, LogReader, ProjectionRunner, views.Database])
def test_every_method_has_a_case(port: type) -> None:
    assert {case.method for case in CASES if case.port is port} == calls_of(port)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.port.__name__}.{case.method}")
async def test_answer_that_is_lost(world: World, case: Case) -> None:
    async with asyncio.timeout(110):
        await case.holds(world)


async def test_making_a_log_goes_on_where_an_answer_was_lost(empty_database: Database) -> None:
    """What `hive up` does as the administrator: migrate, provision, name the log; each request in turn."""
    lost, done = 0, False
    query = "SELECT rolpassword FROM pg_authid WHERE rolname = 'hive_router'"
    async with (
        TcpProxy(empty_database.server.port) as proxy,
        await AsyncConnection.connect(empty_database.dsn, autocommit=True) as admin,
    ):
        before = await (await admin.execute(query)).fetchone()
        dsn = make_conninfo(empty_database.dsn, port=proxy.port, sslmode="disable", gssencmode="disable")
        while not done:
            assert lost < 200
            cut = proxy.cut_next_answer(skip=lost)
            with contextlib.suppress(psycopg.OperationalError):
                async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
                    await migrate_log(conn)
                    await provision(conn, {"router": "another"})
                    await create_log(conn)
                done = not cut.is_set()
            proxy.spare_answers()
            lost += 1
        if before is not None:  # roles are the cluster's
            await admin.execute(f"ALTER ROLE hive_router PASSWORD '{before[0]}'")
    assert lost > 10
    async with LogReader(empty_database.dsn) as reader:
        (genesis,) = await reader.read(0, 10)
    assert (genesis.position, genesis.type) == (1, "LogCreated")


RECORDER = {"insert_events", "select_events", "select_notifications", "max_notification_id", "subscribe"}
"""What an application of the library `eventsourcing` asks the log; `use_recorder` does each."""


def test_every_call_of_the_librarys_recorder_is_made() -> None:
    own = {name for name, found in vars(HiveApplicationRecorder).items() if callable(found) and name[0] != "_"}
    assert own == RECORDER


def use_recorder(recorder: HiveApplicationRecorder, originator: UUID) -> None:
    """Record two events and read them in every way, over the wire on which an answer is lost."""
    events = [StoredEvent(originator, version, "Noted", b"{}") for version in (1, 2)]
    first, second = recorder.insert_events(events) or ()
    assert second == first + 1
    assert recorder.select_events(originator) == events
    assert [note.id for note in recorder.select_notifications(first, 10)] == [first, second]
    assert recorder.max_notification_id() == second
    for _ in range(2):
        try:
            with recorder.subscribe(gt=first) as subscription:
                assert next(subscription).id == second
        except OperationalError:
            continue  # its own connection, for notifications: it ends with that, and one subscribes again
        return
    raise AssertionError("a second subscription failed as well")


async def test_an_application_of_the_library_records_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request in turn, after the library's start."""
    monkeypatch.setattr("hive_common.eventlog.eventsourcing_adapter.RETRY_S", 0.01)
    info = conninfo_to_dict(world.dsn("registry"))
    address = [str(info[key]) for key in ("dbname", "host", "port", "user", "password")]
    originators: list[UUID] = []
    with PostgresDatastore(*address, schema="registry", pool_size=2) as store:
        recorder = await asyncio.to_thread(HiveApplicationRecorder, store)
        while True:
            assert len(originators) < REQUESTS_MAX
            cut = world.lose(len(originators))
            originators.append(uuid4())
            await asyncio.to_thread(use_recorder, recorder, originators[-1])
            world.proxy.spare_answers()
            if not cut.is_set():
                break
    assert len(originators) > 7  # three of a transaction, four reads
    recorded = [stored.stream for stored in await world.stored()][HEAD:]
    assert recorded == [str(originator) for originator in originators for _ in range(2)]
