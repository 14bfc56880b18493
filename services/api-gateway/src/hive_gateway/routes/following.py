"""`/v1/jobs/{id}/stream` and `/v1/jobs/{id}/logs/stream`: server-sent events that end in `data: [DONE]`."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated

import msgspec
from fastapi import APIRouter, Header
from hive_common.contracts.events import TaskAssigned
from hive_common.contracts.messages import LogBatch, LogLine
from hive_common.kernel.errors import InvalidArgument
from hive_proto.jobs.v1 import jobs_pb2
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.documents import raw_answers
from hive_gateway.following import follow_job
from hive_gateway.live_logs import Follower, LiveLogs
from hive_gateway.peers import Peers
from hive_gateway.replies import JobId, Position
from hive_gateway.streams import DONE, SSE_TYPE, EventStream, Followers, frame, primed
from hive_gateway.upstream import Upstream, UpstreamDep

_ASSIGNED = msgspec.json.Decoder(TaskAssigned)
LAST_LINES_S = 0.5
"""How long log lines are waited for after a job has ended: they and the end come on different ways."""


class LogFrame(msgspec.Struct, frozen=True):
    """Log lines of one attempt while it runs."""

    task_id: str
    attempt: int
    lines: tuple[LogLine, ...]


class DroppedFrame(msgspec.Struct, frozen=True):
    """So many batches were dropped because this follower read too slowly."""

    batches: int


def router(peers: Peers, live_logs: LiveLogs, followers: Followers) -> APIRouter:
    """Return the paths that follow a job."""
    api = APIRouter(prefix="/v1", tags=["jobs"])

    async def require(upstream: Upstream, job_id: str) -> jobs_pb2.Job:
        followers.require_room()
        # After the first byte an error can no longer be a status.
        return await upstream.ask(peers.scheduler, peers.jobs.Get, jobs_pb2.GetRequest(job_id=job_id))

    @api.get(
        "/jobs/{job_id}/stream",
        operation_id="streamJob",
        responses=raw_answers(SSE_TYPE, "Events of the job as they are committed; ends in [DONE].", 400, 404, 429),
        response_class=Response,
    )
    async def stream(
        job_id: JobId,
        upstream: UpstreamDep,
        from_position: Position = 0,
        last_event_id: Annotated[str, Header(max_length=20)] = "",
    ) -> Response:
        """Follow a job: what happened after `from_position` or `Last-Event-ID`, then everything as it happens."""
        position = _resume_at(last_event_id, from_position)
        frames = _job_frames(peers, upstream, job_id, position)
        if position == 0:
            # Its first event says that there is such a job, and sooner than a view does.
            followers.require_room()
            return EventStream(await upstream.while_connected(primed(frames)), followers)
        await require(upstream, job_id)
        return EventStream(frames, followers)

    @api.get(
        "/jobs/{job_id}/logs/stream",
        operation_id="streamJobLogs",
        responses=raw_answers(SSE_TYPE, "Log lines of the guests while they run; ends in [DONE].", 400, 404, 429),
        response_class=Response,
    )
    async def stream_logs(job_id: JobId, upstream: UpstreamDep) -> Response:
        """Follow the logs of a job, best effort; the whole logs are under `/logs` once attempts have reported."""
        job = await require(upstream, job_id)
        frames = _log_frames(peers, upstream, live_logs, job.job_id)
        return EventStream(await upstream.while_connected(primed(frames)), followers)

    return api


def _resume_at(last_event_id: str, from_position: int) -> int:
    if not last_event_id:
        return from_position
    if not last_event_id.isascii() or not last_event_id.isdigit() or int(last_event_id) >= 1 << 63:
        raise InvalidArgument("header.last-event-id: expected a position in the log", path="header.last-event-id")
    return int(last_event_id)


async def _job_frames(peers: Peers, upstream: Upstream, job_id: str, position: int) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(follow_job(peers, upstream, job_id, position)) as batches:
        async for batch in batches:
            yield b"".join([frame(event.type, views.event(event), str(event.position)) for event in batch])
    yield DONE


async def _log_frames(
    peers: Peers, upstream: Upstream, live_logs: LiveLogs, job_id: str
) -> AsyncGenerator[bytes, None]:
    async with live_logs.follow(job_id) as follower:
        yield b": following\n\n"
        ended = asyncio.create_task(_ended(peers, upstream, job_id, follower))
        try:
            async with contextlib.aclosing(_until(follower, ended)) as batches:
                async for batch in batches:
                    if dropped := follower.take_dropped():
                        yield frame("dropped", DroppedFrame(dropped))
                    yield frame("log", LogFrame(batch.task, batch.attempt, batch.lines))
            await ended
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)
    yield DONE


async def _ended(peers: Peers, upstream: Upstream, job_id: str, follower: Follower) -> None:
    """Return at the end of a job; on the way, tell who runs its attempts. All of them: some may run already."""
    async with contextlib.aclosing(follow_job(peers, upstream, job_id, 0)) as batches:
        async for batch in batches:
            for event in batch:
                if event.type == "TaskAssigned" and event.data_json:
                    assigned = _ASSIGNED.decode(event.data_json)
                    follower.assigned(event.stream, assigned.attempt, assigned.executor)


async def _until(follower: Follower, ended: asyncio.Task[None]) -> AsyncGenerator[LogBatch, None]:
    """Yield batches until the job has ended and none came for a moment."""
    while True:
        upcoming = asyncio.ensure_future(follower.take())
        try:
            await asyncio.wait({upcoming, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not upcoming.done():
                await asyncio.wait({upcoming}, timeout=LAST_LINES_S)
            if not upcoming.done():
                return
            yield upcoming.result()
        finally:
            upcoming.cancel()
