"""The registry's view of grants."""

from typing import Any, Final

import msgspec
from hive_common.contracts.events import PermissionGranted, PermissionRevoked
from hive_common.contracts.permissions import PERMISSIONS, Permissions
from hive_common.eventlog.log import Stored
from hive_common.ops.database import Database
from hive_common.permissions.grants import Grant

from hive_registry.domain.grants import GrantsState

TYPES: Final = ("PermissionGranted", "PermissionRevoked")

_GRANT = """
INSERT INTO registry.grants
    (ns, agent, permission, owner, granted, asked, ask, until_us, since_us, version, position)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (ns, agent, permission) DO UPDATE SET
    granted = excluded.granted, asked = excluded.asked, ask = excluded.ask, until_us = excluded.until_us,
    since_us = excluded.since_us, version = excluded.version, position = excluded.position
"""
_OF_AGENT = """
SELECT permission, granted, asked, ask, until_us, since_us, version, position FROM registry.grants
WHERE ns = %s AND agent = %s LIMIT %s
"""

_decode = msgspec.json.Decoder(Permissions).decode
_encode = msgspec.json.Encoder().encode


class GrantRow(msgspec.Struct, frozen=True):
    """A permission that was granted; `grant` is None where it was taken back."""

    permission: str
    grant: Grant | None
    since_us: int
    version: int
    position: int


def statement_of(stored: Stored, event: PermissionGranted | PermissionRevoked) -> tuple[Any, Any]:
    """Return what an event changes in the view."""
    key = (stored.ns, event.agent, event.permission, stored.owner)
    at = (stored.ts_us, stored.version, stored.position)
    if isinstance(event, PermissionRevoked):
        return _GRANT, (*key, None, None, False, 0, *at)
    return _GRANT, (*key, _encode(event.granted), _encode(event.asked), event.ask, event.until_us, *at)


class GrantViews:
    """Reads of one namespace.

    Args:
        database: of the service.
        ns: the namespace.
    """

    def __init__(self, database: Database, ns: str) -> None:
        self._database = database
        self._ns = ns

    async def of(self, agent: str) -> dict[str, GrantRow]:
        """Return what an agent was ever granted, by permission."""
        rows = await self._database.fetch(_OF_AGENT, (self._ns, agent, len(PERMISSIONS)))
        return {row[0]: _row(*row) for row in rows}


def state_of(rows: dict[str, GrantRow]) -> GrantsState:
    """Return what decisions are made on."""
    grants = {name: row.grant for name, row in rows.items() if row.grant is not None}
    return GrantsState(max((row.version for row in rows.values()), default=0), grants)


def _row(
    permission: str,
    granted: bytes | None,
    asked: bytes | None,
    ask: bool,
    until_us: int,
    since_us: int,
    version: int,
    position: int,
) -> GrantRow:
    grant = None
    if granted is not None and asked is not None:
        grant = Grant(_decode(granted), _decode(asked), ask, until_us)
    return GrantRow(permission, grant, since_us, version, position)
