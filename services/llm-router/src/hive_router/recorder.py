"""Finished calls on their way into the log, and the explanations of recent ones.

An answer never waits for its record. Records wait in a queue with bounds; while the log is away for longer than
they last, further ones are dropped and counted: calls to one's own devices go on without a record, since they cost
nothing and the alternative would be an outage.
"""

import asyncio
import logging
from collections import OrderedDict, deque
from typing import Final

import msgspec
from hive_common.artifacts.store import ArtifactStore
from hive_common.contracts.events import SCHEMA, ModelCallFinished, encode
from hive_common.contracts.values import Value, by_digest, fits_inline, inline
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.inference.completions import assembled
from hive_common.kernel.errors import HiveError, Unavailable, VersionConflict

from hive_router.flight import Flight
from hive_router.metrics import RECORDS_DROPPED, RECORDS_WAITING
from hive_router.settings import RouterSettings

log = logging.getLogger(__name__)

BATCH_MAX: Final = 256
PAUSE_S: Final = 0.2
"""From the end of a call to its record. A commit takes 5 ms of CPU in all of the stack, which several calls share
then; and whoever calls again at once does not wait for the record of the call before."""
RETRY_S: Final = 1.0
CLOSE_WITHIN_S: Final = 5.0
"""At the end of the process."""


class Recorder:
    """Takes finished calls down.

    Args:
        writer: of the log.
        store: for requests and answers that are too long for an event.
        settings: bounds.
        ns: the namespace.
    """

    def __init__(self, writer: LogWriter, store: ArtifactStore, settings: RouterSettings, ns: str) -> None:
        self._writer = writer
        self._store = store
        self._settings = settings
        self._ns = ns
        self._waiting: deque[Flight] = deque()
        self._waiting_bytes = 0
        self._work = asyncio.Event()
        self._closing = False
        self._recent: OrderedDict[str, Flight | ModelCallFinished] = OrderedDict()

    def begun(self, flight: Flight) -> None:
        """Take note of a call that begins, so that it can be explained while it runs."""
        recent = self._recent
        recent[flight.call.id] = flight
        if len(recent) > self._settings.explained_max:
            recent.popitem(last=False)

    def finished(self, flight: Flight) -> None:
        """Take a call that has ended. Returns at once."""
        size = flight.kept_bytes
        # What cost money is always kept: there is never more of it than blocks of money pay for.
        if flight.cost.nano_usd == 0 and (
            len(self._waiting) >= self._settings.records_max
            or self._waiting_bytes + size > self._settings.record_bytes_max
        ):
            RECORDS_DROPPED.labels("full").inc()
            flight.forget_bytes()
            return
        self._waiting.append(flight)
        self._waiting_bytes += size
        RECORDS_WAITING.set(len(self._waiting))
        self._work.set()

    def recent(self, call_id: str) -> ModelCallFinished | None:
        """Return what is known of a recent call; `code` is `running` while it runs."""
        found = self._recent.get(call_id)
        if isinstance(found, Flight):
            event = found.event()
            return event if found.finished else msgspec.structs.replace(event, code="running")
        return found

    def knows(self, call_id: str) -> bool:
        """Say whether there is a recent call of this id."""
        return call_id in self._recent

    async def run(self) -> None:
        """Write until `close` was called and nothing waits any more."""
        while self._waiting or not self._closing:
            await self._work.wait()
            self._work.clear()
            if not self._closing:
                await asyncio.sleep(PAUSE_S)
            while self._waiting:
                await self._write_batch()

    async def close(self, running: asyncio.Task[None]) -> None:
        """Let `running`, which is `run`, write what waits, if the log can be reached soon."""
        self._closing = True
        self._work.set()
        await asyncio.wait({running}, timeout=CLOSE_WITHIN_S)
        running.cancel()
        await asyncio.wait({running})

    async def _write_batch(self) -> None:
        batch = [self._waiting[at] for at in range(min(BATCH_MAX, len(self._waiting)))]
        try:
            events = []
            for flight in batch:
                events.append(await self._event_of(flight))
                # Putting a stream together takes a while; those that run must not stand still for all of them.
                await asyncio.sleep(0)
        except (HiveError, OSError) as error:
            # The disk for long values is full or gone: their counts are worth keeping.
            log.warning("requests and answers are not kept: %s", error)
            events = [flight.event() for flight in batch]
        outcomes = await asyncio.gather(
            *(self._append(flight, event) for flight, event in zip(batch, events, strict=True)),
            return_exceptions=True,
        )
        again = []
        for flight, event, outcome in zip(batch, events, outcomes, strict=True):
            self._waiting.popleft()
            if isinstance(outcome, Unavailable):
                again.append(flight)
            else:
                self._settled(flight, event, outcome)
        self._waiting.extendleft(reversed(again))
        RECORDS_WAITING.set(len(self._waiting))
        if again:
            log.warning("%d finished calls wait for the log", len(self._waiting))
            await asyncio.sleep(RETRY_S)

    def _settled(self, flight: Flight, event: ModelCallFinished, outcome: int | BaseException) -> None:
        self._waiting_bytes -= flight.kept_bytes
        if self._recent.get(flight.call.id) is flight:
            self._recent[flight.call.id] = msgspec.structs.replace(event, request=None, response=None)
        if isinstance(outcome, VersionConflict):
            RECORDS_DROPPED.labels("same_id").inc()
            log.warning("call %s: the log has a call of this id already", flight.call.id)
        elif isinstance(outcome, BaseException):
            RECORDS_DROPPED.labels("refused").inc()
            log.error("call %s could not be recorded", flight.call.id, exc_info=outcome)
        flight.forget_bytes()

    async def _append(self, flight: Flight, event: ModelCallFinished) -> int:
        return await self._writer.append(
            record(
                flight.call.id,
                event,
                ts_us=flight.ended_us,
                actor=flight.actor,
                owner=flight.owner,
                subject=flight.subject,
                ns=self._ns,
            )
        )

    async def _event_of(self, flight: Flight) -> ModelCallFinished:
        if flight.call.counts_only:
            return flight.event()
        response = flight.tally.kept
        if flight.streamed:
            response = assembled(response)
        return flight.event(
            request=await self._value(flight.call.body), response=await self._value(response) if response else None
        )

    async def _value(self, data: bytes) -> Value | None:
        """Return JSON bytes as a value. What is no JSON, such as a call that was malformed, is left out."""
        try:
            msgspec.json.decode(data, type=msgspec.Raw)
        except msgspec.DecodeError:
            return None
        if fits_inline(data):
            return inline(data)
        await self._store.put(data)
        return by_digest(data)


def record(
    call_id: str,
    event: ModelCallFinished,
    *,
    ts_us: int,
    actor: str,
    owner: str,
    subject: str,
    ns: str,
) -> Append:
    """Return the append of a finished call: the only event of its stream."""
    return Append(
        (
            NewEvent(
                stream=call_id,
                version=1,
                type=type(event).__name__,
                schema=SCHEMA,
                payload=encode(event),
                ts_us=ts_us,
                actor=actor,
                owner=owner,
                subject=subject or None,
                ns=ns,
            ),
        )
    )
