from typing import Any

import msgspec
from hive_common.bus.nats import request
from hive_common.contracts.events import ExecutorRegistered, ExecutorRevoked, Model
from hive_common.contracts.messages import (
    Committed,
    ModelCallReport,
    StreamChunk,
    call_subject,
    inbox_prefix,
)
from hive_common.contracts.permissions import ModelPermission, Permissions
from hive_common.contracts.values import Value, inline
from hive_common.inference.calls import OfferedModel
from hive_common.kernel.ids import new_id
from hive_common.testing.scripted import ScriptedBackEnd, text_of
from hive_common.testing.tokens import TokenKey
from prometheus_client import REGISTRY, generate_latest

from .conftest import TOKENS, Log, Router, Start, capabilities
from .devices import Asking, Device, InferCall

OWN = Model(name="own", backend="ollama")


async def joined(router: Router, log: Log, device: Device, *models: Model, owner: str = "owner") -> None:
    """Make a device known to the router, which it is once it may call."""
    event = ExecutorRegistered(name="laptop", capabilities=capabilities(*models))
    await log.add(device.id, event, owner=owner)
    while True:
        first = (await (await device.ask("nobody-has-this").begin()).all())[0]
        assert first.error is not None
        if first.error.code == "not_found":
            return
        assert first.error.code == "permission_denied"


def said(chunks: list[StreamChunk]) -> bytes:
    return "".join(chunk.data for chunk in chunks).encode()


async def test_a_device_calls_a_model_of_the_gateways_host(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        asking = await device.ask("scripted", token=TOKENS.token(device.id, attempt=2)).begin()
        chunks = await asking.all()
        assert (chunks[0].status, chunks[0].content_type, chunks[0].route) == (200, "application/json", "pool")
        assert msgspec.json.decode(said(chunks))["choices"][0]["message"]["content"] == text_of(16)
        stored, event = await log.call(asking.request.call)
        assert (stored.actor, stored.owner, stored.subject) == (device.id, "owner", "owner")
        assert (event.job, event.task, event.attempt, event.route) == ("job-1", "task-1", 2, "pool")


async def test_a_device_that_shows_no_token_says_nothing_of_an_attempt(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        asking = device.ask("scripted")
        # What earlier versions of executors said is their own word.
        body = msgspec.json.decode(msgspec.json.encode(asking.request)) | {"job": "j", "task": "t", "attempt": 7}
        await device.client.subscribe(asking.reply, cb=asking._receive)
        await device.client.publish(call_subject(device.id, "model"), msgspec.json.encode(body), asking.reply)
        await asking.all()
        _, event = await log.call(asking.request.call)
        assert (event.job, event.task, event.attempt) == ("", "", 0)


def model(*names: str, max_tokens: int = 1_000, pin: str = "any") -> Permissions:
    return Permissions(model=ModelPermission(names, max_tokens, pin))


async def test_a_guest_may_call_what_its_token_says_and_nothing_else(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        mine = TOKENS.token(device.id)
        refused = {
            "another executor's": TOKENS.token(new_id()),
            "has expired": TOKENS.token(device.id, expires_us=1),
            "not of this installation": TokenKey().token(device.id),
            "was changed": mine[:-20] + ("A" if mine[-20] != "A" else "B") + mine[-19:],
            "granted for other, not for 'scripted'": TOKENS.token(device.id, model("other")),
            "`model` is not granted": TOKENS.token(device.id, Permissions(scratch_bytes=1)),
        }
        for says, token in refused.items():
            (only,) = await (await device.ask("scripted", token=token).begin()).all()
            assert only.error is not None, says
            assert (only.error.code, says in only.error.message) == ("permission_denied", True), only.error
        assert not back_end.calls
        pinned = TOKENS.token(device.id, model("*", pin="own-devices"))
        (only,) = await (await device.ask("scripted", token=pinned, pin="region:eu").begin()).all()
        assert only.error is not None and only.error.code == "permission_denied"
        few = TOKENS.token(device.id, model("scripted", max_tokens=5))
        await (await device.ask("scripted", token=few, tokens_max=1_000).begin()).all()
        assert msgspec.json.decode(back_end.calls[-1].body)["max_tokens"] == 5


async def test_a_device_cannot_widen_what_its_job_says(start: Start, log: Log, back_end: ScriptedBackEnd) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device, owner="friend")
        # The gateway's host is nobody's own device here.
        pinned = TOKENS.token(device.id, pin="own-devices")
        (only,) = await (await device.ask("scripted", token=pinned, pin="any").begin()).all()
        assert only.error is not None and only.error.message.startswith("own-devices: no own device")
        assert not back_end.calls
        counted = TOKENS.token(device.id, counts_only=True)
        asking = await device.ask("scripted", token=counted, counts_only=False).begin()
        await asking.all()
        _, event = await log.call(asking.request.call)
        assert (event.completion_tokens, event.request, event.response) == (16, None, None)
        # Nor in what it tells of a call that it served itself.
        call_id = new_id()
        text = inline(b'{"a":1}')
        assert await done(device, call=call_id, token=counted, request=text, response=text) == Committed()
        _, event = await log.call(call_id)
        assert (event.request, event.response) == (None, None)
        elsewhere = await done(device, token=pinned, pin="region:eu")
        assert elsewhere.error is not None and elsewhere.error.code == "permission_denied"


async def test_calls_of_an_attempt_together_have_what_was_granted(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        token = TOKENS.token(device.id, model("scripted", max_tokens=40))
        limits, generated = [], 0
        while True:
            # It says each time that all of it is left.
            asking = await device.ask("scripted", token=token, tokens_max=40).begin()
            chunks = await asking.all()
            if chunks[-1].error is not None:
                break
            limits.append(msgspec.json.decode(back_end.calls[-1].body)["max_tokens"])
            _, event = await log.call(asking.request.call)
            generated += event.completion_tokens
        assert (limits, generated) == ([40, 24, 8], 40)
        assert chunks[-1].error.code == "budget_exhausted"
        assert "40 of the 40 tokens of this attempt are used up" in chunks[-1].error.message
        # What failed has generated nothing, and what broke off may have generated all.
        fresh = TOKENS.token(device.id, model("scripted", max_tokens=40), attempt=2)
        for changes, code in (({"error_status": 500}, "unavailable"), ({"error_status": 0, "drop_after": 3}, "")):
            back_end.play(**changes)
            chunks = await (await device.ask("scripted", stream=True, token=fresh).begin()).all()
            assert (chunks[-1].error.code if chunks[-1].error else "") == code
        back_end.play(drop_after=None)
        chunks = await (await device.ask("scripted", token=fresh).begin()).all()
        assert chunks[-1].error is not None and chunks[-1].error.code == "budget_exhausted"


async def test_of_a_device_that_keeps_only_counts_no_text_is_recorded(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        kept = []
        for counts_only in (True, False):
            asking = await device.ask("scripted", stream=True, counts_only=counts_only).begin()
            await asking.all()
            _, event = await log.call(asking.request.call)
            assert event.completion_tokens == 16
            kept.append((event.request is not None, event.response is not None))
        assert kept == [(False, False), (True, True)]


async def test_a_device_streams_from_another_device_but_never_from_itself(start: Start, log: Log) -> None:
    async with start() as router, router.device(new_id()) as asks, router.device(new_id()) as serves:
        await joined(router, log, asks, OWN)
        alone = (await (await asks.ask("own").begin()).all())[0].error
        assert alone is not None and "no other device serves `own`" in alone.message
        await joined(router, log, serves, OWN)
        chunks = await (await asks.ask("own", stream=True).begin()).all()
        assert chunks[0].executor == serves.id
        assert said(chunks).endswith(b"data: [DONE]\n\n")
        assert not asks.calls


async def test_own_devices_are_those_of_the_owner_of_the_device_that_calls(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device, owner="friend")
        error = (await (await device.ask("scripted", pin="own-devices").begin()).all())[0].error
        # The gateway's host belongs to somebody else.
        assert error is not None and error.message == "own-devices: no own device serves `scripted`"
        assert not back_end.calls


async def test_a_device_learns_what_others_serve(start: Start, log: Log, back_end: ScriptedBackEnd) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device, OWN)
        chunks = await (await device.ask("", op="models").begin()).all()
        listed = msgspec.json.decode(said(chunks), type=list[OfferedModel])
        assert [(one.name, one.executors) for one in listed] == [("own", (device.id,)), ("scripted", ())]


async def test_a_body_comes_in_parts(start: Start, log: Log, back_end: ScriptedBackEnd) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        asking = device.ask("scripted", parts=3)
        body = asking.request.body
        pieces = (body[:10], body[10:20], body[20:])
        asking.request = msgspec.structs.replace(asking.request, body=pieces[0])
        await asking.begin()
        for number in (1, 2):
            await asking.send(msgspec.structs.replace(asking.request, body=pieces[number], part=number))
        await asking.all()
        assert back_end.calls[-1].body == body.encode()


async def test_no_more_is_sent_than_there_is_credit_for(start: Start, log: Log, back_end: ScriptedBackEnd) -> None:
    back_end.play(tokens=200, pace_ms=1)
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        asking = await device.ask("scripted", stream=True, credit=3).begin()
        first = [await asking.chunks.get() for _ in range(3)]
        # An answer to another call goes the same way, so that whatever was sent before it has come.
        await (await device.ask("nobody-has-this").begin()).all()
        assert asking.chunks.empty()
        await asking.tell("credit", credit=1_000)
        rest = await asking.all_after(first)
        assert said(rest).endswith(b"data: [DONE]\n\n")


async def test_a_cancel_ends_the_generation(start: Start, log: Log, back_end: ScriptedBackEnd) -> None:
    back_end.play(tokens=100_000, pace_ms=5)
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        asking = await device.ask("scripted", stream=True).begin()
        await asking.chunks.get()
        await asking.tell("cancel")
        await back_end.until(lambda: back_end.generations[-1].outcome == "cancelled")
        _, event = await log.call(asking.request.call)
        assert event.code == "cancelled"


async def test_a_reply_subject_of_somebody_else_is_dropped(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    heard: list[Any] = []

    async def hear(message: Any) -> None:
        heard.append(message)

    async with (
        start(model_urls=[back_end.url]) as router,
        router.device(new_id()) as device,
        router.device(new_id()) as victim,
    ):
        await joined(router, log, device)
        subject = f"{inbox_prefix(victim.id)}.x"
        await victim.client.subscribe(subject, cb=hear)
        await victim.client.flush()
        asking: Asking = device.ask("scripted", reply=subject)
        await asking.send(asking.request)
        # Messages of one device are taken in order: this one comes after it.
        await (await device.ask("scripted").begin()).all()
        assert (heard, len(back_end.calls)) == ([], 1)


NO_CALLS: list[dict[str, Any]] = [
    {"endpoint": "images"},
    {"model": ""},
    {"deadline_ms": 0},
    {"call": "no-uuid"},
    {"pin": "mars"},
    {"part": 1, "parts": 2},
    {"parts": 99},
    {"body": "{"},
]


async def test_what_cannot_be_a_call_is_answered_with_the_reason(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        for changes in NO_CALLS:
            asking = device.ask("scripted")
            asking.request = msgspec.structs.replace(asking.request, **changes)
            (only,) = await (await asking.begin()).all()
            assert only.error is not None and only.error.code == "invalid_argument", changes
        assert not back_end.calls


async def test_calls_of_one_executor_are_bounded(start: Start, log: Log, back_end: ScriptedBackEnd) -> None:
    back_end.play(tokens=10, pace_ms=10_000)
    limits = {"model_urls": [back_end.url], "executor_calls_max": 2, "executor_bytes_max": 10_000}
    async with start(**limits) as router, router.device(new_id()) as device, router.device(new_id()) as other:
        await joined(router, log, device)
        await joined(router, log, other)
        for _ in range(2):
            await device.ask("scripted", stream=True).begin()
        (third,) = await (await device.ask("scripted", stream=True).begin()).all()
        assert third.error is not None and third.error.code == "rate_limited"
        (large,) = await (await other.ask("scripted", body={"x": "y" * 20_000}).begin()).all()
        assert large.error is not None and large.error.code == "rate_limited"
        # The others are served all the same.
        await (await other.ask("scripted", stream=True).begin()).chunks.get()


async def test_an_id_cannot_be_used_twice(start: Start, log: Log, back_end: ScriptedBackEnd) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        answered = await router.complete()
        (only,) = await (await device.ask("scripted", call=answered.id).begin()).all()
        assert only.error is not None and only.error.code == "conflict"


async def done(device: Device, **fields: Any) -> Committed:
    values = {"call": new_id(), "endpoint": "chat", "model": "own", **fields}
    subject = call_subject(device.id, "model-done")
    return await request(device.client, subject, ModelCallReport(**values), Committed, 20)


async def test_a_call_that_a_device_served_itself_is_recorded_once(start: Start, log: Log) -> None:
    call_id = new_id()
    async with start() as router, router.device(new_id()) as device, router.device(new_id()) as other:
        await joined(router, log, device)
        await joined(router, log, other)
        report = {"call": call_id, "completion_tokens": 9, "request": inline(b'{"a":1}')}
        # It may be told long after the attempt, when its token has expired.
        report["token"] = TOKENS.token(device.id, attempt=3, expires_us=1)
        assert await done(device, **report) == Committed()
        stored, event = await log.call(call_id)
        assert (stored.actor, event.route, event.executor) == (device.id, "local", device.id)
        assert (event.completion_tokens, event.request) == (9, inline(b'{"a":1}'))
        assert (event.job, event.task, event.attempt) == ("job-1", "task-1", 3)
        # It was told, but the answer was lost: the same again is as good.
        assert await done(device, **report) == Committed()
        stolen = await done(other, **report)
        assert stolen.error is not None and stolen.error.code == "permission_denied"
        foreign = await done(other, **{**report, "token": ""})
        assert foreign.error is not None and foreign.error.code == "conflict"
        explained = await router.explain(call_id)
        assert [(one.executor, one.route, one.tried) for one in explained.candidates] == [
            (device.id, "local", "succeeded")
        ]


NO_REPORTS: list[dict[str, Any]] = [
    {"call": "x"},
    {"endpoint": "images"},
    {"model": ""},
    {"code": "Not A Code"},
    {"wall_ms": -1},
    {"completion_tokens": 1 << 2_000},
    {"request": Value()},
    {"response": Value(digest="sha256:short")},
    {"response": inline(b'"' + b"x" * 262_144 + b'"')},
]


async def test_a_report_that_cannot_be_is_refused(start: Start, log: Log) -> None:
    async with start() as router, router.device(new_id()) as device:
        await joined(router, log, device)
        for fields in NO_REPORTS:
            answer = await done(device, **fields)
            assert answer.error is not None and answer.error.code == "invalid_argument", fields


async def test_codes_that_a_device_makes_up_become_no_series(start: Start, log: Log) -> None:
    async with start() as router, router.device(new_id()) as device:
        await joined(router, log, device)
        for number in range(3):
            assert await done(device, code="made_up" + "_" * number) == Committed()
        assert b"made_up" not in generate_latest(REGISTRY)


async def test_who_is_not_known_may_neither_call_nor_report(start: Start, back_end: ScriptedBackEnd) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        (only,) = await (await device.ask("scripted").begin()).all()
        assert only.error is not None and only.error.code == "permission_denied"
        answer = await done(device)
        assert answer.error is not None and answer.error.code == "permission_denied"


async def test_a_device_that_goes_away_takes_its_calls_along(
    start: Start, log: Log, back_end: ScriptedBackEnd
) -> None:
    back_end.play(tokens=100_000, pace_ms=5)
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        asking = await device.ask("scripted", stream=True).begin()
        await asking.chunks.get()
        await log.add(device.id, ExecutorRevoked())
        await back_end.until(lambda: back_end.generations[-1].outcome == "cancelled")


async def test_a_call_through_two_devices_has_all_tokens_in_order(start: Start, log: Log) -> None:
    async def play(call: InferCall) -> None:
        await call.answer(500)

    async with start(credit=8) as router, router.device(new_id()) as asks, router.device(new_id(), play) as serves:
        await joined(router, log, serves, OWN)
        await joined(router, log, asks)
        chunks = await (await asks.ask("own", stream=True).begin()).all()
        events = said(chunks).split(b"\n\n")[:-2]
        choices = [msgspec.json.decode(event.removeprefix(b"data: "))["choices"][0] for event in events]
        assert "".join(choice["delta"]["content"] for choice in choices) == text_of(500)
