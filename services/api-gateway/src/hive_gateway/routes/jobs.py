"""`/v1/jobs` and `/v1/tasks`: submit, look, cancel, explain (streams stand in `following`)."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request
from hive_common.artifacts.store import ArtifactStore
from hive_common.contracts.values import fits_inline
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument
from hive_proto.jobs.v1 import jobs_pb2
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.bodies import SUBMIT_BYTES_MAX, JobBody, read_body, split_job
from hive_gateway.documents import JSON_TYPE, answers, body, raw_answers
from hive_gateway.intake import Intake
from hive_gateway.peers import Peers
from hive_gateway.replies import (
    After,
    JobId,
    PageLimit,
    Position,
    TaskId,
    as_line,
    blob_response,
    reply,
    wants_lines,
)
from hive_gateway.streams import lines, primed
from hive_gateway.upstream import Upstream, UpstreamDep

IDEMPOTENCY_KEY_CHARS_MAX = 255
JobState = Literal["running", "cancelling", "succeeded", "failed", "cancelled"]
TaskState = Literal["blocked", "ready", "active", "succeeded", "failed", "cancelled"]

_JOB_SCHEMA = {
    "type": "object",
    "description": "The job document, with its input in it or as a blob that was put before.",
    "required": ["apiVersion", "kind", "name", "tasks"],
    "properties": {
        "apiVersion": {"const": "hive/v1"},
        "kind": {"const": "Job"},
        "name": {"type": "string"},
        "input": {"description": "any JSON; over 256 KiB it is stored as a blob"},
        "input_digest": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
        "tasks": {"type": "array", "minItems": 1, "items": {"type": "object"}},
    },
}


def router(peers: Peers, intake: Intake, store: ArtifactStore) -> APIRouter:
    """Return the paths of jobs and tasks but for their streams."""
    api = APIRouter(prefix="/v1", tags=["jobs"])
    _submitting(api, peers, intake, store)
    _reading(api, peers, store)
    _inspecting(api, peers)
    return api


def _submitting(api: APIRouter, peers: Peers, intake: Intake, store: ArtifactStore) -> None:
    @api.post(
        "/jobs",
        operation_id="submitJob",
        responses=answers(views.Submitted, 400, 404, 409, 413, status=201)
        | {200: answers(views.Submitted)[200] | {"description": "The idempotency key names this job already."}},
        openapi_extra=body(_JOB_SCHEMA),
        response_class=Response,
        status_code=201,
    )
    async def submit(
        request: Request,
        upstream: UpstreamDep,
        idempotency_key: Annotated[str, Header(max_length=IDEMPOTENCY_KEY_CHARS_MAX)] = "",
    ) -> Response:
        """Commit a job. The same `Idempotency-Key` with the same body gives the same job."""
        return await submitted(request, upstream, idempotency_key, intake, store)

    @api.delete(
        "/jobs/{job_id}",
        operation_id="cancelJob",
        responses=answers(views.Cancelled, 400, 404, status=202),
        response_class=Response,
        status_code=202,
    )
    async def cancel(
        job_id: JobId, upstream: UpstreamDep, reason: Annotated[str, Query(max_length=500)] = ""
    ) -> Response:
        """Ask for the end of a job. What ended before stands; the job ends when all its tasks have."""
        message = jobs_pb2.CancelRequest(job_id=job_id, reason=reason, caller=upstream.caller.pseudonym)
        answer = await upstream.ask(peers.scheduler, peers.jobs.Cancel, message)
        return reply(views.Cancelled(job_id=job_id, state=answer.state, position=answer.position), 202)


async def submitted(
    request: Request, upstream: Upstream, idempotency_key: str, intake: Intake, store: ArtifactStore
) -> Response:
    """Answer a submit, once the job is committed. Raises the catalogue's error."""
    job = await _stored(split_job(await read_body(request, SUBMIT_BYTES_MAX)), store)
    message = jobs_pb2.SubmitRequest(
        document_json=job.document,
        input_json=job.input or b"",
        input_digest=job.input_digest,
        idempotency_key=idempotency_key,
        caller=upstream.caller.pseudonym,
        pin=upstream.caller.pin,
        counts_only=upstream.caller.counts_only,
    )
    answer = await upstream.while_connected(intake.submit(message, upstream.caller))
    view = views.Submitted(job_id=answer.job_id, position=answer.position, existed=answer.existed)
    return reply(view, 200 if answer.existed else 201, {"Location": f"/v1/jobs/{answer.job_id}"})


async def _stored(job: JobBody, store: ArtifactStore) -> JobBody:
    """Put an input that is too large to ride along into the store, and check one that should be there."""
    if job.input_digest and not await store.has(job.input_digest):
        raise InvalidArgument(
            f"body.input_digest: there is no blob {job.input_digest}; put it first", path="input_digest"
        )
    if job.input is None or fits_inline(job.input):
        return job
    return job._replace(input=None, input_digest=await store.put(job.input))


def _reading(api: APIRouter, peers: Peers, store: ArtifactStore) -> None:
    async def fetch(upstream: Upstream, job_id: str, min_position: int = 0) -> jobs_pb2.Job:
        message = jobs_pb2.GetRequest(job_id=job_id, min_position=min_position)
        return await upstream.ask(peers.scheduler, peers.jobs.Get, message)

    @api.get("/jobs", operation_id="listJobs", responses=answers(views.JobPage, 400), response_class=Response)
    async def list_jobs(
        upstream: UpstreamDep,
        limit: PageLimit = 50,
        after: After = "",
        state: JobState | None = None,
        all: bool = False,
    ) -> Response:
        """List jobs, newest first: those of the key, or of all for the owner and admins; with `all` canaries."""
        message = jobs_pb2.ListRequest(limit=limit, after=after, state=state or "", all=all)
        page = (await upstream.ask(peers.scheduler, peers.jobs.List, message)).jobs
        following = page[-1].job_id if len(page) == limit else None
        return reply(views.JobPage(jobs=tuple(views.job(job) for job in page), next=following))

    @api.get(
        "/jobs/{job_id}", operation_id="getJob", responses=answers(views.Job, 400, 404), response_class=Response
    )
    async def get_job(job_id: JobId, upstream: UpstreamDep, min_position: Position = 0) -> Response:
        """Look at a job. `min_position` waits until the view has seen that position of the log."""
        return reply(views.job(await fetch(upstream, job_id, min_position)))

    @api.get(
        "/jobs/{job_id}/output",
        operation_id="getJobOutput",
        responses=raw_answers(JSON_TYPE, "The job's output, byte for byte.", 400, 404, 409),
        response_class=Response,
    )
    async def get_output(job_id: JobId, upstream: UpstreamDep) -> Response:
        """Fetch the output of a job that succeeded, wherever it is kept."""
        job = await fetch(upstream, job_id)
        if job.state != "succeeded":
            raise FailedPrecondition(f"the job {job_id} has no output: it is {job.state}", state=job.state)
        if job.output_digest:
            return await blob_response(store, job.output_digest, JSON_TYPE)
        return Response(job.output_json, media_type=JSON_TYPE)


def _inspecting(api: APIRouter, peers: Peers) -> None:
    @api.get(
        "/jobs/{job_id}/tasks",
        operation_id="listTasks",
        responses=answers(views.TaskPage, 400, 404),
        response_class=Response,
    )
    async def list_tasks(
        job_id: JobId,
        upstream: UpstreamDep,
        limit: PageLimit = 100,
        after: After = "",
        state: TaskState | None = None,
    ) -> Response:
        """List the tasks of a job."""
        message = jobs_pb2.TasksRequest(job_id=job_id, limit=limit, after=after, state=state or "")
        answer = await upstream.ask(peers.scheduler, peers.jobs.Tasks, message)
        page = answer.tasks
        following = page[-1].task_id if page and (answer.more or len(page) == limit) else None
        return reply(views.TaskPage(tasks=tuple(views.task(task) for task in page), next=following))

    @api.get(
        "/jobs/{job_id}/events",
        operation_id="listJobEvents",
        responses=answers(views.EventPage, 400, 404, ndjson=True),
        response_class=Response,
    )
    async def list_events(
        request: Request,
        job_id: JobId,
        upstream: UpstreamDep,
        from_position: Position = 0,
        limit: Annotated[int | None, Query(ge=1, le=10_000)] = None,
    ) -> Response:
        """Read what happened so far, after `from_position`: a page of 1,000 unless told, or all of it as lines."""
        if wants_lines(request):
            history = _history(peers, upstream, job_id, from_position, limit)
            return lines(await upstream.while_connected(primed(as_line(history))))
        size = limit or 1_000
        history = _history(peers, upstream, job_id, from_position, size)
        page = await upstream.while_connected(_collected(history))
        return reply(views.EventPage(events=page, next=page[-1].position if len(page) == size else None))

    @api.get(
        "/jobs/{job_id}/logs",
        operation_id="listJobLogs",
        responses=answers(views.Logs, 400, 404),
        response_class=Response,
    )
    async def list_logs(
        job_id: JobId,
        upstream: UpstreamDep,
        task_id: Annotated[str, Query(max_length=36)] = "",
        limit: PageLimit = 200,
    ) -> Response:
        """Read the logs of attempts that have reported."""
        message = jobs_pb2.LogsRequest(job_id=job_id, task_id=task_id, limit=limit)
        answer = await upstream.ask(peers.scheduler, peers.jobs.Logs, message)
        return reply(views.Logs(logs=tuple(views.attempt_log(entry) for entry in answer.logs)))

    @api.get(
        "/tasks/{task_id}/explain",
        operation_id="explainTask",
        responses=raw_answers(JSON_TYPE, "Candidates, rejections with named reasons, scores.", 400, 404),
        response_class=Response,
    )
    async def explain(task_id: TaskId, upstream: UpstreamDep) -> Response:
        """Say why a task was placed where it was, or why it waits."""
        message = jobs_pb2.ExplainRequest(task_id=task_id)
        answer = await upstream.ask(peers.scheduler, peers.jobs.Explain, message)
        return Response(answer.explanation_json, media_type=JSON_TYPE)

    @api.get(
        "/tasks/{task_id}/decision",
        operation_id="getDecision",
        responses=raw_answers(
            JSON_TYPE, "The rule, in words too, candidates, votes, judges, the winner.", 400, 404, 409
        ),
        response_class=Response,
    )
    async def decision(task_id: TaskId, upstream: UpstreamDep) -> Response:
        """Say what was decided over a task's results, by which rule, and from what."""
        message = jobs_pb2.GetDecisionRequest(task_id=task_id)
        answer = await upstream.ask(peers.scheduler, peers.jobs.GetDecision, message)
        return Response(answer.decision_json, media_type=JSON_TYPE)


async def _history(
    peers: Peers, upstream: Upstream, job_id: str, position: int, limit: int | None
) -> AsyncGenerator[views.Event, None]:
    message = jobs_pb2.WatchRequest(job_id=job_id, from_position=position, history_only=True)
    sent = 0
    async with contextlib.aclosing(upstream.stream(peers.scheduler, peers.jobs.WatchBatches, message)) as batches:
        async for batch in batches:
            for event in batch.events:
                yield views.event(event)
                sent += 1
                if sent == limit:
                    return


async def _collected(history: AsyncGenerator[views.Event, None]) -> tuple[views.Event, ...]:
    async with contextlib.aclosing(history):
        return tuple([event async for event in history])
