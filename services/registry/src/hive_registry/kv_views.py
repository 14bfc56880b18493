"""The registry's views of kept values: what can be read, and what is staged and not decided yet."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from hive_common.contracts.events import (
    AttemptFailed,
    AttemptLost,
    Event,
    KvStaged,
    KvWrite,
    TaskCancelled,
    TaskFailed,
    TaskSucceeded,
    decode,
)
from hive_common.contracts.limits import KV_PENDING_MAX
from hive_common.eventlog.log import Stored
from hive_common.kernel.errors import CorruptLog, UnknownEvent
from hive_common.ops.database import Database
from hive_common.permissions.kept import size_of
from psycopg import AsyncConnection

from hive_registry.domain.kv import NamespaceState, Staged

_STREAM = """
INSERT INTO registry.kv_streams (ns, stream, owner, namespace, version) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (ns, stream) DO UPDATE SET version = excluded.version
"""
_STAGE = """
INSERT INTO registry.kv_staged (ns, task, attempt, stream, owner, writes, position)
VALUES (%s, %s, %s, %s, %s, %s, %s)
"""
_PUT = """
INSERT INTO registry.kv_values (ns, stream, key, owner, value, size_bytes, position)
VALUES (%s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (ns, stream, key) DO UPDATE SET
    value = excluded.value, size_bytes = excluded.size_bytes, position = excluded.position
"""
_DELETE = "DELETE FROM registry.kv_values WHERE ns = %s AND stream = %s AND key = %s"
_TASKS_STAGED = "SELECT DISTINCT ns, task FROM registry.kv_staged WHERE task = ANY(%s)"
_ALL_STAGED = "SELECT DISTINCT task FROM registry.kv_staged"
_OF_ATTEMPT = "SELECT stream, owner, writes FROM registry.kv_staged WHERE ns = %s AND task = %s AND attempt = %s"
_DROP_ATTEMPT = "DELETE FROM registry.kv_staged WHERE ns = %s AND task = %s AND attempt = %s"
_DROP_TASK = "DELETE FROM registry.kv_staged WHERE ns = %s AND task = %s"

_VALUE = "SELECT value FROM registry.kv_values WHERE ns = %s AND stream = %s AND key = %s"
_KEYS = """
SELECT key FROM registry.kv_values
WHERE ns = %s AND stream = %s AND key > %s AND starts_with(key, %s) ORDER BY key LIMIT %s
"""
_NAMESPACE = """
SELECT coalesce((SELECT version FROM registry.kv_streams WHERE ns = %s AND stream = %s), 0),
       coalesce((SELECT sum(size_bytes) FROM registry.kv_values WHERE ns = %s AND stream = %s), 0)
"""
_SIZES = "SELECT key, size_bytes FROM registry.kv_values WHERE ns = %s AND stream = %s AND key = ANY(%s)"
_PENDING = """
SELECT task, attempt, writes FROM registry.kv_staged WHERE ns = %s AND stream = %s ORDER BY position LIMIT %s
"""

ENDS: Final = ("TaskSucceeded", "TaskFailed", "TaskCancelled", "AttemptFailed", "AttemptLost")
"""After one of these it is known whether what an attempt staged counts."""

_writes = msgspec.json.Decoder(tuple[KvWrite, ...])


class KvProjection:
    """Applies what an attempt has staged when it decides its task, and drops it when it cannot any more.

    The order is that of the decisions in the log, so that it gives the same whenever it is made anew.
    """

    name = "registry_kv"
    types: Sequence[str] | None = ("KvStaged", *ENDS)

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Write what `batch` changes. Of tasks that have staged nothing it may have the end, or may not."""
        ended = {stored.stream for stored in batch if stored.type in ENDS}
        found = await conn.execute(_TASKS_STAGED, (list(ended),))
        staged = {(ns, task) for ns, task in await found.fetchall()}
        for stored in batch:
            if stored.type == "KvStaged":
                event = staged_of(stored)
                await self._stage(conn, stored, event)
                staged.add((stored.ns, event.task))
            elif stored.type not in ENDS:
                raise UnknownEvent(f"position {stored.position}: the registry does not know {stored.type}")
            elif (stored.ns, stored.stream) in staged:
                await self._end(conn, stored, _decoded(stored))

    async def _stage(self, conn: AsyncConnection[Any], stored: Stored, event: KvStaged) -> None:
        stream = (stored.ns, stored.stream, stored.owner, event.namespace, stored.version)
        await conn.execute(_STREAM, stream)
        if not event.task:
            # The owner's own word, which nothing has to decide.
            await _write(conn, stored, stored.stream, stored.owner, event.writes)
            return
        writes = msgspec.json.encode(event.writes)
        row = (stored.ns, event.task, event.attempt, stored.stream, stored.owner, writes, stored.position)
        await conn.execute(_STAGE, row)

    async def _end(self, conn: AsyncConnection[Any], stored: Stored, event: Event) -> None:
        task = (stored.ns, stored.stream)
        match event:
            case TaskSucceeded():
                found = await conn.execute(_OF_ATTEMPT, (*task, event.attempt))
                for stream, owner, writes in await found.fetchall():
                    await _write(conn, stored, stream, owner, _writes.decode(writes))
                await conn.execute(_DROP_TASK, task)
            case TaskFailed() | TaskCancelled():
                await conn.execute(_DROP_TASK, task)
            case AttemptFailed() | AttemptLost():
                await conn.execute(_DROP_ATTEMPT, (*task, event.attempt))


async def _write(
    conn: AsyncConnection[Any], stored: Stored, stream: str, owner: str, writes: Iterable[KvWrite]
) -> None:
    for write in writes:
        key = (stored.ns, stream, write.key)
        if isinstance(write.value, msgspec.UnsetType):
            await conn.execute(_DELETE, key)
        else:
            await conn.execute(_PUT, (*key, owner, bytes(write.value), size_of(write), stored.position))


def staged_of(stored: Stored) -> KvStaged:
    """Return what stands in an event of that type. Raises CorruptLog where it is missing, and UnknownEvent."""
    event = _decoded(stored)
    assert isinstance(event, KvStaged)
    return event


def _decoded(stored: Stored) -> Event:
    if stored.payload is None:
        raise CorruptLog(f"the payload at position {stored.position} is missing", position=stored.position)
    return decode(stored.type, stored.schema, stored.payload)


class KvViews:
    """Reads of kept values.

    Args:
        database: of the service.
        ns: the namespace of the installation.
    """

    def __init__(self, database: Database, ns: str) -> None:
        self._database = database
        self._ns = ns

    async def value(self, stream: str, key: str) -> bytes | None:
        """Return a value as JSON, or None."""
        rows = await self._database.fetch(_VALUE, (self._ns, stream, key))
        return bytes(rows[0][0]) if rows else None

    async def staged(self) -> list[str]:
        """Return the tasks of which attempts have staged something that is not decided; a quota bounds them."""
        return [task for (task,) in await self._database.fetch(_ALL_STAGED)]

    async def keys(self, stream: str, prefix: str, after: str, limit: int) -> list[str]:
        """Return a page of keys, in the order of their bytes."""
        return [key for (key,) in await self._database.fetch(_KEYS, (self._ns, stream, after, prefix, limit))]

    async def namespace(self, stream: str, keys: Iterable[str]) -> NamespaceState:
        """Return what is to be known of a namespace before writing `keys`."""
        of = (self._ns, stream)
        ((version, used),) = await self._database.fetch(_NAMESPACE, (*of, *of))
        rows = await self._database.fetch(_PENDING, (*of, KV_PENDING_MAX))
        pending = tuple(Staged(task, attempt, _writes.decode(writes)) for task, attempt, writes in rows)
        touched = {*keys, *(write.key for one in pending for write in one.writes)}
        sizes = dict(await self._database.fetch(_SIZES, (*of, list(touched))))
        return NamespaceState(version, int(used), sizes, pending)
