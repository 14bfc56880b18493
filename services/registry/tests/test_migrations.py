"""Installations that are older than a migration."""

import shutil
from importlib.resources import files
from pathlib import Path

import psycopg
from hive_common.bus.jwt import new_seed, public_nkey
from hive_common.contracts.events import ExecutorEnrolled, encode
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.ids import new_id
from hive_common.ops.migrate import migrate
from hive_common.testing.fixtures import Database

MIGRATIONS = Path(str(files("hive_registry"))) / "migrations"


def first(count: int, folder: Path) -> Path:
    for file in sorted(MIGRATIONS.glob("*.sql"))[:count]:
        shutil.copy(file, folder)
    return folder


async def test_a_key_that_was_retired_before_says_whose_it_was(database: Database, tmp_path: Path) -> None:
    executor, owner, key = new_id(), new_id(), public_nkey(new_seed("user"))
    event = ExecutorEnrolled(name="laptop", public_key=key, owner=owner)
    async with await LogWriter.open(database.role_dsn("registry")) as writer:
        await writer.append(
            Append((NewEvent(executor, 1, "ExecutorEnrolled", 1, encode(event), 1, executor, owner),))
        )
    async with await psycopg.AsyncConnection.connect(database.role_dsn("registry"), autocommit=True) as conn:
        await migrate(conn, first(4, tmp_path), "registry")
        await conn.execute("INSERT INTO registry.retired_keys VALUES ('default', %s, 1)", (key,))
        await migrate(conn, MIGRATIONS, "registry")
        rows = await (await conn.execute("SELECT public_key, owner FROM registry.retired_keys")).fetchall()
    assert rows == [(key, owner)]
