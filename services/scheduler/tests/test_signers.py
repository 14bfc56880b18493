"""Whose agents are placed: refused at submit, looked at again at each assignment; and what was yanked."""

import asyncio

import pytest
from hive_common.kernel.errors import FailedPrecondition, PermissionDenied

from .conftest import AUTHOR, agent

STRANGER = "b1" * 32


@pytest.fixture
def document(one_step):
    task = {**one_step["tasks"][0], "agent": "a@1.0.0", "input": {}, "retry": {"max_attempts": 3}}
    return {**one_step, "tasks": [task], "output": None}


@pytest.fixture
async def executor(cluster, control):
    return await cluster.executor("one", {"a": lambda assignment, given: {}})


async def told(executor, position):
    """Return once the scheduler knows what stands at a position: it says so in its answers."""
    async with asyncio.timeout(60):
        while not any(reply.signers >= position for reply in executor.replies):
            await asyncio.sleep(0.01)


async def test_an_attempt_names_signer_and_signature(cluster, control, executor, document):
    await cluster.publish(agent("a"))
    seen = []
    executor.agents["a"] = lambda assignment, given: seen.append(assignment.agent) or {}
    job = await control.submit(document)
    assert (await control.finish(job)).state == "succeeded"
    assert (seen[0].signer, seen[0].signature[:7]) == (AUTHOR, "sha256:")


async def test_what_nobody_signed_is_refused_at_submit(cluster, control, executor, document):
    await cluster.publish(agent("other"))
    await cluster.publish(agent("a"), signer="")
    with pytest.raises(PermissionDenied, match=r"a@1\.0\.0: is not signed; push it again under a new version"):
        await control.submit(document)


async def test_what_a_key_signed_is_refused_until_it_is_trusted_and_after_it_no_longer_is(
    cluster, control, executor, document
):
    await cluster.publish(agent("a"), signer=STRANGER)
    with pytest.raises(PermissionDenied, match=f"nobody known here.*hive agent key trust {STRANGER}"):
        await control.submit(document)
    await cluster.trust(STRANGER, "ada")
    # No waiting: what was trusted a moment ago counts.
    job = await control.submit(document)
    assert (await control.finish(job)).state == "succeeded"
    await told(executor, await cluster.distrust(STRANGER, "stolen"))
    with pytest.raises(PermissionDenied, match=r"\(ada\), which is not trusted: stolen"):
        await control.submit(document)
    await cluster.trust(STRANGER, "ada", version=3)
    assert (await control.finish(await control.submit(document))).state == "succeeded"


async def test_a_task_that_waits_is_not_placed_after_its_signer_is_distrusted(cluster, control, executor, document):
    await cluster.publish(agent("a"))
    going, may_end = asyncio.Event(), asyncio.Event()

    async def run(assignment, given):
        going.set()
        await may_end.wait()
        return {}

    executor.agents["a"] = run
    first = {**document["tasks"][0], "id": "first"}
    second = {**document["tasks"][0], "id": "second", "needs": ["first"]}
    job = await control.submit({**document, "tasks": [first, second]})
    async with asyncio.timeout(60):
        await going.wait()
    await told(executor, await cluster.distrust(AUTHOR, "stolen"))
    may_end.set()
    ended = await control.finish(job)
    assert (ended.state, ended.error_code) == ("failed", "permission_denied")
    assert "which is not trusted: stolen" in ended.error_message
    assert len(executor.ran) == 1


async def test_a_yanked_version_is_refused_at_submit_and_what_runs_goes_on(cluster, control, executor, document):
    await cluster.publish(agent("a"))
    going, may_end = asyncio.Event(), asyncio.Event()

    async def run(assignment, given):
        going.set()
        await may_end.wait()
        return {}

    executor.agents["a"] = run
    first = {**document["tasks"][0], "id": "first"}
    second = {**document["tasks"][0], "id": "second", "needs": ["first"]}
    job = await control.submit({**document, "tasks": [first, second]})
    async with asyncio.timeout(60):
        await going.wait()
    await cluster.yank("a", "1.0.0", "it leaks")
    await told(executor, await cluster.trust(STRANGER, "ada"))
    with pytest.raises(
        FailedPrecondition, match=r"tasks\[0\]\.agent: a@1\.0\.0 was yanked: it leaks; expected another"
    ):
        await control.submit(document)
    may_end.set()
    assert (await control.finish(job)).state == "succeeded"
