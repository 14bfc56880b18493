"""The registry's view of API keys."""

from typing import Any, Final

import msgspec
from hive_common.contracts.events import KeyCreated, KeyRevoked
from hive_common.eventlog.log import Stored
from hive_common.kernel.ids import derive_id
from hive_common.ops.database import Database

from hive_registry.domain.keys import KeyState

_CREATE: Final = """
INSERT INTO registry.api_keys
    (ns, owner, stream, name, digest, scope, pin, counts_only, cloud, pseudonym, created_us, version, position)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_REVOKE: Final = """
UPDATE registry.api_keys SET revoked_us = %s, version = %s, position = %s WHERE ns = %s AND stream = %s
"""
_KEY = "name, digest, scope, pin, counts_only, cloud, pseudonym, created_us, revoked_us, version, position"
_BY_NAME = f"SELECT {_KEY} FROM registry.api_keys WHERE ns = %s AND name = %s"  # noqa: S608
_BY_DIGEST = f"SELECT {_KEY} FROM registry.api_keys WHERE ns = %s AND digest = %s"  # noqa: S608
_PAGE = f"SELECT {_KEY} FROM registry.api_keys WHERE ns = %s AND name > %s ORDER BY name LIMIT %s"  # noqa: S608


class KeyRow(msgspec.Struct, frozen=True):
    """A key as the view has it."""

    name: str
    digest: str
    scope: str
    pin: str
    counts_only: bool
    cloud: bool
    pseudonym: str
    created_us: int
    revoked_us: int
    version: int
    position: int

    @property
    def state(self) -> KeyState:
        """What decisions are made on."""
        created = KeyCreated(self.name, self.digest, self.scope, self.pin, self.counts_only, self.cloud)
        return KeyState(self.version, created, self.revoked_us > 0)


class KeyViews:
    """Reads of one namespace.

    Args:
        database: of the service.
        ns: the namespace.
    """

    def __init__(self, database: Database, ns: str) -> None:
        self._database = database
        self._ns = ns

    async def named(self, name: str) -> KeyRow | None:
        """Return the key of a name, or None."""
        return self._first(await self._database.fetch(_BY_NAME, (self._ns, name)))

    async def with_digest(self, digest: str) -> KeyRow | None:
        """Return the key whose secret has a digest, or None."""
        return self._first(await self._database.fetch(_BY_DIGEST, (self._ns, digest)))

    async def after(self, name: str, limit: int) -> list[KeyRow]:
        """Return a page in order of names."""
        return [KeyRow(*row) for row in await self._database.fetch(_PAGE, (self._ns, name, limit))]

    @staticmethod
    def _first(rows: list[tuple[Any, ...]]) -> KeyRow | None:
        return KeyRow(*rows[0]) if rows else None


def key_statement(stored: Stored, event: KeyCreated | KeyRevoked) -> tuple[str, tuple[Any, ...]]:
    """Return what an event of a key changes in the view."""
    moved = (stored.version, stored.position)
    if isinstance(event, KeyRevoked):
        return _REVOKE, (stored.ts_us, *moved, stored.ns, stored.stream)
    what = (event.name, event.digest, event.scope, event.pin, event.counts_only, event.cloud)
    pseudonym = derive_id("caller", stored.owner, event.name)
    return _CREATE, (stored.ns, stored.owner, stored.stream, *what, pseudonym, stored.ts_us, *moved)
