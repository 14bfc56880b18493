"""A scheduler whose artifact store loses answers, and whose own answers to pulls and reports are lost.

Jobs end as if nothing had happened, or are submitted again.
"""

import asyncio
import contextlib

import msgspec
import pytest
from hive_common.artifacts.store import FolderStore
from hive_common.bus import nats as bus
from hive_common.contracts import messages, values
from hive_common.contracts.messages import AttemptReport
from hive_common.kernel.errors import DeadlineExceeded, Unavailable
from hive_common.testing.answers import AnswersLost, every_other
from hive_common.testing.proxy import TcpProxy
from hive_common.testing.wire import nats_answered

from .conftest import agent, succeeded
from .test_faults import assert_the_laws_hold

TEXT = "x" * 100_000
JOB = {
    "apiVersion": "hive/v1",
    "kind": "Job",
    "name": "large",
    "input": {"numbers": [1, 2, 3, 4]},
    "tasks": [
        {"id": "square", "agent": "square@1.0.0", "fork": "${input.numbers}", "input": {"n": "${item}"}},
        {"id": "total", "needs": ["square"], "agent": "total@1.0.0", "input": {"all": "${tasks.square.output}"}},
    ],
    "output": "${tasks.total.output}",
}


async def test_values_that_are_too_large_for_messages_survive_a_store_that_loses_answers(cluster, monkeypatch):
    stores = []

    def open_store(root):
        stores.append(AnswersLost(FolderStore(root), every_other))
        return stores[0]

    monkeypatch.setattr("hive_scheduler.bootstrap.FolderStore", open_store)
    await cluster.publish(agent("square"), agent("total"))
    control = cluster.control()
    await control.start()
    store = FolderStore(control.config.artifacts_dir)

    async def total(assignment, given):
        assert given is None  # by digest
        parts = msgspec.json.decode(await store.get(assignment.input.digest))["all"]
        raw = values.encode_json([sum(part["n"] for part in parts), TEXT * 3])
        await store.put(raw)
        (fake,) = cluster.executors
        return AttemptReport(
            assignment.task, assignment.attempt, fake.session, "succeeded", output=values.by_digest(raw)
        )

    fake = await cluster.executor(
        "one", {"square": lambda a, given: {"n": given["n"], "text": TEXT}, "total": total}
    )
    job_id = await control.submit(JOB)
    job = await control.finish(job_id)
    assert job.state == "succeeded"
    assert msgspec.json.decode(await store.get(job.output_digest)) == [10, TEXT * 3]
    assert stores[0].lost["put"] and stores[0].lost["size"]
    assert len(fake.ran) == len(set(fake.ran)) == 5
    counts = await assert_the_laws_hold(cluster)
    assert (counts["TaskSucceeded"], counts["JobSucceeded"], counts["AttemptSucceeded"]) == (5, 1, 5)


async def test_a_submit_that_met_a_lost_answer_is_repeated_with_its_key(cluster, monkeypatch):
    monkeypatch.setattr(
        "hive_scheduler.bootstrap.FolderStore", lambda root: AnswersLost(FolderStore(root), every_other)
    )
    await cluster.publish(agent("square"), agent("total"))
    control = cluster.control()
    await control.start()
    await cluster.executor("one", {"square": lambda a, given: 1})
    document = {**JOB, "tasks": JOB["tasks"][:1], "output": "${input.text}"}
    digest = await FolderStore(control.config.artifacts_dir).put(
        values.encode_json({"numbers": [1], "text": TEXT * 3})
    )
    job_id, refused = None, 0
    while job_id is None:
        try:
            job_id = await control.submit(document, idempotency_key="k", input_digest=digest)
        except Unavailable:
            refused += 1
            assert refused < 10
    assert refused > 0
    assert (await control.finish(job_id)).state == "succeeded"
    counts = await assert_the_laws_hold(cluster)
    assert (counts["JobSubmitted"], counts["JobSucceeded"]) == (1, 1)


async def lost(proxy, ask):
    """Ask until an answer was lost on the way; on a busy machine the time may be over before it comes."""
    cut = proxy.cut_next_answer(nats_answered)
    while not cut.is_set():
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await ask()


async def again(ask):
    while True:
        with contextlib.suppress(DeadlineExceeded, Unavailable):
            return await ask()
        await asyncio.sleep(0.05)


async def test_pulls_and_reports_whose_answers_are_lost_are_asked_again(cluster, control, one_step):
    fake = await cluster.executor("one", {}, start=False)
    async with TcpProxy(cluster.nats.port) as proxy:
        config = msgspec.structs.replace(
            cluster.nats.issuer.executor(fake.id, cluster.folder), url=f"nats://127.0.0.1:{proxy.port}"
        )
        fake.client = await bus.connect(config, fake.id, inbox=messages.inbox_prefix(fake.id))
        job_id = await control.submit(one_step)
        # The assignment is committed, and nobody hears of it: the next pull does not name it and is given it again.
        await lost(proxy, lambda: fake.pull(fake.pull_request(), 2.0))
        reply = None
        while reply is None or not reply.assignments:
            reply = await again(lambda: fake.pull(fake.pull_request(), 2.0))
        (assignment,) = reply.assignments
        assert assignment.attempt == 1
        report = succeeded(assignment, fake.session, 9)
        await lost(proxy, lambda: fake.report(report))
        result = await again(lambda: fake.report(report))
        assert [one.verdict for one in result.results] == ["accepted"]
        job = await control.finish(job_id)
        await fake.client.close()
    assert (job.state, job.attempts) == ("succeeded", 1)
    counts = await assert_the_laws_hold(cluster)
    assert (counts["TaskAssigned"], counts["AttemptSucceeded"], counts["AttemptLate"]) == (1, 1, 0)
