"""What the log and the clients' own records say about the laws, with no code of the product.

Read with plain SQL and `json`; the scheduler's deciders, its views and its catalogue of events are not used, so
that a mistake in them cannot hide itself here.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import psycopg

TASK_ENDS = frozenset({"TaskSucceeded", "TaskFailed", "TaskCancelled"})
JOB_ENDS = frozenset({"JobSucceeded", "JobFailed", "JobCancelled"})
ATTEMPT_ENDS = frozenset({"AttemptSucceeded", "AttemptFailed", "AttemptLost"})
CLOCK_STEP_S = 7_200
"""Clocks of a storm are set by so much, or multiples of it, and a storm is over long before."""
READ = """
SELECT e.position, e.stream, e.version, e.type, e.event, p.payload
  FROM log.events e JOIN log.payloads p USING (position)
 WHERE e.position > %s ORDER BY e.position LIMIT 10000
"""


@dataclass(frozen=True)
class Event:
    position: int
    stream: str
    version: int
    type: str
    ts: float
    data: dict[str, Any]


@dataclass
class Job:
    """A job as the log has it. `nonce` is what the client put into the name, to find it again."""

    id: str
    nonce: str
    submitted: int = 0
    ends: list[Event] = field(default_factory=list)
    cancelled_at: int | None = None
    tasks: list["Task"] = field(default_factory=list)
    joins: list[Event] = field(default_factory=list)


@dataclass
class Attempt:
    """`over_at`: when its end, or that of its task, was decided."""

    executor: str
    session: str
    at: float
    over_at: float | None = None


@dataclass
class Task:
    """A task as the log has it.

    Attributes:
        made: what its creation says; of a judge, `judging` is in it.
        given: its input, once it has it.
        outputs: what attempts gave.
        events: of it, but for late reports.
    """

    id: str
    job: str
    made: dict[str, Any] = field(default_factory=dict)
    given: Any = None
    outputs: dict[int, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    created: int = 0
    ends: list[Event] = field(default_factory=list)
    successes: int = 0
    attempts: dict[int, "Attempt"] = field(default_factory=dict)
    late: Counter[int] = field(default_factory=Counter)

    @property
    def judging(self) -> dict[str, Any] | None:
        """What it judges; None of a task that a client asked for."""
        return self.made.get("judging")

    @property
    def replicas(self) -> int:
        """How many attempts were to be made at first; 0 where the first success decides."""
        return int(self.made.get("replicas", 0))


@dataclass
class History:
    """Everything that was read, and what was wrong with it.

    Attributes:
        stale: an attempt's event was accepted although the attempt was not live then.
        doubled: a second end, a second success, a version or an attempt's number used twice.
        broken: positions or versions with a gap.
        decided_at: when tasks succeeded.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    decided_at: list[float] = field(default_factory=list)
    events: int = 0


def read(connection: "psycopg.Connection[Any]", now: float | None = None) -> Iterable[Event]:
    """Yield the whole log in order; with `now`, times of clocks that were set become what they would have been."""
    position = 0
    while rows := connection.execute(READ, (position,)).fetchall():
        for position, stream, version, kind, envelope, payload in rows:
            ts = json.loads(envelope)["ts_us"] / 1e6
            if now is not None:
                ts -= CLOCK_STEP_S * round((ts - now) / CLOCK_STEP_S)
            yield Event(position, stream, version, kind, ts, json.loads(payload))


def replay(events: Iterable[Event]) -> History:
    """Walk through the log once and note what breaks a law."""
    history = History()
    versions: Counter[str] = Counter()
    for event in events:
        history.events += 1
        versions[event.stream] += 1
        if event.position != history.events:
            history.broken.append(f"position {event.position} follows {history.events - 1}")
        if event.version != versions[event.stream]:
            history.broken.append(f"{event.position}: version {event.version} of {event.stream} out of order")
        if event.type.startswith(("Job", "Step")):
            _job_event(history, event)
        elif event.type.startswith(("Task", "Attempt")):
            _task_event(history, event)
    return history


def _job_event(history: History, event: Event) -> None:
    job = history.jobs.setdefault(event.stream, Job(event.stream, event.data.get("name", "")))
    if job.ends:
        history.doubled.append(f"{event.position}: {event.type} after the end of job {job.id}")
    if event.type == "JobSubmitted":
        job.submitted += 1
    elif event.type == "JobCancelRequested":
        job.cancelled_at = event.position
    elif event.type == "StepJoined":
        job.joins.append(event)
    elif event.type in JOB_ENDS:
        job.ends.append(event)
        unended = sum(not task.ends for task in job.tasks)
        if unended:
            history.broken.append(f"{event.position}: job {job.id} ended before {unended} of its tasks")


def _task_event(history: History, event: Event) -> None:
    task = history.tasks.get(event.stream)
    if task is None:
        task = history.tasks[event.stream] = Task(event.stream, event.data.get("job", ""))
        job = history.jobs.get(task.job)
        if job is None:
            history.broken.append(f"{event.position}: {event.type} of no job")
        else:
            job.tasks.append(task)
    if event.type == "TaskCreated":
        task.created += 1
        task.made = event.data
    if (given := event.data.get("input")) is not None:
        task.given = given.get("inline")
    if event.type == "AttemptLate":
        _late(history, task, event)
        return
    if task.ends:
        kind = history.stale if event.type.startswith("Attempt") else history.doubled
        kind.append(f"{event.position}: {event.type} after the end of task {task.id}")
    task.events.append(event)
    if event.type == "TaskAssigned":
        number = event.data["attempt"]
        if number in task.attempts:
            history.doubled.append(f"{event.position}: attempt {number} of task {task.id} is used twice")
        task.attempts[number] = Attempt(event.data["executor"], event.data["session"], event.ts)
    elif event.type.startswith("Attempt"):
        _attempt_event(history, task, event)
    elif event.type in TASK_ENDS:
        task.ends.append(event)
        for attempt in task.attempts.values():
            attempt.over_at = attempt.over_at or event.ts
        if event.type == "TaskSucceeded":
            _decided(history, task, event)


def _late(history: History, task: Task, event: Event) -> None:
    number = event.data["attempt"]
    task.late[number] += 1
    if task.late[number] > 1:
        history.doubled.append(f"{event.position}: a second late event of attempt {number} of task {task.id}")


def _attempt_event(history: History, task: Task, event: Event) -> None:
    number = event.data["attempt"]
    attempt = task.attempts.get(number)
    job = history.jobs.get(task.job)
    cancelled = job is not None and job.cancelled_at is not None and event.type != "AttemptLost"
    if attempt is None or attempt.over_at is not None or cancelled:
        history.stale.append(f"{event.position}: {event.type} of attempt {number} of task {task.id}, not live")
    if attempt is not None and event.type in ATTEMPT_ENDS:
        attempt.over_at = event.ts
    if event.type == "AttemptSucceeded":
        task.successes += 1
        task.outputs[number] = event.data["output"].get("inline")
        if task.successes > 1 and not task.replicas:
            history.doubled.append(f"{event.position}: task {task.id} succeeded with a second attempt")
        if "forged" in json.dumps(event.data["output"]):
            history.stale.append(f"{event.position}: a forged output became that of attempt {number}")


def _decided(history: History, task: Task, event: Event) -> None:
    number = event.data["attempt"]
    if not task.successes or number not in task.attempts:
        history.stale.append(f"{event.position}: task {task.id} is decided by attempt {number} without its success")
    history.decided_at.append(event.ts)
