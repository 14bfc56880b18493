"""A job: its graph of tasks, what is due next, and how events change it.

`due` yields decisions (a stream and the events for it) one at a time; whoever iterates MUST apply each with
`evolve` before asking for the next, and may stop at any point: `due` always starts from the state, so that a
fan-out which was interrupted, by a chunk limit or by a crash, goes on where the log says it stood.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, Final, Literal, NamedTuple

import msgspec
from hive_common.contracts import values
from hive_common.contracts.events import (
    AgentRef,
    ApprovalDecided,
    ApprovalExpired,
    ApprovalRequested,
    AttemptSucceeded,
    Event,
    JobCancelled,
    JobCancelRequested,
    JobFailed,
    JobSubmitted,
    JobSucceeded,
    Judging,
    StepJoined,
    TaskCancelled,
    TaskCreated,
    TaskFailed,
    TaskReady,
    TaskSucceeded,
)
from hive_common.contracts.judgement import Producer
from hive_common.contracts.limits import KIB, MIB
from hive_common.contracts.values import Value
from hive_common.inference.calls import narrowest
from hive_common.kernel.errors import CorruptLog, InvalidArgument
from hive_common.kernel.ids import derive_child_id

from hive_scheduler.domain import approval as approvals
from hive_scheduler.domain import deciding, joining
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.approval import ApprovalState
from hive_scheduler.domain.deciding import Known
from hive_scheduler.domain.forks import Forks, child_id_of
from hive_scheduler.domain.jobfile import JobSpec, Step
from hive_scheduler.domain.task import STATUSES, TERMINAL, TaskState

Closing = Literal["job_cancelled", "job_failed", "deadline"]

APPROVALS: Final = (ApprovalRequested, ApprovalDecided, ApprovalExpired)

DEADLINE_CODE: Final = "deadline_exceeded"

INLINE_BYTES_MAX: Final = 32 * MIB
"""Inline inputs and outputs of one open job, which are in the leader's memory; beyond it values are stored as
blobs and named by their digest."""
SMALL_BYTES: Final = KIB
"""Values up to this size are inline all the same: a blob would cost more than it spares."""

_FORGOTTEN: Final = values.inline(b"null")


class Decision(NamedTuple):
    """Events for one stream, which belong together."""

    stream: str
    events: list[Event]


class StepState:
    """One step of the job file and the tasks that were made of it, in order of the fork.

    Attributes:
        size: how many tasks the step has by the job file; None before its list is known.
        forked: how many more its tasks have forked, made or not.
        children: those of them that are made.
        forking: ids of tasks whose children are not all made.
        counts: tasks by status, children too; judges are not counted.
        judges: tasks that judge results of the others, or join them.
        judges_of: the former by the task whose results they judge.
        judges_open: how many of all these have not ended.
        undecided: ids of judged tasks of which something may be due.
        known: what was made of the results of judged tasks so that they can be compared.
        joins: it is joined by an event (`domain/joining.py`); `joined` is that, `integrator` the task that joins.
        closed: its tasks were cancelled so that it can be joined in time.
        lost: how many tasks, without children, failed or were cancelled for that reason.
        items, scope: what inputs are made from while the step expands; dropped afterwards.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.tasks: list[TaskState] = []
        self.counts: dict[str, int] = dict.fromkeys(STATUSES, 0)
        self.judges: list[TaskState] = []
        self.judges_of: dict[str, list[TaskState]] = {}
        self.judges_open = 0
        self.undecided: dict[str, None] = {}
        self.known: dict[str, Known] = {}
        self.joins = joining.is_joined(step)
        self.joined: StepJoined | None = None
        self.integrator: TaskState | None = None
        self.closed = False
        self.lost = 0
        self.size: int | None = None
        self.forked = 0
        self.children: list[TaskState] = []
        self.forking: dict[str, None] = {}
        self.items: list[Any] | None = None
        self.scope: dict[str, Any] | None = None
        self.cursor = 0

    @property
    def complete(self) -> bool:
        """Every task of the step has succeeded, and every one that they forked; no judge is at it any more.

        Of a step that is joined, its join is known, and its integrator has succeeded.
        """
        if self.joins:
            by = self.integrator
            done = by is not None and by.status == "succeeded"
            return self.joined is not None and (done or not self.joined.task)
        if self.size is None or self.judges_open:
            return False
        return self.counts["succeeded"] == self.size + self.forked

    @property
    def open(self) -> int:
        """How many tasks have not ended."""
        counts = self.counts
        return counts["blocked"] + counts["ready"] + counts["active"] + self.judges_open


class JobState:
    """A job as its events, and those of its tasks, left it."""

    def __init__(self, job_id: str, owner: str, submitted: JobSubmitted, spec: JobSpec) -> None:
        self.id = job_id
        self.owner = owner
        self.version = 1
        self.spec = spec
        self.name = submitted.name
        self.input = submitted.input
        self.priority = submitted.priority
        self.deadline_us = submitted.deadline_us
        self.request_digest = submitted.request_digest
        self.caller = submitted.caller
        self.agents: dict[str, AgentRef] = submitted.agents
        self.pin = narrowest(spec.pin, submitted.pin)
        self.counts_only = submitted.counts_only
        self.canary = submitted.canary
        self.steps = {step.id: StepState(step) for step in spec.steps}
        self.closers = [state for state in self.steps.values() if joining.is_closed_early(state.step)]
        self.reserves_us = joining.reserves_us(spec, submitted.agents) if self.closers else {}
        self.tasks: dict[str, TaskState] = {}
        self.approvals: dict[str, ApprovalState] = {}
        self.forks = Forks()
        self.cancel_reason: str | None = None
        self.aborted = False
        self.expired = False
        self.failed: TaskState | None = None
        self.end: Event | None = None
        self.broken: JobFailed | None = None
        self.inline_bytes = 0

    def takes_inline(self, byte_count: int) -> bool:
        """Whether another value of so many bytes may be inline."""
        return byte_count <= SMALL_BYTES or self.inline_bytes + byte_count <= INLINE_BYTES_MAX

    def closing(self, now_us: int) -> Closing | None:
        """Return why the job takes no more results, or None while it does."""
        if self.cancel_reason is not None:
            return "job_cancelled"
        if self.failed is not None or self.aborted or self.broken is not None:
            return "job_failed"
        if self.expired or now_us >= self.deadline_us:
            return "deadline"
        return None

    def needs_done(self, state: StepState) -> bool:
        """Whether everything that the step needs has succeeded."""
        return all(self.steps[need].complete for need in state.step.needs)

    def task_total(self) -> int:
        """How many tasks the job is known to have."""
        return sum((state.size or 0) + state.forked for state in self.steps.values())

    def unexpanded(self) -> int:
        """How many steps wait for the list that they fork over; each will have a task or none."""
        return sum(1 for state in self.steps.values() if state.size is None)


class BlobsNeeded(Exception):
    """A decision needs blobs: some to be loaded, some to be stored before what names them is committed."""

    def __init__(self, load: frozenset[str] = frozenset(), store: tuple[bytes, ...] = ()) -> None:
        super().__init__(f"{len(load)} blobs to load, {len(store)} to store")
        self.load = load
        self.store = store


class Inputs:
    """Port to what makes inputs and outputs of tasks: expressions, blobs and schemas (`domain/inputs.py`)."""

    def expand(self, job: JobState, state: StepState) -> int:
        """Set `state.items` and return the step's size. Raises `InvalidArgument`, `BlobsNeeded`."""
        raise NotImplementedError

    def input_of(self, job: JobState, state: StepState, index: int) -> Value:
        """Return the input of one task. Raises `InvalidArgument`, `BlobsNeeded`."""
        raise NotImplementedError

    def forked_input(self, job: JobState, given: bytes) -> Value:
        """Return the input of a task that another one forked. Raises `BlobsNeeded`."""
        raise NotImplementedError

    def output_of(self, job: JobState) -> Value:
        """Return the job's output. Raises `InvalidArgument`, `BlobsNeeded`."""
        raise NotImplementedError

    def payload(self, value: Value) -> bytes:
        """Return the bytes of a value. Raises `InvalidArgument` where it is not there any more, `BlobsNeeded`."""
        raise NotImplementedError

    def question(self, job: JobState, task: TaskState, judging: Judging, agent: str) -> Value:
        """Return what a judge of results of `task` is given. Raises `InvalidArgument`, `BlobsNeeded`."""
        raise NotImplementedError

    def trust(self, job: JobState, task: TaskState, producer: Producer) -> int | None:
        """Return for how many valid results in a row a result counts without another; None: it is checked."""
        raise NotImplementedError

    def integration(self, job: JobState, state: StepState) -> Value:
        """Return what the integrator of a step is given. Raises `InvalidArgument`, `BlobsNeeded`."""
        raise NotImplementedError

    def may_extend(self, job: JobState, task: TaskState) -> bool:
        """Say whether anybody could make one more independent result."""
        raise NotImplementedError

    def gone(self, job: JobState, task: TaskState) -> int:
        """Return for how many attempts without an executor nobody is left, since machines were revoked."""
        raise NotImplementedError


# --- what is due -------------------------------------------------------------------------------------------


def due(job: JobState, now_us: int, inputs: Inputs) -> Iterator[Decision]:
    """Yield what the job has to decide now, until nothing is left or somebody else has to move.

    Raises:
        BlobsNeeded: after everything that could be decided without them.
    """
    needed = _Needed()
    while job.end is None:
        closing = job.closing(now_us)
        if closing is None:
            decisions = _progress(job, now_us, inputs, needed)
        else:
            decisions = _close(job, closing, now_us, inputs, needed)
        for decision in decisions:
            yield decision
            if job.closing(now_us) != closing:
                break
        else:
            if job.closing(now_us) == closing:
                break
    needed.check()


class _Needed:
    """Collects the blobs that steps need, so that they are fetched together."""

    def __init__(self) -> None:
        self._load: set[str] = set()
        self._store: list[bytes] = []

    def add(self, error: BlobsNeeded) -> None:
        self._load |= error.load
        self._store += error.store

    def check(self) -> None:
        if self._load or self._store:
            raise BlobsNeeded(frozenset(self._load), tuple(self._store))


def _progress(job: JobState, now_us: int, inputs: Inputs, needed: _Needed) -> Iterator[Decision]:
    complete = True
    # The last first: what only that one waits for need not be joined any more.
    for state in reversed(job.closers):
        if joining.is_closing(job, state, now_us) and state.step.id not in joining.abandoned(job):
            try:
                yield from _close_step(job, state, inputs)
            except BlobsNeeded as error:
                needed.add(error)
            if job.broken is not None:
                return
    abandoned = joining.abandoned(job)
    for state in job.steps.values():
        if state.complete:
            continue
        if state.step.id in abandoned:
            yield from joining.cancel(state)
            continue
        if joining.is_closing(job, state, now_us):
            complete = False
            continue
        try:
            yield from _progress_step(job, state, inputs)
        except BlobsNeeded as error:
            needed.add(error)
        if job.broken is not None:
            return
        complete = complete and state.complete
    if complete:
        try:
            yield Decision(job.id, [_end_of_success(job, inputs)])
        except BlobsNeeded as error:
            needed.add(error)


def _close_step(job: JobState, state: StepState, inputs: Inputs) -> Iterator[Decision]:
    # A new leader may not have looked at lists yet; a list that is not there has no tasks.
    for other in job.steps.values():
        if other.size is None and job.broken is None:
            _expand(job, other, inputs, job.needs_done(other))
    if job.broken is None:
        yield from joining.close(job, state, inputs)


def _progress_step(job: JobState, state: StepState, inputs: Inputs) -> Iterator[Decision]:
    if state.joined is not None:
        yield from joining.integrate(job, state, inputs)
        return
    needs_done = job.needs_done(state)
    if state.size is None and not _expand(job, state, inputs, needs_done):
        return
    assert state.size is not None
    while len(state.tasks) < state.size:
        yield _create(job, state, len(state.tasks), inputs, needs_done)
    if not needs_done:
        return
    yield from _decide(job, state, inputs)
    while state.cursor < state.size:
        task = state.tasks[state.cursor]
        if task.status == "blocked":
            yield _make_ready(job, state, task, state.cursor, inputs)
        state.cursor += 1
    yield from _decide(job, state, inputs)
    state.items = state.scope = None
    while state.forking:
        yield _create_child(job, state, next(iter(state.forking)), inputs)
    if state.joins:
        yield from joining.progress(job, state, inputs)


def _decide(job: JobState, state: StepState, inputs: Inputs) -> Iterator[Decision]:
    """Let the tasks decide whose results are judged; those that need blobs do not hold up the others."""
    needed = _Needed()
    for task_id in list(state.undecided):
        try:
            yield from deciding.progress(job, state, job.tasks[task_id], inputs)
        except BlobsNeeded as error:
            needed.add(error)
        else:
            del state.undecided[task_id]
    needed.check()


def _expand(job: JobState, state: StepState, inputs: Inputs, needs_done: bool) -> bool:
    """Find out how many tasks the step has. False while its list is not there, or when it is no good."""
    fork = state.step.fork
    if fork is None:
        state.size = 1
        return True
    if fork.steps and not needs_done:
        return False
    try:
        size = inputs.expand(job, state)
        joining.check_size(state.step, size)
    except InvalidArgument as error:
        job.broken = JobFailed("invalid_fork", error.message)
        return False
    if job.task_total() + size + job.unexpanded() - 1 > job.spec.fan_out:
        job.broken = JobFailed(
            "fan_out_exceeded",
            f"{fork.path}: a list of {size} would give the job more than limits.fan_out = {job.spec.fan_out} tasks",
        )
        return False
    state.size = size
    return True


def task_id_of(job_id: str, step: str, index: int) -> str:
    """Return the id that a task always has, however often its creation is tried."""
    return derive_child_id(job_id, step, str(index))


def _create(job: JobState, state: StepState, index: int, inputs: Inputs, needs_done: bool) -> Decision:
    step = state.step
    stream = task_id_of(job.id, step.id, index)
    given: Value | None = None
    failure: TaskFailed | None = None
    if needs_done:
        try:
            given = inputs.input_of(job, state, index)
        except InvalidArgument as error:
            failure = TaskFailed("invalid_input", error.message)
    event = TaskCreated(
        job=job.id,
        step=step.id,
        agent=step.agent,
        index=None if step.fork is None else index,
        input=given,
        timeout_ms=step.timeout_ms or job.agents[step.agent].timeout_ms,
        retry=step.retry,
        replicas=0 if step.judging is None else step.judging.planned,
    )
    return Decision(stream, [event] if failure is None else [event, failure])


def _create_child(job: JobState, state: StepState, parent: str, inputs: Inputs) -> Decision:
    family = job.forks.families[parent]
    index = len(family.children)
    child = family.staged[index]
    event = TaskCreated(
        job=job.id,
        step=state.step.id,
        agent=child.agent,
        index=index,
        input=inputs.forked_input(job, bytes(child.input)),
        timeout_ms=state.step.timeout_ms or job.agents[child.agent].timeout_ms,
        retry=state.step.retry,
        parent=parent,
    )
    return Decision(child_id_of(parent, index), [event])


def _make_ready(job: JobState, state: StepState, task: TaskState, index: int, inputs: Inputs) -> Decision:
    try:
        return Decision(task.id, [TaskReady(inputs.input_of(job, state, index))])
    except InvalidArgument as error:
        return Decision(task.id, tasks.decide(task, tasks.Reject("invalid_input", error.message)))


def _end_of_success(job: JobState, inputs: Inputs) -> Event:
    try:
        return JobSucceeded(inputs.output_of(job))
    except InvalidArgument as error:
        return JobFailed("invalid_output", error.message)


def _close(job: JobState, closing: Closing, now_us: int, inputs: Inputs, needed: _Needed) -> Iterator[Decision]:
    """Cancel what has not ended; when all has, end the job."""
    for state in job.steps.values():
        if not state.open:
            continue
        for task in chain(state.tasks, state.children, state.judges):
            if task.status not in TERMINAL:
                yield Decision(task.id, tasks.decide(task, tasks.Cancel(closing)))
    if closing == "job_cancelled":
        yield Decision(job.id, [JobCancelled(job.cancel_reason or "")])
    elif closing == "deadline":
        yield Decision(job.id, [JobFailed(DEADLINE_CODE, "the job did not end before its deadline")])
    else:
        try:
            yield Decision(job.id, [_failure_of(job, now_us, inputs)])
        except BlobsNeeded as error:
            needed.add(error)


def _failure_of(job: JobState, now_us: int, inputs: Inputs) -> JobFailed:
    if job.failed is not None:
        assert job.failed.failure is not None
        failure = job.failed.failure
        return JobFailed(failure.code, failure.message, job.failed.id)
    if job.broken is None:
        # A crash came between the cancelled tasks and the job's end: what broke it breaks it again.
        for state in job.steps.values():
            if state.size is None and job.broken is None:
                _expand(job, state, inputs, job.needs_done(state))
        failures = (joining.failure_of(job, state, now_us, inputs) for state in job.steps.values())
        job.broken = job.broken or next((failure for failure in failures if failure is not None), None)
    return job.broken or JobFailed("internal", "the job was ended for a reason that the log does not show")


# --- evolution ---------------------------------------------------------------------------------------------


def evolve(job: JobState, stream: str, event: Event) -> TaskState | None:
    """Apply one event of the job, of one of its tasks or approvals; return the task where it was one.

    Raises:
        CorruptLog: the event does not follow from the state.
    """
    if stream == job.id:
        _evolve_job(job, event)
        return None
    if isinstance(event, TaskCreated):
        return _add_task(job, tasks.created(stream, event))
    task = job.tasks.get(stream)
    if task is None and isinstance(event, APPROVALS):
        approvals.evolve(job.approvals, stream, event)
        return None
    if task is None:
        raise CorruptLog(f"job {job.id}: {type(event).__name__} of an unknown task {stream}", job=job.id)
    before, given = task.status, task.input
    tasks.evolve(task, event)
    if isinstance(event, AttemptSucceeded):
        job.inline_bytes += values.inline_bytes(event.output)
        if event.forks:
            job.forks.claims[task.id, event.attempt] = event.forks
    if task.input is not given:
        job.inline_bytes += values.inline_bytes(task.input) - values.inline_bytes(given)
    state = job.steps[task.step]
    if isinstance(event, TaskCancelled):
        job.expired = job.expired or event.reason == "deadline"
        job.aborted = job.aborted or event.reason == "job_failed"
        state.closed = state.closed or event.reason == joining.PARTIAL
    if task.judging is not None:
        if task.ended and before not in TERMINAL:
            _end_judge(job, state, task)
        return task
    if task.judged is not None:
        state.undecided[task.id] = None
    if task.status != before:
        state.counts[before] -= 1
        state.counts[task.status] += 1
        if task.parent is None and (task.status == "failed" or joining.is_partial(event)):
            state.lost += 1
        if task.status == "failed" and job.failed is None and state.step.on_failure == "fail":
            job.failed = task
        elif job.forks.claims and isinstance(event, TaskSucceeded):
            forked = job.forks.decide(task, event.attempt, job.tasks)
            if forked:
                state.forked += forked
                state.forking[task.id] = None
    return task


def _add_task(job: JobState, task: TaskState) -> TaskState:
    state = job.steps[task.step]
    if task.judging is not None:
        _add_judge(job, state, task, task.judging)
        return task
    if task.parent is not None:
        _add_child(job, state, task, task.parent)
    elif job.end is not None or (task.index or 0) != len(state.tasks) or task.id in job.tasks:
        raise CorruptLog(f"job {job.id}: task {task.id} is not the next of step {task.step}", job=job.id)
    else:
        state.tasks.append(task)
    if task.judged is not None and task.status == "ready":
        state.undecided[task.id] = None
    state.counts[task.status] += 1
    job.tasks[task.id] = task
    job.inline_bytes += values.inline_bytes(task.input)
    return task


def _add_judge(job: JobState, state: StepState, task: TaskState, judging: Judging) -> None:
    if job.end is not None or task.id in job.tasks:
        raise CorruptLog(f"job {job.id}: judge {task.id} is none that is asked", job=job.id)
    state.judges.append(task)
    state.judges_open += 1
    if judging.task:
        state.judges_of.setdefault(judging.task, []).append(task)
    if judging.kind == "integrator":
        state.integrator = task
    job.tasks[task.id] = task
    job.inline_bytes += values.inline_bytes(task.input)


def _end_judge(job: JobState, state: StepState, task: TaskState) -> None:
    assert task.judging is not None
    state.judges_open -= 1
    if task.judging.kind == "integrator" and task.status == "failed" and job.failed is None:
        job.failed = task
    judged = job.tasks.get(task.judging.task)
    if judged is not None and judged.judged is not None:
        deciding.judge_ended(task, judged)
        state.undecided[judged.id] = None
    if task.judging.kind == "vector":
        # The log has it, and the judged task while it is compared: a large fork would hold very many of them.
        for number, output in task.outputs.items():
            job.inline_bytes += values.inline_bytes(_FORGOTTEN) - values.inline_bytes(output)
            task.outputs[number] = _FORGOTTEN


def _add_child(job: JobState, state: StepState, task: TaskState, parent: str) -> None:
    family = job.forks.families.get(parent)
    if job.end is not None or parent not in state.forking or family is None or task.index != len(family.children):
        raise CorruptLog(f"job {job.id}: task {task.id} is not the next child of {parent}", job=job.id)
    family.add(task.id)
    state.children.append(task)
    if family.complete:
        del state.forking[parent]


def _evolve_job(job: JobState, event: Event) -> None:
    if job.end is not None:
        raise CorruptLog(f"job {job.id} has ended and got {type(event).__name__}", job=job.id)
    match event:
        case JobCancelRequested():
            job.cancel_reason = event.reason
        case StepJoined():
            _join_step(job, event)
        case JobSucceeded() | JobFailed() | JobCancelled():
            if any(state.open for state in job.steps.values()):
                raise CorruptLog(f"job {job.id} ended before its tasks", job=job.id)
            job.end = event
        case _:
            raise CorruptLog(f"job {job.id}: {type(event).__name__} is not an event of a job", job=job.id)
    job.version += 1


def _join_step(job: JobState, event: StepJoined) -> None:
    state = job.steps.get(event.step)
    if state is None or not state.joins or state.joined is not None or state.open:
        raise CorruptLog(f"job {job.id}: step {event.step} cannot be joined", job=job.id)
    state.joined = event
    state.size = len(state.tasks) if state.size is None else state.size
    state.forking.clear()
    state.undecided.clear()
    state.known.clear()
    state.items = state.scope = None


def look_again(job: JobState) -> bool:
    """Have every judged task looked at again that has not ended; say whether there is one.

    For when something has changed that no event of the job tells.
    """
    found = False
    for state in job.steps.values():
        if state.step.judging is not None and state.joined is None and state.open:
            waiting = {task.id: None for task in state.tasks if task.judged is not None and not task.ended}
            state.undecided |= waiting
            found = found or bool(waiting)
    return found


def forget_values(job: JobState) -> None:
    """Drop the values of a job that has ended: only who held which attempt is of interest from here on."""
    job.input, job.inline_bytes = _FORGOTTEN, 0
    job.forks.forget_values()
    for task in job.tasks.values():
        task.outputs.clear()
    for state in job.steps.values():
        state.items = state.scope = None
        state.known.clear()


def snapshot(job: JobState) -> dict[str, Any]:
    """Return what the log determines of a job, for comparing a recovered state with a replayed one."""
    return {
        "id": job.id,
        "version": job.version,
        "cancel_reason": job.cancel_reason,
        "aborted": job.aborted,
        "expired": job.expired,
        "failed": None if job.failed is None else job.failed.id,
        "end": _plain(job.end),
        "steps": {
            name: ([task.id for task in state.tasks], dict(state.counts), [judge.id for judge in state.judges])
            for name, state in job.steps.items()
        },
        "joins": {name: (_plain(state.joined), state.closed, state.lost) for name, state in job.steps.items()},
        "tasks": {task_id: _plain(task) for task_id, task in job.tasks.items()},
        "approvals": {approval_id: _plain(one) for approval_id, one in job.approvals.items()},
        "forks": job.forks.snapshot(),
    }


def _plain(state: msgspec.Struct | None) -> Any:
    return msgspec.json.decode(msgspec.json.encode(state))
