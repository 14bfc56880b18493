"""The laws of jobs and tasks (docs/ARCHITECTURE.md), kept under every order of commands that Hypothesis finds."""

import itertools
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hive_common.contracts import events, values
from hive_common.contracts.events import AgentRef, Child, Event, JobCancelRequested, JobSubmitted
from hive_common.kernel.errors import FailedPrecondition
from hive_scheduler.domain import job as jobs
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.inputs import Evaluator
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.jobfile import parse_job
from hive_scheduler.domain.schemas import Schemas
from hive_scheduler.domain.task import TaskState
from hypothesis import note, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

JOB = "00000000-0000-7000-8000-000000000001"
DEADLINE_US = 1_000_000_000
EXECUTORS = st.sampled_from(["x", "y"])
SESSIONS = st.sampled_from(["s1", "s2"])
CODES = st.sampled_from(["agent_error", "timeout", "trap", "runner_died", "lost", "invalid_module"])
KINDS = st.sampled_from(["start", "succeed", "fail", "fail", "give back"])
WHO = st.sampled_from(["its holder"] * 5 + ["another session", "another executor", "no such attempt"])
WHICH = st.integers(0, 20)
RESULTS = st.sampled_from([[], [1], [1, 2], {"no": "list"}])
"""What an attempt may give: the second step forks over these, so that some of them break it."""
FORKS = st.sampled_from([0, 0, 0, 1, 2])
TASKS_AIM = 30
"""Tasks that exist fork no more once there are so many."""


def document(max_attempts: int, codes: tuple[str, ...]) -> dict[str, Any]:
    retry = {"max_attempts": max_attempts, "backoff": "1s", "codes": list(codes)}
    agent = "a@1.0.0"
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "laws",
        "limits": {"deadline": "1000s", "fan_out": 20},
        "tasks": [
            {"id": "first", "agent": agent, "fork": "${input}", "input": {"item": "${item}"}, "retry": retry},
            {"id": "plan", "agent": agent, "needs": ["first"], "input": "${tasks.first.output}", "retry": retry},
            {"id": "second", "agent": agent, "needs": ["plan"], "fork": "${tasks.plan.output}", "retry": retry},
            {"id": "alone", "agent": agent, "retry": retry},
            {"id": "join", "agent": agent, "needs": ["second", "alone"], "input": "${tasks.second.output}"},
        ],
        "output": {
            "joined": "${tasks.join.output}",
            "first": "${tasks.first.output}",
            "forked": "${tasks.first.forked}",
        },
    }


def report_of(
    kind: str, number: int, executor: str, session: str, result: Any, code: str, now_us: int, forks: int
) -> tasks.Report:
    match kind:
        case "start":
            return tasks.Start(number, executor, session, now_us)
        case "succeed":
            output = values.inline(values.encode_json(result))
            children = tuple(Child("a@1.0.0", msgspec.Raw(b"%d" % index)) for index in range(forks))
            return tasks.Succeed(number, executor, session, output, forks=children)
        case "fail":
            return tasks.Fail(number, executor, session, code, now_us)
    return tasks.GiveBack(number, executor, session, now_us)


class Laws(RuleBasedStateMachine):
    """A job whose log is kept beside it; the state is thrown away and folded anew now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, Event]] = []
        self.now_us = 0
        self.cancelled_at: int | None = None
        # Tasks that had several live attempts at once: while one is live, what becomes of others decides nothing.
        self.several: set[str] = set()

    @initialize(
        size=st.integers(0, 3),
        max_attempts=st.integers(1, 3),
        codes=st.sampled_from([(), ("agent_error",)]),
    )
    def submit(self, size: int, max_attempts: int, codes: tuple[str, ...]) -> None:
        self.document = msgspec.json.encode(self.make_document(max_attempts, codes))
        self.submitted = JobSubmitted(
            name="laws",
            document=msgspec.Raw(self.document),
            input=values.inline(values.encode_json(list(range(size)))),
            agents={
                name: AgentRef(name.partition("@")[0], "1.0.0", f"sha256:{name}", "python", 1, 1_000, 1)
                for name in parse_job(self.document).agents
            },
            request_digest="",
            deadline_us=DEADLINE_US,
        )
        self.schemas = Schemas()
        self.spec = parse_job(self.document)
        self.log.append((JOB, self.submitted))
        self.job = JobState(JOB, "owner", self.submitted, self.spec)

    # --- what other machines do otherwise ---

    def make_document(self, max_attempts: int, codes: tuple[str, ...]) -> dict[str, Any]:
        return document(max_attempts, codes)

    def takes(self, task: TaskState) -> bool:
        """Whether a task is given another attempt: several live ones of one task are as good as one."""
        return True

    def place_of(self, task: TaskState, executor: str) -> str:
        """Return who is given the next attempt of a task."""
        return executor

    def result_of(self, task: TaskState, result: Any) -> Any:
        """Return what an attempt of a task gives."""
        return result

    # --- plumbing ---

    def apply(self, stream: str, decided: list[Event]) -> None:
        for event in decided:
            note(f"{stream[:8]} {event}")
            jobs.evolve(self.job, stream, event)
            self.log.append((stream, event))

    def evaluator(self) -> Evaluator:
        return Evaluator(self.schemas, {}, frozenset())

    def advance(self, most: int) -> bool:
        """Apply up to `most` decisions that are due; say whether some may be left."""
        decisions = jobs.due(self.job, self.now_us, self.evaluator())
        for count, decision in enumerate(decisions, 1):
            self.apply(decision.stream, decision.events)
            if count == most:
                return True
        return False

    def closing(self) -> bool:
        return self.job.end is not None or self.job.closing(self.now_us) is not None

    def among(self, *statuses: str) -> list[TaskState]:
        if not self.log:
            return []
        return [task for task in self.job.tasks.values() if not statuses or task.status in statuses]

    # --- what may happen ---

    @precondition(lambda self: self.job.end is None)
    @rule(most=st.sampled_from([1, 2, 50]))
    def let_the_job_decide(self, most: int) -> None:
        self.advance(most)

    @precondition(lambda self: self.among("ready", "active"))
    @rule(which=WHICH, executor=EXECUTORS, session=SESSIONS)
    def assign(self, which: int, executor: str, session: str) -> None:
        found = [task for task in self.among("ready", "active") if self.takes(task)]
        if not found:
            return
        task = found[which % len(found)]
        executor = self.place_of(task, executor)
        command = tasks.Assign(executor, session, 6_000, self.now_us, device=executor, owner="o")
        if task.not_before_us > self.now_us:
            with pytest.raises(FailedPrecondition):
                tasks.decide(task, command)
            return
        self.apply(task.id, tasks.decide(task, command))
        if len(task.live()) > 1:
            self.several.add(task.id)

    @precondition(lambda self: any(task.attempts for task in self.among()))
    @rule(which=WHICH, number=WHICH, kind=KINDS, result=RESULTS, code=CODES, who=WHO, forks=FORKS)
    def report(self, which: int, number: int, kind: str, result: Any, code: str, who: str, forks: int) -> None:
        found = [task for task in self.among() if task.attempts]
        task = found[which % len(found)]
        number = 1 + number % len(task.attempts)
        attempt = task.attempts[number]
        executor = "z" if who == "another executor" else attempt.executor
        session = "s9" if who == "another session" else attempt.session
        number += 1 if who == "no such attempt" else 0
        forks = forks if len(self.job.tasks) < TASKS_AIM and task.judging is None else 0
        given = self.result_of(task, result)
        command = report_of(kind, number, executor, session, given, code, self.now_us, forks)
        verdict = tasks.verdict(task, command, self.closing())
        decided = tasks.decide(task, command, self.closing())
        attempt = task.attempts.get(number)
        holds = attempt is not None and (attempt.executor, attempt.session) == (executor, session)
        if verdict == "accepted":
            assert holds and attempt is not None and attempt.status in tasks.LIVE and not self.closing()
        else:
            assert all(isinstance(event, events.AttemptLate) for event in decided)
            assert holds or not decided
        before = (task.status, task.decided, self.job.end)
        self.apply(task.id, decided)
        if verdict != "accepted":
            assert before == (task.status, task.decided, self.job.end)
        # The same report again, as after a lost reply, changes nothing more.
        assert tasks.decide(task, command, self.closing()) == []

    @precondition(lambda self: self.among("active"))
    @rule(which=WHICH, reason=st.sampled_from(["lease_expired", tasks.KILLED]))
    def lose(self, which: int, reason: str) -> None:
        found = self.among("active")
        task = found[which % len(found)]
        live = task.live()
        if not live:
            return
        self.apply(task.id, tasks.decide(task, tasks.Lose(live[which % len(live)], reason, self.now_us)))

    @precondition(lambda self: self.job.end is None and self.job.cancel_reason is None)
    @rule(really=st.integers(0, 9))
    def cancel(self, really: int) -> None:
        if really == 9:
            self.apply(JOB, [JobCancelRequested("enough")])
            self.cancelled_at = len(self.log)

    @rule(seconds=st.sampled_from([1, 2, 3, 5, 400]))
    def time_passes(self, seconds: int) -> None:
        self.now_us += seconds * 1_000_000

    @rule()
    def crash_and_recover(self) -> None:
        known = jobs.snapshot(self.job)
        self.job = self.folded()
        assert jobs.snapshot(self.job) == known

    def folded(self) -> JobState:
        job = JobState(JOB, "owner", self.submitted, self.spec)
        for stream, event in self.log[1:]:
            name = type(event).__name__
            jobs.evolve(job, stream, events.decode(name, 1, events.encode(event)))
        return job

    # --- the laws ---

    @invariant()
    def one_end_for_each_stream_and_only_late_reports_after_it(self) -> None:
        ended: set[str] = set()
        for stream, event in self.log:
            if stream in ended:
                assert isinstance(event, events.AttemptLate)
            if type(event).__name__ in events.TASK_TERMINAL | events.JOB_TERMINAL:
                assert stream not in ended
                ended.add(stream)

    @invariant()
    def attempt_numbers_are_never_reused_and_end_once(self) -> None:
        assigned = Counter((s, e.attempt) for s, e in self.log if isinstance(e, events.TaskAssigned))
        assert not assigned or max(assigned.values()) == 1
        outcomes = events.AttemptSucceeded | events.AttemptFailed | events.AttemptLost
        ended = Counter((s, e.attempt) for s, e in self.log if isinstance(e, outcomes))
        late = Counter((s, e.attempt) for s, e in self.log if isinstance(e, events.AttemptLate))
        for counts in (ended, late):
            assert not counts or max(counts.values()) == 1
            assert counts.keys() <= assigned.keys()
        numbers: dict[str, int] = {}
        for stream, number in assigned:
            assert number == numbers.get(stream, 0) + 1
            numbers[stream] = number

    @invariant()
    def the_job_ends_after_all_its_tasks(self) -> None:
        if not self.log or self.job.end is None:
            return
        assert all(task.ended for task in self.job.tasks.values())
        ours = [task for task in self.job.tasks.values() if task.judging is None]
        succeeded = isinstance(self.job.end, events.JobSucceeded)
        assert not succeeded or all(task.status == "succeeded" for task in ours)
        assert isinstance(self.job.end, events.JobCancelled) == (self.job.cancel_reason is not None)

    @invariant()
    def nothing_succeeds_after_a_cancel(self) -> None:
        if self.cancelled_at is not None:
            after = (event for _, event in self.log[self.cancelled_at :])
            assert not any(isinstance(event, events.AttemptSucceeded | events.TaskSucceeded) for event in after)

    @invariant()
    def counters_agree_with_the_tasks(self) -> None:
        for state in self.job.steps.values() if self.log else ():
            counted = Counter(task.status for task in (*state.tasks, *state.children))
            assert {name: count for name, count in state.counts.items() if count} == dict(counted)

    @invariant()
    def children_are_what_the_deciding_attempt_staged_each_made_once(self) -> None:
        staged: dict[tuple[str, int], int] = {}
        decided: dict[str, int] = {}
        made: Counter[str] = Counter()
        for stream, event in self.log:
            match event:
                case events.AttemptSucceeded():
                    staged[stream, event.attempt] = len(event.forks)
                case events.TaskSucceeded():
                    decided[stream] = staged[stream, event.attempt]
                case events.TaskCreated(parent=str(parent)):
                    assert event.index == made[parent] < decided[parent]
                    assert event.step == self.job.tasks[parent].step
                    made[parent] += 1
        if self.log and isinstance(self.job.end, events.JobSucceeded):
            assert made == Counter({parent: size for parent, size in decided.items() if size})
        for parent, size in decided.items():
            below = made[parent] + sum(made[one] for one in self.job.forks.descendants(parent))
            assert below <= self.job.forks.below.get(parent, 0)
            assert self.job.forks.below.get(parent, 0) >= size

    @invariant()
    def a_task_is_active_exactly_while_it_has_live_attempts(self) -> None:
        for task in self.among():
            if task.judged is None:
                assert bool(task.live()) == (task.status == "active")
            else:
                assert not task.ended or not task.live()

    @invariant()
    def losses_and_failures_are_bounded(self) -> None:
        for task in self.among():
            if task.status == "ready" and task.id not in self.several:
                assert task.losses <= tasks.LOST_ATTEMPTS_MAX
                assert task.failures < task.retry.max_attempts

    def teardown(self) -> None:
        """Whatever happened, the job comes to its end once executors do their work."""
        if not self.log:
            return
        for _ in range(200):
            while self.advance(7):
                pass
            if self.job.end is not None:
                break
            self.now_us += 1_000_000
            for task in list(self.job.tasks.values()):
                self.work_on(task)
        assert self.job.end is not None
        self.one_end_for_each_stream_and_only_late_reports_after_it()
        self.the_job_ends_after_all_its_tasks()
        if isinstance(self.job.end, events.JobSucceeded):
            self.check_output(self.job.end)

    def work_on(self, task: TaskState) -> None:
        if task.status == "ready" and task.not_before_us <= self.now_us:
            self.assign_to(task, "x")
        while task.judged is not None and task.wanted and task.not_before_us <= self.now_us:
            self.assign_to(task, f"x{len(task.attempts)}")
        for number in itertools.islice(task.live(), 1):
            attempt = task.attempts[number]
            output = values.inline(values.encode_json(self.result_of(task, [1, 2])))
            done = tasks.Succeed(number, attempt.executor, attempt.session, output)
            self.apply(task.id, tasks.decide(task, done, self.closing()))

    def assign_to(self, task: TaskState, executor: str) -> None:
        place = self.place_of(task, executor)
        command = tasks.Assign(place, "s", 6_000, self.now_us, device=place, owner="o")
        self.apply(task.id, tasks.decide(task, command))

    def check_output(self, end: events.JobSucceeded) -> None:
        assert end.output.raw is not None
        found = msgspec.json.decode(end.output.raw)
        outputs = [task.output for task in self.job.steps["first"].tasks]
        assert found["first"] == [msgspec.json.decode(output.raw) for output in outputs if output and output.raw]
        assert len(found["first"]) == len(outputs)
        below = [one for task in self.job.steps["first"].tasks for one in self.job.forks.descendants(task.id)]
        assert len(below) == len(set(below)) == len(self.job.steps["first"].children)
        forked = [self.job.tasks[one].output for one in below]
        assert [one["output"] for one in found["forked"]] == [
            msgspec.json.decode(output.raw) for output in forked if output and output.raw
        ]


Laws.TestCase.settings = settings(max_examples=400, stateful_step_count=60)
TestLaws = Laws.TestCase
