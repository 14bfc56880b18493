"""The registry's views: executors and agent versions, written by a projection, read by key or in pages."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from hive_common.artifacts.versions import sort_key
from hive_common.contracts.events import (
    AgentVersionPublished,
    AgentVersionYanked,
    Capabilities,
    ExecutorCapabilitiesChanged,
    ExecutorDrainRequested,
    ExecutorEnrolled,
    ExecutorRegistered,
    ExecutorRevoked,
    ExecutorTrusted,
    ExecutorUndrained,
    JoinTokenIssued,
    JoinTokenUsed,
    KeyCreated,
    KeyRevoked,
    PermissionGranted,
    PermissionRevoked,
    SigningKeyDistrusted,
    SigningKeyTrusted,
    decode,
)
from hive_common.eventlog.log import Stored
from hive_common.kernel.errors import CorruptLog, UnknownEvent
from hive_common.ops.database import Database
from psycopg import AsyncConnection

from hive_registry import grant_views
from hive_registry.domain.executors import ExecutorState
from hive_registry.domain.signers import SignerState
from hive_registry.domain.tokens import TokenState
from hive_registry.key_views import key_statement

SCHEMA: Final = "registry"
NAMES_MAX: Final = 10_000
"""Names that are looked at when the nearest one is sought."""

REVOKED_MAX: Final = 8_000
"""Revoked keys that NATS is told, the latest ones: as many as fit into one message, and the credentials of all
others ran out long ago."""

SIGNERS_MAX: Final = 1_000
"""Keys of authors that are listed: all that are trusted, and the latest of the others."""

_ENROL = """
WITH retired AS (
    INSERT INTO registry.retired_keys (ns, public_key, owner, retired_us)
    SELECT ns, public_key, owner, %(ts_us)s FROM registry.executors
    WHERE ns = %(ns)s AND executor = %(executor)s AND public_key NOT IN ('', %(public_key)s)
    ON CONFLICT (ns, public_key) DO UPDATE SET retired_us = excluded.retired_us
), back AS (
    DELETE FROM registry.retired_keys WHERE ns = %(ns)s AND public_key = %(public_key)s
)
INSERT INTO registry.executors
    (ns, executor, name, owner, public_key, owner_name, version, registered_us, position)
VALUES (
    %(ns)s, %(executor)s, %(name)s, %(owner)s, %(public_key)s, %(owner_name)s, %(version)s, %(ts_us)s, %(position)s
)
ON CONFLICT (ns, executor) DO UPDATE SET
    owner = excluded.owner, public_key = excluded.public_key, owner_name = excluded.owner_name,
    version = excluded.version, position = excluded.position
"""
_REVOKE = """
UPDATE registry.executors SET revoked_us = %s, version = %s, position = %s WHERE ns = %s AND executor = %s
"""
_REGISTER = """
INSERT INTO registry.executors (ns, executor, name, owner, capabilities, version, registered_us, position)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (ns, executor) DO UPDATE SET
    name = excluded.name, capabilities = excluded.capabilities, version = excluded.version,
    registered_us = excluded.registered_us, position = excluded.position
"""
_ISSUE = """
INSERT INTO registry.join_tokens (ns, token, digest, expires_us, owner, owner_name, version, position)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
_USE = "UPDATE registry.join_tokens SET executor = %s, version = %s, position = %s WHERE ns = %s AND token = %s"
_CHANGE = """
UPDATE registry.executors SET capabilities = %s, version = %s, position = %s WHERE ns = %s AND executor = %s
"""
_DRAIN = """
UPDATE registry.executors SET drained = %s, version = %s, position = %s WHERE ns = %s AND executor = %s
"""
# What comes of trust stands with the scheduler; the stream's version counts here.
_MOVE = "UPDATE registry.executors SET version = %s, position = %s WHERE ns = %s AND executor = %s"
_PUBLISH = """
INSERT INTO registry.agent_versions
    (ns, stream, owner, stream_version, name, version, version_key, digest, manifest, size_bytes, published_us,
     position, signer, signature)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_YANK = """
UPDATE registry.agent_versions SET yanked_us = %s, yank_reason = %s, stream_version = %s
WHERE ns = %s AND stream = %s
"""
_TRUST = """
INSERT INTO registry.signers (ns, stream, owner, public_key, name, trusted, since_us, version, position)
VALUES (%s, %s, %s, %s, %s, true, %s, %s, %s)
ON CONFLICT (ns, public_key) DO UPDATE SET
    name = excluded.name, trusted = true, since_us = excluded.since_us, reason = '', version = excluded.version,
    position = excluded.position
"""
_DISTRUST = """
UPDATE registry.signers SET trusted = false, reason = %s, since_us = %s, version = %s, position = %s
WHERE ns = %s AND stream = %s
"""

_EXECUTOR = (
    "executor, name, owner, capabilities, drained, version, registered_us, position, public_key, owner_name,"
    " revoked_us"
)
_BY_IDS = f"SELECT {_EXECUTOR} FROM registry.executors WHERE ns = %s AND executor = ANY(%s)"  # noqa: S608
_BY_NAME = f"""
SELECT {_EXECUTOR} FROM registry.executors WHERE ns = %s AND name = %s
ORDER BY revoked_us IS NOT NULL, executor LIMIT 2
"""  # noqa: S608
_PAGE = f"SELECT {_EXECUTOR} FROM registry.executors WHERE ns = %s AND executor > %s ORDER BY executor LIMIT %s"  # noqa: S608
_EXECUTOR_NAMES = "SELECT DISTINCT name FROM registry.executors WHERE ns = %s LIMIT %s"

_REVOKED = """
(SELECT public_key, revoked_us AS at_us FROM registry.executors
 WHERE ns = %s AND revoked_us IS NOT NULL AND public_key <> '' ORDER BY revoked_us DESC LIMIT %s)
UNION ALL
(SELECT public_key, retired_us FROM registry.retired_keys WHERE ns = %s ORDER BY retired_us DESC LIMIT %s)
ORDER BY at_us DESC LIMIT %s
"""
_JOINING = """
SELECT version, digest, expires_us, owner, owner_name, executor FROM registry.join_tokens
WHERE ns = %s AND token = %s
"""

_AGENT = (
    "name, version, digest, manifest, size_bytes, published_us, position, signer, signature, stream_version,"
    " yanked_us, yank_reason"
)
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
_SIGNER = "public_key, name, trusted, since_us, reason, version, position"
_BY_KEY = f"SELECT {_SIGNER} FROM registry.signers WHERE ns = %s AND public_key = %s"  # noqa: S608
_SIGNERS = f"""
SELECT {_SIGNER} FROM registry.signers WHERE ns = %s ORDER BY trusted DESC, since_us DESC, public_key LIMIT %s
"""  # noqa: S608
_AGENT_NAMES = "SELECT DISTINCT name FROM registry.agent_versions WHERE ns = %s LIMIT %s"
_VERSION_NAMES = """
SELECT version FROM registry.agent_versions WHERE ns = %s AND name = %s
ORDER BY version_key DESC, version DESC LIMIT %s
"""


class ExecutorRow(msgspec.Struct, frozen=True):
    """An executor as the view has it. `capabilities` are JSON bytes; `position` is of its last event.

    `capabilities` is None before its first hello, `public_key` empty where it is not enrolled, `revoked_us` None
    where it is not revoked.
    """

    executor: str
    name: str
    owner: str
    capabilities: bytes | None
    drained: bool
    version: int
    registered_us: int
    position: int
    public_key: str
    owner_name: str
    revoked_us: int | None

    @property
    def state(self) -> ExecutorState:
        """What decisions are made on."""
        return ExecutorState(
            version=self.version,
            name=self.name,
            capabilities=self.told,
            drained=self.drained,
            public_key=self.public_key,
            owner=self.owner,
            owner_name=self.owner_name,
            revoked=self.revoked_us is not None,
        )

    @property
    def told(self) -> Capabilities | None:
        """What it said about itself."""
        return None if self.capabilities is None else msgspec.json.decode(self.capabilities, type=Capabilities)


class AgentRow(msgspec.Struct, frozen=True):
    """A published version. `manifest` are the bytes of the artifact's config blob."""

    name: str
    version: str
    digest: str
    manifest: bytes
    size_bytes: int
    published_us: int
    position: int
    signer: str
    signature: str
    stream_version: int
    yanked_us: int
    yank_reason: str


class SignerRow(msgspec.Struct, frozen=True):
    """A key that is or was trusted; `since_us` is when that was decided."""

    public_key: str
    name: str
    trusted: bool
    since_us: int
    reason: str
    version: int
    position: int

    @property
    def state(self) -> SignerState:
        """What decisions are made on."""
        return SignerState(self.version, self.name, self.trusted, self.reason)


class RegistryProjection:
    """Keeps both views up to date (`hive_common.eventlog.projection.Projection`)."""

    name = "registry"
    types: Sequence[str] | None = (
        "ExecutorRegistered",
        "ExecutorCapabilitiesChanged",
        "ExecutorDrainRequested",
        "ExecutorUndrained",
        "ExecutorEnrolled",
        "ExecutorRevoked",
        "ExecutorTrusted",
        "JoinTokenIssued",
        "JoinTokenUsed",
        "AgentVersionPublished",
        "AgentVersionYanked",
        "SigningKeyTrusted",
        "SigningKeyDistrusted",
        "KeyCreated",
        "KeyRevoked",
        *grant_views.TYPES,
    )

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Write what `batch` changes. One round trip for all of it, in the order of the log."""
        async with conn.pipeline():
            for stored in batch:
                statement, parameters = _statement_of(stored)
                await conn.execute(statement, parameters)


def _statement_of(stored: Stored) -> tuple[Any, Any]:
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
        case ExecutorEnrolled():
            names = ("ns", "executor", "version", "position", "ts_us")
            named = dict(zip(names, (*key, *moved, stored.ts_us), strict=True))
            who = {"name": event.name, "owner": event.owner, "owner_name": event.owner_name}
            return _ENROL, named | who | {"public_key": event.public_key}
        case ExecutorRevoked():
            return _REVOKE, (stored.ts_us, *moved, *key)
        case JoinTokenIssued():
            token = (event.digest, event.expires_us, event.owner, event.owner_name)
            return _ISSUE, (*key, *token, *moved)
        case JoinTokenUsed():
            return _USE, (event.executor, *moved, *key)
        case ExecutorDrainRequested():
            return _DRAIN, (True, *moved, *key)
        case ExecutorUndrained():
            return _DRAIN, (False, *moved, *key)
        case ExecutorTrusted():
            return _MOVE, (*moved, *key)
        case AgentVersionPublished():
            version = (event.name, event.version, sort_key(event.version), event.digest)
            what = (bytes(event.manifest), event.size_bytes, stored.ts_us, stored.position)
            signed = (event.signer, event.signature)
            return _PUBLISH, (*key, stored.owner, stored.version, *version, *what, *signed)
        case AgentVersionYanked():
            return _YANK, (stored.ts_us, event.reason, stored.version, *key)
        case SigningKeyTrusted():
            return _TRUST, (*key, stored.owner, event.public_key, event.name, stored.ts_us, *moved)
        case PermissionGranted() | PermissionRevoked():
            return grant_views.statement_of(stored, event)
        case SigningKeyDistrusted():
            return _DISTRUST, (event.reason, stored.ts_us, *moved, *key)
        case KeyCreated() | KeyRevoked():
            return key_statement(stored, event)
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
        """Return the executors of a name, at most two of them, those that are revoked last."""
        return [ExecutorRow(*row) for row in await self._database.fetch(_BY_NAME, (self._ns, name))]

    async def executors_after(self, executor: str, limit: int) -> list[ExecutorRow]:
        """Return a page in order of ids."""
        rows = await self._database.fetch(_PAGE, (self._ns, executor, limit))
        return [ExecutorRow(*row) for row in rows]

    async def executor_names(self) -> list[str]:
        """Return the names there are, up to `NAMES_MAX`."""
        return [name for (name,) in await self._database.fetch(_EXECUTOR_NAMES, (self._ns, NAMES_MAX))]

    async def revoked_keys(self) -> list[str]:
        """Return the public keys that are out: of revoked executors, and earlier ones; the latest `REVOKED_MAX`."""
        each = (self._ns, REVOKED_MAX)
        found = await self._database.fetch(_REVOKED, (*each, *each, REVOKED_MAX))
        return [key for key, _ in found]

    async def token(self, token: str) -> TokenState | None:
        """Return a join token, or None."""
        rows = await self._database.fetch(_JOINING, (self._ns, token))
        return TokenState(*rows[0]) if rows else None

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

    async def signer(self, public_key: str) -> SignerRow | None:
        """Return a key, or None."""
        rows = await self._database.fetch(_BY_KEY, (self._ns, public_key))
        return SignerRow(*rows[0]) if rows else None

    async def signers(self) -> list[SignerRow]:
        """Return keys, those that are trusted first, the latest decision first; at most `SIGNERS_MAX`."""
        return [SignerRow(*row) for row in await self._database.fetch(_SIGNERS, (self._ns, SIGNERS_MAX))]

    async def agent_names(self) -> list[str]:
        """Return the names there are, up to `NAMES_MAX`."""
        return [name for (name,) in await self._database.fetch(_AGENT_NAMES, (self._ns, NAMES_MAX))]

    async def version_names(self, name: str) -> list[str]:
        """Return the versions of an agent, the newest first, up to `NAMES_MAX`."""
        rows = await self._database.fetch(_VERSION_NAMES, (self._ns, name, NAMES_MAX))
        return [version for (version,) in rows]
