"""How the log's writer and readers reach Postgres."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from hive_common.ops.connection import Connection

Connect = Callable[[], Awaitable[AsyncConnection[Any]]]
"""Opens a new autocommit connection. Raises `psycopg.OperationalError` when it cannot."""

# A peer that vanished without a word is noticed after about ten seconds instead of two hours.
_LIVENESS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


def connector(source: str | Connect) -> Connect:
    """Return what opens connections to `source`, a connection string or a factory."""
    if not isinstance(source, str):
        return source
    given = conninfo_to_dict(source)
    dsn = make_conninfo(source, **{key: value for key, value in _LIVENESS.items() if key not in given})

    async def connect() -> AsyncConnection[Any]:
        return await Connection.connect(dsn, autocommit=True)

    return connect


class _Closable(Protocol):
    @property
    def closed(self) -> bool: ...


def is_lost(conn: _Closable, error: psycopg.Error) -> bool:
    """Say whether `error` means that the connection is gone, as opposed to a statement that failed."""
    return conn.closed or isinstance(error, psycopg.errors.AdminShutdown | psycopg.errors.CrashShutdown)
