"""What REST answers about approvals."""

from hive_proto.approvals.v1 import approvals_pb2

from hive_gateway.views import View


class Approval(View, frozen=True, kw_only=True):
    """Something that an attempt may do only if a person says so.

    `action` is what the hash is over, as the guest wants it; people are shown `shown`, which is the same without
    control characters and bidi marks, cut where it is long. `attempt` is the first that asked.
    """

    approval_id: str
    job_id: str
    task_id: str
    attempt: int
    agent: str
    permission: str
    state: str
    hash: str
    action: str
    shown: tuple[str, ...]
    expires_us: int
    by: str
    reason: str
    until_us: int


class ApprovalPage(View, frozen=True, kw_only=True):
    """Approvals, oldest first."""

    approvals: tuple[Approval, ...]


def approval(message: approvals_pb2.Approval) -> Approval:
    """Return the view of an approval."""
    return Approval(
        approval_id=message.approval_id,
        job_id=message.job_id,
        task_id=message.task_id,
        attempt=message.attempt,
        agent=message.agent,
        permission=message.permission,
        state=message.state,
        hash=message.hash,
        action=message.action,
        shown=tuple(message.shown),
        expires_us=message.expires_us,
        by=message.by,
        reason=message.reason,
        until_us=message.until_us,
    )
