"""What a task that has no executor waits for: who could take it, who could when they are back, and who never will.

Machines come and go after a submit. What is offline, drained, stopped by an order or not trusted now may be back,
and a new one may join: a task waits for them, and says so. Only what was revoked is out for good. Where a task was
to have attempts on machines that differ, and those that are left cannot make all of them any more since others were
revoked, it is decided without them (`domain/deciding.py`).
"""

from collections.abc import Collection, Iterable
from typing import Final

import msgspec
from hive_common.contracts.judgement import Distinct, Producer
from hive_common.judgement.quorum import unit_of

from hive_scheduler.domain.placement import NO_FREE_SLOT, Device, Need, Weights, never_reason, state_reason

NAMES_MAX: Final = 3
"""Machines that are named; of the others it is said how many they are."""

_WHICH: Final = (
    *("a first", "a second", "a third", "a fourth", "a fifth", "a sixth", "a seventh", "an eighth", "a ninth"),
)
_MAY_CHANGE: Final = {
    "offline": "is offline",
    "drained": "is drained",
    "battery_low": "has little battery",
    "killed": "is stopped by an order",
    "quarantined": "is in quarantine",
    "new_executor": "is not known yet",
}


class Shortage(msgspec.Struct, frozen=True):
    """How a task that waits stands to the machines that are known.

    Attributes:
        wanted: how many attempts have no executor.
        held: devices, owners or executors (as `distinct` counts) that have attempts of it, or their results.
        there: how many others may take one now.
        away: how many may when they are back; `names` says of some why they are away.
        gone: attempts that nobody is left for, since machines were revoked.
    """

    wanted: int
    held: int
    there: int
    away: int
    gone: int
    names: tuple[tuple[str, str], ...] = ()


def shortage_of(need: Need, wanted: int, distinct: Distinct, devices: Iterable[Device], held: int = 0) -> Shortage:
    """Return how things stand for `wanted` attempts that need this, beside those that are `held` already."""
    there, away, revoked = set[str](), set[str](), set[str]()
    names: list[tuple[str, str]] = []
    for device in devices:
        reason = _reason(device, need)
        unit = _unit(device, distinct)
        if reason is None:
            there.add(unit)
        elif reason == "revoked":
            revoked.add(unit)
        elif reason in _MAY_CHANGE:
            away.add(unit)
            names.append((device.name, reason))
    away -= there
    revoked -= there | away
    if distinct == "none":
        # Each of them may take all.
        left, out = (wanted if there or away else 0), (wanted if revoked else 0)
    else:
        left, out = len(there | away), len(revoked)
    gone = min(max(wanted - left, 0), out)
    return Shortage(wanted, held, len(there), len(away), gone, tuple(sorted(names)))


def _unit(device: Device, distinct: Distinct) -> str:
    by: Distinct = "executor" if distinct == "none" else distinct
    return unit_of(by, Producer(0, device.executor, device.capabilities.device, device.owner))


def _reason(device: Device, need: Need) -> str | None:
    """Return why a device takes no attempt now, other than for want of a slot; that it is revoked only where that
    is what keeps it from ever taking one.
    """
    back = msgspec.structs.replace(device, revoked=False, killed=False)
    reason = never_reason(back, need)
    if reason is not None and reason not in _MAY_CHANGE:
        return reason
    if device.revoked or device.killed:
        return "revoked" if device.revoked else "killed"
    if reason is not None:
        return reason
    state = state_reason(device, Weights())
    return None if state == NO_FREE_SLOT else state


def in_words(shortage: Shortage, distinct: Distinct, judges: bool = False) -> str:
    """Return what a task waits for, for people; empty where it only waits for its turn."""
    several = distinct != "none"
    there = shortage.there if several else shortage.wanted * min(shortage.there, 1)
    if there >= shortage.wanted:
        return ""
    names = [f"{name} {_MAY_CHANGE[reason]}" for name, reason in shortage.names[:NAMES_MAX]]
    rest = len(shortage.names) - len(names)
    names += [f"{rest} more {'is' if rest == 1 else 'are'} away"] if rest else []
    tail = f" ({', '.join(names)})" if names else ""
    total, have = shortage.held + shortage.wanted, shortage.held + there
    if not several or total == 1:
        which = "that made nothing of what it judges" if judges else "that may run it"
        return f"waits for an executor {which}: none is there{tail}"
    said = f"{have or 'none'} of {total} that may run it {'are' if have > 1 else 'is'} there"
    which = _WHICH[have] if have < len(_WHICH) else "one more"
    return f"waits for {which} {distinct}: {said}{tail}"


def units_of(distinct: Distinct, places: Collection[Producer]) -> int:
    """Return how many of these there are, as `distinct` counts."""
    return len({unit_of(distinct, place) for place in places})
