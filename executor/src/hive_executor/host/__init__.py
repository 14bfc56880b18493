"""What guests may ask of the host, one file for each permission, and which of it an attempt was granted."""

from collections.abc import Callable
from typing import NamedTuple

from hive_common.contracts.budgets import SharedBudget
from hive_common.contracts.events import Child
from hive_common.contracts.messages import Assignment
from hive_common.contracts.permissions import Permissions
from hive_common.inference.calls import PIN_ANY, Completer, narrowest
from hive_common.kernel.errors import HiveError
from hive_common.permissions import denied
from hive_common.permissions.actions import scratch_action
from hive_common.permissions.tokens import Claims

from hive_executor.host.approval import Approvals, Approver
from hive_executor.host.fork import ForkAccess
from hive_executor.host.http import HttpAccess, HttpClient
from hive_executor.host.kv import KvAccess, KvStore
from hive_executor.host.model import ModelAccess
from hive_executor.host.progress import Marks, ProgressAccess
from hive_executor.sandbox import Capabilities, Capability

__all__ = [
    "ForkAccess",
    "HttpAccess",
    "KvAccess",
    "Marks",
    "Means",
    "ModelAccess",
    "Of",
    "allowed",
    "always",
    "approvals_of",
    "forked",
    "granted",
    "keep",
    "scratch",
]


class Means(NamedTuple):
    """With what a device does for guests what they were granted.

    Args:
        completer: calls models.
        http: sends requests.
        kv: keeps values.
        approver: has people decide; None where there is nobody.
    """

    completer: Completer
    http: HttpClient
    kv: KvStore
    approver: Approver | None = None


class Of(NamedTuple):
    """Whose capabilities these are; without a task, of a try-out. `budgets` and `replicated` as in its token."""

    job: str = ""
    task: str = ""
    attempt: int = 0
    approvals: Approvals = Approvals()
    budgets: tuple[SharedBudget, ...] = ()
    replicated: bool = False


def approvals_of(assignment: Assignment, permissions: Permissions, means: Means) -> Approvals:
    """Return what asks people for an attempt, and has its token."""
    agent = f"{assignment.agent.name}@{assignment.agent.version}"
    return Approvals(assignment.token, permissions.asks, agent, means.approver)


def granted(
    assignment: Assignment,
    permissions: Permissions,
    means: Means,
    approvals: Approvals | None = None,
    claims: Claims | None = None,
) -> Capabilities:
    """Return what the guest of an attempt may ask for, and nothing else (law 6).

    Args:
        assignment: of the attempt.
        permissions: what its capability token says.
        means: of this device.
        approvals: of the attempt (`approvals_of`).
        claims: of its token; None without one.

    Raises:
        PermissionDenied: job and manifest pin data to places that exclude each other.
    """
    asking = approvals or approvals_of(assignment, permissions, means)
    whose = Of(assignment.job, assignment.task, assignment.attempt, asking)
    if claims is not None:
        whose = whose._replace(budgets=claims.budgets, replicated=claims.replicated)
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
            approvals=whose.approvals,
            budgets=whose.budgets,
        )
    if permissions.http is not None:
        found["http"] = HttpAccess(
            means.http,
            permissions.http,
            task=whose.task,
            attempt=whose.attempt,
            approvals=whose.approvals,
            replicated=whose.replicated,
        )
    if permissions.kv is not None:
        found["kv"] = KvAccess(means.kv, permissions.kv, approvals=whose.approvals)
    if permissions.fork is not None:
        found["fork"] = ForkAccess(permissions.fork, approvals=whose.approvals)
    return found


def always(said: Callable[[int], None]) -> Capabilities:
    """Return what every guest may ask for, whatever it was granted.

    Args:
        said: takes how far the guest says it is, in thousandths.
    """
    return {"progress": ProgressAccess(said)}


async def scratch(permissions: Permissions, approvals: Approvals) -> int:
    """Return how many bytes of files a guest may have; 0 for none.

    Raises:
        PermissionDenied: a person had to be asked, and did not approve.
        HiveError: nobody could be asked.
    """
    if permissions.scratch_bytes:
        await approvals.need("scratch", lambda agent: scratch_action(agent, permissions.scratch_bytes))
    return permissions.scratch_bytes


def forked(capabilities: Capabilities) -> tuple[Child, ...]:
    """Return the tasks that a guest that has succeeded wants to be made."""
    fork = capabilities.get("fork")
    return fork.staged if isinstance(fork, ForkAccess) else ()


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
