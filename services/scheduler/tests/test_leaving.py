"""Machines that leave, or never come, while results of several are asked for: with a real log and a real bus."""

import asyncio
from typing import Any

import msgspec
import pytest
from hive_common.contracts.events import ExecutorRevoked
from hive_proto.jobs.v1 import jobs_pb2

from .conftest import agent
from .test_judged import decision, job, quorum, says, slow, told_by


@pytest.fixture
async def control(cluster: Any, control: Any) -> Any:
    await cluster.publish(agent("guess"), agent("check"))
    return control


async def waiting(control: Any, job_id: str, words: str) -> Any:
    """Return the task of a job that waits with these words."""
    async with asyncio.timeout(60):
        while True:
            found = await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=job_id, limit=10))
            for task in found.tasks:
                if task.waits_for == words:
                    return task
            await asyncio.sleep(0.02)


async def revoke(cluster: Any, executor: Any) -> None:
    position = await cluster.append(executor.id, 3, ExecutorRevoked("sold"))
    await cluster.hint(position, "ExecutorRevoked")


async def results(cluster: Any, job_id: str, count: int) -> None:
    """Wait until so many attempts of a job have succeeded."""
    async with asyncio.timeout(60):
        while True:
            found = [one for one in await cluster.log() if one.type == "AttemptSucceeded"]
            if len([one for one in found if one.correlation == job_id]) == count:
                return
            await asyncio.sleep(0.02)


THIRD = "waits for a third device: 2 of 3 that may run it are there"


async def test_a_job_says_which_machine_it_waits_for_and_goes_on_when_a_new_one_comes(cluster, control):
    for name in ("one", "two"):
        await cluster.executor(name, says(42))
    away = await cluster.executor("three", says(42), start=False)
    job_id = await control.submit(job(verify=quorum(k=3)))
    task = await waiting(control, job_id, f"{THIRD} (three is offline)")
    explained = await control.rpc("Explain", jobs_pb2.ExplainRequest(task_id=task.task_id))
    assert msgspec.json.decode(explained.explanation_json)["waits_for"] == f"{THIRD} (three is offline)"
    await cluster.order(cluster.kill_key.kill("executor", away.id, "stolen"))
    await waiting(control, job_id, f"{THIRD} (three is stopped by an order)")
    await cluster.executor("four", says(42))
    ended = await control.finish(job_id)
    assert ended.state == "succeeded"
    found = await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=job_id, limit=10))
    assert [one.waits_for for one in found.tasks] == [""]


async def test_a_machine_that_was_away_is_waited_for(cluster, control):
    for name in ("one", "two"):
        await cluster.executor(name, says(42))
    away = await cluster.executor("three", says(42), start=False)
    job_id = await control.submit(job(verify=quorum(k=3)))
    await waiting(control, job_id, f"{THIRD} (three is offline)")
    cluster.run(away)
    assert (await control.finish(job_id)).state == "succeeded"


async def test_a_quorum_that_a_revoked_machine_was_needed_for_fails_at_once(cluster, control):
    for name in ("one", "two"):
        await cluster.executor(name, says(42))
    away = await cluster.executor("three", says(42), start=False)
    job_id = await control.submit(job(verify=quorum(k=3)))
    await waiting(control, job_id, f"{THIRD} (three is offline)")
    await revoke(cluster, away)
    ended = await control.finish(job_id)
    assert (ended.state, ended.error_code) == ("failed", "no_quorum")
    assert ended.error_message.endswith("1 more was to come, and no device is left that may run it")
    made = decision(await told_by(cluster, job_id))
    assert (made.outcome, made.coming, made.gone, len(made.candidates)) == ("failed", 1, 1, 2)


async def test_the_rest_decides_where_it_can(cluster, control):
    for name, value in (("one", 1), ("two", 1), ("three", 2)):
        await cluster.executor(name, says(value))
    away = await cluster.executor("four", says(2), start=False)
    job_id = await control.submit(job(verify=quorum(k=2, of=4)))
    # With a fourth it could be two against two.
    await waiting(control, job_id, "waits for a fourth device: 3 of 4 that may run it are there (four is offline)")
    await results(cluster, job_id, 3)
    await revoke(cluster, away)
    ended = await control.finish(job_id)
    assert msgspec.json.decode(ended.output_json) == 1
    made = decision(await told_by(cluster, job_id))
    assert (made.outcome, made.gone, len(made.votes), len(made.candidates)) == ("decided", 1, 2, 3)


async def test_what_a_revoked_machine_had_is_not_waited_for(cluster, control):
    await cluster.executor("one", says(1))
    await cluster.executor("two", says(2))
    running = asyncio.Event()

    async def held(assignment: Any, given: Any) -> Any:
        running.set()
        await slow(assignment, given)

    lost = await cluster.executor("three", {"guess": held})
    job_id = await control.submit(job(verify=quorum()))
    await results(cluster, job_id, 2)
    await running.wait()
    await revoke(cluster, lost)
    ended = await control.finish(job_id)
    assert (ended.state, ended.error_code) == ("failed", "no_quorum")


async def test_a_judge_that_nobody_is_left_for_fails_and_its_task_says_so(cluster, control):
    await cluster.executor("one", says(42))
    judge = await cluster.executor("two", {}, start=False)
    words = {"verify": {"test": {"agent": "check@1.0.0"}}}
    job_id = await control.submit(job(**words))
    await waiting(
        control,
        job_id,
        "waits for an executor that made nothing of what it judges: none is there (two is offline)",
    )
    await revoke(cluster, judge)
    ended = await control.finish(job_id)
    assert (ended.state, ended.error_code) == ("failed", "judge_failed")
    assert "no executor is left that may run it" in ended.error_message


async def test_a_leader_that_takes_over_later_decides_the_same(cluster, control):
    for name in ("one", "two"):
        await cluster.executor(name, says(42))
    away = await cluster.executor("three", says(42), start=False)
    job_id = await control.submit(job(verify=quorum(k=3)))
    await results(cluster, job_id, 2)
    await control.shut_down()
    await cluster.append(away.id, 3, ExecutorRevoked("sold"))
    again = cluster.control()
    await again.start()
    ended = await again.finish(job_id)
    assert (ended.state, ended.error_code) == ("failed", "no_quorum")
    assert decision(await told_by(cluster, job_id)).gone == 1
