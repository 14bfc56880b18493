"""A job as its events tell it: steps, tasks, attempts, judges and decisions. Pure; the views draw it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hive_common.contracts.events import JOB_TERMINAL, KIND_OF
from hive_common.kernel.errors import UnknownEvent

TASK_STATES = ("blocked", "ready", "active", "succeeded", "failed", "cancelled")
TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})
LIVE = "runs"
"""State of an attempt that has not ended."""

_STATE_AFTER = {
    "TaskReady": "ready",
    "TaskAssigned": "active",
    "TaskRetryScheduled": "ready",
    "TaskSucceeded": "succeeded",
    "TaskFailed": "failed",
    "TaskCancelled": "cancelled",
}
# An attempt ended; whether the task did is said by an event of its own.
_ENDS_ATTEMPT = {"AttemptSucceeded": "succeeded", "AttemptFailed": "failed", "AttemptLost": "lost"}
_ENDS_APPROVAL = frozenset({"ApprovalDecided", "ApprovalExpired"})
_VERDICTS = ("score", "passed", "equal", "choice")


@dataclass(slots=True)
class TrackedAttempt:
    """One attempt. `state` is `runs`, succeeded, failed, lost or cancelled; `why` says more of the middle two.

    `score` and `passed` are what judges said of its result, None while they have not.
    """

    number: int
    executor: str
    started_us: int
    state: str = LIVE
    ended_us: int = 0
    why: str = ""
    score: float | None = None
    passed: bool | None = None
    device: str = ""


@dataclass(slots=True)
class TrackedTask:
    """What is known of one task.

    Attributes:
        executor, attempt: of the newest attempt.
        replicas: attempts that were planned at first, where results are judged; `planned`: those since, too.
        judging: of a judge: `{kind, task?, attempts?}`; None of all others.
        judges, children: tasks that judge this one's results, and that it forked.
        decision: the record of it (`hive_common.contracts.judgement.Decision`), as JSON; `trust` stands beside it.
        extended: why more attempts were planned.
        verdict: of a judge: what it said.
        why: how it failed, or why it was cancelled.
    """

    id: str
    step: str
    state: str
    agent: str = ""
    index: int | None = None
    parent: str = ""
    executor: str = ""
    attempt: int = 0
    replicas: int = 0
    planned: int = 0
    judging: dict[str, Any] | None = None
    attempts: dict[int, TrackedAttempt] = field(default_factory=dict)
    judges: list["TrackedTask"] = field(default_factory=list)
    children: list["TrackedTask"] = field(default_factory=list)
    decision: dict[str, Any] | None = None
    trust: int = 0
    extended: list[str] = field(default_factory=list)
    verdict: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    @property
    def failures(self) -> bool:
        """Whether an attempt failed or was lost."""
        return any(one.state in ("failed", "lost") for one in self.attempts.values())

    @property
    def told_apart(self) -> bool:
        """Whether its attempts are worth a line each: several of them, one that failed, or judged ones."""
        return bool(self.replicas or len(self.attempts) > 1 or self.failures)


@dataclass(slots=True)
class TrackedStep:
    """A step: how many of its tasks are in which state, and which of them are worth a look.

    Attributes:
        roots: its tasks but for those that others forked.
        active, noted, failed: by id, in the order in which they became so; active ones are judges, too. Noted are
            tasks that did not go as planned.
        judges: those of no single task: an integrator.
        join: the content of its `StepJoined`.
    """

    name: str
    agent: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    roots: list[TrackedTask] = field(default_factory=list)
    active: dict[str, TrackedTask] = field(default_factory=dict)
    noted: dict[str, TrackedTask] = field(default_factory=dict)
    failed: dict[str, TrackedTask] = field(default_factory=dict)
    judges: list[TrackedTask] = field(default_factory=list)
    join: dict[str, Any] | None = None


@dataclass
class Tracker:
    """A job, one event after the other.

    Attributes:
        tasks: by id, judges too.
        steps: by name, in the order in which they appeared.
        attempts: how many were given to executors.
        failures: how many attempts failed or were lost.
        waiting: ids of approvals for which an attempt waits, in the order in which they were asked.
        ended: type of the job's terminal event, empty while it runs.
        position: of the last event.
        started_us: time of the first event, 0 before there is one.
        ended_us: time of the terminal event, 0 while it runs.
    """

    tasks: dict[str, TrackedTask] = field(default_factory=dict)
    steps: dict[str, TrackedStep] = field(default_factory=dict)
    attempts: int = 0
    failures: int = 0
    waiting: dict[str, None] = field(default_factory=dict)
    ended: str = ""
    position: int = 0
    started_us: int = 0
    ended_us: int = 0
    seen_us: int = 0

    def apply(self, event: dict[str, Any]) -> None:
        """Take in one event of the job, as the gateway's stream gives it.

        Raises:
            UnknownEvent: of a type that this version does not know: what it would show could be wrong (law 11).
        """
        kind, data = event["type"], event["data"] or {}
        if kind not in KIND_OF:
            raise UnknownEvent(
                f"position {event['position']}: this version of `hive` does not know the event {kind}", type=kind
            )
        self.position = event["position"]
        self.seen_us = event["ts_us"]
        self.started_us = self.started_us or event["ts_us"]
        if kind in JOB_TERMINAL:
            self.ended = kind
            self.ended_us = event["ts_us"]
        elif kind == "TaskCreated":
            self._create(event["stream"], data)
        elif kind == "StepJoined":
            self._step(data.get("step", "?")).join = data
        elif kind == "ApprovalRequested":
            self.waiting[event["stream"]] = None
        elif kind in _ENDS_APPROVAL:
            self.waiting.pop(event["stream"], None)
        elif (task := self.tasks.get(event["stream"])) is not None:
            self._apply_to_task(task, kind, data, event["ts_us"])

    def counts(self, step: str | None = None) -> Counter[str]:
        """Count tasks by state, judges not among them: all, or those of one step."""
        if step is not None:
            return +self.steps[step].counts
        return +sum((one.counts for one in self.steps.values()), Counter[str]())

    def busy(self) -> Counter[str]:
        """Count attempts that run by executor."""
        running: Counter[str] = Counter()
        for task in self.open_tasks():
            running.update(one.executor for one in task.attempts.values() if one.state == LIVE)
        return running

    def open_tasks(self) -> Iterator[TrackedTask]:
        """Yield the tasks and judges that have attempts which run."""
        for step in self.steps.values():
            yield from step.active.values()

    def _step(self, name: str) -> TrackedStep:
        return self.steps.setdefault(name, TrackedStep(name))

    def _create(self, task_id: str, data: dict[str, Any]) -> None:
        step = self._step(data.get("step", "?"))
        task = self.tasks[task_id] = TrackedTask(
            task_id,
            step.name,
            "ready" if data.get("input") is not None else "blocked",
            agent=data.get("agent", ""),
            index=data.get("index"),
            parent=data.get("parent") or "",
            replicas=data.get("replicas", 0),
            planned=data.get("replicas", 0),
            judging=data.get("judging"),
        )
        if task.judging is not None:
            judged = self.tasks.get(task.judging.get("task", ""))
            (step if judged is None else judged).judges.append(task)
            return
        step.agent = step.agent or task.agent
        step.counts[task.state] += 1
        parent = self.tasks.get(task.parent)
        if parent is None:
            step.roots.append(task)
        else:
            parent.children.append(task)

    def _apply_to_task(self, task: TrackedTask, kind: str, data: dict[str, Any], ts_us: int) -> None:
        if kind == "TaskAssigned":
            self.attempts += 1
            task.executor, task.attempt = data["executor"], data["attempt"]
            task.attempts[task.attempt] = TrackedAttempt(
                task.attempt, task.executor, ts_us, device=data.get("device", "")
            )
        elif kind in _ENDS_ATTEMPT:
            self._end_attempt(task, kind, data, ts_us)
        elif kind == "TaskExtended":
            task.extended.append(data.get("reason", ""))
            task.planned += data.get("attempts", 0)
        elif kind == "TaskDecided":
            _take_decision(task, data)
        elif kind in ("TaskFailed", "TaskCancelled"):
            task.why = _why(data)
        state = _STATE_AFTER.get(kind, task.state)
        if kind in ("AttemptFailed", "AttemptLost") and task.state == "active" and not task.replicas:
            state = "ready"
        self._move(task, state, ts_us)

    def _end_attempt(self, task: TrackedTask, kind: str, data: dict[str, Any], ts_us: int) -> None:
        if kind != "AttemptSucceeded":
            self.failures += 1
        attempt = task.attempts.get(data.get("attempt", 0))
        if attempt is not None:
            attempt.state, attempt.ended_us = _ENDS_ATTEMPT[kind], ts_us
            attempt.why = "" if kind == "AttemptSucceeded" else _why(data)
        if kind == "AttemptSucceeded" and task.judging is not None:
            said = (data.get("output") or {}).get("inline")
            if isinstance(said, dict):
                task.verdict = {name: said[name] for name in _VERDICTS if name in said}

    def _move(self, task: TrackedTask, state: str, ts_us: int) -> None:
        step = self.steps[task.step]
        if state != task.state and task.judging is None:
            step.counts[task.state] -= 1
            step.counts[state] += 1
        task.state = state
        if state == "active":
            step.active[task.id] = task
        else:
            step.active.pop(task.id, None)
        if state not in TERMINAL_STATES:
            return
        for attempt in task.attempts.values():
            if attempt.state == LIVE:
                attempt.state, attempt.ended_us = "cancelled", ts_us
        if task.judging is not None:
            self._tell_verdict(task)
        elif state == "failed":
            step.failed[task.id] = task
        elif task.extended or task.failures or _disputed(task.decision or {}):
            step.noted[task.id] = task

    def _tell_verdict(self, judge: TrackedTask) -> None:
        assert judge.judging is not None
        judged = self.tasks.get(judge.judging.get("task", ""))
        for number in judge.judging.get("attempts", ()) if judged is not None else ():
            attempt = judged.attempts.get(number) if judged is not None else None
            if attempt is not None and judge.state == "succeeded":
                if isinstance(score := judge.verdict.get("score"), int | float):
                    attempt.score = score
                if isinstance(passed := judge.verdict.get("passed"), bool):
                    attempt.passed = passed


def _take_decision(task: TrackedTask, data: dict[str, Any]) -> None:
    decision = task.decision = data.get("decision") or {}
    task.trust = data.get("trust", 0)
    for candidate in decision.get("candidates", ()):
        attempt = task.attempts.get(candidate["attempt"])
        if attempt is not None:
            attempt.score, attempt.passed = candidate.get("score"), candidate.get("passed")


def _disputed(decision: dict[str, Any]) -> bool:
    """Whether the results were not all the same, or a test or a senior agent had to say so."""
    candidates = decision.get("candidates", ())
    differ = len({one.get("key", "") for one in candidates}) > 1
    return differ or decision.get("outcome") == "escalated" or any(one.get("passed") is False for one in candidates)


def _why(data: dict[str, Any]) -> str:
    """Return how something ended: a code with its message, or a reason."""
    if "code" in data:
        return ": ".join(filter(None, (data["code"], data.get("message", ""))))
    return str(data.get("reason", ""))
