"""Adaptive replication: when a second attempt is made, and when one result is enough."""

from typing import Any

import msgspec
import pytest
from hive_common.contracts import values
from hive_common.contracts.events import (
    AgentRef,
    AttemptSucceeded,
    Event,
    JobSubmitted,
    TaskAssigned,
    TaskDecided,
    TaskExtended,
)
from hive_common.contracts.judgement import Producer
from hive_common.judgement.record import Same, recompute
from hive_scheduler.domain import job as jobs
from hive_scheduler.domain.inputs import Evaluator
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.jobfile import parse_job
from hive_scheduler.domain.schemas import Schemas
from hive_scheduler.domain.task import TaskState


class Ports(Evaluator):
    def __init__(self, trusted: int | None) -> None:
        super().__init__(Schemas(), {}, frozenset())
        self.trusted = trusted

    def trust(self, job: JobState, task: TaskState, producer: Producer) -> int | None:
        return self.trusted


class World:
    """One job of one task whose results are judged, and what was decided."""

    def __init__(self, trusted: int | None, **verify: Any) -> None:
        task = {"id": "guess", "agent": "guess@1.0.0", "speculate": {"distinct": "executor"}}
        document = msgspec.json.encode(
            {"apiVersion": "hive/v1", "kind": "Job", "name": "n", "tasks": [{**task, "verify": verify}]}
        )
        names = ("guess@1.0.0", "check@1.0.0")
        agents = {one: AgentRef(one[:5], "1.0.0", "sha256:0", "python", 1 << 20, 1_000, 0) for one in names}
        submitted = JobSubmitted("n", msgspec.Raw(document), values.inline(b"{}"), agents, "", 10**15)
        self.job = JobState("00000000-0000-7000-8000-000000000001", "owner", submitted, parse_job(document))
        self.ports = Ports(trusted)
        self.decided: list[Event] = []
        self.settle()
        (self.task,) = self.job.tasks.values()

    def settle(self) -> None:
        for decision in jobs.due(self.job, 1, self.ports):
            for event in decision.events:
                jobs.evolve(self.job, decision.stream, event)
                self.decided.append(event)

    def assign(self, executor: str, task: TaskState | None = None) -> int:
        task = task or self.task
        attempt = len(task.attempts) + 1
        event = TaskAssigned(attempt, executor, "s", 1_000, device=executor, owner="owner")
        jobs.evolve(self.job, task.id, event)
        self.settle()
        return attempt

    def give(self, attempt: int, output: Any, task: TaskState | None = None) -> None:
        event = AttemptSucceeded(attempt, values.inline(msgspec.json.encode(output)))
        stream = (task or self.task).id
        jobs.evolve(self.job, stream, event)
        if task is not None:
            jobs.evolve(self.job, stream, jobs.tasks.TaskSucceeded(attempt))
        self.settle()

    @property
    def extended(self) -> list[tuple[int, str]]:
        return [(one.attempts, one.reason) for one in self.decided if isinstance(one, TaskExtended)]

    @property
    def decision(self) -> TaskDecided:
        (found,) = [one for one in self.decided if isinstance(one, TaskDecided)]
        assert recompute(found.decision) == Same()
        return found


QUORUM = {"k": 2, "of": 3, "adaptive": True}


def test_one_result_of_who_is_trusted_is_enough() -> None:
    world = World(17, quorum=QUORUM)
    assert world.task.wanted == 1
    attempt = world.assign("one")
    assert world.extended == [], "nobody knows yet whose result it will be"
    world.give(attempt, {"n": 1})
    assert (world.task.status, world.extended) == ("succeeded", [])
    assert (world.decision.trust, world.decision.decision.rule.k) == (17, 1)


@pytest.mark.parametrize(("on_none", "more"), [("extend", 1), ("fail", 2)])
def test_a_result_that_is_checked_is_judged_by_the_quorum(on_none: str, more: int) -> None:
    world = World(None, quorum={**QUORUM, "on_none": on_none})
    world.give(world.assign("one"), {"n": 1})
    assert (world.extended, world.task.wanted) == ([(more, "check")], more)
    world.give(world.assign("two"), {"n": 1})
    assert (world.task.status, world.decision.trust, world.decision.decision.rule.k) == ("succeeded", 0, 2)
    assert world.extended == [(more, "check")]


def test_a_result_that_the_test_rejects_is_not_taken_on_trust() -> None:
    world = World(17, quorum={**QUORUM, "on_none": "fail"}, test={"agent": "check@1.0.0"})
    world.give(world.assign("one"), {"n": 1})
    assert (world.task.status, world.extended) == ("active", [])
    (judge,) = [task for task in world.job.tasks.values() if task.judging is not None]
    world.give(world.assign("two", judge), {"passed": False}, judge)
    assert (world.task.status, world.extended) == ("active", [(2, "check")])
