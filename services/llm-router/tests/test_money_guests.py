"""Calls of guests that cost money: on the account of the key that submitted their job, the job and the agent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.contracts.events import JobSubmitted, KeyCreated, KeyRevoked
from hive_common.contracts.permissions import ModelPermission, Permissions
from hive_common.contracts.values import inline
from hive_common.kernel.ids import derive_id, new_id
from hive_common.kernel.money import NANO_PER_USD
from hive_common.testing.scripted import Script, ScriptedBackEnd, ScriptedModel

from .conftest import TOKENS, Log, Router, Start
from .devices import Device
from .test_executor_calls import joined
from .test_money import budget, cost_of, provider, set_budget, usage

AGENT = "summarise@1.0.0"


@pytest.fixture
async def acme() -> AsyncIterator[ScriptedBackEnd]:
    async with ScriptedBackEnd(Script(models=(ScriptedModel(name="big-1"),), tokens=10)) as server:
        yield server


class Guests:
    """A router with a provider, a device, and jobs that were submitted with keys."""

    def __init__(self, router: Router, device: Device, log: Log) -> None:
        self.router = router
        self.device = device
        self._log = log
        self._owner = router.config.owner
        self._attempts = 0

    async def key(self, name: str, **fields: Any) -> None:
        """Have a key made."""
        key = KeyCreated(name, "0" * 64, **{"cloud": True, **fields})
        await self._log.add(self._stream(name), key, owner=self._owner)

    async def revoke(self, name: str) -> None:
        """Have a key revoked."""
        await self._log.add(self._stream(name), KeyRevoked(), owner=self._owner)

    def _stream(self, name: str) -> str:
        return derive_id("key", "default", name)

    async def job(self, key: str, pin: str = "") -> str:
        """Have a job submitted with a key."""
        document = msgspec.Raw(msgspec.json.encode({"models": {"pin": pin}} if pin else {}))
        caller = derive_id("caller", self._owner, key)
        job, nothing = new_id(), inline(b"{}")
        event = JobSubmitted("j", document, nothing, {}, "d", 1 << 60, caller=caller)
        await self._log.add(job, event, owner=self._owner)
        return job

    async def call(self, job: str, pin: str = "any", agent: str = AGENT) -> tuple[str, str]:
        """Have a guest call; returns the code of its error and the message, empty where it was answered."""
        permissions = Permissions(model=ModelPermission(("big-1",), 20, pin))
        self._attempts += 1
        token = TOKENS.token(self.device.id, permissions, job=job, agent=agent, attempt=self._attempts)
        chunks = await (await self.device.ask("big-1", token=token, tokens_max=20).begin()).all()
        error = chunks[-1].error
        assert error is not None or chunks[0].route == "cloud"
        return ("", "") if error is None else (error.code, error.message)


@pytest.fixture
async def guests(start: Start, acme: ScriptedBackEnd, log: Log, tmp_path: Path) -> AsyncIterator[Guests]:
    async with contextlib.AsyncExitStack() as stack:
        extra = {"providers": [provider(tmp_path, acme.url)], "owner_key": "owner", "owner_cloud": True}
        router = await stack.enter_async_context(start(**extra))
        device = await stack.enter_async_context(router.device(new_id()))
        await joined(router, log, device)
        await set_budget(router, "total", ("month", "usd", NANO_PER_USD))
        yield Guests(router, device, log)


async def current(guests: Guests) -> None:
    """Return once the router knows what was written; what it is asked about money waits for that."""
    await budget(guests.router)


async def test_a_guest_spends_on_the_account_of_its_jobs_key_of_the_job_and_of_its_agent(
    guests: Guests, acme: ScriptedBackEnd, log: Log
) -> None:
    await guests.key("ci")
    job = await guests.job("ci")
    for subject in ("key:ci", f"job:{job}", "agent:summarise"):
        await set_budget(guests.router, subject, ("ever", "usd", NANO_PER_USD))
    assert await guests.call(job) == ("", "")
    cost = cost_of(0, 10)
    for subject in ("total", "key:ci", f"job:{job}", "agent:summarise"):
        assert (await budget(guests.router, subject)).limits[0].spent == cost
    # The record comes a moment after the answer, and usage is made of records.
    while not (records := [one for one in await usage(guests.router, "agent") if one.nano_usd]):
        await asyncio.sleep(0.02)
    (record,) = records
    assert (record.name, record.nano_usd) == ("summarise", cost)
    (by_key,) = [one for one in await usage(guests.router, "key") if one.nano_usd]
    assert by_key.name == "ci"
    # What it was granted is the limit that the provider is given.
    assert msgspec.json.decode(acme.calls[-1].body)["max_tokens"] == 20


async def test_a_job_may_have_a_budget_that_was_set_for_each(guests: Guests, acme: ScriptedBackEnd) -> None:
    await guests.key("ci")
    await set_budget(guests.router, "job:*", ("ever", "usd", cost_of(100, 20)))
    first, second = await guests.job("ci"), await guests.job("ci")
    answers = [await guests.call(first) for _ in range(4)]
    assert answers[0] == ("", "")
    assert answers[-1][0] == "budget_exhausted"
    assert f"job `{first}` has spent" in answers[-1][1]
    assert await guests.call(second) == ("", "")


async def test_the_owners_jobs_may_where_the_configuration_says_so(guests: Guests) -> None:
    assert await guests.call(await guests.job("owner")) == ("", "")


async def test_a_guest_of_a_key_that_may_not_is_told_which(guests: Guests, acme: ScriptedBackEnd) -> None:
    await guests.key("plain", cloud=False)
    await guests.key("pinned", pin="pool")
    await guests.key("gone")
    await guests.revoke("gone")
    await current(guests)
    for key, says in (
        ("plain", "key `plain`, with which the job was submitted, may not use providers"),
        ("pinned", "key `pinned` is pinned to pool"),
        ("gone", "key `gone`, with which the job was submitted, was revoked"),
        ("nobody", "its key, with which the job was submitted, may not use providers"),
    ):
        code, message = await guests.call(await guests.job(key))
        assert (code in ("permission_denied", "unavailable"), says in message) == (True, True), message
    assert not acme.requests


async def test_no_pin_on_the_way_may_say_otherwise(guests: Guests, acme: ScriptedBackEnd) -> None:
    await guests.key("ci")
    await current(guests)
    assert "the job is pinned to pool" in (await guests.call(await guests.job("ci", pin="pool")))[1]
    assert "pinned to pool" in (await guests.call(await guests.job("ci"), pin="pool"))[1]
    assert not acme.requests


async def test_without_a_token_or_a_job_nothing_goes_out(guests: Guests, acme: ScriptedBackEnd) -> None:
    (only,) = await (await guests.device.ask("big-1").begin()).all()
    assert only.error is not None
    assert "a program on a device shows no key" in only.error.message
    assert "nobody knows the key" in (await guests.call(new_id()))[1]
    assert not acme.requests
