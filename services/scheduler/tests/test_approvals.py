"""Attempts that wait for a person: who may ask and decide, what time counts, and what survives."""

import asyncio
import time

import msgspec
import psycopg
import pytest
from hive_common.bus import nats as bus
from hive_common.contracts import events, messages, values
from hive_common.contracts.events import AgentRef, JobSubmitted
from hive_common.contracts.limits import APPROVALS_PER_TASK_MAX
from hive_common.contracts.messages import ApproveReply, ApproveRequest, AttemptKey
from hive_common.contracts.permissions import HttpPermission, Permissions
from hive_common.kernel.errors import (
    Conflict,
    FailedPrecondition,
    HiveError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from hive_common.permissions.actions import http_action
from hive_common.permissions.grants import Grant
from hive_common.permissions.tokens import Minter, Verifier, public_key
from hive_common.rpc.client import bearer, call
from hive_proto.approvals.v1 import approvals_pb2, approvals_pb2_grpc
from hive_scheduler.approvals import WAIT_S, Approvals
from hive_scheduler.dispatch import OVERTIME_MS, START_GRACE_MS
from hive_scheduler.domain.job import JobState, snapshot
from hive_scheduler.domain.jobfile import parse_job
from hive_scheduler.permits import Permits
from hive_scheduler.recovery import PostgresOpenJobs, recover, replay
from hive_scheduler.submission import Specs

from .conftest import KEY, REQUEST_S, TOKEN_KEY, agent
from .test_leases import TIMEOUT_MS, Bench

HTTP = Permissions(http=HttpPermission(("a.example",)))
ASKED = {"http": {"hosts": ["a.example"]}}
AGENT = "asks@1.0.0"
VALID_MS = 60_000


def action(path="/", agent_=AGENT):
    return http_action(agent_, "GET", f"https://a.example{path}", (), b"")


# --- on a clock that the test moves ---


class AskingBench(Bench):
    """A bench whose agent has to ask for each request."""

    def __init__(self):
        super().__init__()
        self.catalogue.grants = {"asks": {"http": Grant(HTTP, HTTP, ask=True)}}
        self.catalogue.keys = {"e": "nkey of e"}
        permits = Permits(self.catalogue, self.clock, Minter(TOKEN_KEY), self.dispatcher._kills)
        self.dispatcher._permits = permits
        self.verifier = Verifier(public_key(TOKEN_KEY))
        self.approvals = Approvals(
            *(self.engine, self.dispatcher, permits, self.verifier, lambda executor: executor == "revoked"),
            VALID_MS,
        )

    async def assigned(self, attempts=1):
        """Submit a job with one task, and return it with its first assignment."""
        retry = {"max_attempts": attempts, "backoff": "1ms"}
        document = msgspec.json.encode(
            {
                "apiVersion": "hive/v1",
                "kind": "Job",
                "name": "j",
                "tasks": [{"id": "s", "agent": AGENT, "retry": retry}],
                "limits": {"deadline": "1h"},
            }
        )
        fields = {"http": HTTP.http, "asks": ("http",), "signer": "key", "signature": "s"}
        event = JobSubmitted(
            name="j",
            document=msgspec.Raw(document),
            input=values.inline(b"null"),
            agents={AGENT: AgentRef("asks", "1.0.0", "sha256:0", "python", 1, TIMEOUT_MS, 1, **fields)},
            request_digest="",
            deadline_us=self.clock.now_us() + 3_600_000_000,
        )
        job = JobState("job", "owner", event, parse_job(document))
        self.engine.submit(job, events.encode(event), "me", lambda position: None)
        await self.settled()
        (assignment,) = (await self.pull()).assignments
        return job, assignment

    def ask(self, assignment, action, executor="e"):
        return asyncio.create_task(
            self.approvals.ask(executor, ApproveRequest(token=assignment.token, action=action.text))
        )

    async def held_for(self, assignment, ms):
        """Let time go by while the executor pulls as it has to."""
        for _ in range(ms // 2_000):
            self.pull(slots=0, held=(AttemptKey(assignment.task, assignment.attempt),))
            await self.pass_time(2_000)


@pytest.fixture
async def bench():
    bench = AskingBench()
    yield bench
    bench.committing.cancel()
    await asyncio.gather(bench.committing, return_exceptions=True)


async def requested(bench, assignment, action=None):
    asking = bench.ask(assignment, action or globals()["action"]())
    await bench.settled()
    (found,) = [one for one in bench.approvals.all() if one.status == "pending"]
    return asking, found


async def test_an_approved_attempt_gets_a_token_for_just_this(bench):
    _, assignment = await bench.assigned()
    asking, found = await requested(bench, assignment)
    assert not asking.done()
    await bench.approvals.decide(found.id, "approved", found.hash, "", "the owner")
    reply = await asking
    assert (reply.status, reply.id) == ("approved", found.id)
    claims = bench.verifier.verify(reply.token, executor="e", now_us=bench.clock.now_us(), key="nkey of e")
    assert claims.approved == (action().hash,)
    assert (claims.task, claims.attempt) == (assignment.task, 1)
    assert claims.permissions == Permissions(http=HTTP.http, asks=("http",))
    first = bench.verifier.verify(assignment.token, executor="e", now_us=bench.clock.now_us())
    assert first.approved == ()
    assert bench.log.types()[-2:] == ["ApprovalRequested", "ApprovalDecided"]


async def test_an_answer_leaves_only_after_the_decision_is_committed(bench):
    _, assignment = await bench.assigned()
    asking, found = await requested(bench, assignment)
    bench.log.gate.clear()
    deciding = asyncio.create_task(bench.approvals.decide(found.id, "approved", found.hash, "", "me"))
    await bench.settled()
    assert not asking.done() and not deciding.done()
    again = bench.ask(assignment, action())
    await bench.settled()
    assert not again.done()
    bench.log.gate.set()
    assert (await asking).status == (await again).status == "approved"
    await deciding


async def test_a_decision_that_comes_while_another_commit_is_under_way_waits_for_its_own(bench):
    _, assignment = await bench.assigned()
    asking, found = await requested(bench, assignment)
    asking.cancel()
    commits = []

    async def append(append):
        commits.append(append)
        await gates[len(commits) - 1].wait()
        return len(commits)

    gates = [asyncio.Event(), asyncio.Event()]
    bench.log.append = append
    bench.engine.apply(bench.engine.jobs["job"], assignment.task, [events.AttemptStarted(1, 1)])
    again = bench.ask(assignment, action())
    await bench.settled()
    deciding = asyncio.create_task(bench.approvals.decide(found.id, "approved", found.hash, "", "me"))
    await bench.settled()
    gates[0].set()
    await bench.settled()
    assert len(commits) == 2 and not again.done() and not deciding.done()
    gates[1].set()
    assert (await again).status == "approved"
    await deciding


async def test_waiting_does_not_count_and_ends_when_the_time_to_decide_is_over(bench):
    job, assignment = await bench.assigned()
    asking, found = await requested(bench, assignment)
    waited_ms = 0
    # Far beyond what an attempt may take that waits for nobody.
    while waited_ms < VALID_MS - 4_000:
        asking.cancel()
        asking = bench.ask(assignment, action())
        await bench.held_for(assignment, 4_000)
        waited_ms += 4_000
        assert job.tasks[assignment.task].live() == [1]
    assert waited_ms > TIMEOUT_MS + OVERTIME_MS
    await bench.held_for(assignment, 6_000)
    reply = await asking
    assert (reply.status, reply.reason) == ("expired", "nobody decided in time")
    assert bench.log.types().count("ApprovalExpired") == 1
    with pytest.raises(FailedPrecondition):
        await bench.approvals.decide(found.id, "approved", found.hash, "", "me")


async def test_who_has_the_answer_gets_no_more_time_by_asking_again(bench):
    job, assignment = await bench.assigned()
    asking, found = await requested(bench, assignment)
    await bench.approvals.decide(found.id, "approved", found.hash, "", "me")
    await asking
    until_ms = bench.clock.ms + TIMEOUT_MS + OVERTIME_MS + START_GRACE_MS
    while bench.clock.ms < until_ms + 4_000 and job.tasks[assignment.task].live() == [1]:
        asking = bench.ask(assignment, action())
        await bench.held_for(assignment, 2_000)
        await asyncio.gather(asking, return_exceptions=True)
    assert "AttemptLost" in bench.log.types()


async def test_a_later_attempt_finds_the_decision_and_a_retried_one_is_not_asked_for_twice(bench):
    job, assignment = await bench.assigned(attempts=3)
    asking, found = await requested(bench, assignment)
    await bench.approvals.decide(found.id, "approved", found.hash, "", "me")
    await asking
    bench.engine.lose(assignment.task, 1, "lease_expired")
    pull = bench.pull(session="s2")
    await bench.pass_time(1_000)
    (again,) = (await pull).assignments
    reply = await bench.ask(again, action())
    assert (again.attempt, reply.status, reply.id) == (2, "approved", found.id)
    assert bench.log.types().count("ApprovalRequested") == 1
    with pytest.raises(FailedPrecondition, match=f"attempt 1 of task {assignment.task} has ended"):
        await bench.ask(assignment, action())
    # What was approved long ago was not approved for now.
    job.approvals[found.id].until_us = bench.clock.now_us()
    assert (await bench.ask(again, action())).status == "expired"


async def test_what_waits_ends_with_its_task_in_the_same_append(bench):
    job, assignment = await bench.assigned()
    asking, found = await requested(bench, assignment)
    bench.engine.apply(job, job.id, [events.JobCancelRequested("enough")])
    bench.engine.poke(job.id)
    bench.engine.settle()
    await bench.settled()
    assert bench.log.types()[-3:] == ["TaskCancelled", "ApprovalExpired", "JobCancelled"]
    assert (found.status, found.reason) == ("expired", "the task has ended")
    asking.cancel()


@pytest.mark.parametrize(
    ("error", "wanted", "executor"),
    [
        (PermissionDenied, action(), "f"),
        (PermissionDenied, action(), "revoked"),
        (InvalidArgument, action(agent_="other@1.0.0"), "e"),
        (InvalidArgument, action()._replace(text=action().text.replace(":", ": ")), "e"),
        (InvalidArgument, action()._replace(text="nonsense"), "e"),
        (PermissionDenied, action()._replace(text=action().text.replace('"http"', '"kv"')), "e"),
    ],
)
async def test_who_may_not_ask_is_refused_and_nothing_is_written(bench, error, wanted, executor):
    _, assignment = await bench.assigned()
    with pytest.raises(error):
        await bench.ask(assignment, wanted, executor)
    assert not list(bench.approvals.all())
    assert "ApprovalRequested" not in bench.log.types()


async def test_a_task_may_ask_so_much_and_no_more(bench):
    _, assignment = await bench.assigned()
    asking = [bench.ask(assignment, action(f"/{n}")) for n in range(APPROVALS_PER_TASK_MAX)]
    await bench.settled()
    with pytest.raises(PermissionDenied, match=f"one task may ask {APPROVALS_PER_TASK_MAX}"):
        await bench.ask(assignment, action("/more"))
    for one in asking:
        one.cancel()


async def test_a_permission_that_is_taken_back_meanwhile_is_not_approved_any_more(bench):
    _, assignment = await bench.assigned()
    asking, found = await requested(bench, assignment)
    bench.catalogue.grants = {}
    await bench.approvals.decide(found.id, "approved", found.hash, "", "me")
    with pytest.raises(PermissionDenied, match="hive agent grant asks http"):
        await asking


# --- a whole scheduler ---


class Person:
    """Decides over gRPC, as the gateway asks."""

    def __init__(self, control):
        self.stub = approvals_pb2_grpc.ApprovalsStub(control.channel)

    async def rpc(self, method, request):
        return await call(getattr(self.stub, method)(request, metadata=bearer(KEY), timeout=REQUEST_S))

    async def waiting(self, job=""):
        """Return what waits for a decision, once something does."""
        while True:
            found = await self.rpc("List", approvals_pb2.ListRequest(job_id=job))
            if found.approvals:
                return list(found.approvals)
            await asyncio.sleep(0.02)

    async def decide(self, approval, verdict, **changes):
        fields = {"approval_id": approval.approval_id, "verdict": verdict, "hash": approval.hash, "caller": "key-1"}
        return await self.rpc("Decide", approvals_pb2.DecideRequest(**{**fields, **changes}))


@pytest.fixture
async def asking(cluster):
    await cluster.publish(agent("asks", permissions=ASKED))
    await cluster.grant("asks", Grant(HTTP, HTTP, ask=True))

    async def asks(assignment, given):
        subject = messages.call_subject(executor.id, "approve")
        request = ApproveRequest(token=assignment.token, action=action().text)
        while True:
            try:
                reply = await bus.request(executor.client, subject, request, ApproveReply, 2 * WAIT_S)
            except HiveError:
                await asyncio.sleep(0.05)
                continue
            if reply.status != "pending":
                return {"status": reply.status, "reason": reply.reason, "token": reply.token}

    executor = await cluster.executor("one", {"asks": asks})
    return executor


@pytest.fixture
def document(one_step):
    task = {**one_step["tasks"][0], "agent": AGENT, "input": {}}
    return {**one_step, "tasks": [task], "output": "${tasks.square.output}"}


async def test_a_person_approves_once_and_the_log_says_who(cluster, control, asking, document):
    job = await control.submit(document)
    person = Person(control)
    (approval,) = await person.waiting(job)
    assert (approval.state, approval.agent, approval.permission) == ("pending", AGENT, "http")
    assert "what.url: https://a.example/" in approval.shown
    shown = await control.get(job)
    assert shown.approvals_open == 1
    with pytest.raises(Conflict):
        await person.decide(approval, "approved", hash="0" * 64)
    with pytest.raises(InvalidArgument, match="verdict"):
        await person.decide(approval, "perhaps")
    with pytest.raises(InvalidArgument, match="reason"):
        await person.decide(approval, "approved", reason="fine\x1b[2K")
    with pytest.raises(NotFound):
        await person.decide(approval, "approved", approval_id="nobody")
    first = await person.decide(approval, "approved", reason="fine")
    assert await person.decide(approval, "approved", reason="fine") == first
    with pytest.raises(Conflict):
        await person.decide(approval, "denied")
    done = await control.finish(job)
    output = msgspec.json.decode(done.output_json)
    assert (done.state, output["status"], done.approvals_open) == ("succeeded", "approved", 0)
    claims = Verifier(public_key(TOKEN_KEY)).verify(
        output["token"], executor=asking.id, now_us=time.time_ns() // 1_000
    )
    assert claims.approved == (approval.hash,)
    requested, decided = await cluster.log(approval.approval_id)
    assert (requested.type, decided.type, decided.actor) == ("ApprovalRequested", "ApprovalDecided", "key-1")
    event = events.decode(decided.type, 1, decided.payload)
    assert (event.verdict, event.hash, event.by, event.reason) == ("approved", approval.hash, "key-1", "fine")


async def test_a_refusal_reaches_the_attempt(cluster, control, asking, document):
    job = await control.submit(document)
    person = Person(control)
    (approval,) = await person.waiting(job)
    await person.decide(approval, "denied", reason="not today")
    output = msgspec.json.decode((await control.finish(job)).output_json)
    assert output == {"status": "denied", "reason": "not today", "token": ""}


async def test_what_waits_survives_kill_9(cluster, asking, document):
    control = cluster.control_process()
    await control.start()
    job = await control.submit(document)
    person = Person(control)
    (before,) = await person.waiting(job)
    await control.crash()
    await control.start()
    (after,) = await person.waiting(job)
    assert after == before
    await person.decide(after, "approved")
    await control.crash()
    await control.start()
    done = await control.finish(job)
    assert (done.state, msgspec.json.decode(done.output_json)["status"]) == ("succeeded", "approved")
    assert [one.type for one in await cluster.log(before.approval_id)] == ["ApprovalRequested", "ApprovalDecided"]


async def test_a_new_leader_knows_what_a_replay_knows(cluster, control, asking, document):
    job = await control.submit(document)
    await Person(control).waiting(job)
    await control.shut_down()
    async with await psycopg.AsyncConnection.connect(cluster.database.role_dsn("scheduler")) as conn:
        recovered, _ = await recover(PostgresOpenJobs(conn), cluster.reader, Specs(), time.time_ns() // 1_000)
    replayed, _ = await replay(cluster.reader, Specs(), time.time_ns() // 1_000)
    known = snapshot(recovered.jobs[job])
    assert known == snapshot(replayed.jobs[job])
    assert [one["status"] for one in known["approvals"].values()] == ["pending"]
