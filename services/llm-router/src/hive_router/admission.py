"""Which back end a call may begin at now, and the bounded line of those that have to wait for one."""

import asyncio
import math
from collections import deque
from typing import Final

from hive_common.inference.names import unknown_model
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import RateLimited

from hive_router.domain.breaker import abandoned, begun, failed, succeeded
from hive_router.domain.refusals import refusal
from hive_router.domain.selection import (
    OTHERS_SHOWN_MAX,
    REASON_QUEUE,
    BackEnd,
    Choice,
    Circumstances,
    cloud_candidate,
    select,
)
from hive_router.fleet import Fleet
from hive_router.flight import Flight
from hive_router.metrics import IN_FLIGHT, QUEUED
from hive_router.settings import RouterSettings

_SMOOTHING: Final = 0.2
"""Weight of the newest value in a moving average."""


class Place:
    """A call's place at a back end. It MUST be given back, once, by `Admission.leave`."""

    __slots__ = ("backend", "probe", "since")

    def __init__(self, backend: BackEnd, probe: bool, since: float) -> None:
        self.backend = backend
        self.probe = probe
        self.since = since


class Admission:
    """Gives calls their places, first come, first served within a model.

    Args:
        fleet: what there is.
        settings: how many may run and wait.
        clock: for breakers.

    Attributes:
        killed: executors that a kill order stops.
    """

    def __init__(self, fleet: Fleet, settings: RouterSettings, clock: Clock) -> None:
        self._fleet = fleet
        self._settings = settings
        self._clock = clock
        self._host_executors = frozenset(settings.host_executors)
        self.killed: frozenset[str] = frozenset()
        self._lines: dict[str, deque[asyncio.Event]] = {}
        self._seconds = 1.0

    async def enter(self, flight: Flight) -> Place:
        """Return a place for a call at the best back end that is free, waiting in line where none is.

        Raises:
            NotFound: nobody has the model.
            RateLimited: too many wait for it already.
            InvalidArgument, Unavailable: it has nowhere to go; says why.
        """
        line = self._lines.get(flight.call.model)
        choice = self._choose(flight)
        if choice.fit and not line:
            return self._take(choice.fit[0])
        return await self._wait(flight)

    def leave(self, place: Place, verdict: bool | None, first_byte_s: float | None = None) -> None:
        """Give a place back.

        Args:
            place: of a call.
            verdict: whether the back end did what it should; None: nobody can tell.
            first_byte_s: how long it took to begin.
        """
        backend, now_ms = place.backend, self._clock.boot_ms()
        backend.in_flight -= 1
        IN_FLIGHT.dec()
        if verdict is None:
            backend.breaker = abandoned(backend.breaker, place.probe, now_ms)
        elif verdict:
            backend.breaker = succeeded(backend.breaker, place.probe)
            self._seconds += _SMOOTHING * (asyncio.get_running_loop().time() - place.since - self._seconds)
        else:
            backend.breaker = failed(backend.breaker, place.probe, now_ms, self._settings.breaker)
        if first_byte_s is not None:
            before = backend.latency_ms or first_byte_s * 1000
            backend.latency_ms = before + _SMOOTHING * (first_byte_s * 1000 - before)
        self.look_again()

    def look_again(self) -> None:
        """Let the first of each line look for a place: something has changed."""
        for line in self._lines.values():
            line[0].set()

    def _choose(self, flight: Flight) -> Choice:
        """Select, and raise where there is no use in waiting."""
        ask = flight.ask
        serving = self._fleet.serving(ask.model)
        # Whoever was revoked is never back: what it alone had is here no more.
        if all(one.revoked for one in serving):
            flight.looked_at([cloud_candidate(ask.pin)])
            raise unknown_model(ask.model, self._fleet.names())
        others = self._fleet.others(ask.model, OTHERS_SHOWN_MAX)
        at = Circumstances(self._clock.boot_ms(), self._settings.weights, self._host_executors, self.killed)
        choice = select(ask, serving, others, at)
        flight.looked_at(choice.candidates)
        if not choice.fit and all(one.rejected != REASON_QUEUE for one in choice.candidates):
            raise refusal(ask, choice.candidates)
        return choice

    def _take(self, backend: BackEnd) -> Place:
        before = backend.breaker
        backend.breaker = begun(before, self._clock.boot_ms())
        backend.in_flight += 1
        IN_FLIGHT.inc()
        return Place(backend, backend.breaker is not before, asyncio.get_running_loop().time())

    async def _wait(self, flight: Flight) -> Place:
        model = flight.call.model
        line = self._lines.setdefault(model, deque())
        if len(line) >= self._settings.queue_max:
            raise RateLimited(
                f"{len(line)} calls wait for `{model}` already", retry_after_s=self._retry_after_s(model, len(line))
            )
        turn = asyncio.Event()
        line.append(turn)
        try:
            with QUEUED.track_inprogress():
                while True:
                    if line[0] is turn:
                        choice = self._choose(flight)
                        if choice.fit:
                            return self._take(choice.fit[0])
                    await turn.wait()
                    turn.clear()
        finally:
            line.remove(turn)
            if line:
                line[0].set()
            elif self._lines.get(model) is line:
                del self._lines[model]

    def _retry_after_s(self, model: str, waiting: int) -> int:
        slots = sum(one.slots for one in self._fleet.serving(model) if one.online) or 1
        return max(1, math.ceil(self._seconds * waiting / slots))
