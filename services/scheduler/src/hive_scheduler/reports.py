"""Reports of attempts: checked against limits, blobs and schemas, decided in batches, answered when committed."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
from hive_common.contracts import events, values
from hive_common.contracts.events import FAILURE_CODES, Child, Event, Judging
from hive_common.contracts.limits import (
    DETAIL_BYTES_MAX,
    FORK_STAGED_BYTES_MAX,
    INLINE_BYTES_MAX,
    KIB,
    LOG_BYTES_MAX,
    OUTPUT_BYTES_MAX,
)
from hive_common.contracts.messages import AttemptReport, ReportReply, ReportRequest, ReportResult
from hive_common.contracts.values import Value
from hive_common.eventlog.log import LogReader, NewEvent
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import InvalidArgument, PermissionDenied, Unavailable
from hive_common.kernel.ids import is_id

from hive_scheduler.blobs import Blobs
from hive_scheduler.dispatch import refused
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain import verdicts
from hive_scheduler.domain.feasibility import needs_of_children
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.schemas import Check
from hive_scheduler.domain.task import TaskState
from hive_scheduler.engine import Engine
from hive_scheduler.metrics import REPORTS
from hive_scheduler.permits import Permits

MESSAGE_CHARACTERS_MAX: Final = 2 * KIB
"""Of the message of a failed attempt; what does not fit is cut."""
REPORTS_MAX: Final = 1_000
THREAD_BYTES_MIN: Final = 64 * KIB
"""Outputs from this size on are checked in a thread: the loop has leases to keep."""
TASK_EVENTS_MAX: Final = 10_000
"""Events of one task that are read for a late report; ATTEMPTS_MAX bounds them far below."""


class Reports:
    """Takes reports (`hive.exec.<id>.report`).

    Args:
        engine: decides.
        blobs: where large outputs are.
        reader: of the log, for tasks of jobs that ended long ago.
        clock: for the time that goes into commands.
        is_revoked: says whether an executor is out.
        permits: say what a task may fork.
    """

    def __init__(
        self,
        engine: Engine,
        blobs: Blobs,
        reader: LogReader,
        clock: Clock,
        is_revoked: Callable[[str], bool],
        permits: Permits,
    ) -> None:
        self._permits = permits
        self._is_revoked = is_revoked
        self._engine = engine
        self._blobs = blobs
        self._reader = reader
        self._clock = clock
        self._old = asyncio.Lock()

    async def report(self, executor: str, request: ReportRequest) -> ReportReply:
        """Decide a batch and return the verdicts once everything they stand for is committed.

        Raises:
            InvalidArgument: more than `REPORTS_MAX` reports.
            PermissionDenied: the executor is revoked.
            Unavailable: not committed; the executor keeps its reports and asks again.
        """
        if self._is_revoked(executor):
            raise refused(executor)
        if len(request.reports) > REPORTS_MAX:
            raise InvalidArgument(f"a batch has {len(request.reports)} reports, expected at most {REPORTS_MAX}")
        commands = [await self._command(executor, report) for report in request.reports]
        results: list[ReportResult] = []
        rejected: dict[str, TaskState] = {}
        for report, command in zip(request.reports, commands, strict=True):
            verdict = "rejected" if command is None else await self._decide(report.task, command)
            if verdict == "accepted":
                self._time(report)
            found = self._engine.find_task(report.task) if verdict == "rejected" else None
            if found is not None:
                rejected[report.task] = found[1]
            REPORTS.labels(verdict).inc()
            shown = "accepted" if verdict == "duplicate" else verdict
            results.append(ReportResult(report.task, report.attempt, shown))
        self._engine.settle()
        if rejected:
            await self._check_leads(rejected)
        await self._engine.committer.settled()
        return ReportReply(results=tuple(results))

    def _time(self, report: AttemptReport) -> None:
        """Take note of how long an attempt had its slot, which what waits for one goes by."""
        found = self._engine.find_task(report.task)
        if found is not None and report.started_us and report.ended_us:
            task = found[1]
            ms = (report.ended_us - report.started_us) / 1_000
            self._engine.usual.observe(task.agent, min(ms, task.timeout_ms))

    async def _decide(self, task_id: str, command: tasks.Report) -> tasks.Verdict:
        found = self._engine.find_task(task_id)
        if found is None:
            return await self._decide_old(task_id, command)
        if isinstance(command, tasks.Succeed) and command.forks:
            command = await self._placeable(*found, command)
        if isinstance(command, tasks.Succeed) and command.forks:
            command = self._allowed(*found, command)
        return self._engine.report(*found, command)

    async def _check_leads(self, rejected: Mapping[str, TaskState]) -> None:
        """Refuse to say that attempts are not the executor's where a later leader may have given them out.

        Nothing is committed with such an answer, by which one that does not lead any more would be found out.
        """
        versions = await self._reader.versions(list(rejected))
        if any(versions.get(task.id, 0) > task.version for task in rejected.values()):
            raise Unavailable("the log has more of this task than this scheduler, which leads no more; try again")

    async def _placeable(self, job: JobState, task: TaskState, command: tasks.Succeed) -> tasks.Report:
        """Return the same, or the failure that it is where no machine could ever run a child that it wants.

        Machines that joined a moment ago are looked for, as at a submit.
        """
        refusal = self._homeless(job, task, command.forks)
        if refusal:
            await self._permits.catch_up()
            refusal = self._homeless(job, task, command.forks)
        return self._failure(command, "invalid_output", refusal) if refusal else command

    def _homeless(self, job: JobState, task: TaskState, forks: Sequence[Child]) -> str:
        step = job.steps[task.step].step
        for agent, need in needs_of_children(job, step, (child.agent for child in forks)).items():
            if not self._engine.listener.may_place(need, 1, "executor"):
                what = "the `place` of its step allows" if need.place is not None else "there are"
                return f"fork: no executor that {what} could ever run {agent} (hive executor list)"
        return ""

    def _allowed(self, job: JobState, task: TaskState, command: tasks.Succeed) -> tasks.Report:
        """Return the same, or the failure that it is where it wants children that it may not have.

        Asked at the very decision: siblings in one batch share what is left.
        """
        try:
            self._permits.check_forks(job, task, command.forks)
        except PermissionDenied as error:
            return self._failure(command, error.code, error.message)
        return command

    def _failure(self, command: tasks.Succeed, code: str, message: str) -> tasks.Fail:
        return tasks.Fail(
            attempt=command.attempt,
            executor=command.executor,
            session=command.session,
            code=code,
            now_us=self._engine.now_us(),
            message=message[:MESSAGE_CHARACTERS_MAX],
            usage=command.usage,
            log=command.log,
        )

    # --- what a report says, once it is checked ---

    async def _command(self, executor: str, report: AttemptReport) -> tasks.Report | None:
        """Return the command that a report stands for, None where it makes no sense."""
        number, session = report.attempt, report.session
        match report.status:
            case "started" if report.done_permille:
                is_share = 0 < report.done_permille <= 1_000
                return tasks.Mark(number, executor, session, report.done_permille) if is_share else None
            case "started":
                return tasks.Start(number, executor, session, report.started_us)
            case "cancelled":
                return tasks.GiveBack(number, executor, session, self._engine.now_us())
            case "succeeded":
                return await self._succeeded(executor, report)
            case "failed":
                code = report.code if report.code in FAILURE_CODES else "agent_error"
                return await self._failed(executor, report, code or "agent_error", report.message)
        return None

    async def _succeeded(self, executor: str, report: AttemptReport) -> tasks.Report:
        found = self._engine.find_task(report.task)
        if report.output is None:
            return await self._failed(executor, report, "invalid_output", "the attempt gave no output")
        violation = await self._violation(report.output, found) or await self._forks_violation(report.forks, found)
        if violation is not None:
            code, message = violation
            return await self._failed(executor, report, code, message)
        output, log = await self._output(report.output, found), await self._log(report)
        return tasks.Succeed(report.attempt, executor, report.session, output, report.usage, log, report.forks)

    async def _output(self, output: Value, found: tuple[JobState, TaskState] | None) -> Value:
        """Return an output as it is kept: as a blob where its job has as much inline as a job may have."""
        raw = output.raw
        if raw is None or found is None or found[0].takes_inline(len(raw)) or found[1].judging is not None:
            return output
        await self._blobs.put(raw)
        return values.by_digest(raw)

    async def _failed(self, executor: str, report: AttemptReport, code: str, message: str) -> tasks.Fail:
        return tasks.Fail(
            attempt=report.attempt,
            executor=executor,
            session=report.session,
            code=code,
            now_us=self._engine.now_us(),
            message=message[:MESSAGE_CHARACTERS_MAX],
            detail=report.detail.encode()[:DETAIL_BYTES_MAX].decode(errors="ignore"),
            usage=report.usage,
            log=await self._log(report),
        )

    async def _violation(self, output: Value, found: tuple[JobState, TaskState] | None) -> tuple[str, str] | None:
        """Return the code and the message of what is wrong with an output, None when it is fine."""
        raw = output.raw
        if raw is not None and len(raw) > INLINE_BYTES_MAX:
            return "output_exceeded", f"an inline output has {len(raw)} bytes, expected {INLINE_BYTES_MAX} at most"
        if raw is None:
            wrong = await self._blob_violation(output)
            if wrong is not None:
                return wrong
            assert output.digest is not None
            raw = await self._blobs.load(output.digest)
            if raw is None:
                return "invalid_output", f"the blob {output.digest} is not in the artifact store"
        if found is None:
            return None
        job, task = found
        if task.judging is not None and task.judging.kind != "integrator":
            return _verdict_violation(task.judging, output)
        schema = job.steps[task.step].step.schema
        if schema is not None and task.judging is None and task.parent is None:
            message = await self._violation_by(self._engine.schemas.of_results(schema), output, raw)
            if message is not None:
                return "invalid_output", f"does not fit `verify.schema` of {task.step}: {message}"
        check = self._engine.schemas.output_of(job.agents[task.agent])
        message = await self._violation_by(check, output, raw)
        return None if message is None else ("invalid_output", message)

    async def _violation_by(self, check: Check, output: Value, raw: bytes) -> str | None:
        if output.raw is None or (not check.trivial and len(raw) >= THREAD_BYTES_MIN):
            return await asyncio.to_thread(_violation_of_large, check.violation, raw)
        return check.violation(raw)

    async def _forks_violation(
        self, forks: Sequence[Child], found: tuple[JobState, TaskState] | None
    ) -> tuple[str, str] | None:
        """Return the code and the message of what is wrong with the inputs of children, None when they are fine."""
        total = sum(len(bytes(child.input)) for child in forks)
        if total > FORK_STAGED_BYTES_MAX:
            return "output_exceeded", (
                f"the inputs of all that is forked have {total} bytes, expected {FORK_STAGED_BYTES_MAX} at most"
            )
        if found is None or not forks:
            return None
        # Whether there may be such a child at all is asked at the decision.
        agents = {child.agent: found[0].agents.get(child.agent) for child in forks}
        checks = {name: self._engine.schemas.input_of(agent) for name, agent in agents.items() if agent is not None}
        if total < THREAD_BYTES_MIN:
            return _violation_of_forks(forks, checks)
        return await asyncio.to_thread(_violation_of_forks, forks, checks)

    async def _blob_violation(self, output: Value) -> tuple[str, str] | None:
        if output.digest is None:
            return "invalid_output", "the output is neither inline nor a digest"
        size = await self._blobs.size(output.digest)
        if size is None:
            return "invalid_output", f"the blob {output.digest} is not in the artifact store"
        if size > OUTPUT_BYTES_MAX:
            return "output_exceeded", f"the output has {size} bytes, expected {OUTPUT_BYTES_MAX} at most"
        if size != output.size_bytes:
            return "invalid_output", f"the blob has {size} bytes and not {output.size_bytes}, as the report says"
        return None

    async def _log(self, report: AttemptReport) -> Value | None:
        """Return the attempt's log where it can be kept: it is never a reason to refuse a result."""
        log = report.log
        if log is None:
            return None
        if log.raw is not None:
            return log if len(log.raw) <= INLINE_BYTES_MAX else None
        if log.digest is None:
            return None
        size = await self._blobs.size(log.digest)
        return log if size is not None and size <= LOG_BYTES_MAX else None

    # --- tasks of jobs that are not in memory any more ---

    async def _decide_old(self, task_id: str, command: tasks.Report) -> tasks.Verdict:
        """Judge a report for a task whose job has ended long ago: at most a late event comes of it."""
        if not is_id(task_id):
            return "rejected"
        async with self._old:
            stored = await self._reader.read(0, TASK_EVENTS_MAX, streams=[task_id])
            if not stored or stored[0].type != "TaskCreated":
                return "rejected"
            task: TaskState | None = None
            for one in stored:
                if one.payload is None:
                    return "rejected"
                event = events.decode(one.type, one.schema, one.payload)
                if task is None:
                    assert isinstance(event, events.TaskCreated)
                    task = tasks.created(task_id, event)
                else:
                    tasks.evolve(task, event)
            assert task is not None
            verdict = tasks.verdict(task, command, closing=True)
            decided = tasks.decide(task, command, closing=True)
            if decided:
                await self._append_late(task, stored[0].owner, stored[0].ns, decided)
            return verdict

    async def _append_late(self, task: TaskState, owner: str, ns: str, decided: list[Event]) -> None:
        versions = await self._reader.versions([task.job])
        new = [
            NewEvent(
                stream=task.id,
                version=task.version + 1 + offset,
                type=type(event).__name__,
                schema=events.SCHEMA,
                payload=events.encode(event),
                ts_us=self._clock.now_us(),
                actor="scheduler",
                owner=owner,
                ns=ns,
                correlation=task.job,
            )
            for offset, event in enumerate(decided)
        ]
        for event in decided:
            self._engine.observe(task, event)
        self._engine.committer.stage(new, (task.job, versions[task.job]))
        await self._engine.committer.settled()


def _violation_of_forks(forks: Sequence[Child], checks: Mapping[str, Check]) -> tuple[str, str] | None:
    for number, child in enumerate(forks):
        check = checks.get(child.agent)
        message = None if check is None else check.violation(bytes(child.input))
        if message is not None:
            return "invalid_output", f"fork {number}: does not fit the input schema of {child.agent}: {message}"
    return None


def _verdict_violation(judging: Judging, output: Value) -> tuple[str, str] | None:
    """Return what is wrong with what a judge said; it is read again from the log, and must be in it."""
    if output.raw is None:
        return (
            "output_exceeded",
            f"a judge's output has {output.size_bytes} bytes, expected {INLINE_BYTES_MAX} at most",
        )
    try:
        verdicts.read(judging, output.raw)
    except InvalidArgument as error:
        return "invalid_output", error.message
    return None


def _violation_of_large(check: Callable[[bytes], str | None], raw: bytes) -> str | None:
    try:
        msgspec.json.decode(raw, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError) as error:
        return f"the output is not JSON: {error}"
    return check(raw)
