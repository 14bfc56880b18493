"""The tables of reputation: written by a projection of the log, read by a new leader (`reputation`)."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from hive_common.contracts.events import ExecutorRegistered
from hive_common.eventlog.log import LogReader, Stored
from hive_common.eventlog.reader import READ_EVENTS_MAX
from hive_common.judgement.reputation import AgentRecord, ExecutorRecord
from psycopg import AsyncConnection

from hive_scheduler.domain.reputation import Book, Counts
from hive_scheduler.reputation import TYPES, Told, fold, told_of

NAME: Final = "reputation"
PAGE_ROWS: Final = 1_000

_POSITION = "SELECT position FROM scheduler.projections WHERE name = %s"
_EXECUTORS = """
SELECT executor, owner, judged, quarantined, valid, invalid, late, lost FROM scheduler.reputation
 WHERE ns = %s AND executor = ANY(%s) ORDER BY executor
"""
_PAGE = "SELECT executor FROM scheduler.reputation WHERE ns = %s AND executor > %s ORDER BY executor LIMIT %s"
# An executor has `AGENTS_MAX` of them at most.
_AGENTS = """
SELECT executor, agent, in_a_row, valid, invalid, late, lost FROM scheduler.reputation_of_agents
 WHERE ns = %s AND executor = ANY(%s) ORDER BY executor, position
"""
_PUT_EXECUTOR = """
INSERT INTO scheduler.reputation (ns, executor, owner, judged, quarantined, valid, invalid, late, lost)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (ns, executor) DO UPDATE SET
    judged = excluded.judged, quarantined = excluded.quarantined, valid = excluded.valid,
    invalid = excluded.invalid, late = excluded.late, lost = excluded.lost
"""
_PUT_AGENT = """
INSERT INTO scheduler.reputation_of_agents
       (ns, executor, agent, owner, position, in_a_row, valid, invalid, late, lost)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (ns, executor, agent) DO UPDATE SET
    position = excluded.position, in_a_row = excluded.in_a_row, valid = excluded.valid,
    invalid = excluded.invalid, late = excluded.late, lost = excluded.lost
"""
_DROP_EXECUTOR = "DELETE FROM scheduler.reputation WHERE ns = %s AND executor = %s"
_DROP_AGENTS = "DELETE FROM scheduler.reputation_of_agents WHERE ns = %s AND executor = %s"
_DROP_AGENT = f"{_DROP_AGENTS} AND agent = %s"


class PostgresRecords:
    """Reads the tables over a connection (hive_scheduler.reputation.Records)."""

    def __init__(self, conn: AsyncConnection[Any]) -> None:
        self._conn = conn

    async def load(self, ns: str) -> tuple[int, dict[str, Book]]:
        """Return the books of a namespace, and the position that they stand for."""
        books: dict[str, Book] = {}
        async with self._conn.transaction():
            # One snapshot: the leader before this one may still be writing.
            await self._conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            row = await (await self._conn.execute(_POSITION, (NAME,))).fetchone()
            after = ""
            while page := await (await self._conn.execute(_PAGE, (ns, after, PAGE_ROWS))).fetchall():
                after = page[-1][0]
                books |= (await _load(self._conn, ns, [executor for (executor,) in page])).books
        return (0 if row is None else int(row[0])), books


class ReputationProjection:
    """Keeps the tables (hive_common.eventlog.projection.Projection).

    Args:
        reader: of the log: an event of a task says neither its agent nor, mostly, who had the attempt.
    """

    name = NAME
    types: Sequence[str] | None = TYPES

    def __init__(self, reader: LogReader) -> None:
        self._reader = reader

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Write what a batch changes (Projection)."""
        told = await told_of(self._reader, batch)
        for ns in dict.fromkeys(each.ns for each in told):
            await self._apply(conn, ns, [each for each in told if each.ns == ns])

    async def _apply(self, conn: AsyncConnection[Any], ns: str, told: list[Told]) -> None:
        touched = sorted({one.executor for each in told for one in each.observations})
        trusted = [each.trusted for each in told if each.trusted is not None]
        rows = await _load(conn, ns, touched)
        unknown = [executor for executor in touched if executor not in rows.books]
        rows.owners |= dict.fromkeys(unknown, "") | await _owners(self._reader, unknown)
        for each in told:
            if each.trusted is not None:
                rows.changed = {key: at for key, at in rows.changed.items() if key[0] != each.trusted}
            for executor, agent, dropped in fold(rows.books, each):
                rows.changed[executor, agent] = each.position
                if dropped is not None:
                    rows.changed[executor, dropped] = None
        async with conn.pipeline():
            for executor in trusted:
                await conn.execute(_DROP_EXECUTOR, (ns, executor))
                await conn.execute(_DROP_AGENTS, (ns, executor))
            await _write(conn, ns, rows, touched)


class _Rows:
    """Books by executor with their owners, and at which position an agent of one changed; None: it was dropped."""

    def __init__(self) -> None:
        self.books: dict[str, Book] = {}
        self.owners: dict[str, str] = {}
        self.changed: dict[tuple[str, str], int | None] = {}


async def _load(conn: AsyncConnection[Any], ns: str, executors: list[str]) -> _Rows:
    rows = _Rows()
    if not executors:
        return rows
    found = await conn.execute(_EXECUTORS, (ns, executors))
    for executor, owner, judged, quarantined, *counts in await found.fetchall():
        rows.books[executor] = Book(ExecutorRecord(tuple(judged), quarantined), Counts(*counts))
        rows.owners[executor] = owner
    found = await conn.execute(_AGENTS, (ns, executors))
    for executor, agent, *record in await found.fetchall():
        rows.books[executor].agents[agent] = AgentRecord(*record)
    return rows


async def _owners(reader: LogReader, executors: list[str]) -> dict[str, str]:
    """Return whose the executors are, as the log says it with their first event."""
    if not executors:
        return {}
    types = (ExecutorRegistered.__name__,)
    registered = await reader.read(0, READ_EVENTS_MAX, types=types, streams=executors, payloads=False)
    return {stored.stream: stored.owner for stored in registered}


async def _write(conn: AsyncConnection[Any], ns: str, rows: _Rows, executors: list[str]) -> None:
    for executor in executors:
        book = rows.books.get(executor)
        if book is not None:
            record, counts = book.record, msgspec.structs.astuple(book.counts)
            key = (ns, executor, rows.owners[executor])
            await conn.execute(_PUT_EXECUTOR, (*key, [*record.judged], record.quarantined, *counts))
    for (executor, agent), position in rows.changed.items():
        if position is None:
            await conn.execute(_DROP_AGENT, (ns, executor, agent))
            continue
        known = msgspec.structs.astuple(rows.books[executor].agents[agent])
        await conn.execute(_PUT_AGENT, (ns, executor, agent, rows.owners[executor], position, *known))
