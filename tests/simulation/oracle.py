"""What must hold, found out from the log as it grows and from what executors see, with a model of its own.

It shares nothing with the scheduler's domain code but the events.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from hive_common.contracts import events
from hive_common.contracts.events import Event
from hive_common.contracts.limits import LOST_ATTEMPTS_MAX
from hive_common.contracts.messages import Assignment, AttemptReport
from hive_common.eventlog.log import Stored

from .jury import Jury
from .model import CLOCK_US, ENDED, LEASE_S, Attempt, Job, Task, breaks

if TYPE_CHECKING:
    from .database import Server
    from .executor import ExecutorNode, Key

NOT_COUNTED = ("lost", "runner_died")
HOPELESS = ("invalid_module", "invalid_input", "permission_denied", "killed")
BACKOFF_MAX_US = 300_000_000


class Violation(AssertionError):
    """Something that must hold does not."""


class Oracle:
    """Watches one world.

    Args:
        server: whose log is watched.
        trace: takes a line for each event.
    """

    def __init__(self, server: "Server", trace: Callable[[str, str], None]) -> None:
        self._server = server
        self._trace = trace
        self.jobs: dict[str, Job] = {}
        self.tasks: dict[str, Task] = {}
        self.problems: list[str] = []
        self.clocks_are_true = True
        self.counts: dict[str, int] = {}
        self._epoch = 0
        self._names: set[str] = set()
        self._owners: dict[str, str] = {}
        self._given: dict[Key, tuple[str, str, bytes]] = {}
        self._jury = Jury(self.found)
        self.heard_s: dict[str, float] = {}
        """When a pull of an executor last came to a scheduler."""
        self._running: dict[Key, list[ExecutorNode]] = {}
        server.log.on_append = self._appended

    def found(self, problem: str) -> None:
        """Take note of what does not hold."""
        self._trace("ORACLE", problem)
        self.problems.append(problem)

    # --- the log ---

    def _appended(self, batch: list[Stored]) -> None:
        session = self._server.writing
        if session is not None:
            if session is not self._server.holder or session.epoch < self._epoch:
                self.found(f"{session.process} of epoch {session.epoch} writes, and does not lead any more")
            self._epoch = max(self._epoch, session.epoch)
        for stored in batch:
            self.counts[stored.type] = self.counts.get(stored.type, 0) + 1
            assert stored.payload is not None
            event = events.decode(stored.type, stored.schema, stored.payload)
            self._trace("log", f"{stored.position} {stored.type} {stored.stream[-6:]} {_brief(event)}")
            self._apply(stored, event)

    def _apply(self, stored: Stored, event: Event) -> None:
        what = f"position {stored.position}, {stored.type} of {stored.stream[-6:]}"
        match event:
            case events.JobSubmitted():
                document = msgspec.json.decode(bytes(event.document))
                if event.name in self._names:
                    self.found(f"{what}: {event.name} was submitted once, and is there twice")
                self._names.add(event.name)
                self.jobs[stored.stream] = Job(document, event.deadline_us)
            case events.ExecutorRegistered():
                self._jury.devices[stored.stream] = event.capabilities.device
            case events.TaskCreated():
                self._created(stored, event, what)
            case _ if stored.stream in self.jobs:
                self._job(self.jobs[stored.stream], stored, event, what)
            case _ if stored.stream in self.tasks:
                self._task(self.tasks[stored.stream], stored, event, what)

    def _created(self, stored: Stored, event: events.TaskCreated, what: str) -> None:
        job = self.jobs[event.job]
        if stored.stream in self.tasks or job.end:
            self.found(f"{what}: twice, or after its job's end")
        step = job.steps[event.step]
        task = Task(job, step, event.retry, event.input is not None, event.replicas)
        if event.judging is not None:
            self._jury.created(task, event, self.tasks, what)
            step.judging.append(task)
        else:
            if event.replicas != step.planned():
                self.found(f"{what}: {event.replicas} replicas, and {step.planned()} were asked for")
            step.tasks.append(task)
            if event.input is not None:
                self._jury.reads(task, what)
        self.tasks[stored.stream] = task
        job.tasks.append(task)
        size = sum(1 for one in job.tasks if not one.kind)
        if size > job.fan_out:
            self.found(f"{what}: the job has {size} tasks, and {job.fan_out} are its limit")

    def _job(self, job: Job, stored: Stored, event: Event, what: str) -> None:
        if job.end:
            self.found(f"{what}: after {job.end}")
        if isinstance(event, events.JobCancelRequested):
            job.cancelled = True
            return
        if isinstance(event, events.StepJoined):
            self._jury.joined(job, event, what)
            return
        job.end, job.ended_s = stored.type, self._server.loop.time()
        if any(task.status not in ENDED for task in job.tasks):
            self.found(f"{what}: before the end of its tasks")
        match event:
            case events.JobSucceeded():
                if job.cancelled or not all(_may_be_in_success(task) for task in job.tasks):
                    self.found(f"{what}: cancelled, or with a task that did not succeed")
                unjoined = [one.id for one in job.steps.values() if one.is_joined and one.joined is None]
                if unjoined and not job.closed:
                    self.found(f"{what}: and {unjoined} were not joined")
            case events.JobCancelled() if not job.cancelled:
                self.found(f"{what}: nobody asked for it")
            case events.JobFailed():
                self._job_failed(job, stored, event, what)

    def _job_failed(self, job: Job, stored: Stored, event: events.JobFailed, what: str) -> None:
        if job.cancelled:
            self.found(f"{what}: it was cancelled, and ends as {event.code}")
        if event.code == "internal":
            self.found(f"{what}: {event.message}")
        if event.code == "deadline_exceeded":
            if job.generous:
                self.found(f"{what}: three hours were not enough")
            elif self.clocks_are_true and stored.ts_us + CLOCK_US < job.deadline_us:
                self.found(f"{what}: before the deadline")
        if event.task is not None and not breaks(self.tasks[event.task]):
            self.found(f"{what}: its task {event.task[-6:]} did not fail, or may")

    def _task(self, task: Task, stored: Stored, event: Event, what: str) -> None:
        if isinstance(event, events.AttemptLate):
            attempt = task.attempts[event.attempt]
            attempt.late += 1
            # A job that is closing takes nothing more, though its tasks have not ended yet.
            if attempt.late > 1 or (attempt.status == "live" and not self._closes(task.job, stored.ts_us)):
                self.found(f"{what}: late {attempt.late} times, {attempt.status}")
            return
        if task.status in ENDED:
            self.found(f"{what}: after it had {task.status}")
        if task.owed and not isinstance(event, events.TaskExtended):
            self.found(f"{what}: an attempt for `{task.owed}` is owed")
        match event:
            case events.TaskReady():
                task.status = "ready"
                self._jury.reads(task, what)
            case events.TaskAssigned():
                self._assigned(task, stored, event, what)
            case events.AttemptSucceeded() | events.AttemptFailed() | events.AttemptLost():
                self._ended(task, stored.stream, event, what)
            case events.TaskRetryScheduled():
                self._retry(task, stored, event, what)
            case events.TaskExtended():
                if event.reason == "retry":
                    self._paused(task, stored, event.not_before_us, what)
                self._jury.extended(task, stored, event, self._epoch, what)
            case events.TaskDecided():
                self._jury.decided(task, stored, event, what)
            case events.TaskSucceeded():
                if task.attempts[event.attempt].status != "succeeded":
                    self.found(f"{what}: attempt {event.attempt} has {task.attempts[event.attempt].status}")
                task.status, task.winner = "succeeded", event.attempt
            case events.TaskFailed():
                self._failed(task, event, what)
            case events.TaskCancelled():
                self._cancelled(task, event, what)
        if task.status in ENDED:
            if task.judged:
                self._jury.ends(task, event, what)
            task.ended_s = self._server.loop.time()
            for number in task.live():
                task.attempts[number].status = "cancelled"
        task.last = stored.type

    def _closes(self, job: Job, now_us: int) -> bool:
        # Deadlines move with a clock that is set.
        return job.closes(now_us) or not (self.clocks_are_true or job.generous)

    def _assigned(self, task: Task, stored: Stored, event: events.TaskAssigned, what: str) -> None:
        if task.judged:
            fits = task.status in ("ready", "active")
            task.not_before_us = task.pauses.pop(0) if task.pauses else 0
        else:
            fits = task.status == "ready" and not task.live()
        if event.attempt != len(task.attempts) + 1 or not fits:
            self.found(f"{what}: attempt {event.attempt} of a task that is {task.status}")
        if self.clocks_are_true and stored.ts_us + CLOCK_US < task.not_before_us:
            self.found(f"{what}: {(task.not_before_us - stored.ts_us) / 1e6:.1f} s before its pause is over")
        if task.judged or task.kind:
            self._jury.assigned(task, event, what)
        task.attempts[event.attempt] = Attempt(event.executor, event.session, event.device)
        task.status = "active"

    def _ended(
        self,
        task: Task,
        stream: str,
        event: events.AttemptSucceeded | events.AttemptFailed | events.AttemptLost,
        what: str,
    ) -> None:
        attempt = task.attempts[event.attempt]
        if attempt.status != "live":
            self.found(f"{what}: attempt {event.attempt} has {attempt.status} already")
        if isinstance(event, events.AttemptLost):
            attempt.status, attempt.code = "lost", "lost"
            silent_s = self._server.loop.time() - self.heard_s.get(attempt.executor, 0.0)
            if event.reason == "overtime" and silent_s > 3 * LEASE_S:
                self.found(f"{what}: overtime, and its executor was silent for {silent_s:.1f} s")
        elif isinstance(event, events.AttemptFailed):
            attempt.status, attempt.code = "failed", event.code
        else:
            attempt.status, attempt.output = "succeeded", event.output.raw or b""
            given = self._given.get((stream, event.attempt))
            if given != (attempt.executor, attempt.session, attempt.output):
                self.found(f"{what}: {attempt.session} has it, and gave {given}")
        if task.job.cancelled and not isinstance(event, events.AttemptLost):
            self.found(f"{what}: accepted after the job was cancelled")
        if attempt.status != "succeeded":
            if attempt.code in NOT_COUNTED:
                task.losses += 1
            else:
                task.failures += 1
            if task.judged:
                task.owed = self._jury.owes(task, attempt.code)

    def _retry(self, task: Task, stored: Stored, event: events.TaskRetryScheduled, what: str) -> None:
        if task.judged:
            self.found(f"{what}: of a task whose results are judged")
        if task.attempts[len(task.attempts)].code not in NOT_COUNTED:
            self._paused(task, stored, event.not_before_us, what)
        elif task.losses > LOST_ATTEMPTS_MAX:
            self.found(f"{what}: after {task.losses} losses")
        task.status, task.not_before_us = "ready", event.not_before_us

    def _paused(self, task: Task, stored: Stored, not_before_us: int, what: str) -> None:
        if task.failures >= task.retry.max_attempts:
            self.found(f"{what}: after {task.failures} failures of {task.retry.max_attempts} that it may have")
        pause_us = min(task.retry.backoff_ms * 1_000 << max(task.failures - 1, 0), BACKOFF_MAX_US)
        if self.clocks_are_true and not_before_us + CLOCK_US < stored.ts_us + pause_us:
            self.found(f"{what}: pauses {(not_before_us - stored.ts_us) / 1e6:.1f} s of {pause_us / 1e6}")

    def _cancelled(self, task: Task, event: events.TaskCancelled, what: str) -> None:
        if event.reason == "decided" and (task.of is None or task.of.status not in ENDED):
            self.found(f"{what}: as decided, and it is no judge of a task that has ended")
        if event.reason == "partial" and not any(step.closes_early for step in task.job.steps.values()):
            self.found(f"{what}: no step is closed early")
        task.status = "cancelled"

    def _failed(self, task: Task, event: events.TaskFailed, what: str) -> None:
        task.status = "failed"
        if event.code in HOPELESS or task.judged:
            return
        retry = task.retry
        last = task.attempts[len(task.attempts)]
        if last.code != event.code:
            self.found(f"{what}: with {event.code}, and its attempt with {last.code}")
        if event.code in NOT_COUNTED:
            if task.losses <= LOST_ATTEMPTS_MAX:
                self.found(f"{what}: after {task.losses} losses, and {LOST_ATTEMPTS_MAX} are retried")
        elif task.failures < retry.max_attempts and (not retry.codes or event.code in retry.codes):
            self.found(f"{what}: after {task.failures} failures of {retry.max_attempts} that it may have")

    # --- what is said to others: only what is committed ---

    def submitted(self, answer: tuple[str, int, bool]) -> None:
        """A client is about to be told that its job was taken."""
        job, position, _ = answer
        if not 0 < position <= self._server.log.head or self._server.log.events[position - 1].stream != job:
            self.found(f"job {job[-6:]} was acknowledged, and is not in the log at {position}")

    def cancelled(self, job: str) -> None:
        """A client is about to be told that the end of its job was asked for."""
        state = self.jobs[job]
        if not state.cancelled and not state.end:
            self.found(f"job {job[-6:]}: its cancel was acknowledged, and is not in the log")

    def given(self, node: "ExecutorNode", assignment: Assignment) -> None:
        """An executor was given an attempt."""
        task = self.tasks.get(assignment.task)
        attempt = None if task is None else task.attempts.get(assignment.attempt)
        what = f"{node.name} was given attempt {assignment.attempt} of {assignment.task[-6:]}"
        if attempt is None:
            self.found(f"{what}, which is not in the log")
        elif (attempt.executor, attempt.session) != (node.id, node.session):
            self.found(f"{what}, which is that of {attempt.session}")

    def gave(self, node: "ExecutorNode", key: "Key", output: bytes) -> None:
        """An executor's guest gave a result."""
        self._given[key] = (node.id, node.session, output)

    def check_slots(self, node: "ExecutorNode") -> None:
        """See that an executor was not given more than it has room for.

        What it holds and has lost by the log does not count: an answer may come after its lease has run out.
        """
        live = sum(1 for task, number in node.held if self.tasks[task].attempts[number].status == "live")
        if live > node.slots:
            self.found(f"{node.name} has {node.slots} slots, and {live} attempts to run")

    def runs(self, node: "ExecutorNode", key: "Key") -> None:
        """An executor begins an attempt."""
        owner = self._owners.setdefault(f"{key[0]}-{key[1]}", node.session)
        if owner != node.session:
            self.found(f"attempt {key[1]} of {key[0][-6:]} runs at {node.session}, and ran at {owner}")

    def answered(self, node: "ExecutorNode", report: AttemptReport, verdict: str) -> None:
        """An executor was told what its report counts for."""
        task = self.tasks.get(report.task)
        attempt = None if task is None else task.attempts.get(report.attempt)
        what = f"{node.name} was told `{verdict}` of attempt {report.attempt} of {report.task[-6:]}"
        if attempt is None:
            self.found(f"{what}, which is not in the log")
        elif report.status in ("succeeded", "failed"):
            if verdict == "accepted" and attempt.status not in ("succeeded", "failed"):
                self.found(f"{what} ({report.status}), and the log has it as {attempt.status}")
            if verdict == "late" and not attempt.late:
                self.found(f"{what}, and the log does not say so")
            if verdict == "rejected" and (attempt.executor, attempt.session) == (node.id, report.session):
                self.found(f"{what}, which was its own")

    # --- guests of what has ended ---

    def check_guests(self, nodes: "list[ExecutorNode]") -> None:
        """See that nobody still works at what was decided, or is of a job that ended, longer than a lease ago."""
        now_s = self._server.loop.time()
        for node in nodes:
            for run in node.held.values():
                since_s = self.tasks[run.key[0]].needless_s()
                if run.at_work and since_s and now_s > since_s + LEASE_S + 1.0 and node.has_lease:
                    self.found(
                        f"{node.name} works at {run.key[0][-6:]}, which was over {now_s - since_s:.1f} s ago"
                    )


def _may_be_in_success(task: Task) -> bool:
    """Whether a job may succeed with a task that ended like this."""
    if task.of is not None or task.status == "succeeded":
        return True
    return (task.status == "failed" and not breaks(task)) or (task.status == "cancelled" and task.job.closed)


def _brief(event: Event) -> str:
    shown = [
        str(value)[-24:]
        for name in ("attempt", "session", "reason", "code", "status", "step", "device")
        if (value := getattr(event, name, None)) is not None
    ]
    return " ".join(shown)
