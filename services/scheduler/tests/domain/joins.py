"""A job on its own, without a log and without executors, for tests of what its steps make of their results."""

from collections.abc import Mapping
from typing import Any

import msgspec
from hive_common.contracts import events, values
from hive_common.contracts.events import AgentRef, Child, Event, JobSubmitted, StepJoined
from hive_common.contracts.values import Value
from hive_scheduler.domain import job as jobs
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.inputs import Evaluator, check_static
from hive_scheduler.domain.job import BlobsNeeded, JobState
from hive_scheduler.domain.jobfile import parse_job
from hive_scheduler.domain.schemas import Schemas
from hive_scheduler.domain.task import TaskState

JOB = "00000000-0000-7000-8000-000000000001"
SECOND_US = 1_000_000
Answer = Any


class Fails(msgspec.Struct):
    """What a task does that does not succeed."""

    code: str = "agent_error"


class Play:
    """A job that is played through: tasks answer when they are asked to.

    Args:
        steps: as in a job document; those that name no agent have `a@1`.
        given: the input.
        timeouts_ms: of agents.

    Attributes:
        store: blobs that results may name.
        blobs: those that were fetched or stored so far.
    """

    def __init__(
        self,
        *steps: dict[str, Any],
        given: Any = None,
        deadline: str = "100s",
        output: Any = None,
        timeouts_ms: Mapping[str, int] | None = None,
    ) -> None:
        document = {
            "apiVersion": "hive/v1",
            "kind": "Job",
            "name": "joins",
            "limits": {"deadline": deadline},
            "tasks": [{"agent": "a@1", **step} for step in steps],
            "output": output,
        }
        self.document = msgspec.json.encode(document)
        self.spec = parse_job(self.document)
        known = timeouts_ms or {}
        self.submitted = JobSubmitted(
            name="joins",
            document=msgspec.Raw(self.document),
            input=values.inline(values.encode_json(given)),
            agents={
                name: AgentRef(name.partition("@")[0], "1", "sha256:0", "python", 1, known.get(name, 5_000), 1)
                for name in self.spec.agents
            },
            request_digest="",
            deadline_us=self.spec.deadline_ms * 1_000,
        )
        self.log: list[tuple[str, Event]] = []
        self.now_us = 0
        self.store: dict[str, bytes] = {}
        self.blobs: dict[str, bytes | None] = {}
        self.schemas = Schemas()
        self.job = self.begin()
        check_static(self.begin(), self.evaluator())
        self.advance()

    def begin(self) -> JobState:
        return JobState(JOB, "owner", self.submitted, self.spec)

    def evaluator(self) -> Evaluator:
        return Evaluator(self.schemas, self.blobs, set(self.blobs))

    def apply(self, stream: str, decided: list[Event]) -> None:
        for event in decided:
            # As the log gives it back.
            again = events.decode(type(event).__name__, 1, events.encode(event))
            jobs.evolve(self.job, stream, again)
            self.log.append((stream, again))

    def advance(self, most: int = 1_000_000) -> None:
        """Apply what is due, `most` decisions of it, and fetch and store what that needs."""
        while most:
            try:
                for decision in jobs.due(self.job, self.now_us, self.evaluator()):
                    self.apply(decision.stream, decision.events)
                    most -= 1
                    if not most:
                        return
                return
            except BlobsNeeded as needed:
                assert needed.load | set(needed.store)
                self.blobs |= {digest: self.store[digest] for digest in needed.load}
                self.blobs |= {values.digest_of(data): data for data in needed.store}

    def task(self, step: str, index: int = 0) -> TaskState:
        return self.job.steps[step].tasks[index]

    def integrator(self, step: str) -> TaskState:
        found = self.job.steps[step].integrator
        assert found is not None
        return found

    def run(self, task: TaskState, answer: Answer, executor: str = "x", forks: tuple[Child, ...] = ()) -> None:
        """Give a task an attempt that ends like this, and let the job decide."""
        self.attempt(task, answer, executor, forks)
        self.advance()

    def attempt(self, task: TaskState, answer: Answer, executor: str = "x", forks: tuple[Child, ...] = ()) -> None:
        assign = tasks.Assign(executor, "s", 6_000, self.now_us, device=executor, owner=executor)
        self.apply(task.id, tasks.decide(task, assign))
        number = len(task.attempts)
        if isinstance(answer, Fails):
            report: tasks.Report = tasks.Fail(number, executor, "s", answer.code, self.now_us)
        else:
            output = answer if isinstance(answer, Value) else values.inline(values.encode_json(answer))
            report = tasks.Succeed(number, executor, "s", output, forks=forks)
        self.apply(task.id, tasks.decide(task, report, self.job.closing(self.now_us) is not None))

    def wait_until(self, second: float) -> None:
        self.now_us = int(second * SECOND_US)
        self.advance()

    def joined(self, step: str) -> StepJoined:
        found = [event for _, event in self.log if isinstance(event, StepJoined) and event.step == step]
        assert len(found) == 1
        return found[0]

    def output(self) -> Any:
        end = self.job.end
        assert isinstance(end, events.JobSucceeded), end
        return msgspec.json.decode(end.output.raw or self.blobs[end.output.digest or ""] or b"")

    def failure(self) -> tuple[str, str]:
        end = self.job.end
        assert isinstance(end, events.JobFailed), end
        return end.code, end.message

    def given(self, task: TaskState) -> Any:
        assert task.input is not None
        return msgspec.json.decode(task.input.raw or self.blobs[task.input.digest or ""] or b"")

    def replay(self) -> JobState:
        job = self.begin()
        for stream, event in self.log:
            jobs.evolve(job, stream, event)
        return job

    def crash(self) -> None:
        """Go on with what the log says."""
        known = jobs.snapshot(self.job)
        self.job = self.replay()
        assert jobs.snapshot(self.job) == known


def fork(count: int = 3, **words: Any) -> dict[str, Any]:
    return {"id": "work", "fork": list(range(count)), "input": {"n": "${item}"}, **words}


def integrated(count: int = 3, **words: Any) -> dict[str, Any]:
    return fork(count, join={"integrator": {"agent": "sum@1", **words.pop("integrator", {})}}, **words)
