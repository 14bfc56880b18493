"""The leader's state of all open jobs: decisions go through here, one at a time, on one event loop.

A decision moves the state at once and is staged for the log; what others may see of it (replies, assignments,
cancels) is an effect that the committer releases. After each command `settle` lets the jobs it touched decide
what is due, at most a chunk at a time, and then lets the dispatcher place what became ready.
"""

import asyncio
import heapq
import itertools
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol, TypeVar

from hive_common.contracts import events
from hive_common.contracts.events import Event
from hive_common.contracts.judgement import Distinct, Producer
from hive_common.contracts.limits import CHUNK_EVENTS_MAX, MIB
from hive_common.control.kill_log import KillLog
from hive_common.control.orders import in_words
from hive_common.eventlog.log import NewEvent
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import HiveError, Unavailable

from hive_scheduler.blobs import Blobs
from hive_scheduler.commits import Committer, Effect
from hive_scheduler.domain import approval as approvals
from hive_scheduler.domain import job as jobs
from hive_scheduler.domain import joining, needs
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.ahead import Usual
from hive_scheduler.domain.inputs import Evaluator
from hive_scheduler.domain.job import BlobsNeeded, JobState
from hive_scheduler.domain.placement import Need
from hive_scheduler.domain.queue import ReadyQueue
from hive_scheduler.domain.reputation import TELLING
from hive_scheduler.domain.schemas import Schemas
from hive_scheduler.domain.task import TaskState
from hive_scheduler.hedges import Hedges

log = logging.getLogger(__name__)
A = TypeVar("A")
R = TypeVar("R")

CHUNK_BYTES_MAX: Final = 4 * MIB
"""Payload bytes that one job decides between two commits."""
ENDED_JOBS_MAX: Final = 1_000
ENDED_TASKS_MAX: Final = 20_000
"""Jobs that have ended, and their tasks, which stay in memory for reports that come late; older ones are read
from the log. A task is about a kilobyte, and what the garbage collector walks through while everybody waits."""
FETCH_BACKOFF_S: Final = 0.5

JUMP_US_MIN: Final = 1_000_000
"""A wall clock that moves by less against the boot clock is being corrected, not set."""

ACTOR: Final = "scheduler"
TASK_ENDS: Final = (events.TaskSucceeded, events.TaskFailed, events.TaskCancelled)


Trust = Callable[[JobState, TaskState, Producer], int | None]
"""Says for how many valid results in a row one is taken without another (`job.Inputs.trust`)."""


def _trusts_nobody(job: JobState, task: TaskState, producer: Producer) -> int | None:
    return None


def _observes_nothing(task: TaskState, event: Event) -> None:
    pass


def _answers_nothing(job: JobState, task: TaskState, event: Event) -> list[NewEvent]:
    return []


class Listener(Protocol):
    """What the engine tells the dispatcher. Calls come while a decision is applied: they MUST NOT decide."""

    def attempt_started(self, executor: str, task: str, attempt: int) -> None:
        """The executor says that the attempt runs."""
        ...

    def attempt_ended(self, executor: str, session: str, task: str, attempt: int) -> None:
        """The attempt is not live any more because of what its executor said, or did not say."""
        ...

    def attempt_cancelled(self, executor: str, session: str, task: str, attempt: int) -> None:
        """The attempt is not live any more though its executor may be at it: it has to be told."""
        ...

    def may_place(self, need: Need, count: int, distinct: Distinct) -> bool:
        """Say whether there are so many distinct ones who could ever take a task that needs this."""
        ...

    def gone(self, need: Need, count: int, distinct: Distinct) -> int:
        """Return for how many of so many tasks that need this nobody is left, since devices were revoked."""
        ...

    def pump(self) -> None:
        """Place what is ready. This one may decide."""
        ...


class _Ports(Evaluator):
    """What a job asks for: values, and what is known of executors."""

    def __init__(self, engine: "Engine", loaded: Mapping[str, bytes | None]) -> None:
        super().__init__(engine.schemas, loaded, engine.blobs_stored)
        self._engine = engine

    def trust(self, job: JobState, task: TaskState, producer: Producer) -> int | None:
        """Ask the records of executors (job.Inputs)."""
        return self._engine.trust(job, task, producer)

    def may_extend(self, job: JobState, task: TaskState) -> bool:
        """Ask the fleet (job.Inputs)."""
        words = job.steps[task.step].step.judging
        assert words is not None
        # Those that are planned already and have no executor yet take the places of some.
        return self._engine.listener.may_place(
            self._engine.need_of(job, task), task.wanted + 1, words.rule.distinct
        )

    def gone(self, job: JobState, task: TaskState) -> int:
        """Ask the fleet (job.Inputs)."""
        if not task.wanted:
            return 0
        return self._engine.listener.gone(
            self._engine.need_of(job, task), task.wanted, needs.distinct_of(job, task)
        )


class Engine:
    """State and decisions of the leader.

    Args:
        ns: namespace of new events.
        clock: for the time that goes into commands.
        blobs: what large values are read from and written to.
    """

    def __init__(self, ns: str, clock: Clock, blobs: Blobs) -> None:
        self._ns = ns
        self._clock = clock
        self._blobs = blobs
        self.schemas = Schemas()
        self.jobs: dict[str, JobState] = {}
        self.ended: OrderedDict[str, JobState] = OrderedDict()
        self.task_jobs: dict[str, str] = {}
        self._ended_tasks = 0
        self.queue = ReadyQueue()
        self.hedges = Hedges(self)
        self.usual = Usual()
        self.trust: Trust = _trusts_nobody
        self.observe: Callable[[TaskState, Event], None] = _observes_nothing
        self.answered: Callable[[JobState, TaskState, Event], list[NewEvent]] = _answers_nothing
        """Says what goes into the log with an event of a canary's task (Canaries.answered)."""
        self.committer: Committer
        self.listener: Listener
        self._dirty: OrderedDict[str, None] = OrderedDict()
        self._settling = False
        self._loaded: dict[str, dict[str, bytes | None]] = {}
        self._stored: dict[str, list[str]] = {}
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._offset_us = clock.now_us() - clock.boot_ms() * 1_000
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._timer_numbers = itertools.count()
        self._timer_set = asyncio.Event()
        self._deadlines: list[tuple[int, str]] = []

    @property
    def blobs_stored(self) -> set[str]:
        """Digests of blobs that are known to be in the store."""
        return self._blobs.stored

    # --- time ---

    def now_us(self) -> int:
        """Return the time that decisions count by: the boot clock, set by the wall clock to within a second.

        Where somebody sets the wall clock, everything that is planned moves along with it: what was to happen in
        five minutes still happens in five minutes. A new leader has nothing but the wall clock to go by.
        """
        boot_us = self._clock.boot_ms() * 1_000
        jump_us = self._clock.now_us() - boot_us - self._offset_us
        if abs(jump_us) > JUMP_US_MIN:
            self._offset_us += jump_us
            self._move_plans(jump_us)
        return boot_us + self._offset_us

    def _move_plans(self, by_us: int) -> None:
        log.warning("the wall clock jumped by %+.3f s", by_us / 1_000_000)
        for job in self.jobs.values():
            job.deadline_us += by_us
            for task in job.tasks.values():
                if task.not_before_us:
                    task.not_before_us += by_us
                if task.judged is not None:
                    task.judged.waits = [due_us and due_us + by_us for due_us in task.judged.waits]
            for approval in job.approvals.values():
                approval.expires_us += by_us
                approval.until_us += by_us
        self._deadlines = [(due_us + by_us, job_id) for due_us, job_id in self._deadlines]
        self._timers = [(due_us + by_us, number, call) for due_us, number, call in self._timers]

    # --- jobs in and out ---

    def add(self, job: JobState) -> None:
        """Take a job that the log has, or is about to have."""
        self.jobs[job.id] = job
        for task_id in job.tasks:
            self.task_jobs[task_id] = job.id
        heapq.heappush(self._deadlines, (joining.next_due_us(job, 0), job.id))
        if len(self._deadlines) > 2 * len(self.jobs) + 1_000:
            # Most jobs end long before their deadline; without this their entries would pile up.
            self._deadlines = [(joining.next_due_us(one, 0), one.id) for one in self.jobs.values()]
            heapq.heapify(self._deadlines)

    def find_task(self, task_id: str) -> tuple[JobState, TaskState] | None:
        """Return a task of an open job, or of one that ended a short while ago."""
        job_id = self.task_jobs.get(task_id)
        if job_id is None:
            return None
        job = self.jobs.get(job_id) or self.ended[job_id]
        return job, job.tasks[task_id]

    def find_job(self, job_id: str) -> JobState | None:
        """Return an open job, or one that ended a short while ago."""
        return self.jobs.get(job_id) or self.ended.get(job_id)

    def need_of(self, job: JobState, task: TaskState) -> Need:
        """Return what a task asks of a device."""
        return needs.need_of(job, task)

    # --- decisions ---

    def submit(self, job: JobState, payload: bytes, caller: str, effect: Effect) -> None:
        """Take a new job; `payload` is that of `JobSubmitted`, whose position `effect` gets."""
        now_us = self._clock.now_us()
        new = self._new_event(job, job.id, 1, events.JobSubmitted.__name__, payload, caller, now_us)
        self.add(job)

        self.committer.stage((new,), (job.id, 0), effect)
        # What follows from it goes into the same append: the first task waits for one commit and not for two.
        self.poke(job.id)
        self.settle()

    def apply(
        self, job: JobState, stream: str, decided: list[Event], actor: str = ACTOR, effect: Effect | None = None
    ) -> int:
        """Move the state by the events of one decision, stage them, and return their payload bytes."""
        if not decided:
            if effect is not None:
                self.committer.after(effect)
            return 0
        guard = (job.id, job.version)
        new: list[NewEvent] = []
        byte_count = 0
        now_us = self._clock.now_us()
        for event in decided:
            task = job.tasks.get(stream)
            version = (job.version if stream == job.id else 0 if task is None else task.version) + 1
            # What is asked when a task ends is not known any more when it has ended.
            ends = isinstance(event, TASK_ENDS)
            live = task.live() if ends and task is not None else []
            was_ready = ends and task is not None and task.status == "ready"
            payload = events.encode(event)
            byte_count += len(payload)
            new.append(self._new_event(job, stream, version, type(event).__name__, payload, actor, now_us))
            task = jobs.evolve(job, stream, event)
            if task is not None and isinstance(event, TELLING):
                self.observe(task, event)
            if task is not None and job.canary:
                new += self.answered(job, task, event)
            self._react(job, task, event, live, was_ready)
            if ends and job.approvals:
                new += self._end_approvals(job, stream)
        self.committer.stage(new, guard, effect)
        return byte_count

    def apply_approval(
        self, job: JobState, approval: str, decided: list[Event], actor: str = ACTOR, effect: Effect | None = None
    ) -> None:
        """Move an approval by the events of one decision, and stage them."""
        if decided:
            self.committer.stage(
                self._approval_events(job, approval, decided, actor), (job.id, job.version), effect
            )
        elif effect is not None:
            self.committer.after(effect)

    def _approval_events(self, job: JobState, approval: str, decided: list[Event], actor: str) -> list[NewEvent]:
        new: list[NewEvent] = []
        now_us = self._clock.now_us()
        for event in decided:
            found = job.approvals.get(approval)
            version = 1 if found is None else found.version + 1
            payload = events.encode(event)
            new.append(self._new_event(job, approval, version, type(event).__name__, payload, actor, now_us))
            jobs.evolve(job, approval, event)
        return new

    def _end_approvals(self, job: JobState, task_id: str) -> list[NewEvent]:
        """End what still waits for a person when its task ends, in the same decision."""
        new: list[NewEvent] = []
        for approval in job.approvals.values():
            if approval.task == task_id:
                ended = approvals.expire(approval, approvals.TASK_ENDED)
                new += self._approval_events(job, approval.id, ended, ACTOR)
        return new

    def report(self, job: JobState, task: TaskState, report: tasks.Report) -> tasks.Verdict:
        """Decide what a report changes, and return what it counted for. The caller settles and waits."""
        closing = job.end is not None or job.closing(self.now_us()) is not None
        verdict = tasks.verdict(task, report, closing)
        self.apply(job, task.id, tasks.decide(task, report, closing))
        if isinstance(report, tasks.Mark) and verdict == "accepted":
            self.hedges.marked(task, report.attempt, report.done_permille)
        return verdict

    def lose(self, task_id: str, attempt: int, reason: str) -> None:
        """Give up an attempt that is live."""
        found = self.find_task(task_id)
        if found is not None:
            job, task = found
            self.apply(job, task_id, tasks.decide(task, tasks.Lose(attempt, reason, self.now_us())))

    def fail_if_stopped(self, job: JobState, task: TaskState, kills: KillLog) -> bool:
        """Fail a task whose agent a kill order stops, and with it its job; say whether it was so."""
        agent = job.agents[task.agent]
        entry = kills.verifier.stopped.agent(agent.name, agent.version)
        if entry is None or task.ended:
            return False
        reason = tasks.Reject(tasks.KILLED, f"{in_words(entry)} is stopped {kills.words(entry)}")
        self.apply(job, task.id, tasks.decide(task, reason))
        return True

    # --- progress ---

    def poke(self, job_id: str) -> None:
        """Let a job decide what is due at the next `settle`."""
        if job_id in self.jobs and job_id not in self._fetching:
            self._dirty[job_id] = None

    def look_again(self) -> None:
        """Let every judged task be decided anew: an executor that it may have waited for is out for good."""
        for job in self.jobs.values():
            if jobs.look_again(job):
                self.poke(job.id)

    def settle(self) -> None:
        """Decide everything that is due, then place what is ready."""
        if self._settling:
            return
        self._settling = True
        try:
            while self._dirty:
                job_id, _ = self._dirty.popitem(last=False)
                job = self.jobs.get(job_id)
                if job is not None:
                    self._advance(job)
            self.listener.pump()
        finally:
            self._settling = False

    def tick(self) -> None:
        """Run the timers and deadlines that are due."""
        now_us = self.now_us()
        while self._deadlines and self._deadlines[0][0] <= now_us:
            due_us, job_id = heapq.heappop(self._deadlines)
            self.poke(job_id)
            job = self.jobs.get(job_id)
            if job is not None and due_us < job.deadline_us:
                heapq.heappush(self._deadlines, (joining.next_due_us(job, due_us), job_id))
        while self._timers and self._timers[0][0] <= now_us:
            heapq.heappop(self._timers)[2]()
        self.settle()

    def at(self, due_us: int, call: Callable[[], None]) -> None:
        """Call something at a time, before what is due then is settled."""
        heapq.heappush(self._timers, (due_us, next(self._timer_numbers), call))
        if self._timers[0][0] == due_us:
            self._timer_set.set()

    async def timer_is_due(self) -> None:
        """Return when `tick` has something to call, whenever that is planned."""
        while True:
            self._timer_set.clear()
            wait_s = (self._timers[0][0] - self.now_us()) / 1_000_000 if self._timers else None
            if wait_s is not None and wait_s <= 0:
                return
            try:
                async with asyncio.timeout(wait_s):
                    await self._timer_set.wait()
            except TimeoutError:
                pass

    def _advance(self, job: JobState) -> None:
        loaded = self._loaded.get(job.id, {})
        evaluator = _Ports(self, loaded)
        decisions = jobs.due(job, self.now_us(), evaluator)
        event_count = byte_count = 0
        while event_count < CHUNK_EVENTS_MAX and byte_count < CHUNK_BYTES_MAX:
            try:
                decision = next(decisions, None)
            except BlobsNeeded as needed:
                self._fetch(job, needed)
                return
            except Exception:
                # A defect that one job brings out must not stop all the others, nor every leader after this one.
                log.exception("job %s cannot be decided", job.id)
                job.broken = events.JobFailed("internal", "the scheduler could not evaluate this job")
                self.committer.after(lambda _: self._resume(job.id))
                return
            if decision is None:
                self._forget_blobs(job)
                return
            event_count += len(decision.events)
            byte_count += self.apply(job, decision.stream, decision.events)
        self.committer.after(lambda _: self._resume(job.id))

    def _resume(self, job_id: str) -> None:
        self.poke(job_id)
        self.settle()

    def _fetch(self, job: JobState, needed: BlobsNeeded) -> None:
        async def fetch() -> None:
            loaded = self._loaded.setdefault(job.id, {})
            for digest in self._stored.pop(job.id, ()):
                # Its task exists by now; a fork would else hold all of its inputs here.
                loaded.pop(digest, None)
            try:
                for digest in needed.load:
                    loaded[digest] = await self._patiently(self._blobs.load, digest)
                for data in needed.store:
                    digest = await self._patiently(self._blobs.put, data)
                    loaded[digest] = data
                    self._stored.setdefault(job.id, []).append(digest)
            except HiveError as error:
                job.broken = events.JobFailed(error.code, error.message)

        def done(task: asyncio.Task[None]) -> None:
            self._fetching.pop(job.id, None)
            if not task.cancelled():
                task.result()
                self._resume(job.id)

        task = asyncio.create_task(fetch(), name=f"blobs-{job.id}")
        self._fetching[job.id] = task
        task.add_done_callback(done)

    def _forget_blobs(self, job: JobState) -> None:
        self._loaded.pop(job.id, None)
        self._stored.pop(job.id, None)

    async def _patiently(self, call: Callable[[A], Awaitable[R]], argument: A) -> R:
        while True:
            try:
                return await call(argument)
            except Unavailable as error:
                log.warning("artifact store: %s", error.message)
                await asyncio.sleep(FETCH_BACKOFF_S)

    async def close(self) -> None:
        """Stop fetching blobs."""
        for task in list(self._fetching.values()):
            task.cancel()
        await asyncio.gather(*self._fetching.values(), return_exceptions=True)

    # --- consequences in memory ---

    def _react(self, job: JobState, task: TaskState | None, event: Event, live: list[int], was_ready: bool) -> None:
        if task is None:
            self._react_job(job)
            return
        match event:
            case events.TaskCreated():
                self.task_jobs[task.id] = job.id
                if task.wanted:
                    self.enqueue(job, task)
            case events.TaskReady() | events.TaskRetryScheduled():
                self.enqueue(job, task)
            case events.AttemptStarted():
                self.listener.attempt_started(task.attempts[event.attempt].executor, task.id, event.attempt)
            case events.AttemptSucceeded() | events.AttemptFailed() | events.AttemptLost():
                attempt = task.attempts[event.attempt]
                self.listener.attempt_ended(attempt.executor, attempt.session, task.id, event.attempt)
            case events.TaskSucceeded() | events.TaskFailed() | events.TaskCancelled():
                for number in live:
                    attempt = task.attempts[number]
                    self.listener.attempt_cancelled(attempt.executor, attempt.session, task.id, number)
                if was_ready and job.closing(self.now_us()) is not None:
                    # All tasks of the job go with it. One that ends alone is passed over when its turn comes.
                    self.queue.drop_job(job.priority, job.id)
                state = job.steps[task.step]
                is_judged = task.judged is not None or task.judging is not None
                is_last = not state.open or joining.is_hopeless(state)
                if state.complete or job.failed is task or is_last or state.forking or is_judged:
                    self.poke(job.id)
        if task.judged is not None:
            self._react_judged(job, task, event)

    def _react_judged(self, job: JobState, task: TaskState, event: Event) -> None:
        """What else follows where several attempts are made and their results judged."""
        match event:
            case events.TaskExtended():
                self.enqueue(job, task)
            case events.TaskAssigned():
                # Where the next one may go depends on where this one went.
                self.enqueue(job, task)
                self.hedges.assigned(job, task, event.attempt)
            case events.AttemptSucceeded() | events.AttemptFailed() | events.AttemptLost():
                self.hedges.ended(job, task, event.attempt)
                self.enqueue(job, task)
                self.poke(job.id)
            case events.TaskSucceeded() | events.TaskFailed() | events.TaskCancelled():
                self.hedges.task_ended(task)

    def _react_job(self, job: JobState) -> None:
        if job.end is None:
            self.poke(job.id)
            return
        del self.jobs[job.id]
        self._forget_blobs(job)
        jobs.forget_values(job)
        self.ended[job.id] = job
        self._ended_tasks += len(job.tasks)
        while len(self.ended) > ENDED_JOBS_MAX or (self._ended_tasks > ENDED_TASKS_MAX and len(self.ended) > 1):
            _, dropped = self.ended.popitem(last=False)
            self._ended_tasks -= len(dropped.tasks)
            for task_id in dropped.tasks:
                self.task_jobs.pop(task_id, None)

    def enqueue(self, job: JobState, task: TaskState) -> None:
        """Put a ready task into the queue, now or when its pause is over."""
        if task.not_before_us > self.now_us():
            self.at(task.not_before_us, lambda: self._enqueue_if_ready(job, task))
        else:
            self._enqueue_if_ready(job, task)

    def is_due(self, job: JobState, task: TaskState, need: Need) -> bool:
        """Say whether a task that has several attempts is still to be placed now, and as its place in line says."""
        return task.not_before_us <= self.now_us() and self.need_of(job, task) == need

    def _enqueue_if_ready(self, job: JobState, task: TaskState) -> None:
        if task.wanted and job.end is None and job.closing(self.now_us()) is None:
            self.queue.push(job.priority, self.need_of(job, task), job.id, task.id)

    def _new_event(
        self, job: JobState, stream: str, version: int, type_name: str, payload: bytes, actor: str, now_us: int
    ) -> NewEvent:
        return NewEvent(
            stream=stream,
            version=version,
            type=type_name,
            schema=events.SCHEMA,
            payload=payload,
            ts_us=now_us,
            actor=actor,
            owner=job.owner,
            ns=self._ns,
            correlation=job.id,
        )
