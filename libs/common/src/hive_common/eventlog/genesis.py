"""The first event of a log, which gives it its name."""

import os
from typing import Any

import msgspec
import psycopg
from psycopg import AsyncConnection

from hive_common.eventlog.envelope import SALT_BYTES, NewEvent, envelope_of, prepare
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import FailedPrecondition, Unavailable
from hive_common.kernel.ids import new_id

GENESIS_TYPE = "LogCreated"
_FIRST = "SELECT event FROM log.events WHERE position = 1"
_CREATE = "SELECT log.log_create(%s, %b, %b, %b)"
# Two installers at once would both see an empty log; the second waits here and then sees the first's.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('hive.log.create', 0))"


async def create_log(admin_conn: AsyncConnection[Any]) -> str:
    """Write the genesis event when the log is empty, and return the log's id, a UUIDv7.

    Args:
        admin_conn: of a superuser. The log MUST be migrated.
    """
    async with admin_conn.transaction():
        await admin_conn.execute(_LOCK)
        existing = await _read_log_id(admin_conn)
        if existing is not None:
            return existing
        log_id = new_id()
        genesis = NewEvent(
            stream=log_id,
            version=1,
            type=GENESIS_TYPE,
            schema=1,
            payload=msgspec.json.encode({"log": log_id}),
            ts_us=SystemClock().now_us(),
            actor="system",
            owner="system",
        )
        salt = os.urandom(SALT_BYTES)
        body, _ = prepare(log_id, genesis, salt)
        await admin_conn.execute(_CREATE, (log_id, body, genesis.payload, salt))
        return log_id


async def read_log_id(conn: AsyncConnection[Any]) -> str:
    """Return the id of the log behind `conn`.

    Raises:
        FailedPrecondition: the log has no genesis event yet.
        Unavailable: the connection was lost.
    """
    try:
        log_id = await _read_log_id(conn)
    except psycopg.OperationalError as error:
        raise Unavailable(f"the log's database went away: {error}") from error
    if log_id is None:
        raise FailedPrecondition("the log is empty: create_log() has to name it first")
    return log_id


async def _read_log_id(conn: AsyncConnection[Any]) -> str | None:
    row = await (await conn.execute(_FIRST)).fetchone()
    return None if row is None else envelope_of(bytes(row[0])).log
