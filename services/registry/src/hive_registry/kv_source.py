"""The part of the log that kept values are made of."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from hive_common.eventlog.log import LogReader, Scan
from hive_common.eventlog.reader import READ_EVENTS_MAX, scans_of

from hive_registry.kv_views import ENDS, staged_of

STAGED = ("KvStaged",)


class KvSource:
    """A source for the runner of `KvProjection` (hive_common.eventlog.projection.Source).

    It reads what was staged, and of the tasks that staged something how they ended. Nearly none does, and to read
    the end of every task would take as much CPU as all else that a registry does while tasks run.

    Args:
        reader: of the log.
        staged: returns the tasks with something staged at the position up to which the projection was applied,
            which the runner moves before it asks for the next scan.
    """

    def __init__(self, reader: LogReader, staged: Callable[[], Awaitable[list[str]]]) -> None:
        self._reader = reader
        self._staged = staged

    async def head(self) -> int:
        """Return the position of the log's last event. Raises `Unavailable`."""
        return await self._reader.head()

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
        """Yield what comes after `after`, for ever. `types` are the projection's.

        Of types that are not `known` those come that are none of a task, and those of a task that staged something.
        """

        async def scan(after: int) -> Scan:
            return await self._scan(after, known, limit)

        async for found in scans_of(scan, after, wake=wake, limit=limit, poll_s=poll_s):
            yield found

    async def _scan(self, after: int, known: Sequence[str] | None, limit: int) -> Scan:
        written = await self._reader.scan(after, limit, types=STAGED, known=known)
        events, through = written.events, written.through
        tasks = {*await self._staged(), *(staged_of(one).task for one in events if one.type in STAGED)} - {""}
        if not tasks:
            return written
        ends = await self._reader.read(
            after, READ_EVENTS_MAX, types=ENDS, known=known, streams=sorted(tasks), until=through
        )
        if len(ends) == READ_EVENTS_MAX:
            through = ends[-1].position
            events = [one for one in events if one.position <= through]
        return Scan(sorted([*events, *ends], key=lambda one: one.position), through)
