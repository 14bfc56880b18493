"""Readers of the log: by range, by type, by stream, and following the head.

Positions are given under the log's lock in commit order, so a reader that asks for what comes after a
position never misses one.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection, sql

from hive_common.eventlog.connection import Connect, connector, is_lost
from hive_common.eventlog.envelope import Stored, stored_of
from hive_common.eventlog.genesis import read_log_id
from hive_common.kernel.errors import InvalidArgument, Unavailable

READ_EVENTS_MAX = 10_000
"""Bounds the memory of one read."""
BACKOFF_S = 0.5
FREQUENT_PREFIXES = ("Task", "Attempt")
"""Types outside these are in the index `events_rare`; the words MUST match the migration."""

_HEAD = "SELECT coalesce(max(position), 0) FROM log.events"
_VERSIONS = (
    "SELECT wanted.stream, coalesce((SELECT max(e.version) FROM log.events e WHERE e.stream = wanted.stream), 0)"
    " FROM unnest(%s::text[]) AS wanted (stream)"
)


class Scan(NamedTuple):
    """Events that were wanted, and the position up to which there are no others."""

    events: list[Stored]
    through: int


class LogReader:
    """Reads the log over one connection, which is opened when first needed and again after it was lost.

    Args:
        source: a connection string or a factory of autocommit connections; SELECT on `log` is enough.
    """

    def __init__(self, source: str | Connect) -> None:
        self._connect = connector(source)
        self._conn: AsyncConnection[Any] | None = None
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> "LogReader":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        if self._conn is not None:
            await self._conn.close()

    async def log_id(self) -> str:
        """Return the log's id. Raises `Unavailable`, or `FailedPrecondition` for a log without genesis."""
        conn = await self._connection()
        try:
            return await read_log_id(conn)
        except Unavailable:
            # A connection found dead is replaced once, as for any other read.
            await conn.close()
            return await read_log_id(await self._connection())

    async def head(self) -> int:
        """Return the position of the last event, 0 for an empty log. Raises `Unavailable`."""
        rows = await self._fetch(sql.SQL(_HEAD), {})
        head: int = rows[0][0]
        return head

    async def versions(self, streams: Sequence[str]) -> dict[str, int]:
        """Return the version at which each of `streams` stands, 0 for one that is not there."""
        return dict(await self._fetch(sql.SQL(_VERSIONS), (list(streams),)))

    async def read(
        self,
        after: int,
        limit: int = 1000,
        *,
        types: Sequence[str] | None = None,
        known: Sequence[str] | None = None,
        streams: Sequence[str] | None = None,
        until: int | None = None,
        payloads: bool = True,
    ) -> list[Stored]:
        """Return up to `limit` events with `position > after`, in order of position.

        Args:
            after: 0 for the beginning.
            limit: 1 to `READ_EVENTS_MAX`.
            types: only these.
            known: with `types`: what is outside of this catalogue comes too, so that it can stop its reader
                (law 11); where no type of a task or attempt is wanted, unknown ones of that name are left out.
            streams: only of these.
            until: no position beyond this one.
            payloads: False leaves them out (`payload` is None).

        Raises:
            InvalidArgument: `limit` is out of range.
            Unavailable: the database cannot be reached.
            CorruptLog: a row contradicts itself.
        """
        if not 0 < limit <= READ_EVENTS_MAX:
            raise InvalidArgument(f"limit {limit}: expected 1 to {READ_EVENTS_MAX}")
        rare = types is not None and not any(name.startswith(FREQUENT_PREFIXES) for name in types)
        query = _read_query(
            types is not None, known is not None, rare, streams is not None, until is not None, payloads
        )
        parameters = {
            "after": after,
            "limit": limit,
            "types": None if types is None else list(types),
            "known": None if known is None else list(known),
            "streams": None if streams is None else list(streams),
            "until": until,
        }
        rows = await self._fetch(query, parameters)
        return [stored_of(position, event, hash_, payload) for position, event, hash_, payload in rows]

    async def scan(
        self,
        after: int,
        limit: int = 1000,
        *,
        types: Sequence[str] | None = None,
        known: Sequence[str] | None = None,
        payloads: bool = True,
    ) -> Scan:
        """Read like `read`, and say up to where the log was looked through, which may be past the last event."""
        # The head has to be known before: what commits in between is not looked at.
        head = None if types is None else await self.head()
        events = await self.read(after, limit, types=types, known=known, until=head, payloads=payloads)
        if len(events) == limit or head is None:
            return Scan(events, events[-1].position if events else after)
        return Scan(events, max(head, after))

    async def follow(
        self,
        after: int,
        *,
        wake: asyncio.Event | None = None,
        types: Sequence[str] | None = None,
        limit: int = 1000,
        poll_s: float = 1.0,
    ) -> AsyncIterator[list[Stored]]:
        """Yield batches of what comes after `after`, for ever, also across lost connections.

        Args:
            after: 0 for the beginning.
            wake: set by whoever hears of a new head; cleared here, so each follower needs its own.
            types: only these.
            limit: of one batch.
            poll_s: how often to look without being woken.
        """
        async for scan in self.scans(after, wake=wake, types=types, limit=limit, poll_s=poll_s):
            if scan.events:
                yield scan.events

    async def scans(
        self,
        after: int,
        *,
        wake: asyncio.Event | None = None,
        types: Sequence[str] | None = None,
        known: Sequence[str] | None = None,
        limit: int = 1000,
        poll_s: float = 1.0,
    ) -> AsyncIterator[Scan]:
        """Like `follow`, and also yields scans that found nothing but got further."""

        async def scan(after: int) -> Scan:
            return await self.scan(after, limit, types=types, known=known)

        async for found in scans_of(scan, after, wake=wake, limit=limit, poll_s=poll_s):
            yield found

    async def _connection(self) -> AsyncConnection[Any]:
        async with self._opening:
            if self._conn is None or self._conn.closed:
                try:
                    self._conn = await self._connect()
                except psycopg.OperationalError as error:
                    raise Unavailable(f"the log's database cannot be reached: {error}") from error
            return self._conn

    async def _fetch(self, query: sql.SQL | sql.Composed, parameters: Any) -> list[tuple[Any, ...]]:
        """Fetch all rows; a connection found dead is replaced once."""
        for last_try in (False, True):
            conn = await self._connection()
            try:
                async with conn.cursor(binary=True) as cursor:
                    await cursor.execute(query, parameters)
                    return await cursor.fetchall()
            except psycopg.Error as error:
                if not is_lost(conn, error):
                    raise
                await conn.close()
                if last_try:
                    raise Unavailable(f"the log's database went away: {error}") from error
        raise AssertionError("unreachable")


async def scans_of(
    scan: Callable[[int], Awaitable[Scan]],
    after: int,
    *,
    wake: asyncio.Event | None,
    limit: int,
    poll_s: float,
) -> AsyncIterator[Scan]:
    """Yield what `scan` finds after a position, and after that again, for ever (LogReader.scans).

    Args:
        scan: returns at least `limit` events where there may be more already. Raises `Unavailable`.
        after: 0 for the beginning.
        wake: set by whoever hears of a new head.
        limit: from so many events on the next scan follows at once.
        poll_s: how often to look without being woken.
    """
    while True:
        if wake is not None:
            wake.clear()
        try:
            found = await scan(after)
        except Unavailable:
            await asyncio.sleep(BACKOFF_S)
            continue
        if found.through > after:
            after = found.through
            yield found
        if len(found.events) < limit:
            await woken(wake, poll_s)


async def woken(wake: asyncio.Event | None, poll_s: float) -> None:
    """Return when `wake` is set, and after `poll_s` at the latest: a hint that the log has grown may be lost."""
    if wake is None:
        await asyncio.sleep(poll_s)
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(poll_s):
            await wake.wait()


@functools.cache
def _read_query(types: bool, known: bool, rare: bool, streams: bool, until: bool, payloads: bool) -> sql.Composed:
    parts = [
        sql.SQL("SELECT e.position, e.event, e.hash,"),
        sql.SQL("p.payload FROM log.events e LEFT JOIN log.payloads p ON p.position = e.position")
        if payloads
        else sql.SQL("NULL::bytea FROM log.events e"),
    ]
    if payloads:
        # Both sides have the range: a plan that merges them would else read every payload before it.
        parts.append(sql.SQL("AND p.position > %(after)s"))
    parts.append(sql.SQL("WHERE e.position > %(after)s"))
    if until:
        parts.append(sql.SQL("AND e.position <= %(until)s"))
    if types and known:
        parts.append(sql.SQL("AND (e.type = ANY(%(types)s) OR e.type <> ALL(%(known)s))"))
    elif types:
        parts.append(sql.SQL("AND e.type = ANY(%(types)s)"))
    if rare:
        # Said in words of the index, or the planner could not know that it holds all of them.
        parts.append(sql.SQL("AND e.type NOT LIKE 'Task%%' AND e.type NOT LIKE 'Attempt%%'"))
    if streams:
        parts.append(sql.SQL("AND e.stream = ANY(%(streams)s)"))
    parts.append(sql.SQL("ORDER BY e.position LIMIT %(limit)s"))
    return sql.SQL(" ").join(parts)
