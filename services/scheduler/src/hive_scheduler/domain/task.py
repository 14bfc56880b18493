"""A task and its attempts: what a command does to them, and how their events change them.

    task      blocked → ready → active ─────→ succeeded | failed | cancelled        (terminal)
                         ↑        │ holds a set of attempts
                         └────────┘ every attempt ended without a decision, and retries are left
    attempt   assigned → running → succeeded | failed | lost | cancelled

Where results are judged (`JudgedState`), a task has several attempts, and none of them ends it: it stays active
until `domain/deciding.py` has applied the rule.

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
    Judging,
    Placement,
    RetryPolicy,
    TaskAssigned,
    TaskCancelled,
    TaskCreated,
    TaskDecided,
    TaskExtended,
    TaskFailed,
    TaskReady,
    TaskRetryScheduled,
    TaskSucceeded,
    Usage,
)
from hive_common.contracts.judgement import Decision, Judge, Pair
from hive_common.contracts.limits import LOST_ATTEMPTS_MAX
from hive_common.contracts.values import Value
from hive_common.judgement.equality import Vector
from hive_common.kernel.errors import CorruptLog, FailedPrecondition

TaskStatus = Literal["blocked", "ready", "active", "succeeded", "failed", "cancelled"]
AttemptStatus = Literal["assigned", "running", "succeeded", "failed", "lost", "cancelled"]
Verdict = Literal["accepted", "duplicate", "late", "rejected"]

STATUSES: Final[tuple[str, ...]] = ("blocked", "ready", "active", "succeeded", "failed", "cancelled")
TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
LIVE: Final = frozenset({"assigned", "running"})

BACKOFF_MAX_MS: Final = 5 * 60_000
"""The pause between attempts doubles up to this."""

NEVER_RETRIED: Final = frozenset(
    {"invalid_module", "invalid_input", "permission_denied", "budget_exhausted", "killed"}
)
"""Codes that another attempt cannot change: they depend on the agent, its grants, what its job may spend, or the
task's input alone."""

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
    """One attempt. `late`: its one late event has been written. `device`, `owner`: where results are judged."""

    executor: str
    session: str
    status: AttemptStatus = "assigned"
    late: bool = False
    device: str = ""
    owner: str = ""


class JudgedState(msgspec.Struct):
    """What a task whose results are judged has besides.

    Attributes:
        planned: attempts that were made or are to be made.
        replaced: those of them that stand in for one that failed or was lost.
        waits: when those may be assigned that are not made yet, the soonest first.
        scores, passed, pairs: what judges said.
        vectors: and of what is compared by them, by attempt; none once the task has ended.
        choice: the attempt that a senior agent took; 0: none of them. None while it has not said.
        judges: who said it.
        failure: why a judge could not say anything.
        last: code and message of the last attempt that failed.
    """

    planned: int
    replaced: int = 0
    waits: list[int] = []
    scores: dict[int, float] = {}
    passed: dict[int, bool] = {}
    vectors: dict[int, Vector] = {}
    pairs: list[Pair] = []
    choice: int | None = None
    judges: list[Judge] = []
    failure: str = ""
    last: tuple[str, str] | None = None
    decision: Decision | None = None


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
        judged: where its results are judged.
        judging: where it is itself a judge, or joins.
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
    judged: JudgedState | None = None
    judging: Judging | None = None

    @property
    def wanted(self) -> int:
        """How many attempts have to be given to executors now."""
        if self.judged is None:
            return 1 if self.status == "ready" else 0
        return self.judged.planned - len(self.attempts) if self.status in ("ready", "active") else 0

    @property
    def decision(self) -> Decision | None:
        """What was decided over its results, None where nothing was or is."""
        return None if self.judged is None else self.judged.decision

    @property
    def kept(self) -> tuple[int, ...]:
        """The attempts whose results are its output, where several are kept."""
        decision = self.decision
        return decision.votes if decision is not None and decision.outcome == "kept" else ()

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
    device: str = ""
    owner: str = ""


class Start(msgspec.Struct, frozen=True):
    """The executor says that the attempt runs."""

    attempt: int
    executor: str
    session: str
    started_us: int


class Mark(msgspec.Struct, frozen=True):
    """The executor says how far the attempt is, in thousandths of its work. No event comes of it."""

    attempt: int
    executor: str
    session: str
    done_permille: int


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


Report = Start | Mark | Succeed | Fail | GiveBack
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
        case Start() | Mark() | Succeed() | Fail() | GiveBack():
            return _decide_report(task, command, closing)
        case Assign():
            if task.status not in ("ready", "active") or command.now_us < task.not_before_us:
                raise _misfit(task, command)
            if task.judged is not None and not task.wanted:
                raise _misfit(task, command)
            is_seen = task.judged is not None or task.judging is not None
            return [
                TaskAssigned(
                    attempt=len(task.attempts) + 1,
                    executor=command.executor,
                    session=command.session,
                    lease_ms=command.lease_ms,
                    placement=command.placement,
                    device=command.device if is_seen else "",
                    owner=command.owner if is_seen else "",
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
            if command.reason == KILLED and task.judged is not None:
                return [lost, TaskExtended(1, "lost", command.now_us)]
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
        case Mark():
            return []
        case Succeed():
            claim = AttemptSucceeded(number, report.output, report.usage, report.log, report.forks)
            return [claim] if task.judged is not None else [claim, TaskSucceeded(number)]
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
    if task.judged is not None:
        return _replacement(task, code, now_us)
    if any(number != ended for number in task.live()):
        return []
    if code in NOT_COUNTED_CODES:
        if task.losses < LOST_ATTEMPTS_MAX:
            return [TaskRetryScheduled(now_us)]
        return [TaskFailed(code, message, ended)]
    pause_ms = _pause_ms(task, code)
    if pause_ms is not None:
        return [TaskRetryScheduled(now_us + pause_ms * 1_000)]
    return [TaskFailed(code, message, ended)]


def _replacement(task: TaskState, code: str, now_us: int) -> list[Event]:
    """Return the attempt that is made in place of one that ended without a result, if one is."""
    if code in NOT_COUNTED_CODES:
        return [TaskExtended(1, "lost", now_us)] if task.losses < LOST_ATTEMPTS_MAX else []
    pause_ms = _pause_ms(task, code)
    return [] if pause_ms is None else [TaskExtended(1, "retry", now_us + pause_ms * 1_000)]


def _pause_ms(task: TaskState, code: str) -> int | None:
    """Return the pause before another attempt after one more failure; None: there is none."""
    failures = task.failures + 1
    policy = task.retry
    if failures >= policy.max_attempts or code in NEVER_RETRIED or (policy.codes and code not in policy.codes):
        return None
    # The exponent is bounded as well: with 100 attempts the power alone would be astronomic.
    return min(policy.backoff_ms << min(failures - 1, 20), BACKOFF_MAX_MS)


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
        judged=JudgedState(event.replicas, waits=[0] * event.replicas) if event.replicas else None,
        judging=event.judging,
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
            attempt = AttemptState(event.executor, event.session, device=event.device, owner=event.owner)
            task.attempts[event.attempt] = attempt
            task.status = "active"
            if task.judged is not None:
                del task.judged.waits[:1]
                task.not_before_us = next(iter(task.judged.waits), 0)
        case AttemptStarted():
            task.attempts[event.attempt].status = "running"
        case AttemptSucceeded():
            task.attempts[event.attempt].status = "succeeded"
            task.outputs[event.attempt] = event.output
        case AttemptFailed():
            task.attempts[event.attempt].status = "failed"
            _count(task, event.code)
            if task.judged is not None:
                task.judged.last = (event.code, event.message)
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
        case TaskExtended():
            _extend(task, event)
        case TaskDecided():
            if task.judged is None:
                raise CorruptLog(f"task {task.id} is not judged and got TaskDecided", task=task.id)
            task.judged.decision = event.decision
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


def _extend(task: TaskState, event: TaskExtended) -> None:
    if task.judged is None:
        raise CorruptLog(f"task {task.id} is not judged and got TaskExtended", task=task.id)
    task.judged.planned += event.attempts
    if event.reason in ("retry", "lost"):
        task.judged.replaced += event.attempts
    # Each has a pause of its own: what is planned now must not shorten that of an earlier one, nor wait for it.
    task.judged.waits = sorted([*task.judged.waits, *[event.not_before_us] * event.attempts])
    task.not_before_us = task.judged.waits[0]


def _count(task: TaskState, code: str) -> None:
    if code in NOT_COUNTED_CODES:
        task.losses += 1
    else:
        task.failures += 1


def _end_live(task: TaskState) -> None:
    task.input = None  # nobody asks for it any more, and a fork may have a hundred thousand of them
    if task.judged is not None:
        task.judged.vectors.clear()
    for attempt in task.attempts.values():
        if attempt.status in LIVE:
            attempt.status = "cancelled"
