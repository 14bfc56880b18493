"""What the log's writer asks of its database: one port, and the connection to Postgres behind it."""

from collections.abc import Sequence
from typing import Any, Protocol

from psycopg import AsyncConnection

from hive_common.eventlog.batch import CALL_NUMBERED, PARAMETER_OIDS, Prepared, answers_of, parameters_of
from hive_common.eventlog.genesis import read_log_id
from hive_common.eventlog.statement import Statement

_STORED = "SELECT position, event FROM log.events WHERE stream = %s AND version = %s"

Answer = tuple[int, int, int]
"""Of one append: its last position, or 0 with the index from 1 of the stream that conflicts, and its version."""


class Session(Protocol):
    """A session of one writer with the log. Every method raises `psycopg.Error`.

    Where an error has ended the session, `closed` says so, and what was asked may have been done or not.
    """

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        ...

    async def log_id(self) -> str:
        """Return the log's id. Raises `Unavailable`, or `FailedPrecondition` for a log without genesis."""
        ...

    async def append(self, batch: Sequence[Prepared]) -> tuple[list[str], list[Answer]]:
        """Append what of a batch holds; return its streams in the order of their indices, and an answer to each."""
        ...

    async def stored(self, stream: str, version: int) -> tuple[int, bytes] | None:
        """Return the position and the envelope of an event, None where there is none."""
        ...

    async def ping(self) -> None:
        """Ask for nothing, to learn whether the session is still there."""
        ...

    async def close(self) -> None:
        """End the session."""
        ...


class PostgresSession:
    """A session over an autocommit connection, which others may use in between."""

    def __init__(self, conn: AsyncConnection[Any]) -> None:
        self._conn = conn
        self._statement: Statement | None = None

    @property
    def closed(self) -> bool:
        """Whether the connection is."""
        return self._conn.closed

    async def log_id(self) -> str:
        """Return the log's id."""
        return await read_log_id(self._conn)

    async def append(self, batch: Sequence[Prepared]) -> tuple[list[str], list[Answer]]:
        """Append with one call of `log_append`."""
        streams, parameters = parameters_of(batch)
        if self._statement is None:
            self._statement = Statement(self._conn, CALL_NUMBERED, PARAMETER_OIDS)
        return streams, list(answers_of(await self._statement.row(parameters)))

    async def stored(self, stream: str, version: int) -> tuple[int, bytes] | None:
        """Return an event."""
        cursor = await self._conn.execute(_STORED, (stream, version), binary=True)
        row = await cursor.fetchone()
        return None if row is None else (row[0], row[1])

    async def ping(self) -> None:
        """Ask for nothing."""
        await self._conn.execute("SELECT 1")

    async def close(self) -> None:
        """Close the connection."""
        await self._conn.close()
