"""Kill orders at the router: calls of what is stopped are refused, and those that run end."""

from hive_common.control.kill_log import KillLog
from hive_common.control.orders import ALL, Stopped, in_words
from hive_common.inference.calls import ModelCall
from hive_common.kernel.errors import PermissionDenied


def refused(kills: KillLog, call: ModelCall) -> PermissionDenied | None:
    """Return the error of a call that may not be made, or go on; None where it may."""
    stopped = kills.verifier.stopped
    entry = _entry(stopped, call) if stopped else None
    return None if entry is None else killed(kills, entry)


def killed(kills: KillLog, entry: str) -> PermissionDenied:
    """Return the error of what an entry stops, or has stopped."""
    words = (
        f"is stopped {kills.words(entry)}"
        if entry in kills.standing
        else "was stopped by a kill order since this attempt began, and ended with that"
    )
    return PermissionDenied(f"{in_words(entry)} {words}", reason="killed", entry=entry)


def _entry(stopped: Stopped, call: ModelCall) -> str | None:
    if stopped.everything:
        return ALL
    name, _, version = call.agent.partition("@")
    return stopped.attempt(call.origin, name, version, call.job)
