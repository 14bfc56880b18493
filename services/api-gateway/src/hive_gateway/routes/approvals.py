"""`/v1/approvals`: what attempts may do only if a person says so, for whoever decides."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from hive_common.kernel.ids import ID_PATTERN
from hive_proto.approvals.v1 import approvals_pb2
from msgspec import Struct
from starlette.responses import Response

from hive_gateway.approval_views import Approval, ApprovalPage, approval
from hive_gateway.bodies import read_command
from hive_gateway.documents import answers, struct_body
from hive_gateway.peers import Peers
from hive_gateway.replies import reply
from hive_gateway.upstream import UpstreamDep

_ID = ID_PATTERN.pattern.replace(r"\Z", "$")
ApprovalId = Annotated[str, Path(pattern=f"^{_ID}", description="id of an approval")]
OfJob = Annotated[str, Query(max_length=36, description="only those of this job")]


class Decision(Struct, frozen=True, forbid_unknown_fields=True):
    """A decision over the action with this hash. The reason is kept in the log, and of a refusal told the agent."""

    hash: str
    reason: str = ""


def router(peers: Peers) -> APIRouter:
    """Return the paths of approvals."""
    api = APIRouter(prefix="/v1/approvals", tags=["approvals"])

    @api.get("", operation_id="listApprovals", responses=answers(ApprovalPage), response_class=Response)
    async def list_(upstream: UpstreamDep, all: bool = False, job: OfJob = "") -> Response:
        """List what waits for a decision, with `all` what was decided in open jobs too."""
        message = approvals_pb2.ListRequest(all=all, job_id=job)
        found = await upstream.ask(peers.scheduler, peers.approvals.List, message)
        return reply(ApprovalPage(approvals=tuple(map(approval, found.approvals))))

    @api.get(
        "/{approval_id}",
        operation_id="getApproval",
        responses=answers(Approval, 404),
        response_class=Response,
    )
    async def get(upstream: UpstreamDep, approval_id: ApprovalId) -> Response:
        """Look at one."""
        message = approvals_pb2.GetRequest(approval_id=approval_id)
        return reply(approval(await upstream.ask(peers.scheduler, peers.approvals.Get, message)))

    @api.post(
        "/{approval_id}/approve",
        operation_id="approve",
        responses=answers(Approval, 400, 404, 409),
        openapi_extra=struct_body(Decision),
        response_class=Response,
    )
    async def approve(request: Request, upstream: UpstreamDep, approval_id: ApprovalId) -> Response:
        """Let it happen, just this: another hash than the action's is refused."""
        body = await read_command(request, Decision)
        return await decide(upstream, approval_id, "approved", body.hash, body.reason)

    @api.post(
        "/{approval_id}/deny",
        operation_id="deny",
        responses=answers(Approval, 400, 404, 409),
        openapi_extra=struct_body(Decision),
        response_class=Response,
    )
    async def deny(request: Request, upstream: UpstreamDep, approval_id: ApprovalId) -> Response:
        """Refuse it: the attempt ends with `permission_denied`, and its task with it."""
        body = await read_command(request, Decision)
        return await decide(upstream, approval_id, "denied", body.hash, body.reason)

    async def decide(upstream: UpstreamDep, approval_id: str, verdict: str, hash_: str, reason: str) -> Response:
        message = approvals_pb2.DecideRequest(
            approval_id=approval_id,
            verdict=verdict,
            hash=hash_,
            reason=reason,
            caller=upstream.caller.pseudonym,
        )
        return reply(approval(await upstream.ask(peers.scheduler, peers.approvals.Decide, message)))

    return api
