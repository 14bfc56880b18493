"""A log of its own for a benchmark that is run alone."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
from hive_common.eventlog.log import create_log
from hive_common.eventlog.migrate import migrate_log
from hive_common.testing.postgres import EmbeddedPostgres


@asynccontextmanager
async def scratch_log() -> AsyncIterator[str]:
    """Start a server with an empty log; the superuser's connection string. Everything is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="hive-bench-") as folder:
        server = EmbeddedPostgres(Path(folder) / "pg")
        server.start()
        try:
            async with await psycopg.AsyncConnection.connect(server.dsn(), autocommit=True) as connection:
                await migrate_log(connection)
                await create_log(connection)
            yield server.dsn()
        finally:
            server.stop()
