"""What must hold when parts die, stall, restart or speak twice."""

import asyncio
import contextlib
import signal
from collections import Counter

import aiohttp
import msgspec
import psycopg
import pytest
from hive_common.artifacts.manifest import AgentManifest
from hive_common.bus.authority import Authority
from hive_common.contracts import events
from hive_common.contracts.events import ExecutorDrainRequested, ExecutorRevoked, ExecutorUndrained
from hive_common.contracts.messages import AttemptKey
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import HiveError
from hive_common.rpc.client import bearer, call
from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.proxy import POSTGRES_READY, TcpProxy
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc
from hive_proto.jobs.v1 import jobs_pb2
from hive_scheduler import recovery
from hive_scheduler.domain.job import snapshot
from hive_scheduler.queries import Queries
from hive_scheduler.recovery import PostgresOpenJobs, recover, replay
from hive_scheduler.submission import Specs
from psycopg.conninfo import make_conninfo

from .conftest import KEY

LEASE_MS = 1_500


def fork_of(count, one_step, **task):
    return {
        **one_step,
        "input": {"numbers": list(range(count))},
        "tasks": [{**one_step["tasks"][0], "fork": "${input.numbers}", "input": {"n": "${item}"}, **task}],
        "output": "${tasks.square.output}",
    }  # fmt: skip


async def assert_the_laws_hold(cluster):
    """Each stream has its versions in order, one end, and nothing but late reports after it."""
    position, ended, versions = 0, set(), Counter()
    live, seen = {}, []
    while batch := await cluster.reader.read(position, 10_000):
        for stored in batch:
            assert stored.position == position + 1
            position = stored.position
            versions[stored.stream] += 1
            assert stored.version == versions[stored.stream]
            assert stored.stream not in ended or stored.type == "AttemptLate"
            if stored.type in events.TASK_TERMINAL | events.JOB_TERMINAL:
                ended.add(stored.stream)
            seen.append(stored.type)
            if stored.type == "TaskAssigned":
                attempt = msgspec.json.decode(stored.payload)["attempt"]
                assert live.get(stored.stream, 0) + 1 == attempt
                live[stored.stream] = attempt
    return Counter(seen)


SQUARE = AgentManifest(name="square", version="1.0.0", runtime="python", entry="agent.py")


@pytest.fixture
async def control(cluster):
    """A scheduler in its own process, with the agent `square` published."""
    await cluster.publish(SQUARE)
    control = cluster.control_process()
    await control.start()
    return control


@pytest.fixture
async def short(cluster):
    """One whose leases are short."""
    await cluster.publish(SQUARE)
    control = cluster.control_process(lease_ms=LEASE_MS)
    await control.start()
    return control


async def first_assignment(fake):
    while not (reply := await fake.pull(fake.pull_request())).assignments:
        await asyncio.sleep(0.02)
    return reply.assignments[0]


def ok(fake, assignment, output=b"9"):
    from hive_common.contracts import values
    from hive_common.contracts.messages import AttemptReport

    return AttemptReport(
        assignment.task, assignment.attempt, fake.session, "succeeded", output=values.inline(output)
    )


async def test_a_report_from_beyond_the_lease_changes_nothing_and_is_noted_once(cluster, short, one_step):
    stopped = await cluster.executor("stopped", {}, start=False)
    job_id = await short.submit(one_step)
    assignment = await first_assignment(stopped)
    await cluster.executor("other", {"square": lambda a, given: "from the other"})
    job = await short.finish(job_id)
    assert (msgspec.json.decode(job.output_json), job.attempts) == ("from the other", 2)
    for _ in range(3):
        reply = await stopped.report(ok(stopped, assignment))
        assert [result.verdict for result in reply.results] == ["late"]
    task = [stored.type for stored in await cluster.log(assignment.task)]
    assert task.count("AttemptLost") == task.count("AttemptLate") == 1
    assert task[-1] == "AttemptLate"
    assert (await short.get(job_id)).output_json == job.output_json


async def test_a_report_by_somebody_else_is_rejected(cluster, control, one_step):
    holder = await cluster.executor("holder", {}, start=False)
    thief = await cluster.executor("thief", {}, start=False)
    job_id = await control.submit(one_step)
    assignment = await first_assignment(holder)
    for fake, report in (
        (thief, ok(holder, assignment)),
        (holder, msgspec.structs.replace(ok(holder, assignment), session="another")),
        (holder, msgspec.structs.replace(ok(holder, assignment), attempt=2)),
        (holder, msgspec.structs.replace(ok(holder, assignment), task=job_id)),
        (holder, msgspec.structs.replace(ok(holder, assignment), status="odd")),
    ):
        assert [result.verdict for result in (await fake.report(report)).results] == ["rejected"]
    reply = await holder.report(ok(holder, assignment), ok(holder, assignment))
    assert [result.verdict for result in reply.results] == ["accepted", "accepted"]
    assert (await control.finish(job_id)).state == "succeeded"
    assert (await assert_the_laws_hold(cluster))["AttemptSucceeded"] == 1


async def test_a_pull_that_comes_twice_gives_one_attempt(cluster, control, one_step):
    fake = await cluster.executor("one", {}, start=False)
    request = fake.pull_request()
    pulls = [asyncio.create_task(fake.pull(request)) for _ in range(3)]
    await asyncio.sleep(0)
    # One that was overtaken is answered at once, and behind the others: all of them wait before there is work.
    assert (await fake.pull(fake.pull_request(sequence=0))).assignments == ()
    job_id = await control.submit(one_step)
    replies = await asyncio.gather(*pulls)
    assert all(reply.assignments == replies[0].assignments for reply in replies)
    # Asked again without the attempt in hand, as when the reply was lost: it is sent again, not made anew.
    again = [await first_assignment(fake) for _ in range(2)]
    given = {(one.task, one.attempt) for reply in replies for one in reply.assignments}
    assert given | {(one.task, one.attempt) for one in again} == {(again[0].task, 1)}
    await fake.report(ok(fake, again[0]))
    assert (await control.finish(job_id)).attempts == 1


async def test_an_attempt_in_hand_is_not_sent_again(cluster, control, one_step):
    fake = await cluster.executor("one", {}, start=False)
    await control.submit(one_step)
    assignment = await first_assignment(fake)
    held = (AttemptKey(assignment.task, assignment.attempt),)
    assert (await fake.pull(fake.pull_request(held=held))).assignments == ()
    assert (await fake.pull(fake.pull_request(spooled=held))).assignments == ()


async def test_an_older_session_is_told_that_it_is_superseded(cluster, control):
    old = await cluster.executor("one", {}, start=False)
    new = old.restarted()
    assert (await old.pull(old.pull_request())).assignments == ()
    pending = asyncio.create_task(old.pull(old.pull_request()))
    await asyncio.sleep(0.1)
    taken_over = asyncio.create_task(new.pull(new.pull_request()))
    assert (await pending).assignments == ()
    assert (await old.pull(old.pull_request())).superseded
    assert not (await taken_over).superseded


async def test_who_is_unknown_is_told_to_say_hello(cluster, control):
    from hive_common.kernel.ids import new_id

    executor = new_id()
    fake = type(await cluster.executor("known", {}, start=False))(await cluster.client(executor), executor, {})
    assert (await fake.pull(fake.pull_request())).unknown


async def test_a_new_session_loses_at_once_what_the_old_one_held_and_keeps_what_is_spooled(
    cluster, control, one_step
):
    old = await cluster.executor("one", {}, start=False)
    job_id = await control.submit(fork_of(2, one_step))
    first, second = await first_assignment(old), None
    while second is None:
        reply = await old.pull(old.pull_request(held=(AttemptKey(first.task, 1),)))
        second = next(iter(reply.assignments), None)
    new = old.restarted()
    new.spool = {(first.task, 1): ok(old, first, b"100")}
    new.agents = {"square": lambda assignment, given: given["n"]}
    new.reporting = False
    cluster.run(new)
    while len(await cluster.log(second.task)) < 5:
        await asyncio.sleep(0.02)
    assert [stored.type for stored in await cluster.log(second.task)][2:] == [
        "AttemptLost", "TaskRetryScheduled", "TaskAssigned",
    ]  # fmt: skip
    assert [stored.type for stored in await cluster.log(first.task)] == ["TaskCreated", "TaskAssigned"]
    new.reporting = True
    job = await control.finish(job_id)
    outputs = [100, 1] if first.index == 0 else [0, 100]
    assert msgspec.json.decode(job.output_json) == outputs
    # The end of the job is told on another way than the verdicts.
    while len(new.results) < 2:
        await asyncio.sleep(0.02)
    assert {result.verdict for result in new.results} == {"accepted"}


async def test_an_executor_that_is_drained_gets_nothing_until_it_is_undrained(cluster, control, one_step):
    fake = await cluster.executor("one", {"square": lambda a, given: 1})
    while not fake.replies:
        await asyncio.sleep(0.02)
    await cluster.append(fake.id, 3, ExecutorDrainRequested())
    while not fake.replies[-1].drained:
        await asyncio.sleep(0.02)
    job_id = await control.submit(one_step)
    await asyncio.sleep(0.3)
    assert (await control.get(job_id)).attempts == 0
    await cluster.append(fake.id, 4, ExecutorUndrained())
    assert (await control.finish(job_id)).state == "succeeded"


async def test_who_asks_for_presence_at_a_position_finds_a_drain_before_it_in_force(cluster, control, one_step):
    fake = await cluster.executor("one", {"square": lambda a, given: 1})
    while not fake.replies:
        await asyncio.sleep(0.02)
    position = await cluster.append(fake.id, 3, ExecutorDrainRequested())
    presence = executors_pb2_grpc.PresenceStub(control.channel)
    request = executors_pb2.PresenceRequest(min_position=position)
    await call(presence.List(request, metadata=bearer(KEY), timeout=10))
    job_id = await control.submit(one_step)
    while not (await control.get(job_id)).tasks.ready:
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.3)
    assert (await control.get(job_id)).attempts == 0


async def test_what_a_revoked_executor_has_goes_elsewhere_at_once_and_it_is_refused(cluster, control, one_step):
    lost = await cluster.executor("lost", {}, start=False)
    job_id = await control.submit(one_step)
    assignment = await first_assignment(lost)
    waiting = asyncio.create_task(lost.pull(lost.pull_request(held=(AttemptKey(assignment.task, 1),))))
    await cluster.hint(await cluster.append(lost.id, 3, ExecutorRevoked("sold")), "ExecutorRevoked")
    # A pull that hangs is answered: the executor need not wait in order to learn it.
    for reply in (await waiting, await lost.pull(lost.pull_request()), await lost.report(ok(lost, assignment))):
        assert reply.error is not None
        assert (reply.error.code, reply.error.fields) == ("permission_denied", {"reason": "revoked"})
    answer = await control.rpc("Explain", jobs_pb2.ExplainRequest(task_id=assignment.task))
    (candidate,) = msgspec.json.decode(answer.explanation_json)["candidates"]
    assert (candidate["executor"], candidate["feasible"], candidate["reason"]) == (lost.id, False, "revoked")
    await cluster.executor("other", {"square": lambda a, given: given["n"] ** 2})
    assert (await control.finish(job_id)).attempts == 2
    (ended,) = [event for event in await cluster.log(assignment.task) if event.type == "AttemptLost"]
    assert msgspec.json.decode(ended.payload)["reason"] == "revoked"
    assert "AttemptLate" not in [event.type for event in await cluster.log(assignment.task)]


async def test_a_new_leader_gives_nothing_back_to_an_executor_that_was_revoked_meanwhile(
    cluster, control, one_step
):
    lost = await cluster.executor("lost", {}, start=False)
    job_id = await control.submit(one_step)
    assignment = await first_assignment(lost)
    await control.crash()
    await cluster.append(lost.id, 3, ExecutorRevoked())
    await control.start()
    await cluster.executor("other", {"square": lambda a, given: given["n"] ** 2})
    assert (await control.finish(job_id)).attempts == 2
    (ended,) = [event for event in await cluster.log(assignment.task) if event.type == "AttemptLost"]
    assert msgspec.json.decode(ended.payload)["reason"] == "revoked"


async def test_a_leader_that_dies_is_replaced_and_the_job_ends_as_if_nothing_had_happened(
    cluster, control, one_step
):
    async def slow(assignment, given):
        await asyncio.sleep(0.01)
        return given["n"] ** 2

    fake = await cluster.executor("one", {"square": slow}, slots=8)
    document = fork_of(300, one_step)
    job_id = await control.submit(document, idempotency_key="k")
    for _ in range(3):
        seen = len(fake.ran)
        while len(fake.ran) < min(seen + 40, 300):
            await asyncio.sleep(0.01)
        await control.crash()
        await control.start()
    job = await control.finish(job_id)
    assert msgspec.json.decode(job.output_json) == [n * n for n in range(300)]
    assert (job.state, job.tasks.succeeded, job.attempts) == ("succeeded", 300, 300)
    assert (await control.submit_full(document, idempotency_key="k")).existed
    assert len(fake.ran) == len(set(fake.ran)) == 300
    counts = await assert_the_laws_hold(cluster)
    assert (counts["TaskSucceeded"], counts["JobSucceeded"], counts["AttemptLost"]) == (300, 1, 0)


async def test_what_is_recovered_is_what_a_full_replay_gives(cluster, control, one_step, monkeypatch):
    monkeypatch.setattr(recovery, "PAGE_EVENTS", 7)
    monkeypatch.setattr(recovery, "OPEN_JOBS_PAGE", 1)
    fake = await cluster.executor("one", {"square": lambda a, given: given["n"]}, slots=2)
    done = await control.submit(fork_of(20, one_step))
    await control.finish(done)
    await fake.stop()
    half = await cluster.executor("half", {}, start=False)
    ids = [await control.submit(fork_of(30, one_step)) for _ in range(3)]
    await control.rpc("Cancel", jobs_pb2.CancelRequest(job_id=ids[2]))
    for assignment in (await half.pull(half.pull_request(slots_free=20))).assignments[::2]:
        await half.report(ok(half, assignment))
    await control.crash()
    dsn = cluster.database.role_dsn("scheduler")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        # As the views stood, and as when they had fallen far behind.
        for position in (None, 12):
            if position is not None:
                await conn.execute("UPDATE scheduler.projections SET position = 1 WHERE name = 'jobs'")
                for table in ("jobs", "tasks", "steps", "job_positions"):
                    await conn.execute(f"TRUNCATE scheduler.{table}")
            now_us = SystemClock().now_us()
            recovered, at = await recover(PostgresOpenJobs(conn), cluster.reader, Specs(), now_us)
            replayed, head = await replay(cluster.reader, Specs(), now_us)
            assert at == head == await cluster.reader.head()
            assert recovered.jobs.keys() == replayed.jobs.keys() == set(ids[:2])
            for job_id, job in recovered.jobs.items():
                assert snapshot(job) == snapshot(replayed.jobs[job_id])


async def test_the_history_of_a_job_is_the_same_in_pages_of_any_size(cluster, control, one_step):
    fake = await cluster.executor("one", {"square": lambda a, given: given["n"]}, slots=2)
    first, second = [await control.submit(fork_of(20, one_step)) for _ in range(2)]
    await control.finish(second)
    await control.finish(first)
    await fake.stop()
    queries = Queries(cluster.database.role_dsn("scheduler"), "default")
    await queries.open()
    try:
        for job_id in (first, second):
            expected = [
                stored.position for stored in await cluster.reader.read(0, 10_000) if stored.correlation == job_id
            ]
            for limit in (1_000, 7, 1):
                found: list[int] = []
                while page := await queries.history(job_id, found[-1] if found else 0, limit):
                    assert len(page) <= limit
                    found += [stored.position for stored in page]
                assert found == expected
    finally:
        await queries.close()


async def ready_answer(control):
    """What `/readyz` says, None before there is an answer."""
    url = f"http://127.0.0.1:{control.config.ops_port}/readyz"
    with contextlib.suppress(aiohttp.ClientConnectionError):
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return await answer.json()
    return None


async def test_a_second_scheduler_stands_by_and_takes_over(cluster, control, one_step):
    fake = await cluster.executor("one", {"square": lambda a, given: given["n"]})
    standby = cluster.control_process()
    await standby.start(wait=False)
    while (answer := await ready_answer(standby)) is None or answer["problems"].get("leader") == "starting":
        await asyncio.sleep(0.05)
    assert answer["problems"].get("leader") == "stands by: another scheduler leads"
    assert (await control.finish(await control.submit(one_step))).state == "succeeded"
    with pytest.raises(HiveError):
        await standby.submit(one_step)
    epoch = fake.replies[-1].epoch
    await control.crash()
    job_id = None
    while job_id is None:
        with contextlib.suppress(HiveError):
            job_id = await standby.submit(one_step, idempotency_key="k")
    assert (await standby.finish(job_id)).state == "succeeded"
    assert fake.replies[-1].epoch == epoch + 1
    await assert_the_laws_hold(cluster)


async def test_a_leader_that_is_paused_loses_the_lead_and_changes_nothing_when_it_wakes(cluster, control, one_step):
    fake = await cluster.executor("one", {"square": lambda a, given: given["n"]})
    standby = cluster.control_process()
    await standby.start(wait=False)
    assert (await control.finish(await control.submit(one_step))).state == "succeeded"
    control.send(signal.SIGSTOP)
    await standby.ready()
    job = await standby.finish(await standby.submit(one_step))
    control.send(signal.SIGCONT)
    assert await asyncio.wait_for(control.process.wait(), 20) == 1
    assert job.state == "succeeded"
    assert (await standby.finish(await standby.submit(one_step))).state == "succeeded"
    assert len(fake.ran) == 3
    await assert_the_laws_hold(cluster)


async def test_a_leader_whose_session_ended_writes_nothing_more_and_ends(cluster, control, one_step):
    """A leader that was paused wakes up and finds its session gone: its lock may be somebody else's by then."""
    fake = await cluster.executor("one", {}, start=False)
    await control.submit(one_step)
    assignment = await first_assignment(fake)
    head = await cluster.reader.head()
    async with await psycopg.AsyncConnection.connect(cluster.database.dsn, autocommit=True) as admin:
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
    # Who has noticed already answers nobody any more.
    with contextlib.suppress(HiveError):
        reply = await fake.report(ok(fake, assignment))
        assert reply.error is not None and reply.error.retryable
    assert await asyncio.wait_for(control.process.wait(), 10) == 1
    assert await cluster.reader.head() == head


async def test_leases_stand_still_while_the_scheduler_is_cut_off_from_nats(
    cluster, database, tmp_path, server_dir, one_step
):
    cluster.nats = nats = EmbeddedNats(server_dir, authority=Authority.new())
    nats.start()
    try:
        await cluster.publish(SQUARE)
        control = cluster.control_process(lease_ms=LEASE_MS)
        await control.start()
        going, may_end = asyncio.Event(), asyncio.Event()

        async def slow(assignment, given):
            going.set()
            await may_end.wait()
            return "done"

        await cluster.executor("one", {"square": slow})
        job_id = await control.submit(one_step)
        await going.wait()
        nats.stop(signal.SIGKILL)
        await asyncio.sleep(LEASE_MS * 2 / 1000)
        nats.start()
        may_end.set()
        job = await control.finish(job_id)
        assert (job.state, job.attempts) == ("succeeded", 1)
        await cluster.close()
    finally:
        nats.stop()


async def test_a_late_report_for_a_job_of_an_earlier_leader_is_noted_once(cluster, short, one_step):
    stopped = await cluster.executor("stopped", {}, start=False)
    job_id = await short.submit(one_step)
    assignment = await first_assignment(stopped)
    other = await cluster.executor("other", {"square": lambda a, given: "other"})
    await short.finish(job_id)
    winner = next(iter(other.ran))
    await short.crash()
    await short.start()
    for _ in range(2):
        reply = await stopped.report(ok(stopped, assignment))
        assert [result.verdict for result in reply.results] == ["late"]
    # The reply to this one was lost in the crash: it counted, and it is said again that it did.
    repeated = msgspec.structs.replace(ok(other, assignment), attempt=winner[1])
    assert [result.verdict for result in (await other.report(repeated)).results] == ["accepted"]
    counts = await assert_the_laws_hold(cluster)
    assert (counts["AttemptLate"], counts["AttemptSucceeded"]) == (1, 1)


async def test_connections_cut_at_commit_lose_and_double_nothing(cluster, one_step):
    await cluster.publish(SQUARE)
    fake = await cluster.executor("one", {"square": lambda a, given: given["n"] ** 2}, slots=8)
    async with TcpProxy(cluster.database.server.port) as proxy:
        dsn = make_conninfo(cluster.database.role_dsn("scheduler"), port=proxy.port)
        control = cluster.control_process(dsn)
        supervisor = asyncio.create_task(control.supervise())
        ids = []
        for number in range(4):
            cut = proxy.cut_next_answer(POSTGRES_READY) if number % 2 else proxy.cut_next_request()
            job_id = None
            while job_id is None:
                with contextlib.suppress(HiveError):
                    job_id = await control.submit(fork_of(5, one_step), idempotency_key=str(number))
            await asyncio.wait_for(cut.wait(), 10)
            ids.append(job_id)
        for job_id in ids:
            job = None
            while job is None or job.state == "running":
                with contextlib.suppress(HiveError):
                    job = await control.get(job_id)
                await asyncio.sleep(0.05)
            assert job.state == "succeeded"
            assert msgspec.json.decode(job.output_json) == [0, 1, 4, 9, 16]
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        await control.shut_down()
    assert len(fake.ran) == len(set(fake.ran))
    counts = await assert_the_laws_hold(cluster)
    assert (counts["JobSubmitted"], counts["JobSucceeded"], counts["TaskSucceeded"]) == (4, 4, 20)


async def test_timeouts_count_against_the_retries(cluster, control, one_step):
    one_step["tasks"][0]["retry"] = {"max_attempts": 2, "backoff": "0s"}
    fake = await cluster.executor("one", {}, start=False)
    job_id = await control.submit(one_step)
    assignment = await first_assignment(fake)
    failed = msgspec.structs.replace(ok(fake, assignment), status="failed", code="timeout", output=None)
    await fake.report(failed)
    again = await first_assignment(fake)
    assert (again.task, again.attempt) == (assignment.task, 2)
    await fake.report(msgspec.structs.replace(failed, attempt=2))
    job = await control.finish(job_id)
    assert (job.state, job.error_code, job.attempts) == ("failed", "timeout", 2)
