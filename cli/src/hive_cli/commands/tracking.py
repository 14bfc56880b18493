"""A job as its events tell it: tasks by step and state, and who runs them. Pure; the views draw it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hive_common.contracts.events import JOB_TERMINAL, KIND_OF
from hive_common.kernel.errors import UnknownEvent

TASK_STATES = ("blocked", "ready", "active", "succeeded", "failed", "cancelled")
TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})
_STATE_AFTER = {
    "TaskReady": "ready",
    "TaskAssigned": "active",
    "TaskRetryScheduled": "ready",
    "TaskSucceeded": "succeeded",
    "TaskFailed": "failed",
    "TaskCancelled": "cancelled",
}
# An attempt ended; whether the task did is said by an event of its own.
_ENDS_ATTEMPT = frozenset({"AttemptFailed", "AttemptLost"})
_ENDS_APPROVAL = frozenset({"ApprovalDecided", "ApprovalExpired"})


@dataclass
class TrackedTask:
    """What is known of one task."""

    step: str
    state: str
    executor: str = ""
    attempt: int = 0


@dataclass
class Tracker:
    """A job, one event after the other.

    Attributes:
        tasks: by id.
        steps: their names, in the order in which they appeared.
        attempts: how many were given to executors.
        failures: how many attempts failed or were lost.
        waiting: ids of approvals for which an attempt waits, in the order in which they were asked.
        ended: type of the job's terminal event, empty while it runs.
        position: of the last event.
        started_us: time of the first event, 0 before there is one.
        ended_us: time of the terminal event, 0 while it runs.
    """

    tasks: dict[str, TrackedTask] = field(default_factory=dict)
    steps: dict[str, None] = field(default_factory=dict)
    attempts: int = 0
    failures: int = 0
    waiting: dict[str, None] = field(default_factory=dict)
    ended: str = ""
    position: int = 0
    started_us: int = 0
    ended_us: int = 0

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
        self.started_us = self.started_us or event["ts_us"]
        if kind in JOB_TERMINAL:
            self.ended = kind
            self.ended_us = event["ts_us"]
        if kind == "TaskCreated":
            self.steps.setdefault(data["step"])
            state = "ready" if data.get("input") is not None else "blocked"
            self.tasks[event["stream"]] = TrackedTask(data["step"], state)
        if kind == "ApprovalRequested":
            self.waiting[event["stream"]] = None
        elif kind in _ENDS_APPROVAL:
            self.waiting.pop(event["stream"], None)
        task = self.tasks.get(event["stream"])
        if task is not None:
            self._apply_to_task(task, kind, data)

    def _apply_to_task(self, task: TrackedTask, kind: str, data: dict[str, Any]) -> None:
        if kind == "TaskAssigned":
            self.attempts += 1
            task.executor, task.attempt = data["executor"], data["attempt"]
        if kind in _ENDS_ATTEMPT:
            self.failures += 1
            if task.state == "active":
                task.state = "ready"
        task.state = _STATE_AFTER.get(kind, task.state)

    def counts(self, step: str | None = None) -> Counter[str]:
        """Count tasks by state: all, or those of one step."""
        return Counter(task.state for task in self.tasks.values() if step is None or task.step == step)

    def busy(self) -> Counter[str]:
        """Count active tasks by executor."""
        return Counter(task.executor for task in self.tasks.values() if task.state == "active")
