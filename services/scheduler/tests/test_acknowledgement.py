"""Law 1: nothing is said before it is committed. Somebody else holds the log's lock, so that commits wait."""

import asyncio
import contextlib

import psycopg
import pytest
from hive_common.contracts import values
from hive_common.contracts.events import JobCancelRequested
from hive_common.contracts.messages import AttemptReport
from hive_common.kernel.errors import HiveError
from hive_proto.jobs.v1 import jobs_pb2

LOG_LOCK = 29387505148686183
"""What `log_append` takes (migrations/0001_log.sql)."""
TIME_TO_BE_WRONG_S = 0.3
"""An answer that does not wait for the commit leaves before the commit is even sent."""
WAITING = f"""
SELECT count(*) FROM pg_locks
 WHERE locktype = 'advisory' AND NOT granted AND ((classid::bigint << 32) | objid::bigint) = {LOG_LOCK}
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@contextlib.asynccontextmanager
async def no_commits(cluster):
    """Hold the log's lock; yields a function that waits until somebody wants to commit."""
    dsn = cluster.database.dsn
    async with (
        await psycopg.AsyncConnection.connect(dsn) as holder,
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as observer,
    ):
        await holder.execute(f"SELECT pg_advisory_xact_lock({LOG_LOCK})")

        async def wanted():
            while (await (await observer.execute(WAITING)).fetchone()) == (0,):
                await asyncio.sleep(0.01)
            await asyncio.sleep(TIME_TO_BE_WRONG_S)

        yield wanted
        await holder.rollback()


@pytest.fixture
async def idle(cluster, control):
    """An executor that registered and does nothing by itself."""
    return await cluster.executor("one", {}, start=False)


async def assigned(fake):
    while not (reply := await fake.pull(fake.pull_request())).assignments:
        await asyncio.sleep(0.02)
    return reply.assignments[0]


async def test_a_submit_is_not_acknowledged_before_it_is_committed(cluster, control, one_step):
    async with no_commits(cluster) as wanted:
        submitting = asyncio.create_task(control.submit(one_step))
        await wanted()
        assert not submitting.done(), "acknowledged, and not in the log"
    assert (await cluster.log(await submitting))[0].type == "JobSubmitted"


async def test_a_cancel_is_not_acknowledged_before_it_is_committed(cluster, control, one_step):
    job_id = await control.submit(one_step)
    async with no_commits(cluster) as wanted:
        cancelling = asyncio.create_task(control.rpc("Cancel", jobs_pb2.CancelRequest(job_id=job_id)))
        await wanted()
        assert not cancelling.done(), "acknowledged, and not in the log"
    await cancelling
    assert "JobCancelRequested" in {stored.type for stored in await cluster.log(job_id)}


async def test_an_attempt_is_not_given_out_before_it_is_committed(cluster, control, idle, one_step):
    await control.submit(one_step)
    while "TaskCreated" not in {stored.type for stored in await cluster.log()}:
        await asyncio.sleep(0.01)
    async with no_commits(cluster) as wanted:
        pulling = asyncio.create_task(idle.pull(idle.pull_request()))
        await wanted()
        assert not pulling.done(), "given out, and not in the log"
    (assignment,) = (await pulling).assignments
    assert [stored.type for stored in await cluster.log(assignment.task)] == ["TaskCreated", "TaskAssigned"]


async def test_a_report_is_not_answered_before_it_is_committed(cluster, control, idle, one_step):
    await control.submit(one_step)
    assignment = await assigned(idle)
    done = AttemptReport(assignment.task, assignment.attempt, idle.session, "succeeded", output=values.inline(b"9"))
    async with no_commits(cluster) as wanted:
        reporting = asyncio.create_task(idle.report(done))
        await wanted()
        assert not reporting.done(), "answered, and not in the log: the executor would forget it"
    assert [result.verdict for result in (await reporting).results] == ["accepted"]
    assert (await cluster.log(assignment.task))[-1].type == "TaskSucceeded"


async def test_a_report_on_a_job_that_somebody_else_moved_is_not_written(cluster, one_step):
    """The leader's lock is one layer; the version of the job's stream, which every append carries, the other."""
    control = cluster.control_process()
    await cluster.publish(*agents())
    await control.start()
    idle = await cluster.executor("one", {}, start=False)
    # Two tasks: the end of the first says nothing on the job's own stream.
    two = {**one_step, "input": {"n": 3, "each": [1, 2]}}
    two["tasks"] = [{**one_step["tasks"][0], "fork": "${input.each}"}]
    job_id = await control.submit(two)
    assignment = await assigned(idle)
    await cluster.append(job_id, 2, JobCancelRequested("by a second leader"))
    done = AttemptReport(assignment.task, assignment.attempt, idle.session, "succeeded", output=values.inline(b"9"))
    with contextlib.suppress(HiveError):
        assert (await idle.report(done)).error is not None
    assert [stored.type for stored in await cluster.log(assignment.task)] == ["TaskCreated", "TaskAssigned"]
    async with asyncio.timeout(20):
        assert await control.process.wait() == 1, "what it believes is not what the log says: it ends"


def agents():
    from hive_common.artifacts.manifest import AgentManifest

    return [AgentManifest(name="square", version="1.0.0", runtime="python", entry="agent.py")]
