"""Calls that cost money: who may make them, what they may cost, and what the log says afterwards."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.contracts.events import BudgetReserved, ModelCallFinished, decode
from hive_common.eventlog.log import Stored
from hive_common.kernel.errors import (
    BudgetExhausted,
    DeadlineExceeded,
    HiveError,
    InvalidArgument,
    PermissionDenied,
    RateLimited,
    Unavailable,
)
from hive_common.kernel.ids import new_id
from hive_common.kernel.money import NANO_PER_USD
from hive_common.rpc.client import call, stream
from hive_common.rpc.rules import KeyRules, metadata_of
from hive_common.testing.scripted import Generation, Script, ScriptedBackEnd, ScriptedModel
from hive_proto.models.v1 import models_pb2 as pb

from .conftest import Log, Router, Start

INPUT_USD, OUTPUT_USD = 3, 15
"""Of a million tokens: 3,000 and 15,000 nano-USD each."""

Paid = Callable[..., contextlib.AbstractAsyncContextManager[Router]]


def cost_of(prompt_tokens: int, completion_tokens: int) -> int:
    return prompt_tokens * INPUT_USD * 1_000 + completion_tokens * OUTPUT_USD * 1_000


def provider(folder: Path, url: str, name: str = "acme", **changes: Any) -> dict[str, Any]:
    key = folder / f"{name}-key"
    key.touch(mode=0o600)
    key.write_text("secret")
    model = {
        "name": "big-1",
        "input_usd": INPUT_USD,
        "output_usd": OUTPUT_USD,
        "context_tokens": 4_000,
        "max_output_tokens": 100,
        "aliases": ["big"],
    }
    return {"name": name, "base_url": url + "/v1", "key_file": str(key), "models": [model | changes]}


@pytest.fixture
async def acme() -> AsyncIterator[ScriptedBackEnd]:
    script = Script(models=(ScriptedModel(name="big-1"),), api_key="secret")
    async with ScriptedBackEnd(script) as server:
        yield server


@pytest.fixture
def paid(start: Start, acme: ScriptedBackEnd, tmp_path: Path) -> Paid:
    """Run a router with a provider; `usd` is the month's budget of everything, in nano-USD, None for none."""

    @contextlib.asynccontextmanager
    async def started(usd: int | None = NANO_PER_USD, **extra: Any) -> AsyncIterator[Router]:
        fields = {"providers": [provider(tmp_path, acme.url)], **extra}
        async with start(**fields) as router:
            if usd is not None:
                await set_budget(router, "total", ("month", "usd", usd))
            yield router

    return started


async def set_budget(router: Router, subject: str, *limits: tuple[str, str, int], clear: bool = False) -> pb.Budget:
    named = [pb.BudgetLimit(per=per, unit=unit, amount=amount) for per, unit, amount in limits]
    request = pb.SetBudgetRequest(subject=subject, limits=named, clear=clear, caller="owner-1")
    return await call(router.stub.SetBudget(request, metadata=router.key))


async def budget(router: Router, subject: str = "total") -> pb.Budget:
    answer = await call(router.stub.Budgets(pb.BudgetsRequest(subject=subject), metadata=router.key))
    return answer.budgets[0]


async def usage(router: Router, by: str) -> list[pb.UsageRow]:
    return list((await call(router.stub.Usage(pb.UsageRequest(by=by), metadata=router.key))).rows)


def ask(router: Router, **changes: Any) -> Awaitable[Any]:
    return router.complete("big-1", **{"cloud": True, **changes})


async def of_types(log: Log, *types: str) -> list[Any]:
    found: list[Stored] = await log.reader.read(0, 10_000, types=types)
    return [decode(one.type, one.schema, one.payload or b"") for one in found]


async def finished(log: Log, calls: int) -> list[ModelCallFinished]:
    """Return the records of so many calls, once they are there. The test's timeout bounds it."""
    while len(found := await of_types(log, "ModelCallFinished")) < calls:
        await asyncio.sleep(0.02)
    return found


async def charged(log: Log, calls: int) -> list[ModelCallFinished]:
    """Return the records of so many calls that cost something, once they are there."""
    while len(found := [one for one in await of_types(log, "ModelCallFinished") if one.nano_usd]) < calls:
        await asyncio.sleep(0.02)
    return found


async def counted(log: Log, subject: str = "total") -> int:
    """Return what the log counts as spent by a budget: all that was set aside, without what was returned."""
    sums = 0
    for event in await of_types(log, "BudgetReserved", "BudgetReturned"):
        if event.subject == subject:
            sums += event.nano_usd if isinstance(event, BudgetReserved) else -event.nano_usd
    return sums


def generations(back_end: ScriptedBackEnd) -> list[Generation]:
    return [one for one in back_end.generations if one.outcome == "completed"]


def generated(back_end: ScriptedBackEnd) -> tuple[int, int]:
    """Return prompt and completion tokens as the back end counts them: prompts of these tests have one word."""
    answered = generations(back_end)
    return len(answered), sum(one.tokens for one in answered)


async def test_a_call_goes_out_and_costs_what_the_answer_says(paid: Paid, acme: ScriptedBackEnd, log: Log) -> None:
    async with paid() as router:
        answered = await ask(router, body={"max_tokens": 5})
        assert answered.head.route == "cloud"
        _, event = await log.call(answered.id)
        assert (event.provider, event.nano_usd, event.estimated) == ("acme", cost_of(1, 5), False)
        assert (event.prompt_tokens, event.completion_tokens, event.key) == (1, 5, "key-1")
        spent = await budget(router)
        assert (spent.limits[0].spent, spent.limits[0].reserved) == (cost_of(1, 5), 0)
        explained = await router.explain(answered.id)
        assert (explained.provider, explained.nano_usd) == ("acme", cost_of(1, 5))
        assert [(one.backend, one.tried) for one in explained.candidates] == [("cloud:acme", "succeeded")]
    assert acme.calls[-1].headers["authorization"] == "Bearer secret"
    # What was set aside and not used has come back with the router's end.
    assert await counted(log) == cost_of(1, 5)


async def test_nothing_is_asked_of_a_provider_but_calls(paid: Paid, acme: ScriptedBackEnd) -> None:
    async with paid() as router:
        listed = {model.name: list(model.providers) for model in await router.models()}
        assert listed == {"big": ["acme"], "big-1": ["acme"]}
    assert not acme.requests


async def test_a_call_without_a_limit_gets_one_and_an_alias_its_name(paid: Paid, acme: ScriptedBackEnd) -> None:
    async with paid() as router:
        await router.complete("big", cloud=True)
    sent = msgspec.json.decode(acme.calls[-1].body)
    assert (sent["model"], sent["max_tokens"]) == ("big-1", 100)


async def test_the_limit_goes_where_the_provider_takes_it(
    start: Start, acme: ScriptedBackEnd, tmp_path: Path
) -> None:
    one = provider(tmp_path, acme.url, limit_field="max_completion_tokens")
    async with start(providers=[one]) as router:
        await set_budget(router, "total", ("month", "usd", NANO_PER_USD))
        await ask(router, body={"max_tokens": 7})
    sent = msgspec.json.decode(acme.calls[-1].body)
    assert sent["max_completion_tokens"] == 7
    assert "max_tokens" not in sent


async def test_a_stream_costs_what_its_usage_says(paid: Paid, log: Log) -> None:
    async with paid() as router:
        answered = await ask(router, stream=True, body={"max_tokens": 5})
        assert answered.error is None
        _, event = await log.call(answered.id)
        assert (event.nano_usd, event.estimated) == (cost_of(1, 5), False)


async def test_a_stream_that_nobody_reads_to_its_end_costs_its_reservation(
    paid: Paid, acme: ScriptedBackEnd, log: Log
) -> None:
    acme.play(tokens=100, pace_ms=50)
    async with paid() as router:
        pending = router.begin(
            "big-1", stream=True, cloud=True, call_id=(call_id := new_id()), body={"max_tokens": 50}
        )
        await pending.read()
        pending.cancel()
        await acme.until(lambda: acme.generations[-1].outcome == "cancelled")
        _, event = await log.call(call_id)
        assert event.estimated
        assert cost_of(0, 50) <= event.nano_usd <= cost_of(400, 50)
        assert (await budget(router)).limits[0].spent == event.nano_usd


REFUSED: Sequence[tuple[dict[str, Any], type[HiveError], str, str]] = (
    ({"cloud": False}, PermissionDenied, "key", "hive key create NAME --cloud"),
    ({"pin": "pool"}, Unavailable, "pin", "pinned to pool"),
    ({"pin": "own-devices"}, Unavailable, "pin", "pinned to own-devices"),
)


@pytest.mark.parametrize(("fields", "kind", "reason", "text"), REFUSED)
async def test_who_may_not_is_told_why_by_name(
    paid: Paid, acme: ScriptedBackEnd, fields: dict[str, Any], kind: type[HiveError], reason: str, text: str
) -> None:
    async with paid() as router:
        with pytest.raises(kind, match=text) as caught:
            await ask(router, call_id=(call_id := new_id()), **fields)
        assert caught.value.fields["reason"] == reason
        explained = await router.explain(call_id)
        assert [(one.backend, one.rejected) for one in explained.candidates] == [("cloud:acme", reason)]
    assert not acme.requests


async def test_what_a_call_itself_says_of_its_key_does_not_count(paid: Paid, acme: ScriptedBackEnd) -> None:
    async with paid() as router:
        said = pb.CompleteRequest(
            call_id=new_id(), endpoint="chat", model="big-1", body=b'{"model": "big-1"}', key="owner", cloud=True
        )
        beside = metadata_of(KeyRules(key="key-1"))
        with pytest.raises(PermissionDenied, match="key `key-1` may not use providers"):
            await anext(stream(router.stub.Complete(said, metadata=(*router.key, *beside))))
    assert not acme.requests


async def test_without_a_budget_nothing_goes_out(paid: Paid, acme: ScriptedBackEnd) -> None:
    async with paid(usd=None) as router:
        # A bound of tokens, or of single calls, is none of what may be spent.
        await set_budget(router, "key:key-1", ("request", "usd", NANO_PER_USD), ("day", "tokens", 10**9))
        with pytest.raises(
            BudgetExhausted, match="hive model budget set --key key-1 --usd 5 --per month"
        ) as caught:
            await ask(router)
        assert caught.value.fields["reason"] == "no_budget"
    assert not acme.requests


async def test_who_has_spent_it_all_is_told_how_much_and_who_may_raise_it(
    paid: Paid, acme: ScriptedBackEnd
) -> None:
    async with paid(usd=None) as router:
        await set_budget(router, "key:key-1", ("day", "usd", cost_of(200, 16)))
        await ask(router, body={"max_tokens": 10})
        with pytest.raises(BudgetExhausted) as caught:
            await ask(router, call_id=(call_id := new_id()), body={"max_tokens": 100})
        text = "key `key-1` has spent $0.000153 of $0.00084 today (UTC), and this call may cost"
        assert caught.value.message.startswith(text)
        assert caught.value.message.endswith("hive model budget set --key key-1 --usd AMOUNT --per day")
        assert (caught.value.fields["spent"], caught.value.fields["limit"]) == (cost_of(1, 10), cost_of(200, 16))
        explained = await router.explain(call_id)
        assert [(one.backend, one.tried) for one in explained.candidates] == [("cloud:acme", "budget_exhausted")]
        await set_budget(router, "key:key-1", ("day", "usd", NANO_PER_USD))
        await ask(router, body={"max_tokens": 100})
    assert len(acme.calls) == 2


async def test_a_limit_that_is_lowered_holds_for_the_next_call(paid: Paid, acme: ScriptedBackEnd) -> None:
    async with paid() as router:
        for subject in ("total", "key:*"):
            await set_budget(router, "key:*", ("month", "usd", NANO_PER_USD))
            await ask(router, body={"max_tokens": 5})
            await set_budget(router, subject, ("month", "usd", cost_of(0, 50)))
            with pytest.raises(BudgetExhausted):
                await ask(router, body={"max_tokens": 50})
            await set_budget(router, subject, ("month", "usd", NANO_PER_USD))
    assert len(acme.calls) == 2


async def test_each_limit_holds_by_itself(paid: Paid, acme: ScriptedBackEnd) -> None:
    async with paid() as router:
        for subject, limit, whose in (
            ("total", ("request", "tokens", 50), "one call of this installation"),
            ("total", ("day", "tokens", 50), "this installation has spent 0 tokens of 50 tokens today"),
            ("key:*", ("month", "usd", 1_000), "key `key-1` has spent"),
        ):
            await set_budget(router, subject, limit)
            with pytest.raises(BudgetExhausted, match=whose):
                await ask(router)
            await set_budget(router, subject, ("month", "usd", NANO_PER_USD), clear=True)
        # A key with limits of its own is none of `each`.
        await set_budget(router, "key:*", ("month", "usd", 1_000))
        await set_budget(router, "key:key-1", ("month", "usd", NANO_PER_USD))
        await ask(router)
    assert len(acme.calls) == 1


async def test_what_was_refused_costs_nothing(paid: Paid, acme: ScriptedBackEnd, log: Log) -> None:
    async with paid() as router:
        for status, kind in ((400, InvalidArgument), (429, RateLimited), (500, Unavailable), (401, Unavailable)):
            acme.play(error_status=status)
            with pytest.raises(kind):
                await ask(router)
            assert (await budget(router)).limits[0].spent == 0
        assert [event.nano_usd for event in await finished(log, 4)] == [0, 0, 0, 0]


async def test_a_provider_that_cannot_be_reached_costs_nothing(paid: Paid, acme: ScriptedBackEnd) -> None:
    async with paid() as router:
        await acme.stop()
        with pytest.raises(Unavailable):
            await ask(router)
        assert (await budget(router)).limits[0].spent == 0
        await acme.start()


async def test_an_answer_that_breaks_off_costs_its_reservation(paid: Paid, acme: ScriptedBackEnd, log: Log) -> None:
    acme.play(drop_after=3)
    async with paid() as router:
        answered = await ask(router, stream=True, body={"max_tokens": 50})
        assert answered.error is not None
        _, event = await log.call(answered.id)
        assert event.estimated
        assert event.nano_usd >= cost_of(0, 50)


async def test_a_device_comes_before_every_provider(
    paid: Paid, acme: ScriptedBackEnd, back_end: ScriptedBackEnd
) -> None:
    back_end.play(models=(ScriptedModel(name="big"),))
    async with paid(model_urls=[back_end.url]) as router:
        assert (await router.complete("big", cloud=True)).head.route == "local"
        assert not acme.requests
        back_end.play(error_status=500)
        assert (await router.complete("big", cloud=True)).head.route == "cloud"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_may_have_been_paid_for_is_made_nowhere_else(
    start: Start, acme: ScriptedBackEnd, tmp_path: Path, log: Log, stream: bool
) -> None:
    async with ScriptedBackEnd(acme.script) as other:
        providers = [provider(tmp_path, other.url, "aaa"), provider(tmp_path, acme.url, "bbb")]
        async with start(providers=providers) as router:
            await set_budget(router, "total", ("month", "usd", NANO_PER_USD))
            # They read a call and close its connection without a byte of an answer.
            other.play(drop_after=0)
            acme.play(drop_after=0)
            with pytest.raises(Unavailable, match="may have answered and charged") as failed:
                await ask(router, call_id=(call_id := new_id()), stream=stream, body={"max_tokens": 10})
            assert failed.value.retryable and failed.value.fields["reason"] == "perhaps_paid"
            assert len(other.calls) + len(acme.calls) == 1
            _, event = await log.call(call_id)
            assert (event.estimated, event.code) == (True, "unavailable")
            assert event.nano_usd >= cost_of(0, 10)
            assert (await budget(router)).limits[0].spent == event.nano_usd


async def test_a_kept_connection_that_breaks_pays_once_and_sends_nothing_again(
    paid: Paid, acme: ScriptedBackEnd, log: Log
) -> None:
    async with paid() as router:
        await ask(router, body={"max_tokens": 10})
        acme.play(drop_after=0)
        with pytest.raises(Unavailable, match="may have answered and charged"):
            await ask(router, call_id=(call_id := new_id()), body={"max_tokens": 10})
        assert len(acme.calls) == 2
        _, event = await log.call(call_id)
        assert event.estimated
        assert (await budget(router)).limits[0].spent == event.nano_usd + cost_of(1, 10)


async def test_a_call_that_was_refused_goes_to_the_next_provider(
    start: Start, acme: ScriptedBackEnd, tmp_path: Path, log: Log
) -> None:
    async with ScriptedBackEnd(Script(models=(ScriptedModel(name="big-1"),))) as other:
        providers = [provider(tmp_path, other.url, "aaa"), provider(tmp_path, acme.url, "bbb")]
        async with start(providers=providers) as router:
            await set_budget(router, "total", ("month", "usd", NANO_PER_USD))
            for calls, status in enumerate((500, 0), start=1):
                other.play(error_status=status)
                if not status:
                    # A kept connection and whoever listened are gone: nothing can have come there.
                    await other.stop()
                answered = await ask(router, body={"max_tokens": 10})
                _, event = await log.call(answered.id)
                assert (event.provider, event.estimated, event.nano_usd) == ("bbb", False, cost_of(1, 10))
                assert len(acme.calls) == calls


@pytest.mark.parametrize("status", [504, 524])
async def test_a_proxy_that_waited_in_vain_may_have_been_answered(
    paid: Paid, acme: ScriptedBackEnd, log: Log, status: int
) -> None:
    acme.play(error_status=status)
    async with paid() as router:
        with pytest.raises(DeadlineExceeded):
            await ask(router, call_id=(call_id := new_id()), body={"max_tokens": 10})
        _, event = await log.call(call_id)
        assert event.estimated and event.nano_usd >= cost_of(0, 10)


@pytest.mark.parametrize("name", ["service_tier", "models", "web_search_options"])
async def test_what_changes_the_price_is_refused(paid: Paid, acme: ScriptedBackEnd, name: str) -> None:
    async with paid() as router:
        with pytest.raises(InvalidArgument, match=name):
            await ask(router, body={name: ["priority"]})
    assert not acme.requests


async def test_usage_is_summed_up(paid: Paid, acme: ScriptedBackEnd, back_end: ScriptedBackEnd, log: Log) -> None:
    async with paid(model_urls=[back_end.url]) as router:
        for key in ("key-1", "key-1", "key-2"):
            await ask(router, key=key, body={"max_tokens": 5})
        await router.complete(key="key-2")
        await finished(log, 4)
        by_key = {row.name: (row.calls, row.completion_tokens, row.nano_usd) for row in await usage(router, "key")}
        assert by_key == {"key-1": (2, 10, 2 * cost_of(1, 5)), "key-2": (2, 21, cost_of(1, 5))}
        by_route = {row.name: row.nano_usd for row in await usage(router, "route")}
        assert by_route == {"cloud": 3 * cost_of(1, 5), "local": 0}
        with pytest.raises(InvalidArgument, match="by"):
            await usage(router, "colour")


async def test_what_is_set_aside_is_bounded_and_counted_through_a_restart(paid: Paid, log: Log) -> None:
    async with paid() as router:
        await ask(router, body={"max_tokens": 5})
    async with paid(usd=None) as router:
        assert (await budget(router)).limits[0].spent == cost_of(1, 5)
        await ask(router, body={"max_tokens": 5})
        assert (await budget(router)).limits[0].spent == 2 * cost_of(1, 5)
    assert await counted(log) == 2 * cost_of(1, 5)


async def test_two_hundred_calls_against_a_budget_for_fifty_spend_no_more(
    paid: Paid, acme: ScriptedBackEnd, log: Log
) -> None:
    acme.play(tokens=10)
    prompt = {"max_tokens": 10}
    async with paid(usd=None) as router:
        # What one such call reserves is what its prompt can be at most, and all that it may generate.
        await set_budget(router, "total", ("month", "usd", NANO_PER_USD))
        await ask(router, body=prompt)
        limit = 50 * cost_of(1, 10)
        await set_budget(router, "total", ("month", "usd", limit))
        acme.play(error_status=429, error_calls=30)
        outcomes = await asyncio.gather(*(persistent(router, prompt) for _ in range(200)), return_exceptions=True)
        assert {type(one) for one in outcomes if isinstance(one, BaseException)} == {BudgetExhausted}
        # Reserved is more than spent: what some were refused for others have left.
        while True:
            try:
                await ask(router, body=prompt)
            except BudgetExhausted:
                break
        records = await charged(log, len(generations(acme)))
        spent = (await budget(router)).limits[0].spent
    assert cost_of(*generated(acme)) == spent <= limit
    assert sum(event.nano_usd for event in records) == await counted(log) == spent


async def persistent(router: Router, body: dict[str, Any]) -> None:
    """Make a call, again and again while the provider says that it has too many."""
    while True:
        try:
            await ask(router, body=body)
        except RateLimited:
            continue
        return
