"""Grants of one agent: what a person may grant, and what comes of it.

    (none) ── grant ──→ granted ←── grant ── revoke ──→ revoked

A grant is no wider than what the agent's newest version asks for. The same again changes nothing.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from hive_common.artifacts.documents import nearest, refuse
from hive_common.contracts.events import Event, PermissionGranted, PermissionRevoked
from hive_common.contracts.permissions import PERMISSIONS, Permissions
from hive_common.permissions import covers, named, only, parse_one
from hive_common.permissions.grants import Grant

from hive_registry.domain.executors import check_text

REASON_CHARACTERS_MAX: Final = 500
YEAR_9999_US: Final = 253_402_300_799_000_000


class GrantsState(msgspec.Struct, frozen=True):
    """The grants of an agent as the log has them. Version 0 is an agent that was never granted anything."""

    version: int = 0
    grants: dict[str, Grant] = {}


class Asking(msgspec.Struct, frozen=True):
    """What the newest version of an agent asks for: `documents` as its manifest has it, by permission."""

    agent: str
    version: str
    asked: Permissions
    documents: dict[str, Any]

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.agent}@{self.version}"


def grant(
    state: GrantsState,
    asking: Asking,
    wanted: Mapping[str, Any],
    *,
    ask: bool,
    until_us: int,
    now_us: int,
) -> tuple[Event, ...]:
    """Decide what a person grants.

    Args:
        state: of the agent's grants.
        asking: what it asks for.
        wanted: each permission, with what is to be narrower than in the manifest, as it would stand there; None for
            all that is asked for.
        ask: a person is asked at each use.
        until_us: when it ends; 0: never.
        now_us: the time.

    Raises:
        InvalidArgument: not asked for, wider than that, or over already; says the path, and what would be right.
    """
    if not wanted:
        refuse(
            "grant", "permissions", "is empty", f"{_one_of(named(asking.asked))}a version that asks for something"
        )
    if until_us and not now_us < until_us <= YEAR_9999_US:
        refuse("grant", "until", "lies in the past, or too far ahead", "a time to come")
    found: list[Event] = []
    for name, narrower in wanted.items():
        asked = _asked(asking, name)
        granted = asked if narrower is None else _narrowed(asking, name, narrower)
        decided = Grant(granted, asked, ask, until_us)
        if state.grants.get(name) != decided:
            found.append(PermissionGranted(asking.agent, name, granted, asked, ask, until_us))
    return tuple(found)


def revoke(state: GrantsState, agent: str, names: tuple[str, ...], reason: str) -> tuple[Event, ...]:
    """Decide what is taken back; without names, all that is granted. Raises InvalidArgument for other names."""
    check_text("reason", reason, REASON_CHARACTERS_MAX)
    for name in names:
        _check_known(name)
    chosen = [name for name in PERMISSIONS if name in state.grants and (not names or name in names)]
    return tuple(PermissionRevoked(agent, name, reason) for name in chosen)


def _asked(asking: Asking, name: str) -> Permissions:
    _check_known(name)
    if name not in named(asking.asked):
        refuse(
            "grant",
            f"permissions.{name}",
            f"{asking.reference} does not ask for {'it' if named(asking.asked) else 'anything'}",
            f"{_one_of(named(asking.asked))}a version whose manifest.yaml asks for `{name}`",
        )
    return only(asking.asked, name)


def _narrowed(asking: Asking, name: str, narrower: Any) -> Permissions:
    document = asking.documents[name]
    whole = {**document, **narrower} if isinstance(document, dict) and isinstance(narrower, dict) else narrower
    granted = parse_one(name, whole, "grant")
    asked = only(asking.asked, name)
    if not covers(asked, granted):
        path = f"permissions.{name}"
        if isinstance(document, dict) and isinstance(narrower, dict):
            wider = (key for key, value in narrower.items() if not _fits(name, document | {key: value}, asked))
            path = ".".join((path, *(key for key in [next(wider, "")] if key)))
        refuse(
            "grant",
            path,
            f"is wider than what {asking.reference} asks for",
            f"{_plain(document, path)} or less; what it needs beyond that has to stand in its manifest.yaml first",
        )
    return granted


def _fits(name: str, document: dict[str, Any], asked: Permissions) -> bool:
    return covers(asked, parse_one(name, document, "grant"))


def _plain(document: Any, path: str) -> str:
    key = path.rpartition(".")[2]
    value = document.get(key, document) if isinstance(document, dict) else document
    return msgspec.json.encode(value).decode()[:200]


def _check_known(name: str) -> None:
    if name not in PERMISSIONS:
        close = nearest(name, PERMISSIONS)
        expected = f"`{close}`" if close else "one of " + ", ".join(PERMISSIONS)
        refuse("grant", f"permissions.{name[:80]}", "unknown permission", expected)


def _one_of(names: tuple[str, ...]) -> str:
    return f"one of {', '.join(names)}, or " if names else ""
