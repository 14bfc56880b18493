"""Budgets of jobs and tasks: counted over all attempts that share them, whichever task or device they call from."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.contracts.budgets import SharedBudget
from hive_common.contracts.events import ExecutorRegistered, JobSubmitted, Model
from hive_common.contracts.permissions import ModelPermission, Permissions
from hive_common.contracts.values import inline
from hive_common.kernel.errors import ErrorBody, NotFound
from hive_common.kernel.ids import derive_id, new_id
from hive_common.kernel.money import NANO_PER_USD
from hive_common.rpc.client import call
from hive_common.rpc.rules import KeyRules, metadata_of
from hive_common.testing.scripted import Script, ScriptedBackEnd, ScriptedModel
from hive_proto.models.v1 import models_pb2 as pb

from .conftest import TOKENS, Log, Router, Start, capabilities
from .devices import Device
from .test_executor_calls import joined
from .test_money import budget, cost_of, provider, set_budget

MOST = 20
"""What one call may generate. The scripted models generate half of it."""

OWN = Model(name="own", backend="ollama")


class Guests:
    """Attempts of tasks, as one device runs them."""

    def __init__(self, router: Router, device: Device, log: Log) -> None:
        self.router = router
        self.device = device
        self._log = log
        self.ids: list[str] = []

    async def job(self, document: dict[str, Any] | None = None) -> str:
        """Have the owner submit a job."""
        raw, nothing = msgspec.Raw(msgspec.json.encode(document or {})), inline(b"{}")
        owner = self.router.config.owner
        event = JobSubmitted("j", raw, nothing, {}, "d", 1 << 60, caller=derive_id("caller", owner, "owner"))
        job = new_id()
        await self._log.add(job, event, owner=owner)
        return job

    async def call(
        self, model: str, budgets: Sequence[SharedBudget], *, job: str = "", task: str = "", attempt: int = 1
    ) -> ErrorBody | None:
        """Make a call; return its error, None where it was answered."""
        permissions = Permissions(model=ModelPermission((model,), MOST * 1_000))
        token = TOKENS.token(
            self.device.id,
            permissions,
            job=job or new_id(),
            task=task or new_id(),
            attempt=attempt,
            agent="a@1.0.0",
            budgets=tuple(budgets),
        )
        asking = await self.device.ask(model, token=token, tokens_max=MOST).begin()
        self.ids.append(asking.request.call)
        error: ErrorBody | None = (await asking.all())[-1].error
        return error

    async def until_refused(self, model: str, budgets: Sequence[SharedBudget], **whose: Any) -> ErrorBody:
        """Call until it is refused, and not at the first time; each call is another task's."""
        for made in range(1_000):
            error = await self.call(model, budgets, **whose)
            if error is not None:
                assert made > 0, error.message
                return error
        raise AssertionError("nothing was ever refused")


@contextlib.asynccontextmanager
async def guests_of(start: Start, log: Log, **extra: Any) -> AsyncIterator[Guests]:
    async with start(**extra) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        yield Guests(router, device, log)


@pytest.fixture
async def acme() -> AsyncIterator[ScriptedBackEnd]:
    async with ScriptedBackEnd(Script(models=(ScriptedModel(name="big-1"),), tokens=10)) as server:
        yield server


@pytest.fixture
def paid(acme: ScriptedBackEnd, tmp_path: Path) -> dict[str, Any]:
    """Settings with a provider that the owner's jobs may use."""
    return {"providers": [provider(tmp_path, acme.url)], "owner_key": "owner", "owner_cloud": True}


async def test_money_of_a_job_is_spent_once_over_all_its_tasks_and_a_new_router_knows(
    start: Start, log: Log, acme: ScriptedBackEnd, paid: dict[str, Any]
) -> None:
    async with guests_of(start, log, **paid) as guests:
        await set_budget(guests.router, "total", ("month", "usd", NANO_PER_USD))
        job, other = await guests.job(), await guests.job()
        shared = SharedBudget(f"job:{job}", nano_usd=cost_of(100, 3 * MOST))
        refused = await guests.until_refused("big-1", [shared], job=job)
        assert refused.code == "budget_exhausted"
        assert refused.fields["subject"] == f"job:{job}"
        spent = refused.fields["spent"]
        assert spent == len(acme.calls) * cost_of(0, 10) <= cost_of(100, 3 * MOST)
        assert f"job `{job}` has spent" in refused.message
        assert f"may raise it: hive model budget set --job {job} --usd AMOUNT --per ever" in refused.message
        assert await guests.call("big-1", [SharedBudget(f"job:{other}", nano_usd=NANO_PER_USD)], job=other) is None
    calls = len(acme.calls)
    async with guests_of(start, log, **paid) as guests:
        again = await guests.call("big-1", [shared], job=job)
        assert again is not None and (again.code, again.fields["spent"]) == ("budget_exhausted", spent)
        assert len(acme.calls) == calls


async def test_a_budget_of_the_job_opens_no_way_that_the_owner_has_not_opened(
    start: Start, log: Log, acme: ScriptedBackEnd, paid: dict[str, Any]
) -> None:
    async with guests_of(start, log, **paid) as guests:
        job = await guests.job()
        shared = SharedBudget(f"job:{job}", nano_usd=NANO_PER_USD)
        for _ in range(2):
            refused = await guests.call("big-1", [shared], job=job)
            assert refused is not None and "no budget for it; set one" in refused.message
        await set_budget(guests.router, "key:owner", ("ever", "usd", cost_of(100, MOST)))
        # The one of the key holds beside it.
        refused = await guests.until_refused("big-1", [shared], job=job)
        assert refused.fields["subject"] == "key:owner"
        assert len(acme.calls) * cost_of(0, 10) <= cost_of(100, MOST)
        # Nor is there a way once it has been taken back, while that of the job is still counted.
        await set_budget(guests.router, "key:owner", clear=True)
        refused = await guests.call("big-1", [shared], job=job)
        assert refused is not None and "no budget for it; set one" in refused.message


async def test_whoever_may_set_budgets_may_raise_a_jobs(start: Start, log: Log, paid: dict[str, Any]) -> None:
    async with guests_of(start, log, **paid) as guests:
        await set_budget(guests.router, "total", ("month", "usd", NANO_PER_USD))
        job = await guests.job()
        shared = SharedBudget(f"job:{job}", nano_usd=0)
        refused = await guests.call("big-1", [shared], job=job)
        assert refused is not None and refused.fields["limit"] == 0
        await set_budget(guests.router, f"job:{job}", ("ever", "usd", cost_of(200, MOST)))
        assert await guests.call("big-1", [shared], job=job) is None


async def test_tokens_are_counted_where_they_cost_nothing_however_many_call_at_once(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    async with guests_of(start, log, model_urls=[back_end.url], executor_calls_max=100) as guests:
        job = await guests.job()
        shared = SharedBudget(f"job:{job}", tokens=1_000)
        answers = await asyncio.gather(*(guests.call("scripted", [shared], job=job) for _ in range(100)))
        refused = [error for error in answers if error is not None]
        assert refused and {error.code for error in refused} == {"budget_exhausted"}
        assert len(refused) < len(answers)
        while (await guests.call("scripted", [shared], job=job)) is None:
            pass
        records = [(await log.call(one))[1] for one in guests.ids]
        used = sum(one.prompt_tokens + one.completion_tokens for one in records)
        # What is left is less than one call can use: 20 to generate, and a body of some 60 bytes.
        assert 1_000 - 100 < used <= 1_000
        # Others are not bound by it.
        assert await guests.call("scripted", []) is None


async def test_attempts_of_a_task_and_what_it_forked_share_its_budget(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    async with guests_of(start, log, model_urls=[back_end.url]) as guests:
        job, task, child = await guests.job(), new_id(), new_id()
        budgets = [SharedBudget(f"job:{job}", tokens=10_000), SharedBudget(f"task:{task}", tokens=250)]
        turns = [(task, 1), (task, 2), (child, 1)]
        errors = [
            await guests.call("scripted", budgets, job=job, task=of, attempt=attempt) for of, attempt in turns * 10
        ]
        assert errors[:3] == [None] * 3
        assert [error is None for error in errors] == sorted((error is None for error in errors), reverse=True)
        assert errors[-1] is not None
        assert f"task `{task}` has spent" in errors[-1].message
        assert f"hive model budget set --task {task} --tokens NUMBER" in errors[-1].message
        # A judge of it has the job's alone.
        assert await guests.call("scripted", budgets[:1], job=job) is None
        assert (await budget(guests.router, f"task:{task}")).limits[0].spent <= 250


async def test_a_call_that_was_refused_counts_nothing(start: Start, log: Log) -> None:
    refusing = Script(error_status=400, error_calls=10)
    async with (
        ScriptedBackEnd(refusing) as server,
        guests_of(start, log, model_urls=[server.url]) as guests,
    ):
        job = await guests.job()
        shared = SharedBudget(f"job:{job}", tokens=200)
        for _ in range(10):
            refused = await guests.call("scripted", [shared], job=job)
            assert refused is not None and refused.code == "invalid_argument"
        assert await guests.call("scripted", [shared], job=job) is None


async def test_a_device_that_has_the_model_itself_gets_the_call_back_where_tokens_are_counted(
    start: Start, log: Log
) -> None:
    async with start() as router, router.device(new_id()) as device:
        await joined(router, log, device, OWN)
        await router.models_once(lambda found: [one.name for one in found] == ["own"])
        guests = Guests(router, device, log)
        job = await guests.job()
        assert await guests.call("own", [SharedBudget(f"job:{job}", tokens=1_000)], job=job) is None
        _, event = await log.call(guests.ids[-1])
        assert (event.route, event.executor, event.completion_tokens) == ("local", device.id, 16)
        # Without a budget of tokens it is not asked: there nobody has to count.
        refused = await guests.call("own", [SharedBudget(f"job:{job}", nano_usd=5)], job=job)
        assert refused is not None


async def test_core_calls_are_those_that_a_core_device_or_a_provider_answers(
    start: Start, log: Log, acme: ScriptedBackEnd, paid: dict[str, Any]
) -> None:
    async with guests_of(start, log, **paid) as guests, guests.router.device(new_id()) as large:
        router = guests.router
        await set_budget(router, "total", ("month", "usd", NANO_PER_USD))
        found = capabilities(Model(name="large", backend="ollama"), tier="core")
        await log.add(large.id, ExecutorRegistered(name="tower", capabilities=found), owner="owner")
        small = capabilities(Model(name="small", backend="ollama"), tier="edge")
        async with router.device(new_id()) as phone:
            await log.add(phone.id, ExecutorRegistered(name="phone", capabilities=small), owner="owner")
            await router.models_once(lambda models: {"large", "small"} <= {one.name for one in models})
            job = await guests.job({"limits": {"budget": {"usd": 0.5, "tokens": 5_000}}})
            budgets = [SharedBudget(f"job:{job}", NANO_PER_USD // 2, 5_000)]
            for model in ("small", "small", "large", "big-1", "small"):
                assert await guests.call(model, budgets, job=job) is None
            assert await guests.call("nobody-has-this", budgets, job=job) is not None
        cores = [(await log.call(one))[1].core for one in guests.ids]
        assert cores == [False, False, True, True, False, False]
        request, metadata = pb.JobUsageRequest(job_id=job), router.key
        found_usage = await call(router.stub.GetJobUsage(request, metadata=metadata))
        assert (found_usage.used.calls, found_usage.used.core, found_usage.used.failed) == (6, 2, 1)
        limits = {one.limit.unit: (one.limit.amount, one.spent) for one in found_usage.budget.limits}
        assert limits["usd"] == (NANO_PER_USD // 2, cost_of(0, 10))
        assert limits["tokens"] == (5_000, found_usage.used.prompt_tokens + found_usage.used.completion_tokens)
        by_model = await call(router.stub.Usage(pb.UsageRequest(by="model", job=job), metadata=metadata))
        assert {row.name: row.core for row in by_model.rows} == {"small": 0, "large": 1, "big-1": 1, "": 0}
        # Another one's job is not there for a key that only sees its own.
        mine = derive_id("caller", router.config.owner, "owner")
        assert (await call(router.stub.GetJobUsage(request, metadata=_only(router, mine)))).used.calls == 6
        with pytest.raises(NotFound):
            await call(router.stub.GetJobUsage(request, metadata=_only(router, "somebody")))
        with pytest.raises(NotFound):
            await call(router.stub.GetJobUsage(pb.JobUsageRequest(job_id=new_id()), metadata=metadata))


def _only(router: Router, caller: str) -> tuple[tuple[str, str], ...]:
    return (*router.key, *metadata_of(KeyRules(key="ci", only=caller)))
