"""Group commit of decisions: state moves when something is decided, effects wait until it is in the log.

Decisions are staged in the order in which they were made and committed in that order, one append after the
other. The first append that fails ends everything: what was decided on top of it must never be written, and
what this process believes is then no longer what the log says.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from hive_common.eventlog.log import EVENTS_PER_CALL_MAX, Append, LogWriter, NewEvent
from hive_common.kernel.errors import Unavailable

from hive_scheduler.metrics import APPEND_SECONDS, EVENTS

APPEND_BYTES_MAX: Final = 8 * 1024 * 1024
"""Payload bytes in one append: keeps the log's lock short when inputs are large."""

Effect = Callable[[int], None]
"""Called with the position of the last event it waited for, 0 where it waited for none."""


class Committed(NamedTuple):
    """One event as it stands in the log now."""

    position: int
    event: NewEvent


class _Group(NamedTuple):
    events: tuple[NewEvent, ...]
    guard: tuple[str, int]
    effect: Effect | None


class _Batch:
    def __init__(self) -> None:
        self.groups: list[_Group] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Committer:
    """Writes what the leader decides.

    Args:
        writer: on the connection that holds the leader's lock.
        on_cut: called right before a batch is cut: what is decided afterwards comes with the next one.
        on_committed: gets every event once it is committed, in order.
    """

    def __init__(
        self,
        writer: LogWriter,
        on_cut: Callable[[], None],
        on_committed: Callable[[list[Committed]], None],
    ) -> None:
        self._writer = writer
        self._on_cut = on_cut
        self._on_committed = on_committed
        self._open = _Batch()
        self._flying: _Batch | None = None
        self._work = asyncio.Event()
        self.failed = False
        self.position = 0

    def stage(self, events: Sequence[NewEvent], guard: tuple[str, int], effect: Effect | None = None) -> None:
        """Put a decision into the next append.

        Args:
            events: belong together; they are never split.
            guard: a job's stream and the version at which it stood when this was decided.
            effect: called when the events are committed.
        """
        self._open.groups.append(_Group(tuple(events), guard, effect))
        self._work.set()

    def after(self, effect: Effect) -> None:
        """Call `effect` once everything that is staged by now is committed; at once when nothing is."""
        if self._open.groups:
            self._open.groups.append(_Group((), ("", 0), effect))
        elif self._flying is not None:
            self._open.groups.append(_Group((), ("", 0), effect))
            self._work.set()
        else:
            effect(0)

    async def settled(self) -> None:
        """Return once everything that is staged by now is committed.

        Raises:
            Unavailable: it was not, and this process leads no more.
        """
        if self.failed:
            raise _lost()
        batch = self._open if self._open.groups else self._flying
        if batch is not None:
            await asyncio.shield(batch.done)

    async def run(self) -> None:
        """Commit until cancelled. Raises whatever an append raises: the leader has to end then."""
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                while self._open.groups:
                    self._on_cut()
                    self._flying, self._open = self._open, _Batch()
                    await self._commit(self._flying)
                    self._flying = None
        finally:
            self.failed = True
            for batch in (self._flying, self._open):
                if batch is not None and not batch.done.done():
                    batch.done.set_exception(_lost())
                    batch.done.exception()  # nobody may have been waiting

    async def _commit(self, batch: _Batch) -> None:
        chunk: list[_Group] = []
        event_count = byte_count = 0
        for group in batch.groups:
            size = sum(len(event.payload) for event in group.events)
            full = event_count + len(group.events) > EVENTS_PER_CALL_MAX or byte_count + size > APPEND_BYTES_MAX
            if chunk and full:
                await self._append(chunk)
                chunk, event_count, byte_count = [], 0, 0
            chunk.append(group)
            event_count += len(group.events)
            byte_count += size
        await self._append(chunk)
        batch.done.set_result(None)

    async def _append(self, chunk: list[_Group]) -> None:
        events = tuple(event for group in chunk for event in group.events)
        if events:
            expect: dict[str, int] = {}
            for group in chunk:
                if group.events:
                    expect.setdefault(*group.guard)
            start = time.perf_counter()
            last = await self._writer.append(Append(events, expect))
            APPEND_SECONDS.observe(time.perf_counter() - start)
            EVENTS.inc(len(events))
            first = last - len(events) + 1
            self.position = last
            self._on_committed([Committed(first + offset, event) for offset, event in enumerate(events)])
        else:
            first = self.position + 1
        position = first - 1
        for group in chunk:
            position += len(group.events)
            if group.effect is not None:
                group.effect(position if group.events else 0)


def _lost() -> Unavailable:
    return Unavailable("this scheduler leads no more; try again")
