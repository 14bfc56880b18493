"""What the tests of the log share."""

from collections.abc import Callable
from typing import Any

import pytest
from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent
from hive_common.testing.fixtures import Database
from hive_common.testing.memory_log import MemoryLog, MemoryReader, MemorySession


class PostgresLog:
    """The log in a database of its own."""

    def __init__(self, database: Database) -> None:
        self._dsn = database.role_dsn("scheduler")
        self.log_id = database.log_id

    async def writer(self, **options: Any) -> LogWriter:
        return await LogWriter.open(self._dsn, **options)

    def reader(self) -> LogReader:
        return LogReader(self._dsn)


class InMemory:
    """The log in memory, as simulations have it."""

    def __init__(self) -> None:
        self._log = MemoryLog()
        self.log_id = self._log.log_id

    async def writer(self, **options: Any) -> LogWriter:
        return await LogWriter.open(MemorySession(self._log), reconnect=False, **options)

    def reader(self) -> LogReader:
        return MemoryReader(self._log)


@pytest.fixture(params=["postgres", "memory"])
def log(request: pytest.FixtureRequest) -> PostgresLog | InMemory:
    """Each of the logs that there are: what is said of one holds for the others."""
    return InMemory() if request.param == "memory" else PostgresLog(request.getfixturevalue("database"))


def event(stream: str, version: int = 1, type: str = "TaskCreated", **fields: object) -> NewEvent:
    values = {"schema": 1, "payload": b'{"n":1}', "ts_us": 1, "actor": "a", "owner": "o", **fields}
    return NewEvent(stream=stream, version=version, type=type, **values)  # type: ignore[arg-type]


@pytest.fixture
def new_append() -> Callable[..., Append]:
    def build(stream: str, version: int = 1, type: str = "TaskCreated", **fields: object) -> Append:
        return Append((event(stream, version, type, **fields),))

    return build
