"""Budgets and replicas in tokens: who shares which, and what a task that is done several times may do."""

import time
from typing import Any

import pytest
from hive_common.contracts.budgets import SharedBudget
from hive_common.contracts.permissions import ForkPermission, HttpPermission, ModelPermission, Permissions
from hive_common.kernel.errors import InvalidArgument
from hive_common.permissions.grants import Grant
from hive_common.permissions.tokens import Claims, Verifier, public_key

from .conftest import TOKEN_KEY, agent
from .test_forks import executor, outcome, tasks_of

MODEL = Permissions(model=ModelPermission(("m",), 10))
ASKS_MODEL = {"model": {"names": ["m"], "max_tokens": 10}}


def claims(assignment: Any, executor_id: str) -> Claims:
    verifier = Verifier(public_key(TOKEN_KEY))
    return verifier.verify(assignment.token, executor=executor_id, now_us=time.time_ns() // 1_000)


async def publish(cluster: Any, name: str, asked: dict[str, Any], *granted: Permissions) -> None:
    await cluster.publish(agent(name, permissions=asked))
    await cluster.grant(name, *(Grant(one, one) for one in granted))


def job(of_job: dict[str, Any] | None = None, **task: Any) -> dict[str, Any]:
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "budgets",
        "limits": {"deadline": "60s", **({"budget": of_job} if of_job else {})},
        "tasks": [{"id": "step", "input": {}, **task}],
    }


class Seen:
    """Agents that take down how they were called, and answer."""

    def __init__(self) -> None:
        self.assignments: list[tuple[str, Any]] = []

    def agent(self, name: str, answer: Any) -> Any:
        def run(assignment: Any, given: Any) -> Any:
            self.assignments.append((name, assignment))
            return answer

        return run

    def of(self, name: str, executor_id: str) -> list[Claims]:
        return [claims(one, executor_id) for called, one in self.assignments if called == name]


async def test_attempts_of_a_task_and_what_it_forks_share_its_budget_and_its_jobs(cluster, control, fail):
    forks = Permissions(fork=ForkPermission(("leaf",), 3, 1))
    await publish(cluster, "plan", {**ASKS_MODEL, "fork": {"agents": ["leaf"], "max": 3}}, MODEL, forks)
    await publish(cluster, "leaf", ASKS_MODEL, MODEL)
    seen = Seen()
    plan = seen.agent("plan", ({}, [("leaf@1.0.0", {})] * 2))

    def first_fails(assignment, given):
        answer = plan(assignment, given)
        if assignment.attempt == 1:
            raise fail("agent_error")
        return answer

    fake = await executor(cluster, plan=first_fails, leaf=seen.agent("leaf", {}))
    retry = {"max_attempts": 2, "backoff": "1ms"}
    document = job({"usd": 2, "tokens": 900}, agent="plan@1.0.0", retry=retry, budget={"usd": 0.5})
    job_id = await control.submit(document)
    assert (await control.finish(job_id)).state == "succeeded"
    parent, *_ = await tasks_of(control, job_id)
    whole = SharedBudget(f"job:{job_id}", 2_000_000_000, 900)
    of_task = SharedBudget(f"task:{parent.task_id}", 500_000_000)
    told = seen.of("plan", fake.id) + seen.of("leaf", fake.id)
    assert [(one.task == parent.task_id, one.attempt) for one in told] == [
        (True, 1),
        (True, 2),
        (False, 1),
        (False, 1),
    ]
    assert [one.budgets for one in told] == [(whole, of_task)] * 4


async def test_tasks_of_a_fork_have_a_budget_each_and_without_one_a_token_says_none(cluster, control):
    await publish(cluster, "leaf", ASKS_MODEL, MODEL)
    seen = Seen()
    fake = await executor(cluster, leaf=seen.agent("leaf", {}))
    document = job(agent="leaf@1.0.0", fork=[1, 2], budget={"tokens": 7})
    assert (await control.finish(await control.submit(document))).state == "succeeded"
    assert (await control.finish(await control.submit(job(agent="leaf@1.0.0")))).state == "succeeded"
    *forked, plain = seen.of("leaf", fake.id)
    assert [one.budgets for one in forked] == [(SharedBudget(f"task:{one.task}", tokens=7),) for one in forked]
    assert len({one.task for one in forked}) == 2
    assert (plain.budgets, plain.replicated) == ((), False)


async def test_a_judge_is_on_the_account_of_the_job_and_replicas_only_read(cluster, control):
    http = HttpPermission(("a.test",), ("GET", "HEAD", "POST"))
    asks = {**ASKS_MODEL, "http": {"hosts": ["a.test"], "methods": ["GET", "HEAD", "POST"]}}
    for name in ("guess", "critic"):
        await publish(cluster, name, asks, MODEL, Permissions(http=http))
    seen = Seen()
    fake = await executor(cluster, guess=seen.agent("guess", 42), critic=seen.agent("critic", {"score": 1}))
    document = job(
        {"tokens": 900},
        agent="guess@1.0.0",
        budget={"tokens": 100},
        speculate={"replicas": 2, "distinct": "none"},
        verify={"critic": {"agent": "critic@1.0.0"}},
    )
    job_id = await control.submit(document)
    done = await control.finish(job_id)
    assert done.state == "succeeded", done.error_message
    judged, judges = seen.of("guess", fake.id), seen.of("critic", fake.id)
    whole = SharedBudget(f"job:{job_id}", tokens=900)
    assert judged and judges
    for one in judged:
        assert one.budgets == (whole, SharedBudget(f"task:{judged[0].task}", tokens=100))
        assert one.permissions.http == HttpPermission(("a.test",), ("GET", "HEAD"))
        assert one.replicated
    for one in judges:
        assert one.budgets == (whole,)
        assert one.permissions.http == http
        assert not one.replicated


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        ({"speculate": {"replicas": 2}}, True),
        ({"speculate": {"replicas": 2, "hedge_after": "1s"}}, True),
        ({"verify": {"quorum": {"k": 1, "of": 2, "adaptive": True}}}, True),
        ({"verify": {"quorum": {"k": 1, "of": 1, "extend_to": 2}, "critic": {"agent": "leaf@1.0.0"}}}, True),
        ({"verify": {"critic": {"agent": "leaf@1.0.0"}}}, False),
        ({}, False),
    ],
)
async def test_an_agent_that_can_only_change_things_is_no_agent_of_a_replicated_task(
    cluster, control, words, is_refused
):
    posts = Permissions(http=HttpPermission(("a.test",), ("POST", "PUT")))
    await publish(cluster, "post", {"http": {"hosts": ["a.test"], "methods": ["POST", "PUT"]}}, posts)
    await publish(cluster, "leaf", ASKS_MODEL, MODEL)
    # So that it is the methods and not the number of devices.
    if words:
        words = {**words, "speculate": {**words.get("speculate", {}), "distinct": "none"}}
    document = job(agent="post@1.0.0", **words)
    if not is_refused:
        await control.submit(document)
        return
    with pytest.raises(InvalidArgument) as refused:
        await control.submit(document)
    assert refused.value.fields["path"] == "tasks[0].agent"
    assert "asks for POST, PUT of `http`, and its task is replicated" in refused.value.message


async def test_an_architect_that_has_spent_its_budget_fails_for_good_and_nothing_of_it_is_made(
    cluster, control, fail
):
    forks = Permissions(fork=ForkPermission(("leaf",), 3, 1))
    await publish(cluster, "plan", {**ASKS_MODEL, "fork": {"agents": ["leaf"], "max": 3}}, MODEL, forks)
    await publish(cluster, "leaf", ASKS_MODEL, MODEL)

    def spent(assignment, given):
        raise fail("budget_exhausted", "task `x` has spent $0.50 of $0.50 so far")

    await executor(cluster, plan=spent, leaf=lambda assignment, given: {})
    document = job(agent="plan@1.0.0", retry={"max_attempts": 5, "backoff": "1ms"}, budget={"usd": 0.5})
    job_id = await control.submit(document)
    assert await outcome(control, job_id) == (
        "failed",
        "budget_exhausted",
        "task `x` has spent $0.50 of $0.50 so far",
    )
    assert [one.attempts for one in await tasks_of(control, job_id)] == [1]
