"""Where attempts and judges run, and what is refused at submit, with a real log and a real bus."""

import asyncio
from typing import Any

import msgspec
import pytest
from hive_common.artifacts.manifest import AgentManifest
from hive_common.contracts import events
from hive_common.contracts.events import Capabilities, Child, ExecutorCapabilitiesChanged
from hive_common.contracts.permissions import ForkPermission, Permissions
from hive_common.kernel.errors import InvalidArgument
from hive_common.permissions.grants import Grant
from hive_proto.jobs.v1 import jobs_pb2

from .conftest import FakeExecutor, agent, succeeded


def job(**words: Any) -> dict[str, Any]:
    task = {"id": "square", "agent": "square@1.0.0", "input": {"n": 3}, **words}
    return {"apiVersion": "hive/v1", "kind": "Job", "name": "places", "tasks": [task]}


def square(assignment: Any, given: Any) -> Any:
    return given["n"] ** 2


def check(assignment: Any, given: Any) -> Any:
    return {"passed": given["output"] == 9}


AGENTS = {"square": square, "check": check, "senior": lambda assignment, given: {"choice": 0}}
NATIVE = AgentManifest(name="native", version="1.0.0", runtime="component", entry="agent.wasm")
TWO = {"verify": {"quorum": {"k": 2, "of": 2}}}


@pytest.fixture
async def control(cluster: Any, control: Any) -> Any:
    await cluster.publish(agent("check"), agent("senior"))
    return control


async def on_machine(cluster: Any, name: str, device: str, start: bool = True, **more: Any) -> FakeExecutor:
    """Start an executor on a machine; several may be on one."""
    found: FakeExecutor = await cluster.executor(name, AGENTS, start=start, device=device, **more)
    return found


async def assigned(cluster: Any, job_id: str) -> list[Any]:
    stored = [one for one in await cluster.log() if one.correlation == job_id and one.type == "TaskAssigned"]
    return [events.decode(one.type, one.schema, one.payload) for one in stored]


async def test_two_executors_of_one_machine_are_not_two_devices_and_a_second_machine_is(cluster, control):
    one = await on_machine(cluster, "one", "desktop")
    two = await on_machine(cluster, "two", "desktop")
    with pytest.raises(InvalidArgument, match="2 distinct devices, and there is 1") as refused:
        await control.submit(job(**TWO))
    assert refused.value.fields["path"] == "tasks[0].verify.quorum.of"
    by_executor = await control.finish(await control.submit(job(**TWO, speculate={"distinct": "executor"})))
    assert {one.executor for one in await assigned(cluster, by_executor.job_id)} == {one.id, two.id}
    # Another one joins, and nothing else has told the scheduler so.
    three = await on_machine(cluster, "three", "laptop")
    ended = await control.finish(await control.submit(job(**TWO)))
    assert ended.state == "succeeded"
    found = await assigned(cluster, ended.job_id)
    assert {one.device for one in found} == {"desktop", "laptop"}
    assert three.id in {one.executor for one in found}


async def test_a_judge_runs_on_another_machine_than_what_it_judges(cluster, control):
    for name, device in (("one", "desktop"), ("two", "desktop")):
        await on_machine(cluster, name, device)
    words = {"verify": {"test": {"agent": "check@1.0.0"}}}
    with pytest.raises(InvalidArgument, match="2 distinct devices") as refused:
        await control.submit(job(**words))
    assert refused.value.fields["path"] == "tasks[0].verify.test.agent"
    await on_machine(cluster, "three", "laptop")
    ended = await control.finish(await control.submit(job(**words)))
    assert {one.device for one in await assigned(cluster, ended.job_id)} == {"desktop", "laptop"}


async def test_explain_says_what_keeps_a_second_attempt_away(cluster, control):
    one = await on_machine(cluster, "one", "desktop")
    await on_machine(cluster, "two", "desktop")
    # The only other one that may have it is switched off.
    await on_machine(cluster, "three", "laptop", start=False)
    await on_machine(cluster, "four", "server", tier="core")
    job_id = await control.submit(job(**TWO, place={"tier": "worker"}))
    async with asyncio.timeout(60):
        while not await assigned(cluster, job_id):
            await asyncio.sleep(0.02)
    (task,) = {found.stream for found in await cluster.log() if found.type == "TaskCreated"}
    explained = await control.rpc("Explain", jobs_pb2.ExplainRequest(task_id=task))
    found = msgspec.json.decode(explained.explanation_json)
    reasons = {candidate["name"]: candidate.get("reason") for candidate in found["candidates"]}
    (decision,) = found["decisions"]
    first = "one" if decision["executor"] == one.id else "two"
    second = {"one": "two", "two": "one"}[first]
    assert reasons[first] == "same_executor"
    assert reasons[second] == "same_device"
    assert reasons["four"] == "tier_differs"
    assert reasons["three"] == "offline"


async def test_place_is_where_a_task_runs_and_one_that_is_nowhere_is_refused(cluster, control):
    await on_machine(cluster, "plain", "a")
    gpu = await on_machine(cluster, "gpu", "b", labels={"gpu": "yes"}, tier="core")
    for place in ({"tier": "core"}, {"executors": ["gpu"]}, {"executors": [gpu.id]}, {"labels": {"gpu": "yes"}}):
        ended = await control.finish(await control.submit(job(place=place)))
        assert [one.executor for one in await assigned(cluster, ended.job_id)] == [gpu.id]
    with pytest.raises(InvalidArgument, match="expected `plain`"):
        await control.submit(job(place={"executors": ["plane"]}))
    with pytest.raises(InvalidArgument, match="no executor has the label gpu=no"):
        await control.submit(job(place={"labels": {"gpu": "no"}}))


async def test_agents_of_judges_are_looked_for_like_others(cluster, control):
    for name in ("one", "two", "three"):
        await on_machine(cluster, name, name)
    with pytest.raises(InvalidArgument, match=r"did you mean check@1\.0\.0") as refused:
        await control.submit(job(verify={"test": {"agent": "chekc@1.0.0"}}))
    assert refused.value.fields["path"] == "tasks[0].verify.test.agent"


async def test_a_child_that_no_machine_could_run_is_refused_when_it_is_forked(cluster, control):
    forks = ForkPermission(("square", "native"), 3, 1)
    more = {"fork": {"agents": ["square", "native"], "max": 3}}
    await cluster.publish(agent("forker", permissions=more), NATIVE)
    await cluster.grant("forker", Grant(Permissions(fork=forks), Permissions(fork=forks)))
    fake = await on_machine(cluster, "one", "desktop", start=False, tier="edge")
    await on_machine(cluster, "two", "server", start=False, tier="core")

    may_go_on = asyncio.Event()
    may_go_on.set()

    async def forker(assignment: Any, given: Any) -> Any:
        await may_go_on.wait()
        done = succeeded(assignment, fake.session, 1)
        return msgspec.structs.replace(done, forks=(Child(given, msgspec.Raw(b'{"n": 1}')),))

    fake.agents = {**AGENTS, "forker": forker}
    cluster.run(fake)

    def forking(child: str, **words: Any) -> dict[str, Any]:
        return job(agent="forker@1.0.0", input=child, **words)

    ended = await control.finish(await control.submit(forking("native@1.0.0", place={"tier": "edge"})))
    assert (ended.state, ended.error_code) == ("failed", "invalid_output")
    assert ended.error_message == (
        "fork: no executor that the `place` of its step allows could ever run native@1.0.0 (hive executor list)"
    )
    created = [one for one in await cluster.log() if one.correlation == ended.job_id and one.type == "TaskCreated"]
    assert len(created) == 1
    # It may be for a machine that has only just joined.
    may_go_on.clear()
    waits = await control.submit(forking("native@1.0.0", place={"tier": "edge"}))
    three = await cluster.register("three", runtimes=("component",))
    edge = Capabilities("linux", "amd64", 4, 16 << 30, 4, ("component",), device="three", tier="edge")
    await cluster.append(three, 3, ExecutorCapabilitiesChanged(edge))
    may_go_on.set()
    async with asyncio.timeout(60):
        while len((await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=waits, limit=10))).tasks) < 2:
            await asyncio.sleep(0.02)
    ended = await control.finish(await control.submit(forking("square@1.0.0", place={"tier": "edge"})))
    assert ended.state == "succeeded"


async def test_judges_do_not_fork_whatever_their_agents_may(cluster, control):
    forks = ForkPermission(("square",), 3, 1)
    await cluster.publish(agent("forker", permissions={"fork": {"agents": ["square"], "max": 3}}))
    await cluster.grant("forker", Grant(Permissions(fork=forks), Permissions(fork=forks)))
    fake = await cluster.executor("one", AGENTS, start=False)

    def forker(assignment: Any, given: Any) -> Any:
        done = succeeded(assignment, fake.session, {"passed": True})
        return msgspec.structs.replace(done, forks=(Child("square@1.0.0", msgspec.Raw(b'{"n": 1}')),))

    fake.agents = {**AGENTS, "forker": forker}
    cluster.run(fake)
    words = {"verify": {"test": {"agent": "forker@1.0.0"}}, "speculate": {"distinct": "none"}}
    ended = await control.finish(await control.submit(job(**words)))
    assert (ended.state, ended.error_code) == ("failed", "judge_failed")
    assert "permission_denied" in ended.error_message
    created = [one for one in await cluster.log() if one.correlation == ended.job_id and one.type == "TaskCreated"]
    assert len(created) == 2
