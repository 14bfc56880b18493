"""The scheduler's gRPC services: Jobs, and Presence for the registry."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from typing import Any, Final

import msgspec
from hive_common.contracts import events
from hive_common.contracts.values import Value
from hive_common.eventlog.log import LogReader, Stored
from hive_common.inference.calls import narrowed
from hive_common.kernel.errors import InvalidArgument, NotFound, Unavailable, body_of
from hive_common.kernel.ids import is_id
from hive_common.rpc.rules import NO_RULES, KeyRules, rules_of
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc
from hive_proto.jobs.v1 import jobs_pb2, jobs_pb2_grpc

from hive_scheduler import pages
from hive_scheduler.catalogue import Catalogue
from hive_scheduler.commits import Committed
from hive_scheduler.database import Views
from hive_scheduler.decisions import read_decision, told
from hive_scheduler.dispatch import Dispatcher
from hive_scheduler.domain.approval import ApprovalState
from hive_scheduler.domain.placement import Fleet
from hive_scheduler.domain.reputation import Book
from hive_scheduler.domain.task import STATUSES
from hive_scheduler.engine import Engine
from hive_scheduler.hub import Hub, Subscription
from hive_scheduler.queries import PAGE_EVENTS, Queries, Row, counts_of
from hive_scheduler.reputation import Reputation
from hive_scheduler.submission import Submission, Submissions
from hive_scheduler.waiting import waits_for

log = logging.getLogger(__name__)

PAGE_MAX: Final = 1_000
SUBMITS_MAX: Final = 256
MESSAGE_BYTES_AIM: Final = 1024 * 1024
"""A message of a watched job ends with the event that reaches this; one event has 4 MiB at most."""
EVENT_BYTES: Final = 512
"""What an event takes in a message besides its payload: ids and pseudonyms are bounded well below it."""
BUSY_EVENTS: Final = 32
GATHER_S: Final = 0.05
"""A stream that brings `BUSY_EVENTS` at once then gathers for this long: a message costs far more than an event."""
JOB_STATES: Final = frozenset({"running", "cancelling", "succeeded", "failed", "cancelled"})


class JobsService(jobs_pb2_grpc.JobsServicer):
    """hive.jobs.v1.Jobs (proto/hive_proto/jobs/v1/jobs.proto)."""

    def __init__(
        self,
        engine: Engine,
        submissions: Submissions,
        queries: Queries,
        views: Views,
        reader: LogReader,
        hub: Hub,
        fleet: Fleet,
        catalogue: Catalogue,
        views_wake: asyncio.Event,
    ) -> None:
        self._engine = engine
        self._submissions = submissions
        self._queries = queries
        self._views = views
        self._reader = reader
        self._hub = hub
        self._fleet = fleet
        self._catalogue = catalogue
        self._views_wake = views_wake

    async def Submit(self, request: jobs_pb2.SubmitRequest, context: Any) -> jobs_pb2.SubmitResponse:
        """Commit a job and answer."""
        rules = rules_of(context.invocation_metadata())
        return await _submit(self._submissions, request, rules)

    async def Cancel(self, request: jobs_pb2.CancelRequest, context: Any) -> jobs_pb2.CancelResponse:
        """Ask for the end of a job."""
        await self._require_seen_by(context, request.job_id)
        state, position = await self._submissions.cancel(request.job_id, request.reason, request.caller)
        return jobs_pb2.CancelResponse(state=state, position=position)

    async def Get(self, request: jobs_pb2.GetRequest, context: Any) -> jobs_pb2.Job:
        """Return one job from the view, which has seen `min_position`."""
        await self._seen(max(request.min_position, 0))
        await self._require_seen_by(context, request.job_id)
        position = self._views.position
        row = await self._row(request.job_id)
        steps = await self._queries.steps([request.job_id])
        ended = row["ended_position"]
        outputs = await self._queries.outputs([ended]) if row["state"] == "succeeded" else {}
        return _job(row, steps[request.job_id], position, outputs.get(ended), self._open(request.job_id))

    async def List(self, request: jobs_pb2.ListRequest, context: Any) -> jobs_pb2.ListResponse:
        """Return jobs, newest first: those of everybody or of the key that asks, and canaries with `all`."""
        if request.state and request.state not in JOB_STATES:
            raise InvalidArgument(f"state: expected one of {', '.join(sorted(JOB_STATES))}", path="state")
        await self._seen(self._hub.position)
        position = self._views.position
        only = rules_of(context.invocation_metadata()).only
        rows = await self._queries.jobs(request.after, request.state, _limit(request.limit, 50), only, request.all)
        steps = await self._queries.steps([row["job_id"] for row in rows])
        return jobs_pb2.ListResponse(
            jobs=[_job(row, steps[row["job_id"]], position, None, self._open(row["job_id"])) for row in rows]
        )

    async def Tasks(self, request: jobs_pb2.TasksRequest, context: Any) -> jobs_pb2.TasksResponse:
        """Return tasks of a job."""
        if request.state and request.state not in STATUSES:
            raise InvalidArgument(f"state: expected one of {', '.join(STATUSES)}", path="state")
        await self._seen(self._hub.position)
        await self._row(request.job_id)
        await self._require_seen_by(context, request.job_id)
        limit = _limit(request.limit, 100)
        rows = await self._queries.tasks(request.job_id, request.after, request.state, limit)
        shown, positions = pages.output_positions(rows)
        outputs = await self._queries.outputs(positions)
        tasks = pages.tasks(shown, outputs, self._open(request.job_id))
        job = self._engine.jobs.get(request.job_id)
        if job is not None:
            waiting = waits_for(job, [task.task_id for task in tasks], self._fleet)
            for task in tasks:
                task.waits_for = waiting.get(task.task_id, "")
        return jobs_pb2.TasksResponse(tasks=tasks, more=len(tasks) < len(rows))

    async def Logs(self, request: jobs_pb2.LogsRequest, context: Any) -> jobs_pb2.LogsResponse:
        """Return the logs of attempts, as they were reported."""
        limit = _limit(request.limit, 200)
        if request.task_id:
            rows = [await self._queries.task(request.task_id)]
            if request.job_id and rows[0]["job_id"] != request.job_id:
                raise NotFound(f"job {request.job_id[:80]} has no task {request.task_id[:80]}")
            await self._require_seen_by(context, rows[0]["job_id"], task=request.task_id)
        else:
            await self._row(request.job_id)
            await self._require_seen_by(context, request.job_id)
            rows = await self._queries.tasks(request.job_id, "", "", limit, reported=True)
        logs = await self._queries.logs(rows, limit)
        return jobs_pb2.LogsResponse(
            logs=[
                jobs_pb2.AttemptLog(
                    task_id=log.task["task_id"],
                    step=log.task["step"],
                    index=log.task["idx"],
                    attempt=log.attempt,
                    log_json=log.log.raw or b"",
                    log_digest=log.log.digest or "",
                )
                for log in logs
            ]
        )

    async def Explain(self, request: jobs_pb2.ExplainRequest, context: Any) -> jobs_pb2.ExplainResponse:
        """Say why a task is where it is, and how the devices look to it now."""
        stored = (
            await self._reader.read(0, PAGE_EVENTS, streams=[request.task_id]) if is_id(request.task_id) else []
        )
        if not stored or stored[0].type != "TaskCreated":
            raise _no_task(request.task_id)
        found = self._engine.find_task(request.task_id)
        if found is not None:
            await self._require_seen_by(context, found[0].id, task=request.task_id)
            await self._catalogue.catch_up()
            state: str = found[1].status
            need = self._engine.need_of(*found)
            candidates = [msgspec.to_builtins(one) for one in self._fleet.explain(need)]
            waiting = waits_for(found[0], [request.task_id], self._fleet)
        else:
            await self._seen(stored[-1].position)
            row = await self._queries.task(request.task_id)
            await self._require_seen_by(context, row["job_id"], task=request.task_id)
            state = row["state"]
            candidates, waiting = [], {}
        explanation = {
            "task": request.task_id,
            "state": state,
            "waits_for": waiting.get(request.task_id, ""),
            "decisions": _decisions(stored),
            "candidates": candidates,
        }
        return jobs_pb2.ExplainResponse(explanation_json=msgspec.json.encode(explanation))

    async def GetDecision(self, request: jobs_pb2.GetDecisionRequest, context: Any) -> jobs_pb2.GetDecisionResponse:
        """Return what was decided over a task's results, and from what."""
        record = await read_decision(self._reader, request.task_id)
        await self._require_seen_by(context, record.created.job, task=request.task_id)
        await self._catalogue.catch_up()
        return jobs_pb2.GetDecisionResponse(decision_json=msgspec.json.encode(told(record, self._fleet)))

    async def Watch(self, request: jobs_pb2.WatchRequest, context: Any) -> AsyncIterator[jobs_pb2.JobEvent]:
        """Send the events of a job and its tasks: what is committed, then what comes, until the job has ended."""
        async with aclosing(self._batches(request, context)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def WatchBatches(self, request: jobs_pb2.WatchRequest, context: Any) -> AsyncIterator[jobs_pb2.JobEvents]:
        """Send the same events in batches: at once while little happens, gathered while much does."""
        async with aclosing(self._batches(request, context)) as batches:
            async for batch in batches:
                for part in _parts(batch):
                    yield jobs_pb2.JobEvents(events=part)
                if len(batch) >= BUSY_EVENTS:
                    await asyncio.sleep(GATHER_S)

    async def _batches(
        self, request: jobs_pb2.WatchRequest, context: Any
    ) -> AsyncGenerator[list[jobs_pb2.JobEvent], None]:
        """Yield the events of a job, at least one at a time."""
        await self._require_seen_by(context, request.job_id)
        position = max(request.from_position, 0)
        while True:
            subscription = self._hub.subscribe(request.job_id)
            try:
                async for batch in self._past(request.job_id, position, subscription):
                    position = batch[-1].position
                    yield batch
                if request.history_only or await self._ended_by(request.job_id, position):
                    return
                while taken := await subscription.take():
                    new = _until_end(committed for committed in taken if committed.position > position)
                    if new:
                        position = new[-1].position
                        yield [_live_event(committed) for committed in new]
                        if new[-1].event.type in events.JOB_TERMINAL:
                            return
                if self._engine.committer.failed:
                    raise Unavailable("this scheduler leads no more; watch again from the last position")
            finally:
                self._hub.unsubscribe(request.job_id, subscription)

    async def _past(
        self, job_id: str, position: int, subscription: Subscription
    ) -> AsyncIterator[list[jobs_pb2.JobEvent]]:
        """Yield what had been committed after `position` when the subscription began."""
        recent = self._hub.recent(job_id)
        if recent is not None:
            if new := [_live_event(committed) for committed in recent if position < committed.position]:
                yield new
            return
        await self._seen(subscription.position)
        await self._row(job_id)
        while page := await self._queries.history(job_id, position):
            position = page[-1].position
            yield [_stored_event(stored) for stored in page]

    def _open(self, job_id: str) -> list[ApprovalState]:
        """Return the approvals for which attempts of a job wait; they are in no view."""
        job = self._engine.jobs.get(job_id)
        return [] if job is None else [one for one in job.approvals.values() if one.status == "pending"]

    async def _seen(self, position: int) -> None:
        """Wait until the views have seen a position of the log."""
        if self._views.position < position:
            self._views_wake.set()
            await self._views.wait_for(position)

    async def _require_seen_by(self, context: Any, job_id: str, task: str = "") -> None:
        """Refuse a job, or its `task`, that is another key's, in the words for one that does not exist.

        Raises:
            NotFound: there is no such job, or the key that calls sees its own only, and this is not one of them.
        """
        only = rules_of(context.invocation_metadata()).only
        if not only:
            return
        job = self._engine.find_job(job_id)
        caller = (await self._row(job_id))["caller"] if job is None else job.caller
        if caller != only:
            raise _no_task(task) if task else NotFound(f"there is no job {job_id[:80]}", job=job_id[:80])

    async def _row(self, job_id: str) -> Row:
        """Return a job's row, waiting for the view where the job or its end is newer. Raises `NotFound`."""
        job = self._engine.find_job(job_id)
        try:
            row = await self._queries.job(job_id)
        except NotFound:
            if job is None:
                raise
            await self._engine.committer.settled()
        else:
            if row["ended_us"] or job is None or job.end is None:
                return row
        # Whoever has heard of a job's beginning or end finds it here.
        await self._seen(self._hub.position)
        return await self._queries.job(job_id)

    async def _ended_by(self, job_id: str, position: int) -> bool:
        """Whether the job's end was committed at or before `position`, so that nothing more is to be sent."""
        recent = self._hub.recent(job_id)
        if recent is not None:
            ends = (committed.position for committed in recent if committed.event.type in events.JOB_TERMINAL)
            return any(end <= position for end in ends)
        row = await self._row(job_id)
        ended: int = row["ended_position"]
        return 0 < ended <= position


class IntakeService(jobs_pb2_grpc.IntakeServicer):
    """hive.jobs.v1.Intake: submits of the gateway, many in a call."""

    def __init__(self, submissions: Submissions) -> None:
        self._submissions = submissions

    async def SubmitMany(self, request: jobs_pb2.SubmitManyRequest, context: Any) -> jobs_pb2.SubmitManyResponse:
        """Commit the jobs that can be taken, and say of each what became of it."""
        if len(request.submits) > SUBMITS_MAX:
            raise InvalidArgument(f"submits: has {len(request.submits)}, expected {SUBMITS_MAX} at most")
        results = await asyncio.gather(*map(self._result, request.submits))
        return jobs_pb2.SubmitManyResponse(results=results)

    async def _result(self, request: jobs_pb2.SubmitRequest) -> jobs_pb2.SubmitResult:
        try:
            return jobs_pb2.SubmitResult(taken=await _submit(self._submissions, request))
        except Exception as error:
            # One job's trouble is its own: the others of the call are taken all the same.
            body = body_of(error)
            if body.code == "internal":
                log.exception("a submit failed")
            return jobs_pb2.SubmitResult(error_json=msgspec.json.encode(body))


class PresenceService(executors_pb2_grpc.PresenceServicer):
    """hive.executors.v1.Presence."""

    def __init__(self, dispatcher: Dispatcher, catalogue: Catalogue, reputation: Reputation) -> None:
        self._dispatcher = dispatcher
        self._catalogue = catalogue
        self._reputation = reputation

    async def List(self, request: executors_pb2.PresenceRequest, context: Any) -> executors_pb2.PresenceResponse:
        """Return everybody who has pulled from this leader, or of whom it knows results."""
        if self._catalogue.position < request.min_position:
            await self._catalogue.catch_up()
        found = {
            executor: executors_pb2.Present(
                executor_id=executor,
                last_seen_us=last_seen_us,
                running=running,
                slots_free=slots_free,
                online=online,
            )
            for executor, last_seen_us, running, slots_free, online in self._dispatcher.present()
        }
        for executor in self._reputation.executors():
            found.setdefault(executor, executors_pb2.Present(executor_id=executor))
        for executor, present in found.items():
            book = self._reputation.book(executor)
            present.reputation.CopyFrom(_reputation(book, executor == request.agents_of))
        return executors_pb2.PresenceResponse(executors=found.values())


def _reputation(book: Book, with_agents: bool) -> executors_pb2.Reputation:
    agents = [
        executors_pb2.AgentReputation(agent=agent, **msgspec.structs.asdict(record))
        for agent, record in sorted(book.agents.items() if with_agents else ())
    ]
    return executors_pb2.Reputation(
        standing=book.standing, in_a_row=book.in_a_row, agents=agents, **msgspec.structs.asdict(book.counts)
    )


def _no_task(task_id: str) -> NotFound:
    return NotFound(f"there is no task {task_id[:80]}", task=task_id[:80])


async def _submit(
    submissions: Submissions, request: jobs_pb2.SubmitRequest, rules: KeyRules = NO_RULES
) -> jobs_pb2.SubmitResponse:
    submitted = await submissions.submit(
        Submission(
            request.document_json,
            request.input_json,
            request.input_digest,
            request.idempotency_key,
            request.caller,
            KeyRules(narrowed(rules.pin, request.pin), rules.counts_only or request.counts_only),
        )
    )
    return jobs_pb2.SubmitResponse(job_id=submitted.job, position=submitted.position, existed=submitted.existed)


def _until_end(batch: Iterable[Committed]) -> list[Committed]:
    """Return events up to the end of their job: late ones may have been committed together with it."""
    taken: list[Committed] = []
    for committed in batch:
        taken.append(committed)
        if committed.event.type in events.JOB_TERMINAL:
            break
    return taken


def _parts(batch: list[jobs_pb2.JobEvent]) -> Iterator[list[jobs_pb2.JobEvent]]:
    """Cut a batch into messages of about `MESSAGE_BYTES_AIM`: inputs and outputs may be large."""
    part: list[jobs_pb2.JobEvent] = []
    byte_count = 0
    for event in batch:
        byte_count += EVENT_BYTES + len(event.data_json)
        part.append(event)
        if byte_count >= MESSAGE_BYTES_AIM:
            yield part
            part, byte_count = [], 0
    if part:
        yield part


def _stored_event(stored: Stored) -> jobs_pb2.JobEvent:
    return jobs_pb2.JobEvent(
        position=stored.position,
        stream=stored.stream,
        type=stored.type,
        ts_us=stored.ts_us,
        data_json=stored.payload or b"",
        actor=stored.actor,
        version=stored.version,
    )


def _live_event(committed: Committed) -> jobs_pb2.JobEvent:
    event = committed.event
    return jobs_pb2.JobEvent(
        position=committed.position,
        stream=event.stream,
        type=event.type,
        ts_us=event.ts_us,
        data_json=event.payload,
        actor=event.actor,
        version=event.version,
    )


def _decisions(stored: list[Stored]) -> list[dict[str, Any]]:
    """Return the placements of a task, and what became of them."""
    found: list[dict[str, Any]] = []
    for one in stored:
        if one.type == "TaskAssigned" and one.payload is not None:
            event = events.decode(one.type, one.schema, one.payload)
            found.append({"position": one.position, "ts_us": one.ts_us, **msgspec.to_builtins(event)})
    return found


def _limit(given: int, default: int) -> int:
    if not 0 <= given <= PAGE_MAX:
        raise InvalidArgument(f"limit: expected 1 to {PAGE_MAX}, got {given}", path="limit")
    return given or default


def _counts(rows: Iterable[Row]) -> jobs_pb2.TaskCounts:
    totals: dict[str, int] = dict.fromkeys(STATUSES, 0)
    for row in rows:
        for name, count in counts_of(row).items():
            totals[name] += count
    return jobs_pb2.TaskCounts(total=sum(totals.values()), **totals)


def _job(
    row: Row, steps: list[Row], position: int, output: Value | None, approvals: list[ApprovalState]
) -> jobs_pb2.Job:
    return jobs_pb2.Job(
        job_id=row["job_id"],
        name=row["name"],
        state=row["state"],
        priority=row["priority"],
        submitted_us=row["submitted_us"],
        ended_us=row["ended_us"],
        deadline_us=row["deadline_us"],
        tasks=_counts(steps),
        attempts=row["attempts"],
        output_json=b"" if output is None else output.raw or b"",
        output_digest="" if output is None else output.digest or "",
        error_code=row["error_code"],
        error_message=row["error_message"],
        error_task=row["error_task"],
        position=position,
        steps=[
            jobs_pb2.StepCounts(step=step["step"], agent=step["agent"], tasks=_counts([step])) for step in steps
        ],
        approvals_open=len(approvals),
        canary=row["canary"],
    )
