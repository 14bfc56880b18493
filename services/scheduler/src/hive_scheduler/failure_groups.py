"""Reads of failures, in groups of what failed in the same way. Every query is bounded by a key or a LIMIT."""

import asyncio
from importlib.resources import files
from typing import Any, Final

from hive_common.contracts import events
from hive_common.contracts.events import AttemptFailed, AttemptLost, TaskFailed
from hive_common.eventlog.log import LogReader
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.errors import Conflict, NotFound
from hive_common.ops.database import Database

from hive_scheduler.failures import BATCH_EVENTS, FailuresProjection

SCHEMA: Final = "scheduler"
FAILURES_MAX: Final = 100_000
"""Failures that are looked at for one answer: the newest."""
MESSAGE_CHARACTERS_MAX: Final = 2_000
_SOME: Final = 8
"""Names that stand in a group for all."""

_GROUPS: Final = """
WITH recent AS (
    SELECT * FROM scheduler.failures
     WHERE ns = %s AND at_us >= %s AND (%s = '' OR agent = %s OR split_part(agent, '@', 1) = %s)
       AND (%s = '' OR fingerprint = %s)
     ORDER BY at_us DESC LIMIT %s
), grouped AS (
    SELECT f.ns, f.fingerprint, count(*) AS failures, count(DISTINCT f.job_id) AS jobs,
           (array_agg(DISTINCT f.agent))[1:%s] AS agents,
           (array_agg(DISTINCT f.executor) FILTER (WHERE f.executor <> ''))[1:%s] AS executors,
           count(DISTINCT f.executor) FILTER (WHERE f.executor <> '') AS executor_count,
           min(f.at_us) AS first_us, max(f.at_us) AS last_us, sum(f.wall_ms)::bigint AS wall_ms,
           coalesce(sum(c.calls), 0)::bigint AS calls, coalesce(sum(c.tokens), 0)::bigint AS tokens,
           coalesce(sum(c.nano_usd), 0)::bigint AS nano_usd
      FROM recent f LEFT JOIN LATERAL (
           SELECT sum(calls) AS calls, sum(tokens) AS tokens, sum(nano_usd) AS nano_usd
             FROM scheduler.attempt_calls
            WHERE ns = f.ns AND task_id = f.task_id AND attempt = ANY (f.attempts)
           ) c ON true
     GROUP BY f.ns, f.fingerprint
)
SELECT g.fingerprint, k.agent, k.code, k.message, g.failures, g.jobs, g.agents, g.executors, g.executor_count,
       g.first_us, g.last_us, g.wall_ms, g.calls, g.tokens, g.nano_usd
  FROM grouped g JOIN scheduler.failure_kinds k ON k.ns = g.ns AND k.fingerprint = g.fingerprint
 ORDER BY g.failures DESC, g.last_us DESC, g.fingerprint LIMIT %s
"""
_COUNT: Final = (
    "SELECT count(*) FROM (SELECT FROM scheduler.failures WHERE ns = %s AND at_us >= %s"
    " AND (%s = '' OR agent = %s OR split_part(agent, '@', 1) = %s) LIMIT %s) AS counted"
)
_NAMED: Final = (
    "SELECT fingerprint FROM scheduler.failure_kinds"
    " WHERE ns = %s AND fingerprint >= %s AND fingerprint < %s LIMIT 2"
)
_EXAMPLES: Final = """
SELECT f.job_id, f.task_id, f.step, f.attempt, f.agent, f.executor, e.type, p.payload, f.input_digest, f.at_us,
       f.position, f.wall_ms
  FROM (SELECT * FROM scheduler.failures WHERE ns = %s AND fingerprint = %s AND at_us >= %s
         ORDER BY position DESC LIMIT %s) AS f
  JOIN log.events e ON e.position = f.position LEFT JOIN log.payloads p ON p.position = f.position
 ORDER BY f.position DESC
"""
_HEAD: Final = "SELECT coalesce(max(position), 0) FROM log.events"

Row = tuple[Any, ...]


class Failures:
    """The projection of failures, and reads of it over connections of its own.

    Args:
        dsn: of the scheduler's role.
        ns: the namespace.
    """

    def __init__(self, dsn: str, ns: str) -> None:
        self._ns = ns
        self._database = Database(dsn, SCHEMA, connections_max=2)
        self._reader = LogReader(dsn)
        self._wake = asyncio.Event()
        self.runner = ProjectionRunner(
            dsn, self._reader, FailuresProjection(), SCHEMA, wake=self._wake, batch_events=BATCH_EVENTS
        )

    async def open(self) -> None:
        """Connect. Raises `Unavailable`."""
        await self._database.open(files("hive_scheduler") / "migrations")

    async def close(self) -> None:
        """Close the connections; the runner has to have ended."""
        await self._database.close()
        await self._reader.close()

    async def caught_up(self) -> int:
        """Wait until all that the log has now is counted, and return the position. Raises `Unavailable`."""
        ((head,),) = await self._database.fetch(_HEAD)
        self._wake.set()
        await self.runner.wait_for(head)
        return self.runner.position

    async def groups(self, since_us: int, agent: str, limit: int) -> tuple[list[Row], bool]:
        """Return groups, those with most failures first, and whether there are more than were looked at."""
        rows = await self._groups(since_us, agent, "", limit)
        ((counted,),) = await self._database.fetch(
            _COUNT, (self._ns, since_us, agent, agent, agent, FAILURES_MAX + 1)
        )
        return rows, counted > FAILURES_MAX

    async def group(self, prefix: str, since_us: int, examples: int) -> tuple[Row, list[Row]]:
        """Return one group by the first characters of its fingerprint, and its newest examples.

        Raises:
            NotFound: nothing has failed in this way, or not since then.
            Conflict: several fingerprints begin like this.
        """
        # Fingerprints are of hexadecimal digits, and `g` comes behind them all.
        found = await self._database.fetch(_NAMED, (self._ns, prefix, prefix + "g"))
        if len(found) > 1:
            raise Conflict(f"several fingerprints begin with {prefix}; expected more of it", fingerprint=prefix)
        rows = await self._groups(since_us, "", found[0][0], 1) if found else []
        if not rows:
            raise NotFound(f"no failure has the fingerprint {prefix}, or none of that time", fingerprint=prefix)
        shown = await self._database.fetch(_EXAMPLES, (self._ns, found[0][0], since_us, examples))
        return rows[0], shown

    async def _groups(self, since_us: int, agent: str, fingerprint: str, limit: int) -> list[Row]:
        by = (agent, agent, agent, fingerprint, fingerprint)
        return await self._database.fetch(_GROUPS, (self._ns, since_us, *by, FAILURES_MAX, _SOME, _SOME, limit))


def message_of(type_: str, payload: bytes | None) -> str:
    """Return what was reported with a failure, cut; empty where it was erased."""
    if payload is None:
        return ""
    match events.decode(type_, events.SCHEMA, payload):
        case AttemptFailed() as failed:
            return failed.message[:MESSAGE_CHARACTERS_MAX]
        case TaskFailed() as failed:
            return failed.message[:MESSAGE_CHARACTERS_MAX]
        case AttemptLost() as lost:
            return lost.reason
    return ""
