import asyncio
from typing import Any

import msgspec
import pytest
from hive_common.kernel.errors import InvalidArgument, NotFound, PermissionDenied
from hive_common.kernel.ids import new_id
from hive_common.rpc.rules import KeyRules
from hive_common.testing.scripted import ScriptedBackEnd, text_of

from .conftest import Log, Router, Start, piece_of


async def test_a_call_is_answered_whole(router: Router, back_end: ScriptedBackEnd, log: Log) -> None:
    answered = await router.complete(body={"seed": 7, "unknown": [1, {"a": None}]})
    assert (answered.head.status, answered.head.content_type, answered.head.route) == (
        200,
        "application/json",
        "local",
    )
    assert answered.json["choices"][0]["message"]["content"] == text_of(16)
    sent = msgspec.json.decode(back_end.calls[-1].body)
    assert (sent["seed"], sent["unknown"]) == (7, [1, {"a": None}])
    stored, event = await log.call(answered.id)
    assert (stored.subject, stored.actor, stored.owner) == ("caller-1", "caller-1", router.config.owner)
    assert (event.endpoint, event.model, event.key, event.route) == ("chat", "scripted", "key-1", "local")
    assert (event.code, event.completion_tokens) == ("", 16)
    assert event.request is not None and event.request.raw == back_end.calls[-1].body
    assert event.response is not None and event.response.raw == answered.body


async def test_a_stream_comes_as_it_is_and_its_tokens_are_counted(
    router: Router, back_end: ScriptedBackEnd, log: Log
) -> None:
    answered = await router.complete(stream=True)
    assert answered.head.content_type.startswith("text/event-stream")
    assert (answered.text, answered.events[-1]) == (text_of(16), b"[DONE]")
    # The usage was asked for by the router alone, so the caller does not get it.
    assert b'"usage"' not in answered.body
    assert msgspec.json.decode(back_end.calls[-1].body)["stream_options"] == {"include_usage": True}
    _, event = await log.call(answered.id)
    assert (event.code, event.completion_tokens) == ("", 16)
    assert event.response is not None and event.response.raw is not None
    whole = msgspec.json.decode(event.response.raw)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": text_of(16)}
    assert "truncated" not in whole


async def test_a_caller_that_asks_for_the_usage_gets_it(router: Router) -> None:
    answered = await router.complete(stream=True, body={"stream_options": {"include_usage": True}})
    usage = msgspec.json.decode(answered.events[-2])
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 16)


async def test_an_unknown_model_is_told_with_the_nearest(router: Router) -> None:
    with pytest.raises(NotFound) as caught:
        await router.complete("scriptde")
    assert caught.value.fields["nearest"] == ["scripted"]


async def test_a_body_that_is_no_json_is_refused(router: Router) -> None:
    with pytest.raises(InvalidArgument, match="body"):
        await router.complete(raw=b'{"model": "scripted", ')


async def test_cancelling_the_call_cancels_the_generation(
    router: Router, back_end: ScriptedBackEnd, log: Log
) -> None:
    back_end.play(tokens=100_000, pace_ms=5)
    call_id = "01890000-0000-7000-8000-000000000001"
    pending = router.begin(stream=True, call_id=call_id)
    async for message in pending:
        if b"content" in piece_of(message):
            break
    left_s = asyncio.get_running_loop().time()
    pending.cancel()
    await back_end.until(lambda: back_end.generations[-1].outcome == "cancelled")
    assert back_end.generations[-1].ended_s - left_s < 0.8  # four times the bound of 200 ms
    _, event = await log.call(call_id)
    assert event.code == "cancelled"


async def test_counts_only_keeps_no_text(router: Router, log: Log) -> None:
    answered = await router.complete(stream=True, counts_only=True)
    _, event = await log.call(answered.id)
    assert (event.request, event.response, event.completion_tokens) == (None, None, 16)


async def test_the_rules_of_a_key_that_come_beside_a_call_hold(
    start: Start, back_end: ScriptedBackEnd, log: Log
) -> None:
    async with start(model_urls=[back_end.url]) as router:
        router.rules = KeyRules("pool", counts_only=True, key="ci")
        answered = await router.complete()
        _, event = await log.call(answered.id)
        assert (event.key, event.pin, event.request, event.response) == ("ci", "pool", None, None)
        with pytest.raises(PermissionDenied, match="`pool`"):
            await router.complete(pin="any")
        assert len(back_end.calls) == 1


async def test_a_call_is_explained_also_after_a_restart(start: Start, back_end: ScriptedBackEnd, log: Log) -> None:
    async with start(model_urls=[back_end.url]) as router:
        answered = await router.complete()
        await log.call(answered.id)
        before = await router.explain(answered.id)
    assert (before.route, before.outcome) == ("local", "succeeded")
    assert [(one.route, one.rejected, one.tried) for one in before.candidates] == [
        ("local", "", "succeeded"),
        ("cloud", "cloud_off", ""),
    ]
    async with start(model_urls=[back_end.url]) as router:
        assert await router.explain(answered.id) == before


async def test_an_answer_longer_than_a_message_of_grpc_comes_whole(
    router: Router, back_end: ScriptedBackEnd
) -> None:
    back_end.play(tokens=3_000_000)
    answered = await router.complete(timeout=60)
    assert len(answered.body) > 16 * 1024 * 1024
    assert answered.json["usage"]["completion_tokens"] == 3_000_000


async def test_a_call_that_there_never_was_cannot_be_explained(router: Router) -> None:
    with pytest.raises(NotFound, match="no model call"):
        await router.explain(new_id())
    with pytest.raises(InvalidArgument, match="call_id"):
        await router.explain("yesterday")


async def test_a_key_of_users_is_told_of_its_own_calls_only(router: Router) -> None:
    answered = await router.complete(key="ada")
    for rules in (KeyRules(key="ada", only="pseudonym-of-ada"), KeyRules(key="ops")):
        assert (await router.explain(answered.id, rules)).outcome == "succeeded"
    with pytest.raises(NotFound, match="no model call"):
        await router.explain(answered.id, KeyRules(key="bob", only="pseudonym-of-bob"))


async def test_a_call_is_explained_while_it_runs(router: Router, back_end: ScriptedBackEnd) -> None:
    back_end.play(tokens=3, pace_ms=60_000)
    pending = router.begin(stream=True, call_id=(call_id := new_id()))
    await pending.read()
    explained = await router.explain(call_id)
    assert (explained.outcome, explained.route, explained.candidates[0].backend) == (
        "running",
        "local",
        back_end.url,
    )
    pending.cancel()


async def test_a_request_that_cannot_be_is_refused_by_name(router: Router) -> None:
    wrong: list[dict[str, Any]] = [{"call_id": "x"}, {"endpoint": "images"}, {"model": ""}, {"pin": "mars"}]
    for fields in wrong:
        with pytest.raises(InvalidArgument, match=next(iter(fields))):
            await router.complete(**fields)
