"""One scheduler leads. The lock is a session lock on the very connection that appends.

While Postgres keeps that session, nobody else can hold the lock; when the session ends, for whatever reason,
nothing can be appended on it any more. There is no moment in which two schedulers write.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

import psycopg
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import Unavailable
from hive_common.ops.connection import Connection
from psycopg import AsyncConnection

log = logging.getLogger(__name__)

LOCK_KEY: Final = 0x68697665_00000001
"""Of the advisory lock: "hive" and a number. It is local to the database."""
POLL_S: Final = 0.5
SESSION_IDLE_MAX_MS: Final = 10_000
"""Postgres ends a session that leads or wants to after this long without a word (the writer pings every second, a
standby asks twice a second), so that a leader that hangs or is stopped makes room for a standby."""

_LOCK = "SELECT pg_try_advisory_lock(%s)"
_EPOCH = """
INSERT INTO scheduler.leadership AS l (one, epoch, since_us) VALUES (true, 1, %s)
ON CONFLICT (one) DO UPDATE SET epoch = l.epoch + 1, since_us = excluded.since_us
RETURNING epoch
"""


async def lead(dsn: str, clock: Clock, standing_by: Callable[[bool], None]) -> tuple[AsyncConnection[Any], int]:
    """Wait until this process leads; return the connection that holds the lock, and the new epoch.

    Args:
        dsn: of the scheduler's role, straight to Postgres (a pooler would share the session).
        clock: for the time at which the epoch began.
        standing_by: told True when another scheduler leads, False when this one does.

    Raises:
        Unavailable: the connection was lost while waiting.
    """
    try:
        conn = await Connection.connect(
            dsn,
            autocommit=True,
            keepalives_idle=5,
            keepalives_interval=2,
            keepalives_count=3,
            tcp_user_timeout=10_000,
        )
    except psycopg.OperationalError as error:
        raise Unavailable(f"Postgres cannot be reached: {error}") from error
    try:
        epoch = await contend(conn, clock, standing_by)
    except psycopg.OperationalError as error:
        await conn.close()
        raise Unavailable(f"Postgres went away while waiting for the lead: {error}") from error
    except BaseException:
        await conn.close()
        raise
    return conn, epoch


async def contend(conn: AsyncConnection[Any], clock: Clock, standing_by: Callable[[bool], None]) -> int:
    """Wait until this connection holds the lock, and return the new epoch. Raises `psycopg.OperationalError`."""
    # Before the lock: whoever vanishes the moment after it got it would else keep it until TCP gives up, for hours.
    await conn.execute(f"SET idle_session_timeout = {SESSION_IDLE_MAX_MS}")
    while not await _try(conn):
        standing_by(True)
        await asyncio.sleep(POLL_S)
    standing_by(False)
    row = await (await conn.execute(_EPOCH, (clock.now_us(),))).fetchone()
    assert row is not None
    log.info("this scheduler leads, epoch %d", row[0])
    return int(row[0])


async def _try(conn: AsyncConnection[Any]) -> bool:
    row = await (await conn.execute(_LOCK, (LOCK_KEY,))).fetchone()
    return row is not None and bool(row[0])
