"""The registry's views: executors and agent versions, written by a projection, read by key or in pages."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from hive_common.contracts.events import (
    AgentVersionPublished,
    Capabilities,
    ExecutorCapabilitiesChanged,
    ExecutorDrainRequested,
    ExecutorRegistered,
    ExecutorUndrained,
    decode,
)
from hive_common.eventlog.log import Stored
from hive_common.kernel.errors import CorruptLog, UnknownEvent
from hive_common.ops.database import Database
from psycopg import AsyncConnection

from hive_registry.domain.executors import ExecutorState
from hive_registry.domain.versions import sort_key

SCHEMA: Final = "registry"
NAMES_MAX: Final = 10_000
"""Names that are looked at when the nearest one is sought."""

_REGISTER = """
INSERT INTO registry.executors (ns, executor, name, owner, capabilities, version, registered_us, position)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
_CHANGE = """
UPDATE registry.executors SET capabilities = %s, version = %s, position = %s WHERE ns = %s AND executor = %s
"""
_DRAIN = """
UPDATE registry.executors SET drained = %s, version = %s, position = %s WHERE ns = %s AND executor = %s
"""
_PUBLISH = """
INSERT INTO registry.agent_versions
    (ns, owner, name, version, version_key, digest, manifest, size_bytes, published_us, position)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""

_EXECUTOR = "executor, name, owner, capabilities, drained, version, registered_us, position"
_BY_IDS = f"SELECT {_EXECUTOR} FROM registry.executors WHERE ns = %s AND executor = ANY(%s)"  # noqa: S608
_BY_NAME = f"SELECT {_EXECUTOR} FROM registry.executors WHERE ns = %s AND name = %s LIMIT 2"  # noqa: S608
_PAGE = f"SELECT {_EXECUTOR} FROM registry.executors WHERE ns = %s AND executor > %s ORDER BY executor LIMIT %s"  # noqa: S608
_EXECUTOR_NAMES = "SELECT DISTINCT name FROM registry.executors WHERE ns = %s LIMIT %s"

_AGENT = "name, version, digest, manifest, size_bytes, published_us, position"
_VERSION = f"SELECT {_AGENT} FROM registry.agent_versions WHERE ns = %s AND name = %s AND version = %s"  # noqa: S608
_AGENTS = f"""
SELECT {_AGENT} FROM registry.agent_versions
WHERE ns = %s AND (name, version_key, version) > (%s, %s, %s)
ORDER BY name, version_key, version LIMIT %s
"""  # noqa: S608
_VERSIONS = f"""
SELECT {_AGENT} FROM registry.agent_versions
WHERE ns = %s AND name = %s AND (version_key, version) > (%s, %s)
ORDER BY version_key, version LIMIT %s
"""  # noqa: S608
_AGENT_NAMES = "SELECT DISTINCT name FROM registry.agent_versions WHERE ns = %s LIMIT %s"
_VERSION_NAMES = """
SELECT version FROM registry.agent_versions WHERE ns = %s AND name = %s
ORDER BY version_key DESC, version DESC LIMIT %s
"""


class ExecutorRow(msgspec.Struct, frozen=True):
    """An executor as the view has it. `capabilities` are JSON bytes; `position` is of its last event."""

    executor: str
    name: str
    owner: str
    capabilities: bytes
    drained: bool
    version: int
    registered_us: int
    position: int

    @property
    def state(self) -> ExecutorState:
        """What decisions are made on."""
        capabilities = msgspec.json.decode(self.capabilities, type=Capabilities)
        return ExecutorState(self.version, self.name, capabilities, self.drained)


class AgentRow(msgspec.Struct, frozen=True):
    """A published version. `manifest` are the bytes of the artifact's config blob."""

    name: str
    version: str
    digest: str
    manifest: bytes
    size_bytes: int
    published_us: int
    position: int


class RegistryProjection:
    """Keeps both views up to date (`hive_common.eventlog.projection.Projection`)."""

    name = "registry"
    types: Sequence[str] | None = (
        "ExecutorRegistered",
        "ExecutorCapabilitiesChanged",
        "ExecutorDrainRequested",
        "ExecutorUndrained",
        "AgentVersionPublished",
    )

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Write what `batch` changes. One round trip for all of it, in the order of the log."""
        async with conn.pipeline():
            for stored in batch:
                statement, parameters = _statement_of(stored)
                await conn.execute(statement, parameters)


def _statement_of(stored: Stored) -> tuple[Any, tuple[Any, ...]]:
    if stored.payload is None:
        raise CorruptLog(f"the payload at position {stored.position} is missing", position=stored.position)
    event = decode(stored.type, stored.schema, stored.payload)
    key = (stored.ns, stored.stream)
    moved = (stored.version, stored.position)
    match event:
        case ExecutorRegistered():
            capabilities = msgspec.json.encode(event.capabilities)
            at = (stored.version, stored.ts_us, stored.position)
            return _REGISTER, (*key, event.name, stored.owner, capabilities, *at)
        case ExecutorCapabilitiesChanged():
            return _CHANGE, (msgspec.json.encode(event.capabilities), *moved, *key)
        case ExecutorDrainRequested():
            return _DRAIN, (True, *moved, *key)
        case ExecutorUndrained():
            return _DRAIN, (False, *moved, *key)
        case AgentVersionPublished():
            version = (event.name, event.version, sort_key(event.version), event.digest)
            what = (bytes(event.manifest), event.size_bytes, stored.ts_us, stored.position)
            return _PUBLISH, (stored.ns, stored.owner, *version, *what)
    raise UnknownEvent(f"position {stored.position}: the registry does not know {stored.type}")


class Views:
    """Reads of one namespace.

    Args:
        database: of the service.
        ns: the namespace.
    """

    def __init__(self, database: Database, ns: str) -> None:
        self._database = database
        self._ns = ns

    async def executors(self, ids: Sequence[str]) -> dict[str, ExecutorRow]:
        """Return those of `ids` that are known."""
        rows = await self._database.fetch(_BY_IDS, (self._ns, list(ids)))
        return {row[0]: ExecutorRow(*row) for row in rows}

    async def executors_named(self, name: str) -> list[ExecutorRow]:
        """Return the executors of a name, at most two of them."""
        return [ExecutorRow(*row) for row in await self._database.fetch(_BY_NAME, (self._ns, name))]

    async def executors_after(self, executor: str, limit: int) -> list[ExecutorRow]:
        """Return a page in order of ids."""
        rows = await self._database.fetch(_PAGE, (self._ns, executor, limit))
        return [ExecutorRow(*row) for row in rows]

    async def executor_names(self) -> list[str]:
        """Return the names there are, up to `NAMES_MAX`."""
        return [name for (name,) in await self._database.fetch(_EXECUTOR_NAMES, (self._ns, NAMES_MAX))]

    async def agent(self, name: str, version: str) -> AgentRow | None:
        """Return a version, or None."""
        rows = await self._database.fetch(_VERSION, (self._ns, name, version))
        return AgentRow(*rows[0]) if rows else None

    async def agents_after(self, after: tuple[str, str, str], limit: int) -> list[AgentRow]:
        """Return a page in order of name, then precedence. `after` is (name, version key, version)."""
        rows = await self._database.fetch(_AGENTS, (self._ns, *after, limit))
        return [AgentRow(*row) for row in rows]

    async def versions_after(self, name: str, after: tuple[str, str], limit: int) -> list[AgentRow]:
        """Return a page of one agent in order of precedence. `after` is (version key, version)."""
        rows = await self._database.fetch(_VERSIONS, (self._ns, name, *after, limit))
        return [AgentRow(*row) for row in rows]

    async def agent_names(self) -> list[str]:
        """Return the names there are, up to `NAMES_MAX`."""
        return [name for (name,) in await self._database.fetch(_AGENT_NAMES, (self._ns, NAMES_MAX))]

    async def version_names(self, name: str) -> list[str]:
        """Return the versions of an agent, the newest first, up to `NAMES_MAX`."""
        rows = await self._database.fetch(_VERSION_NAMES, (self._ns, name, NAMES_MAX))
        return [version for (version,) in rows]
