"""Tasks whose results are judged, read back: views, decisions and watched events, from what the log says."""

from itertools import count
from typing import Any, TypeVar

import msgspec
import psycopg
import pytest
from hive_common.contracts import events, judgement
from hive_common.contracts.events import (
    AttemptFailed,
    AttemptSucceeded,
    Event,
    JobSubmitted,
    JobSucceeded,
    Judging,
    StepJoined,
    TaskAssigned,
    TaskCancelled,
    TaskCreated,
    TaskDecided,
    TaskExtended,
    TaskFailed,
    TaskSucceeded,
)
from hive_common.contracts.judgement import Candidate, Judge, Producer, Rule
from hive_common.contracts.values import Value, by_digest, digest_of, inline
from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent
from hive_common.judgement.equality import key_of
from hive_common.judgement.quorum import Decided, Kept
from hive_common.judgement.record import decision_of
from hive_common.kernel.errors import FailedPrecondition, NotFound
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database
from hive_proto.jobs.v1 import jobs_pb2
from hive_scheduler import pages
from hive_scheduler.database import prepare_database
from hive_scheduler.views import JobsProjection, Judged, judged_of
from psycopg.rows import dict_row

from .test_views import stands_still, views_of

E = TypeVar("E", bound=Event)
EXECUTORS = [new_id() for _ in range(3)]
QUORUM = Rule(k=2, of=3, distinct="executor", on_none="fail")
RAW = {1: b'{"sum": 7}', 2: b'{"sum": 8}', 3: b'{"sum":8.0}'}


class Story:
    """Events of one job, in the order in which they are told."""

    def __init__(self) -> None:
        self.job = new_id()
        self.events: list[NewEvent] = []
        self.first = 0
        self._versions: dict[str, int] = {}
        self._time = count(1_000_000, 1_000)
        submitted = JobSubmitted("judged", msgspec.Raw(b"{}"), inline(b"{}"), {}, "digest", 2**60, caller="me")
        self.tell(self.job, submitted)

    def tell(self, stream: str, *told: Event) -> None:
        for event in told:
            version = self._versions[stream] = self._versions.get(stream, 0) + 1
            name, payload = type(event).__name__, events.encode(event)
            self.events.append(
                NewEvent(
                    stream, version, name, 1, payload, next(self._time), "scheduler", "o", correlation=self.job
                )
            )

    def task(self, step: str, **fields: Any) -> str:
        task = new_id()
        agent = fields.pop("agent", "solver@1.0.0")
        self.tell(task, TaskCreated(self.job, step, agent, input=inline(b"{}"), **fields))
        return task

    def assign(self, task: str, attempt: int) -> None:
        executor = EXECUTORS[(attempt - 1) % 3]
        self.tell(task, TaskAssigned(attempt, executor, "s", 1, device=f"device {attempt}", owner="o"))

    def quorum(self, index: int | None = None, step: str = "solve") -> str:
        """A task of three attempts of which the second decides, with the third's vote."""
        task = self.task(step, index=index, replicas=3)
        for attempt in (1, 2, 3):
            self.assign(task, attempt)
        for attempt in (1, 3, 2):
            self.tell(task, AttemptSucceeded(attempt, inline(RAW[attempt])))
        decision = decision_of(task, QUORUM, Decided(2, (2, 3)), candidates=map(candidate, (1, 2, 3)))
        self.tell(task, TaskDecided(decision), TaskSucceeded(2))
        return task

    def kept(self, outputs: dict[int, Value], votes: tuple[int, ...]) -> str:
        """A task that keeps those of its results that are valid."""
        task = self.task("keep", replicas=len(outputs))
        for attempt in outputs:
            self.assign(task, attempt)
        for attempt, output in reversed(outputs.items()):
            self.tell(task, AttemptSucceeded(attempt, output))
        rule = Rule(of=len(outputs), keep="all", distinct="none", on_none="fail")
        made = [Candidate(attempt, EXECUTORS[0], digest=f"{attempt}") for attempt in votes]
        decision = decision_of(task, rule, Kept(votes), candidates=made)
        self.tell(task, TaskDecided(decision), TaskSucceeded(votes[0]))
        return task

    def of(self, stream: str) -> list[NewEvent]:
        return [one for one in self.events if one.stream == stream]

    def told(self, stream: str, kind: type[E]) -> list[tuple[NewEvent, E]]:
        decoded = [(one, events.decode(one.type, 1, one.payload)) for one in self.of(stream)]
        return [(one, event) for one, event in decoded if isinstance(event, kind)]

    def position(self, one: NewEvent) -> int:
        return self.first + self.events.index(one)

    def end(self) -> "Story":
        self.tell(self.job, JobSucceeded(inline(b"1")))
        return self


def candidate(attempt: int, **fields: Any) -> Candidate:
    raw, place = RAW[attempt], EXECUTORS[attempt - 1]
    key = key_of(judgement.CanonicalJson(), raw)
    return Candidate(attempt, place, f"device {attempt}", "o", digest=digest_of(raw), key=key, **fields)


async def read(cluster: Any, story: Story) -> Any:
    """Return a scheduler that finds the story in its log, and its views as far."""
    await projected(cluster.database, story, 100)
    control = cluster.control()
    await control.start()
    return control


async def tasks_of(control: Any, job: str, **fields: Any) -> dict[str, jobs_pb2.Task]:
    answer = await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=job, **fields))
    return {task.task_id: task for task in answer.tasks}


async def decision_in(control: Any, task: str) -> dict[str, Any]:
    answer = await control.rpc("GetDecision", jobs_pb2.GetDecisionRequest(task_id=task))
    told: dict[str, Any] = msgspec.json.decode(answer.decision_json)
    return told


async def test_the_output_is_that_of_the_attempt_that_decided_and_not_of_the_first_success(cluster: Any) -> None:
    story = Story()
    judged = [story.quorum(index) for index in range(2)]
    plain = story.task("plain")
    story.assign(plain, 1)
    story.tell(plain, AttemptSucceeded(1, inline(b'"first"')), TaskSucceeded(1))
    control = await read(cluster, story.end())
    found = await tasks_of(control, story.job)
    assert [found[task].output_json for task in judged] == [RAW[2]] * 2
    assert [(found[task].replicas, found[task].decided) for task in judged] == [(3, True)] * 2
    assert found[plain].output_json == b'"first"'
    assert (found[plain].replicas, found[plain].decided, found[plain].judging) == (0, False, "")
    assert {found[task].executor for task in judged} == {EXECUTORS[1]}, "the winner's, not the latest one's"


async def test_judges_are_listed_with_what_they_judge_and_count_in_no_step(cluster: Any) -> None:
    story = Story()
    judged = story.quorum()
    critic = story.task("solve", agent="critic@1.0.0", judging=Judging("critic", judged, (2,)))
    story.assign(critic, 1)
    story.tell(critic, AttemptSucceeded(1, inline(b'{"score": 1}')), TaskSucceeded(1))
    unneeded = story.task("solve", agent="critic@1.0.0", judging=Judging("critic", judged, (1,)))
    story.tell(unneeded, TaskCancelled("decided"))
    integrator = story.task("solve", agent="editor@1.0.0", judging=Judging("integrator"))
    story.assign(integrator, 1)
    story.tell(integrator, AttemptSucceeded(1, inline(b'"all"')), TaskSucceeded(1))
    story.tell(story.job, StepJoined("solve", "integrator", order=(0,), task=integrator))
    control = await read(cluster, story.end())
    found = await tasks_of(control, story.job)
    assert [(found[task].judging, found[task].judged, [*found[task].judged_attempts]) for task in found] == [
        ("", "", []),
        ("critic", judged, [2]),
        ("critic", judged, [1]),
        ("integrator", "", []),
    ]
    assert (found[critic].output_json, found[integrator].output_json) == (b'{"score": 1}', b'"all"')
    job = await control.get(story.job)
    assert (job.state, job.tasks.total, job.tasks.succeeded, job.attempts) == ("succeeded", 1, 1, 5)
    assert [(step.step, step.agent, step.tasks.total) for step in job.steps] == [("solve", "solver@1.0.0", 1)]


async def test_a_join_changes_no_state_and_an_extended_task_stays_active(database: Database) -> None:
    story = Story()
    task = story.task("solve", replicas=1)
    story.assign(task, 1)
    story.tell(task, AttemptFailed(1, "trap", "it broke"), TaskExtended(1, "retry", not_before_us=2**50))
    story.tell(story.job, StepJoined("solve", "all", missing=(0,), partial=True))
    found = await projected(database, story, 100)
    assert [(row["state"], row["attempts"]) for row in found["tasks"]] == [("active", 1)]
    assert [row["state"] for row in found["jobs"]] == ["running"]
    assert [(row["active"], row["ready"]) for row in found["steps"]] == [(1, 0)]


@pytest.mark.parametrize("batch", [1, 3, 1000])
async def test_rows_are_the_same_however_the_log_is_cut_into_batches(database: Database, batch: int) -> None:
    story = Story()
    judged = story.quorum()
    story.kept({1: inline(b"1"), 2: inline(b"2"), 3: inline(b"3")}, votes=(1, 3))
    judge = story.task("solve", judging=Judging("critic", judged, (1,)))
    story.tell(judge, TaskCancelled("decided"))
    found = await projected(database, story, batch)
    rows = {row["task_id"]: judged_of(row["judged"]) for row in found["tasks"]}
    positions = {one.type: story.position(one) for one in story.of(judged)}
    successes = {event.attempt: story.position(one) for one, event in story.told(judged, AttemptSucceeded)}
    assert rows[judged] == Judged(replicas=3, successes=successes, decision=positions["TaskDecided"])
    assert [row["output_position"] for row in found["tasks"] if row["task_id"] == judged] == [successes[2]]
    assert rows[judge] == Judged(judging=Judging("critic", judged, (1,)))
    assert [(row["step"], row["succeeded"], row["cancelled"]) for row in found["steps"]] == [
        ("solve", 1, 0),
        ("keep", 1, 0),
    ]


async def projected(database: Database, story: Story, batch: int) -> dict[str, list[dict[str, Any]]]:
    """Return the views after the story, read by a projection that begins anew with each batch."""
    dsn = database.role_dsn("scheduler")
    await prepare_database(dsn)
    async with await LogWriter.open(dsn) as writer:
        last = await writer.append(Append(tuple(story.events)))
    story.first = last - len(story.events) + 1
    async with LogReader(dsn) as reader:
        stored = await reader.read(0)
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        await conn.execute("INSERT INTO scheduler.projections VALUES ('jobs', %s, 0)", [last])
        for start in range(0, len(stored), batch):
            await JobsProjection().apply(conn, stored[start : start + batch])
        cursor = conn.cursor(row_factory=dict_row)
        orders = {"jobs": "submitted_position", "tasks": "created_position", "steps": "first_position"}
        return {
            name: await (await cursor.execute(f"SELECT * FROM scheduler.{name} ORDER BY {order}")).fetchall()
            for name, order in orders.items()
        }


async def test_a_task_that_keeps_all_has_the_list_of_what_is_kept_in_order_of_attempts(cluster: Any) -> None:
    story = Story()
    whole = story.kept({1: inline(b'"a"'), 2: inline(b'"b"'), 3: inline(b'"c"')}, votes=(1, 3))
    blob = by_digest(b'"large"')
    parted = story.kept({1: inline(b"1"), 2: blob}, votes=(1, 2))
    control = await read(cluster, story.end())
    found = await tasks_of(control, story.job)
    assert (found[whole].output_json, [*found[whole].kept]) == (b'["a","c"]', [])
    assert (found[parted].output_json, found[parted].output_digest) == (b"", "")
    kept = [(one.attempt, one.output_json, one.output_digest) for one in found[parted].kept]
    assert kept == [(1, b"1", ""), (2, b"", blob.digest)]


async def test_a_page_that_ends_early_says_so_and_the_next_one_goes_on(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "OUTPUTS_MAX", 4)
    story = Story()
    made = [story.kept({1: inline(b"1"), 2: inline(b"2"), 3: inline(b"3")}, votes=(1, 2, 3)) for _ in range(3)]
    control = await read(cluster, story.end())
    found: list[str] = []
    more = True
    while more:
        request = jobs_pb2.TasksRequest(job_id=story.job, after=found[-1] if found else "")
        answer = await control.rpc("Tasks", request)
        assert [task.output_json for task in answer.tasks] == [b"[1,2,3]"]
        found += [task.task_id for task in answer.tasks]
        more = answer.more
    assert found == made


async def test_a_decision_is_told_with_its_rule_its_candidates_and_who_voted_for_what(cluster: Any) -> None:
    named = await cluster.register("laptop")
    story = Story()
    task = story.task("solve", index=4, replicas=3)
    rule = Rule(k=2, of=4, distinct="none", on_none="escalate", min_score=0.5)
    candidates = [candidate(1, score=0.1), candidate(2, score=0.9), candidate(3, score=0.7)]
    mine = msgspec.structs.replace(candidates[1], executor=named)
    judges = [
        Judge("critic", "critic@1.0.0", new_id(), Producer(1, named, "device 2", "o"), (1, 2)),
        Judge("critic", "critic@1.0.0", new_id(), Producer(1, EXECUTORS[0], "device 1", "o"), (3,)),
    ]
    running = [Producer(4, EXECUTORS[0], "device 1", "o")]
    given = [candidates[0], mine, candidates[2]]
    decision = decision_of(
        task, rule, Decided(2, (2, 3)), candidates=given, judges=judges, running=running, spent=1
    )
    story.tell(task, TaskDecided(decision, trust=12), TaskSucceeded(2))
    control = await read(cluster, story.end())
    told = await decision_in(control, task)
    assert (told["task"], told["job"], told["step"], told["index"]) == (task, story.job, "solve", 4)
    assert told["rule_words"] == (
        "2 of 4 results that are the same JSON, one vote for each attempt; "
        "valid is one if a critic gives it 0.5 at least; otherwise a senior agent chooses"
    )
    assert (told["outcome"], told["winner"], told["votes"], told["trust"]) == ("decided", 2, [2, 3], 12)
    assert [(one["attempt"], one["name"], one["device"], one["score"]) for one in told["candidates"]] == [
        (1, "", "device 1", 0.1),
        (2, "laptop", "device 2", 0.9),
        (3, "", "device 3", 0.7),
    ]
    assert [(one["valid"], one["votes"]) for one in told["candidates"]] == [
        (False, []),
        (True, [2, 3]),
        (True, [2, 3]),
    ]
    assert "0.1" in told["candidates"][0]["why_not"]
    assert told["candidates"][1]["digest"] == digest_of(RAW[2])
    assert {(one["by"]["name"], *one["judged"]) for one in told["judges"]} == {("", 3), ("laptop", 1, 2)}
    assert told["self_judged"] == [{"agent": "critic@1.0.0", "attempt": 2}]
    assert [one["attempt"] for one in told["running"]] == [4]
    assert (told["spent"], told["coming"]) == (1, 0)


async def test_where_there_is_no_decision_it_is_said_why(cluster: Any) -> None:
    story = Story()
    plain = story.task("plain")
    story.tell(plain, TaskSucceeded(1))
    waits = story.task("solve", replicas=3)
    broken = story.task("solve", replicas=3)
    story.tell(broken, TaskFailed("judge_failed", "the critic broke"))
    judge = story.task("solve", judging=Judging("critic", broken, (1,)))
    stopped = story.task("solve", replicas=3)
    story.tell(stopped, TaskCancelled("job_failed"))
    control = await read(cluster, story.end())
    for task, said in (
        (plain, "was not judged"),
        (waits, "nothing is decided yet"),
        (broken, "judge_failed: the critic broke"),
        (judge, f"judges results of {broken}"),
        (stopped, r"cancelled \(job_failed\)"),
    ):
        with pytest.raises(FailedPrecondition, match=said):
            await decision_in(control, task)
    for nothing in (new_id(), story.job, "no id"):
        with pytest.raises(NotFound, match="there is no task"):
            await decision_in(control, nothing)


async def test_who_watches_gets_the_events_of_judgement_as_they_were_written(cluster: Any) -> None:
    story = Story()
    task = story.quorum()
    story.tell(story.job, StepJoined("solve", "vote", order=(0,), votes=(0,), by="json"))
    control = await read(cluster, story.end())
    written = [(one.stream, one.type, one.payload) for one in story.events]
    assert [(one.stream, one.type, one.data_json) for one in await control.watch(story.job)] == written
    batches = await control.watch_batches(story.job)
    assert [(one.stream, one.type, one.data_json) for batch in batches for one in batch] == written
    assert (task, "TaskDecided") in [(stream, name) for stream, name, _ in written]


async def test_a_judged_job_that_runs_is_told_as_it_was_decided(cluster: Any, control: Any, one_step: Any) -> None:
    outputs = {"one": 9, "two": 10, "three": 9}
    for name, output in outputs.items():
        await cluster.executor(name, {"square": lambda assignment, given, output=output: output}, slots=1)
    judged = {"speculate": {"replicas": 3, "distinct": "executor"}, "verify": {"quorum": {"k": 2, "of": 3}}}
    job = await control.submit({**one_step, "tasks": [{**one_step["tasks"][0], **judged}]})
    seen = await control.watch(job)
    (decided,) = [events.decode(one.type, 1, one.data_json) for one in seen if one.type == "TaskDecided"]
    assert isinstance(decided, TaskDecided)
    (task,) = (await tasks_of(control, job)).values()
    assert (task.state, task.output_json, task.replicas, task.decided) == ("succeeded", b"9", 3, True)
    told = await decision_in(control, task.task_id)
    assert (told["outcome"], told["winner"]) == ("decided", decided.decision.winner)
    names = {one["name"] for one in told["candidates"] if one["attempt"] in told["votes"]}
    assert names == {"one", "three"}
    assert (await control.get(job)).output_json == b"9"
    # The one that was not needed still reports.
    for executor in cluster.executors:
        await executor.stop()
    await stands_still(cluster)
    await control.get(job, (await cluster.log())[-1].position)
    live = await views_of(cluster)
    await control.shut_down()
    dsn = cluster.database.role_dsn("scheduler")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute("TRUNCATE scheduler.jobs, scheduler.tasks, scheduler.steps, scheduler.job_positions")
        await conn.execute("UPDATE scheduler.projections SET position = 0 WHERE name = 'jobs'")
    await control.start()
    await control.get(job, (await cluster.log())[-1].position)
    assert await views_of(cluster) == live
