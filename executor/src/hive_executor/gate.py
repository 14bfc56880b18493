"""Admission of guests to the machine: so many at once, so much memory together, first come, first served."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple


class _Waiter(NamedTuple):
    memory_bytes: int
    admitted: "asyncio.Future[None]"


class Gate:
    """Lets guests in while there are slots and memory.

    A guest that alone wants more memory than there is gets in when nothing else runs: its own limit still holds,
    and refusing it here would only move the decision of the scheduler to a place that cannot explain it.
    """

    def __init__(self, slots: int, memory_bytes: int) -> None:
        self.slots = slots
        self._memory_bytes = memory_bytes
        self._running = 0
        self._used_bytes = 0
        self._waiting: deque[_Waiter] = deque()

    @property
    def running(self) -> int:
        """Guests inside."""
        return self._running

    @asynccontextmanager
    async def admitted(self, memory_bytes: int) -> AsyncIterator[None]:
        """Wait for a slot and memory, and hold both."""
        waiter = _Waiter(memory_bytes, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._let_in()
        try:
            await waiter.admitted
            yield
        finally:
            if waiter.admitted.done() and not waiter.admitted.cancelled():
                self._running -= 1
                self._used_bytes -= memory_bytes
            else:
                # Whoever left in the same tick may have taken it off the queue already.
                with suppress(ValueError):
                    self._waiting.remove(waiter)
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._fits(self._waiting[0].memory_bytes):
            waiter = self._waiting.popleft()
            if waiter.admitted.cancelled():
                continue
            self._running += 1
            self._used_bytes += waiter.memory_bytes
            waiter.admitted.set_result(None)

    def _fits(self, memory_bytes: int) -> bool:
        if self._running == 0:
            return True
        return self._running < self.slots and self._used_bytes + memory_bytes <= self._memory_bytes


class Prefetch:
    """How many attempts may wait behind the running ones.

    Short attempts would leave runners idle for the round trip between two of them; a long one that waits here
    could run elsewhere. So as many are asked for as start within `prefetch_ms`, judged by recent attempts.
    Durations that rise are believed at once, falling ones slowly.
    """

    def __init__(self, slots: int, prefetch_max: int, prefetch_ms: int) -> None:
        self._slots = slots
        self._max = prefetch_max
        self._ms = prefetch_ms
        self._mean_ms: float | None = None

    def observe(self, wall_ms: float) -> None:
        """Take the duration of an attempt that ended."""
        if self._mean_ms is None:
            self._mean_ms = wall_ms
        else:
            weight = 0.5 if wall_ms > self._mean_ms else 0.1
            self._mean_ms += weight * (wall_ms - self._mean_ms)

    @property
    def depth(self) -> int:
        """Attempts to ask for beyond the slots; 0 until something is known."""
        if self._mean_ms is None:
            return 0
        return min(self._max, int(self._slots * self._ms / max(self._mean_ms, 1.0)))
