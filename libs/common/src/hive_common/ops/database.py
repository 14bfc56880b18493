"""A service's own schema: a small pool of connections that comes back after Postgres does."""

import asyncio
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg_pool import AsyncConnectionPool

from hive_common.kernel.errors import Unavailable
from hive_common.ops.connection import Connection
from hive_common.ops.migrate import migrate
from hive_common.ops.startup import START_WITHIN_S, eventually

CONNECTIONS_MAX = 4
WAIT_S = 5.0
"""How long a query waits for a connection before its caller is told `Unavailable`."""
PROBE_S = 2.0
PROBE_AGAIN_S = 0.2
"""The same while it is away: others wait for what its service says of itself."""
PROBE_WAIT_S = 1.0
RECONNECT_S = 0.5
"""A pool that could not connect for so long gives up, and the next query starts anew: its pauses begin with a
second."""


class Database:
    """Queries on a service's views.

    Args:
        dsn: of the service's role.
        schema: the service's schema.
        connections_max: at most so many connections are open.
    """

    def __init__(self, dsn: str, schema: str, *, connections_max: int = CONNECTIONS_MAX) -> None:
        self._dsn = dsn
        self._schema = schema
        self._problem: str | None = "not connected yet"
        self._pool = AsyncConnectionPool(
            dsn,
            connection_class=Connection,
            min_size=1,
            max_size=connections_max,
            open=False,
            reconnect_timeout=RECONNECT_S,
            kwargs={"autocommit": True},
            # A connection that died with its server is replaced before a query can meet it.
            check=AsyncConnectionPool.check_connection,
            name=schema,
        )

    async def open(self, migrations: Path | Traversable, within_s: float = START_WITHIN_S) -> None:
        """Migrate the schema and connect.

        Raises:
            Unavailable: Postgres did not answer within `within_s`.
            FailedPrecondition: see `hive_common.ops.migrate.migrate`.
        """

        async def migrated() -> None:
            async with await Connection.connect(self._dsn, autocommit=True) as conn:
                await migrate(conn, migrations, self._schema)

        await eventually(migrated, "Postgres", within_s)
        await self._pool.open()
        await self._probe()

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close()

    async def fetch(self, query: LiteralString, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a query, which MUST be bounded by a key or a LIMIT.

        Raises:
            Unavailable: Postgres cannot be reached now.
        """
        return await self._fetch(query, parameters, WAIT_S)

    async def _fetch(self, query: LiteralString, parameters: Sequence[Any], wait_s: float) -> list[tuple[Any, ...]]:
        try:
            async with self._pool.connection(wait_s) as conn:
                cursor = await conn.execute(query, parameters)
                rows: list[tuple[Any, ...]] = await cursor.fetchall()
                return rows
        except psycopg.OperationalError as error:
            raise Unavailable("the database cannot be reached now") from error

    def problem(self) -> str | None:
        """Say what was wrong at the last probe, or None (a `telemetry.Check`)."""
        return self._problem

    async def watch(self) -> None:
        """Probe for ever, so that `problem` stays true. Run it as a task of the service."""
        while True:
            await asyncio.sleep(PROBE_S if self._problem is None else PROBE_AGAIN_S)
            await self._probe()

    async def _probe(self) -> None:
        try:
            await self._fetch("SELECT 1", (), PROBE_WAIT_S)
            self._problem = None
        except Unavailable as error:
            self._problem = error.message
