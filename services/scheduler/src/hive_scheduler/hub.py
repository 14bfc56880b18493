"""Committed events of jobs, handed to those who watch them without another look at the database."""

import asyncio
from collections import defaultdict
from typing import Final

from hive_scheduler.commits import Committed

BUFFER_EVENTS_MAX: Final = 5_000
"""A watcher that falls further behind reads the log again instead."""


class Subscription:
    """Events of one job after `position`. `overflowed`: some were dropped, read the log from there on."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.overflowed = False
        self._queue: asyncio.Queue[Committed | None] = asyncio.Queue(BUFFER_EVENTS_MAX)

    def put(self, committed: Committed) -> None:
        """Take an event; never blocks."""
        if self.overflowed:
            return
        try:
            self._queue.put_nowait(committed)
        except asyncio.QueueFull:
            self.overflowed = True

    async def get(self) -> Committed | None:
        """Return the next event; None when the subscription is closed or has overflowed and is drained."""
        if self.overflowed and self._queue.empty():
            return None
        return await self._queue.get()

    def close(self) -> None:
        """Wake the watcher with None."""
        self.overflowed = True
        if self._queue.empty():
            self._queue.put_nowait(None)


class Hub:
    """Fan-out of committed events to watchers, by job."""

    def __init__(self) -> None:
        self._watchers: defaultdict[str, set[Subscription]] = defaultdict(set)
        self.position = 0

    def publish(self, batch: list[Committed]) -> None:
        """Hand out events; called in order of position."""
        self.position = batch[-1].position
        if self._watchers:
            for committed in batch:
                for watcher in self._watchers.get(committed.event.correlation, ()):
                    watcher.put(committed)

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
