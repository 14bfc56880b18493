"""Migration of the log itself. `hive_common.ops.migrate` does the work, also for every service's own schema."""

from importlib.resources import files
from typing import Any

from psycopg import AsyncConnection

from hive_common.ops.migrate import Migration, migrate

__all__ = ["LOG_SCHEMA", "Migration", "migrate", "migrate_log"]

LOG_SCHEMA = "log"


async def migrate_log(conn: AsyncConnection[Any]) -> list[str]:
    """Bring the schema `log` up to date. Needs a superuser, for the roles it makes."""
    return await migrate(conn, files("hive_common.eventlog") / "migrations", LOG_SCHEMA)
