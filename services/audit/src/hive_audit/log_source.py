"""Reads the tables of the log with queries of its own, as a role that may only SELECT."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final, Self

import psycopg
from hive_common.kernel.errors import Unavailable
from hive_common.ops.connection import Connection
from psycopg import AsyncConnection

from hive_audit.verifier import TERMINAL_TYPES, Head, Row

PAGE_ROWS: Final = 2_048
PAGE_BYTES: Final = 16 * 1024 * 1024
LARGE_BYTES: Final = 16 * 1024
"""Payloads up to this size ride along in any page; nearly all are far smaller."""
BEFORE_FIRST: Final = -(2**63)
"""Also rows at positions that no log has must be seen."""

_HEAD = "SELECT position, hash FROM log.events ORDER BY position DESC LIMIT 1"
EVENT_AT = "SELECT event, hash FROM log.events WHERE position = %s"
# Both sides of the join get the range, or a page would scan all payloads before it. What is large comes as
# NULL and makes the page be read again by size: the window function costs a third of the rate.
PAGE = """
SELECT e.position, e.stream, e.version, e.type, e.event, e.hash,
       CASE WHEN octet_length(p.payload) <= %(large)s THEN p.payload END, p.salt
  FROM log.events e LEFT JOIN log.payloads p
       ON p.position = e.position AND p.position > %(after)s AND p.position <= %(until)s
 WHERE e.position > %(after)s AND e.position <= %(until)s
 ORDER BY e.position LIMIT %(rows)s"""
# A row whose predecessors filled the budget is left for the next page; the first one always comes.
PAGE_BY_SIZE = """
SELECT position, stream, version, type, event, hash, payload, salt FROM (
    SELECT e.position, e.stream, e.version, e.type, e.event, e.hash, p.payload, p.salt,
           sum(octet_length(e.event) + coalesce(octet_length(p.payload), 0))
               OVER (ORDER BY e.position ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
      FROM log.events e LEFT JOIN log.payloads p
           ON p.position = e.position AND p.position > %(after)s AND p.position <= %(until)s
     WHERE e.position > %(after)s AND e.position <= %(until)s
     ORDER BY e.position LIMIT %(rows)s) page
 WHERE coalesce(bytes_before, 0) < %(bytes)s
 ORDER BY position"""
_ENVELOPES = """
SELECT position, type, event FROM log.events
 WHERE position > %s ORDER BY position LIMIT %s"""
_STREAM_HEADS = """
SELECT wanted.stream, last.version,
       EXISTS (SELECT FROM log.events t
                WHERE t.stream = wanted.stream AND t.position <= %(position)s AND t.type = ANY(%(terminal)s))
  FROM unnest(%(streams)s::text[]) AS wanted (stream)
  JOIN LATERAL (
      SELECT l.version FROM log.events l
       WHERE l.stream = wanted.stream AND l.position <= %(position)s
       ORDER BY l.version DESC LIMIT 1
  ) AS last ON true"""
_ORPHAN = """
SELECT p.position FROM log.payloads p
 WHERE p.position > (SELECT coalesce(max(e.position), 0) FROM log.events e)
 ORDER BY p.position LIMIT 1"""
_STREAM = """
SELECT e.position, e.stream, e.version, e.type, e.event, e.hash, p.payload, p.salt
  FROM log.events e LEFT JOIN log.payloads p ON p.position = e.position
 WHERE e.stream = %s ORDER BY e.version LIMIT %s"""
_BESIDE = "SELECT position, event, hash FROM log.events WHERE position = ANY(%s)"
_DECIDED = """
SELECT position, stream, type, event FROM log.events
 WHERE position > %(after)s AND position <= %(until)s AND type IN ('TaskDecided', 'StepJoined')
 ORDER BY position LIMIT %(rows)s"""
# Pages are read in the order of the keys; a plan that sorts or hashes the whole table is never better here.
SESSION = "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_sort = off; SET jit = off"


class LogSource:
    """A connection that reads the log. Errors of the connection surface as `Unavailable`.

    Attributes:
        dsn: what it was opened with, password included.
    """

    def __init__(self, conn: AsyncConnection[Any], dsn: str) -> None:
        self._conn = conn
        self.dsn = dsn

    @classmethod
    async def open(cls, dsn: str) -> Self:
        """Connect.

        Raises:
            Unavailable: Postgres cannot be reached, or refuses.
        """
        try:
            conn = await Connection.connect(dsn, autocommit=True)
            await conn.execute(SESSION)
        except psycopg.OperationalError as error:
            raise Unavailable(f"Postgres cannot be reached: {error}") from error
        return cls(conn, dsn)

    async def close(self) -> None:
        """Close the connection."""
        await self._conn.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def head(self) -> Head | None:
        """Return the last event's position and hash; None for a log without events."""
        rows = await self._fetch(_HEAD, ())
        return Head(rows[0][0], rows[0][1]) if rows else None

    async def event_at(self, position: int) -> tuple[bytes, bytes] | None:
        """Return the envelope and the hash at a position, or None."""
        rows = await self._fetch(EVENT_AT, (position,))
        return (rows[0][0], rows[0][1]) if rows else None

    async def page(self, after: int, until: int, rows_max: int = PAGE_ROWS) -> list[Row]:
        """Return the rows with `after < position <= until`, with payloads, as many as a page holds."""
        arguments = {"after": after, "until": until, "rows": rows_max, "large": LARGE_BYTES}
        rows = await self._fetch(PAGE, arguments)
        if any(row[6] is None and row[7] is not None for row in rows):
            return await self._fetch(PAGE_BY_SIZE, arguments | {"bytes": PAGE_BYTES})
        return rows

    async def pages(self, after: int, until: int) -> AsyncGenerator[list[Row], None]:
        """Iterate the rows with `after < position <= until`; the next page is read while one is looked at."""
        ahead: asyncio.Task[list[Row]] | None = asyncio.create_task(self.page(after, until))
        try:
            while ahead is not None:
                rows = await ahead
                # `until` may be missing itself, so only an empty page is the end.
                done = not rows or rows[-1][0] >= until
                ahead = None if done else asyncio.create_task(self.page(rows[-1][0], until))
                if rows:
                    yield rows
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    async def envelopes(self, after: int, rows_max: int) -> list[tuple[int, str, bytes]]:
        """Return position, type and envelope of the next rows."""
        return await self._fetch(_ENVELOPES, (after, rows_max))

    async def stream_heads(self, streams: list[str], position: int) -> dict[str, tuple[int, bool]]:
        """Return the version of streams at `position` and whether they had ended; only those that existed."""
        found = await self._fetch(
            _STREAM_HEADS,
            {"streams": streams, "position": position, "terminal": list(TERMINAL_TYPES)},
        )
        return {stream: (version, ended) for stream, version, ended in found}

    async def orphan_payload(self) -> int | None:
        """Return the first position behind the last event that still has a payload: the tail was cut."""
        rows = await self._fetch(_ORPHAN, ())
        return rows[0][0] if rows else None

    async def stream(self, stream: str, rows_max: int) -> list[Row]:
        """Return the first rows of a stream."""
        return await self._fetch(_STREAM, (stream, rows_max))

    async def beside(self, positions: list[int]) -> dict[int, tuple[bytes, bytes]]:
        """Return envelope and hash of the rows before and behind `positions`, and of the first one."""
        wanted = {1, *(position + step for position in positions for step in (-1, 1))}
        return {position: (event, hash_) for position, event, hash_ in await self._fetch(_BESIDE, (list(wanted),))}

    async def decided(self, after: int, until: int, rows_max: int) -> list[tuple[int, str, str, bytes]]:
        """Return position, stream, type and envelope of decisions and joins with `after < position <= until`."""
        return await self._fetch(_DECIDED, {"after": after, "until": until, "rows": rows_max})

    async def _fetch(self, query: str, arguments: Any) -> list[Any]:
        try:
            async with self._conn.cursor(binary=True) as cursor:
                await cursor.execute(query, arguments, prepare=True)
                return await cursor.fetchall()
        except psycopg.OperationalError as error:
            raise Unavailable(f"Postgres: {error}") from error
