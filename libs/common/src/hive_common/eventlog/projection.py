"""Projections: views of the log in a service's own schema, exactly once.

A batch's view changes and the position they reach commit in one transaction, so that a crash repeats both or
neither. The row in `<schema>.projections` is compared before it is moved: a second runner of the same
projection cannot apply a batch again.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import psycopg
from psycopg import AsyncConnection, sql

from hive_common.contracts.events import TYPES
from hive_common.eventlog.connection import Connect, connector, is_lost
from hive_common.eventlog.envelope import Stored
from hive_common.eventlog.reader import BACKOFF_S, Scan
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import Unavailable

logger = logging.getLogger(__name__)

QUIET_POSITIONS = 10_000
"""Positions looked through without an event of ours before that is written down: saves a commit per wake-up."""

_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('hive.projections.' || %s, 0))"
_CREATE = sql.SQL(
    "CREATE TABLE IF NOT EXISTS {} (name text PRIMARY KEY,"
    " position bigint NOT NULL CHECK (position >= 0), updated_us bigint NOT NULL)"
)
_REGISTER = sql.SQL("INSERT INTO {} VALUES (%s, 0, %s) ON CONFLICT (name) DO NOTHING")
_POSITION = sql.SQL("SELECT position FROM {} WHERE name = %s")
_MOVE = sql.SQL("UPDATE {} SET position = %s, updated_us = %s WHERE name = %s AND position = %s")


class Projection(Protocol):
    """A view of the log.

    Attributes:
        name: unique in the schema.
        types: the types it wants, or None for all of them. Types that the catalogue of events does not have
            come all the same: a filter may leave out what is known, and nothing else (law 11).
    """

    name: str
    types: Sequence[str] | None

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Write the changes that `batch` makes, on `conn`, inside the transaction that is open there.

        It MUST raise `UnknownEvent` for a type or schema version it does not know (law 11), and MUST NOT commit,
        nor have effects elsewhere.
        """
        ...


class Source(Protocol):
    """Where a runner has its events from: a `LogReader`, or what spares it reading them."""

    async def head(self) -> int:
        """Return the position of the log's last event. Raises `Unavailable`."""
        ...

    def scans(
        self,
        after: int,
        *,
        wake: asyncio.Event | None = None,
        types: Sequence[str] | None = None,
        known: Sequence[str] | None = None,
        limit: int = 1000,
        poll_s: float = 1.0,
    ) -> AsyncIterator[Scan]:
        """Follow the log (LogReader.scans)."""
        ...


class Moved(Exception):
    """Another runner has moved the position."""


async def create_projection_table(conn: AsyncConnection[Any], schema: str) -> None:
    """Make `<schema>.projections` when it is not there. `conn` belongs to the schema's owner."""
    async with conn.transaction():
        # IF NOT EXISTS looks before it makes: of two that start at once, one would fail.
        await conn.execute(_LOCK, (schema,))
        await conn.execute(_CREATE.format(sql.Identifier(schema, "projections")))


class ProjectionRunner:
    """Follows the log for one projection. Run `run()` as a task of the service.

    Args:
        source: where the views are: a connection string or a factory of autocommit connections.
        reader: a `LogReader`, which the runner does not close, or another source of the log's events.
        projection: what to keep up to date.
        schema: the service's schema.
        wake: set by whoever hears of a new head; each runner needs its own.
        batch_events: at most so many events in a transaction.
        poll_s: how often to look without being woken.

    Attributes:
        position: the log is projected up to here, 0 before `run()` has read it.
        head: the last head that was seen.
    """

    def __init__(
        self,
        source: str | Connect,
        reader: Source,
        projection: Projection,
        schema: str,
        *,
        wake: asyncio.Event | None = None,
        batch_events: int = 1000,
        poll_s: float = 1.0,
    ) -> None:
        self.position = 0
        self.head = 0
        self.failure: BaseException | None = None
        self._connect = connector(source)
        self._reader = reader
        self._projection = projection
        self._schema = schema
        self._table = sql.Identifier(schema, "projections")
        self._wake = wake
        self._batch_events = batch_events
        self._poll_s = poll_s
        self._written = 0
        self._moved = asyncio.Condition()

    @property
    def lag(self) -> int:
        """How many positions the view is behind the last head that was seen."""
        return max(0, self.head - self.position)

    async def wait_for(self, position: int) -> None:
        """Return when the view contains everything up to `position`.

        Raises:
            Unavailable: the projection has stopped; the cause is chained.
        """
        async with self._moved:
            await self._moved.wait_for(lambda: self.position >= position or self.failure is not None)
        if self.position < position:
            raise Unavailable(f"projection {self._projection.name} has stopped") from self.failure

    async def run(self) -> None:
        """Follow the log until cancelled. Lost connections are opened again.

        Raises:
            UnknownEvent: from the projection; nothing of that batch was written.
        """
        try:
            while True:
                try:
                    await self._run_connected()
                except (Moved, Unavailable) as error:
                    logger.warning("projection %s starts again: %s", self._projection.name, error)
                    await asyncio.sleep(BACKOFF_S)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            async with self._moved:
                self._moved.notify_all()

    async def _run_connected(self) -> None:
        try:
            conn = await self._connect()
        except psycopg.OperationalError as error:
            raise Unavailable(f"the view's database cannot be reached: {error}") from error
        async with conn:
            try:
                await self._begin(conn)
                await self._follow(conn)
            except psycopg.Error as error:
                if is_lost(conn, error):
                    raise Unavailable(f"the view's database went away: {error}") from error
                raise

    async def _begin(self, conn: AsyncConnection[Any]) -> None:
        await create_projection_table(conn, self._schema)
        name = self._projection.name
        await conn.execute(_REGISTER.format(self._table), (name, SystemClock().now_us()))
        row = await (await conn.execute(_POSITION.format(self._table), (name,))).fetchone()
        assert row is not None
        self._written = row[0]
        self.head = await self._reader.head()
        await self._reached(self._written)

    async def _follow(self, conn: AsyncConnection[Any]) -> None:
        scans = self._reader.scans(
            self._written,
            wake=self._wake,
            types=self._projection.types,
            known=None if self._projection.types is None else (*TYPES, *self._projection.types),
            limit=self._batch_events,
            poll_s=self._poll_s,
        )
        async for scan in scans:
            self.head = max(self.head, scan.through)
            if scan.events or scan.through - self._written >= QUIET_POSITIONS:
                await self._apply(conn, scan)
            await self._reached(scan.through)

    async def _apply(self, conn: AsyncConnection[Any], scan: Scan) -> None:
        async with conn.transaction():
            if scan.events:
                await self._projection.apply(conn, scan.events)
            moved = await conn.execute(
                _MOVE.format(self._table),
                (scan.through, SystemClock().now_us(), self._projection.name, self._written),
            )
            if moved.rowcount != 1:
                raise Moved("another runner of this projection is at work")
        self._written = scan.through

    async def _reached(self, position: int) -> None:
        async with self._moved:
            self.position = position
            self._moved.notify_all()
