"""Whatever somebody changes behind the system's back is found, and at the right position."""

import hashlib

import psycopg
import pytest
from hive_audit.checks import verify_log
from hive_audit.log_source import LogSource
from hive_audit.verifier import Head, Result
from hive_common.eventlog.log import LogWriter
from hive_common.testing.fixtures import Database

from .conftest import Tamper
from .histories import fill, life

SWAP = (
    "UPDATE log.events SET position = 99999 WHERE position = 10",
    "UPDATE log.events SET position = 10 WHERE position = 20",
    "UPDATE log.events SET position = 20 WHERE position = 99999",
)
SWAP_CONTENT = (
    "CREATE TEMP TABLE old AS SELECT * FROM log.events WHERE position IN (10, 20)",
    "UPDATE log.events e SET event = o.event, hash = o.hash FROM old o WHERE e.position + o.position = 30"
    " AND e.position IN (10, 20)",
)


async def check(database: Database, against: Head | None = None, *, streams_max: int = 1000) -> Result:
    async with await LogSource.open(database.role_dsn("audit")) as source:
        return await verify_log(source, against, streams_max=streams_max)


async def test_an_untouched_log_verifies(database: Database) -> None:
    head = await fill(database, 30)
    result = await check(database)
    assert result.ok and result.reason == "" and result.first_bad_position == 0
    assert (result.events, result.head, result.log_id) == (head, head, database.log_id)


async def test_a_log_with_more_streams_than_fit_in_memory_verifies(database: Database) -> None:
    """Streams that were forgotten are looked up, also when a page begins inside of one."""
    await fill(database, 40)
    async with await LogSource.open(database.role_dsn("audit")) as source:
        read = source.page
        source.page = lambda after, until, rows_max=7: read(after, until, rows_max)  # type: ignore[method-assign]
        result = await verify_log(source, streams_max=3)
    assert result.ok and result.events == 161


@pytest.mark.parametrize(
    ("statements", "position", "reason"),
    [
        (["UPDATE log.events SET event = set_byte(event, 40, 65) WHERE position = 17"], 17, "hash"),
        (["UPDATE log.events SET event = event || ' ' WHERE position = 17"], 17, "hash"),
        (["UPDATE log.events SET hash = set_byte(hash, 0, get_byte(hash, 0) # 1) WHERE position = 17"], 17, "hash"),
        (["UPDATE log.events SET event = set_byte(event, 9, 65) WHERE position = 1"], 1, "hash"),
        (["UPDATE log.events SET event = '\\xff00' WHERE position = 17"], 17, "hash"),
        (["DELETE FROM log.events WHERE position = 17"], 17, "position 17 is missing"),
        (["DELETE FROM log.events WHERE position = 1"], 1, "position 1 is missing"),
        (["DELETE FROM log.events WHERE position BETWEEN 17 AND 20"], 17, "position 17 is missing"),
        (["DELETE FROM log.events WHERE position > 120"], 121, "tail was cut"),
        (SWAP, 10, "envelope 20"),
        (SWAP_CONTENT, 10, "envelope 20"),
        (["UPDATE log.events SET position = position + 1000 WHERE position = 17"], 17, "17 is missing"),
        (["ALTER TABLE log.events DROP CONSTRAINT events_position_check",
          "UPDATE log.events SET position = 0 WHERE position = 121",
          "DELETE FROM log.payloads WHERE position = 121"], 1, "stands where 1 should"),
        (["UPDATE log.payloads SET payload = payload || ' ' WHERE position = 17"], 17, "commits"),
        (["UPDATE log.payloads SET salt = set_byte(salt, 31, get_byte(salt, 31) # 1) WHERE position = 17"], 17,
         "commits"),
        (["ALTER TABLE log.payloads DROP CONSTRAINT payloads_salt_check",
          "UPDATE log.payloads SET salt = salt || '\\x00' WHERE position = 17"], 17, "33 bytes"),
        (["DELETE FROM log.payloads WHERE position = 17"], 17, "payload is missing"),
        (["UPDATE log.events SET stream = 'x' WHERE position = 17"], 17, "column stream"),
        (["UPDATE log.events SET version = 99 WHERE position = 17"], 17, "column version"),
        (["UPDATE log.events SET type = 'TaskReady' WHERE position = 17"], 17, "column type"),
        (["TRUNCATE log.events CASCADE"], 1, "missing"),
    ],
)  # fmt: skip
async def test_each_kind_of_tampering_is_found_at_its_position(
    database: Database, tamper: Tamper, statements: list[str], position: int, reason: str
) -> None:
    await fill(database, 30)
    tamper(*statements)
    result = await check(database)
    assert not result.ok
    assert result.first_bad_position == position
    assert reason in result.reason
    assert result.head == result.events == position - 1


async def test_an_event_rewritten_with_its_hash_breaks_the_link_behind_it(
    database: Database, tamper: Tamper
) -> None:
    await fill(database, 10)
    tamper(
        "UPDATE log.events SET event = convert_to(replace(convert_from(event, 'UTF8'), '\"actor\":\"a\"',"
        " '\"actor\":\"b\"'), 'UTF8') WHERE position = 17",
        "UPDATE log.events SET hash = sha256('\\x00'::bytea || event) WHERE position = 17",
    )
    result = await check(database)
    assert (result.first_bad_position, result.head) == (18, 17)
    assert "hash of position 17" in result.reason


async def test_a_second_terminal_event_is_a_break_though_the_chain_holds(
    database: Database, tamper: Tamper
) -> None:
    append = life()
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        await writer.append(append)
        tamper("DROP INDEX log.events_terminal")
        last = append.events[-1]
        again = type(last)(**{**{f: getattr(last, f) for f in last.__struct_fields__}, "version": 5})
        position = await writer.append(type(append)((again,)))
    result = await check(database)
    assert result.first_bad_position == position == 6
    assert "second terminal" in result.reason


async def test_a_tail_that_was_cut_is_found_against_an_earlier_head(database: Database, tamper: Tamper) -> None:
    head = await fill(database, 10)
    whole = await check(database)
    earlier = Head(head, bytes.fromhex(whole.head_hash))
    assert (await check(database, earlier)).ok
    tamper("DELETE FROM log.events WHERE position > 30", "DELETE FROM log.payloads WHERE position > 30")
    assert (await check(database)).ok, "without something to compare with, a cut tail cannot be seen"
    result = await check(database, earlier)
    assert not result.ok
    assert result.first_bad_position == 31
    assert "tail was cut" in result.reason


async def test_a_tail_that_was_cut_and_grown_again_is_found_against_an_earlier_head(
    database: Database, tamper: Tamper
) -> None:
    head = await fill(database, 10)
    earlier = Head(head, bytes.fromhex((await check(database)).head_hash))
    tamper("DELETE FROM log.events WHERE position > 37", "DELETE FROM log.payloads WHERE position > 37")
    assert await fill(database, 3) > head
    result = await check(database, earlier)
    assert result.first_bad_position == head
    assert "rewritten" in result.reason


async def test_a_whole_log_made_anew_is_another_log(database: Database) -> None:
    await fill(database, 1)
    foreign = Head(1, hashlib.sha256(b"another log").digest())
    assert (await check(database, foreign)).first_bad_position == 1


async def test_the_auditor_may_read_the_log_and_nothing_else(database: Database) -> None:
    with psycopg.connect(database.role_dsn("audit")) as conn:
        assert conn.execute("SELECT count(*) FROM log.events").fetchone() == (1,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("DELETE FROM log.payloads")
