"""Kill orders at the scheduler: what they name is placed no more, and what runs of it ends."""

import asyncio
from typing import Any

import msgspec
import pytest
from hive_common.artifacts.manifest import AgentManifest
from hive_common.contracts.events import KillOrdered
from hive_common.contracts.messages import KillOrder
from hive_common.control.kill_log import stream_of
from hive_common.control.verifier import FORGED, REFUSED
from hive_common.kernel.errors import FailedPrecondition
from hive_common.testing.kills import KillKey
from hive_proto.jobs.v1 import jobs_pb2


class Guest:
    """A task that runs until it is cancelled, or let go."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.ended = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self, assignment: Any, given: Any) -> Any:
        self.running.set()
        try:
            await self.go_on.wait()
            return 9
        finally:
            self.ended.set()


async def task_of(control: Any, job: str) -> str:
    while True:
        found = await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=job, limit=10))
        if found.tasks:
            return found.tasks[0].task_id
        await asyncio.sleep(0.01)


async def test_a_stopped_job_ends_as_cancelled_and_says_why(cluster, control, one_step) -> None:
    guest = Guest()
    await cluster.executor("laptop", {"square": guest})
    job = await control.submit(one_step)
    await guest.running.wait()
    await cluster.order(cluster.kill_key.kill("job", job, "it deletes things"))
    await guest.ended.wait()
    found = await control.finish(job)
    assert found.state == "cancelled"
    assert "stopped by kill order 1 (it deletes things)" in str((await cluster.log(job))[-1].payload)


async def test_tasks_of_a_stopped_agent_fail_by_name_and_no_job_of_it_is_taken(cluster, control, one_step) -> None:
    guest = Guest()
    await cluster.executor("laptop", {"square": guest})
    job = await control.submit(one_step)
    await guest.running.wait()
    await cluster.order(cluster.kill_key.kill("agent", "square@1.0.0", "hostile"))
    await guest.ended.wait()
    found = await control.finish(job)
    assert (found.state, found.error_code) == ("failed", "killed")
    assert "agent square@1.0.0 is stopped by kill order 1 (hostile)" in found.error_message
    with pytest.raises(FailedPrecondition, match=r"hive unkill --agent square@1\.0\.0"):
        await control.submit(one_step)
    await cluster.order(cluster.kill_key.lift("agent", "square@1.0.0"))
    guest.go_on.set()
    while True:
        try:
            again = await control.submit(one_step)
            break
        except FailedPrecondition:
            await asyncio.sleep(0.01)
    assert (await control.finish(again)).state == "succeeded"


async def test_a_stopped_executor_gets_nothing_and_its_tasks_go_to_another(cluster, control, one_step) -> None:
    here, there = Guest(), Guest()
    there.go_on.set()
    laptop = await cluster.executor("laptop", {"square": here})
    job = await control.submit(one_step)
    await here.running.wait()
    await cluster.executor("desktop", {"square": there})
    await cluster.order(cluster.kill_key.kill("executor", laptop.id))
    await here.ended.wait()
    assert (await control.finish(job)).state == "succeeded"
    task = await task_of(control, job)
    assert [stored.type for stored in await cluster.log(task)][2:] == [
        "AttemptLost",
        "TaskRetryScheduled",
        "TaskAssigned",
        "AttemptSucceeded",
        "TaskSucceeded",
    ]
    answer = msgspec.json.decode((await cluster.log(task))[2].payload)
    assert answer["reason"] == "killed"


async def test_everything_stopped_waits_and_goes_on_when_the_order_is_lifted(cluster, control, one_step) -> None:
    guest = Guest()
    # With one slot it is one guest that begins and ends, and no other one afterwards.
    laptop = await cluster.executor("laptop", {"square": guest}, slots=1)
    job = await control.submit(one_step)
    await guest.running.wait()
    # More often than an attempt may be lost: orders do not count against a task.
    for _ in range(5):
        await cluster.order(cluster.kill_key.kill("all"))
        await guest.ended.wait()
        waiting = await control.submit(one_step)
        guest.running.clear()
        guest.ended.clear()
        task = await task_of(control, waiting)
        explained = await control.rpc("Explain", jobs_pb2.ExplainRequest(task_id=task))
        candidates = msgspec.json.decode(explained.explanation_json)["candidates"]
        assert [one["reason"] for one in candidates] == ["killed"]
        await cluster.order(cluster.kill_key.lift("all"))
        await guest.running.wait()
    guest.go_on.set()
    assert (await control.finish(job)).state == "succeeded"
    assert laptop.replies[-1].kill is not None


async def test_an_executor_that_knows_more_makes_the_scheduler_look(cluster, control, one_step) -> None:
    """The hint that the log has grown is lost: what an executor says is enough."""
    laptop = await cluster.executor("laptop", {"square": Guest()}, start=False)
    signed = cluster.kill_key.kill("executor", laptop.id)
    await cluster.append(stream_of("default"), 1, cluster.kill_key.event(signed))
    reply = await laptop.pull(laptop.pull_request(kill_epoch=1, slots_free=0))
    assert reply.kill is None
    reply = await laptop.pull(laptop.pull_request())
    assert reply.kill == signed


async def test_an_order_that_nobody_signed_is_not_obeyed_even_from_the_log(cluster, control, one_step) -> None:
    before = REFUSED.labels(FORGED)._value.get()
    forged = KillKey().kill("all")
    await cluster.append(stream_of("default"), 1, KillOrdered(1, forged.order, forged.signature))
    guest = Guest()
    guest.go_on.set()
    await cluster.executor("laptop", {"square": guest})
    while REFUSED.labels(FORGED)._value.get() == before:
        await asyncio.sleep(0.01)
    assert (await control.finish(await control.submit(one_step))).state == "succeeded"


async def test_a_new_leader_knows_what_is_stopped(cluster, one_step) -> None:
    await cluster.publish(AgentManifest(name="square", version="1.0.0", runtime="python", entry="agent.py"))
    first = cluster.control_process()
    await first.start()
    guest = Guest()
    laptop = await cluster.executor("laptop", {"square": guest})
    job, other = await first.submit(one_step), await first.submit(one_step)
    await guest.running.wait()
    await first.crash()
    await cluster.order(cluster.kill_key.kill("executor", laptop.id))
    await cluster.order(cluster.kill_key.kill("job", other))
    second = cluster.control()
    await second.start()
    await guest.ended.wait()
    assert (await second.finish(other)).state == "cancelled"
    assert (await second.get(job)).state == "running"


def test_an_order_is_told_as_it_was_signed() -> None:
    key = KillKey()
    signed = key.kill("all", reason="drill")
    assert msgspec.json.decode(msgspec.json.encode(signed), type=KillOrder) == signed
