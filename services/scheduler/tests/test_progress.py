"""Hedges by progress: who is slow by what attempts say, whose word counts, and what a new leader makes of it."""

import asyncio
import heapq
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hive_common.contracts import events
from hive_common.contracts.events import Event, TaskExtended
from hive_common.contracts.jobdocument import Task
from hive_common.contracts.messages import AttemptReport
from hive_common.contracts.values import inline
from hive_common.judgement.hedging import EXTRA_FLOOR
from hive_common.kernel.clock import SystemClock
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.judging import judging_of
from hive_scheduler.domain.task import TaskState
from hive_scheduler.engine import Engine
from hive_scheduler.hedges import TOLD_AGAIN_US, Hedges

from .conftest import agent
from .test_judged import job

MS = 1_000
HEDGE = {"progress": 0.1, "within": "100ms"}


class Fake:
    """What hedges need of an engine: a clock, timers, and decisions that are applied at once."""

    def __init__(self, hedge_after: Any = HEDGE, replicas: int = 3) -> None:
        words = {"id": "one", "agent": "a@1.0.0", "speculate": {"replicas": replicas, "hedge_after": hedge_after}}
        step = SimpleNamespace(step=SimpleNamespace(judging=judging_of(msgspec.convert(words, Task), "tasks[0]")))
        self.job: Any = SimpleNamespace(steps={"one": step}, closing=lambda now_us: None)
        self.hedges = Hedges(self)  # type: ignore[arg-type]
        self.reasons: list[str] = []
        self._now_us = 0
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def now_us(self) -> int:
        return self._now_us

    def at(self, due_us: int, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (due_us, next(self._numbers), call))

    def apply(self, job: Any, stream: str, decided: list[Event]) -> None:
        for event in decided:
            assert isinstance(event, TaskExtended) and stream == self.task.id
            self.reasons.append(event.reason)
            tasks.evolve(self.task, event)

    def create(self) -> TaskState:
        created = events.TaskCreated("job", "one", "a@1.0.0", input=inline(b"{}"), replicas=1)
        self.task = tasks.created(f"task-{next(self._numbers)}", created)
        return self.task

    def assign(self, *, recovered: bool = False) -> int:
        number = len(self.task.attempts) + 1
        tasks.evolve(self.task, events.TaskAssigned(number, f"executor-{number}", "session", 6_000))
        self.hedges.assigned(self.job, self.task, number, recovered=recovered)
        return number

    def until(self, ms: int) -> None:
        """Let time pass until then, and whatever is planned happen."""
        while self._timers and self._timers[0][0] <= ms * MS:
            self._now_us, _, call = heapq.heappop(self._timers)
            call()
        self._now_us = ms * MS


@pytest.fixture
def fake() -> Fake:
    made = Fake()
    made.create()
    return made


def test_an_attempt_that_has_said_so_in_time_gets_none_beside_it(fake: Fake) -> None:
    first = fake.assign()
    fake.until(99)
    fake.hedges.marked(fake.task, first, 100)
    fake.until(60_000)
    assert fake.reasons == []


def test_one_that_has_not_gets_one_and_that_one_too_up_to_the_replicas(fake: Fake) -> None:
    first = fake.assign()
    fake.until(50)
    fake.hedges.marked(fake.task, first, 99)
    fake.until(99)
    assert fake.reasons == []
    fake.until(100)
    assert fake.reasons == ["hedge"]
    fake.assign()
    fake.until(200)
    assert fake.reasons == ["hedge"] * 2
    fake.assign()
    fake.until(60_000)
    assert fake.reasons == ["hedge"] * 2


def test_a_replica_that_says_so_in_time_is_the_last(fake: Fake) -> None:
    fake.assign()
    fake.until(100)
    second = fake.assign()
    fake.hedges.marked(fake.task, second, 100)
    fake.until(60_000)
    assert fake.reasons == ["hedge"]


def test_marks_may_come_in_any_order_and_count_only_of_what_runs(fake: Fake) -> None:
    first = fake.assign()
    fake.hedges.marked(fake.task, first, 500)
    fake.hedges.marked(fake.task, first, 50)
    fake.hedges.marked(fake.task, 7, 1_000)
    fake.until(100)
    assert fake.reasons == []
    lost = events.AttemptLost(first, "lease_expired")
    tasks.evolve(fake.task, lost)
    fake.hedges.ended(fake.job, fake.task, first)
    tasks.evolve(fake.task, TaskExtended(1, "lost"))
    fake.assign()
    fake.until(200)
    assert fake.reasons == ["hedge"], "what one said that is gone counts for none that came after it"


def test_a_new_leader_waits_until_it_was_told_and_its_hedges_have_their_budget() -> None:
    fake = Fake()
    for said in (True, False):
        fake.create()
        recovered = fake.assign(recovered=True)
        fake.until(fake.now_us() // MS + 500)
        assert fake.reasons == []
        if said:
            fake.hedges.marked(fake.task, recovered, 100)
        fake.until(fake.now_us() // MS + TOLD_AGAIN_US // MS)
        assert fake.reasons == [] if said else ["hedge"]
    for _ in range(3 * EXTRA_FLOOR):
        fake.create()
        fake.assign(recovered=True)
        fake.until(fake.now_us() // MS + TOLD_AGAIN_US // MS)
    made = 1 + 3 * EXTRA_FLOOR
    assert EXTRA_FLOOR <= len(fake.reasons) <= EXTRA_FLOOR + made // 10 + 1


def test_nothing_is_kept_of_what_has_ended(fake: Fake) -> None:
    first = fake.assign()
    fake.hedges.marked(fake.task, first, 500)
    tasks.evolve(fake.task, events.TaskCancelled("enough"))
    fake.hedges.task_ended(fake.task)
    fake.hedges.marked(fake.task, first, 600)
    assert not fake.hedges._done_permille and not fake.hedges._since_us


async def test_what_is_planned_does_not_wait_for_what_was_planned_for_later() -> None:
    engine = Engine("hive", SystemClock(), SimpleNamespace(stored=set()))  # type: ignore[arg-type]
    engine.listener = SimpleNamespace(pump=lambda: None)  # type: ignore[assignment]
    called: list[str] = []
    waiting = asyncio.create_task(engine.timer_is_due())
    for name, after_us in (("later", 3_600_000_000), ("soon", 20_000)):
        await asyncio.sleep(0)
        assert not waiting.done()
        engine.at(engine.now_us() + after_us, lambda name=name: called.append(name))  # type: ignore[misc]
    async with asyncio.timeout(60):
        await waiting
    engine.tick()
    assert called == ["soon"]


async def test_whose_word_counts_and_that_the_log_has_nothing_of_it(
    cluster: Any, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Hedges, "marked", lambda _, task, attempt, done_permille: counted.append((attempt, done_permille))
    )
    await cluster.publish(agent("guess"))
    gate = asyncio.Event()
    given: list[Any] = []

    async def waits(assignment: Any, value: Any) -> Any:
        given.append(assignment)
        await gate.wait()
        return 42

    one = await cluster.executor("one", {"guess": waits})
    other = await cluster.executor("other", {})
    words = {"replicas": 2, "distinct": "none", "hedge_after": {"progress": 0.1, "within": "1h"}}
    job_id = await control.submit(job(speculate=words))
    async with asyncio.timeout(60):
        while not given:
            await asyncio.sleep(0.01)
    runs = given[0]

    def mark(done_permille: int, session: str = "", **changes: Any) -> AttemptReport:
        made = AttemptReport(
            runs.task, runs.attempt, session or one.session, "started", done_permille=done_permille
        )
        return msgspec.structs.replace(made, **changes)

    async def verdicts(of: Any, *reports: AttemptReport) -> list[str]:
        return [result.verdict for result in (await of.report(*reports)).results]

    length = len(await cluster.log())
    assert await verdicts(other, mark(500, other.session), mark(500)) == ["rejected"] * 2
    assert (
        await verdicts(one, mark(500, "elsewhere"), mark(500, attempt=2), mark(500, task=job_id))
        == ["rejected"] * 3
    )
    assert await verdicts(one, mark(-1), mark(1_001), mark(1 << 80)) == ["rejected"] * 3
    assert counted == []
    assert await verdicts(one, mark(100), mark(100), mark(50)) == ["accepted"] * 3
    assert counted == [(runs.attempt, 100), (runs.attempt, 100), (runs.attempt, 50)]
    assert len(await cluster.log()) == length, "a mark is no event"
    gate.set()
    ended = await control.finish(job_id)
    assert ended.state == "succeeded"
    assert await verdicts(one, mark(900)) == ["accepted"], "it has succeeded, as was said: a mark changes nothing"
    assert len(counted) == 3
