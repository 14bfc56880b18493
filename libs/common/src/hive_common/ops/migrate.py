"""Numbered SQL migrations, one transaction each, for the log and for every service's own schema.

Files are named `0001_what_it_does.sql`. What was applied stands in `<schema>.migrations` with the SHA-256
of the file; a file that changed afterwards is an error, since nobody knows any more what the database has.
"""

import hashlib
import re
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from psycopg import AsyncConnection, sql

from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import FailedPrecondition

_NAME = re.compile(r"(?P<number>[0-9]{4})_(?P<name>[a-z0-9_]+)\.sql")
# Migrations of different services run side by side; those of one schema wait for each other.
_LOCK = "SELECT pg_advisory_lock(hashtextextended('hive.migrate.' || %s, 0))"
_UNLOCK = "SELECT pg_advisory_unlock(hashtextextended('hive.migrate.' || %s, 0))"


@dataclass(frozen=True)
class Migration:
    """One numbered file."""

    number: int
    name: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Hex digest of the file."""
        return hashlib.sha256(self.content).hexdigest()


async def migrate(conn: AsyncConnection[Any], package_migrations: Path | Traversable, schema: str) -> list[str]:
    """Apply what is missing from the folder `package_migrations` to `schema`, and return its names.

    The schema is made when it is not there. A migration that fails leaves nothing behind.

    Args:
        conn: an autocommit connection of the schema's owner.
        package_migrations: a folder of numbered files, 0001 first, without gaps.
        schema: also the home of the table `migrations`.

    Raises:
        FailedPrecondition: a file was changed or removed after it was applied, or the numbers have a gap.
    """
    if not conn.autocommit:
        raise FailedPrecondition("migrate needs an autocommit connection: each file is its own transaction")
    migrations = _load(package_migrations)
    await conn.execute(_LOCK, (schema,))
    try:
        await _ensure_table(conn, schema)
        applied = await _applied(conn, schema)
        _check(applied, migrations, schema)
        missing = [migration for migration in migrations if migration.number not in applied]
        for migration in missing:
            await _apply(conn, schema, migration)
    finally:
        if not conn.closed:
            await conn.execute(_UNLOCK, (schema,))
    return [f"{migration.number:04}_{migration.name}" for migration in missing]


def _load(folder: Path | Traversable) -> list[Migration]:
    found = []
    for entry in folder.iterdir():
        if not entry.name.endswith(".sql"):
            continue
        match = _NAME.fullmatch(entry.name)
        if match is None:
            raise FailedPrecondition(f"{folder}/{entry.name}: expected a name such as 0001_first.sql")
        found.append(Migration(int(match["number"]), match["name"], entry.read_bytes()))
    found.sort(key=lambda migration: migration.number)
    numbers = [migration.number for migration in found]
    if numbers != list(range(1, len(found) + 1)):
        raise FailedPrecondition(f"{folder}: expected files numbered 1 to {len(found)}, found {numbers}")
    return found


async def _ensure_table(conn: AsyncConnection[Any], schema: str) -> None:
    exists = await (await conn.execute("SELECT to_regnamespace(%s) IS NOT NULL", (schema,))).fetchone()
    # IF NOT EXISTS would not do: it asks for the right to create schemas also where there is nothing to do.
    if exists is None or not exists[0]:
        await conn.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    await conn.execute(
        sql.SQL(
            "CREATE TABLE IF NOT EXISTS {} (number integer PRIMARY KEY, name text NOT NULL,"
            " sha256 text NOT NULL, applied_us bigint NOT NULL)"
        ).format(_table(schema))
    )


async def _applied(conn: AsyncConnection[Any], schema: str) -> dict[int, tuple[str, str]]:
    query = sql.SQL("SELECT number, name, sha256 FROM {} ORDER BY number").format(_table(schema))
    rows = await (await conn.execute(query)).fetchall()
    return {number: (name, sha256) for number, name, sha256 in rows}


def _check(applied: dict[int, tuple[str, str]], migrations: list[Migration], schema: str) -> None:
    known = {migration.number: migration for migration in migrations}
    for number, (name, sha256) in applied.items():
        migration = known.get(number)
        if migration is None:
            raise FailedPrecondition(
                f"schema {schema}: migration {number:04}_{name} was applied by a newer version than this one"
            )
        if migration.sha256 != sha256:
            raise FailedPrecondition(
                f"schema {schema}: migration {number:04}_{name}.sql changed after it was applied "
                f"(applied {sha256[:12]}…, now {migration.sha256[:12]}…); write a new one instead"
            )


async def _apply(conn: AsyncConnection[Any], schema: str, migration: Migration) -> None:
    insert = sql.SQL("INSERT INTO {} VALUES (%s, %s, %s, %s)").format(_table(schema))
    async with conn.transaction():
        await conn.execute(migration.content)
        row = (migration.number, migration.name, migration.sha256, SystemClock().now_us())
        await conn.execute(insert, row)


def _table(schema: str) -> sql.Identifier:
    return sql.Identifier(schema, "migrations")
