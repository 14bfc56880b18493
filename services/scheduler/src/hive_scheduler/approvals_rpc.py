"""The scheduler's gRPC service Approvals: people who decide (proto/hive_proto/approvals/v1/approvals.proto)."""

from typing import Any, Final

from hive_common.kernel.errors import InvalidArgument
from hive_common.permissions.actions import Action
from hive_common.permissions.shown import lines_of
from hive_proto.approvals.v1 import approvals_pb2, approvals_pb2_grpc

from hive_scheduler.approvals import Approvals
from hive_scheduler.domain.approval import ApprovalState
from hive_scheduler.submission import check_caller

LISTED_MAX: Final = 200


class ApprovalsService(approvals_pb2_grpc.ApprovalsServicer):
    """hive.approvals.v1.Approvals."""

    def __init__(self, approvals: Approvals) -> None:
        self._approvals = approvals

    async def List(self, request: approvals_pb2.ListRequest, context: Any) -> approvals_pb2.ListResponse:
        """Return approvals of open jobs, `LISTED_MAX` at most."""
        wanted = (one for one in self._approvals.all(request.job_id) if request.all or one.status == "pending")
        oldest = sorted(wanted, key=lambda one: one.expires_us)[:LISTED_MAX]
        return approvals_pb2.ListResponse(approvals=map(_message, oldest))

    async def Get(self, request: approvals_pb2.GetRequest, context: Any) -> approvals_pb2.Approval:
        """Return one approval."""
        return _message(self._approvals.find(request.approval_id)[1])

    async def Decide(self, request: approvals_pb2.DecideRequest, context: Any) -> approvals_pb2.Approval:
        """Commit a decision and answer."""
        check_caller(request.caller)
        if not request.hash:
            raise InvalidArgument("hash: expected that of the action, as the approval shows it", path="hash")
        by = request.caller or "anonymous"
        return _message(
            await self._approvals.decide(request.approval_id, request.verdict, request.hash, request.reason, by)
        )


def _message(approval: ApprovalState) -> approvals_pb2.Approval:
    return approvals_pb2.Approval(
        approval_id=approval.id,
        job_id=approval.job,
        task_id=approval.task,
        attempt=approval.attempt,
        agent=approval.agent,
        permission=approval.permission,
        state=approval.status,
        hash=approval.hash,
        action=approval.action,
        shown=lines_of(Action(approval.agent, approval.permission, approval.action)),
        expires_us=approval.expires_us,
        by=approval.by,
        reason=approval.reason,
        until_us=approval.until_us,
    )
