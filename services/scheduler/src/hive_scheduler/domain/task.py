"""A task and its attempts: what a command does to them, and how their events change them.

    task      blocked → ready → active ─────→ succeeded | failed | cancelled        (terminal)
                         ↑        │ holds a set of attempts
                         └────────┘ every attempt ended without a decision, and retries are left
    attempt   assigned → running → succeeded | failed | lost | cancelled

`decide` takes a command and answers with events, `evolve` applies one event. `evolve` changes the state it is
given: a job may have 100,000 tasks, and copying one for each event would be most of the scheduler's work.
Everything that depends on time or chance comes in with the command.
"""

from typing import Final, Literal

import msgspec
from hive_common.contracts.events import (
    NOT_COUNTED_CODES,
    AttemptFailed,
    AttemptLate,
    AttemptLost,
    AttemptStarted,
    AttemptSucceeded,
    Child,
    Event,
    Placement,
    RetryPolicy,
    TaskAssigned,
    TaskCancelled,
    TaskCreated,
    TaskFailed,
    TaskReady,
    TaskRetryScheduled,
    TaskSucceeded,
    Usage,
)
from hive_common.contracts.limits import LOST_ATTEMPTS_MAX
from hive_common.contracts.values import Value
from hive_common.kernel.errors import CorruptLog, FailedPrecondition

TaskStatus = Literal["blocked", "ready", "active", "succeeded", "failed", "cancelled"]
AttemptStatus = Literal["assigned", "running", "succeeded", "failed", "lost", "cancelled"]
Verdict = Literal["accepted", "duplicate", "late", "rejected"]

STATUSES: Final[tuple[str, ...]] = ("blocked", "ready", "active", "succeeded", "failed", "cancelled")
TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
LIVE: Final = frozenset({"assigned", "running"})

BACKOFF_MAX_MS: Final = 5 * 60_000
"""The pause between attempts doubles up to this."""

NEVER_RETRIED: Final = frozenset({"invalid_module", "invalid_input", "permission_denied", "killed"})
"""Codes that another attempt cannot change: they depend on the agent, its grants or the task's input alone."""

KILLED: Final = "killed"
"""Why an attempt is lost when a kill order stops its executor; the task waits for another, however often. And the
code of a task that fails because an order stops its agent."""

_LOST_BECAUSE: Final = {
    "lease_expired": "the executor was not heard of any more (lease_expired)",
    "session_ended": "the executor was started anew (session_ended)",
    "overtime": "the executor did not say within its time how it ended (overtime)",
    "given_back": "the executor gave it back (given_back)",
    KILLED: "a kill order stopped the executor (killed)",
}


class AttemptState(msgspec.Struct):
    """One attempt. `late`: its one late event has been written."""

    executor: str
    session: str
    status: AttemptStatus = "assigned"
    late: bool = False


class TaskState(msgspec.Struct):
    """A task as its events left it.

    Attributes:
        version: of its stream.
        attempts: number to attempt; a number is never reused.
        failures: ended attempts that count against `retry.max_attempts`.
        losses: ended attempts that count against `LOST_ATTEMPTS_MAX` instead.
        not_before_us: a ready task is not assigned before this time.
        output: what each successful attempt gave; the task's is that of `decided`.
        parent: id of the task that forked this one.
    """

    id: str
    job: str
    step: str
    index: int | None
    agent: str
    timeout_ms: int
    retry: RetryPolicy
    status: TaskStatus = "blocked"
    version: int = 0
    input: Value | None = None
    attempts: dict[int, AttemptState] = {}
    failures: int = 0
    losses: int = 0
    not_before_us: int = 0
    outputs: dict[int, Value] = {}
    decided: int | None = None
    failure: TaskFailed | None = None
    parent: str | None = None

    @property
    def output(self) -> Value | None:
        """The decided output, None before the task has succeeded."""
        return None if self.decided is None else self.outputs[self.decided]

    @property
    def ended(self) -> bool:
        """Whether the task has its terminal event."""
        return self.status in TERMINAL

    def live(self) -> list[int]:
        """Numbers of the attempts that may still decide the task."""
        return [number for number, attempt in self.attempts.items() if attempt.status in LIVE]


# --- commands ----------------------------------------------------------------------------------------------


class MakeReady(msgspec.Struct, frozen=True):
    """What the task needs has succeeded; this is its input."""

    input: Value


class Assign(msgspec.Struct, frozen=True):
    """Give the next attempt to a session of an executor."""

    executor: str
    session: str
    lease_ms: int
    now_us: int
    placement: Placement | None = None


class Start(msgspec.Struct, frozen=True):
    """The executor says that the attempt runs."""

    attempt: int
    executor: str
    session: str
    started_us: int


class Succeed(msgspec.Struct, frozen=True):
    """The executor says that the attempt succeeded; `forks` are the children that it wants."""

    attempt: int
    executor: str
    session: str
    output: Value
    usage: Usage = Usage()
    log: Value | None = None
    forks: tuple[Child, ...] = ()


class Fail(msgspec.Struct, frozen=True):
    """The executor says that the attempt failed."""

    attempt: int
    executor: str
    session: str
    code: str
    now_us: int
    message: str = ""
    detail: str = ""
    usage: Usage = Usage()
    log: Value | None = None


class GiveBack(msgspec.Struct, frozen=True):
    """The executor did not run the attempt, or stopped it because it was told to."""

    attempt: int
    executor: str
    session: str
    now_us: int


class Lose(msgspec.Struct, frozen=True):
    """Nothing more is expected of the attempt."""

    attempt: int
    reason: str
    now_us: int


class Reject(msgspec.Struct, frozen=True):
    """The task cannot run at all, such as for an input that does not fit the agent's schema."""

    code: str
    message: str


class Cancel(msgspec.Struct, frozen=True):
    """End the task without a decision."""

    reason: str


Report = Start | Succeed | Fail | GiveBack
Command = MakeReady | Assign | Report | Lose | Reject | Cancel


# --- decisions ---------------------------------------------------------------------------------------------


def verdict(task: TaskState, report: Report, closing: bool = False) -> Verdict:
    """Say what a report counts for (law 3).

    Args:
        task: the task that it names.
        report: what the executor says; `executor` is who really sent it.
        closing: the task's job takes no more results, though this task has not ended yet.
    """
    attempt = task.attempts.get(report.attempt)
    if attempt is None or attempt.executor != report.executor or attempt.session != report.session:
        return "rejected"
    if attempt.status in ("succeeded", "failed"):
        return "duplicate"
    if attempt.status in LIVE and not task.ended and not closing:
        return "duplicate" if isinstance(report, Start) and attempt.status == "running" else "accepted"
    return "late"


def decide(task: TaskState, command: Command, closing: bool = False) -> list[Event]:
    """Return the events that `command` causes, in order; none where it changes nothing.

    Raises:
        FailedPrecondition: the command does not fit the state. Reports never raise: they are late.
    """
    match command:
        case Start() | Succeed() | Fail() | GiveBack():
            return _decide_report(task, command, closing)
        case Assign():
            if task.status not in ("ready", "active") or command.now_us < task.not_before_us:
                raise _misfit(task, command)
            return [
                TaskAssigned(
                    attempt=len(task.attempts) + 1,
                    executor=command.executor,
                    session=command.session,
                    lease_ms=command.lease_ms,
                    placement=command.placement,
                )
            ]
        case MakeReady():
            if task.status != "blocked":
                raise _misfit(task, command)
            return [TaskReady(command.input)]
        case Lose():
            if task.ended or task.attempts[command.attempt].status not in LIVE:
                return []
            lost: Event = AttemptLost(command.attempt, command.reason)
            if command.reason == KILLED:
                return [lost, *([] if len(task.live()) > 1 else [TaskRetryScheduled(command.now_us)])]
            return [lost, *_after(task, command.attempt, "lost", _lost_message(command.reason), command.now_us)]
        case Reject():
            return [] if task.ended else [TaskFailed(command.code, command.message)]
        case Cancel():
            return [] if task.ended else [TaskCancelled(command.reason)]


def _decide_report(task: TaskState, report: Report, closing: bool) -> list[Event]:
    match verdict(task, report, closing):
        case "accepted":
            return _decide_accepted(task, report)
        case "late" if isinstance(report, Succeed | Fail) and not task.attempts[report.attempt].late:
            return [AttemptLate(report.attempt, "succeeded" if isinstance(report, Succeed) else "failed")]
    return []


def _decide_accepted(task: TaskState, report: Report) -> list[Event]:
    number = report.attempt
    match report:
        case Start():
            return [AttemptStarted(number, report.started_us)]
        case Succeed():
            return [
                AttemptSucceeded(number, report.output, report.usage, report.log, report.forks),
                TaskSucceeded(number),
            ]
        case Fail():
            failed: Event = AttemptFailed(
                number, report.code, report.message, report.detail, report.usage, report.log
            )
            return [failed, *_after(task, number, report.code, report.message, report.now_us)]
        case GiveBack():
            lost: Event = AttemptLost(number, "given_back")
            return [lost, *_after(task, number, "lost", _lost_message("given_back"), report.now_us)]


def _lost_message(reason: str) -> str:
    return f"lost too often, the last time because {_LOST_BECAUSE.get(reason, reason)}"


def _after(task: TaskState, ended: int, code: str, message: str, now_us: int) -> list[Event]:
    """Decide what follows when attempt `ended` ends without success: wait for others, retry, or fail."""
    if any(number != ended for number in task.live()):
        return []
    if code in NOT_COUNTED_CODES:
        if task.losses < LOST_ATTEMPTS_MAX:
            return [TaskRetryScheduled(now_us)]
        return [TaskFailed(code, message, ended)]
    failures = task.failures + 1
    policy = task.retry
    wanted = code not in NEVER_RETRIED and (not policy.codes or code in policy.codes)
    if failures < policy.max_attempts and wanted:
        # The exponent is bounded as well: with 100 attempts the power alone would be astronomic.
        pause_ms = min(policy.backoff_ms << min(failures - 1, 20), BACKOFF_MAX_MS)
        return [TaskRetryScheduled(now_us + pause_ms * 1_000)]
    return [TaskFailed(code, message, ended)]


def _misfit(task: TaskState, command: Command) -> FailedPrecondition:
    name = type(command).__name__
    return FailedPrecondition(f"task {task.id} is {task.status}: {name} does not fit", task=task.id)


# --- evolution ---------------------------------------------------------------------------------------------


def created(task_id: str, event: TaskCreated) -> TaskState:
    """Return the state after the first event of a task."""
    return TaskState(
        id=task_id,
        job=event.job,
        step=event.step,
        index=event.index,
        agent=event.agent,
        timeout_ms=event.timeout_ms,
        retry=event.retry,
        status="blocked" if event.input is None else "ready",
        version=1,
        input=event.input,
        attempts={},
        outputs={},
        parent=event.parent,
    )


def evolve(task: TaskState, event: Event) -> None:
    """Apply one event.

    Raises:
        CorruptLog: it does not follow from the state: a second terminal event, a reused attempt number.
    """
    if task.ended and not isinstance(event, AttemptLate):
        raise CorruptLog(f"task {task.id} has ended and got {type(event).__name__}", task=task.id)
    match event:
        case TaskAssigned():
            if event.attempt != len(task.attempts) + 1:
                raise CorruptLog(f"task {task.id}: attempt {event.attempt} out of order", task=task.id)
            task.attempts[event.attempt] = AttemptState(event.executor, event.session)
            task.status = "active"
        case AttemptStarted():
            task.attempts[event.attempt].status = "running"
        case AttemptSucceeded():
            task.attempts[event.attempt].status = "succeeded"
            task.outputs[event.attempt] = event.output
        case AttemptFailed():
            task.attempts[event.attempt].status = "failed"
            _count(task, event.code)
        case AttemptLost():
            task.attempts[event.attempt].status = "lost"
            if event.reason != KILLED:
                _count(task, "lost")
        case AttemptLate():
            task.attempts[event.attempt].late = True
        case TaskReady():
            task.status, task.input = "ready", event.input
        case TaskRetryScheduled():
            task.status, task.not_before_us = "ready", event.not_before_us
        case TaskSucceeded():
            task.status, task.decided = "succeeded", event.attempt
            _end_live(task)
        case TaskFailed():
            task.status, task.failure = "failed", event
            _end_live(task)
        case TaskCancelled():
            task.status = "cancelled"
            _end_live(task)
        case _:
            raise CorruptLog(f"task {task.id}: {type(event).__name__} is not an event of a task", task=task.id)
    task.version += 1


def _count(task: TaskState, code: str) -> None:
    if code in NOT_COUNTED_CODES:
        task.losses += 1
    else:
        task.failures += 1


def _end_live(task: TaskState) -> None:
    task.input = None  # nobody asks for it any more, and a fork may have a hundred thousand of them
    for attempt in task.attempts.values():
        if attempt.status in LIVE:
            attempt.status = "cancelled"
