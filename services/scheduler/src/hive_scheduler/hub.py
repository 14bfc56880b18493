"""Committed events of jobs, handed to those who watch them without another look at the database."""

import asyncio
from collections import defaultdict, deque
from typing import Final

from hive_scheduler.commits import Committed

BUFFER_EVENTS_MAX: Final = 5_000
"""A watcher that falls further behind reads the log again instead."""


RECENT_EVENTS_MAX: Final = 20_000
RECENT_BYTES_MAX: Final = 32 * 1024 * 1024
"""Latest events that are kept: a job that has just begun is watched without a look at the database."""


class Subscription:
    """Events of one job after `position`. `overflowed`: some were dropped, read the log from there on."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.overflowed = False
        self._events: list[Committed] = []
        self._wake = asyncio.Event()

    def put(self, events: list[Committed]) -> None:
        """Take events; never blocks."""
        if self.overflowed:
            return
        if len(self._events) + len(events) > BUFFER_EVENTS_MAX:
            self.overflowed = True
        else:
            self._events += events
        self._wake.set()

    async def take(self) -> list[Committed]:
        """Return what has come, at least one event; none when the subscription is closed or has overflowed."""
        if not self._events and not self.overflowed:
            self._wake.clear()
            await self._wake.wait()
        taken, self._events = self._events, []
        return taken

    def close(self) -> None:
        """Wake the watcher: nothing more comes."""
        self.overflowed = True
        self._wake.set()


class Hub:
    """Fan-out of committed events to watchers, by job, and the latest events for those who begin to watch."""

    def __init__(self) -> None:
        self._watchers: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._recent: dict[str, deque[Committed]] = {}
        self._order: deque[Committed] = deque()
        self._recent_bytes = 0
        self.position = 0

    def publish(self, batch: list[Committed]) -> None:
        """Hand out events; called in order of position."""
        self.position = batch[-1].position
        self._remember(batch)
        if self._watchers:
            by_job: defaultdict[str, list[Committed]] = defaultdict(list)
            for committed in batch:
                by_job[committed.event.correlation].append(committed)
            for job_id, events in by_job.items():
                for watcher in self._watchers.get(job_id, ()):
                    watcher.put(events)

    def recent(self, job_id: str) -> list[Committed] | None:
        """Return every event of a job so far, or None where some of them are not at hand."""
        found = self._recent.get(job_id)
        if found is None or found[0].event.type != "JobSubmitted":
            return None
        return list(found)

    def _remember(self, batch: list[Committed]) -> None:
        for committed in batch:
            self._recent.setdefault(committed.event.correlation, deque()).append(committed)
            self._order.append(committed)
            self._recent_bytes += len(committed.event.payload)
        while len(self._order) > RECENT_EVENTS_MAX or self._recent_bytes > RECENT_BYTES_MAX:
            oldest = self._order.popleft()
            self._recent_bytes -= len(oldest.event.payload)
            job_id = oldest.event.correlation
            self._recent[job_id].popleft()
            if not self._recent[job_id]:
                del self._recent[job_id]

    def subscribe(self, job_id: str) -> Subscription:
        """Return a subscription to what is committed from now on."""
        subscription = Subscription(self.position)
        self._watchers[job_id].add(subscription)
        return subscription

    def unsubscribe(self, job_id: str, subscription: Subscription) -> None:
        """End a subscription."""
        self._watchers[job_id].discard(subscription)
        if not self._watchers[job_id]:
            del self._watchers[job_id]

    def close(self) -> None:
        """Wake every watcher: nothing more comes from this process."""
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.close()
