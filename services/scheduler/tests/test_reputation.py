"""Reputation with a real log: what the leader knows, what the tables say, and what a replay of the log gives."""

import asyncio
from typing import Any

import msgspec
import psycopg
import pytest
from hive_common.contracts import events
from hive_common.contracts.events import ExecutorTrusted, TaskDecided
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.judgement.reputation import TRUSTED_AFTER
from hive_common.rpc.client import bearer, call
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc
from hive_scheduler.reputation_views import ReputationProjection

from .conftest import KEY, agent, succeeded

TABLES = {
    "reputation": "SELECT * FROM scheduler.reputation ORDER BY ns, executor",
    "reputation_of_agents": "SELECT * FROM scheduler.reputation_of_agents ORDER BY ns, executor, agent",
}


def job(count: int, **quorum: Any) -> dict[str, Any]:
    """Return a job of `count` tasks of which two results have to agree."""
    task = {
        **{"id": "guess", "agent": "guess@1.0.0", "fork": "${input}", "input": "${item}"},
        "verify": {"quorum": {"k": 2, "of": 2, "extend_to": 3, **quorum}},
        "speculate": {"distinct": "executor"},
    }
    return {
        **{"apiVersion": "hive/v1", "kind": "Job", "name": "guesses", "input": list(range(count)), "tasks": [task]},
        "output": "${tasks.guess.output}",
    }


def honest(assignment: Any, given: int) -> int:
    return given * given


async def slow(assignment: Any, given: int) -> None:
    await asyncio.sleep(60)


def liar(assignment: Any, given: int) -> int:
    return -given - 1


@pytest.fixture
async def control(cluster: Any, control: Any) -> Any:
    await cluster.publish(agent("guess"))
    return control


async def reputations(control: Any, agents_of: str = "") -> dict[str, Any]:
    stub: Any = executors_pb2_grpc.PresenceStub(control.channel)
    request = executors_pb2.PresenceRequest(agents_of=agents_of)
    answer = await call(stub.List(request, metadata=bearer(KEY), timeout=10))
    return {one.executor_id: one.reputation for one in answer.executors}


async def standings(control: Any) -> dict[str, str]:
    return {executor: one.standing for executor, one in (await reputations(control)).items()}


async def tables(cluster: Any) -> dict[str, list[Any]]:
    async with await psycopg.AsyncConnection.connect(
        cluster.database.role_dsn("scheduler"), autocommit=True
    ) as conn:
        return {name: await (await conn.execute(query)).fetchall() for name, query in TABLES.items()}


async def forget(cluster: Any) -> None:
    async with await psycopg.AsyncConnection.connect(
        cluster.database.role_dsn("scheduler"), autocommit=True
    ) as conn:
        await conn.execute("TRUNCATE scheduler.reputation, scheduler.reputation_of_agents")
        await conn.execute("UPDATE scheduler.projections SET position = 0 WHERE name = 'reputation'")


async def project(cluster: Any, batch_events: int) -> None:
    dsn, reader = cluster.database.role_dsn("scheduler"), cluster.reader
    projection = ReputationProjection(reader)
    runner = ProjectionRunner(dsn, reader, projection, "scheduler", batch_events=batch_events)
    running = asyncio.create_task(runner.run())
    await runner.wait_for(await reader.head())
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def in_tables(cluster: Any, known: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the tables once they say what the leader knows: they are written a moment later."""
    wanted = {
        executor: (one.valid, one.invalid, one.late, one.lost, one.standing == "quarantined")
        for executor, one in known.items()
        if one.valid or one.invalid or one.late or one.lost
    }
    async with asyncio.timeout(60):
        while True:
            found = await tables(cluster)
            if {row[1]: (*row[5:9], row[4]) for row in found["reputation"]} == wanted:
                return found
            await asyncio.sleep(0.05)


async def run(control: Any, document: dict[str, Any]) -> Any:
    ended = await control.finish(await control.submit(document))
    assert ended.state == "succeeded", ended.error_message
    return msgspec.json.decode(ended.output_json)


async def test_liars_come_into_quarantine_and_the_log_says_the_same_to_the_next_leader(cluster, control):
    good = [await cluster.executor(name, {"guess": honest}) for name in ("one", "two")]
    bad = await cluster.executor("bad", {"guess": liar})
    async with asyncio.timeout(60):
        while (await standings(control)).get(bad.id) != "quarantined":
            assert await run(control, job(3)) == [0, 1, 4]
    known = await reputations(control, bad.id)
    assert [known[one.id].invalid for one in good] == [0, 0]
    assert known[bad.id].invalid >= 2 and known[bad.id].in_a_row == 0
    assert [(one.agent, one.invalid) for one in known[bad.id].agents] == [("guess@1.0.0", known[bad.id].invalid)]
    written = await in_tables(cluster, known)
    assert {row[2] for row in written["reputation"]} == {row[3] for row in written["reputation_of_agents"]}
    assert "" not in {row[2] for row in written["reputation"]}, "whose the executors are"
    for executor in (*good, bad):
        await executor.stop()

    await control.shut_down()
    await control.start()
    assert await reputations(control, bad.id) == known, "from the tables"
    await control.shut_down()
    await forget(cluster)
    await project(cluster, batch_events=1)
    assert await tables(cluster) == written, "however the log is cut into batches"
    await forget(cluster)
    await control.start()
    assert await reputations(control, bad.id) == known, "from the log alone"
    assert await in_tables(cluster, known) == written

    position = await cluster.append(bad.id, 3, ExecutorTrusted("a new memory module"))
    await cluster.hint(position, "ExecutorTrusted")
    async with asyncio.timeout(60):
        while (await standings(control)).get(bad.id, "new") != "new":
            await asyncio.sleep(0.02)
    written = await in_tables(cluster, await reputations(control))
    assert bad.id not in {row[1] for rows in written.values() for row in rows}


async def test_one_result_of_an_executor_that_is_trusted_is_enough(cluster, control):
    for name in ("one", "two"):
        await cluster.executor(name, {"guess": honest})
    decided: list[TaskDecided] = []
    async with asyncio.timeout(60):
        while not any(one.trust for one in decided):
            assert len(await run(control, job(TRUSTED_AFTER, adaptive=True))) == TRUSTED_AFTER
            stored = [one for one in await cluster.log() if one.type == "TaskDecided"]
            found = [events.decode(one.type, one.schema, one.payload) for one in stored]
            decided = [one for one in found if isinstance(one, TaskDecided)]
    extended = [one for one in await cluster.log() if one.type == "TaskExtended"]
    reasons = {events.decode(one.type, one.schema, one.payload).reason for one in extended}
    assert reasons == {"check"}, "no second attempt is made before it is known whose result the first is"
    assert len(extended) == sum(not one.trust for one in decided)
    first = next(one for one in decided if one.trust)
    assert first.trust >= TRUSTED_AFTER
    assert (first.decision.rule.k, len(first.decision.candidates)) == (1, 1)
    checked = [one.decision for one in decided if not one.trust]
    assert len(checked) >= TRUSTED_AFTER
    assert all(len({one.executor for one in each.candidates}) == 2 for each in checked)
    known = await reputations(control)
    assert sum(one.valid for one in known.values()) == 2 * len(checked), "a result taken on trust is not judged"


async def test_lost_and_late_results_are_counted_and_are_no_lies(cluster, control, one_step):
    fake = await cluster.executor("one", {"square": slow})
    job_id = await control.submit(one_step)
    async with asyncio.timeout(60):
        while not fake.replies or not any(reply.assignments for reply in fake.replies):
            await asyncio.sleep(0.02)
    (assignment,) = next(reply.assignments for reply in fake.replies if reply.assignments)
    await fake.stop()
    again = fake.restarted()
    again.agents = {"square": lambda assignment, given: 9}
    cluster.run(again)
    assert (await control.finish(job_id)).state == "succeeded"
    await fake.report(succeeded(assignment, fake.session, 8))
    known = await reputations(control)
    one = known[fake.id]
    assert (one.standing, one.valid, one.invalid, one.late, one.lost) == ("new", 0, 0, 1, 1)
    written = await in_tables(cluster, known)
    assert [row[2:4] for row in written["reputation_of_agents"]] == [("square@1.0.0", written["reputation"][0][2])]
