"""The log for the views: what this process has just committed comes from memory, the rest is read.

Whatever is missing in memory is read: what others wrote in between, what was committed before this process led,
and what was dropped because the views fell behind.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Final

from hive_common.eventlog.log import LogReader, Scan, Stored
from hive_common.eventlog.reader import BACKOFF_S, woken
from hive_common.kernel.errors import Unavailable

from hive_scheduler.commits import Committed

EVENTS_MAX: Final = 50_000
BYTES_MAX: Final = 32 * 1024 * 1024
"""Events and payload bytes that wait here; older ones are dropped and read from the log."""


class Feed:
    """A source for one `ProjectionRunner` that wants every type (hive_common.eventlog.projection.Source).

    Events from memory have no envelope bytes and no hash: those are in the log alone.

    Args:
        reader: of the log.
    """

    def __init__(self, reader: LogReader) -> None:
        self._reader = reader
        self._waiting: deque[Committed] = deque()
        self._bytes = 0

    def put(self, batch: list[Committed]) -> None:
        """Take what was committed, in order of position."""
        self._waiting += batch
        self._bytes += sum(len(committed.event.payload) for committed in batch)
        while len(self._waiting) > EVENTS_MAX or self._bytes > BYTES_MAX:
            self._pop()

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
        """Yield what comes after `after`, for ever. `types` and `known` have to be None."""
        assert types is None and known is None, "a filter would have to be one of memory as well"
        while True:
            if wake is not None:
                wake.clear()
            while self._waiting and self._waiting[0].position <= after:
                self._pop()
            from_memory = bool(self._waiting) and self._waiting[0].position == after + 1
            if from_memory:
                batch = self._take(limit)
            else:
                try:
                    batch = await self._read(after, limit)
                except Unavailable:
                    await asyncio.sleep(BACKOFF_S)
                    continue
            if batch:
                after = batch[-1].position
                yield Scan(batch, after)
            if len(batch) < limit and not (batch and self._follows(after, from_memory)):
                await woken(wake, poll_s)

    def _follows(self, after: int, from_memory: bool) -> bool:
        """Whether a batch ended only because what comes next lies elsewhere: in the log, or in memory.

        What memory has got meanwhile is no reason: it waits for the next wake-up, so that it gathers.
        """
        if not self._waiting:
            return False
        return self._waiting[0].position != after + 1 if from_memory else self._waiting[0].position == after + 1

    def _take(self, limit: int) -> list[Stored]:
        batch: list[Stored] = []
        position = self._waiting[0].position
        while self._waiting and len(batch) < limit and self._waiting[0].position == position:
            committed = self._pop()
            batch.append(_stored_of(committed))
            position += 1
        return batch

    async def _read(self, after: int, limit: int) -> list[Stored]:
        until = self._waiting[0].position - 1 if self._waiting else None
        return await self._reader.read(after, limit, until=until)

    def _pop(self) -> Committed:
        committed = self._waiting.popleft()
        self._bytes -= len(committed.event.payload)
        return committed


def _stored_of(committed: Committed) -> Stored:
    event = committed.event
    return Stored(
        committed.position,
        event.stream,
        event.version,
        event.type,
        event.schema,
        event.ts_us,
        event.actor,
        event.owner,
        event.ns,
        event.subject,
        event.correlation,
        event.causation,
        event.payload,
        b"",
        b"",
    )
