"""Reads of the views of one namespace, for the gRPC API. Every query is bounded by a key or a LIMIT."""

from typing import Any, Final, NamedTuple

import psycopg
from hive_common.contracts import events
from hive_common.contracts.values import Value
from hive_common.eventlog.envelope import stored_of
from hive_common.eventlog.log import Stored
from hive_common.kernel.errors import NotFound, Unavailable
from psycopg.rows import TupleRow, dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from hive_scheduler.domain.task import STATUSES

PAGE_EVENTS: Final = 1_000
TIMEOUT_S: Final = 10.0

_JOB: Final = "SELECT * FROM scheduler.jobs WHERE ns = %(ns)s AND job_id = %(job)s"
_JOBS: Final = """
SELECT * FROM scheduler.jobs
 WHERE ns = %(ns)s AND submitted_position < %(before)s AND (%(state)s = '' OR state = %(state)s)
   AND (%(all)s OR canary = '')
 ORDER BY submitted_position DESC LIMIT %(limit)s
"""
_JOBS_OF: Final = """
SELECT * FROM scheduler.jobs
 WHERE ns = %(ns)s AND caller = %(caller)s AND submitted_position < %(before)s
   AND (%(state)s = '' OR state = %(state)s)
 ORDER BY submitted_position DESC LIMIT %(limit)s
"""
_STEPS: Final = """
SELECT * FROM scheduler.steps
 WHERE ns = %(ns)s AND job_id = ANY(%(jobs)s) ORDER BY first_position LIMIT 1000000
"""
_TASK: Final = "SELECT * FROM scheduler.tasks WHERE ns = %(ns)s AND task_id = %(task)s"
_TASKS: Final = """
SELECT * FROM scheduler.tasks
 WHERE ns = %(ns)s AND job_id = %(job)s AND created_position > %(after)s AND (%(state)s = '' OR state = %(state)s)
   AND (NOT %(reported)s OR report_positions <> '{}')
 ORDER BY created_position LIMIT %(limit)s
"""
_PAYLOADS: Final = """
SELECT e.position, e.type, p.payload FROM log.events e LEFT JOIN log.payloads p
       ON p.position = e.position AND p.position BETWEEN %(first)s AND %(last)s
 WHERE e.position = ANY(%(positions)s)
"""
_HISTORY: Final = """
SELECT e.position, e.event, e.hash, p.payload
  FROM (SELECT position FROM scheduler.job_positions, unnest(positions) AS position
         WHERE ns = %(ns)s AND job_id = %(job)s AND position > %(after)s
           -- Rows follow one another: the one that `after` stands in is the first that has any beyond it.
           AND first_position >= coalesce((
               SELECT max(first_position) FROM scheduler.job_positions
                WHERE ns = %(ns)s AND job_id = %(job)s AND first_position <= %(after)s), 0)
         ORDER BY first_position, position LIMIT %(limit)s) AS wanted
  JOIN log.events e ON e.position = wanted.position
  LEFT JOIN log.payloads p ON p.position = wanted.position
 ORDER BY e.position
"""

Row = dict[str, Any]


class AttemptLog(NamedTuple):
    """The log of one attempt, as it was reported."""

    task: Row
    attempt: int
    log: Value


class Queries:
    """Reads views and what they point to in the log, over a few connections.

    Args:
        dsn: of the scheduler's role.
        ns: the namespace.
    """

    def __init__(self, dsn: str, ns: str) -> None:
        self._ns = ns
        self._pool = AsyncConnectionPool(
            dsn,
            min_size=1,
            max_size=4,
            open=False,
            timeout=TIMEOUT_S,
            kwargs={"autocommit": True},
            check=AsyncConnectionPool.check_connection,
            name="views",
        )

    async def open(self) -> None:
        """Connect, in the background where that takes time."""
        await self._pool.open()

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()

    async def job(self, job_id: str) -> Row:
        """Return a job's row. Raises `NotFound`."""
        rows = await self._dicts(_JOB, {"job": job_id})
        if not rows:
            raise NotFound(f"there is no job {job_id[:80]}", job=job_id[:80])
        return rows[0]

    async def jobs(self, after: str, state: str, limit: int, caller: str = "", all: bool = False) -> list[Row]:
        """Return rows of jobs, newest first: those older than `after`, and, if `caller` is given, of that one.

        Canaries are among them if `all` is.
        """
        before = 2**63 - 1
        if after:
            found = await self._dicts(_JOB, {"job": after})
            if not found or caller not in ("", found[0]["caller"]):
                raise NotFound(f"after: there is no job {after[:80]}", job=after[:80])
            before = found[0]["submitted_position"]
        parameters = {"before": before, "state": state, "limit": limit, "caller": caller, "all": all}
        return await self._dicts(_JOBS_OF if caller else _JOBS, parameters)

    async def steps(self, jobs: list[str]) -> dict[str, list[Row]]:
        """Return the rows of steps by job, in the order in which they began."""
        found: dict[str, list[Row]] = {job: [] for job in jobs}
        for row in await self._dicts(_STEPS, {"jobs": jobs}):
            found[row["job_id"]].append(row)
        return found

    async def task(self, task_id: str) -> Row:
        """Return a task's row. Raises `NotFound`."""
        rows = await self._dicts(_TASK, {"task": task_id})
        if not rows:
            raise NotFound(f"there is no task {task_id[:80]}", task=task_id[:80])
        return rows[0]

    async def tasks(self, job_id: str, after: str, state: str, limit: int, reported: bool = False) -> list[Row]:
        """Return rows of a job's tasks in order of creation, those after the task `after`."""
        position = 0 if not after else (await self.task(after))["created_position"]
        parameters = {"job": job_id, "after": position, "state": state, "limit": limit, "reported": reported}
        return await self._dicts(_TASKS, parameters)

    async def outputs(self, positions: list[int]) -> dict[int, Value]:
        """Return the outputs that stand at positions of `AttemptSucceeded` and `JobSucceeded`."""
        found: dict[int, Value] = {}
        for position, event in await self._events(positions):
            if isinstance(event, events.AttemptSucceeded | events.JobSucceeded):
                found[position] = event.output
        return found

    async def logs(self, rows: list[Row], limit: int) -> list[AttemptLog]:
        """Return the logs of the attempts of tasks."""
        by_position = {position: row for row in rows for position in row["report_positions"]}
        found: list[AttemptLog] = []
        for position, event in await self._events(sorted(by_position)[:limit]):
            if isinstance(event, events.AttemptSucceeded | events.AttemptFailed) and event.log is not None:
                found.append(AttemptLog(by_position[position], event.attempt, event.log))
        return found

    async def history(self, job_id: str, after: int, limit: int = PAGE_EVENTS) -> list[Stored]:
        """Return events of a job and its tasks after a position, in order."""
        parameters = {"job": job_id, "after": after, "limit": limit}
        return [stored_of(*row) for row in await self._tuples(_HISTORY, parameters)]

    async def _events(self, positions: list[int]) -> list[tuple[int, events.Event]]:
        if not positions:
            return []
        bounds = {"first": min(positions), "last": max(positions)}
        rows = await self._tuples(_PAYLOADS, {"positions": positions, **bounds})
        return [
            (position, events.decode(type_name, events.SCHEMA, payload))
            for position, type_name, payload in sorted(rows, key=lambda row: row[0])
            if payload is not None
        ]

    async def _dicts(self, query: str, parameters: Row) -> list[Row]:
        try:
            async with self._pool.connection() as conn, conn.cursor(row_factory=dict_row) as cursor:
                await cursor.execute(query, {"ns": self._ns, **parameters})
                return await cursor.fetchall()
        except (psycopg.OperationalError, PoolTimeout) as error:
            raise Unavailable(f"the views cannot be read: {error}") from error

    async def _tuples(self, query: str, parameters: Row) -> list[TupleRow]:
        try:
            async with self._pool.connection() as conn, conn.cursor(binary=True) as cursor:
                await cursor.execute(query, {"ns": self._ns, **parameters})
                return await cursor.fetchall()
        except (psycopg.OperationalError, PoolTimeout) as error:
            raise Unavailable(f"the views cannot be read: {error}") from error


def counts_of(row: Row) -> dict[str, int]:
    """Return the counts of a step's row, by state."""
    return {name: row[name] for name in STATUSES}
