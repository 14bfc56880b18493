"""A made-up Postgres: the log in memory behind a wire, the leader's lock, and views that lag."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from hive_common.eventlog.batch import Prepared
from hive_common.eventlog.log import LogReader, LogWriter, Stored
from hive_common.eventlog.projection import Source
from hive_common.eventlog.session import Answer
from hive_common.eventlog.writer import OnHead
from hive_common.kernel.errors import Unavailable
from hive_common.kernel.ids import new_id
from hive_common.testing.memory_log import TERMINAL_TYPES, MemoryLog, MemoryReader
from hive_scheduler import leadership
from hive_scheduler.domain.reputation import Book
from hive_scheduler.recovery import Fold

from .loop import Process, VirtualLoop

PATIENCE_S = 10.0
"""`tcp_user_timeout` of the connection, and `idle_session_timeout` of the leader's session."""


class Server:
    """The database.

    Attributes:
        epoch: of the last one who took the lead.
        views_position: up to which the views know the log.
        answers_lost: share of appends that are done and whose answer is lost with the connection.
        requests_lost: share of those that are not done.
    """

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.log = MemoryLog(new_id(1))
        self.holder: Session | None = None
        self.epoch = 0
        self.views_position = 0
        self.answers_lost = 0.0
        self.requests_lost = 0.0
        self.views_delay_s = 0.0
        self.on_lock: Callable[[Process], None] | None = None
        """Is told of the next one who gets the lock."""
        self.writing: Session | None = None
        """Whose append is being committed."""

    def wire_s(self) -> float:
        """Return how long one way takes."""
        return self.rng.uniform(0.0001, 0.001)

    def end(self, session: "Session") -> None:
        """End a session, and with it its lock."""
        session.ended = True
        if self.holder is session:
            self.holder = None


class Wire:
    """Between one machine and the database. `cut_until_s`: nothing goes through before."""

    def __init__(self) -> None:
        self.cut_until_s = 0.0


class Session:
    """A session of one process: what the writer needs, and what the leader's lock needs.

    Attributes:
        ended: the server has ended it.
        closed: its client knows.
    """

    def __init__(self, server: Server, process: Process, wire: Wire) -> None:
        self._server = server
        self.process = process
        self._wire = wire
        self.ended = False
        self.closed = False
        self.epoch = 0
        self._arrival_s = 0.0
        self._heard_s = server.loop.time()
        self._idle_max = False

    # --- the wire ---

    async def _trip(self, work: Callable[[], Any], is_append: bool = False) -> Any:
        """Have the server do something, and return what it answers."""
        server, loop = self._server, self._server.loop
        if self.closed:
            raise psycopg.OperationalError("the connection is closed")
        answer: asyncio.Future[Any] = loop.create_future()
        fate = server.rng.random() if is_append else 1.0
        request_lost = fate < server.requests_lost
        answer_lost = not request_lost and fate < server.requests_lost + server.answers_lost
        at_s = max(loop.time(), self._wire.cut_until_s, self._arrival_s) + server.wire_s()
        self._arrival_s = at_s
        if at_s - loop.time() < PATIENCE_S:
            loop.call_at(at_s, self._arrive, work, answer, request_lost, answer_lost, context=loop.world)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await answer
        except TimeoutError as error:
            await self.close()
            raise psycopg.OperationalError("no answer: the connection is given up") from error
        except psycopg.OperationalError:
            await self.close()
            raise

    def _arrive(
        self, work: Callable[[], Any], answer: "asyncio.Future[Any]", request_lost: bool, answer_lost: bool
    ) -> None:
        server, loop = self._server, self._server.loop
        if self.ended or request_lost:
            server.end(self)
            self._answer(answer, None, psycopg.OperationalError("the connection was reset"))
            return
        self._heard_s = loop.time()
        value, error = None, None
        server.writing = self
        try:
            value = work()
        except psycopg.Error as failure:
            error = failure
        finally:
            server.writing = None
        if answer_lost:
            server.end(self)
            value, error = None, psycopg.OperationalError("the connection was reset")
        self._answer(answer, value, error)

    def _answer(self, answer: "asyncio.Future[Any]", value: Any, error: Exception | None) -> None:
        def give() -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        loop = self._server.loop
        at_s = max(loop.time(), self._wire.cut_until_s) + self._server.wire_s()
        loop.call_at(at_s, give, context=self.process.context)

    def die(self) -> None:
        """End because the process has: after what it had sent before."""
        loop = self._server.loop
        at_s = max(loop.time() + self._server.wire_s(), self._arrival_s + 1e-6, self._wire.cut_until_s)
        loop.call_at(at_s, self._server.end, self, context=loop.world)

    def _watch_idle(self) -> None:
        loop = self._server.loop
        if self.ended:
            return
        if loop.time() - self._heard_s > PATIENCE_S - 1e-6:
            self._server.end(self)
        else:
            loop.call_at(self._heard_s + PATIENCE_S, self._watch_idle, context=loop.world)

    # --- the leader's lock (hive_scheduler.leadership) ---

    async def execute(self, query: str, parameters: Any = ()) -> "_Row":
        """Answer the statements of `leadership.contend`."""
        if query == leadership._LOCK:
            return _Row((await self._trip(self._lock),))
        if query == leadership._EPOCH:
            return _Row((await self._trip(self._next_epoch),))
        assert query == f"SET idle_session_timeout = {leadership.SESSION_IDLE_MAX_MS}", query
        await self._trip(self._watch_idle)
        return _Row(())

    def _lock(self) -> bool:
        server = self._server
        if server.holder is None:
            server.holder = self
            if server.on_lock is not None:
                server.loop.call_soon(server.on_lock, self.process, context=server.loop.world)
                server.on_lock = None
        return server.holder is self

    def _next_epoch(self) -> int:
        self._server.epoch += 1
        self.epoch = self._server.epoch
        return self.epoch

    # --- the writer's session (hive_common.eventlog.session.Session) ---

    async def log_id(self) -> str:
        """Return the log's id."""
        return str(await self._trip(lambda: self._server.log.log_id))

    async def append(self, batch: Sequence[Prepared]) -> tuple[list[str], list[Answer]]:
        """Append."""
        found: tuple[list[str], list[Answer]] = await self._trip(
            lambda: self._server.log.log_append(batch), is_append=True
        )
        return found

    async def stored(self, stream: str, version: int) -> tuple[int, bytes] | None:
        """Return an event."""
        raise AssertionError("the leader's writer never sends a second time")

    async def ping(self) -> None:
        """Ask for nothing."""
        await self._trip(lambda: None)

    async def close(self) -> None:
        """End it."""
        if not self.closed:
            self.closed = True
            self.die()


class _Row:
    def __init__(self, row: Any) -> None:
        self._row = row

    async def fetchone(self) -> Any:
        return self._row


class Reader(MemoryReader):
    """A reader behind the wire."""

    def __init__(self, server: Server, wire: Wire) -> None:
        super().__init__(server.log)
        self._server = server
        self._wire = wire

    async def reached(self) -> None:
        """Take the time of the way, or fail."""
        loop = self._server.loop
        late_s = self._wire.cut_until_s - loop.time()
        await asyncio.sleep(min(max(late_s, 0.0), PATIENCE_S) + 2 * self._server.wire_s())
        if late_s > PATIENCE_S:
            raise Unavailable("the log's database cannot be reached")


class Views:
    """Keeps the views (hive_scheduler.database.Views), and checks what it is fed with against the log."""

    def __init__(self, server: Server, source: Source, wake: asyncio.Event) -> None:
        self._server = server
        self._source = source
        self._wake = wake
        self.head = 0
        self.position = 0

    @property
    def lag(self) -> int:
        """How many positions the views are behind."""
        return max(0, self.head - self.position)

    async def wait_for(self, position: int) -> None:
        """Nobody asks."""
        raise AssertionError

    async def run(self) -> None:
        """Follow."""
        server = self._server
        while True:
            written = self.position = server.views_position
            async for scan in self._source.scans(written, wake=self._wake, limit=2_000):
                await asyncio.sleep(server.rng.random() * server.views_delay_s)
                if server.views_position != written:
                    break  # another runner of this projection is at work
                self._check(scan.events, written)
                self.head = self.position = server.views_position = written = scan.through
            await asyncio.sleep(0.5)

    def _check(self, events: list[Stored], after: int) -> None:
        for offset, event in enumerate(events):
            stored = self._server.log.events[after + offset]
            same = (event.position, event.stream, event.version, event.type, event.payload)
            assert same == (stored.position, stored.stream, stored.version, stored.type, stored.payload), (
                f"the views were fed {same[:4]} where the log has {stored.position, stored.stream, stored.type}"
            )


class OpenJobs:
    """What the views know of open jobs (hive_scheduler.recovery.OpenJobs)."""

    def __init__(self, session: Session, server: Server) -> None:
        self._session = session
        self._server = server

    async def load(self, fold: Fold) -> int:
        """Give the events of jobs that were open, as of where the views stand."""
        position, found = await self._session._trip(self._look)
        for events in found:
            fold.apply(events)
        return int(position)

    def _look(self) -> tuple[int, list[list[Stored]]]:
        position = self._server.views_position
        by_job: dict[str, list[Stored]] = {}
        for event in self._server.log.events[:position]:
            if event.correlation:
                by_job.setdefault(event.correlation, []).append(event)
        ended = {event.stream for event in self._server.log.events[:position] if event.type in TERMINAL_TYPES}
        return position, [events for job, events in by_job.items() if job not in ended]


class Records:
    """An empty table of reputation (hive_scheduler.reputation.Records)."""

    async def load(self, ns: str) -> tuple[int, dict[str, Book]]:
        """Return nothing, as of the log's beginning."""
        return 0, {}


class Following:
    """Never runs far enough to write anything (hive_scheduler.database.Following)."""

    async def run(self) -> None:
        """Wait."""
        await asyncio.Event().wait()


class _Queries:
    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass


class Database:
    """The scheduler's port (hive_scheduler.database.Database)."""

    def __init__(self, session: Session, server: Server, wire: Wire) -> None:
        self._session = session
        self._server = server
        self._wire = wire

    async def writer(self, on_head: OnHead) -> LogWriter:
        """Return a writer on the session that holds the lock."""
        return await LogWriter.open(self._session, on_head=on_head, reconnect=False)

    def reader(self) -> Reader:
        """Return a reader."""
        return Reader(self._server, self._wire)

    def open_jobs(self) -> OpenJobs:
        """Return what the views know."""
        return OpenJobs(self._session, self._server)

    def views(self, source: Source, wake: asyncio.Event) -> Views:
        """Return what keeps the views."""
        return Views(self._server, source, wake)

    def records(self) -> Records:
        """Return a table in which nothing is written yet: each leader folds the whole log."""
        return Records()

    def reputation(self, reader: LogReader) -> Following:
        """Return what never gets to write it."""
        return Following()

    def queries(self, ns: str) -> Any:
        """Nobody asks."""
        return _Queries()

    async def close(self) -> None:
        """Let go of the lock."""
        await self._session.close()
