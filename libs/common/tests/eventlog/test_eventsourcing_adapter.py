"""The `eventsourcing` library's own recorder tests, run on our log.

Exceptions, each with its reason; nothing is skipped:

- The application tests see ids less by one (`_Shifted`): they start at 1, where our genesis event is.
- Some of them number aggregates from 0, others from 1: `first_version` is set to match (`HIVE_FIRST_VERSION`).
- `ProcessRecorderTestCase` numbers from 1 in one test and from 0 in another: likewise.
- The aggregate recorder is the library's own (it holds snapshots); its tests show that the factory leaves it whole.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar
from uuid import UUID, uuid4

import psycopg
import pytest
from eventsourcing import persistence
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    JSONTranscoder,
    Notification,
    StoredEvent,
    Tracking,
)
from eventsourcing.postgres import PostgresAggregateRecorder, PostgresDatastore, PostgresTrackingRecorder
from eventsourcing.tests import persistence as library
from eventsourcing.utils import Environment
from hive_common.eventlog.eventsourcing_adapter import (
    HiveApplicationRecorder,
    HiveFactory,
    HiveProcessRecorder,
)
from hive_common.eventlog.log import LogReader
from hive_common.testing.fixtures import Database
from psycopg.conninfo import conninfo_to_dict

MODULE = "hive_common.eventlog.eventsourcing_adapter"


def environment(database: Database, name: str = "") -> dict[str, str]:
    info = conninfo_to_dict(database.role_dsn("registry"))
    return {
        "PERSISTENCE_MODULE": MODULE,
        "POSTGRES_DBNAME": str(info["dbname"]),
        "POSTGRES_HOST": str(info["host"]),
        "POSTGRES_PORT": str(info["port"]),
        "POSTGRES_USER": str(info["user"]),
        "POSTGRES_PASSWORD": str(info["password"]),
        "POSTGRES_SCHEMA": "registry",
    }


@pytest.fixture
def datastore(database: Database) -> Iterator[PostgresDatastore]:
    info = conninfo_to_dict(database.role_dsn("registry"))
    with PostgresDatastore(
        str(info["dbname"]),
        str(info["host"]),
        str(info["port"]),
        str(info["user"]),
        str(info["password"]),
        schema="registry",
        pool_size=2,
        max_overflow=12,
    ) as store:
        yield store


class _OnOurLog:
    """Gives the library's unittest classes our fixtures."""

    datastore: PostgresDatastore
    database: Database

    @pytest.fixture(autouse=True)
    def _fixtures(self, datastore: PostgresDatastore, database: Database) -> None:
        self.datastore = datastore
        self.database = database


class _Shifted(HiveApplicationRecorder):
    """Numbers as if there were no genesis event."""

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        positions = super().insert_events(stored_events, **kwargs)
        return positions and [position - 1 for position in positions]

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:
        found = super().select_notifications(
            2 if start is None else max(start + 1, 1 if not inclusive_of_start else 2),
            limit,
            None if stop is None else stop + 1,
            topics,
            inclusive_of_start=inclusive_of_start,
        )
        return [Notification(n.originator_id, n.originator_version, n.topic, n.state, n.id - 1) for n in found]

    def max_notification_id(self) -> int | None:
        head = super().max_notification_id()
        return None if head is None or head == 1 else head - 1


class TestApplicationRecorder(_OnOurLog, library.ApplicationRecorderTestCase[HiveApplicationRecorder]):
    COUNT_FROM_ZERO: ClassVar = {"test_concurrent_no_conflicts", "test_concurrent_throughput"}

    def create_recorder(self) -> HiveApplicationRecorder:
        recorder = _Shifted(self.datastore)
        recorder.first_version = 0 if self._testMethodName in self.COUNT_FROM_ZERO else 1
        return recorder

    def test_insert_subscribe(self) -> None:
        self.optional_test_insert_subscribe()


class TestNonInterleavingPositions(_OnOurLog, library.NonInterleavingNotificationIDsBaseCase):
    def create_recorder(self) -> HiveApplicationRecorder:
        recorder = HiveApplicationRecorder(self.datastore)
        recorder.first_version = 0
        return recorder


class TestTrackingRecorder(_OnOurLog, library.TrackingRecorderTestCase):
    def create_recorder(self) -> persistence.TrackingRecorder:
        recorder = HiveProcessRecorder(self.datastore)
        recorder.create_table()
        return recorder


class TestProcessRecorder(_OnOurLog, library.ProcessRecorderTestCase):
    def create_recorder(self) -> persistence.ProcessRecorder:
        recorder = HiveProcessRecorder(self.datastore)
        recorder.first_version = 0 if self._testMethodName == "test_performance" else 1
        recorder.create_table()
        return recorder


class TestAggregateRecorder(_OnOurLog, library.AggregateRecorderTestCase):
    factory: HiveFactory

    def create_recorder(self) -> persistence.AggregateRecorder:
        self.factory = HiveFactory(Environment(env=environment(self.database)))
        return self.factory.aggregate_recorder("snapshots")

    def tearDown(self) -> None:
        self.factory.close()


class _TrackingSubclass(PostgresTrackingRecorder):
    pass


class TestFactory(_OnOurLog, library.InfrastructureFactoryTestCase[HiveFactory]):
    def setUp(self) -> None:
        self.env = Environment(env=environment(self.database))
        super().setUp()

    def expected_factory_class(self) -> type[HiveFactory]:
        return HiveFactory

    def expected_aggregate_recorder_class(self) -> type[persistence.AggregateRecorder]:
        return PostgresAggregateRecorder

    def expected_application_recorder_class(self) -> type[persistence.ApplicationRecorder]:
        return HiveApplicationRecorder

    def expected_tracking_recorder_class(self) -> type[persistence.TrackingRecorder]:
        return PostgresTrackingRecorder

    def tracking_recorder_subclass(self) -> type[persistence.TrackingRecorder]:
        return _TrackingSubclass

    def expected_process_recorder_class(self) -> type[persistence.ProcessRecorder]:
        return HiveProcessRecorder


# --- what the library's tests do not ask ---


class Dog(Aggregate):
    @event("Registered")
    def __init__(self, name: str) -> None:
        self.name = name
        self.tricks: list[str] = []

    @event("TrickAdded")
    def add_trick(self, trick: str) -> None:
        self.tricks.append(trick)


class Kennel(Application[UUID]):
    is_snapshotting_enabled = True

    def register_transcodings(self, transcoder: persistence.Transcoder) -> None:
        assert isinstance(transcoder, JSONTranscoder)
        super().register_transcodings(transcoder)


async def test_library_application_writes_into_the_chain(database: Database) -> None:
    app = Kennel(env=environment(database))
    dog = Dog("Fido 🐕")
    app.save(dog)
    dog.add_trick("roll over")
    app.save(dog)
    app.take_snapshot(dog.id)
    assert app.repository.get(dog.id).tricks == ["roll over"]
    app.close()
    async with LogReader(database.role_dsn("audit")) as reader:
        events = await reader.read(1)
    assert [(stored.position, stored.stream, stored.version) for stored in events] == [
        (2, str(dog.id), 1),
        (3, str(dog.id), 2),
    ]
    assert events[0].actor == "kennel"


def test_process_recorder_writes_neither_events_nor_tracking_when_one_fails(
    datastore: PostgresDatastore,
) -> None:
    recorder = HiveProcessRecorder(datastore)
    recorder.create_table()
    stream = uuid4()
    recorder.insert_events([StoredEvent(stream, 1, "a", b"1")], tracking=Tracking("up", 5))
    with pytest.raises(IntegrityError):
        recorder.insert_events([StoredEvent(stream, 1, "a", b"1")], tracking=Tracking("up", 6))
    assert recorder.max_tracking_id("up") == 5
    with pytest.raises(IntegrityError):
        recorder.insert_events([StoredEvent(stream, 2, "a", b"1")], tracking=Tracking("up", 5))
    assert len(recorder.select_events(stream)) == 1


def test_gap_in_versions_is_refused(datastore: PostgresDatastore) -> None:
    recorder = HiveApplicationRecorder(datastore)
    with pytest.raises(IntegrityError):
        recorder.insert_events([StoredEvent(uuid4(), 2, "a", b"1")])


def test_erased_payload_is_reported_and_not_skipped(datastore: PostgresDatastore, database: Database) -> None:
    recorder = HiveApplicationRecorder(datastore)
    recorder.insert_events([StoredEvent(uuid4(), 1, "a", b"1")])
    with psycopg.connect(database.dsn, autocommit=True) as conn:
        conn.execute("DELETE FROM log.payloads WHERE position = 2")
    with pytest.raises(DataError, match="position 2"):
        recorder.select_notifications(start=2, limit=10)
