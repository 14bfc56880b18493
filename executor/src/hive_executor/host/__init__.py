"""What guests may ask of the host, one file for each permission, and which of it an attempt was granted."""

from typing import Final, NamedTuple

from hive_common.contracts.messages import Assignment
from hive_common.contracts.permissions import Permissions
from hive_common.inference.calls import PIN_ANY, Completer, narrowest
from hive_common.kernel.errors import HiveError, PermissionDenied
from hive_common.permissions import denied

from hive_executor.host.http import HttpAccess, HttpClient
from hive_executor.host.kv import KvAccess, KvStore
from hive_executor.host.model import ModelAccess
from hive_executor.sandbox import Capabilities, Capability

__all__ = ["HttpAccess", "KvAccess", "Means", "ModelAccess", "Of", "allowed", "granted", "keep", "scratch"]


class Means(NamedTuple):
    """With what a device does for guests what they were granted.

    Args:
        completer: calls models.
        http: sends requests.
        kv: keeps values.
    """

    completer: Completer
    http: HttpClient
    kv: KvStore


class Of(NamedTuple):
    """Whose capabilities these are; without a task, of a try-out."""

    job: str = ""
    task: str = ""
    attempt: int = 0
    token: str = ""


class _Unsupported:
    """Stands where what was granted would be done, if anybody did it yet."""

    def __init__(self, permission: str, how: str = "") -> None:
        self._permission = permission
        self._how = how

    async def call(self, operation: str, request: bytes, left_ms: int) -> bytes:
        """Refuse."""
        raise _unsupported(self._permission, self._how)


_ASK: Final = " with a question at each use (`--ask`)"


def _unsupported(permission: str, how: str = "") -> PermissionDenied:
    return denied(permission, f"is granted{how}, which is not supported yet")


def granted(assignment: Assignment, permissions: Permissions, means: Means) -> Capabilities:
    """Return what the guest of an attempt may ask for, and nothing else (law 6).

    Args:
        assignment: of the attempt.
        permissions: what its capability token says.
        means: of this device.

    Raises:
        PermissionDenied: job and manifest pin data to places that exclude each other.
    """
    whose = Of(assignment.job, assignment.task, assignment.attempt, assignment.token)
    return allowed(permissions, means, whose, assignment.pin, assignment.counts_only)


def allowed(
    permissions: Permissions, means: Means, whose: Of, pin: str = "", counts_only: bool = False
) -> Capabilities:
    """Return the capabilities that permissions allow.

    Args:
        permissions: all that is allowed.
        means: of this device.
        whose: who has them.
        pin: of the job: where the data of its model calls may go.
        counts_only: of the job: of these no prompt and no completion are kept.

    Raises:
        PermissionDenied: as `granted`.
    """
    found: dict[str, Capability] = {}
    if (model := permissions.model) is not None:
        found["model"] = ModelAccess(
            means.completer,
            model,
            pin=narrowest(pin or PIN_ANY, model.pin),
            counts_only=counts_only,
            job=whose.job,
            task=whose.task,
            attempt=whose.attempt,
            token=whose.token,
        )
    if permissions.http is not None:
        found["http"] = HttpAccess(means.http, permissions.http, task=whose.task, attempt=whose.attempt)
    if permissions.kv is not None:
        found["kv"] = KvAccess(means.kv, permissions.kv, token=whose.token)
    if permissions.fork is not None:
        found["fork"] = _Unsupported("fork")
    return found | {name: _Unsupported(name, _ASK) for name in permissions.asks if name in found}


def scratch(permissions: Permissions) -> int:
    """Return how many bytes of files a guest may have; 0 for none.

    Raises:
        PermissionDenied: a person would have to be asked.
    """
    if "scratch" in permissions.asks:
        raise _unsupported("scratch", _ASK)
    return permissions.scratch_bytes


async def keep(capabilities: Capabilities) -> None:
    """Hand over what a guest that has succeeded wants to be kept.

    Raises:
        PermissionDenied: it may not keep that, or not so much: the attempt has not succeeded after all.
        HiveError: it cannot be said whether it is kept; doing all of it again is safe.
    """
    kv = capabilities.get("kv")
    if not isinstance(kv, KvAccess):
        return
    try:
        await kv.stage()
    except HiveError as error:
        if error.retryable:
            raise
        raise denied("kv", f"does not cover what was written: {error.message}") from error
