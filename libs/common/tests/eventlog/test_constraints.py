"""The database's own layer of laws 2 and 10: what its constraints refuse from anybody, `log_append` or not."""

from collections.abc import Callable

import psycopg
import pytest
from hive_common.eventlog.log import Append, LogWriter
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database
from psycopg import errors

COPY = """
INSERT INTO log.events
SELECT position + 1, stream, {version}, {type}, event, hash FROM log.events ORDER BY position DESC LIMIT 1
"""


@pytest.mark.parametrize(
    "end", ["TaskSucceeded", "TaskFailed", "TaskCancelled", "JobSucceeded", "JobFailed", "JobCancelled"]
)
async def test_a_second_end_is_refused_from_the_superuser_too(
    database: Database, new_append: Callable[..., Append], end: str
) -> None:
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        await writer.append(new_append(new_id(), type=end))
    async with await psycopg.AsyncConnection.connect(database.dsn) as conn:
        with pytest.raises(errors.UniqueViolation, match="events_terminal"):
            await conn.execute(COPY.format(version="version + 1", type="type"))


async def test_a_version_that_is_taken_is_refused_from_the_superuser_too(
    database: Database, new_append: Callable[..., Append]
) -> None:
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        await writer.append(new_append(new_id()))
    async with await psycopg.AsyncConnection.connect(database.dsn) as conn:
        with pytest.raises(errors.UniqueViolation, match="events_stream_version"):
            await conn.execute(COPY.format(version="version", type="type"))
