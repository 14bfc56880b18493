"""How far the log has come, for whoever waits for it while the database comes and goes."""

import asyncio
from contextlib import suppress

import psycopg

_HEAD = "SELECT max(position) FROM log.events"
_DECIDED = "SELECT count(*) FROM log.events WHERE position > %(head)s AND type = 'TaskSucceeded'"
_UNENDED = """
SELECT count(*) FROM log.events j WHERE j.type = 'JobSubmitted' AND NOT EXISTS (
    SELECT FROM log.events e WHERE e.stream = j.stream AND e.type IN ('JobSucceeded', 'JobFailed', 'JobCancelled'))
"""
_DONE = """
SELECT count(*) FROM log.events j WHERE j.position > %(head)s AND j.type = 'JobSucceeded' AND EXISTS (
    SELECT FROM log.events e WHERE e.stream = j.stream AND e.type = 'JobSubmitted' AND e.position > %(head)s)
"""
_AGAIN_S = 0.1


class Progress:
    """Args: `dsn` of somebody who may read the log."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    async def unended(self) -> int | None:
        """Return how many jobs have no end yet, None while the database is away."""
        with suppress(psycopg.OperationalError):
            return await asyncio.to_thread(self._number, _UNENDED)
        return None

    async def decided(self) -> None:
        """Return when a task has succeeded that had not when this was called."""
        await self._grown(_DECIDED)

    async def job_done(self) -> None:
        """Return when a job has succeeded that was not yet submitted when this was called."""
        await self._grown(_DONE)

    async def _grown(self, query: str) -> None:
        head: int | None = None
        while True:
            with suppress(psycopg.OperationalError):
                if head is None:
                    head = await asyncio.to_thread(self._number, _HEAD)
                if await asyncio.to_thread(self._number, query, head):
                    return
            await asyncio.sleep(_AGAIN_S)

    def _number(self, query: str, head: int = 0) -> int:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            row = connection.execute(query.encode(), {"head": head}).fetchone()
        assert row is not None
        return int(row[0])
