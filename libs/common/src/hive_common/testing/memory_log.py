"""The event log in memory, by the same rules as in Postgres; it passes the same contract suite.

The writer in front of it is the real one: what is here is the database, `log_append` with its lock and its
constraints, behind the port `hive_common.eventlog.session.Session`.
"""

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Final

import msgspec
import psycopg

from hive_common.eventlog.batch import Prepared
from hive_common.eventlog.envelope import (
    GENESIS_PREV,
    SALT_BYTES,
    NewEvent,
    Stored,
    envelope_of,
    leaf_hash,
    payload_commit,
    prepare,
    splice,
)
from hive_common.eventlog.genesis import GENESIS_TYPE
from hive_common.eventlog.reader import READ_EVENTS_MAX, LogReader
from hive_common.eventlog.session import Answer
from hive_common.eventlog.writer import TERMINAL_INDEX
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.ids import new_id

TERMINAL_TYPES: Final = frozenset(
    {"TaskSucceeded", "TaskFailed", "TaskCancelled", "JobSucceeded", "JobFailed", "JobCancelled"}
)

Row = tuple[int, str, int, str, bytes, bytes, bytes | None, bytes | None]
"""position, stream, version, type, event, hash, payload, salt."""

OnAppend = Callable[[list[Stored]], None]


class EndedTwice(psycopg.errors.UniqueViolation):
    """What Postgres says of a second terminal event of a stream."""

    diag = SimpleNamespace(constraint_name=TERMINAL_INDEX)  # type: ignore[assignment]


class MemoryLog:
    """The database.

    Args:
        log_id: of the log; a new one when left out.

    Attributes:
        rows: as the tables have them, from position 1.
        on_append: gets what was just committed.
    """

    def __init__(self, log_id: str = "") -> None:
        self.rows: list[Row] = []
        self.events: list[Stored] = []
        self.on_append: OnAppend = lambda _: None
        self._versions: dict[str, int] = {}
        self._ended: set[str] = set()
        self._by_stream: dict[str, list[Stored]] = {}
        self.log_id = log_id or new_id()
        genesis = NewEvent(
            stream=self.log_id,
            version=1,
            type=GENESIS_TYPE,
            schema=1,
            payload=msgspec.json.encode({"log": self.log_id}),
            ts_us=1,
            actor="system",
            owner="system",
        )
        salt = bytes(SALT_BYTES)
        body, _ = prepare(self.log_id, genesis, salt)
        self._insert([(self.log_id, 1, GENESIS_TYPE, body, genesis.payload, salt)])

    @property
    def head(self) -> int:
        """The position of the last event."""
        return len(self.rows)

    def version(self, stream: str) -> int:
        """Return the version at which a stream stands, 0 for one that is not there."""
        return self._versions.get(stream, 0)

    def of(self, stream: str) -> list[Stored]:
        """Return the events of a stream, in order."""
        return self._by_stream.get(stream, [])

    def log_append(self, batch: Sequence[Prepared]) -> tuple[list[str], list[Answer]]:
        """Append like the function of that name: a conflict fails itself, a broken constraint the whole call.

        Raises:
            psycopg.Error: nothing of the batch was written.
        """
        indices: dict[str, int] = {}
        for append in batch:
            for stream in append.expected:
                indices.setdefault(stream, len(indices) + 1)
        versions = {stream: self.version(stream) for stream in indices}
        position = self.head
        answers: list[Answer] = []
        new: list[tuple[str, int, str, bytes, bytes, bytes]] = []
        for append in batch:
            wrong = next((s for s, version in append.expected.items() if versions[s] != version), None)
            if wrong is not None:
                answers.append((0, indices[wrong], versions[wrong]))
                continue
            for at, stream in enumerate(append.streams):
                versions[stream] = append.versions[at]
                # Element and salt are packed for the wire, with their length in front.
                body, payload, salt = append.bodies[at][4:], append.payloads[at][4:], append.salts[at][4:]
                new.append((stream, append.versions[at], append.types[at][4:].decode(), body, payload, salt))
            position += len(append.streams)
            answers.append((position, 0, 0))
        self._check_ends(new)
        self._insert(new)
        return list(indices), answers

    def _check_ends(self, new: list[tuple[str, int, str, bytes, bytes, bytes]]) -> None:
        ending = [stream for stream, _, type_, *_ in new if type_ in TERMINAL_TYPES]
        if len(set(ending)) < len(ending) or not self._ended.isdisjoint(ending):
            raise EndedTwice(f"duplicate key value violates unique constraint {TERMINAL_INDEX}")

    def _insert(self, new: list[tuple[str, int, str, bytes, bytes, bytes]]) -> None:
        stored: list[Stored] = []
        prev = self.rows[-1][5].hex() if self.rows else GENESIS_PREV
        for stream, version, type_, body, payload, salt in new:
            position = self.head + 1
            event = splice(position, prev, body)
            hash_ = leaf_hash(event)
            prev = hash_.hex()
            self.rows.append((position, stream, version, type_, event, hash_, payload, salt))
            self._versions[stream] = version
            if type_ in TERMINAL_TYPES:
                self._ended.add(stream)
            stored.append(_stored(position, event, hash_, payload, salt))
            self._by_stream.setdefault(stream, []).append(stored[-1])
        self.events += stored
        if stored:
            self.on_append(stored)


def _stored(position: int, event: bytes, hash_: bytes, payload: bytes, salt: bytes) -> Stored:
    envelope = envelope_of(event)
    assert envelope.payload_commit == payload_commit(salt, payload).hex()
    return Stored(
        position,
        envelope.stream,
        envelope.version,
        envelope.type,
        envelope.schema,
        envelope.ts_us,
        envelope.actor,
        envelope.owner,
        envelope.ns,
        envelope.subject,
        envelope.correlation,
        envelope.causation,
        payload,
        event,
        hash_,
    )


class MemorySession:
    """A session with a log in memory (hive_common.eventlog.session.Session)."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._closed

    async def log_id(self) -> str:
        """Return the log's id."""
        return self._log.log_id

    async def append(self, batch: Sequence[Prepared]) -> tuple[list[str], list[Answer]]:
        """Append, and let others have their turn, as a statement that takes its time does."""
        await asyncio.sleep(0)
        self._check()
        return self._log.log_append(batch)

    async def stored(self, stream: str, version: int) -> tuple[int, bytes] | None:
        """Return an event."""
        self._check()
        events = self._log.of(stream)
        return (events[version - 1].position, events[version - 1].event) if 0 < version <= len(events) else None

    async def ping(self) -> None:
        """Raise where the session has ended."""
        self._check()

    async def close(self) -> None:
        """End it."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise psycopg.OperationalError("the connection is closed")


class MemoryReader(LogReader):
    """Reads a log in memory; what follows the head is inherited, and so the real one."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__("")
        self._log = log

    async def close(self) -> None:
        """Nothing is open."""

    async def reached(self) -> None:
        """Where a simulated network comes between. Raises `Unavailable`."""

    async def log_id(self) -> str:
        """Return the log's id."""
        await self.reached()
        return self._log.log_id

    async def head(self) -> int:
        """Return the position of the last event."""
        await self.reached()
        return self._log.head

    async def versions(self, streams: Sequence[str]) -> dict[str, int]:
        """Return the version at which each of `streams` stands."""
        await self.reached()
        return {stream: self._log.version(stream) for stream in streams}

    async def read(
        self,
        after: int,
        limit: int = 1000,
        *,
        types: Sequence[str] | None = None,
        known: Sequence[str] | None = None,
        streams: Sequence[str] | None = None,
        until: int | None = None,
        payloads: bool = True,
    ) -> list[Stored]:
        """Return events (LogReader.read)."""
        if not 0 < limit <= READ_EVENTS_MAX:
            raise InvalidArgument(f"limit {limit}: expected 1 to {READ_EVENTS_MAX}")
        await self.reached()
        last = self._log.head if until is None else until
        if streams is None:
            candidates = self._log.events[after:last] if after < last else []
        else:
            found = {event.position: event for stream in streams for event in self._log.of(stream)}
            candidates = [found[position] for position in sorted(found) if after < position <= last]
        if types is not None:
            wanted, known_types = frozenset(types), None if known is None else frozenset(known)
            candidates = [
                event
                for event in candidates
                if event.type in wanted or (known_types is not None and event.type not in known_types)
            ]
        candidates = candidates[:limit]
        if payloads:
            return candidates
        return [msgspec.structs.replace(event, payload=None) for event in candidates]
