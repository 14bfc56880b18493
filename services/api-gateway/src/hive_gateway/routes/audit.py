"""`/v1/audit`: the log itself, its verification, its export, and decisions that are checked again."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from hive_proto.audit.v1 import audit_pb2
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.decision_views import DecisionChecks, decision_checks
from hive_gateway.documents import answers, raw_answers
from hive_gateway.peers import VERIFY_S, Peers
from hive_gateway.replies import Position, as_line, reply, wants_lines
from hive_gateway.streams import NDJSON_TYPE, lines, primed
from hive_gateway.upstream import Upstream, UpstreamDep

From = Annotated[int, Query(alias="from", ge=1, lt=1 << 63, description="first position")]
To = Annotated[int, Query(ge=0, lt=1 << 63, description="last position; 0 is the head")]
AgainstHash = Annotated[
    str, Query(pattern="^([0-9a-f]{64})?$", description="hash at `against_position` in an earlier export")
]


def router(peers: Peers) -> APIRouter:
    """Return the paths of the auditor."""
    api = APIRouter(prefix="/v1/audit", tags=["audit"])
    _reading(api, peers)
    _verifying(api, peers)
    _deciding(api, peers)
    return api


def _reading(api: APIRouter, peers: Peers) -> None:
    @api.get(
        "/events",
        operation_id="listLogEvents",
        responses=answers(views.LogPage, 400, ndjson=True),
        response_class=Response,
    )
    async def list_events(
        request: Request,
        upstream: UpstreamDep,
        first: From = 1,
        to: To = 0,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1_000,
    ) -> Response:
        """Read envelopes and payloads by position, `from` and `to` inclusive."""
        message = audit_pb2.EventsRequest(to=to, limit=limit)
        # `from` is a word of Python, so it cannot be a keyword argument.
        setattr(message, "from", first)
        events = _events(peers, upstream, message)
        if wants_lines(request):
            return lines(await upstream.while_connected(primed(as_line(events))))
        page = await upstream.while_connected(_collected(events))
        following = page[-1].position + 1 if len(page) == limit else None
        return reply(views.LogPage(events=page, next=following))

    @api.get(
        "/export",
        operation_id="exportLog",
        responses=raw_answers(NDJSON_TYPE, "A file that verifies without a database.", 400),
        response_class=Response,
    )
    async def export(upstream: UpstreamDep, to: To = 0) -> Response:
        """Fetch all that is needed to check the log elsewhere."""
        chunks = await upstream.while_connected(primed(_chunks(peers, upstream, to)))
        return lines(chunks, filename="hive-log.ndjson")


def _verifying(api: APIRouter, peers: Peers) -> None:
    async def verify(upstream: Upstream, against_position: int, against_hash: str) -> Response:
        message = audit_pb2.VerifyRequest(
            against_position=against_position, against_hash=bytes.fromhex(against_hash)
        )
        answer = await upstream.ask(peers.audit, peers.log.Verify, message, VERIFY_S)
        return reply(views.verification(answer))

    @api.get(
        "/verify", operation_id="verifyLog", responses=answers(views.Verification, 400), response_class=Response
    )
    async def verify_get(
        upstream: UpstreamDep, against_position: Position = 0, against_hash: AgainstHash = ""
    ) -> Response:
        """Check every byte of the log, and that it still holds the head of an earlier export."""
        return await verify(upstream, against_position, against_hash)

    @api.post(
        "/verify",
        operation_id="startVerification",
        responses=answers(views.Verification, 400),
        response_class=Response,
    )
    async def verify_post(
        upstream: UpstreamDep, against_position: Position = 0, against_hash: AgainstHash = ""
    ) -> Response:
        """Check every byte of the log; the same as GET, for clients that do not like long GETs."""
        return await verify(upstream, against_position, against_hash)


def _deciding(api: APIRouter, peers: Peers) -> None:
    @api.get(
        "/decisions",
        operation_id="checkDecisions",
        responses=answers(DecisionChecks, 400, 404),
        response_class=Response,
    )
    async def check_decisions(
        upstream: UpstreamDep,
        task: Annotated[str, Query(max_length=36, description="the decision over this task")] = "",
        job: Annotated[str, Query(max_length=36, description="those of this job")] = "",
        after: Position = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Response:
        """Recompute decisions over judged tasks, and hold them against the events and values they came from."""
        message = audit_pb2.DecisionsRequest(task_id=task, job_id=job, after=after, limit=limit)
        return reply(decision_checks(await upstream.ask(peers.audit, peers.log.Decisions, message, VERIFY_S)))


async def _events(
    peers: Peers, upstream: Upstream, message: audit_pb2.EventsRequest
) -> AsyncGenerator[views.LogEvent, None]:
    async with contextlib.aclosing(upstream.stream(peers.audit, peers.log.Events, message)) as events:
        async for event in events:
            yield views.log_event(event)


async def _chunks(peers: Peers, upstream: Upstream, to: int) -> AsyncGenerator[bytes, None]:
    message = audit_pb2.ExportRequest(to=to)
    async with contextlib.aclosing(upstream.stream(peers.audit, peers.log.Export, message)) as chunks:
        async for chunk in chunks:
            yield chunk.lines


async def _collected(events: AsyncGenerator[views.LogEvent, None]) -> tuple[views.LogEvent, ...]:
    async with contextlib.aclosing(events):
        return tuple([event async for event in events])
