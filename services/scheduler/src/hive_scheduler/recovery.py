"""What a new leader knows: open jobs, folded from their events.

The views say which jobs were open at their position, and where in the log the events of those stand; what came
after that position is read whole. The result is the same as that of a replay of the log from its beginning,
which `replay` does and a test compares.
"""

from collections.abc import Iterable
from typing import Any, Final, Protocol

import msgspec
from hive_common.contracts import events
from hive_common.contracts.events import (
    ApprovalDecided,
    ApprovalRequested,
    JobSubmitted,
    TaskExtended,
    TaskRetryScheduled,
)
from hive_common.eventlog.envelope import stored_of
from hive_common.eventlog.log import LogReader, Stored
from hive_common.kernel.errors import CorruptLog
from psycopg import AsyncConnection

from hive_scheduler.domain import job as jobs
from hive_scheduler.domain.job import JobState
from hive_scheduler.submission import Specs

PAGE_EVENTS: Final = 5_000
OPEN_JOBS_PAGE: Final = 500

_POSITION = "SELECT position FROM scheduler.projections WHERE name = 'jobs'"
_OPEN = """
SELECT ns, job_id, submitted_position FROM scheduler.jobs
 WHERE ended_us = 0 AND submitted_position > %s ORDER BY submitted_position LIMIT %s
"""
# Read once, through a cursor: a job of 100,000 tasks has half a million positions, and a query for each page would
# look through all of them. In the order of positions within a job, which is all that folding asks for.
_POSITIONS = """
SELECT position FROM scheduler.job_positions, unnest(positions) AS position
 WHERE (ns, job_id) IN (SELECT * FROM unnest(%s::text[], %s::text[]))
 ORDER BY job_id, first_position, position
"""
# The range says what the list means for the other table, too: without it a plan may read all payloads there are.
_EVENTS = """
SELECT e.position, e.event, e.hash, p.payload
  FROM log.events e LEFT JOIN log.payloads p
       ON p.position = e.position AND p.position BETWEEN %(first)s AND %(last)s
 WHERE e.position = ANY(%(positions)s) ORDER BY e.position
"""


class Fold:
    """Open jobs as the events that were applied left them. A job that ends is dropped.

    Args:
        specs: compiled documents.
        now_us: the time. What was planned lies no further ahead of it than it did when it was written down: a
            clock that stood an hour ahead then, or stands behind now, must not make a pause of a second an hour.
    """

    def __init__(self, specs: Specs, now_us: int) -> None:
        self._specs = specs
        self._now_us = now_us
        self.jobs: dict[str, JobState] = {}

    def apply(self, batch: Iterable[Stored]) -> None:
        """Apply events in order of position.

        Raises:
            UnknownEvent: a type that this code does not know (law 11).
            CorruptLog: an event that does not follow, or whose payload is gone while its job is open.
        """
        for stored in batch:
            kind = events.kind_of(stored.type, stored.schema)
            if kind in ("job", "task", "approval"):
                self._apply(stored)

    def _apply(self, stored: Stored) -> None:
        job = self.jobs.get(stored.correlation)
        if job is None and stored.type != "JobSubmitted":
            return  # of a job that has ended: a late report
        if stored.payload is None:
            raise CorruptLog(
                f"position {stored.position}: the payload of {stored.type} is gone while its job is open",
                position=stored.position,
            )
        event = events.decode(stored.type, stored.schema, stored.payload)
        if job is None:
            assert isinstance(event, JobSubmitted)
            spec = self._specs.parse(bytes(event.document))
            job = self.jobs[stored.stream] = JobState(stored.stream, stored.owner, event, spec)
            job.deadline_us = self._due(stored, event.deadline_us)
            return
        if isinstance(event, TaskRetryScheduled | TaskExtended):
            event = msgspec.structs.replace(event, not_before_us=self._due(stored, event.not_before_us))
        jobs.evolve(job, stored.stream, event)
        if isinstance(event, ApprovalRequested):
            job.approvals[stored.stream].expires_us = self._due(stored, event.expires_us)
        elif isinstance(event, ApprovalDecided):
            job.approvals[stored.stream].until_us = self._due(stored, event.until_us)
        if job.end is not None:
            del self.jobs[job.id]

    def _due(self, stored: Stored, planned_us: int) -> int:
        return min(planned_us, self._now_us + planned_us - stored.ts_us)


class OpenJobs(Protocol):
    """Port to what the views know of open jobs."""

    async def load(self, fold: Fold) -> int:
        """Give `fold` the events of every job that was open at a position of the log, and return that position."""
        ...


async def recover(known: OpenJobs, reader: LogReader, specs: Specs, now_us: int) -> tuple[Fold, int]:
    """Return the open jobs, and the position up to which they are known.

    Args:
        known: what the views know of them.
        reader: of the log.
        specs: compiled documents.
        now_us: the time.
    """
    fold = Fold(specs, now_us)
    return fold, await _read_tail(reader, fold, await known.load(fold))


async def replay(reader: LogReader, specs: Specs, now_us: int) -> tuple[Fold, int]:
    """Return the open jobs by reading the whole log."""
    fold = Fold(specs, now_us)
    return fold, await _read_tail(reader, fold, 0)


async def _read_tail(reader: LogReader, fold: Fold, position: int) -> int:
    while batch := await reader.read(position, PAGE_EVENTS):
        fold.apply(batch)
        position = batch[-1].position
    return position


class PostgresOpenJobs:
    """Reads the views over a connection."""

    def __init__(self, conn: AsyncConnection[Any]) -> None:
        self._conn = conn

    async def load(self, fold: Fold) -> int:
        """Give `fold` the events of open jobs, and return the position of the views."""
        async with self._conn.transaction():
            # One snapshot: the leader before this one may still be writing its views.
            await self._conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            row = await (await self._conn.execute(_POSITION)).fetchone()
            await _load_open(self._conn, fold)
        return 0 if row is None else int(row[0])


async def _load_open(conn: AsyncConnection[Any], fold: Fold) -> None:
    after = 0
    while True:
        page = await (await conn.execute(_OPEN, (after, OPEN_JOBS_PAGE))).fetchall()
        if not page:
            return
        after = page[-1][2]
        await _load_events(conn, fold, [ns for ns, _, _ in page], [job_id for _, job_id, _ in page])


async def _load_events(conn: AsyncConnection[Any], fold: Fold, namespaces: list[str], job_ids: list[str]) -> None:
    async with conn.cursor("positions", binary=True) as positions:
        await positions.execute(_POSITIONS, (namespaces, job_ids))
        while page := await positions.fetchmany(PAGE_EVENTS):
            async with conn.cursor(binary=True) as cursor:
                wanted = [position for (position,) in page]
                bounds = {"first": min(wanted), "last": max(wanted)}
                await cursor.execute(_EVENTS, {"positions": wanted, **bounds})
                fold.apply([stored_of(*row) for row in await cursor.fetchall()])
