"""One prepared statement with binary parameters, called with as little as libpq needs.

`AsyncCursor.execute` converts, adapts and keeps state for every call; for a small append that took more time of
this process than everything else. What is left here is what psycopg's own generators do (its module
`psycopg.generators`), for a statement whose parameters are bytes already.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import AsyncConnection, generators
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGresult

LOOK_S = 0.1
"""How often a socket is read without being told to: uvloop does not tell a second time of one that was reset, and
the first time there may still be something to read."""

_NUMBERS = itertools.count(1)


class Statement:
    """A statement of one connection, prepared at its first call.

    Args:
        conn: an autocommit connection; others may use it in between.
        query: with `$1`, `$2`… as placeholders.
        parameter_oids: the types of the parameters, which are given in their binary format.
    """

    def __init__(self, conn: AsyncConnection[Any], query: str, parameter_oids: Sequence[int]) -> None:
        self._conn = conn
        # Its connection may outlive it and meet another.
        self._name = b"hive_%d" % next(_NUMBERS)
        self._query = query.encode()
        self._oids = parameter_oids
        self._formats = [Format.BINARY] * len(parameter_oids)
        self._prepared = False

    async def row(self, parameters: Sequence[bytes]) -> tuple[bytes | None, ...]:
        """Return the one row that the statement answers, its columns in their binary format.

        When it is cancelled the connection is closed, for nobody could tell whose the next answer is.

        Raises:
            psycopg.Error: the statement failed, or the connection was lost.
        """
        async with self._conn.lock:
            pgconn = self._conn.pgconn
            if not self._prepared:
                pgconn.send_prepare(self._name, self._query, self._oids)
                self._checked(await self._conn.wait(generators.execute(pgconn)))
                self._prepared = True
            pgconn.send_query_prepared(self._name, parameters, self._formats, result_format=Format.BINARY)
            if pgconn.flush():
                results = await self._conn.wait(generators.execute(pgconn))
            else:
                results = await self._answer()
            result = self._checked(results)
        return tuple(result.get_value(0, column) for column in range(result.nfields))

    async def _answer(self) -> list[PGresult]:
        pgconn = self._conn.pgconn
        loop = asyncio.get_running_loop()
        results: list[PGresult] = []
        socket = pgconn.socket
        readable = asyncio.Event()
        loop.add_reader(socket, readable.set)
        try:
            while True:
                while pgconn.is_busy():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_S):
                            await readable.wait()
                    readable.clear()
                    pgconn.consume_input()
                result = pgconn.get_result()
                if result is None:
                    return results
                results.append(result)
        except asyncio.CancelledError:
            loop.remove_reader(socket)
            pgconn.finish()
            raise
        finally:
            loop.remove_reader(socket)

    def _checked(self, results: Sequence[PGresult]) -> PGresult:
        for result in results:
            if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
                raise psycopg.errors.error_from_result(result, encoding="utf-8")
        if not results:
            raise psycopg.OperationalError("the connection gave no answer")
        return results[-1]
