"""Grants: what a person has allowed all versions of an agent, and what that makes of what one version asks for.

A grant remembers what was asked for when a person decided. A version that asks for more than that, if only in one
constraint, needs a new decision.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from hive_common.contracts.permissions import NONE, Permissions
from hive_common.kernel.clock import iso
from hive_common.kernel.errors import PermissionDenied
from hive_common.permissions.lattice import covers, joined, meet, named, only

Standing = Literal["granted", "asked", "expired", "stale", "unused"]
"""`asked`: not granted. `stale`: the version asks for more than a person decided on. `unused`: it does not ask."""


class Grant(NamedTuple):
    """One permission of one agent.

    Attributes:
        granted: with this permission alone.
        asked: what the manifest asked for when it was granted.
        ask: a person is asked at each use.
        until_us: when it ends; 0: never.
    """

    granted: Permissions
    asked: Permissions
    ask: bool = False
    until_us: int = 0


def standing(asked: Permissions, grant: Grant | None, now_us: int) -> Standing:
    """Say how a grant stands to what a version asks for; `asked` has one permission, or none."""
    if grant is None:
        return "asked"
    if grant.until_us and now_us >= grant.until_us:
        return "expired"
    if asked == NONE:
        return "unused"
    if not covers(grant.asked, asked) or meet(asked, grant.granted) == NONE:
        return "stale"
    return "granted"


def effective(
    agent: str, version: str, asked: Permissions, grants: Mapping[str, Grant], now_us: int
) -> Permissions:
    """Return what a version may do: what it asks for and was granted.

    Args:
        agent, version: for the error.
        asked: by the version.
        grants: of the agent, by permission.
        now_us: the time, in µs since 1970.

    Raises:
        PermissionDenied: it does not have all that it asks for; says which, why, and the command that grants it.
            `fields`: `agent`, `permissions`, `remedy`.
    """
    lacks: dict[str, str] = {}
    found = NONE
    for name in named(asked):
        wanted, grant = only(asked, name), grants.get(name)
        state = standing(wanted, grant, now_us)
        if grant is None or state != "granted":
            lacks[name] = _why(state, name, f"{agent}@{version}", grant)
        else:
            found = joined(found, meet(wanted, grant.granted), (name,) if grant.ask else ())
    if lacks:
        remedy = f"hive agent grant {agent} {' '.join(lacks)}"
        raise PermissionDenied(
            f"{'; '.join(lacks.values())}. Decide, then: {remedy}",
            agent=f"{agent}@{version}",
            permissions=list(lacks),
            remedy=remedy,
        )
    return found


def _why(state: Standing, name: str, agent: str, grant: Grant | None) -> str:
    if state == "expired" and grant is not None:
        return f"the grant of the permission `{name}` to {agent} expired at {iso(grant.until_us)}"
    if state == "stale":
        return f"{agent} asks for more of the permission `{name}` than was decided on, and needs a new grant"
    return f"the permission `{name}`, which {agent} asks for, is not granted"
