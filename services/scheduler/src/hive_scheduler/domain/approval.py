"""An approval: a person decides whether an attempt may do one thing.

    pending ──→ approved | denied | expired        (terminal: the second event of its stream is the last)

An approval belongs to a task and to the hash of an action, not to an attempt: what was decided for one attempt
holds for the next that wants the same.
"""

from typing import Final, Literal

import msgspec
from hive_common.contracts.events import ApprovalDecided, ApprovalExpired, ApprovalRequested, Event
from hive_common.kernel.errors import Conflict, CorruptLog, FailedPrecondition
from hive_common.kernel.ids import derive_id

ApprovalStatus = Literal["pending", "approved", "denied", "expired"]
VERDICTS: Final = ("approved", "denied")
TIMED_OUT: Final = "nobody decided in time"
TASK_ENDED: Final = "the task has ended"


class ApprovalState(msgspec.Struct):
    """An approval as its events left it. `until_us`: what was approved holds until then."""

    id: str
    job: str
    task: str
    attempt: int
    agent: str
    permission: str
    action: str
    hash: str
    expires_us: int
    status: ApprovalStatus = "pending"
    version: int = 1
    by: str = ""
    reason: str = ""
    until_us: int = 0


def approval_id(job: str, task: str, hash_: str) -> str:
    """Return the id that the approval of an action always has, however often it is asked for."""
    return derive_id("approval", job, task, hash_)


def decide(
    approval: ApprovalState, verdict: str, hash_: str, by: str, reason: str, now_us: int, valid_us: int
) -> list[Event]:
    """Return the event of a person's decision; none where the same was decided before.

    Raises:
        Conflict: the action is another one than the person saw, or it was decided otherwise.
        FailedPrecondition: it is too late.
    """
    if hash_ != approval.hash:
        raise Conflict(
            f"the action of approval {approval.id} has the hash {approval.hash}, not {hash_[:64]}: look again",
            approval=approval.id,
        )
    if approval.status == verdict:
        return []
    if approval.status == "expired" or (approval.status == "pending" and now_us >= approval.expires_us):
        raise FailedPrecondition(
            f"approval {approval.id} has expired: {approval.reason or TIMED_OUT}", approval=approval.id
        )
    if approval.status != "pending":
        raise Conflict(f"approval {approval.id} was {approval.status} already", approval=approval.id)
    until_us = now_us + valid_us if verdict == "approved" else 0
    return [ApprovalDecided(verdict, hash_, by, reason, until_us)]


def expire(approval: ApprovalState, reason: str) -> list[Event]:
    """Return the event that ends an approval without a decision; none where it has ended."""
    return [ApprovalExpired(reason)] if approval.status == "pending" else []


def evolve(approvals: dict[str, ApprovalState], stream: str, event: Event) -> None:
    """Apply one event to the approvals of a job.

    Raises:
        CorruptLog: it does not follow from the state: a second end, or a decision over another action.
    """
    found = approvals.get(stream)
    if isinstance(event, ApprovalRequested):
        if found is not None:
            raise CorruptLog(f"approval {stream} was asked for twice", approval=stream)
        approvals[stream] = ApprovalState(
            stream,
            event.job,
            event.task,
            event.attempt,
            event.agent,
            event.permission,
            event.action,
            event.hash,
            event.expires_us,
        )
        return
    if found is None or found.status != "pending":
        raise CorruptLog(f"approval {stream} is not pending and got {type(event).__name__}", approval=stream)
    match event:
        case ApprovalDecided(verdict="approved" | "denied") if event.hash == found.hash:
            found.status = "approved" if event.verdict == "approved" else "denied"
            found.by, found.reason, found.until_us = event.by, event.reason, event.until_us
        case ApprovalExpired():
            found.status, found.reason = "expired", event.reason
        case _:
            raise CorruptLog(f"approval {stream}: {type(event).__name__} does not fit", approval=stream)
    found.version += 1
