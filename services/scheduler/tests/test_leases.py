"""Leases, overtime and cancels of the dispatcher, on a clock that the test moves."""

import asyncio

import msgspec
import pytest
from hive_common.contracts import events, values
from hive_common.contracts.events import AgentRef, Capabilities, JobCancelRequested, JobSubmitted
from hive_common.contracts.messages import AttemptKey, PullRequest
from hive_common.control.kill_log import KillLog
from hive_common.eventlog.log import LogReader
from hive_scheduler.blobs import Blobs
from hive_scheduler.catalogue import KnownExecutor
from hive_scheduler.commits import Committer
from hive_scheduler.dispatch import OVERTIME_MS, START_GRACE_MS, Dispatcher
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.jobfile import parse_job
from hive_scheduler.domain.placement import Fleet
from hive_scheduler.engine import Engine
from hive_scheduler.permits import Permits
from hive_scheduler.signers import Signers

TIMEOUT_MS = 5_000
LEASE_MS = 6_000


class MovedClock:
    def __init__(self) -> None:
        self.ms = 1_000_000
        self.set_by_ms = 0

    def now_us(self) -> int:
        return (self.ms + self.set_by_ms) * 1_000

    def boot_ms(self) -> int:
        return self.ms


class MemoryLog:
    """Takes every append; the log's own rules have their own tests."""

    def __init__(self) -> None:
        self.events = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def append(self, append):
        await self.gate.wait()
        self.events += append.events
        return len(self.events)

    def types(self):
        return [event.type for event in self.events]


class NoCatalogue:
    def __init__(self, *executors: str) -> None:
        capabilities = Capabilities("linux", "x86_64", 4, 1 << 34, 4, ("python",))
        self.executors = {name: KnownExecutor(name, "owner", name, capabilities) for name in executors}
        self.signers = Signers()
        self.signers.trust("stream", "key", "author", 1)

    async def catch_up(self) -> None:
        pass

    def is_revoked(self, executor: str) -> bool:
        return False


class Bench:
    def __init__(self) -> None:
        self.clock = MovedClock()
        self.log = MemoryLog()
        self.engine = Engine("default", self.clock, Blobs(None))
        self.catalogue = NoCatalogue("e", "f")
        kills = KillLog(LogReader("host=nowhere"), "default", "")
        self.dispatcher = Dispatcher(
            *(self.engine, Fleet(), self.catalogue, kills, Permits(self.catalogue, self.clock, None, kills)),
            *(self.clock, 1, LEASE_MS),
        )
        self.engine.committer = Committer(self.log, self.dispatcher.seal, lambda batch: None)
        self.committing = asyncio.create_task(self.engine.committer.run())
        self.sequence = 0

    async def submit(self, count: int = 1) -> JobState:
        retry = {"max_attempts": 1}
        task = {"id": "s", "agent": "a@1.0.0", "fork": "${input}", "input": "${item}", "retry": retry}
        document = msgspec.json.encode(
            {"apiVersion": "hive/v1", "kind": "Job", "name": "j", "tasks": [task], "limits": {"deadline": "1h"}}
        )
        ref = AgentRef("a", "1.0.0", "sha256:0", "python", 1, TIMEOUT_MS, 1, signer="key", signature="s")
        event = JobSubmitted(
            name="j",
            document=msgspec.Raw(document),
            input=values.inline(values.encode_json(list(range(count)))),
            agents={"a@1.0.0": ref},
            request_digest="",
            deadline_us=self.clock.now_us() + 3_600_000_000,
        )
        job = JobState(f"job-{len(self.engine.jobs)}", "owner", event, parse_job(document))
        self.engine.submit(job, events.encode(event), "me", lambda position: None)
        await self.settled()
        return job

    def pull(self, executor: str = "e", session: str = "s1", slots: int = 1, **fields):
        self.sequence += 1
        request = PullRequest(
            session=session, sequence=self.sequence, slots_free=slots, memory_free_bytes=1 << 30, **fields
        )
        return asyncio.create_task(self.dispatcher.pull(executor, request))

    async def settled(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def pass_time(self, ms: int, step_ms: int = 500) -> None:
        """Let time go by with a tick every `step_ms`, as in life."""
        await self.settled()
        for _ in range(ms // step_ms):
            self.clock.ms += step_ms
            self.dispatcher.tick()
            self.engine.tick()
            await self.settled()


@pytest.fixture
async def bench():
    bench = Bench()
    yield bench
    bench.committing.cancel()
    await asyncio.gather(bench.committing, return_exceptions=True)


def keys_of(assignments):
    return tuple(AttemptKey(one.task, one.attempt) for one in assignments)


async def test_a_pull_without_work_is_answered_within_a_third_of_the_lease(bench):
    await bench.pull()
    pull = bench.pull()
    await bench.settled()
    assert not pull.done()
    await bench.pass_time(LEASE_MS // 3)
    reply = await pull
    assert (reply.assignments, reply.lease_ms) == ((), LEASE_MS)


async def test_whoever_has_only_just_come_gets_a_lease_at_once(bench):
    for session in ("s1", "s2"):
        pull = bench.pull(session=session)
        await bench.settled()
        reply = await pull
        assert (reply.assignments, reply.lease_ms) == ((), LEASE_MS)


async def test_an_assignment_leaves_only_after_its_commit(bench):
    await bench.submit()
    bench.log.gate.clear()
    pull = bench.pull()
    await bench.settled()
    assert not pull.done()
    assert "TaskAssigned" not in bench.log.types()
    bench.log.gate.set()
    assert len((await pull).assignments) == 1
    assert bench.log.types()[-1] == "TaskAssigned"


async def test_a_pull_that_times_out_during_a_commit_does_not_leak_what_is_not_committed(bench):
    await bench.submit()
    (first,) = (await bench.pull()).assignments
    bench.log.gate.clear()
    # A commit is under way; meanwhile a pull gets old, and then a task becomes ready that could go with it.
    bench.engine.lose(first.task, 1, "test")
    pull = bench.pull("f", slots=1, held=())
    await bench.settled()
    await bench.pass_time(2_000)
    assert not pull.done()
    bench.log.gate.set()
    reply = await pull
    assigned = [event for event in bench.log.events if event.type == "TaskAssigned"]
    assert len(assigned) == 1 + len(reply.assignments)


async def test_attempts_are_lost_when_the_lease_runs_out_and_not_before(bench):
    job = await bench.submit()
    (given,) = (await bench.pull()).assignments
    await bench.pass_time(LEASE_MS - 500)
    assert job.tasks[given.task].status == "active"
    await bench.pass_time(1_000)
    assert bench.log.types()[-2:] == ["AttemptLost", "TaskRetryScheduled"]
    assert [online for *_, online in bench.dispatcher.present()] == [False]


async def test_a_pull_renews_the_lease(bench):
    job = await bench.submit()
    given = (await bench.pull()).assignments
    for _ in range(4):
        pull = bench.pull(slots=0, held=keys_of(given))
        await bench.pass_time(LEASE_MS // 2)
        await pull
    assert job.tasks[given[0].task].status == "active"


async def test_a_process_that_stood_still_gives_everybody_a_fresh_lease(bench):
    job = await bench.submit()
    (given,) = (await bench.pull()).assignments
    bench.clock.ms += 60_000
    bench.dispatcher.tick()
    await bench.pass_time(LEASE_MS - 500)
    assert job.tasks[given.task].status == "active"
    await bench.pass_time(1_000)
    assert job.tasks[given.task].status == "ready"


async def test_leases_are_frozen_while_nats_is_away(bench):
    job = await bench.submit()
    (given,) = (await bench.pull()).assignments
    bench.dispatcher.freeze()
    await bench.pass_time(10 * LEASE_MS)
    assert job.tasks[given.task].status == "active"
    bench.dispatcher.thaw()
    await bench.pass_time(LEASE_MS - 500)
    assert job.tasks[given.task].status == "active"
    await bench.pass_time(1_000)
    assert job.tasks[given.task].status == "ready"


async def keep(bench, given, ms):
    """Pull like an executor that holds what it was given, for `ms`; return what it was told to cancel."""
    told = []
    for _ in range(ms // 2_000):
        pull = bench.pull(slots=0, held=keys_of(given))
        await bench.pass_time(2_000)
        told += (await pull).cancel
    return told


async def test_an_attempt_that_is_held_far_beyond_its_timeout_is_given_up_and_cancelled(bench):
    job = await bench.submit()
    given = (await bench.pull()).assignments
    started = tasks.Start(1, "e", "s1", bench.clock.now_us())
    bench.engine.report(job, job.tasks[given[0].task], started)
    assert await keep(bench, given, TIMEOUT_MS + OVERTIME_MS - 2_000) == []
    told = await keep(bench, given, 6_000)
    assert set(told) == set(keys_of(given))
    assert "AttemptLost" in bench.log.types()


async def test_an_attempt_that_has_not_started_has_longer(bench):
    await bench.submit()
    given = (await bench.pull()).assignments
    assert await keep(bench, given, TIMEOUT_MS + OVERTIME_MS + 4_000) == []
    assert set(await keep(bench, given, START_GRACE_MS)) == set(keys_of(given))


async def test_a_cancel_is_told_at_once_and_then_not_again_and_again(bench):
    job = await bench.submit()
    given = (await bench.pull()).assignments
    pull = bench.pull(slots=0, held=keys_of(given))
    await bench.settled()
    assert not pull.done()
    bench.engine.apply(job, job.id, [JobCancelRequested()])
    bench.engine.settle()
    await bench.settled()
    assert (await pull).cancel == keys_of(given)
    assert isinstance(job.end, events.JobCancelled)
    slow = bench.pull(slots=0, held=keys_of(given))
    await bench.settled()
    assert not slow.done(), "an executor that needs a moment to stop must not be answered in a loop"
    await bench.pass_time(2_500)
    assert (await slow).cancel == keys_of(given)


async def test_a_cancel_is_told_also_to_a_pull_that_does_not_know_of_the_attempt_yet(bench):
    """The answer that gives an attempt may be on its way while a later pull overtakes it."""
    job = await bench.submit()
    given = keys_of((await bench.pull()).assignments)
    bench.engine.apply(job, job.id, [events.JobCancelRequested("enough")])
    bench.engine.settle()
    await bench.settled()
    for _ in range(2):
        pull = bench.pull(held=())
        await bench.pass_time(LEASE_MS // 3)
        assert (await pull).cancel == given
    await bench.pass_time(LEASE_MS)
    pull = bench.pull(held=())
    await bench.pass_time(LEASE_MS // 3)
    assert (await pull).cancel == ()


async def test_no_answer_renews_a_lease_without_the_cancels(bench):
    """Not even one to a pull that comes twice, or that was overtaken."""
    job = await bench.submit()
    given = keys_of((await bench.pull()).assignments)
    first = bench.pull(held=given)
    await bench.settled()
    bench.engine.apply(job, job.id, [events.JobCancelRequested("enough")])
    bench.engine.settle()
    await bench.settled()
    assert (await first).cancel == given
    bench.sequence -= 1
    assert (await bench.pull(held=given)).cancel == given
    overtaken = bench.pull(held=given)
    await bench.settled()
    bench.pull(held=given)
    assert (await overtaken).cancel == given


async def test_the_first_answer_of_a_leader_tells_what_to_stop_also_while_it_commits(bench):
    bench.log.gate.clear()
    submitting = asyncio.create_task(bench.submit())
    await bench.settled()
    pull = bench.pull(slots=0, held=(AttemptKey("of a job that has ended", 1),))
    await bench.settled()
    assert not pull.done()
    bench.log.gate.set()
    assert (await pull).cancel == (AttemptKey("of a job that has ended", 1),)
    await submitting


async def test_what_an_executor_holds_without_having_it_is_cancelled(bench):
    pull = bench.pull(held=(AttemptKey("unknown", 1),))
    await bench.settled()
    assert (await pull).cancel == (AttemptKey("unknown", 1),)


async def test_large_inputs_do_not_make_a_reply_too_large(bench):
    task = {"id": "s", "agent": "a@1.0.0", "fork": "${input}", "input": "${item}"}
    document = msgspec.json.encode({"apiVersion": "hive/v1", "kind": "Job", "name": "j", "tasks": [task]})
    event = JobSubmitted(
        name="j", document=msgspec.Raw(document),
        agents={"a@1.0.0": AgentRef("a", "1.0.0", "d", "python", 1, 1, 1, signer="key", signature="s")},
        input=values.inline(values.encode_json(["x" * 100_000] * 12)), request_digest="",
        deadline_us=bench.clock.now_us() + 10**10,
    )  # fmt: skip
    job = JobState("job", "owner", event, parse_job(document))
    bench.engine.submit(job, events.encode(event), "me", lambda position: None)
    await bench.settled()
    held: tuple = ()
    while len(held) < 12:
        reply = await bench.pull(slots=20, held=held)
        assert reply.assignments
        assert len(msgspec.json.encode(reply)) < 512 * 1024
        held += keys_of(reply.assignments)
    assert len(set(held)) == 12


async def test_priorities_go_first_and_jobs_take_turns(bench):
    one, two = await bench.submit(3), await bench.submit(3)
    order = []
    for _ in range(4):
        (given,) = (await bench.pull(slots=1, held=tuple(order))).assignments
        order.append(AttemptKey(given.task, 1))
    jobs = [bench.engine.task_jobs[key.task] for key in order]
    assert jobs == [one.id, two.id, one.id, two.id]


@pytest.mark.parametrize("hours", [-1, 1, 24])
async def test_a_deadline_comes_when_it_would_have_come_however_the_wall_clock_is_set(hours, bench):
    job = await bench.submit()
    await bench.pass_time(60_000, step_ms=2_000)
    bench.clock.set_by_ms = hours * 3_600_000
    await bench.pass_time(3_600_000 - 62_000, step_ms=2_000)
    assert job.end is None
    await bench.pass_time(4_000, step_ms=2_000)
    assert job.end is not None
    assert "JobFailed" in [event.type for event in bench.log.events]


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_pause_before_a_retry_lasts_as_long_however_the_wall_clock_is_set(hours, bench):
    job = await bench.submit()
    pull = bench.pull()
    await bench.settled()
    (task,) = job.tasks.values()
    assert (await pull).assignments
    bench.engine.lose(task.id, 1, "lease_expired")
    await bench.settled()
    pause_us = task.not_before_us - bench.engine.now_us()
    bench.clock.set_by_ms = hours * 3_600_000
    bench.engine.tick()
    assert task.not_before_us - bench.engine.now_us() == pause_us
    pull = bench.pull()
    await bench.pass_time(pause_us // 1_000 + 1_000)
    assert [one.attempt for one in (await pull).assignments] == [2]


async def test_an_answer_names_the_last_decision_about_keys_and_a_new_one_is_told_at_once(bench):
    await bench.pull()
    pulling = bench.pull()
    await bench.settled()
    assert not pulling.done()
    bench.catalogue.signers.distrust("stream", "stolen", 7)
    bench.dispatcher.signers_changed()
    await bench.settled()
    assert pulling.result().signers == 7


async def test_what_a_distrusted_key_signed_fails_instead_of_being_given_out(bench):
    job = await bench.submit(1)
    bench.catalogue.signers.distrust("stream", "stolen", 7)
    bench.pull()
    await bench.settled()
    (task,) = job.tasks.values()
    assert (task.attempts, task.status, task.failure.code) == ({}, "failed", "permission_denied")
    assert "a@1.0.0: signed by the key key (author), which is not trusted: stolen" in task.failure.message


def short(bench, agent="a@1.0.0", ms=1.0):
    bench.engine.usual.observe(agent, ms)


async def test_work_for_which_there_is_no_slot_waits_until_its_agent_is_known_to_be_short(bench):
    await bench.submit(60)
    reply = await bench.pull(slots=40, ahead=36)
    assert len(reply.assignments) == 4, "nobody knows yet how long they take"
    held = keys_of(reply.assignments)
    pull = bench.pull(slots=36, ahead=36, held=held)
    await bench.settled()
    assert not pull.done()
    short(bench)
    assert len((await bench.pull(slots=36, ahead=36, held=held)).assignments) == 36


async def test_a_free_slot_of_another_comes_before_a_place_to_wait(bench):
    short(bench)
    pulls = [bench.pull(name, slots=30, ahead=26) for name in ("e", "f")]
    await bench.settled()
    first = [await pull for pull in pulls]
    assert [reply.assignments for reply in first] == [(), ()]
    pulls = [bench.pull(name, slots=30, ahead=26) for name in ("e", "f")]
    await bench.settled()
    await bench.submit(8)
    assert [len((await pull).assignments) for pull in pulls] == [4, 4]


async def test_a_report_frees_a_slot_of_the_pull_that_lies_there(bench):
    job = await bench.submit(6)
    given = (await bench.pull(slots=4, ahead=0)).assignments
    pull = bench.pull(slots=2, ahead=2, held=keys_of(given))
    await bench.settled()
    assert not pull.done()
    ended = given[0]
    report = tasks.Succeed(ended.attempt, "e", "s1", values.inline(b"1"))
    bench.engine.report(job, job.tasks[ended.task], report)
    bench.engine.settle()
    assert len((await pull).assignments) == 1


async def test_attempts_of_a_session_that_is_over_free_no_slots_of_the_next_one(bench):
    await bench.submit(8)
    given = (await bench.pull(slots=4)).assignments
    assert len(given) == 4
    assert len((await bench.pull(session="s2", slots=6, ahead=2)).assignments) == 4


async def test_what_the_pull_knew_to_have_ended_frees_no_second_slot(bench):
    job = await bench.submit(6)
    given = (await bench.pull(slots=4, ahead=0)).assignments
    held, spooled = keys_of(given[1:]), keys_of(given[:1])
    given_now = (await bench.pull(slots=3, ahead=2, held=held, spooled=spooled)).assignments
    assert len(given_now) == 1
    pull = bench.pull(slots=2, ahead=2, held=held + keys_of(given_now), spooled=spooled)
    await bench.settled()
    report = tasks.Succeed(given[0].attempt, "e", "s1", values.inline(b"1"))
    bench.engine.report(job, job.tasks[given[0].task], report)
    bench.engine.settle()
    await bench.settled()
    assert not pull.done()
