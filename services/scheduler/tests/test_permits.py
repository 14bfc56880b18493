"""What agents may do: refused at submit, checked again at each assignment, said in a token."""

import asyncio
import time

import pytest
from hive_common.contracts.permissions import NONE, HttpPermission, ModelPermission, Permissions
from hive_common.kernel.errors import FailedPrecondition, PermissionDenied
from hive_common.permissions.grants import Grant
from hive_common.permissions.tokens import Verifier, public_key
from hive_proto.jobs.v1 import jobs_pb2

from .conftest import TOKEN_KEY, agent

ASKED = {"model": {"names": ["small"], "max_tokens": 9}, "http": {"hosts": ["a.example", "b.example"]}}
MODEL = Permissions(model=ModelPermission(("small",), 9))
HTTP = Permissions(http=HttpPermission(("a.example", "b.example")))
NARROW = Permissions(http=HttpPermission(("b.example",)))


@pytest.fixture
def document(one_step):
    task = {**one_step["tasks"][0], "agent": "asks@1.0.0", "input": {}, "retry": {"max_attempts": 3}}
    return {**one_step, "tasks": [task], "output": None}


def claims(assignment, executor):
    verifier = Verifier(public_key(TOKEN_KEY))
    return verifier.verify(assignment.token, executor=executor, now_us=time.time_ns() // 1_000)


async def refused(control, document):
    with pytest.raises(PermissionDenied) as error:
        await control.submit(document)
    return error.value


async def test_a_job_that_needs_what_is_not_granted_is_refused_with_the_command(cluster, control, document):
    await cluster.publish(agent("asks", permissions=ASKED))
    head = await cluster.reader.head()
    error = await refused(control, document)
    assert error.fields["remedy"] == "hive agent grant asks model http"
    assert error.fields["permissions"] == ["model", "http"]
    assert "the permission `model`, which asks@1.0.0 asks for, is not granted" in error.message
    assert error.message.endswith("hive agent grant asks model http")
    await cluster.grant("asks", Grant(MODEL, MODEL))
    assert (await refused(control, document)).fields["remedy"] == "hive agent grant asks http"
    assert await cluster.reader.head() == head + 1


async def test_an_attempt_gets_a_token_with_what_was_asked_for_and_granted(cluster, control, document):
    await cluster.publish(agent("asks", permissions=ASKED))
    await cluster.grant("asks", Grant(MODEL, MODEL), Grant(NARROW, HTTP, ask=True))
    seen = []

    def run(assignment, given):
        seen.append(assignment)
        return {}

    executor = await cluster.executor("one", {"asks": run})
    job = await control.submit(document)
    assert (await control.finish(job)).state == "succeeded"
    (assignment,) = seen
    found = claims(assignment, executor.id)
    assert found.permissions == Permissions(model=MODEL.model, http=NARROW.http, asks=("http",))
    assert (found.job, found.task, found.attempt) == (job, assignment.task, 1)
    assert found.key == "nkey of one"
    assert assignment.agent.permissions == NONE
    with pytest.raises(PermissionDenied):
        claims(assignment, "another")


async def test_a_token_says_what_the_job_says_of_its_data_and_which_kill_order_was_known(
    cluster, control, document
):
    await cluster.publish(agent("asks", permissions=ASKED))
    await cluster.grant("asks", Grant(MODEL, MODEL), Grant(HTTP, HTTP))
    seen = []
    executor = await cluster.executor("one", {"asks": lambda assignment, given: seen.append(assignment) or {}})
    await control.finish(await control.submit(document, pin="pool", counts_only=True))
    # What the key says and what the document says hold both.
    pinned = {**document, "models": {"pin": "own-devices"}}
    await control.finish(await control.submit(pinned, pin="pool"))
    await cluster.order(cluster.kill_key.kill("agent", "other"))
    while not any(reply.kill for reply in executor.replies):
        await asyncio.sleep(0.01)
    await control.finish(await control.submit(document))
    said = [claims(assignment, executor.id) for assignment in seen]
    assert [(one.pin, one.counts_only, one.kill_epoch) for one in said] == [
        ("pool", True, 0),
        ("own-devices", False, 0),
        ("any", False, 1),
    ]


async def test_each_attempt_gets_a_token_of_its_own(cluster, control, document, fail):
    await cluster.publish(agent("asks", permissions=ASKED))
    await cluster.grant("asks", Grant(MODEL, MODEL), Grant(HTTP, HTTP))
    document["tasks"][0]["retry"] = {"max_attempts": 2, "backoff": "1ms"}
    seen = []

    def run(assignment, given):
        seen.append(assignment)
        if len(seen) == 1:
            raise fail("agent_error")
        return {}

    executor = await cluster.executor("one", {"asks": run})
    assert (await control.finish(await control.submit(document))).state == "succeeded"
    assert [claims(assignment, executor.id).attempt for assignment in seen] == [1, 2]


async def test_what_asks_for_nothing_gets_no_token(cluster, control, one_step):
    seen = []

    def run(assignment, given):
        seen.append(assignment.token)
        return {}

    await cluster.executor("one", {"square": run})
    assert (await control.finish(await control.submit({**one_step, "output": None}))).state == "succeeded"
    assert seen == [""]


async def test_a_grant_that_is_taken_back_keeps_attempts_from_being_given_out(cluster, control, document):
    await cluster.publish(agent("asks", permissions=ASKED))
    await cluster.grant("asks", Grant(MODEL, MODEL), Grant(HTTP, HTTP))
    job = await control.submit(document)
    position = await cluster.revoke("asks", "http")
    await known(control, document)
    ran = []
    await cluster.executor("one", {"asks": lambda assignment, given: ran.append(assignment) or {}})
    done = await control.finish(job)
    assert (done.state, done.error_code) == ("failed", "permission_denied")
    assert "`http`" in done.error_message and "hive agent grant asks http" in done.error_message
    assert ran == []
    assert position < await cluster.reader.head()
    assert [stored.type for stored in await cluster.log() if stored.type == "TaskAssigned"] == []


async def known(control, document):
    """Wait until the scheduler knows what was taken back, which a submit that is refused shows."""
    while True:
        try:
            extra = await control.submit(document)
        except PermissionDenied:
            return
        await control.rpc("Cancel", jobs_pb2.CancelRequest(job_id=extra, caller="me"))
        await asyncio.sleep(0.02)


async def test_an_attempt_whose_answer_was_lost_is_not_given_out_again_without_its_grant(cluster, document):
    await cluster.publish(agent("asks", permissions=ASKED))
    await cluster.grant("asks", Grant(MODEL, MODEL), Grant(HTTP, HTTP))
    # However slow this test is, nothing is lost by its lease.
    control = cluster.control(lease_ms=60_000)
    await control.start()
    executor = await cluster.executor("one", {}, start=False)
    job = await control.submit(document)
    first = await executor.pull(executor.pull_request(), 30)
    # With the grant, what did not arrive is sent again.
    again = await executor.pull(executor.pull_request(slots_free=0), 30)
    assert [claims(one, executor.id).attempt for one in (*first.assignments, *again.assignments)] == [1, 1]
    await cluster.revoke("asks", "model")
    await known(control, document)
    pull = asyncio.create_task(executor.pull(executor.pull_request(slots_free=0), 30))
    done = await control.finish(job)
    assert (done.state, done.error_code) == ("failed", "permission_denied")
    assert "`model`" in done.error_message
    assert not pull.done() or pull.result().assignments == ()
    pull.cancel()


async def test_an_expired_grant_is_named_with_its_time(cluster, control, document):
    await cluster.publish(agent("asks", permissions={"model": ASKED["model"]}))
    await cluster.grant("asks", Grant(MODEL, MODEL, until_us=1_000_000))
    error = await refused(control, document)
    assert "expired at 1970-01-01T00:00:01" in error.message
    assert error.fields["remedy"] == "hive agent grant asks model"


async def test_a_version_that_asks_for_more_needs_a_new_grant(cluster, control, document):
    await cluster.publish(agent("asks", permissions={"http": ASKED["http"]}))
    await cluster.grant("asks", Grant(NARROW, NARROW))
    error = await refused(control, document)
    assert "asks for more of the permission `http`" in error.message
    assert error.fields["remedy"] == "hive agent grant asks http"


async def test_without_a_key_for_tokens_nothing_is_promised(cluster, document):
    await cluster.publish(agent("asks", permissions=ASKED))
    control = cluster.control()
    control.config.extra.pop("token_key_file")
    await control.start()
    with pytest.raises(FailedPrecondition, match="token_key_file"):
        await control.submit(document)


async def test_a_scheduler_that_starts_knows_what_was_granted(cluster, document):
    await cluster.publish(agent("asks", permissions=ASKED))
    await cluster.grant("asks", Grant(MODEL, MODEL), Grant(HTTP, HTTP))
    await cluster.revoke("asks", "model")
    await cluster.grant("asks", Grant(MODEL, MODEL))
    control = cluster.control()
    await control.start()
    await cluster.executor("one", {"asks": lambda assignment, given: {}})
    assert (await control.finish(await control.submit(document))).state == "succeeded"
