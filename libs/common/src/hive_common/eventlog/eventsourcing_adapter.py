"""The `eventsourcing` library (9.5) on our log.

    PERSISTENCE_MODULE=hive_common.eventlog.eventsourcing_adapter

and the library's own `POSTGRES_*` settings, with the role of a service that may write the log. Aggregates written
with the library then put their events into the hash chain, and its subscriptions and projections read them from
there. It is synchronous and pays one transaction per save: for control-rate work, and for extensions.

How the library's terms map: the stored event's `originator_id` is the stream, `originator_version` the version,
`topic` the type (register short topics, a class path is not a stable name), `state` the payload, and the
notification id is the position. Snapshots and tracking are not history: they stay in tables of the library's own
making, in the service's schema (`POSTGRES_SCHEMA`).

It passes the library's own recorder tests, with these exceptions:

1. Positions start at 2, since the genesis event is at 1. The library's tests expect to start at 1; they are run
   through a subclass that takes one off. Real users see positions as they are.
2. A stream's first version is 1 (`HIVE_FIRST_VERSION=0` for aggregates that count from 0), and versions have no
   gaps. The library's tables take any number; a stream with a gap could not be checked for completeness.
3. Notifications come from the whole log, other services' events included: subscribe with `topics`.
4. `subscribe()` polls for the head (every 100 ms) instead of LISTEN: NOTIFY takes a lock through commit that every
   writer would wait for.
5. A call takes at most 1,000 events.
6. `aggregate_recorder()` gives the library's own recorder, as it is used for snapshots.
"""

import time
from collections.abc import Sequence
from threading import Event, Thread
from typing import Any, TypeVar
from uuid import UUID

from eventsourcing import persistence, postgres
from psycopg import Connection, sql
from psycopg.rows import DictRow, dict_row

from hive_common.eventlog import pgarrays
from hive_common.eventlog.batch import CALL, Prepared, Salts, parameters_of
from hive_common.eventlog.envelope import Append, NewEvent, envelope_of
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import HiveError

ATTEMPTS_MAX = 10
RETRY_S = 0.2
POLL_S = 0.1

_GENESIS = "SELECT event FROM log.events WHERE position = 1"
_MAX = "SELECT max(position) AS position FROM log.events"
_STORED = "SELECT position, event FROM log.events WHERE stream = %s AND version = %s"
_SELECT = sql.SQL(
    "SELECT e.position, e.stream, e.version, e.type, p.payload"
    " FROM log.events e LEFT JOIN log.payloads p ON p.position = e.position"
)


_R = TypeVar("_R", bound=persistence.ApplicationRecorder)


class HiveApplicationRecorder(postgres.PostgresApplicationRecorder):
    """Records an application's events in the log.

    Attributes:
        actor, owner, namespace: pseudonyms that stand in every envelope.
        first_version: the version with which the application's aggregates begin, 0 or 1.
    """

    def __init__(self, datastore: postgres.PostgresDatastore, *, events_table_name: str = "stored_events") -> None:
        super().__init__(datastore, events_table_name=events_table_name)
        # The log is there already, made by its migrations; the library must not make tables for events.
        self.sql_create_statements.clear()
        self.actor = "eventsourcing"
        self.owner = "system"
        self.namespace = "default"
        self.first_version = 1
        self._salts = Salts()
        self._log_id: str | None = None

    def insert_events(
        self, stored_events: Sequence[persistence.StoredEvent], **kwargs: Any
    ) -> Sequence[int] | None:
        """Append the events in one go, and return their positions.

        Raises:
            IntegrityError: another version of a stream, or tracking that is not ahead.
            OperationalError: the database cannot be reached; whether it was written is unknown.
        """
        prepared = self._prepare(stored_events) if stored_events else None
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                return self._insert_once(prepared, stored_events, kwargs)
            except persistence.IntegrityError:
                # Sent again after a lost answer, it may have met itself.
                own = self._own_positions(prepared) if prepared and attempt > 1 else None
                if own is None:
                    raise
                return own
            except (persistence.InterfaceError, persistence.OperationalError):
                if attempt == ATTEMPTS_MAX:
                    raise
                time.sleep(RETRY_S)
        raise AssertionError("unreachable")

    def _prepare(self, stored_events: Sequence[persistence.StoredEvent]) -> Prepared:
        now_us = SystemClock().now_us()
        events = tuple(
            NewEvent(
                stream=str(stored.originator_id),
                version=self._version_of(stored.originator_version),
                type=stored.topic,
                schema=1,
                payload=stored.state,
                ts_us=now_us,
                actor=self.actor,
                owner=self.owner,
                ns=self.namespace,
            )
            for stored in stored_events
        )
        try:
            return Prepared(self._read_log_id(), Append(events), self._salts)
        except HiveError as error:
            raise persistence.IntegrityError(error.message) from error

    def _insert_once(
        self,
        prepared: Prepared | None,
        stored_events: Sequence[persistence.StoredEvent],
        kwargs: dict[str, Any],
    ) -> Sequence[int] | None:
        with self.datastore.get_connection() as conn, conn.transaction():
            with conn.cursor() as cursor:
                self._insert_events(cursor, stored_events, **kwargs)  # tracking, in a process recorder
            return None if prepared is None else self._append(conn, prepared)

    def _append(self, conn: Connection[DictRow], prepared: Prepared) -> list[int]:
        pgarrays.register(conn)
        streams, parameters = parameters_of([prepared])
        with conn.cursor(binary=True, row_factory=dict_row) as cursor:
            row = cursor.execute(CALL, parameters, prepare=True).fetchone()
        assert row is not None
        last = row["positions"][0]
        if not last:
            stream = streams[row["conflict_streams"][0] - 1]
            raise persistence.IntegrityError(
                f"stream {stream} stands at version {row['actual_versions'][0]}, "
                f"expected {prepared.expected[stream]}"
            )
        return list(range(last - len(prepared.bodies) + 1, last + 1))

    def _own_positions(self, prepared: Prepared) -> list[int] | None:
        with self.datastore.get_connection() as conn, conn.cursor() as cursor:
            row = cursor.execute(_STORED, (prepared.streams[0], prepared.versions[0])).fetchone()
        if row is None or envelope_of(bytes(row["event"])).payload_commit != prepared.commits[0].hex():
            return None
        first = row["position"]
        return list(range(first, first + len(prepared.bodies)))

    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[persistence.StoredEvent]:
        """Return the events of one stream."""
        query = _SELECT + sql.SQL(" WHERE e.stream = %s")
        parameters: list[Any] = [str(originator_id)]
        if gt is not None:
            query += sql.SQL(" AND e.version > %s")
            parameters.append(self._version_of(gt))
        if lte is not None:
            query += sql.SQL(" AND e.version <= %s")
            parameters.append(self._version_of(lte))
        query += sql.SQL(" ORDER BY e.version DESC" if desc else " ORDER BY e.version")
        if limit is not None:
            query += sql.SQL(" LIMIT %s")
            parameters.append(limit)
        return [
            persistence.StoredEvent(
                originator_id=self._originator_of(row["stream"]),
                originator_version=self._originator_version_of(row["version"]),
                topic=row["type"],
                state=_state_of(row),
            )
            for row in self._fetch(query, parameters)
        ]

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[persistence.Notification]:
        """Return events of the whole log by position.

        Raises:
            DataError: the payload of one of them was erased. It is not skipped: its reader has to decide.
        """
        after = 0 if start is None else start - 1 if inclusive_of_start else start
        # Both sides have the range, as in `LogReader`: a page must not cost more the further back it lies.
        query = _SELECT + sql.SQL(" AND p.position > %s WHERE e.position > %s")
        parameters: list[Any] = [after, after]
        if stop is not None:
            query += sql.SQL(" AND e.position <= %s")
            parameters.append(stop)
        if topics:
            query += sql.SQL(" AND e.type = ANY(%s)")
            parameters.append(list(topics))
        query += sql.SQL(" ORDER BY e.position LIMIT %s")
        parameters.append(limit)
        return [
            persistence.Notification(
                id=row["position"],
                originator_id=self._originator_of(row["stream"]),
                originator_version=self._originator_version_of(row["version"]),
                topic=row["type"],
                state=_state_of(row),
            )
            for row in self._fetch(query, parameters)
        ]

    def max_notification_id(self) -> int | None:
        """Return the head of the log."""
        position: int | None = self._fetch(sql.SQL(_MAX), [])[0]["position"]
        return position

    def subscribe(
        self, gt: int | None = None, topics: Sequence[str] = ()
    ) -> persistence.Subscription[persistence.ApplicationRecorder]:
        """Return an iterator over what comes after `gt`, which waits for more at the end."""
        return HiveSubscription(recorder=self, gt=gt, topics=topics)

    def _fetch(self, query: sql.SQL | sql.Composed, parameters: list[Any]) -> list[DictRow]:
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                with self.datastore.get_connection() as conn, conn.cursor(binary=True) as cursor:
                    return cursor.execute(query, parameters).fetchall()
            except (persistence.InterfaceError, persistence.OperationalError):
                if attempt == ATTEMPTS_MAX:
                    raise
                time.sleep(RETRY_S)
        raise AssertionError("unreachable")

    def _read_log_id(self) -> str:
        if self._log_id is None:
            rows = self._fetch(sql.SQL(_GENESIS), [])
            if not rows:
                raise persistence.ProgrammingError("the log is empty: create_log() has to name it first")
            self._log_id = envelope_of(rows[0]["event"]).log
        return self._log_id

    def _version_of(self, originator_version: int) -> int:
        return originator_version + 1 - self.first_version

    def _originator_version_of(self, version: int) -> int:
        return version - 1 + self.first_version

    def _originator_of(self, stream: str) -> UUID | str:
        if self.datastore.originator_id_type == "text":
            return stream
        try:
            return UUID(stream)
        except ValueError:
            return stream  # another service's stream, which need not be a UUID


class HiveProcessRecorder(postgres.PostgresTrackingRecorder, HiveApplicationRecorder, persistence.ProcessRecorder):
    """Records events in the log and tracking in the service's schema, in one transaction."""

    def __init__(
        self,
        datastore: postgres.PostgresDatastore,
        *,
        events_table_name: str = "stored_events",
        tracking_table_name: str = "notification_tracking",
    ) -> None:
        super().__init__(datastore, tracking_table_name=tracking_table_name, events_table_name=events_table_name)

    def _insert_events(self, curs: Any, stored_events: Sequence[persistence.StoredEvent], **kwargs: Any) -> None:
        tracking: persistence.Tracking | None = kwargs.get("tracking")
        if tracking is not None:
            self._insert_tracking(curs, tracking)


class HiveSubscription(persistence.ListenNotifySubscription[HiveApplicationRecorder]):
    """Wakes the library's pull loop when the head has moved."""

    def __init__(
        self, recorder: HiveApplicationRecorder, gt: int | None = None, topics: Sequence[str] = ()
    ) -> None:
        super().__init__(recorder=recorder, gt=gt, topics=topics)
        self._ended = Event()
        self._head_thread = Thread(target=self._watch_head)
        self._head_thread.start()

    def stop(self) -> None:
        """Stop both threads and the iteration."""
        super().stop()
        ended: Event | None = getattr(self, "_ended", None)  # the base class may stop itself while it starts
        if ended is not None:
            ended.set()

    def __exit__(self, *args: object, **kwargs: Any) -> None:
        try:
            super().__exit__(*args, **kwargs)
        finally:
            self._head_thread.join()

    def _watch_head(self) -> None:
        seen: int | None = None
        try:
            while not (self._has_been_stopped or self._ended.wait(POLL_S)):
                head = self._recorder.max_notification_id()
                if head != seen:
                    seen = head
                    self._has_been_notified.set()
        except persistence.PersistenceError as error:
            if self._thread_error is None:
                self._thread_error = error
            self.stop()


class HiveFactory(postgres.PostgresFactory):
    """The infrastructure factory that the library finds in this module.

    Settings besides the library's: `HIVE_ACTOR`, `HIVE_OWNER`, `HIVE_NAMESPACE`, `HIVE_FIRST_VERSION`.
    """

    application_recorder_class = HiveApplicationRecorder
    process_recorder_class = HiveProcessRecorder  # type: ignore[assignment]

    def application_recorder(self) -> persistence.ApplicationRecorder:
        """Return a recorder of events in the log."""
        return self._described(super().application_recorder())

    def process_recorder(self) -> persistence.ProcessRecorder:
        """Return a recorder of events in the log, with tracking."""
        return self._described(super().process_recorder())

    def _described(self, recorder: _R) -> _R:
        assert isinstance(recorder, HiveApplicationRecorder)
        recorder.actor = self.env.get("HIVE_ACTOR") or self.env.name.lower() or recorder.actor
        recorder.owner = self.env.get("HIVE_OWNER") or recorder.owner
        recorder.namespace = self.env.get("HIVE_NAMESPACE") or recorder.namespace
        recorder.first_version = int(self.env.get("HIVE_FIRST_VERSION") or recorder.first_version)
        return recorder


def _state_of(row: DictRow) -> bytes:
    if row["payload"] is None:
        raise persistence.DataError(f"the payload at position {row['position']} was erased")
    return bytes(row["payload"])
