"""Canaries: executors are given tasks with known answers among the others, and are judged by what they answer."""

import asyncio
from typing import Any

import msgspec
import pytest
from hive_common.contracts import events
from hive_common.contracts.events import CanaryAdded, CanaryJudged, JobSubmitted
from hive_common.contracts.messages import Assignment
from hive_common.judgement import reputation as rules
from hive_common.kernel.errors import Conflict, FailedPrecondition, HiveError, InvalidArgument, NotFound
from hive_common.rpc.client import bearer, call
from hive_proto.canaries.v1 import canaries_pb2, canaries_pb2_grpc
from hive_proto.jobs.v1 import jobs_pb2
from hive_scheduler import canaries

from .conftest import KEY, agent
from .test_reputation import forget, in_tables, project, reputations, standings, tables

ASKED = {"n": 12}


def job(**fields: Any) -> dict[str, Any]:
    task = {"id": "work", "agent": "square@1.0.0", "input": "${input}", "timeout": "7s", **fields}
    return {
        **{"apiVersion": "hive/v1", "kind": "Job", "name": "real", "input": {"n": 3}, "tasks": [task]},
        **{"output": "${tasks.work.output}", "priority": "high"},
    }


def honest(assignment: Any, given: Any) -> dict[str, int]:
    return {"square": given["n"] ** 2}


def liar(assignment: Any, given: Any) -> dict[str, int]:
    return {"square": given["n"] ** 2 + 1}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody gets one whenever there is one, and none is still under way."""
    monkeypatch.setattr(rules, "CANARY_NEW", 1.0)
    monkeypatch.setattr(rules, "CANARY_KNOWN", 1.0)
    monkeypatch.setattr(canaries, "PAUSE_MS", 0)


async def rpc(control: Any, method: str, request: Any) -> Any:
    stub: Any = canaries_pb2_grpc.CanariesStub(control.channel)
    return await call(getattr(stub, method)(request, metadata=bearer(KEY), timeout=10))


async def add(control: Any, given: Any = ASKED, answer: bytes = b'{"square": 144.0}', **fields: Any) -> Any:
    known = {"agent": "square@1.0.0", "input_json": msgspec.json.encode(given), "answer_json": answer}
    return await rpc(control, "Add", canaries_pb2.AddRequest(**{**known, "caller": "me", **fields}))


async def of_type(cluster: Any, kind: type[events.Event]) -> list[Any]:
    return [
        events.decode(one.type, one.schema, one.payload)
        for one in await cluster.log()
        if one.type == kind.__name__ and one.payload is not None
    ]


async def judged(cluster: Any, count: int) -> list[CanaryJudged]:
    """Return what canaries said of executors once there is so much of it."""
    async with asyncio.timeout(60):
        while len(found := await of_type(cluster, CanaryJudged)) < count:
            await asyncio.sleep(0.02)
    return found


async def until_ended(control: Any) -> list[Any]:
    """Return all jobs once they have ended."""
    async with asyncio.timeout(60):
        while True:
            found = (await control.rpc("List", jobs_pb2.ListRequest(all=True))).jobs
            if all(one.ended_us for one in found):
                return list(found)
            await asyncio.sleep(0.02)


async def test_a_liar_is_in_quarantine_after_two_and_every_leader_and_replay_says_so(cluster, control):
    canary = await add(control)
    bad = await cluster.executor("bad", {"square": liar})
    for count in (1, 2):
        assert (await control.finish(await control.submit(job()))).state == "succeeded"
        found = await judged(cluster, count)
        assert found[-1] == CanaryJudged(bad.id, "square@1.0.0", "invalid", found[-1].task)
        await until_ended(control)
    assert (await standings(control))[bad.id] == "quarantined"
    known = await reputations(control, bad.id)
    assert (known[bad.id].valid, known[bad.id].invalid) == (0, 2)
    written = await in_tables(cluster, known)

    await control.shut_down()
    await forget(cluster)
    await project(cluster, batch_events=1)
    assert await tables(cluster) == written, "from the log alone"
    await control.start()
    assert await reputations(control, bad.id) == known
    assert [one.canary_id for one in (await rpc(control, "List", canaries_pb2.ListRequest())).canaries] == [
        canary.canary_id
    ]
    # It works for its owner still, and gets no more of them.
    assert (await control.finish(await control.submit(job()))).state == "succeeded"
    await until_ended(control)
    assert len(await of_type(cluster, CanaryJudged)) == 2


async def test_one_looks_like_a_real_task_and_an_honest_answer_is_valid(cluster, control):
    await add(control)
    good = await cluster.executor("good", {"square": honest})
    ended = await control.finish(await control.submit(job()))
    (found,) = await judged(cluster, 1)
    assert found == CanaryJudged(good.id, "square@1.0.0", "valid", found.task)
    assert (await reputations(control))[good.id].valid == 1
    real, canary = [one for reply in good.replies for one in reply.assignments]
    assert canary.task == found.task
    assert msgspec.json.decode(canary.input.raw or b"") == ASKED
    ids = ("task", "job", "input")
    blank: Assignment = msgspec.structs.replace(real, **{name: getattr(canary, name) for name in ids})
    assert blank == canary, "nothing but ids and its input tells it from others"

    everything = await until_ended(control)
    listed = (await control.rpc("List", jobs_pb2.ListRequest())).jobs
    assert [one.job_id for one in listed] == [ended.job_id]
    assert {one.job_id: bool(one.canary) for one in everything} == {ended.job_id: False, canary.job: True}
    submitted = {one.name: one for one in await of_type(cluster, JobSubmitted)}
    assert (submitted["canary"].caller, submitted["canary"].priority) == ("canary", "high")
    assert not any(b"144" in (one.payload or b"") for one in await cluster.log() if one.type in canaries.TYPES)


async def test_what_fails_is_lost_and_judges_nobody(cluster, control, fail):
    def refuses(assignment: Any, given: Any) -> dict[str, int]:
        if given == ASKED:
            raise fail("agent_error", "no")
        return honest(assignment, given)

    await add(control)
    one = await cluster.executor("one", {"square": refuses})
    await control.finish(await control.submit(job()))
    assert [found.ending for found in await judged(cluster, 1)] == ["lost"]
    known = (await reputations(control))[one.id]
    assert (known.valid, known.invalid, known.lost) == (0, 0, 1)


async def test_a_removed_one_is_given_to_nobody_and_judges_nobody(cluster, control):
    holds = asyncio.Event()
    asked = asyncio.Event()

    async def slowly(assignment: Any, given: Any) -> dict[str, int]:
        if given == ASKED:
            asked.set()
            await holds.wait()
        return liar(assignment, given)

    canary = await add(control)
    await cluster.executor("bad", {"square": slowly})
    await control.finish(await control.submit(job()))
    async with asyncio.timeout(30):
        await asked.wait()
    for _ in range(2):  # asked again, nothing changes
        removed = await rpc(control, "Remove", canaries_pb2.RemoveRequest(canary_id=canary.canary_id))
        assert removed.removed
    holds.set()
    await control.finish(await control.submit(job()))
    assert sum(bool(one.canary) for one in await until_ended(control)) == 1
    assert await of_type(cluster, CanaryJudged) == []
    assert (await add(control)).canary_id == canary.canary_id, "it may come back"
    assert len(await of_type(cluster, CanaryAdded)) == 2


async def test_a_new_leader_goes_on_with_one_that_is_under_way(cluster, control):
    holds = asyncio.Event()
    asked = asyncio.Event()

    async def slowly(assignment: Any, given: Any) -> dict[str, int]:
        if given == ASKED:
            asked.set()
            await holds.wait()
        return honest(assignment, given)

    await add(control)
    good = await cluster.executor("good", {"square": slowly})
    await control.finish(await control.submit(job()))
    async with asyncio.timeout(30):
        await asked.wait()
    await control.shut_down()
    await control.start()
    # It has one of this agent still, and so it gets no second one.
    await control.finish(await control.submit(job()))
    assert sum(bool(one.canary) for one in (await control.rpc("List", jobs_pb2.ListRequest(all=True))).jobs) == 1
    holds.set()
    assert [one.ending for one in await judged(cluster, 1)] == ["valid"]
    await until_ended(control)
    assert (await reputations(control))[good.id].valid == 1


async def test_what_is_no_canary_is_refused_and_says_why(cluster, control, monkeypatch):
    shape = {"type": "object", "required": ["n"]}
    await cluster.publish(agent("strict", input=shape, output={"type": "integer"}))
    strict = {"agent": "strict@1.0.0", "given": {"n": 1}, "answer": b"1"}
    assert (await add(control, **strict)).agent == "strict@1.0.0"
    refusals: list[tuple[dict[str, Any], type[HiveError]]] = [
        ({"agent": "nobody@1.0.0"}, NotFound),
        ({"answer": b"{"}, InvalidArgument),
        ({"answer": b'"' + b"a" * 40_000 + b'"'}, InvalidArgument),
        ({"equal": "numeric"}, InvalidArgument),
        ({**strict, "given": {}}, InvalidArgument),
        ({**strict, "given": {"n": 2}, "answer": b'"1"'}, InvalidArgument),
        ({**strict, "answer": b"2"}, Conflict),
    ]
    for fields, error in refusals:
        with pytest.raises(error):
            await add(control, **fields)
    with pytest.raises(NotFound):
        await rpc(control, "Remove", canaries_pb2.RemoveRequest(canary_id="nothing"))
    monkeypatch.setattr(canaries, "OF_AGENT_MAX", 1)
    with pytest.raises(FailedPrecondition, match="has 1 canaries"):
        await add(control, **{**strict, "given": {"n": 3}})
    assert len(await of_type(cluster, CanaryAdded)) == 1
