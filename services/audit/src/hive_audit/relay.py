"""Publishes every committed envelope, without its payload, to the JetStream stream `HIVE_EVENTS`.

In that stream the sequence *is* the log's position. Each message says which sequence must stand before it
(`Nats-Expected-Last-Sequence`), so the relay can neither skip one nor publish one twice, however many of its
messages or acknowledgements are lost, and however many relays run. What is in JetStream is never more than a
copy: where it does not agree with the log it is made anew.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
import nats.errors
import nats.js.errors
from hive_common.contracts.events import KIND_OF
from hive_common.contracts.messages import EVENTS_STREAM, EVENTS_SUBJECTS, event_subject
from hive_common.kernel.errors import CorruptLog, HiveError, Unavailable, UnknownEvent
from nats.aio.client import Client
from nats.js.api import DiscardPolicy, Header, RetentionPolicy, StorageType, StreamConfig, StreamInfo
from prometheus_client import Counter, Gauge

from hive_audit.log_source import LogSource

log = logging.getLogger(__name__)

LOG_KEY: Final = "hive_log"
"""Metadata of the stream: the id of the log it is a copy of."""
BATCH_EVENTS: Final = 1_000
"""Messages in flight, far below what a stream buffers (10,000). An error repeats at most these."""
ANSWER_TIMEOUT_S: Final = 2.0
POLL_S: Final = 1.0
"""How soon an idle relay notices new events without a hint, and any relay that its stream is gone."""
COALESCE_S: Final = 0.05
BACKOFF_S: Final = 0.5
NO_STORAGE: Final = 10047
"""Error code of JetStream: `max_bytes` is reserved, and there is less on the disk."""
STREAM_BYTES_MIN: Final = 16 * 1024 * 1024

_Envelopes = Sequence[tuple[int, str, bytes]]

PUBLISHED = Counter("hive_relay_published_total", "Envelopes published to HIVE_EVENTS and acknowledged")
REMADE = Counter("hive_relay_streams_made_total", "Times that HIVE_EVENTS was made anew")
POSITION = Gauge("hive_relay_position", "Last position in HIVE_EVENTS")


class RelaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of the stream; the oldest messages go first. The log itself keeps everything.

    Attributes:
        max_bytes: size of the stream on disk; less where the disk has no room for it.
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
        self._js = client.jetstream(timeout=ANSWER_TIMEOUT_S)
        self._settings = settings
        self._max_bytes = settings.max_bytes
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
        stuck_at: int | None = None
        while True:
            self.position = await self._align(source)
            self.problem = None
            aligned = time.monotonic()
            try:
                # Each batch is checked by the server; a look at the whole stream costs more than a batch of a few.
                while time.monotonic() - aligned < POLL_S:
                    while rows := await source.envelopes(self.position, BATCH_EVENTS):
                        await self._publish(rows)
                        self._last = rows[-1][2]
                    stuck_at = None
                    if not await self._woken():
                        break
            except _Misaligned as error:
                log.info("reading again where %s stands: %s", EVENTS_STREAM, error)
                if self.position == stuck_at:
                    raise Unavailable(
                        f"{EVENTS_STREAM} does not take position {self.position + 1}: {error}"
                    ) from error
                stuck_at = self.position

    async def _woken(self) -> bool:
        """Wait for a hint; say whether one came."""
        try:
            async with asyncio.timeout(POLL_S):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        # Under load hints come one by one; a few milliseconds make batches of them.
        await asyncio.sleep(COALESCE_S)
        return True

    async def _publish(self, rows: _Envelopes) -> None:
        good = _takewhile_known(rows, self.position)
        for position, subject, envelope in good[:-1]:
            await self._client.publish(subject, envelope, headers=_behind(position - 1))
        if good:
            await self._publish_last(*good[-1])
            PUBLISHED.inc(len(good))
        if len(good) < len(rows):
            raise _reason_to_stop(rows[len(good)], self.position + 1)

    async def _publish_last(self, position: int, subject: str, envelope: bytes) -> None:
        # The only one that asks for an answer: it can be stored only if all those before it were.
        try:
            ack = await self._js.publish(subject, envelope, headers=_behind(position - 1), stream=EVENTS_STREAM)
        except (nats.js.errors.Error, nats.errors.TimeoutError) as error:
            raise _Misaligned(str(error) or type(error).__name__) from error
        if ack.seq != position:
            raise _Misaligned(f"position {position} got sequence {ack.seq}")
        self.position = position
        POSITION.set(position)

    async def _align(self, source: LogSource) -> int:
        """Make sure that the stream is a copy of the log, and return the last position in it."""
        if not self._client.is_connected:
            raise Unavailable("NATS is not connected")
        info = await self._stream()
        if info is not None and await self._is_as_left(source, info):
            return self.position
        genesis = await source.event_at(1)
        head = await source.head()
        if genesis is None or head is None:
            raise Unavailable("the log has no genesis event yet")
        log_id = _log_of(genesis[0])
        why = "it is not there" if info is None else await self._difference(source, info, log_id, head.position)
        if why is None and info is not None:
            why = await self._update(log_id, info)
        if why is not None or info is None:
            info = await self._make(info is not None, log_id, head.position, why or "")
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

    async def _update(self, log_id: str, info: StreamInfo) -> str | None:
        """Bring the settings of the stream up to date, or say why that cannot be done."""
        try:
            await self._sized(self._js.update_stream, log_id, info.config.first_seq)
        except nats.js.errors.APIError as error:
            if error.err_code != NO_STORAGE:
                raise
            # What it reserves counts already: the server has less room than when it was made.
            self._max_bytes = self._settings.max_bytes
            return f"NATS has no room for the {info.config.max_bytes} bytes that it may take"
        return None

    async def _make(self, exists: bool, log_id: str, head: int, why: str) -> StreamInfo:
        log.info("making %s anew from the log: %s", EVENTS_STREAM, why)
        if exists:
            await self._js.delete_stream(EVENTS_STREAM)
        REMADE.inc()
        first = max(1, head - self._settings.replay_events_max + 1)
        made = await self._sized(self._js.add_stream, log_id, first)
        if made.state.last_seq >= first:
            # A server that cannot read a stream's description keeps its messages, and goes on behind them.
            await self._js.delete_stream(EVENTS_STREAM)
            made = await self._sized(self._js.add_stream, log_id, first)
        return made

    async def _sized(
        self, ask: Callable[[StreamConfig], Awaitable[StreamInfo]], log_id: str, first_seq: int | None
    ) -> StreamInfo:
        """Ask for the stream as large as wanted; where the server has no room for that, for half, and so on."""
        while True:
            try:
                return await ask(self._config(log_id, first_seq))
            except nats.js.errors.APIError as error:
                if error.err_code != NO_STORAGE or self._max_bytes <= STREAM_BYTES_MIN:
                    raise
                self._max_bytes = max(self._max_bytes // 2, STREAM_BYTES_MIN)
                log.warning("%s: NATS has no room for more than %d MiB", EVENTS_STREAM, self._max_bytes // 2**20)

    def _config(self, log_id: str, first_seq: int | None) -> StreamConfig:
        return StreamConfig(
            name=EVENTS_STREAM,
            description="Every committed envelope of the log; the sequence is the position",
            subjects=[EVENTS_SUBJECTS],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            max_bytes=self._max_bytes,
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


def _behind(sequence: int) -> dict[str, str]:
    return {Header.EXPECTED_LAST_SEQUENCE.value: str(sequence)}


def _takewhile_known(rows: _Envelopes, after: int) -> list[tuple[int, str, bytes]]:
    """Return position, subject and envelope of the rows up to a hole or to a type that is not known."""
    good = []
    for expected, (position, type_, envelope) in enumerate(rows, after + 1):
        kind = KIND_OF.get(type_)
        if position != expected or kind is None:
            break
        good.append((position, event_subject(kind, type_), envelope))
    return good


def _reason_to_stop(row: tuple[int, str, bytes], expected: int) -> UnknownEvent | CorruptLog:
    position, type_, _ = row
    if position != expected:
        return CorruptLog(f"position {expected} is missing: the next is {position}", position=expected)
    return UnknownEvent(f"position {position}: unknown event {type_}", position=position, type=type_)
