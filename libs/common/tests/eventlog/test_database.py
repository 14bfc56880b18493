"""What the database itself guarantees: roles, triggers, migrations, provisioning."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hive_common.eventlog.genesis import create_log
from hive_common.eventlog.log import Append, LogReader, LogWriter
from hive_common.eventlog.migrate import migrate, migrate_log
from hive_common.eventlog.reader import _read_query
from hive_common.eventlog.roles import READERS, SERVICES, provision
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database
from psycopg import AsyncConnection, errors, sql

NewAppend = Callable[..., Append]
WRITES = [
    "INSERT INTO log.events VALUES (2, 's', 1, 'T', '\\x7b7d', sha256('x'))",
    "UPDATE log.events SET type = 'Other'",
    "DELETE FROM log.events",
    "TRUNCATE log.events",
    "INSERT INTO log.payloads VALUES (2, 'x', sha256('x'))",
    "UPDATE log.payloads SET payload = 'x'",
    "DELETE FROM log.payloads",
    "TRUNCATE log.payloads",
    "SELECT log.log_create('s', 'x', 'x', sha256('x'))",
    "ALTER TABLE log.events DISABLE TRIGGER ALL",
    "DROP TABLE log.payloads",
    "SET ROLE hive_log_owner",
]


async def connect(dsn: str) -> AsyncConnection:
    return await AsyncConnection.connect(dsn, autocommit=True)


@pytest.mark.parametrize("service", SERVICES)
async def test_service_roles_cannot_touch_the_log_past_log_append(database: Database, service: str) -> None:
    async with await connect(database.role_dsn(service)) as conn:
        for statement in WRITES:
            with pytest.raises(errors.InsufficientPrivilege):
                await conn.execute(statement)
        assert await (await conn.execute("SELECT count(*) FROM log.events")).fetchone() == (1,)


@pytest.mark.parametrize("service", READERS)
async def test_readers_cannot_append(database: Database, service: str, new_append: NewAppend) -> None:
    async with await connect(database.role_dsn(service)) as conn:
        with pytest.raises(errors.InsufficientPrivilege):
            await conn.execute("SELECT log.log_append('{}','{}','{}','{}','{}','{}','{}','{}','{}','{}','{}')")


@pytest.mark.parametrize("replication_role", ["origin", "replica", "local"])
async def test_triggers_hold_for_the_superuser_in_every_replication_role(
    database: Database, replication_role: str
) -> None:
    async with await connect(database.dsn) as conn:
        await conn.execute(f"SET session_replication_role = {replication_role}")
        for statement in (
            "UPDATE log.events SET type = 'Other'",
            "UPDATE log.events SET hash = hash WHERE position = 99",
            "DELETE FROM log.events",
            "TRUNCATE log.events",
            "TRUNCATE log.events CASCADE",
            "UPDATE log.payloads SET payload = 'x'",
            "TRUNCATE log.payloads",
        ):
            with pytest.raises(errors.InsufficientPrivilege, match="append-only"):
                await conn.execute(statement)


@pytest.mark.parametrize(
    "row",
    [
        "(0, 's', 1, 'T', '\\x7b7d', sha256('x'))",
        "(2, '', 1, 'T', '\\x7b7d', sha256('x'))",
        "(2, 's', 0, 'T', '\\x7b7d', sha256('x'))",
        "(2, 's', 1, '', '\\x7b7d', sha256('x'))",
        "(2, 's', 1, 'T', '\\x7b7d', 'short')",
        "(2, 's', 1, 'T', '', sha256('x'))",
    ],
)
async def test_rows_that_make_no_sense_are_refused_even_from_the_owner(database: Database, row: str) -> None:
    async with await connect(database.dsn) as conn:
        with pytest.raises(errors.CheckViolation):
            await conn.execute(f"INSERT INTO log.events VALUES {row}")
        with pytest.raises(errors.CheckViolation):
            await conn.execute("INSERT INTO log.payloads VALUES (2, 'x', 'short salt')")


async def test_services_own_their_schema_and_cannot_see_anothers(database: Database) -> None:
    async with (
        await connect(database.role_dsn("registry")) as registry,
        await connect(database.role_dsn("scheduler")) as scheduler,
    ):
        await registry.execute("CREATE TABLE registry.executors (id text)")
        for statement in (
            "SELECT * FROM registry.executors",
            "CREATE TABLE registry.x (id text)",
            "CREATE TABLE public.x (id text)",
            "CREATE SCHEMA extra",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                await scheduler.execute(statement)


async def test_provisioning_again_sets_new_passwords_and_keeps_the_rest(empty_database: Database) -> None:
    # In a database of its own: the roles are the cluster's, so their passwords are put back at the end.
    async with await connect(empty_database.dsn) as admin:
        await migrate_log(admin)
        log_id = await create_log(admin)
        query = "SELECT rolname, rolpassword FROM pg_authid WHERE rolname = 'hive_audit'"
        before = await (await admin.execute(query)).fetchone()
        await provision(admin, {"audit": "first"})
        await provision(admin, {"audit": "second"})
        try:
            dsn = empty_database.server.dsn(empty_database.name, user="hive_audit", password="second")
            async with LogReader(dsn) as reader:
                assert await reader.log_id() == log_id
            with pytest.raises(psycopg.OperationalError):
                await connect(empty_database.server.dsn(empty_database.name, user="hive_audit", password="first"))
        finally:
            if before is not None:
                await admin.execute(f"ALTER ROLE hive_audit PASSWORD '{before[1]}'")
        with pytest.raises(InvalidArgument, match="mailer"):
            await provision(admin, {"mailer": "x"})


async def test_the_server_is_of_the_release_that_is_shipped(database: Database) -> None:
    async with await connect(database.dsn) as admin:
        assert admin.info.server_version // 10_000 == 18


async def test_log_is_created_once_whoever_tries(empty_database: Database) -> None:
    async with await connect(empty_database.dsn) as first, await connect(empty_database.dsn) as second:
        await asyncio.gather(migrate_log(first), migrate_log(second))
        ids = await asyncio.gather(create_log(first), create_log(second))
        assert ids[0] == ids[1] == await create_log(first)
        assert await (await first.execute("SELECT count(*) FROM log.events")).fetchone() == (1,)


async def test_appends_on_an_old_snapshot_are_refused(database: Database) -> None:
    async with await connect(database.role_dsn("scheduler")) as conn:
        await conn.execute("SET default_transaction_isolation = 'repeatable read'")
        with pytest.raises(errors.InvalidTransactionState):
            await conn.execute("SELECT log.log_append('{}','{}','{}','{}','{}','{}','{}','{}','{}','{}','{}')")


# --- migrations ---


async def test_migrations_are_applied_once_and_in_order(empty_database: Database, tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "0001_first.sql").write_text("CREATE TABLE app.a (n int); INSERT INTO app.a VALUES (1);")
    async with await connect(empty_database.dsn) as conn:
        assert await migrate(conn, folder, "app") == ["0001_first"]
        (folder / "0002_second.sql").write_text("UPDATE app.a SET n = n + 1;")
        assert await migrate(conn, folder, "app") == ["0002_second"]
        assert await migrate(conn, folder, "app") == []
        assert await (await conn.execute("SELECT n FROM app.a")).fetchone() == (2,)


async def test_migration_that_fails_leaves_nothing_behind(empty_database: Database, tmp_path: Path) -> None:
    (tmp_path / "0001_bad.sql").write_text("CREATE TABLE app.a (n int); SELECT 1 / 0;")
    async with await connect(empty_database.dsn) as conn:
        with pytest.raises(errors.DivisionByZero):
            await migrate(conn, tmp_path, "app")
        (tmp_path / "0001_bad.sql").write_text("CREATE TABLE app.a (n int);")
        assert await migrate(conn, tmp_path, "app") == ["0001_bad"]


async def test_applied_file_that_changed_or_vanished_is_an_error(empty_database: Database, tmp_path: Path) -> None:
    file = tmp_path / "0001_first.sql"
    file.write_text("CREATE TABLE app.a (n int);")
    async with await connect(empty_database.dsn) as conn:
        await migrate(conn, tmp_path, "app")
        file.write_text("CREATE TABLE app.a (n bigint);")
        with pytest.raises(FailedPrecondition, match=r"0001_first\.sql changed"):
            await migrate(conn, tmp_path, "app")
        file.unlink()
        with pytest.raises(FailedPrecondition, match="newer version"):
            await migrate(conn, tmp_path, "app")


@pytest.mark.parametrize("names", [["0002_late"], ["0001_a", "0003_b"], ["first"]])
async def test_numbers_must_have_no_gap(empty_database: Database, tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / f"{name}.sql").write_text("SELECT 1;")
    async with await connect(empty_database.dsn) as conn:
        with pytest.raises(FailedPrecondition):
            await migrate(conn, tmp_path, "app")


async def test_two_services_starting_at_once_apply_each_file_once(empty_database: Database, tmp_path: Path) -> None:
    (tmp_path / "0001_slow.sql").write_text("SELECT pg_sleep(0.2); CREATE TABLE app.a (n int);")
    async with await connect(empty_database.dsn) as one, await connect(empty_database.dsn) as two:
        done = await asyncio.gather(migrate(one, tmp_path, "app"), migrate(two, tmp_path, "app"))
    assert sorted(done) == [[], ["0001_slow"]]


# --- reading ---


async def test_reads_by_type_stream_and_range(log: Any, new_append: NewAppend) -> None:
    job, task = new_id(), new_id()
    async with (
        await log.writer() as writer,
        log.reader() as reader,
    ):
        await writer.append(new_append(job, 1, "JobSubmitted"))
        for version in range(1, 6):
            await writer.append(new_append(task, version, "TaskNoted"))
        await writer.append(new_append(job, 2, "JobSucceeded"))

        async def positions(**filters: object) -> list[int]:
            return [stored.position for stored in await reader.read(**filters)]  # type: ignore[arg-type]

        assert await positions(after=0) == list(range(1, 9))
        assert await positions(after=0, types=["JobSubmitted", "JobSucceeded"]) == [2, 8]
        assert await positions(after=2, types=["JobSubmitted", "JobSucceeded"]) == [8]
        assert await positions(after=0, types=["TaskNoted", "JobSucceeded"]) == [3, 4, 5, 6, 7, 8]
        assert await positions(after=0, streams=[job]) == [2, 8]
        assert await positions(after=3, limit=2) == [4, 5]
        assert await positions(after=3, until=5) == [4, 5]
        assert await positions(after=0, types=[]) == []
        assert await reader.versions([job, task, "none"]) == {job: 2, task: 5, "none": 0}
        assert all(stored.payload is None for stored in await reader.read(1, payloads=False))
        scan = await reader.scan(2, types=["JobSubmitted"])
        assert (scan.events, scan.through) == ([], 8)
        with pytest.raises(InvalidArgument):
            await reader.read(0, 10_001)


async def test_erased_payload_reads_as_none(database: Database) -> None:
    async with await connect(database.dsn) as conn:
        await conn.execute("DELETE FROM log.payloads WHERE position = 1")
    async with LogReader(database.role_dsn("gateway")) as reader:
        [genesis] = await reader.read(0)
    assert genesis.payload is None
    assert genesis.type == "LogCreated"


@pytest.mark.parametrize("known", [False, True], ids=["filtered", "with unknown ones"])
async def test_rare_types_are_found_without_reading_the_tasks(
    database: Database, new_append: NewAppend, known: bool
) -> None:
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        slots = asyncio.Semaphore(64)

        async def one(number: int) -> None:
            async with slots:
                await writer.append(new_append(new_id(), 1, "AgentNoted" if number % 500 == 0 else "TaskNoted"))

        await asyncio.gather(*(one(number) for number in range(3000)))
    async with await connect(database.dsn) as conn:
        await conn.execute("ANALYZE log.events")
        query = sql.SQL("EXPLAIN ") + _read_query(True, known, True, False, False, True)
        parameters = {"after": 0, "types": ["AgentNoted"], "known": ["AgentNoted"], "limit": 1000}
        rows = await (await conn.execute(query, parameters)).fetchall()
    assert "events_rare" in str(rows)


def rows_of(plan: dict[str, Any]) -> Iterator[float]:
    yield plan["Actual Rows"] * plan["Actual Loops"] + plan.get("Rows Removed by Filter", 0)
    for below in plan.get("Plans", ()):
        yield from rows_of(below)


async def test_a_page_costs_the_same_wherever_in_the_log_it_is(database: Database, new_append: NewAppend) -> None:
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        await asyncio.gather(*(writer.append(new_append(new_id())) for _ in range(5_000)))
    async with await connect(database.dsn) as conn:
        await conn.execute("ANALYZE log.events, log.payloads")
        # As a server has it that is not ours, and where plans that read too much are likelier.
        await conn.execute("SET random_page_cost = 4")
        query = sql.SQL("EXPLAIN (ANALYZE, FORMAT JSON) ") + _read_query(False, False, False, False, False, True)
        for setting in ("auto", "force_generic_plan"):
            await conn.execute(f"SET plan_cache_mode = {setting}")
            for after in (0, 2_000, 4_800):
                cursor = await conn.execute(query, {"after": after, "limit": 100}, prepare=True)
                found = await cursor.fetchone()
                assert found is not None
                assert max(rows_of(found[0][0]["Plan"])) <= 101, (setting, after, found)
