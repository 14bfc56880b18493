"""The router's view: the devices of the pool, what they serve, and whose they are."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from hive_common.contracts.events import (
    Capabilities,
    ExecutorCapabilitiesChanged,
    ExecutorDrainRequested,
    ExecutorEnrolled,
    ExecutorRegistered,
    ExecutorRevoked,
    ExecutorUndrained,
    decode,
)
from hive_common.eventlog.log import Stored
from hive_common.kernel.errors import CorruptLog, UnknownEvent
from hive_common.ops.database import Database
from psycopg import AsyncConnection

SCHEMA: Final = "router"
EXECUTORS_MAX: Final = 10_000
"""Devices that are considered; the oldest ones, by their ids."""

_NOTHING: Final = Capabilities(os="", arch="", cores=0, memory_bytes=0, slots=0, runtimes=())

_ENROL = """
INSERT INTO router.executors (ns, executor, name, owner, capabilities) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (ns, executor) DO UPDATE SET name = excluded.name, owner = excluded.owner
"""
_REGISTER = """
INSERT INTO router.executors (ns, executor, name, owner, capabilities) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (ns, executor) DO UPDATE SET name = excluded.name, capabilities = excluded.capabilities
"""
_CHANGE = "UPDATE router.executors SET capabilities = %s WHERE ns = %s AND executor = %s"
_DRAIN = "UPDATE router.executors SET drained = %s WHERE ns = %s AND executor = %s"
_REVOKE = "UPDATE router.executors SET revoked = true WHERE ns = %s AND executor = %s"
_ALL = """
SELECT executor, name, owner, capabilities, drained, revoked FROM router.executors
WHERE ns = %s ORDER BY executor LIMIT %s
"""


class ExecutorRow(msgspec.Struct, frozen=True):
    """A device of the pool."""

    executor: str
    name: str
    owner: str
    capabilities: Capabilities
    drained: bool
    revoked: bool


class FleetProjection:
    """Keeps the view up to date (`hive_common.eventlog.projection.Projection`).

    Args:
        seen: is told the position of each batch, before it is committed.
    """

    name = "fleet"
    types: Sequence[str] | None = (
        "ExecutorEnrolled",
        "ExecutorRegistered",
        "ExecutorCapabilitiesChanged",
        "ExecutorDrainRequested",
        "ExecutorUndrained",
        "ExecutorRevoked",
    )

    def __init__(self, seen: Callable[[int], None]) -> None:
        self._seen = seen

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Write what `batch` changes, in the order of the log, in one round trip."""
        async with conn.pipeline():
            for stored in batch:
                statement, parameters = _statement_of(stored)
                await conn.execute(statement, parameters)
        if batch:
            self._seen(batch[-1].position)


def _statement_of(stored: Stored) -> tuple[Any, tuple[Any, ...]]:
    if stored.payload is None:
        raise CorruptLog(f"the payload at position {stored.position} is missing", position=stored.position)
    event = decode(stored.type, stored.schema, stored.payload)
    key = (stored.ns, stored.stream)
    match event:
        case ExecutorEnrolled():
            # Who enrolled a device owns it; without that the owner of the installation does.
            return _ENROL, (*key, event.name, event.owner or stored.owner, msgspec.json.encode(_NOTHING))
        case ExecutorRegistered():
            return _REGISTER, (*key, event.name, stored.owner, msgspec.json.encode(event.capabilities))
        case ExecutorCapabilitiesChanged():
            return _CHANGE, (msgspec.json.encode(event.capabilities), *key)
        case ExecutorDrainRequested():
            return _DRAIN, (True, *key)
        case ExecutorUndrained():
            return _DRAIN, (False, *key)
        case ExecutorRevoked():
            return _REVOKE, key
    raise UnknownEvent(f"position {stored.position}: the router does not know {stored.type}")


class Views:
    """Reads of one namespace.

    Args:
        database: of the service.
        ns: the namespace.
    """

    def __init__(self, database: Database, ns: str) -> None:
        self._database = database
        self._ns = ns

    async def executors(self) -> list[ExecutorRow]:
        """Return the devices of the pool. Raises Unavailable while the database cannot be reached."""
        rows = await self._database.fetch(_ALL, (self._ns, EXECUTORS_MAX))
        return [
            ExecutorRow(executor, name, owner, msgspec.json.decode(capabilities, type=Capabilities), *rest)
            for executor, name, owner, capabilities, *rest in rows
        ]
