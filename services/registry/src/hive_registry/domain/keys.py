"""Keys for the API: who may call the gateway, besides the owner's key of the installation.

    (unknown) ── create ──→ good ── revoke ──→ revoked, for ever

A name is used once: what a key has spent, and what the log says of its calls, stays its own.
"""

import re
from typing import Final

import msgspec
from hive_common.contracts.events import Event, KeyCreated, KeyRevoked
from hive_common.contracts.keys import KEY_NAME_EXPECTED, is_key_name
from hive_common.inference.calls import PINS, is_pin
from hive_common.kernel.errors import Conflict, InvalidArgument, NotFound, UnknownEvent

from hive_registry.domain.executors import check_text

USER: Final = "user"
ADMIN: Final = "admin"
SCOPES: Final = (USER, ADMIN)
RESERVED: Final = frozenset({"owner", "without-key"})
"""Whoever shows the key of the installation, and whoever shows none, has these names."""

REASON_CHARACTERS_MAX: Final = 500
_DIGEST: Final = re.compile(r"[0-9a-f]{64}\Z")


class KeyState(msgspec.Struct, frozen=True):
    """A key as the log has it. Version 0 is one that never was."""

    version: int = 0
    created: KeyCreated | None = None
    revoked: bool = False


NEVER_CREATED: Final = KeyState()


def create(state: KeyState, key: KeyCreated) -> tuple[Event, ...]:
    """Return the events of a new key; none where the very same one is there already.

    Raises:
        InvalidArgument: it cannot be one.
        Conflict: there is, or was, another of this name.
    """
    _check(key)
    if state.created is not None:
        if state.created == key and not state.revoked:
            return ()
        said = f"key `{key.name}` was revoked" if state.revoked else f"there is a key `{key.name}` already"
        raise Conflict(f"name: {said}; expected a name that was never used", path="name")
    return (key,)


def revoke(state: KeyState, name: str, reason: str) -> tuple[Event, ...]:
    """Return the events of a revocation; none where it is revoked. Raises NotFound, InvalidArgument."""
    check_text("reason", reason, REASON_CHARACTERS_MAX)
    if state.created is None:
        raise NotFound(f"there is no key `{name[:80]}`; see: hive key list")
    return () if state.revoked else (KeyRevoked(reason),)


def evolve_key(state: KeyState, event: Event) -> KeyState:
    """Return the state after `event`. Raises UnknownEvent for one that is not about keys (law 11)."""
    match event:
        case KeyCreated():
            return KeyState(state.version + 1, event)
        case KeyRevoked():
            return msgspec.structs.replace(state, version=state.version + 1, revoked=True)
    raise UnknownEvent(f"a key's stream holds a {type(event).__name__}")


def _check(key: KeyCreated) -> None:
    if not is_key_name(key.name):
        raise InvalidArgument(f"name: got {key.name[:80]!r}; expected {KEY_NAME_EXPECTED}", path="name")
    if key.name in RESERVED:
        raise InvalidArgument(f"name: `{key.name}` is taken by the installation; expected another", path="name")
    if key.scope not in SCOPES:
        raise InvalidArgument(f"scope: got {key.scope[:40]!r}; expected user or admin", path="scope")
    if not is_pin(key.pin):
        raise InvalidArgument(f"pin: got {key.pin[:80]!r}; expected {PINS}", path="pin")
    if not _DIGEST.match(key.digest):
        raise InvalidArgument("digest: expected the SHA-256 of a secret, 64 hex digits", path="digest")
