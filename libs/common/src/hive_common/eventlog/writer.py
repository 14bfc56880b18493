"""The log's writer: callers await, one task drains the queue with one statement per batch (group commit)."""

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from psycopg import AsyncConnection

from hive_common.eventlog.batch import Prepared, Salts
from hive_common.eventlog.connection import Connect, connector, is_lost
from hive_common.eventlog.envelope import EVENTS_PER_CALL_MAX, Append, envelope_of
from hive_common.eventlog.session import PostgresSession, Session
from hive_common.kernel.errors import (
    Conflict,
    HiveError,
    Internal,
    InvalidArgument,
    Unavailable,
    VersionConflict,
)

logger = logging.getLogger(__name__)

QUEUE_EVENTS_MAX = 10_000
"""Events that wait for the database before callers wait for room."""
HALVES_FROM_EVENTS = 48
"""So many events in all, and they go in two halves. Below that a call costs more than is won."""
BATCH_BYTES_MAX = 8 * 1024 * 1024
"""A call with few huge payloads must not hold the lock for long either."""
IDLE_PING_S = 1.0
"""A leader learns within this time that its connection died, also when it has nothing to write."""
BACKOFF_MIN_S = 0.02
BACKOFF_MAX_S = 1.0
TERMINAL_INDEX = "events_terminal"

OnHead = Callable[[int, tuple[str, ...]], Awaitable[Any] | None]


class _Pending(Prepared):
    """An append whose caller waits."""

    __slots__ = ("future",)

    def __init__(self, log_id: str, append: Append, salts: Salts, future: asyncio.Future[int]) -> None:
        super().__init__(log_id, append, salts)
        self.future = future

    def resolve(self, position: int) -> None:
        """Answer the caller, if it still waits."""
        if not self.future.done():
            self.future.set_result(position)

    def fail(self, error: Exception) -> None:
        """Fail the caller, if it still waits."""
        if not self.future.done():
            self.future.set_exception(error)


class LogWriter:
    """Appends to the log from one process, for any number of concurrent callers.

    Attributes:
        log_id: the id of the log, from its genesis event.
        head: the highest position this writer has committed; 0 before the first.
        failed: set when the writer can never append again: with `reconnect=False` after its connection was lost.
    """

    def __init__(
        self,
        session: Session,
        log_id: str,
        connect: Connect | None,
        on_head: OnHead | None,
        unavailable_after_s: float,
    ) -> None:
        self.log_id = log_id
        self.head = 0
        self.failed = asyncio.Event()
        self._session: Session | None = session
        self._connect = connect
        self._on_head = on_head
        self._unavailable_after_s = unavailable_after_s
        self._salts = Salts()
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Pending] = deque()
        self._queued_events = 0
        self._answered_events = 0
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._head_moved = asyncio.Event()
        # Packed, as they are sent: unpacked once per hint and not once per event.
        self._new_types: set[bytes] = set()
        self._closing = False
        self._owns_session = True
        self._drainer: asyncio.Task[None] | None = None
        self._notifier: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        source: str | Connect | AsyncConnection[Any] | Session,
        *,
        on_head: OnHead | None = None,
        reconnect: bool = True,
        unavailable_after_s: float = 30.0,
    ) -> "LogWriter":
        """Connect and start.

        Args:
            source: a connection string, a factory of autocommit connections, or, with `reconnect=False`, an
                open autocommit connection or a session, which stays the caller's to close.
            on_head: is told the new head and the types of what was committed since it was last told, at most
                one call at a time; a hint, so its errors are logged and forgotten.
            reconnect: False: a lost connection fails this writer for good. True: it connects again, and what
                was in flight is sent again with identical bytes.
            unavailable_after_s: with `reconnect=True`: how long a batch waits for the database.

        Raises:
            Unavailable: no connection, or it was lost.
            FailedPrecondition: the log has no genesis event.
        """
        if not (isinstance(source, str) or callable(source)):
            if reconnect:
                raise InvalidArgument("a writer on a given connection cannot reconnect: pass reconnect=False")
            session = _session_on(source) if isinstance(source, AsyncConnection) else source
            return cls._started(session, await session.log_id(), None, on_head, unavailable_after_s, owns=False)
        connect = connector(source)
        try:
            conn = await connect()
        except psycopg.OperationalError as error:
            raise Unavailable(f"the log's database cannot be reached: {error}") from error
        try:
            session = _session_on(conn)
            log_id = await session.log_id()
        except BaseException:
            await conn.close()
            raise
        again = connect if reconnect else None
        return cls._started(session, log_id, again, on_head, unavailable_after_s, owns=True)

    @classmethod
    def _started(
        cls,
        session: Session,
        log_id: str,
        connect: Connect | None,
        on_head: OnHead | None,
        unavailable_after_s: float,
        owns: bool,
    ) -> "LogWriter":
        writer = cls(session, log_id, connect, on_head, unavailable_after_s)
        writer._owns_session = owns
        writer._start()
        return writer

    async def __aenter__(self) -> "LogWriter":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def queued_events(self) -> int:
        """Events that wait to be sent: a gauge for metrics."""
        return self._queued_events

    async def append(self, append: Append) -> int:
        """Append and return the position of the last event, once it is committed.

        A caller that is cancelled does not know the outcome.

        Raises:
            VersionConflict: a stream does not stand where the append expects it; nothing was written.
            Conflict: the stream has its terminal event already; nothing was written.
            InvalidArgument, PayloadTooLarge: it can never be stored.
            Unavailable: the database cannot be reached. Whether it was written is unknown.
        """
        self._check_open()
        prepared = _Pending(self.log_id, append, self._salts, self._loop.create_future())
        while self._queued_events >= QUEUE_EVENTS_MAX:
            self._room.clear()
            await self._room.wait()
            self._check_open()
        self._queue.append(prepared)
        self._queued_events += len(prepared.bodies)
        self._work.set()
        return await prepared.future

    async def close(self) -> None:
        """Write what is queued, if the database can be reached, then stop. Later appends raise Unavailable."""
        self._closing = True
        self._work.set()
        self._room.set()
        if self._drainer is not None:
            await self._drainer
        if self._notifier is not None:
            self._notifier.cancel()
        if self._owns_session and self._session is not None:
            await self._session.close()

    def _check_open(self) -> None:
        if self.failed.is_set():
            raise Unavailable("this log writer lost its connection")
        if self._closing:
            raise Unavailable("this log writer is closed")

    def _start(self) -> None:
        self._drainer = asyncio.create_task(self._drain(), name="log-writer")
        if self._on_head is not None:
            self._notifier = asyncio.create_task(self._notify(self._on_head), name="log-head")

    # --- draining ---

    async def _drain(self) -> None:
        try:
            while not self.failed.is_set() and (self._queue or not self._closing):
                batch = self._take_batch()
                if batch:
                    await self._commit(batch)
                else:
                    await self._wait_for_work()
        finally:
            # Whatever ended this task, nobody may wait for it for ever.
            self._closing = True
            self._fail_queued(Unavailable("this log writer is closed"))

    def _take_batch(self) -> list[_Pending]:
        # Callers that were just answered make their next events while the database works for the others. In one
        # batch for all of them either this process or the database would be idle at any time.
        outstanding = self._queued_events + self._answered_events
        share = (outstanding + 1) // 2 if outstanding >= HALVES_FROM_EVENTS else outstanding
        batch: list[_Pending] = []
        events = byte_count = 0
        while self._queue:
            append = self._queue[0]
            full = events >= share or events + len(append.bodies) > EVENTS_PER_CALL_MAX
            if batch and (full or byte_count + append.byte_count > BATCH_BYTES_MAX):
                break
            self._queue.popleft()
            self._queued_events -= len(append.bodies)
            if append.future.done():
                continue  # its caller gave up before it was sent
            batch.append(append)
            events += len(append.bodies)
            byte_count += append.byte_count
        self._answered_events = events
        self._room.set()
        return batch

    async def _wait_for_work(self) -> None:
        self._work.clear()
        if self._connect is not None:
            await self._work.wait()
            return
        try:
            async with asyncio.timeout(IDLE_PING_S):
                await self._work.wait()
        except TimeoutError:
            await self._ping()

    async def _ping(self) -> None:
        assert self._session is not None
        try:
            await self._session.ping()
        except psycopg.Error as error:
            if not is_lost(self._session, error):
                raise
            self._fail_for_good(error)

    # --- one batch ---

    async def _commit(self, batch: list[_Pending], resent: bool = False) -> None:
        until = asyncio.get_running_loop().time() + self._unavailable_after_s
        backoff_s = BACKOFF_MIN_S
        while True:
            session = self._session
            try:
                if session is None:
                    session = await self._open_again()
                await self._call_and_settle(session, batch, resent)
                return
            except psycopg.Error as error:
                if session is not None and not is_lost(session, error):
                    await self._refused(batch, error, resent)
                    return
                # The answer is lost, not necessarily the commit: the same bytes go again.
                resent = True
                self._session = None
                if not await self._may_retry(batch, error, until):
                    return
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _open_again(self) -> Session:
        assert self._connect is not None
        self._session = PostgresSession(await self._connect())
        return self._session

    async def _may_retry(self, batch: list[_Pending], error: psycopg.Error, until: float) -> bool:
        if self._connect is None:
            self._fail_for_good(error, batch)
            return False
        if asyncio.get_running_loop().time() < until and not self._closing:
            return True
        for append in batch:
            append.fail(Unavailable("the log's database cannot be reached; whether this was written is unknown"))
        return False

    async def _call_and_settle(self, session: Session, batch: list[_Pending], resent: bool) -> None:
        streams, answers = await session.append(batch)
        last = 0
        for append, (position, conflict_stream, actual) in zip(batch, answers, strict=True):
            if position:
                last = position
                self._new_types.update(append.types)
                append.resolve(position)
            elif not resent:
                append.fail(_conflict(append, streams[conflict_stream - 1], actual))
            else:
                own = await self._own_position(session, append)
                if own is None:
                    append.fail(_conflict(append, streams[conflict_stream - 1], actual))
                else:
                    append.resolve(own)
        self._moved(last)

    async def _own_position(self, session: Session, append: Prepared) -> int | None:
        """Return the last position of `append` if it is in the log from an earlier sending."""
        row = await session.stored(append.streams[0], append.versions[0])
        # The salt is random, so the same commitment is the same event; the others went in with it.
        if row is None or envelope_of(row[1]).payload_commit != append.commits[0].hex():
            return None
        position = row[0] + len(append.bodies) - 1
        self._new_types.update(append.types)
        self._moved(position)
        return position

    async def _refused(self, batch: list[_Pending], error: psycopg.Error, resent: bool) -> None:
        if isinstance(error, psycopg.OperationalError):
            for append in batch:
                append.fail(Unavailable(f"the database refused an append for now: {error}"))
        elif len(batch) == 1:
            batch[0].fail(_refusal(batch[0], error))
        else:
            # One guilty append failed the statement; alone it fails alone.
            for append in batch:
                await self._commit([append], resent)

    # --- the end, and the hint ---

    def _fail_for_good(self, error: psycopg.Error, batch: list[_Pending] | None = None) -> None:
        self.failed.set()
        self._room.set()
        lost = Unavailable(f"the log writer's connection was lost: {error}".rstrip())
        for append in batch or []:
            append.fail(lost)
        self._fail_queued(lost)

    def _fail_queued(self, error: Exception) -> None:
        while self._queue:
            self._queue.popleft().fail(error)
        self._queued_events = 0
        self._room.set()

    def _moved(self, position: int) -> None:
        if position > self.head:
            self.head = position
            self._head_moved.set()

    async def _notify(self, on_head: OnHead) -> None:
        while True:
            await self._head_moved.wait()
            self._head_moved.clear()
            types = tuple(sorted(packed[4:].decode() for packed in self._new_types))
            self._new_types.clear()
            task = asyncio.ensure_future(_told(on_head, self.head, types))
            await asyncio.wait({task})
            error = task.exception()
            if error is not None:
                logger.warning("the head hint at %d failed: %r", self.head, error)


def _session_on(conn: AsyncConnection[Any]) -> PostgresSession:
    if not conn.autocommit:
        raise InvalidArgument("a writer needs an autocommit connection: one statement, one transaction")
    return PostgresSession(conn)


async def _told(on_head: OnHead, position: int, types: tuple[str, ...]) -> None:
    answer = on_head(position, types)
    if inspect.isawaitable(answer):
        await answer


def _conflict(append: Prepared, stream: str, actual: int) -> VersionConflict:
    expected = append.expected[stream]
    return VersionConflict(
        f"stream {stream} stands at version {actual}, expected {expected}",
        stream=stream,
        expected=expected,
        actual=actual,
    )


def _refusal(append: Prepared, error: psycopg.Error) -> HiveError:
    if isinstance(error, psycopg.errors.UniqueViolation) and error.diag.constraint_name == TERMINAL_INDEX:
        streams = sorted(set(append.streams))
        return Conflict(f"of the streams {', '.join(streams)} one has ended already", streams=streams)
    return Internal(f"the database refused an append: {error}")
