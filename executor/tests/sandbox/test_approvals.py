"""Guests whose permission asks: they wait for a person, their time stands still, and what was approved happens."""

import asyncio
import json

import pytest
from hive_common.contracts.messages import ApproveReply, ApproveRequest, KvReply, KvRequest
from hive_common.contracts.permissions import HttpPermission, KvPermission
from hive_common.kernel.errors import FailedPrecondition, HiveError, PermissionDenied, Unavailable
from hive_common.permissions.actions import Action, kv_read_action, scratch_action
from hive_executor.host import keep
from hive_executor.host.approval import Approvals, SchedulerApprover
from hive_executor.host.http import HttpAccess, HttpClient
from hive_executor.host.kv import KvAccess
from hive_executor.sandbox import Capabilities, RunnerPool
from hive_executor.sandbox.limit import TimeLimit

from .conftest import limits, python
from .web import Names, ok, redirect, serving

AGENT = "a@1.0.0"
ASK = python(
    "from hive import http\n"
    "def run(input):\n"
    "    try:\n"
    "        return {'status': [http.get(url).status for url in input['urls']][-1]}\n"
    "    finally:\n"
    "        while input.get('spins'):\n"
    "            pass\n"
)


class Person:
    """Decides when told to; an `Approver`."""

    def __init__(self, reply: ApproveReply | None = None, error: HiveError | None = None) -> None:
        self.reply = reply or ApproveReply(status="approved", id="1", token="newer")
        self.error = error
        self.asked: list[ApproveRequest] = []
        self.is_asked = asyncio.Event()
        self.decides = asyncio.Event()
        self.was_cancelled = False

    async def ask(self, request: ApproveRequest) -> ApproveReply:
        self.asked.append(request)
        self.is_asked.set()
        try:
            await self.decides.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if self.error is not None:
            raise self.error
        return self.reply


def approvals_by(person: Person, *asks: str) -> Approvals:
    return Approvals("first", asks or ("http",), AGENT, person)


def http_of(approvals: Approvals, url: str) -> Capabilities:
    permission = HttpPermission((url,), ("GET",), private=True)
    return {"http": HttpAccess(HttpClient(Names(a_test=[["127.0.0.1"]])), permission, approvals=approvals)}


def asking(*urls: str, **more: object) -> bytes:
    return json.dumps({"urls": urls, **more}).encode()


async def test_while_a_guest_waits_its_time_stands_still(pool: RunnerPool) -> None:
    person = Person()
    approvals = approvals_by(person)
    async with serving(ok("fine")) as web:
        url = f"http://a.test:{web.port}"
        running = asyncio.create_task(
            pool.run(
                *(ASK, asking(url), limits(wall_ms=2_000)),
                granted=http_of(approvals, url),
                limit=approvals.limit,
            )
        )
        await person.is_asked.wait()
        # Longer than all it has, and what a runner is given beyond that.
        await asyncio.sleep(2.5)
        assert not running.done() and not web.requests
        person.decides.set()
        outcome = await running
    assert outcome.status == "succeeded", outcome
    assert json.loads(outcome.output or b"") == {"status": 200}
    assert outcome.wall_ms < 2_000
    (request,) = person.asked
    assert request.token == "first" and approvals.token == "newer"
    assert f'"url":"{url}"' in request.action


@pytest.mark.usefixtures("patient")
async def test_a_guest_that_has_waited_still_has_a_limit(pool: RunnerPool) -> None:
    person = Person()
    approvals = approvals_by(person)
    async with serving(ok("fine")) as web:
        url = f"http://a.test:{web.port}"
        running = asyncio.create_task(
            pool.run(
                *(ASK, asking(url, spins=True), limits(wall_ms=2_000)),
                granted=http_of(approvals, url),
                limit=approvals.limit,
            )
        )
        await person.is_asked.wait()
        await asyncio.sleep(2)
        person.decides.set()
        outcome = await running
    assert outcome.code == "timeout"
    assert len(web.requests) == 1
    # Its runner is as good as before.
    assert pool.stats()["restarts"] == 0


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            ApproveReply(status="denied", id="7", reason="no"),
            "was denied for this use by a person (approval 7): no",
        ),
        (ApproveReply(status="expired", id="7", reason="too late"), "in time (approval 7): too late"),
        (ApproveReply(status="nonsense", id="7"), "was not approved for this use"),
    ],
)
async def test_what_is_not_approved_ends_the_attempt_with_its_name_whatever_the_guest_does(
    pool: RunnerPool, reply: ApproveReply, message: str
) -> None:
    person = Person(reply)
    person.decides.set()
    approvals = approvals_by(person)
    async with serving(ok()) as web:
        url = f"http://a.test:{web.port}"
        outcome = await pool.run(ASK, asking(url), limits(), granted=http_of(approvals, url), limit=approvals.limit)
    assert (outcome.code, outcome.output) == ("permission_denied", None)
    assert "`http`" in outcome.message and message in outcome.message
    assert not web.requests and approvals.token == "first"


async def test_the_same_is_asked_once_and_anything_else_anew(pool: RunnerPool) -> None:
    person = Person()
    person.decides.set()
    approvals = approvals_by(person)
    async with serving(ok()) as web:
        url = f"http://a.test:{web.port}"
        urls = (f"{url}/a", f"{url}/a", f"{url}/b")
        outcome = await pool.run(
            ASK, asking(*urls), limits(), granted=http_of(approvals, url), limit=approvals.limit
        )
    assert outcome.status == "succeeded", outcome
    assert len(web.requests) == 3
    assert [json.loads(one.action)["what"]["url"] for one in person.asked] == [f"{url}/a", f"{url}/b"]
    assert [one.token for one in person.asked] == ["first", "newer"]


async def test_where_a_redirect_leads_is_another_use(pool: RunnerPool) -> None:
    person = Person()
    person.decides.set()
    approvals = approvals_by(person)
    async with serving(redirect("/elsewhere")) as web:
        url = f"http://a.test:{web.port}"
        outcome = await pool.run(ASK, asking(url), limits(), granted=http_of(approvals, url), limit=approvals.limit)
    assert json.loads(outcome.output or b"{}") == {"status": 302}, outcome
    assert len(web.requests) == 1


async def test_an_attempt_that_is_cancelled_asks_no_longer(pool: RunnerPool) -> None:
    person = Person()
    approvals = approvals_by(person)
    running = asyncio.create_task(
        pool.run(
            *(ASK, asking("http://a.test:9"), limits()),
            granted=http_of(approvals, "http://a.test:9"),
            limit=approvals.limit,
        )
    )
    await person.is_asked.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert person.was_cancelled


async def test_what_was_approved_of_kept_values_goes_with_the_newest_token() -> None:
    class Store:
        def __init__(self) -> None:
            self.asked: list[KvRequest] = []

        async def ask(self, request: KvRequest, within_s: float) -> KvReply:
            self.asked.append(request)
            return KvReply()

    person, store = Person(), Store()
    person.decides.set()
    access = KvAccess(store, KvPermission("notes", 1 << 20), approvals=approvals_by(person, "kv"))
    await access.call("put", b'{"key": "k", "value": {"n": 1}}', 1_000)
    await access.call("put", b'{"key": "k", "value":  {"n": 1}}', 1_000)
    await access.call("put", b'{"key": "k", "value": {"n": 2}}', 1_000)
    await access.call("delete", b'{"key": "other"}', 1_000)
    await access.call("get", b'{"key": "third"}', 1_000)
    await access.call("keys", b'{"prefix": "x"}', 1_000)
    await keep({"kv": access})
    assert [json.loads(one.action)["operation"] for one in person.asked] == ["put", "put", "delete", "get", "keys"]
    assert kv_read_action(AGENT, "notes", "third").text in [one.action for one in person.asked]
    assert [one.op for one in store.asked] == ["get", "list", "stage"]
    assert {one.token for one in store.asked} == {"newer"}


async def test_where_nothing_asks_nobody_is_asked_and_no_action_is_made() -> None:
    person = Person()

    def made(agent: str) -> Action:
        raise AssertionError("nobody asks")

    await approvals_by(person, "kv").need("http", made)
    assert not person.asked


async def test_who_cannot_ask_says_why_and_what_is_refused_is_not_asked_again() -> None:
    for error in (PermissionDenied("no"), FailedPrecondition("it has ended")):
        person = Person(error=error)
        person.decides.set()
        with pytest.raises(type(error)):
            await approvals_by(person, "scratch").need("scratch", lambda agent: scratch_action(agent, 1))


class Line:
    """A link on which answers come as the test says."""

    executor_id = "e"

    def __init__(self, *answers: ApproveReply | HiveError) -> None:
        self.answers = list(answers)
        self.subjects: set[str] = set()

    async def request(self, subject: str, body: object, reply_type: object, timeout_s: float) -> ApproveReply:
        self.subjects.add(subject)
        answer = self.answers.pop(0)
        if isinstance(answer, HiveError):
            raise answer
        return answer


async def test_the_scheduler_is_asked_until_it_is_decided_whatever_is_away() -> None:
    pending, approved = ApproveReply(status="pending"), ApproveReply(status="approved", token="t")
    line = Line(pending, Unavailable("a new leader"), pending, approved)
    reply = await SchedulerApprover(line).ask(ApproveRequest(token="t", action="{}"))  # type: ignore[arg-type]
    assert reply == approved and not line.answers
    assert line.subjects == {"hive.exec.e.call.approve"}


async def test_time_stands_still_for_timers_that_have_begun_and_those_that_come() -> None:
    limit = TimeLimit()
    limit.begin(60.0)
    with limit.timer(1.0) as timer:
        async with timer:
            due = timer.when()
            with limit.standing():
                assert timer.when() is None
            moved = timer.when()
    assert due is not None and moved is not None
    assert moved - due == pytest.approx(limit.stood_s)
    with limit.timer(1.0) as later:
        assert later.when() == moved
