"""What the leader needs of its database: one port, and Postgres behind it."""

import asyncio
from importlib.resources import files
from typing import Any, Protocol

from hive_common.eventlog.log import LogReader, LogWriter
from hive_common.eventlog.projection import ProjectionRunner, Source, create_projection_table
from hive_common.eventlog.writer import OnHead
from hive_common.ops.migrate import migrate
from psycopg import AsyncConnection

from hive_scheduler.queries import Queries
from hive_scheduler.recovery import OpenJobs, PostgresOpenJobs
from hive_scheduler.reputation import Records
from hive_scheduler.reputation_views import PostgresRecords, ReputationProjection
from hive_scheduler.views import JobsProjection

SCHEMA = "scheduler"
VIEWS_BATCH_EVENTS = 2_000


async def prepare_database(dsn: str) -> None:
    """Bring this service's schema up to date. Raises `psycopg.OperationalError` where Postgres is not there."""
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        await migrate(conn, files("hive_scheduler") / "migrations", SCHEMA)
        await create_projection_table(conn, SCHEMA)


class Following(Protocol):
    """What keeps something up to date with the log."""

    async def run(self) -> None:
        """Follow the log until cancelled."""
        ...


class Views(Protocol):
    """What keeps the views (hive_common.eventlog.projection.ProjectionRunner)."""

    head: int
    position: int

    @property
    def lag(self) -> int:
        """How many positions the views are behind the last head that was seen."""
        ...

    async def wait_for(self, position: int) -> None:
        """Return when the views contain everything up to `position`. Raises `Unavailable`."""
        ...

    async def run(self) -> None:
        """Follow the log until cancelled."""
        ...


class Database(Protocol):
    """The log, and the views that the scheduler keeps of it, as the leader reaches them."""

    async def writer(self, on_head: OnHead) -> LogWriter:
        """Return a writer on the very connection that holds the leader's lock: it fails with that one for good."""
        ...

    def reader(self) -> LogReader:
        """Return a reader of the log, which the caller closes."""
        ...

    def open_jobs(self) -> OpenJobs:
        """Return what the views know of open jobs."""
        ...

    def views(self, source: Source, wake: asyncio.Event) -> Views:
        """Return what keeps the views up to date from `source`."""
        ...

    def records(self) -> Records:
        """Return what the table of reputation knows of executors."""
        ...

    def reputation(self, reader: LogReader) -> Following:
        """Return what keeps that table up to date; `reader` is its own."""
        ...

    def queries(self, ns: str) -> Queries:
        """Return reads of the views of one namespace, which the caller opens and closes."""
        ...

    async def close(self) -> None:
        """Let go of the lock, with its connection."""
        ...


class PostgresDatabase:
    """Postgres.

    Args:
        conn: holds the leader's lock.
        dsn: for everything else.
    """

    def __init__(self, conn: AsyncConnection[Any], dsn: str) -> None:
        self._conn = conn
        self._dsn = dsn

    async def writer(self, on_head: OnHead) -> LogWriter:
        """Return a writer on the lock's connection."""
        return await LogWriter.open(self._conn, on_head=on_head, reconnect=False)

    def reader(self) -> LogReader:
        """Return a reader on a connection of its own."""
        return LogReader(self._dsn)

    def open_jobs(self) -> OpenJobs:
        """Return what reads the open jobs of the views."""
        return PostgresOpenJobs(self._conn)

    def views(self, source: Source, wake: asyncio.Event) -> ProjectionRunner:
        """Return the runner of the views' projection."""
        projection = JobsProjection()
        return ProjectionRunner(self._dsn, source, projection, SCHEMA, wake=wake, batch_events=VIEWS_BATCH_EVENTS)

    def records(self) -> PostgresRecords:
        """Return what reads the table of reputation."""
        return PostgresRecords(self._conn)

    def reputation(self, reader: LogReader) -> ProjectionRunner:
        """Return the runner of reputation's projection. Nobody waits for it: it looks once a second."""
        return ProjectionRunner(self._dsn, reader, ReputationProjection(reader), SCHEMA)

    def queries(self, ns: str) -> Queries:
        """Return reads of the views."""
        return Queries(self._dsn, ns)

    async def close(self) -> None:
        """Close the lock's connection."""
        await self._conn.close()
