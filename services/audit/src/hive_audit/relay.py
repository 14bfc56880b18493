"""Publishes every committed envelope, without its payload, to the JetStream stream `HIVE_EVENTS`.

In that stream the sequence *is* the log's position. Each message says which sequence must stand before it
(`Nats-Expected-Last-Sequence`), so the relay can neither skip one nor publish one twice, however many of its
messages or acknowledgements are lost, and however many relays run. What is in JetStream is never more than a
copy: where it does not agree with the log it is made anew.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
import nats.errors
import nats.js.errors
from hive_common.contracts.events import KIND_OF
from hive_common.contracts.messages import EVENTS_STREAM, EVENTS_SUBJECTS, event_subject
from hive_common.kernel.errors import CorruptLog, HiveError, Unavailable, UnknownEvent
from nats.aio.client import Client
from nats.js.api import DiscardPolicy, Header, PubAck, RetentionPolicy, StorageType, StreamConfig, StreamInfo
from prometheus_client import Counter, Gauge

from hive_audit.log_source import LogSource

log = logging.getLogger(__name__)

LOG_KEY: Final = "hive_log"
"""Metadata of the stream: the id of the log it is a copy of."""
BATCH_EVENTS: Final = 1_000
"""Messages in flight. An error sends back at most these."""
ACK_TIMEOUT_S: Final = 5.0
POLL_S: Final = 1.0
"""How soon an idle relay notices new events without a hint, and that its stream is gone."""
COALESCE_S: Final = 0.005
BACKOFF_S: Final = 0.5

_Envelopes = Sequence[tuple[int, str, bytes]]

PUBLISHED = Counter("hive_relay_published_total", "Envelopes published to HIVE_EVENTS and acknowledged")
REMADE = Counter("hive_relay_streams_made_total", "Times that HIVE_EVENTS was made anew")
POSITION = Gauge("hive_relay_position", "Last position in HIVE_EVENTS")


class RelaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of the stream; the oldest messages go first. The log itself keeps everything.

    Attributes:
        max_bytes: size of the stream on disk.
        max_age_s: age of its messages; 0: no bound.
        replay_events_max: how far back a stream that is made anew reaches.
        replicas: copies in a NATS cluster.
    """

    max_bytes: int = 1024 * 1024 * 1024
    max_age_s: int = 0
    replay_events_max: int = 10_000_000
    replicas: int = 1


class _Misaligned(Exception):
    """A batch was not taken as a whole: where the stream stands has to be read again."""


class Relay:
    """Keeps `HIVE_EVENTS` equal to the log, for as long as it runs.

    Args:
        open_source: connects to the log; called again after the connection was lost.
        client: a connection to NATS that reconnects by itself.
        settings: bounds of the stream.
        wake: set when the log has grown or NATS came back.
    """

    def __init__(
        self,
        open_source: Callable[[], Awaitable[LogSource]],
        client: Client,
        settings: RelaySettings,
        wake: asyncio.Event,
    ) -> None:
        self._open_source = open_source
        self._client = client
        self._js = client.jetstream(publish_async_max_pending=2 * BATCH_EVENTS)
        self._settings = settings
        self._wake = wake
        self._created: str | None = None
        self._last: bytes | None = None
        self.position = 0
        self.problem: str | None = "not started"

    async def run(self) -> None:
        """Relay for ever; ends, with `problem` set, at an event it may not skip (law 11) or a hole in the log."""
        while True:
            try:
                async with await self._open_source() as source:
                    await self._relay(source)
            except (UnknownEvent, CorruptLog) as error:
                self.problem = f"stopped: {error.message}"
                log.error("the relay %s", self.problem)
                return
            except (HiveError, nats.errors.Error, OSError, TimeoutError) as error:
                self.problem = str(error) or type(error).__name__
                log.warning("the relay waits: %s", self.problem)
                await asyncio.sleep(BACKOFF_S)

    async def _relay(self, source: LogSource) -> None:
        while True:
            self.position = await self._align(source)
            self.problem = None
            try:
                while rows := await source.envelopes(self.position, BATCH_EVENTS):
                    await self._publish(rows)
                    self._last = rows[-1][2]
            except _Misaligned as error:
                log.info("reading again where %s stands: %s", EVENTS_STREAM, error)
                continue
            await self._sleep()

    async def _sleep(self) -> None:
        try:
            await asyncio.wait_for(self._wake.wait(), POLL_S)
        except TimeoutError:
            return
        self._wake.clear()
        # Under load hints come one by one; a few milliseconds make batches of them.
        await asyncio.sleep(COALESCE_S)

    async def _publish(self, rows: _Envelopes) -> None:
        pending: list[asyncio.Future[PubAck]] = []
        try:
            for expected, (position, type_, envelope) in enumerate(rows, self.position + 1):
                if position != expected:
                    raise CorruptLog(f"position {expected} is missing: the next is {position}", position=expected)
                subject = _subject(position, type_)
                headers = {Header.EXPECTED_LAST_SEQUENCE.value: str(position - 1)}
                pending.append(await self._js.publish_async(subject, envelope, headers=headers))
        finally:
            # Also in front of an event that stops the relay: those before it were good.
            await self._settle(pending)

    async def _settle(self, pending: list[asyncio.Future[PubAck]]) -> None:
        if not pending:
            return
        done, late = await asyncio.wait(pending, timeout=ACK_TIMEOUT_S)
        for future in late:
            future.cancel()
        errors = [error for future in done if (error := future.exception()) is not None]
        if errors or late:
            raise _Misaligned(f"{len(errors)} of {len(pending)} refused, {len(late)} not answered: {errors[:1]}")
        last = pending[-1].result().seq
        if last != self.position + len(pending):
            raise _Misaligned(f"the last of them got sequence {last}")
        self.position = last
        POSITION.set(last)
        PUBLISHED.inc(len(pending))

    async def _align(self, source: LogSource) -> int:
        """Make sure that the stream is a copy of the log, and return the last position in it."""
        info = await self._stream()
        if info is not None and await self._is_as_left(source, info):
            return self.position
        genesis = await source.event_at(1)
        head = await source.head()
        if genesis is None or head is None:
            raise Unavailable("the log has no genesis event yet")
        log_id = _log_of(genesis[0])
        why = "it is not there" if info is None else await self._difference(source, info, log_id, head.position)
        if why is None:
            assert info is not None
            await self._js.update_stream(self._config(log_id, info.config.first_seq))
        else:
            info = await self._make(info is not None, log_id, head.position, why)
        self._created = str(info.created)
        stored = await source.event_at(info.state.last_seq)
        self._last = stored[0] if stored else None
        return int(info.state.last_seq)

    async def _stream(self) -> StreamInfo | None:
        try:
            return await self._js.stream_info(EVENTS_STREAM)
        except nats.js.errors.NotFoundError:
            return None

    async def _is_as_left(self, source: LogSource, info: StreamInfo) -> bool:
        if self._last is None or self._created != str(info.created) or info.state.last_seq != self.position:
            return False
        # The log itself may have been replaced by an older one meanwhile.
        stored = await source.event_at(self.position)
        return stored is not None and stored[0] == self._last

    async def _difference(self, source: LogSource, info: StreamInfo, log_id: str, head: int) -> str | None:
        of = (info.config.metadata or {}).get(LOG_KEY)
        if of != log_id:
            return f"it belongs to log {of}, this is {log_id}"
        last = info.state.last_seq
        if last > head:
            return f"it goes to {last}, the log to {head}"
        if info.state.messages == 0:
            return None
        # An envelope holds the hash of the one before: equal here means equal everywhere before.
        stored = await source.event_at(last)
        try:
            message = await self._js.get_msg(EVENTS_STREAM, seq=last)
        except nats.js.errors.NotFoundError:
            return f"its message {last} was deleted"
        if stored is None or message.data != stored[0]:
            return f"its message {last} is not what stands in the log"
        return None

    async def _make(self, exists: bool, log_id: str, head: int, why: str) -> StreamInfo:
        log.info("making %s anew from the log: %s", EVENTS_STREAM, why)
        if exists:
            await self._js.delete_stream(EVENTS_STREAM)
        REMADE.inc()
        first = max(1, head - self._settings.replay_events_max + 1)
        return await self._js.add_stream(self._config(log_id, first))

    def _config(self, log_id: str, first_seq: int | None) -> StreamConfig:
        return StreamConfig(
            name=EVENTS_STREAM,
            description="Every committed envelope of the log; the sequence is the position",
            subjects=[EVENTS_SUBJECTS],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            max_bytes=self._settings.max_bytes,
            max_age=self._settings.max_age_s,
            num_replicas=self._settings.replicas,
            allow_direct=True,
            first_seq=first_seq,
            metadata={LOG_KEY: log_id},
        )


class _Name(msgspec.Struct):
    log: str


def _log_of(envelope: bytes) -> str:
    try:
        return msgspec.json.decode(envelope, type=_Name).log
    except msgspec.DecodeError as error:
        raise CorruptLog(f"position 1: the envelope does not decode: {error}", position=1) from error


def _subject(position: int, type_: str) -> str:
    kind = KIND_OF.get(type_)
    if kind is None:
        raise UnknownEvent(f"position {position}: unknown event {type_}", position=position, type=type_)
    return event_subject(kind, type_)
